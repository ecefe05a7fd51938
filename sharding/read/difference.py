"""What changed between two datasets, or two generations of one: clips that only one has, and clips that differ.

A clip is the same in both where its video's id, source and start are. Clips are compared video by video in parts of the
tables, so that memory does not grow with them.
"""

from __future__ import annotations

import heapq
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from cliplift.sharding.manifest import NO_LABEL, SAMPLES_FILE, Dataset, ManifestError
from cliplift.sharding.read.generations import open_dataset, read_samples
from cliplift.sharding.scratch import scratch_folder
from cliplift.sharding.storage import Store
from cliplift.sharding.tables import Parts, batches, open_table

COMPARED = ("split", "folds", "group", "label", "labels", "source_sha256", "mp4_crc32", "end_seconds", "num_frames",
            "fps", "width", "height")  # fmt: skip
NAMED = ("video_id", "source", "start_seconds")
EXAMPLES = 5
PART_ROWS = 1 << 19

Clip = tuple[object, ...]


@dataclass
class Side:
    """What one dataset has and the other has not."""

    clips: int = 0
    videos: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(
        default_factory=list
    )  # the first ids of videos by name, none of whose clips are left


@dataclass
class Difference:
    """What two datasets differ in; ``changed`` counts clips of both by what differs."""

    classes: tuple[tuple[str, ...], tuple[str, ...]]
    only: tuple[Side, Side] = field(default_factory=lambda: (Side(), Side()))
    same: int = 0
    changed: Counter[str] = field(default_factory=Counter)
    changed_clips: int = 0
    changed_examples: list[str] = field(default_factory=list)

    @property
    def found(self) -> bool:
        """Whether there is any."""
        return bool(
            self.changed_clips or self.classes[0] != self.classes[1] or any(side.clips for side in self.only)
        )

    def summary(self, first: str, second: str) -> str:
        """A few lines for a terminal."""
        lines = []
        for side, name in zip(self.only, (first, second), strict=True):
            splits = ", ".join(f"{split} {count}" for split, count in sorted(side.splits.items()))
            where = f" ({splits})" if splits else ""
            lines.append(f"only in {name}: {side.clips} clips{where}, {side.videos} whole videos")
            lines += [f"  {one}" for one in side.examples]
        reasons = ", ".join(f"{name} {count}" for name, count in sorted(self.changed.items()))
        lines.append(f"changed: {self.changed_clips} clips{f' ({reasons})' if reasons else ''}")
        lines += [f"  {one}" for one in self.changed_examples]
        lines.append(f"the same: {self.same} clips")
        gone, new = (
            [name for name in self.classes[a] if name not in self.classes[b]] for a, b in ((0, 1), (1, 0))
        )
        if gone or new:
            lines.append(f"classes only in {first}: {gone}; only in {second}: {new}")
        elif self.classes[0] != self.classes[1]:
            lines.append("the classes are the same in another order")
        return "\n".join(lines)


def compare(first: str, second: str) -> Difference:
    """Compare two datasets, or generations that are named ``URL@N``.

    Raises:
        ConfigError: there is no such dataset or generation.
        ManifestError: its files are damaged.
    """
    opened = [open_dataset(url) for url in (first, second)]
    result = Difference((opened[0][1].classes, opened[1][1].classes))
    count = 1 + max(dataset.samples for _, dataset in opened) // PART_ROWS
    with scratch_folder() as folder:
        parts = Parts(folder)
        for side, (store, dataset) in enumerate(opened):
            _deal(store, dataset, parts, side, count)
        for part in range(count):
            clips = [
                dict(_clips(parts, f"{side}-{part}", dataset)) for side, (_, dataset) in enumerate(opened)
            ]
            _compare_part(clips, result)
    return result


def _deal(store: Store, dataset: Dataset, parts: Parts, side: int, count: int) -> None:
    """Deal the rows of a table to parts: all clips of a video to one."""
    with read_samples(store, dataset, store.url) as path:
        for rows in batches(
            open_table(path, file=SAMPLES_FILE), file=SAMPLES_FILE, columns=[*NAMED, *COMPARED]
        ):
            ids = rows.column("video_id").to_pylist()
            places = np.array([zlib.crc32(one.encode()) % count for one in ids])
            for place in sorted(set(places.tolist())):
                parts.add(f"{side}-{place}", rows.take(np.flatnonzero(places == place)))


def _clips(parts: Parts, part: str, dataset: Dataset) -> Iterator[tuple[Clip, dict[str, object]]]:
    for table in parts.read(part):
        for row in table.to_pylist():
            # Two datasets may number the same classes differently.
            row["label"] = None if row["label"] == NO_LABEL else _class(dataset, row["label"])
            row["labels"] = [_class(dataset, label) for label in row["labels"]]
            yield tuple(row[name] for name in NAMED), row


def _class(dataset: Dataset, label: int) -> str:
    if not 0 <= label < len(dataset.classes):
        raise ManifestError(f"{dataset.name}: label {label} is of no class")
    return dataset.classes[label]


def _compare_part(clips: list[dict[Clip, dict[str, object]]], result: Difference) -> None:
    videos = [{str(clip[0]) for clip in one} for one in clips]
    for side, (mine, other) in enumerate(((0, 1), (1, 0))):
        found = result.only[side]
        for clip in clips[mine].keys() - clips[other].keys():
            found.clips += 1
            found.splits[str(clips[mine][clip]["split"])] += 1
        whole = videos[mine] - videos[other]
        found.videos += len(whole)
        found.examples = heapq.nsmallest(EXAMPLES, [*found.examples, *whole])
    differing = []
    for clip in clips[0].keys() & clips[1].keys():
        a, b = clips[0][clip], clips[1][clip]
        changed = [name for name in COMPARED if a[name] != b[name]]
        result.same += not changed
        if changed:
            result.changed_clips += 1
            result.changed.update(changed)
            shown = ", ".join(f"{name} {a[name]!r} -> {b[name]!r}" for name in changed)
            differing.append(f"{clip[1]} at {clip[2]:g} s: {shown}")
    result.changed_examples = heapq.nsmallest(EXAMPLES, [*result.changed_examples, *differing])
