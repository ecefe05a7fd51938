"""Commands that use finished runs: ``evaluate``, ``fuse``, ``predict``, ``explain``, ``report`` and ``export``.

Each takes a YAML file, or a run folder from which it makes the config itself.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cliplift.launch.commands.command import Command, add_json_option, for_programs, print_json

if TYPE_CHECKING:
    from cliplift.configs.runs import EvaluateRun, ExplainRun, ExportRun, FuseRun, PredictRun, ReportRun
    from cliplift.configs.sections import Section
    from cliplift.launch.commands.subject import FolderConfig

    R = TypeVar("R", bound=Section)

RUN_OR_CONFIG = "run or export folder, or a YAML file"


def _apply(
    arguments: argparse.Namespace,
    schema: type[R],
    execute: Callable[[R], int],
    *,
    from_folder: FolderConfig,
    extra_key: str | None = None,
    or_url: bool = False,
) -> int:
    """Load the run that the words name and execute it, or print it for ``--dry-run``. Returns the exit code."""
    from cliplift.launch.commands import subject

    loaded = subject.load_stage(
        arguments, schema, from_folder=from_folder, extra_key=extra_key, or_url=or_url
    )
    if arguments.dry_run:
        return subject.print_run(loaded)
    subject.prepare_environment()
    as_json = getattr(arguments, "json", False)
    with for_programs(as_json):
        status = subject.run_located(loaded, lambda: execute(loaded.run))
    if as_json:
        _print_result(Path(str(loaded.run.model_dump()["output"])))
    return status


def _print_result(output: Path) -> None:
    """Where it was written and, of an evaluation, its result.json; by one rank of many."""
    from cliplift.pipelines.distributed.launchers import find_place
    from cliplift.pipelines.runs.folder import RESULT, read_json

    if find_place(os.environ).rank == 0:
        result = read_json(output / RESULT) if output.is_dir() else None
        print_json({"output": str(output)} | (result or {}))


def run_evaluate(arguments: argparse.Namespace) -> int:
    from cliplift.configs.runs import EvaluateRun

    status = _apply(
        arguments,
        EvaluateRun,
        _evaluate,
        from_folder=lambda folder, _: {"run": folder, "output": str(Path(folder) / "evaluate")},
    )
    if not arguments.dry_run:
        from cliplift.pipelines.distributed.collectives import leave

        leave(status)
    return status


def _evaluate(run: EvaluateRun) -> int:
    from cliplift.launch.commands.subject import command_words
    from cliplift.pipelines.evaluation.evaluate import run_evaluate

    run_evaluate(run, command=command_words())
    return 0


def run_fuse(arguments: argparse.Namespace) -> int:
    from cliplift.configs.runs import FuseRun

    return _apply(
        arguments,
        FuseRun,
        _fuse,
        from_folder=lambda folder, more: {"runs": [folder, *more], "output": str(Path(folder) / "fused")},
        extra_key="runs",
    )


def _fuse(run: FuseRun) -> int:
    from cliplift.launch.commands.subject import command_words
    from cliplift.pipelines.evaluation.fuse import run_fuse

    run_fuse(run, command=command_words())
    return 0


def run_predict(arguments: argparse.Namespace) -> int:
    from cliplift.configs.runs import PredictRun

    return _apply(
        arguments,
        PredictRun,
        _predict,
        from_folder=lambda folder, videos: {"run": folder, "videos": videos},
        extra_key="videos",
    )


def _predict(run: PredictRun) -> int:
    """Exit code 1 when a video could not be read."""
    from cliplift.pipelines.evaluation.predict import run_predict

    return 1 if run_predict(run) else 0


def run_explain(arguments: argparse.Namespace) -> int:
    from cliplift.configs.runs import ExplainRun

    return _apply(
        arguments,
        ExplainRun,
        _explain,
        from_folder=lambda folder, videos: {
            "run": folder,
            "videos": videos,
            "output": str(Path(folder) / "explained"),
        },
        extra_key="videos",
    )


def _explain(run: ExplainRun) -> int:
    """Exit code 1 when a video could not be read."""
    from cliplift.pipelines.evaluation.explain import run_explain

    return 1 if run_explain(run) else 0


def run_report(arguments: argparse.Namespace) -> int:
    from cliplift.configs.runs import ReportRun

    return _apply(
        arguments,
        ReportRun,
        _report,
        from_folder=lambda folder, more: {
            "runs": [folder, *more],
            "output": str(Path(folder) / "report.html"),
        },
        extra_key="runs",
    )


def _report(run: ReportRun) -> int:
    from cliplift.pipelines.report.page import run_report

    print(run_report(run))
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    from cliplift.configs.runs import ExportRun

    return _apply(arguments, ExportRun, _export, from_folder=_export_tree, extra_key="output", or_url=True)


def _export_tree(folder: str, more: list[str]) -> dict[str, object]:
    default = Path(folder) / "export"
    if "://" in folder:
        default = Path(f"export-{folder.rstrip('/').rpartition('/')[2]}")
    elif (Path(folder) / "COMPLETE.json").is_file():  # a checkpoint: what lies in it goes when it grows old
        above = (p for p in Path(folder).absolute().parents[:3] if (p / "config.yaml").is_file())
        default = next(above, Path(folder).parent) / f"export-{Path(folder).name}"
    return {"run": folder, "output": more[0] if more else str(default)}


def _export(run: ExportRun) -> int:
    from cliplift.pipelines.evaluation.export import run_export
    from cliplift.pipelines.stages.checkpoint_export import export_checkpoint, is_checkpoint

    print(export_checkpoint(run) if is_checkpoint(run.run) else run_export(run))
    return 0


COMMANDS = (
    Command(
        name="evaluate",
        summary="evaluate a run on a split",
        subject="RUN|CONFIG",
        subject_help=RUN_OR_CONFIG,
        schema="evaluate",
        add_options=add_json_option,
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
        add_options=add_json_option,
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
        add_options=add_json_option,
        run=run_report,
    ),
    Command(
        name="export",
        summary="write a run's or a checkpoint's weights as safetensors + config.json",
        subject="RUN|CHECKPOINT|CONFIG",
        subject_help="run folder, one checkpoint of it, or a YAML file",
        rest="FOLDER|key=value",
        rest_help="folder to write, and overrides of config keys",
        schema="export",
        add_options=add_json_option,
        run=run_export,
    ),
)
