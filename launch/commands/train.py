"""What each subcommand does: read its config, then call the stage. One function ``run_NAME`` per subcommand."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cliplift.configs.load import LoadedRun, apply_overrides, dump_run, load_run, packaged_recipe, validate
from cliplift.configs.runs import RUNS
from cliplift.configs.sections import ConfigError, Section


def run_shard(arguments: argparse.Namespace) -> int:
    loaded = _load(arguments, "shard")
    if arguments.dry_run:
        return _show(loaded)
    from cliplift.launch.commands.shard import build, summary

    report = _located(
        loaded,
        lambda: build(
            loaded.run, phase=arguments.phase, part=arguments.part, retry_failed=arguments.retry_failed
        ),
    )
    print(summary(report))
    return 0 if report.verified is None or report.verified.ok else 1


def run_verify(arguments: argparse.Namespace) -> int:
    from cliplift.sharding.build.verify import verify

    report = verify(arguments.subject, decode=arguments.decode)
    print(report.summary())
    return 0 if report.ok else 1


def run_show(arguments: argparse.Namespace) -> int:
    from cliplift.sharding.read.contact_sheet import write_contact_sheet

    print(write_contact_sheet(arguments.subject, arguments.output, clips_per_split=arguments.clips))
    return 0


def run_index(arguments: argparse.Namespace) -> int:
    from cliplift.sharding.build.index_tars import index_tars

    dataset = index_tars(
        arguments.subject,
        name=arguments.name,
        label_key=arguments.label_key,
        classes=tuple(arguments.classes),
        workers=arguments.workers,
    )
    print(f"{arguments.subject}: {dataset.samples} samples, {len(dataset.classes)} classes indexed")
    return 0


def run_transfer(arguments: argparse.Namespace) -> int:
    return _train(arguments, "transfer")


def run_pretrain(arguments: argparse.Namespace) -> int:
    return _train(arguments, "pretrain")


def run_finetune(arguments: argparse.Namespace) -> int:
    return _train(arguments, "finetune")


def _train(arguments: argparse.Namespace, stage: str) -> int:
    loaded = _load(arguments, stage)
    _prepare_environment()
    from cliplift.pipelines.distributed.collectives import leave
    from cliplift.pipelines.stages.run import dry_run, run_stage

    if arguments.dry_run:
        print(_located(loaded, lambda: dry_run(loaded.run)))
        return 0
    if stage == "finetune" and (loaded.run.folds or loaded.run.seeds):
        from cliplift.pipelines.stages.repeats import run_repeats

        result = _located(loaded, lambda: run_repeats(loaded.run, command=_command()))
    else:
        result = _located(loaded, lambda: run_stage(loaded.run, command=_command()))
    code = 0 if result.finished or result.requeue else 1
    leave(code)
    return code


def run_evaluate(arguments: argparse.Namespace) -> int:
    def from_folder(folder: str, _: list[str]) -> dict[str, Any]:
        return {"stage": "evaluate", "run": folder, "output": str(Path(folder) / "evaluate")}

    loaded = _load(arguments, "evaluate", from_folder=from_folder)
    if arguments.dry_run:
        return _show(loaded)
    _prepare_environment()
    from cliplift.pipelines.distributed.collectives import leave
    from cliplift.pipelines.evaluation.evaluate import run_evaluate as evaluate

    _located(loaded, lambda: evaluate(loaded.run, command=_command()))
    leave(0)
    return 0


def run_fuse(arguments: argparse.Namespace) -> int:
    def from_folder(folder: str, more: list[str]) -> dict[str, Any]:
        return {"stage": "fuse", "runs": [folder, *more], "output": str(Path(folder) / "fused")}

    loaded = _load(arguments, "fuse", from_folder=from_folder, extra_key="runs")
    if arguments.dry_run:
        return _show(loaded)
    _prepare_environment()
    from cliplift.pipelines.evaluation.fuse import run_fuse as fuse

    _located(loaded, lambda: fuse(loaded.run, command=_command()))
    return 0


def run_predict(arguments: argparse.Namespace) -> int:
    def from_folder(folder: str, videos: list[str]) -> dict[str, Any]:
        return {"stage": "predict", "run": folder, "videos": videos}

    loaded = _load(arguments, "predict", from_folder=from_folder, extra_key="videos")
    if arguments.dry_run:
        return _show(loaded)
    _prepare_environment()
    from cliplift.pipelines.evaluation.predict import run_predict as predict

    failed = _located(loaded, lambda: predict(loaded.run))
    return 1 if failed else 0


def run_explain(arguments: argparse.Namespace) -> int:
    def from_folder(folder: str, videos: list[str]) -> dict[str, Any]:
        return {
            "stage": "explain",
            "run": folder,
            "videos": videos,
            "output": str(Path(folder) / "explained"),
        }

    loaded = _load(arguments, "explain", from_folder=from_folder, extra_key="videos")
    if arguments.dry_run:
        return _show(loaded)
    _prepare_environment()
    from cliplift.pipelines.evaluation.explain import run_explain as explain

    failed = _located(loaded, lambda: explain(loaded.run))
    return 1 if failed else 0


def run_report(arguments: argparse.Namespace) -> int:
    def from_folder(folder: str, more: list[str]) -> dict[str, Any]:
        return {"stage": "report", "runs": [folder, *more], "output": str(Path(folder) / "report.html")}

    loaded = _load(arguments, "report", from_folder=from_folder, extra_key="runs")
    if arguments.dry_run:
        return _show(loaded)
    from cliplift.pipelines.report.page import run_report as report

    print(_located(loaded, lambda: report(loaded.run)))
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    def from_folder(folder: str, more: list[str]) -> dict[str, Any]:
        return {"stage": "export", "run": folder, "output": more[0] if more else str(Path(folder) / "export")}

    loaded = _load(arguments, "export", from_folder=from_folder, extra_key="output")
    if arguments.dry_run:
        return _show(loaded)
    _prepare_environment()
    from cliplift.pipelines.evaluation.export import run_export as export

    print(_located(loaded, lambda: export(loaded.run)))
    return 0


def run_models(arguments: argparse.Namespace) -> int:
    _prepare_environment()
    from cliplift.launch.commands.models import zoo_table

    print(zoo_table(arguments.subject or "*", markdown=arguments.markdown))
    return 0


def run_demo(arguments: argparse.Namespace) -> int:
    if arguments.subject is not None and "=" in arguments.subject:
        arguments.subject, arguments.rest = None, [arguments.subject, *arguments.rest]
    if arguments.subject is None:
        loaded = _from_tree({"stage": "demo"}, "demo", arguments.rest)
    else:
        loaded = _load(arguments, "demo")
    if arguments.dry_run:
        return _show(loaded)
    _prepare_environment()
    from cliplift.launch.commands.demo import run_demo as demo

    _located(loaded, lambda: demo(loaded.run))
    return 0


def _load(
    arguments: argparse.Namespace,
    stage: str,
    *,
    from_folder: Callable[[str, list[str]], dict[str, Any]] | None = None,
    extra_key: str | None = None,
) -> LoadedRun[Any]:
    """The run an argument names: a YAML file, a packaged recipe, or (where the stage allows it) a run folder."""
    subject: str = arguments.subject
    overrides = [word for word in arguments.rest if _is_override(word)]
    extra = [word for word in arguments.rest if not _is_override(word)]
    if from_folder is not None and Path(subject).is_dir():
        return _from_tree(from_folder(subject, extra), stage, overrides)
    if from_folder is not None and Path(subject).suffix not in (".yaml", ".yml") and not _recipe(subject):
        raise ConfigError("is neither a folder nor a YAML file", file=subject)
    if extra:
        hint = f"with a YAML file, give {extra_key} in the file or as {extra_key}=..." if extra_key else ""
        raise ConfigError(
            f"{extra[0]!r} is not an override", file="command line", hint=hint or "write key.path=value"
        )
    path = _recipe(subject) or Path(subject)
    loaded = load_run(path, RUNS, overrides)
    if loaded.run.stage != stage:
        raise ConfigError(
            f"is {loaded.run.stage!r}, but the command is {stage!r}",
            key="stage",
            file=str(path),
            hint=f"run `cliplift {loaded.run.stage} {subject}`",
        )
    return loaded


def _is_override(word: str) -> bool:
    key, equals, _ = word.partition("=")
    return bool(equals) and all(part.isidentifier() or part.isdigit() for part in key.split("."))


def _from_tree(tree: dict[str, Any], stage: str, overrides: Sequence[str]) -> LoadedRun[Any]:
    origins = apply_overrides(tree, overrides)
    run: Section = validate(tree, RUNS[stage], origins, "command line")
    return LoadedRun(run=run, file=Path("command line"), origins=origins)


def _recipe(subject: str) -> Path | None:
    """A packaged recipe by name, from any directory; a file of that name in the working directory goes first."""
    return None if Path(subject).exists() else packaged_recipe(subject)


def _located(loaded: LoadedRun[Any], call: Callable[[], Any]) -> Any:
    try:
        return call()
    except ConfigError as error:
        raise loaded.locate(error) from None


def _show(loaded: LoadedRun[Any]) -> int:
    print(dump_run(loaded.run), end="")
    return 0


def _prepare_environment() -> None:
    """Environment that must be set before torch and deepspeed are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _command() -> list[str]:
    return ["cliplift", *sys.argv[1:]]
