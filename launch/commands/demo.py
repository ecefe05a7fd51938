"""``cliplift demo``: the whole chain on clips made on the spot, ending in one table and one HTML report.

There are two sets of clips: classes of what moves and how (``motion=and_kind``), and classes of how alone
(``motion=only``).

Every step is an ordinary stage run from a packaged recipe, so each can be repeated by hand with the command that
its ``run.json`` holds. A step that is already done is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cliplift.launch.commands.command import Command
from cliplift.launch.commands.shard import build, summary

if TYPE_CHECKING:
    from cliplift.configs.runs import DemoRun
    from cliplift.pipelines.report.page import DemoFacts, DemoRow
    from cliplift.pipelines.stages.run import StageResult

MADE = "videos/made.json"
FRAME_AT_BEST = "a single frame, at best"
TRANSFER, INFLATED = "3D from transfer", "3D as transfer starts, without it"
SCRATCH, FRAMES = "3D from scratch", "2D teacher, averaged frames"


@dataclass(frozen=True)
class _Recipes:
    """The packaged recipes of one set of clips, and how many motions share each kind of object in it."""

    shard_labelled: str
    shard_unlabelled: str
    transfer: str
    methods: Mapping[str, str]  # in the order of the table


def _recipes(name: str, *, inflated: bool) -> _Recipes:
    return _Recipes(
        shard_labelled=f"shard/{name}_actions",
        shard_unlabelled=f"shard/{name}_unlabelled",
        transfer=f"transfer/{name}",
        methods={
            TRANSFER: f"finetune/{name}",
            **({INFLATED: f"finetune/{name}_inflated"} if inflated else {}),
            SCRATCH: f"finetune/{name}_scratch",
            FRAMES: f"finetune/{name}_frames",
        },
    )


RECIPES: Mapping[str, _Recipes] = {
    "and_kind": _recipes("demo_kinds", inflated=True),
    "only": _recipes("demo", inflated=False),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: a method and its test accuracy over the seeds; the accuracy of guessing."""

    method: str
    accuracies: tuple[float, ...]
    folders: tuple[str, ...]
    chance: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def sd(self) -> float | None:
        """Sample standard deviation; None with a single seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


class _StoppedError(Exception):
    """A training run of the demo was stopped by a signal and has saved its state."""


def run_demo(arguments: argparse.Namespace) -> int:
    """The demo of a config, or of overrides alone."""
    from cliplift.configs.runs import DemoRun
    from cliplift.launch.commands import subject

    if arguments.subject is not None and "=" in arguments.subject:
        arguments.subject, arguments.rest = None, [arguments.subject, *arguments.rest]
    if arguments.subject is None:
        loaded = subject.load_tree({}, DemoRun, arguments.rest)
    else:
        loaded = subject.load_stage(arguments, DemoRun)
    if arguments.dry_run:
        return subject.print_run(loaded)
    subject.prepare_environment()
    subject.run_located(loaded, lambda: demonstrate(loaded.run))
    return 0


def demonstrate(run: DemoRun) -> Path | None:
    """Make videos, shard, transfer, finetune, test, report. Returns the report's path; None after a signal.

    A signal stops the demo wherever it is: started again, it goes on with the run, or the step, that was stopped.
    """
    from cliplift.pipelines.engine.faults import StoppedBySignalError, caught_signals

    with caught_signals():
        try:
            return _run_demo(run)
        except (_StoppedError, StoppedBySignalError):
            print(f"demo: stopped by a signal; start it again to continue in {run.output}", flush=True)
            return None


def _run_demo(run: DemoRun) -> Path:
    from cliplift.pipelines.engine.faults import stopping_at_once
    from cliplift.pipelines.report.page import DEMO, write_report
    from cliplift.pipelines.runs.folder import write_json

    root, recipes = Path(run.output), RECIPES[run.motion]
    _refuse_other_set(run, root)
    root.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    began, used_before = time.monotonic(), _cpu_seconds()

    def timed(name: str, since: float) -> float:
        now = time.monotonic()
        seconds[name] = round(seconds.get(name, 0.0) + now - since, 1)
        return now

    with stopping_at_once():
        _make_videos(run, root)
        clock = timed("make videos", began)
        _shard(run, root, recipes.shard_labelled, source="labelled", name="actions")
        _shard(run, root, recipes.shard_unlabelled, source="unlabelled", name="unlabelled")
        clock = timed("shard", clock)
    transfer = _train(
        recipes.transfer,
        root,
        folder=root / "transfer",
        overrides=[f"schedule.steps={run.transfer_steps}", f"data.shards={root / 'shards' / 'unlabelled'}"],
    )
    clock = timed("transfer", clock)
    rows = []
    for method, recipe in recipes.methods.items():
        rows.append(_finetune(run, root, method, recipe))
        clock = timed(method, clock)
    facts = _facts(run, transfer, rows, seconds | {"total": round(time.monotonic() - began, 1)})
    facts["cpu_seconds"] = round(_cpu_seconds() - used_before, 1)
    write_json(root / DEMO, facts)
    with stopping_at_once():
        report = write_report(
            runs=[transfer.folder, *(Path(f) for row in rows for f in row.folders)],
            output=root / "report.html",
            title="cliplift demo",
            max_clips=16,
            demo=facts,
        )
    print(table(facts))
    print(f"report: {report}")
    return report


def _cpu_seconds() -> float:
    """Processor time of this process and of those it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _make_videos(run: DemoRun, root: Path) -> None:
    from cliplift.pipelines.runs.folder import write_json
    from cliplift.sharding.demo.synthetic import write_demo_videos

    counts = run.model_dump(
        include={"size_pixels", "train_per_class", "val_per_class", "test_per_class", "unlabelled"}
    )
    settings = {"motion": run.motion, **counts}
    done = root / MADE
    if done.is_file() and json.loads(done.read_text())["settings"] == settings:
        return
    print(
        f"making {run.unlabelled} unlabelled videos and the labelled clips in {root / 'videos'}", flush=True
    )
    write_demo_videos(
        root / "videos", seed=0, workers=run.workers, with_kinds=run.motion == "and_kind", **counts
    )
    write_json(done, {"settings": settings})


