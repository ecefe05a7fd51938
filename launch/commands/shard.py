"""``cliplift shard`` and ``cliplift verify``: which part of a build this process does, and what a person sees."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun
from cliplift.sharding.build.run import PHASES, BuildReport, Phase, run_shard
from cliplift.sharding.build.tracking import BuildTracker
from cliplift.sharding.build.unit import Progress

SECONDS_BETWEEN_LINES = 10.0


def build(run: ShardRun, *, phase: str, part: str | None, retry_failed: bool) -> BuildReport:
    """Build the part of a dataset this process is to build, with progress on stderr."""
    phases: tuple[Phase, ...] = PHASES if phase == "all" else (phase,)  # type: ignore[assignment]
    number = which_part(part, os.environ)
    show = progress_printer()
    with BuildTracker(run, part=number) as tracker:

        def watch(progress: Progress) -> None:
            show(progress)
            tracker.update(progress)

        report = run_shard(run, phases=phases, part=number, retry_failed=retry_failed, on_progress=watch)
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
    if not (slash and part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise ConfigError(
            f"--part {text!r} is not I/N", file="command line", hint="parts count from 0: 0/4 to 3/4, or auto"
        )
    return int(part), int(parts)


def _scheduler_part(environment: Mapping[str, str]) -> tuple[int, int]:
    """(index, count) from the first scheduler that says both."""
    pairs = (
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
        ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS", None),
        ("SLURM_PROCID", "SLURM_NTASKS", None),
        ("RANK", "WORLD_SIZE", None),
    )
    for index, count, first in pairs:
        if index in environment and count in environment:
            return int(environment[index]) - int(environment.get(first or "", "0")), int(environment[count])
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
    refused = sum(report.refused.values())
    reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(report.refused.items()))
    lines = [
        f"{report.url}: {report.shards_built} shards built, {report.shards_kept} kept of {report.shards_total};"
        f" {report.clips_written} clips, {report.bytes_written / 2**20:.1f} MiB in {report.seconds:.1f} s",
        f"  refused {refused}{f' ({reasons})' if reasons else ''}, missing {report.missing}",
    ]
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
