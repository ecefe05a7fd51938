"""Finetuning over official splits and seeds in one command: one run each, then mean and standard deviation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cliplift.configs.runs import FinetuneRun
from cliplift.configs.sections import ConfigError
from cliplift.pipelines.distributed.collectives import start
from cliplift.pipelines.engine.faults import caught_signals
from cliplift.pipelines.runs.folder import RunFolder
from cliplift.pipelines.runs.results import commands_after, result_block
from cliplift.pipelines.stages.run import StageResult, run_stage, stage_of
from cliplift.sharding.read.reader import fold_count


def repeated(run: FinetuneRun) -> list[FinetuneRun]:
    """The single runs a run with ``folds`` or ``seeds`` stands for, each with its own folder and name.

    Raises:
        ConfigError: the shards have no such fold, or none at all.
    """
    folds = _folds(run)
    runs = []
    for fold in folds:
        for seed in run.seeds or (None,):
            parts = [f"fold{fold}"] if fold is not None else []
            parts += [f"seed{seed}"] if seed is not None else []
            changes = {
                "folds": (),
                "seeds": (),
                "output": str(Path(run.output, *parts)),
                "name": "-".join([run.name, *parts]),
                "seed": run.seed if seed is None else seed,
                "data": run.data if fold is None else run.data.model_copy(update={"fold": fold}),
                "track": run.track.model_copy(update={"group": run.track.group or run.name}),
            }
            runs.append(run.model_copy(update=changes))
    return runs


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


def run_repeats(run: FinetuneRun, *, command: Sequence[str]) -> StageResult:
    """Run all of them, each resuming or passing over what is finished, and write the summary into ``run.output``.

    A signal ends the whole, also one that arrives between two runs: starting it again goes on with the run it
    stopped in.
    """
    started = time.monotonic()
    results = []
    with caught_signals():
        for single in repeated(run):
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
    """Mean of every metric all runs have, and its sample standard deviation as ``NAME_sd`` (0 for one run)."""
    shared = [name for name in runs[0] if all(name in metrics for metrics in runs)]
    found: dict[str, float] = {"runs": float(len(runs))}
    for name in shared:
        values = [metrics[name] for metrics in runs]
        found[name] = statistics.fmean(values)
        found[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return found
