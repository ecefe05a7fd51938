"""``cliplift score``, ``remove`` and ``diff``: columns of scores, videos taken out, what two datasets differ in."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cliplift.launch.commands.command import Command
from cliplift.launch.commands.shard import SECONDS_BETWEEN_LINES

if TYPE_CHECKING:
    from cliplift.sharding.scoring.run import ScoreProgress, ScoreReport


def add_score_options(score: argparse.ArgumentParser) -> None:
    score.add_argument("--workers", type=int, default=0, help="decoding processes; 0 is one per core")
    score.add_argument(
        "--part",
        metavar="I/N",
        help="score part I of N, from 0, for array jobs; auto reads the scheduler's index; a call without it then makes"
        " the generation",
    )
    score.add_argument(
        "--clip-timeout", type=float, default=60.0, metavar="SECONDS", help="time a clip may take, seconds"
    )
    add_embedding_options(score)


def add_embedding_options(score: argparse.ArgumentParser) -> None:
    score.add_argument(
        "--device",
        default="auto",
        help="where embeddings are computed: cpu, cuda, or auto, a GPU where there is one",
    )
    score.add_argument(
        "--embedding",
        metavar="NAME",
        help="the embedding that cluster and near_duplicate are made of, of several",
    )
    score.add_argument(
        "--clusters", type=int, metavar="K", help="number of clusters; default: the square root of the clips"
    )


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words that ask for embeddings, and the other scores."""
    embeddings = [word for word in words if word.partition(":")[0] == "embedding"]
    return list(dict.fromkeys(embeddings)), [word for word in words if word not in embeddings]


def add_remove_options(remove: argparse.ArgumentParser) -> None:
    remove.add_argument("--videos", nargs="+", default=(), metavar="ID", help="ids of videos")
    remove.add_argument("--list", metavar="FILE", help="file with the id of a video in each line")


def add_diff_options(diff: argparse.ArgumentParser) -> None:
    diff.add_argument("second", metavar="URL", help="the dataset it is compared with, or URL@N")


def run_score(arguments: argparse.Namespace) -> int:
    import os

    from cliplift.configs.sections import ConfigError
    from cliplift.launch.commands.shard import which_part
    from cliplift.sharding.scoring.likeness import Likeness
    from cliplift.sharding.scoring.run import score_dataset

    if arguments.workers < 0 or not arguments.clip_timeout > 0:
        hint = "give --workers 0 or more, and --clip-timeout above 0"
        raise ConfigError("asks for what cannot be", file="command line", hint=hint)
    part = which_part(arguments.part, os.environ)
    embeddings, names = split_words(arguments.rest)
    if embeddings:
        from cliplift.pipelines.embeddings.score import score_embeddings

        lines = score_embeddings(
            arguments.subject,
            embeddings,
            device=arguments.device,
            workers=arguments.workers or len(os.sched_getaffinity(0)),
            part=part,
            printer=score_printer,
        )
        print("\n".join(lines))
    if embeddings and not names:
        return 0
    report = score_dataset(
        arguments.subject,
        names,
        likeness=Likeness(embedding=arguments.embedding, clusters=arguments.clusters),
        workers=arguments.workers,
        part=part,
        clip_timeout_seconds=arguments.clip_timeout,
        on_progress=score_printer(),
    )
    print(score_summary(arguments.subject, report, part=part))
    return 0


def score_printer() -> Callable[[ScoreProgress], None]:
    """Progress on one line that is rewritten on a terminal, or a line every ten seconds in a log."""
    terminal = sys.stderr.isatty()
    last = 0.0 if terminal else time.monotonic()

    def show(progress: ScoreProgress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < (0.2 if terminal else SECONDS_BETWEEN_LINES):
            return
        last = now
        pace = progress.clips_done / progress.seconds if progress.seconds else 0.0
        left = f"{(progress.clips_total - progress.clips_done) / pace:.0f} s" if pace else "?"
        line = (
            f"shards {progress.shards_done}/{progress.shards_total}  clips {progress.clips_done}/"
            f"{progress.clips_total}  {pace:.1f} clips/s  left: {left}"
        )
        print(line, end="\r" if terminal else "\n", file=sys.stderr, flush=True)

    return show


def score_summary(url: str, report: ScoreReport, *, part: tuple[int, int] | None) -> str:
    """The closing lines of ``cliplift score``."""
    names = ", ".join(column.name for column in report.columns) or "none"
    if part is not None:
        lines = [
            f"{url}: part {part[0]} of {part[1]}: {report.scored} clips scored; without --part they become columns"
        ]
    elif report.new:
        lines = [
            f"{url}: generation {report.dataset.generation} has the columns {names}; {report.scored} clips scored"
        ]
    else:
        lines = [f"{url}: scored before; generation {report.dataset.generation} stays, with {names}"]
    failed = max((column.failed for column in report.columns), default=0)
    if failed:
        lines.append(f"  {failed} clips do not decode and have no scores; no filter takes them")
    return "\n".join([*lines, *(f"  {reason}" for reason in report.reasons)])


def run_remove(arguments: argparse.Namespace) -> int:
    from cliplift.configs.sections import ConfigError
    from cliplift.sharding.build.finalize import remove_videos
    from cliplift.sharding.sources.lists import read_text

    ids = list(arguments.videos)
    if arguments.list:
        ids += [line for line in read_text(arguments.list, key="--list").splitlines() if line.strip()]
    if not ids:
        raise ConfigError("names no video", file="command line", hint="use --list FILE or --videos ID ...")
    before, after = remove_videos(arguments.subject, ids)
    if before == after:
        print(f"{arguments.subject}: all of them were removed before; generation {after.generation} stays")
    else:
        gone = before.samples - after.samples
        print(f"{arguments.subject}: generation {after.generation} has {after.samples} clips, {gone} fewer")
    return 0


def run_diff(arguments: argparse.Namespace) -> int:
    """Exit code 1 when the two differ."""
    from cliplift.sharding.read.difference import compare

    found = compare(arguments.subject, arguments.second)
    print(found.summary(arguments.subject, arguments.second))
    return 1 if found.found else 0


COMMANDS = (
    Command(
        name="score",
        summary="measure the clips of a shard dataset: columns for data.where, in a generation of their own",
        subject="URL",
        subject_help="folder or URL of a shard dataset",
        rest="SCORE",
        rest_help="motion, patch_motion, brightness, sharpness, borders, shots, duplicate; embedding, embedding:MODEL, "
        "embedding:MODEL=WEIGHTS or embedding:RUN; cluster and near_duplicate, made of an embedding",
        add_options=add_score_options,
        run=run_score,
    ),
    Command(
        name="remove",
        summary="take videos out of a shard dataset: a generation that no longer returns them",
        subject="URL",
        subject_help="folder or URL of a shard dataset",
        rest="",
        add_options=add_remove_options,
        run=run_remove,
    ),
    Command(
        name="diff",
        summary="say what changed between two shard datasets, or two generations of one (URL@N)",
        subject="URL",
        subject_help="folder or URL of a shard dataset, or URL@N",
        rest="",
        add_options=add_diff_options,
        run=run_diff,
    ),
)
