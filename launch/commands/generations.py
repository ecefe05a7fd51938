"""``cliplift score``, ``remove``, ``diff`` and ``dedupe``: what makes or compares generations of a dataset.

Columns of scores, videos taken out, what two datasets differ in, and clips of a pretraining set that are in a test set.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cliplift.launch.commands.command import Command
from cliplift.launch.commands.shard import SECONDS_BETWEEN_LINES

if TYPE_CHECKING:
    from cliplift.sharding.leaks.check import LeakReport
    from cliplift.sharding.scoring.run import ScoreProgress, ScoreReport

MOST_LISTED = 5  # pairs of a check that are named on a terminal


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
    score.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: scores that need decoding are made on a cluster whose nodes reach the dataset; a shard is a task",
    )
    score.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="the cluster's head; default: RAY_ADDRESS, else the cluster here, else one that is started here",
    )
    score.add_argument(
        "--wandb",
        choices=("auto", "online", "offline", "disabled"),
        default="auto",
        help="tables and histograms of the columns in W&B; auto: in the run of the build, where it has one",
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
    from cliplift.sharding.scoring.ray_scores import score_on_ray
    from cliplift.sharding.scoring.run import score_dataset

    if arguments.engine == "ray" and (arguments.part or arguments.workers):
        hint = "leave --part and --workers out: the cluster deals the shards"
        raise ConfigError(
            "is for one machine, and --engine ray is not", key="--part", file="command line", hint=hint
        )
    if arguments.engine != "ray" and arguments.ray_address:
        raise ConfigError("needs --engine ray", key="--ray-address", file="command line", hint="say both")
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
    likeness = Likeness(embedding=arguments.embedding, clusters=arguments.clusters)
    how = {"clip_timeout_seconds": arguments.clip_timeout, "on_progress": score_printer()}
    if arguments.engine == "ray":
        report = score_on_ray(
            arguments.subject, names, likeness=likeness, address=arguments.ray_address, **how
        )
    else:
        report = score_dataset(
            arguments.subject, names, likeness=likeness, workers=arguments.workers, part=part, **how
        )
    print(score_summary(arguments.subject, report, part=part))
    if report.new:
        from cliplift.sharding.scoring.tracking import track_scores
        from cliplift.sharding.storage import open_store

        track_scores(open_store(arguments.subject), report.dataset, asked=arguments.wandb)
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


def add_dedupe_options(dedupe: argparse.ArgumentParser) -> None:
    dedupe.add_argument(
        "--against",
        metavar="TEST",
        action="append",
        required=True,
        help="folder or URL of the dataset whose clips are looked for; may be given several times",
    )
    dedupe.add_argument(
        "--split",
        metavar="NAME",
        action="append",
        default=[],
        help="a split of TEST whose clips are looked for; default: all but train",
    )
    dedupe.add_argument("--fold", type=int, default=None, help="official split of TEST, from 1; default: all")
    dedupe.add_argument(
        "--remove",
        action="store_true",
        help="take the videos that are found out of the dataset, as its next generation",
    )
    dedupe.add_argument(
        "--output",
        default="leaks.html",
        help="HTML file to write; the pairs as JSON lie beside it, in .jsonl",
    )
    dedupe.add_argument("--workers", type=int, default=0, help="decoding processes; 0 is one per core")
    dedupe.add_argument(
        "--clip-timeout", type=float, default=60.0, metavar="SECONDS", help="time a clip may take, seconds"
    )


def run_dedupe(arguments: argparse.Namespace) -> int:
    """Exit code 1 when clips were found and stay."""
    from cliplift.configs.sections import ConfigError
    from cliplift.sharding.leaks.check import find_leaks
    from cliplift.sharding.leaks.page import write_leak_page
    from cliplift.sharding.leaks.records import add_checks
    from cliplift.sharding.read.generations import named_generation
    from cliplift.sharding.storage import open_store, whole_file

    url, output = arguments.subject, Path(arguments.output)
    if arguments.workers < 0 or not arguments.clip_timeout > 0:
        hint = "give --workers 0 or more, and --clip-timeout above 0"
        raise ConfigError("asks for what cannot be", file="command line", hint=hint)
    root, generation = named_generation(url)
    if generation is not None:
        hint = f"name {root}: what is found is said of all generations, and taken out of the latest"
        raise ConfigError("names a generation", key="url", value=url, hint=hint)
    listing = output.with_suffix(".jsonl")
    with whole_file(
        listing
    ) as temporary:  # before the work: a place that cannot be written is refused at once
        reports = [
            find_leaks(
                url,
                test,
                splits=tuple(arguments.split),
                fold=arguments.fold,
                workers=arguments.workers,
                clip_timeout_seconds=arguments.clip_timeout,
                on_progress=watch_printer(),
            )
            for test in dict.fromkeys(arguments.against)
        ]
        temporary.write_bytes(b"".join(report.listing() for report in reports))
    write_leak_page(reports, url, output)
    # Before anything is removed: killed in between, the same command finds the same and goes on.
    add_checks(open_store(root), [report.check for report in reports])
    print("\n".join(leak_lines(report) for report in reports))
    print(f"  pairs side by side in {output}, as rows in {listing}")
    found = sorted({video for report in reports for video in report.check.videos})
    if found and arguments.remove:
        print(removed_line(url, found))
    return int(bool(found) and not arguments.remove)


def watch_printer() -> Callable[[str, int, int], None]:
    """Progress on one line that is rewritten on a terminal, or a line every ten seconds in a log."""
    terminal = sys.stderr.isatty()
    last = 0.0 if terminal else time.monotonic()

    def show(what: str, done: int, of: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < (0.2 if terminal else SECONDS_BETWEEN_LINES):
            return
        last = now
        print(f"{what}: {done} of {of}", end="\r" if terminal else "\n", file=sys.stderr, flush=True)

    return show


def leak_lines(report: LeakReport) -> str:
    """What a check found, for a terminal."""
    check = report.check
    splits = ", ".join(check.splits) + (f", official split {check.fold}" if check.fold else "")
    head = (
        f"{check.against} ({splits}): {len(report.leaks)} of {check.clips} clips show what one of its"
        f" {check.against_clips} clips shows, of {len(check.videos)} videos"
    )
    shown = [
        f"  {leak.clip.sample.source} from {leak.begins_seconds:.1f} s is {leak.of.sample.source} from"
        f" {leak.of_begins_seconds:.1f} s, for {leak.shared_seconds:.1f} s ({leak.kind})"
        if leak.shared_seconds
        else f"  {leak.clip.sample.source} is {leak.of.sample.source} ({leak.kind})"
        for leak in report.leaks[:MOST_LISTED]
    ]
    if len(report.leaks) > MOST_LISTED:
        shown.append(f"  and {len(report.leaks) - MOST_LISTED} more")
    if report.undecoded:
        shown.append(
            f"  {report.undecoded} test clips do not decode and were not looked for, such as {report.unread[0]}"
        )
    return "\n".join([head, *shown])


def removed_line(url: str, videos: Sequence[str]) -> str:
    """Take videos out, and say what became of the dataset."""
    from cliplift.sharding.build.finalize import remove_videos

    before, after = remove_videos(url, videos)
    if before == after:
        return f"{url}: all of them were removed before; generation {after.generation} stays"
    gone = before.samples - after.samples
    return (
        f"{url}: generation {after.generation} has {after.samples} clips, {gone} fewer; its fingerprint is"
        f" {after.fingerprint[:12]}, it was {before.fingerprint[:12]}"
    )


COMMANDS = (
    Command(
        name="score",
        summary="measure the clips of a shard dataset: columns for data.where, in a generation of their own",
        subject="URL",
        subject_help="folder or URL of a shard dataset",
        rest="SCORE",
        rest_help="motion, patch_motion, brightness, sharpness, borders, text, shots, duplicate; embedding, "
        "embedding:MODEL, embedding:MODEL=WEIGHTS or embedding:RUN; cluster and near_duplicate, made of an embedding",
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
    Command(
        name="dedupe",
        summary="find clips of a pretraining set that are in a test set, re-encoded or cut otherwise",
        subject="URL",
        subject_help="folder or URL of the shard dataset that is searched",
        rest="",
        add_options=add_dedupe_options,
        run=run_dedupe,
    ),
)
