"""``cliplift demo``: the whole chain on clips made on the spot, ending in one table and one HTML report.

Every step is an ordinary stage run from a packaged recipe, so each can be repeated by hand with the command that
its ``run.json`` holds. A step that is already done is not done again.
"""

from __future__ import annotations

import argparse
import json
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
    from cliplift.pipelines.report.page import DemoFacts
    from cliplift.pipelines.stages.run import StageResult

METHODS = {
    "3D from transfer": "finetune/demo",
    "3D from scratch": "finetune/demo_scratch",
    "2D teacher, averaged frames": "finetune/demo_frames",
}


@dataclass(frozen=True)
class Row:
    """One line of the table: a method and its test accuracy over the seeds."""

    method: str
    accuracies: tuple[float, ...]
    folders: tuple[str, ...]

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

    root = Path(run.output)
    root.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    began = time.monotonic()

    def timed(name: str, since: float) -> float:
        now = time.monotonic()
        seconds[name] = round(seconds.get(name, 0.0) + now - since, 1)
        return now

    with stopping_at_once():
        _make_videos(run, root)
        clock = timed("make videos", began)
        for recipe in ("demo_actions", "demo_unlabelled"):
            _shard(run, root, recipe)
        clock = timed("shard", clock)
    transfer = _train(
        "transfer/demo",
        root,
        folder=root / "transfer",
        overrides=[f"schedule.steps={run.transfer_steps}", f"data.shards={root / 'shards' / 'unlabelled'}"],
    )
    clock = timed("transfer", clock)
    rows = []
    for method, recipe in METHODS.items():
        rows.append(_finetune(run, root, method, recipe))
        clock = timed(method, clock)
    facts = _facts(transfer, rows, seconds | {"total": round(time.monotonic() - began, 1)})
    write_json(root / DEMO, facts)
    with stopping_at_once():
        report = write_report(
            runs=[transfer.folder, *(Path(f) for row in rows for f in row.folders)],
            output=root / "report.html",
            title="cliplift demo",
            max_clips=16,
            demo=facts,
        )
    print(table(facts, rows))
    print(f"report: {report}")
    return report


def _make_videos(run: DemoRun, root: Path) -> None:
    from cliplift.pipelines.runs.folder import write_json
    from cliplift.sharding.demo.synthetic import write_demo_videos

    settings = run.model_dump(
        include={"size_pixels", "train_per_class", "val_per_class", "test_per_class", "unlabelled"}
    )
    done = root / "videos" / "made.json"
    if done.is_file() and json.loads(done.read_text())["settings"] == settings:
        return
    print(
        f"making {run.unlabelled} unlabelled videos and the labelled clips in {root / 'videos'}", flush=True
    )
    write_demo_videos(root / "videos", seed=0, workers=run.workers, **settings)
    write_json(done, {"settings": settings})


def _shard(run: DemoRun, root: Path, recipe: str) -> None:
    from cliplift.configs.sharding import ShardRun
    from cliplift.launch.commands.subject import load_as

    name = recipe.removeprefix("demo_")
    source = {"actions": "labelled", "unlabelled": "unlabelled"}[name]
    loaded = load_as(
        f"shard/{recipe}",
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
            f"schedule.steps={run.frames_steps if recipe.endswith('frames') else run.finetune_steps}",
            f"data.shards={root / 'shards' / 'actions'}",
        ]
        if method == "3D from transfer":
            overrides.append(f"initialise_from={root / 'transfer'}")
        results.append(_train(recipe, root, folder=folder, overrides=overrides))
    return Row(method, tuple(r.metrics["accuracy"] for r in results), tuple(str(r.folder) for r in results))


def _facts(transfer: StageResult, rows: Sequence[Row], seconds: Mapping[str, float]) -> DemoFacts:
    return {
        "transfer": dict(transfer.metrics),
        "table": [
            {
                "method": r.method,
                "mean": r.mean,
                "sd": r.sd,
                "values": list(r.accuracies),
                "runs": list(r.folders),
            }
            for r in rows
        ],
        "seconds": dict(seconds),
    }


def table(facts: DemoFacts, rows: Sequence[Row]) -> str:
    """The demo's one table, as text."""
    from cliplift.pipelines.runs.folder import RunFolder, metrics_of

    matching = facts["transfer"]
    chance = metrics_of(RunFolder(Path(rows[0].folders[0]), writes=False).result() or {})["chance"]
    lines = [
        "",
        f"{'transfer: matching accuracy, held-out videos':46s} {matching['matching_accuracy']:.3f}"
        f"   (prior {matching['matching_prior']:.3f}, {int(matching['held_out_clips'])} clips)",
        f"{'test accuracy':46s} {'mean':>5s}   sd      seeds",
    ]
    for row in rows:
        sd = "  -  " if row.sd is None else f"{row.sd:.3f}"
        lines.append(
            f"  {row.method:44s} {row.mean:.3f}   {sd}   {' '.join(f'{a:.3f}' for a in row.accuracies)}"
        )
    lines += [f"  {'chance':44s} {chance:.3f}", f"time: {facts['seconds']['total']:.0f} s", ""]
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