def _refuse_other_set(run: DemoRun, root: Path) -> None:
    """A folder that holds the other set's clips is not trained on by mistake.

    Raises:
        ConfigError: it does.
    """
    from cliplift.configs.sections import ConfigError

    made = root / MADE
    found = json.loads(made.read_text())["settings"].get("motion", "only") if made.is_file() else run.motion
    if found != run.motion:
        raise ConfigError(
            f"{run.output!r} holds the demo with motion={found}",
            key="output",
            value=run.output,
            hint="name another folder",
        )


def _shard(run: DemoRun, root: Path, recipe: str, *, source: str, name: str) -> None:
    from cliplift.configs.sharding import ShardRun
    from cliplift.launch.commands.subject import load_as

    loaded = load_as(
        recipe,
        ShardRun,
        [
            f"source.root={root / 'videos' / source}",
            f"output={root / 'shards' / name}",
            f"workers={run.workers}",
        ],
    )
    print(summary(build(loaded.run, phase="all", part=None, retry_failed=False)), flush=True)


def _train(recipe: str, root: Path, *, folder: Path, overrides: Sequence[str]) -> StageResult:
    from cliplift.launch.commands.subject import load_training
    from cliplift.pipelines.stages.run import run_stage

    words = [f"output={folder}", *overrides]
    loaded = load_training(recipe, words)
    print(f"{loaded.run.stage}: {loaded.run.name} -> {folder}", flush=True)
    result = run_stage(loaded.run, command=["cliplift", loaded.run.stage, recipe, *words])
    if not result.finished:
        raise _StoppedError
    return result


def _finetune(run: DemoRun, root: Path, method: str, recipe: str) -> Row:
    results = []
    for seed in run.seeds:
        folder = root / f"{recipe.replace('/', '-')}-seed{seed}"
        overrides = [
            f"seed={seed}",
            f"schedule.steps={_steps(run, method)}",
            f"data.shards={root / 'shards' / 'actions'}",
        ]
        if method == TRANSFER:
            overrides.append(f"initialise_from={root / 'transfer'}")
        results.append(_train(recipe, root, folder=folder, overrides=overrides))
    return Row(
        method,
        tuple(result.metrics["accuracy"] for result in results),
        tuple(str(result.folder) for result in results),
        results[0].metrics["chance"],
    )


def _steps(run: DemoRun, method: str) -> int:
    """Optimizer steps of a method's finetuning."""
    of_its_own = {SCRATCH: run.scratch_steps, FRAMES: run.frames_steps}
    return of_its_own.get(method) or run.finetune_steps


def _facts(
    run: DemoRun, transfer: StageResult, rows: Sequence[Row], seconds: Mapping[str, float]
) -> DemoFacts:
    tested: list[DemoRow] = [
        {
            "method": r.method,
            "mean": r.mean,
            "sd": r.sd,
            "values": list(r.accuracies),
            "runs": list(r.folders),
        }
        for r in rows
    ]
    known: list[DemoRow] = [{"method": "chance", "mean": rows[0].chance}]
    if run.motion == "and_kind":
        from cliplift.sharding.demo.motions import MOTIONS

        known.insert(0, {"method": FRAME_AT_BEST, "mean": 1 / len(MOTIONS)})
    return {"transfer": dict(transfer.metrics), "table": tested + known, "seconds": dict(seconds)}


def table(facts: DemoFacts) -> str:
    """The demo's one table, as text."""
    matching = facts["transfer"]
    lines = [
        "",
        f"{'transfer: matching accuracy, held-out videos':46s} {matching['matching_accuracy']:.3f}"
        f"   (prior {matching['matching_prior']:.3f}, {int(matching['held_out_clips'])} clips)",
        f"{'test accuracy':46s} {'mean':>5s}   sd      seeds",
    ]
    for row in facts["table"]:
        values = row.get("values", [])
        sd = row.get("sd")
        spread = "" if not values else "  -  " if sd is None else f"{sd:.3f}"
        each = " ".join(f"{value:.3f}" for value in values)
        lines.append(f"  {row['method']:44s} {row['mean']:.3f}   {spread}   {each}".rstrip())
    lines += [f"time: {facts['seconds']['total']:.0f} s, {facts['cpu_seconds']:.0f} CPU seconds", ""]
    return "\n".join(lines)


COMMANDS = (
    Command(
        name="demo",
        summary="the whole chain on clips made on the spot, on a CPU in minutes",
        subject_required=False,
        subject_help="YAML file; none is needed",
        schema="demo",
        run=run_demo,
    ),
)
