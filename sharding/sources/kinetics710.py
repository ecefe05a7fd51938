"""Kinetics-710: the training videos of Kinetics-400, 600 and 700 under one table of classes.

Its rule (UniFormerV2, arXiv 2211.09552): merge the training lists, take each YouTube id once, leave out what is in a
validation or test list of any of the three, and merge the classes to 710. Which class is which is published beside it:
``label_map_k710.txt``, a name and its number on each line, and ``map_k400.json``, ``map_k600.json``, ``map_k700.json``,
the number of each of an edition's classes in the order of their names.

An id that several editions list is the first edition's, with its class.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cliplift.configs.sections import ConfigError
from cliplift.configs.sources import Kinetics710Source
from cliplift.sharding.manifest import NO_LABEL, SourceVideo
from cliplift.sharding.sources.json_lists import read_json
from cliplift.sharding.sources.lists import Listing, Row, SourceError, read_rows, read_text
from cliplift.sharding.sources.public_datasets import KINETICS_COLUMNS, VideoFolder
from cliplift.sharding.storage import join

log = logging.getLogger(__name__)

Edition = Literal["k400", "k600", "k700"]
EDITIONS: tuple[Edition, ...] = ("k400", "k600", "k700")


@dataclass(frozen=True)
class _Clip:
    """A row of an edition's list."""

    name: str
    start: float
    end: float
    split: str
    edition: str
    label: str | None


def read_kinetics710(source: Kinetics710Source) -> Listing:
    """The merged lists, joined with the files that are there.

    Raises:
        ConfigError: a file does not exist.
        SourceError: a row is wrong, or table, maps and lists are not of each other.
    """
    classes = merged_classes(source.classes_file)
    clips = [clip for edition in EDITIONS for clip in _clips(source, edition)]
    number: dict[str, Mapping[str, int]] = {
        edition: _numbers(
            source, edition, {c.label for c in clips if c.edition == edition and c.label}, classes
        )
        for edition in EDITIONS
        if any(c.edition == edition for c in clips)
    }
    folder = VideoFolder(source.root)
    videos: list[SourceVideo] = []
    missing: list[SourceVideo] = []
    for clip in _chosen(clips):
        stem = f"{clip.name}_{int(clip.start):06d}_{int(clip.end):06d}"
        cut = folder.find(stem, inside=clip.label or clip.split)
        whole = None if cut else folder.find(clip.name, inside=clip.label or clip.split)
        file = cut or whole
        video = SourceVideo(
            video_id=clip.name,
            source=file or stem,
            split=clip.split,
            label=NO_LABEL if clip.label is None else number[clip.edition][clip.label],
            start_seconds=clip.start if whole else None,
            end_seconds=clip.end if whole else None,
        )
        (videos if file else missing).append(video)
    return Listing(tuple(videos), classes, source.root, missing=tuple(missing), left_out=folder.left_out)


def merged_classes(url: str) -> tuple[str, ...]:
    """Class names by number: on each line a name and, behind a tab, its number; or names alone, in their order.

    Raises:
        SourceError: numbers that do not run from 0, or a name that stands there twice.
    """
    name = url.rsplit("/", 1)[-1]
    lines = [line for line in read_text(url, key="source.classes_file").splitlines() if line.strip()]
    by_number: dict[int, str] = {}
    for place, line in enumerate(lines):
        label, tab, number = line.strip().partition("\t")
        label, number = label.strip(), number.strip()
        if not label or (tab and not (number.isdecimal() and number.isascii() and len(number) < 9)):
            raise SourceError(
                f"{name}, line {place + 1}: a class name and its number are needed, it is {line[:60]!r}"
            )
        by_number[int(number) if tab else place] = label
    if not lines or sorted(by_number) != list(range(len(lines))):
        raise SourceError(
            f"{name}: its {len(lines)} classes are to have the numbers from 0 to {len(lines) - 1}"
        )
    if len(set(by_number.values())) < len(lines):
        raise SourceError(f"{name}: a class name stands there twice")
    return tuple(by_number[number] for number in range(len(lines)))


def _clips(source: Kinetics710Source, edition: Edition) -> list[_Clip]:
    found = []
    for url in source.lists.get(edition, ()):
        for row in read_rows(url, needed=KINETICS_COLUMNS, key=f"source.lists.{edition}"):
            start, end = row.seconds("time_start"), row.seconds("time_end")
            if start is None or end is None or end <= start:
                raise SourceError(f"{row.place('time_end')}: the clip does not end after it starts")
            label = row.text("label") if "label" in row.cells else None
            found.append(_Clip(row.text("youtube_id"), start, end, _split(row), edition, label))
    return found


def _split(row: Row) -> str:
    """The published lists write validate, val and validation."""
    split = row.text("split")
    return "val" if split.startswith("val") else split


def _numbers(
    source: Kinetics710Source, edition: str, found: set[str], classes: tuple[str, ...]
) -> Mapping[str, int]:
    """An edition's class names and their numbers among all.

    Raises:
        SourceError: the map has not as many classes as the lists, a number of it is no class, or it is another table's:
            most names must be those they are mapped to.
    """
    file, names = f"map_{edition}.json", sorted(found)
    tree = read_json(join(source.maps, file), key="source.maps")
    if not isinstance(tree, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in tree):
        raise SourceError(f"{file}: a list of class numbers is needed")
    if len(tree) != len(names):
        raise SourceError(f"{file} has {len(tree)} classes, the lists of {edition} have {len(names)}")
    if wrong := [n for n in tree if not 0 <= n < len(classes)]:
        raise SourceError(f"{file}: {wrong[0]} is none of the {len(classes)} classes of source.classes_file")
    if len(set(tree)) < len(tree):
        raise SourceError(f"{file}: two classes have one number")
    numbers = dict(zip(names, tree, strict=True))
    alike = sum(classes[n].lower() == name.lower() for name, n in numbers.items())
    if 2 * alike < len(names):
        raise SourceError(
            f"{file} calls {names[0]!r} {classes[tree[0]]!r}: it is not the map of source.classes_file, "
            f"of whose names only {alike} of {len(names)} agree"
        )
    return numbers


def _chosen(clips: list[_Clip]) -> list[_Clip]:
    """Each YouTube id once: held out where any list holds it out, else in training."""
    held_out: dict[str, _Clip] = {}
    for clip in (c for split in ("val", "test") for c in clips if c.split == split):
        held_out.setdefault(clip.name, clip)
    training: dict[str, _Clip] = {}
    rows = leaked = 0
    for clip in clips:
        if clip.split in ("val", "test"):
            continue
        if clip.split != "train":
            raise ConfigError(
                f"a row of {clip.edition} says {clip.split!r}; it knows train, val and test",
                key="source.lists",
                value=clip.split,
                hint="give the official lists",
            )
        rows += 1
        leaked += clip.name in held_out
        if clip.name not in held_out:
            training.setdefault(clip.name, clip)
    log.info(
        "%d training rows hold %d different videos, after %d rows whose video is in a validation or test list",
        rows,
        len(training),
        leaked,
    )
    return [*training.values(), *held_out.values()]
