"""Commands that use finished runs: ``evaluate``, ``fuse``, ``predict``, ``explain``, ``report`` and ``export``.

Each takes a YAML file, or a run folder from which it makes the config itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cliplift.launch.commands.command import Command

RUN_OR_CONFIG = "run or export folder, or a YAML file"


def run_evaluate(arguments: argparse.Namespace) -> int:
    from cliplift.launch.commands import subject

    def from_folder(folder: str, _: list[str]) -> dict[str, Any]:
        return {"stage": "evaluate", "run": folder, "output": str(Path(folder) / "evaluate")}

    loaded = subject.load_stage(arguments, "evaluate", from_folder=from_folder)
    if arguments.dry_run:
        return subject.print_run(loaded)
    subject.prepare_environment()
    from cliplift.pipelines.distributed.collectives import leave
    from cliplift.pipelines.evaluation.evaluate import run_evaluate as evaluate

    subject.located(loaded, lambda: evaluate(loaded.run, command=subject.command_words()))
    leave(0)
    return 0


def run_fuse(arguments: argparse.Namespace) -> int:
    from cliplift.launch.commands import subject

    def from_folder(folder: str, more: list[str]) -> dict[str, Any]:
        return {"stage": "fuse", "runs": [folder, *more], "output": str(Path(folder) / "fused")}

    loaded = subject.load_stage(arguments, "fuse", from_folder=from_folder, extra_key="runs")
    if arguments.dry_run:
        return subject.print_run(loaded)
    subject.prepare_environment()
    from cliplift.pipelines.evaluation.fuse import run_fuse as fuse

    subject.located(loaded, lambda: fuse(loaded.run, command=subject.command_words()))
    return 0


def run_predict(arguments: argparse.Namespace) -> int:
    """Exit code 1 when a video could not be read."""
    from cliplift.launch.commands import subject

    def from_folder(folder: str, videos: list[str]) -> dict[str, Any]:
        return {"stage": "predict", "run": folder, "videos": videos}

    loaded = subject.load_stage(arguments, "predict", from_folder=from_folder, extra_key="videos")
    if arguments.dry_run:
        return subject.print_run(loaded)
    subject.prepare_environment()
    from cliplift.pipelines.evaluation.predict import run_predict as predict

    failed = subject.located(loaded, lambda: predict(loaded.run))
    return 1 if failed else 0


def run_explain(arguments: argparse.Namespace) -> int:
    """Exit code 1 when a video could not be read."""
    from cliplift.launch.commands import subject

    def from_folder(folder: str, videos: list[str]) -> dict[str, Any]:
        return {
            "stage": "explain",
            "run": folder,
            "videos": videos,
            "output": str(Path(folder) / "explained"),
        }

    loaded = subject.load_stage(arguments, "explain", from_folder=from_folder, extra_key="videos")
    if arguments.dry_run:
        return subject.print_run(loaded)
    subject.prepare_environment()
    from cliplift.pipelines.evaluation.explain import run_explain as explain

    failed = subject.located(loaded, lambda: explain(loaded.run))
    return 1 if failed else 0


def run_report(arguments: argparse.Namespace) -> int:
    from cliplift.launch.commands import subject

    def from_folder(folder: str, more: list[str]) -> dict[str, Any]:
        return {"stage": "report", "runs": [folder, *more], "output": str(Path(folder) / "report.html")}

    loaded = subject.load_stage(arguments, "report", from_folder=from_folder, extra_key="runs")
    if arguments.dry_run:
        return subject.print_run(loaded)
    from cliplift.pipelines.report.page import run_report as report

    print(subject.located(loaded, lambda: report(loaded.run)))
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    from cliplift.launch.commands import subject

    def from_folder(folder: str, more: list[str]) -> dict[str, Any]:
        return {"stage": "export", "run": folder, "output": more[0] if more else str(Path(folder) / "export")}

    loaded = subject.load_stage(arguments, "export", from_folder=from_folder, extra_key="output")
    if arguments.dry_run:
        return subject.print_run(loaded)
    subject.prepare_environment()
    from cliplift.pipelines.evaluation.export import run_export as export

    print(subject.located(loaded, lambda: export(loaded.run)))
    return 0


COMMANDS = (
    Command(
        name="evaluate",
        summary="evaluate a run on a split",
        subject="RUN|CONFIG",
        subject_help=RUN_OR_CONFIG,
        schema="evaluate",
        distributed=True,
        run=run_evaluate,
    ),
    Command(
        name="fuse",
        summary="fuse the predictions of several runs, such as an RGB and a flow stream",
        subject="RUN|CONFIG",
        subject_help="run that was evaluated, its evaluation, or a YAML file",
        rest="RUN|key=value",
        rest_help="the other runs, and overrides of config keys such as weights=[1,1.5]",
        schema="fuse",
        run=run_fuse,
    ),
    Command(
        name="predict",
        summary="classify video files",
        subject="RUN|CONFIG",
        subject_help=RUN_OR_CONFIG,
        rest="VIDEO|key=value",
        rest_help="videos (files or folders) and overrides of config keys",
        schema="predict",
        run=run_predict,
    ),
    Command(
        name="explain",
        summary="heat maps over videos: where the evidence for a class lies",
        subject="RUN|CONFIG",
        subject_help=RUN_OR_CONFIG,
        rest="VIDEO|key=value",
        rest_help="videos (files or folders) and overrides of config keys",
        schema="explain",
        run=run_explain,
    ),
    Command(
        name="report",
        summary="one self-contained HTML page about runs",
        subject="RUN|CONFIG",
        subject_help="run or demo folder, or a YAML file",
        rest="RUN|key=value",
        rest_help="more run folders, and overrides of config keys",
        schema="report",
        run=run_report,
    ),
    Command(
        name="export",
        summary="write a run's weights as safetensors + config.json",
        subject="RUN|CONFIG",
        subject_help="run folder, or a YAML file",
        rest="FOLDER|key=value",
        rest_help="folder to write, and overrides of config keys",
        schema="export",
        run=run_export,
    ),
)
