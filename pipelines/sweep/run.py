"""All trials of a sweep, one after the other or one part of them; what is finished is kept, the unfinished goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cliplift.configs.sections import ConfigError
from cliplift.configs.sweeps import SweepRun
from cliplift.configs.training import TrainingRun
from cliplift.pipelines.distributed.collectives import Topology, broadcast_object, start
from cliplift.pipelines.engine.faults import DivergedError, caught_signals
from cliplift.pipelines.repeats import run_all
from cliplift.pipelines.runs.folder import RESULT, metrics_of, read_json, write_json
from cliplift.pipelines.runs.results import formatted, metric_name
from cliplift.pipelines.runs.sweeps import SweepRecord, TrialRecord, write_sweep
from cliplift.pipelines.runs.tracking import LOWER_IS_BETTER
from cliplift.pipelines.stages.run import stage_of
from cliplift.pipelines.sweep.brackets import Bracket, halving, hyperband, survivors
from cliplift.pipelines.sweep.trials import Values, described, draw, grid

FAILED = "failed.json"  # in the folder of a run whose training diverged
Load = Callable[
    [Sequence[str]], TrainingRun
]  # from key=value words to the run that they make of the base config


@dataclass(frozen=True)
class Sweep:
    """A sweep whose every run is known to be possible.

    Attributes:
        config: what was asked for.
        metric, maximise: what chooses.
        trials: the values of each.
        brackets: who runs how long; without halving one, of one rung with all trials, whose steps are 0.
        runs: (trial, steps) -> its run.
    """

    config: SweepRun
    metric: str
    maximise: bool
    trials: tuple[Values, ...]
    brackets: tuple[Bracket, ...]
    runs: dict[tuple[int, int], TrainingRun]

    @property
    def rungs(self) -> int:
        """How many rungs there are at most: so often the parts of an array job are started, one after the other."""
        return max(len(bracket.rungs) for bracket in self.brackets)


@dataclass(frozen=True)
class SweepResult:
    """What there is after a start of a sweep."""

    record: SweepRecord
    finished: bool  # all runs of all rungs
    requeue: bool = False  # stopped by a signal after saving


def plan_sweep(config: SweepRun, load: Load) -> Sweep:
    """The trials of a sweep, each validated, before anything is trained.

    Args:
        config: the sweep.
        load: makes a run of words that override the base config.

    Raises:
        ConfigError: a parameter or a value that the base config does not take; halving of a run without steps.
    """
    base = load(config.overrides)
    brackets = _brackets(config, base)
    trials = tuple(grid(config.parameters)) if config.method == "grid" else ()
    numbers = range(len(trials)) if trials else [k for bracket in brackets for k in bracket.trials]
    trials = trials or tuple(draw(config, k) for k in numbers)
    brackets = brackets or [Bracket(tuple(numbers), ((len(trials), 0),))]
    runs = {
        (trial, steps): _run_of(config, load, trials[trial], trial, steps)
        for bracket in brackets
        for _, steps in bracket.rungs
        for trial in bracket.trials
    }
    metric = config.metric or stage_of(base).best_metric
    maximise = not metric.endswith(LOWER_IS_BETTER) if config.goal is None else config.goal == "maximise"
    return Sweep(config, metric, maximise, trials, tuple(brackets), runs)


def _brackets(config: SweepRun, base: TrainingRun) -> list[Bracket]:
    """Of halving and hyperband, or of draws; none of a grid."""
    if config.method == "grid":
        return []
    if config.method == "random":
        assert config.trials is not None
        return [Bracket(tuple(range(config.trials)), ((config.trials, 0),))]
    longest, least = base.schedule.steps, config.least_steps
    assert least is not None
    if longest is None:
        raise ConfigError(
            f"{config.method} counts optimizer steps, and {config.run} says epochs",
            key="method",
            value=config.method,
            hint="say schedule.steps and schedule.epochs=null in overrides",
        )
    if least > longest:
        raise ConfigError(
            f"{least} is above the {longest} steps of {config.run}",
            key="least_steps",
            value=least,
            hint="use less",
        )
    if config.method == "hyperband":
        return hyperband(longest=longest, least=least, factor=config.factor)
    assert config.trials is not None
    return halving(trials=config.trials, longest=longest, least=least, factor=config.factor)


def _run_of(config: SweepRun, load: Load, values: Values, trial: int, steps: int) -> TrainingRun:
    """The run of a trial: it never sees the test split, validation takes its place."""
    words = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    run = load([*config.overrides, *words, *([f"schedule.steps={steps}"] if steps else [])])
    parts = [f"trial{trial:03d}", *([f"steps{steps}"] if steps else [])]
    checkpoint = run.checkpoint
    if checkpoint.url is not None:
        checkpoint = checkpoint.model_copy(update={"url": "/".join([checkpoint.url, config.name, *parts])})
    group = run.track.group or os.environ.get("WANDB_RUN_GROUP") or config.name
    changes: dict[str, object] = {
        "name": "-".join([config.name, *parts]),
        "output": str(Path(config.output, *parts)),
        "checkpoint": checkpoint,
        "track": run.track.model_copy(update={"group": group}),
    }
    if "test_split" in type(run).model_fields:
        changes["test_split"] = run.data.val_split
    return run.model_copy(update=changes)


def run_sweep(
    sweep: Sweep,
    *,
    command: Sequence[str],
    part: tuple[int, int] | None = None,
    say: Callable[[str], None] = print,
) -> SweepResult:
    """Run the trials that are not finished.

    Args:
        sweep: from :func:`plan_sweep`.
        command: how it was started, for the records of the runs.
        part: (i, n): every n-th trial from the i-th of each rung alone. A rung of a bracket waits until all parts have
            finished the one below it: this start then does nothing for it, and the next goes on.
        say: takes the lines about each trial.

    Raises:
        ConfigError: the runs have no such metric.
    """
    topology = start(next(iter(sweep.runs.values())).engine)
    speak = say if topology.is_main else _silent
    done: dict[tuple[int, int], TrialRecord] = {}
    finished, stopped = True, False
    with caught_signals():
        for bracket in sweep.brackets:
            alive = bracket.trials
            for rung, (count, steps) in enumerate(bracket.rungs):
                if rung:
                    before = {k: done[k, bracket.rungs[rung - 1][1]].value for k in alive}
                    alive = survivors(before, count=count, maximise=sweep.maximise)
                for trial in alive if part is None else alive[part[0] :: part[1]]:
                    stopped = not _tried(sweep, trial, steps, command=command, say=speak, topology=topology)
                    if stopped:
                        break
                found = broadcast_object({k: _found(sweep, k, steps) for k in alive}, topology)
                done |= {(k, steps): one for k, one in found.items() if one is not None}
                record = _recorded(sweep, done, topology)
                if stopped:
                    return SweepResult(record, finished=False, requeue=True)
                if None in found.values():
                    finished = False
                    break
    return SweepResult(_recorded(sweep, done, topology), finished=finished)


def _silent(_: str) -> None:
    """For the ranks that are not the main one."""


def _tried(
    sweep: Sweep,
    trial: int,
    steps: int,
    *,
    command: Sequence[str],
    say: Callable[[str], None],
    topology: Topology,
) -> bool:
    """Run one trial, unless it has been run. False when a signal stopped it, after saving."""
    if broadcast_object(_found(sweep, trial, steps) is not None, topology):
        return True
    run = sweep.runs[trial, steps]
    length = f", {steps} steps" if steps else ""
    say(
        f"{sweep.config.name}: trial {trial} of {len(sweep.trials)}{length}: {described(sweep.trials[trial])}"
    )
    try:
        result = run_all(run, command=command)
    except DivergedError as error:
        if topology.is_main:
            write_json(Path(run.output) / FAILED, {"failed": str(error)})
        say(f"{run.name}: {error}")
        return True
    if result.finished:
        value = _metric(sweep, result.metrics, run.output)
        say(f"{run.name}: validation {metric_name(sweep.metric)} {formatted(sweep.metric, value)}")
    return result.finished


def _found(sweep: Sweep, trial: int, steps: int) -> TrialRecord | None:
    """What the folder of a trial's run says; None while it is not finished."""
    run = sweep.runs[trial, steps]
    folder = Path(run.output)
    failed, result = read_json(folder / FAILED), read_json(folder / RESULT)
    if failed is None and result is None:
        return None
    return TrialRecord(
        trial=trial,
        values=sweep.trials[trial],
        steps=run.schedule.steps,
        folder=folder.relative_to(sweep.config.output).as_posix(),
        value=None if result is None else _metric(sweep, metrics_of(result), run.output),
        failed="" if failed is None else str(failed.get("failed")),
    )


def _metric(sweep: Sweep, metrics: Mapping[str, float], folder: str) -> float:
    """The validation metric of a run's numbers, where those of a test split may stand beside it."""
    value = metrics.get(f"val_{sweep.metric}", metrics.get(sweep.metric))
    if value is None:
        names = sorted({name.removeprefix("val_") for name in metrics})
        raise ConfigError(
            f"{folder} has no {sweep.metric!r}",
            key="metric",
            value=sweep.metric,
            hint=f"it has {', '.join(names)}",
        )
    return value


def _recorded(sweep: Sweep, done: dict[tuple[int, int], TrialRecord], topology: Topology) -> SweepRecord:
    record = SweepRecord(
        name=sweep.config.name,
        method=sweep.config.method,
        metric=sweep.metric,
        maximise=sweep.maximise,
        runs=tuple(done[key] for key in sweep.runs if key in done),
    )
    if topology.is_main:
        Path(sweep.config.output).mkdir(parents=True, exist_ok=True)
        write_sweep(Path(sweep.config.output), record)
    return record
