"""``cliplift shard``, ``verify``, ``show``, ``index`` and ``finalize``: build shard datasets, and look at them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from cliplift.launch.commands.command import Command, add_json_option, print_json

if TYPE_CHECKING:
    from cliplift.configs.sharding import ShardRun
    from cliplift.sharding.build.run import BuildReport, Phase
    from cliplift.sharding.build.unit import Progress

SECONDS_BETWEEN_LINES = 10.0


def add_shard_options(shard: argparse.ArgumentParser) -> None:
    shard.add_argument(
        "--part",
        metavar="I/N",
        help="build part I of N, from 0, for array jobs; auto reads the scheduler's index",
    )
    shard.add_argument(
        "--phase",
        choices=("all", "plan", "build", "finalize", "verify"),
        default="all",
        help="run one phase alone",
    )
    shard.add_argument(
        "--add",
        action="store_true",
        help="add the videos that are new to a finished dataset, as its next generation",
    )
    shard.add_argument(
        "--retry-failed", action="store_true", help="try the refused clips of the ledger again"
    )


def add_verify_options(verify: argparse.ArgumentParser) -> None:
    add_json_option(verify)
    verify.add_argument(
        "--decode", choices=("none", "sample", "full"), default="sample", help="how many clips are decoded"
    )


def add_show_options(show: argparse.ArgumentParser) -> None:
    show.add_argument("--output", default="contact-sheet.html", help="HTML file to write")
    show.add_argument(
        "--where",
        metavar="EXPRESSION",
        help="say how many clips an expression of data.where leaves, by split and class, and show clips on both sides"
        " of its thresholds",
    )
    show.add_argument(
        "--score",
        metavar="NAME",
        help="show how the values of a column are spread, and clips over their range",
    )
    show.add_argument("--fold", type=int, default=None, help="official split that is counted, from 1")
    show.add_argument("--clips", type=int, default=24, help="clips shown of each split, or on each side")


def add_index_options(index: argparse.ArgumentParser) -> None:
    index.add_argument("--name", required=True, help="name of the dataset")
    index.add_argument("--label-key", default="label", help="key of the JSON member that holds the class")
    index.add_argument("--classes", nargs="+", default=(), help="class names in label order; default: sorted")
    index.add_argument("--workers", type=int, default=0, help="decoding processes; 0 is one per core")


def run_shard(arguments: argparse.Namespace) -> int:
    """Exit code 1 when the dataset was verified and is not sound."""
    from cliplift.configs.sharding import ShardRun
    from cliplift.launch.commands.subject import load_stage, print_run, run_located

    loaded = load_stage(arguments, ShardRun)
    if arguments.dry_run:
        return print_run(loaded)
    report = run_located(
        loaded,
        lambda: build(
            loaded.run,
            phase=arguments.phase,
            part=arguments.part,
            retry_failed=arguments.retry_failed,
            add=arguments.add,
        ),
    )
    print(summary(report))
    return 0 if report.verified is None or report.verified.ok else 1


def run_verify(arguments: argparse.Namespace) -> int:
    """Exit code 1 when the dataset is not sound."""
    from cliplift.sharding.build.verify import verify

    report = verify(arguments.subject, decode=arguments.decode)
    if arguments.json:
        print_json({"ok": report.ok} | asdict(report))
    else:
        print(report.summary())
    return 0 if report.ok else 1


def run_show(arguments: argparse.Namespace) -> int:
    if arguments.where is not None or arguments.score is not None:
        return _show_scores(arguments)
    from cliplift.sharding.read.contact_sheet import write_contact_sheet

    print(write_contact_sheet(arguments.subject, arguments.output, clips_per_split=arguments.clips))
    return 0


def _show_scores(arguments: argparse.Namespace) -> int:
    """What a filter leaves, or how a score is spread, with clips on a page."""
    from cliplift.configs.sections import ConfigError
    from cliplift.sharding.scoring.census import census, census_table
    from cliplift.sharding.scoring.sheet import write_filter_sheet, write_score_sheet

    url, where, more = arguments.subject, arguments.where, {"clips": arguments.clips, "fold": arguments.fold}
    if where is not None and arguments.score is not None:
        hint = "give one of them; --where shows the columns that it names"
        raise ConfigError("--where and --score do not go together", file="command line", hint=hint)
    if where is None:
        print(write_score_sheet(url, arguments.score, arguments.output, **more))
    else:
        left = census(url, where, fold=arguments.fold)
        spread = write_filter_sheet(url, where, left, arguments.output, **more)
        print("\n".join(part for part in (census_table(left), spread) if part))
    print(arguments.output)
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


def run_finalize(arguments: argparse.Namespace) -> int:
    from cliplift.sharding.build.finalize import add_catalog

    dataset = add_catalog(arguments.subject)
    print(
        f"{arguments.subject}: catalog of {dataset.samples} samples in {len(dataset.shards)} shards written"
    )
    return 0


def build(
    run: ShardRun, *, phase: str, part: str | None, retry_failed: bool, add: bool = False
) -> BuildReport:
    """Build the part of a dataset this process is to build, with progress on stderr."""
    from cliplift.sharding.build import run as building
    from cliplift.sharding.build.tracking import BuildTracker

    phases: tuple[Phase, ...] = building.PHASES if phase == "all" else (phase,)  # type: ignore[assignment]
    number = which_part(part, os.environ)
    show = progress_printer()
    with BuildTracker(run, part=number) as tracker:

        def watch(progress: Progress) -> None:
            show(progress)
            tracker.update(progress)

        report = building.run_shard(
            run, phases=phases, part=number, retry_failed=retry_failed, add=add, on_progress=watch
        )
        tracker.finish(report)
    return report


def which_part(text: str | None, environment: Mapping[str, str]) -> tuple[int, int] | None:
    """``I/N`` as numbers; ``auto`` reads the array index of Slurm, or the rank torchrun gave.

    Raises:
        ConfigError: not I/N with I below N, or ``auto`` outside a scheduler.
    """
    if text is None:
        return None
    if text == "auto":
        return _scheduler_part(environment)
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        from cliplift.configs.sections import ConfigError

        raise ConfigError(
            f"--part {text!r} is not I/N", file="command line", hint="parts count from 0: 0/4 to 3/4, or auto"
        )
    return int(part), int(parts)


def _scheduler_part(environment: Mapping[str, str]) -> tuple[int, int]:
    """(index, count) from the first scheduler that says both."""
    from cliplift.configs.sections import ConfigError

    pairs = (
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
        ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS", None),
        ("SLURM_PROCID", "SLURM_NTASKS", None),
        ("RANK", "WORLD_SIZE", None),
    )
    for index, count, first in pairs:
        if index in environment and count in environment:
            try:
                part = int(environment[index]) - int(environment.get(first or "", "0"))
                parts = int(environment[count])
            except ValueError:
                part, parts = -1, 0
            if 0 <= part < parts:
                return part, parts
            raise ConfigError(
                f"--part auto: {index}={environment[index]!r} and {count}={environment[count]!r} are no part of a job",
                file="command line",
                hint=f"clear them (unset {index} {count}), or give I/N",
            )

    raise ConfigError(
        "--part auto found no array job",
        file="command line",
        hint="it reads SLURM_ARRAY_TASK_ID, JOB_COMPLETION_INDEX with JOB_COMPLETIONS, or RANK; or give I/N",
    )


def progress_printer() -> Callable[[Progress], None]:
    """Progress on one line that is rewritten on a terminal, or a line every ten seconds in a log."""
    last = time.monotonic() if not sys.stderr.isatty() else 0.0

    def show(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < (0.2 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES):
            return
        last = now
        end = "\r" if sys.stderr.isatty() else "\n"
        print(progress_line(progress), end=end, file=sys.stderr, flush=True)

    return show


def progress_line(progress: Progress) -> str:
    left = "?" if progress.seconds_left is None else f"{progress.seconds_left:.0f} s"
    refused = ", ".join(f"{reason} {n}" for reason, n in sorted(progress.refused.items())) or "none"
    return (
        f"shards {progress.shards_done}/{progress.shards_total}  videos {progress.videos_done}/{progress.videos_total}"
        f"  {progress.clips_per_second:.1f} clips/s  {progress.bytes / 2**20:.1f} MiB  refused: {refused}  left: {left}"
    )


def summary(report: BuildReport) -> str:
    """The closing lines of a build."""
    from cliplift.sharding.manifest import RETRIED_STAGES

    refused = sum(report.refused.values())
    reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(report.refused.items()))
    lines = [
        f"{report.url}: {report.shards_built} shards built, {report.shards_kept} kept of {report.shards_total};"
        f" {report.clips_written} clips, {report.bytes_written / 2**20:.1f} MiB in {report.seconds:.1f} s",
        f"  refused {refused}{f' ({reasons})' if reasons else ''}, missing {report.missing}",
    ]
    if any(stage in report.refused for stage in RETRIED_STAGES):
        lines.append(f"  {', '.join(RETRIED_STAGES)}: if the cause is gone, --retry-failed tries these again")
    if report.copied or report.not_copied:
        encoded = ", ".join(f"{reason} {n}" for reason, n in report.not_copied.items())
        lines.append(
            f"  copied without re-encoding {report.copied}{f'; encoded: {encoded}' if encoded else ''}"
        )
    if report.duplicates is not None and (found := report.duplicates.exact + report.duplicates.look):
        lines.append(
            f"  duplicates {found} ({report.duplicates.exact} exact, {report.duplicates.look} by look),"
            f" {report.duplicates.removed} removed"
        )
    if report.dataset is not None:
        lines.append(f"  dataset: {report.dataset.samples} samples, {len(report.dataset.classes)} classes")
    if report.verified is not None:
        lines.append(report.verified.summary())
    return "\n".join(lines)


COMMANDS = (
    Command(
        name="shard",
        summary="pack videos into WebDataset shards",
        schema="shard",
        add_options=add_shard_options,
        run=run_shard,
    ),
    Command(
        name="verify",
        summary="check a shard dataset: checksums, index against tar, decodability",
        subject="URL",
        subject_help="folder or URL of a shard dataset",
        rest="",
        add_options=add_verify_options,
        run=run_verify,
    ),
    Command(
        name="show",
        summary="write an HTML contact sheet and statistics of a shard dataset",
        subject="URL",
        subject_help="folder or URL of a shard dataset",
        rest="",
        add_options=add_show_options,
        run=run_show,
    ),
    Command(
        name="index",
        summary="index WebDataset tars made by other tools, so that training can read them exactly",
        subject="URL",
        subject_help="folder or URL of the tars; the folder a tar lies in is its split",
        rest="",
        add_options=add_index_options,
        run=run_index,
    ),
    Command(
        name="finalize",
        summary="give a shard dataset that was made without a catalog its catalog; runs on it go on",
        subject="URL",
        subject_help="folder or URL of a shard dataset",
        rest="",
        run=run_finalize,
    ),
)
