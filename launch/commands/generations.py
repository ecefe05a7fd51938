"""``cliplift remove`` and ``diff``: videos taken out of a dataset, and what changed between two datasets."""

from __future__ import annotations

import argparse

from cliplift.launch.commands.command import Command


def add_remove_options(remove: argparse.ArgumentParser) -> None:
    remove.add_argument("--videos", nargs="+", default=(), metavar="ID", help="ids of videos")
    remove.add_argument("--list", metavar="FILE", help="file with the id of a video in each line")


def add_diff_options(diff: argparse.ArgumentParser) -> None:
    diff.add_argument("second", metavar="URL", help="the dataset it is compared with, or URL@N")


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
