"""Finetuning over official splits and seeds in one command: one run each, then mean and standard deviation."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cliplift.configs.runs import FinetuneRun
from cliplift.configs.sections import ConfigError
from cliplift.configs.training import CheckpointConfig, TrainingRun
from cliplift.pipelines.distributed.collectives import start
from cliplift.pipelines.engine.faults import caught_signals
from cliplift.pipelines.runs.folder import RunFolder
from cliplift.pipelines.runs.published import PublishedRun
from cliplift.pipelines.runs.results import commands_after, result_block
from cliplift.pipelines.runs.tracking import log_aggregate, wandb_group
from cliplift.pipelines.stages.run import StageResult, run_stage, stage_of
from cliplift.sharding.read.reader import fold_count


def single_runs(run: TrainingRun) -> list[TrainingRun]:
    """What a config stands for: one run for each of its ``folds`` and ``seeds``, or itself alone.

    Raises:
        ConfigError: the shards have no such fold, or none at all.
    """
    return REPEATED[type(run)](run) if type(run) in REPEATED else [run]


def _finetune_runs(run: FinetuneRun) -> list[TrainingRun]:
    """One run for each fold and seed, with a folder and a name of its own."""
    if not run.folds and not run.seeds:
        return [run]
    folds = _folds(run)
    runs: list[TrainingRun] = []
    for fold in folds:
        for seed in run.seeds or (None,):
            parts = [f"fold{fold}"] if fold is not None else []
            parts += [f"seed{seed}"] if seed is not None else []
            changes = {
                "folds": (),
                "seeds": (),
                "output": str(Path(run.output, *parts)),
                "checkpoint": _below(run.checkpoint, parts),
                "name": "-".join([run.name, *parts]),
                "seed": run.seed if seed is None else seed,
                "data": run.data if fold is None else run.data.model_copy(update={"fold": fold}),
                "track": run.track.model_copy(update={"group": wandb_group(run, os.environ)}),
            }
            runs.append(run.model_copy(update=changes))
    return runs


def _below(checkpoint: CheckpointConfig, parts: Sequence[str]) -> CheckpointConfig:
    """The same with a place of its own in the store, if there is one."""
    if checkpoint.url is None:
        return checkpoint
    return checkpoint.model_copy(update={"url": "/".join([checkpoint.url, *parts])})


def _folds(run: FinetuneRun) -> Sequence[int | None]:
    if run.folds == ():
        return (None,)
    counts = {url: fold_count(url) for url in run.data.urls}
    if run.folds == "all":
        url, count = min(counts.items(), key=lambda item: item[1])
        if not count:
            raise ConfigError(f"{url} has a single split", key="folds", value="all", hint="leave it out")
        return tuple(range(1, count + 1))
    assert not isinstance(run.folds, str)
    return run.folds


# Stages whose config may stand for several runs.
REPEATED: dict[type[TrainingRun], Callable[..., list[TrainingRun]]] = {FinetuneRun: _finetune_runs}


def run_all(run: TrainingRun, *, command: Sequence[str]) -> StageResult:
    """Run whatever a config stands for.

    Several runs are made one after the other, each resumed where it was stopped and left alone where it is finished;
    their summary is written into ``run.output``.

    A signal ends the whole, also one that arrives between two runs: starting it again goes on with the run it
    stopped in.
    """
    singles = single_runs(run)
    if singles == [run]:
        return run_stage(run, command=command)
    started = time.monotonic()
    results = []
    with caught_signals():
        for single in singles:
            result = run_stage(single, command=command)
            if not result.finished:
                return result
            results.append(result)
    topology = start(run.engine)
    folder = RunFolder.create(run.output, writes=topology.is_main)
    metrics = summary([result.metrics for result in results])
    seconds = time.monotonic() - started
    folder.write_start(run, stage="finetune", name=run.name, command=command, world_size=topology.world_size)
    folder.write_result(
        stage="finetune",
        metrics=metrics,
        seconds=seconds,
        runs=[str(result.folder) for result in results],
    )
    if topology.is_main:
        named = {single.name: result.metrics for single, result in zip(singles, results, strict=True)}
        log_aggregate(run, folder=folder.path, metrics=metrics, runs=named)
    PublishedRun(run.checkpoint.url, folder.path).publish_result(topology)
    if topology.is_main:
        best_metric = stage_of(run).best_metric
        next_commands = commands_after("finetune", folder.path, offline_run=None)[-1:]
        print(
            result_block(
                run.name, metrics, best_metric=best_metric, folder=folder.path, next_commands=next_commands
            ),
            flush=True,
        )
    return StageResult(folder.path, metrics, seconds=seconds)


def summary(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every metric all runs have, and its sample standard deviation as ``NAME_sd`` (0 for one run).

    The bounds of single runs' intervals are left out: their means are the bounds of nothing.
    """
    shared = [name for name in runs[0] if all(name in metrics for metrics in runs)]
    shared = [name for name in shared if not name.endswith(("_low", "_high"))]
    found: dict[str, float] = {"runs": float(len(runs))}
    for name in shared:
        values = [metrics[name] for metrics in runs]
        found[name] = statistics.fmean(values)
        found[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return found
