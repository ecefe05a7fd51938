"""From a folder to a plan: what is found, who is tested on, which numbers, and what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cliplift.configs.sections import ConfigError
from cliplift.launch.check.findings import Finding
from cliplift.launch.check.machine import Machine
from cliplift.launch.start.files import Plan
from cliplift.launch.start.groups import GroupRule, propose_groups, read_groups
from cliplift.launch.start.leaks import describe, describe_copies, describe_groups, describe_splits
from cliplift.launch.start.looks import look_at
from cliplift.launch.start.numbers import choose_numbers
from cliplift.launch.start.splits import SPLITS, Division, divide
from cliplift.launch.start.videos import FoundVideos, find_videos


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the user said beside the folder; the options of the command."""

    name: str | None = None
    listed: str | None = None
    group_pattern: str | None = None
    look: int = 400
    seconds: float = 120.0


def begin(
    folder: str,
    wishes: Wishes,
    machine: Machine,
    *,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> tuple[Plan, list[Finding]]:
    """Look at a folder and plan the first runs.

    Raises:
        ConfigError: there is nothing to plan with, or a wish that cannot be met.
        SourceError: a row of the list is wrong.
    """
    found = _usable_splits(find_videos(folder, listed=wishes.listed))
    rule, given = _groups(found, wishes.group_pattern)
    used = rule is not None and rule.count >= len(SPLITS)
    division = None if found.has_splits else _division(found, rule, used=used)
    splits, test_split, held_out = _roles(found, division)
    looks = look_at(
        found,
        most=wishes.look,
        seconds=wishes.seconds,
        workers=machine.cores_per_node,
        on_progress=on_progress,
    )
    if not looks.seen:
        reason = looks.unreadable[0][1] if looks.unreadable else "the time was up"
        raise ConfigError(
            f"no video could be read: {reason}", file=folder, hint="`ffprobe` says what the files are"
        )
    trained = [video.label for video, split in zip(found.videos, splits, strict=True) if split == "train"]
    numbers = choose_numbers(
        looks,
        machine,
        train_videos=len(trained),
        videos=len(found.videos),
        per_class=[trained.count(label) for label in range(len(found.classes))],
        classes=found.classes,
    )
    plan = Plan(
        name=_name(folder, wishes.name), folder=folder, found=found, looks=looks, numbers=numbers, division=division,
        groups_said="" if rule is None else rule.said, held_out=held_out, test_split=test_split,
    )  # fmt: skip
    findings = [*describe(found, looks), *describe_groups(found, rule, given=given, used=used)]
    if division is not None:
        findings += describe_splits(found, division)
    return plan, [*findings, *describe_copies(found, looks, splits)]


def _name(folder: str, wished: str | None) -> str:
    """The name of the dataset and of the files: that of the folder, as far as file names allow."""
    name = (
        wished
        if wished is not None
        else re.sub(r"[^A-Za-z0-9_-]+", "-", Path(folder).resolve().name).strip("-_")
    )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ConfigError(
            f"{name!r} cannot name files",
            key="--name",
            file="command line",
            hint="give letters and digits: --name mine",
        )
    return name


def _usable_splits(found: FoundVideos) -> FoundVideos:
    """The videos with the splits they come with; without, where all are in one.

    Raises:
        ConfigError: none of several splits can be trained on.
    """
    if not found.has_splits:
        return found
    names = set(found.rename.values())
    if len(names) == 1:
        source = {key: value for key, value in found.source.items() if key != "split_column"}
        videos = tuple(replace(video, split="") for video in found.videos)
        return replace(found, source=source, rename={}, videos=videos)
    if "train" not in names:
        raise ConfigError(
            f"its splits are {', '.join(sorted(found.rename))}, and none of them is called train",
            file=str(found.source.get("file", found.root)),
            hint="rename them, or leave the splits out and they are chosen here",
        )
    return found


def _groups(found: FoundVideos, wished: str | None) -> tuple[GroupRule | None, bool]:
    """What belongs together, and whether that was said (by the user or the list) or read from the names."""
    paths = [video.source for video in found.videos]
    if wished is not None:
        return (_wished(paths, wished), True) if wished else (None, True)
    if found.group_column is not None:
        groups = tuple(video.group or "" for video in found.videos)
        if 1 < len(set(groups)) < len(groups):
            return GroupRule("", f"the column {found.group_column!r}", groups), True
    labels = [found.classes[video.label] if video.label >= 0 else None for video in found.videos]
    return propose_groups(paths, labels), False


def _wished(paths: list[str], pattern: str) -> GroupRule:
    try:
        brackets = re.compile(pattern).groups
    except re.error as error:
        raise ConfigError(
            f"is no regular expression: {error}", key="--group-pattern", file="command line"
        ) from error
    if not brackets:
        hint = "put parentheses around the part that names the group"
        raise ConfigError("has no parentheses", key="--group-pattern", file="command line", hint=hint)
    for path in paths:
        if not re.search(pattern, path):
            hint = "it is searched in each path below the folder"
            raise ConfigError(
                f"does not match {path!r}", key="--group-pattern", file="command line", hint=hint
            )
    rule = read_groups(paths, pattern, "the pattern given")
    if rule is None:
        hint = "each video alone is --group-pattern ''"
        raise ConfigError(
            "gives one group, or one for each video", key="--group-pattern", file="command line", hint=hint
        )
    return rule


def _division(found: FoundVideos, rule: GroupRule | None, *, used: bool) -> Division:
    pattern = rule.pattern if rule is not None and used and rule.pattern else None
    videos = found.videos if used else tuple(replace(video, group=None) for video in found.videos)
    return divide(videos, classes=len(found.classes), pattern=pattern, grouped=used)


def _roles(found: FoundVideos, division: Division | None) -> tuple[tuple[str, ...], str, bool]:
    """The split of every video; which is tested on; whether validation is cut from training."""
    if division is not None:
        return division.splits, "test", False
    splits = tuple(found.rename.get(video.split, video.split) for video in found.videos)
    if "test" in splits:
        return splits, "test", "val" not in splits
    return splits, "val", True
