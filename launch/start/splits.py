"""Who is trained on and who is tested on: whole groups, every class in every split, shares as near as that allows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cliplift.configs.sources import SplitConfig
from cliplift.sharding.manifest import NO_LABEL, SourceVideo, digest
from cliplift.sharding.sources.read import assign_splits

SPLITS = ("train", "val", "test")
SHARES: Mapping[str, float] = {"train": 0.6, "val": 0.2, "test": 0.2}
MOST_NAMED_GROUPS = 40  # more groups go to splits by hash
TRIED_AT_ONCE = 9  # groups of which every assignment is tried: 3 ** 9
HASHES = 200_000  # spent on the search for a seed
MOST_SEEDS = 1000

Counts = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Division:
    """The ``splits`` section, why it is so, and the split of every video.

    ``lacking`` has the classes that are not in a split, ``counts`` the clips of each class in it.
    """

    section: Mapping[str, object]
    why: str
    splits: tuple[str, ...]
    counts: Mapping[str, tuple[int, ...]]
    lacking: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def clips(self, split: str) -> int:
        """How many videos a split has."""
        return sum(name == split for name in self.splits)


def divide(videos: Sequence[SourceVideo], *, classes: int, pattern: str | None, grouped: bool) -> Division:
    """Propose a split of videos that come without one.

    Args:
        videos: in any order; their own groups, and labels.
        classes: how many there are.
        pattern: that reads the groups from the names, if ``grouped`` and the list does not name them.
        grouped: whether groups are kept whole.
    """
    section: dict[str, object] = {} if pattern is None else {"group_pattern": pattern}
    if not grouped:
        return _by_hash(videos, classes, section, "each video alone")
    groups = [video.group or "" for video in assign_splits(videos, _config(section), folds=0)]
    names = sorted(set(groups))
    if len(names) > MOST_NAMED_GROUPS:
        return _by_hash(videos, classes, section, "groups whole")
    counts = _table([names.index(group) for group in groups], videos, len(names), classes)
    chosen = _best(counts)
    named = {
        split: [name for name, place in zip(names, chosen.tolist(), strict=True) if place == number]
        for number, split in enumerate(SPLITS)
        if number
    }
    section |= {"groups": named, "shares": {"train": 1.0}}
    why = f"{len(names)} groups, chosen so that every class is in every split as far as that goes; new groups train"
    return counted(videos, section, classes, why)


def counted(videos: Sequence[SourceVideo], section: Mapping[str, object], classes: int, why: str) -> Division:
    """What a ``splits`` section makes of the videos, asked of the code that will read it."""
    splits = tuple(video.split for video in assign_splits(videos, _config(section), folds=0))
    counts = {name: [0] * max(1, classes) for name in sorted(set(splits))}
    for video, split in zip(videos, splits, strict=True):
        counts[split][max(0, video.label)] += 1
    lacking = {
        split: tuple(label for label in range(classes) if split not in counts or not counts[split][label])
        for split in SPLITS
    }
    return Division(section, why, splits, {name: tuple(row) for name, row in counts.items()}, lacking)


def _config(section: Mapping[str, object]) -> SplitConfig:
    return SplitConfig.model_validate(section)


def _table(rows: Sequence[int], videos: Sequence[SourceVideo], groups: int, classes: int) -> Counts:
    """(groups, classes) how many videos of which class each group has."""
    counts = np.zeros((groups, max(1, classes)), dtype=np.int64)
    for row, video in zip(rows, videos, strict=True):
        counts[row, 0 if video.label == NO_LABEL else video.label] += 1
    return counts


def _costs(assigned: Ints, counts: Counts) -> npt.NDArray[np.float64]:
    """(N,) how bad assignments (N, groups) of groups to splits are.

    A class that is nowhere in training or test weighs most, then one that is not in validation; then the squares
    of the distances of each class's shares from those wanted, and of those of all clips.
    """
    totals = np.maximum(counts.sum(axis=0), 1)
    cost = np.zeros(len(assigned))
    for number, split in enumerate(SPLITS):
        clips = (assigned == number).astype(np.int64) @ counts
        lacking = (clips == 0) & (counts.sum(axis=0) > 0)
        cost += lacking.sum(axis=1) * (1e3 if split == "val" else 1e6)
        cost += ((clips / totals - SHARES[split]) ** 2).mean(axis=1)
        cost += (clips.sum(axis=1) / counts.sum() - SHARES[split]) ** 2
    return cost


def _best(counts: Counts) -> Ints:
    """(groups,) the split of every group: of all assignments where they are few, else by moves from a deal by size."""
    groups = len(counts)
    if groups <= TRIED_AT_ONCE:
        every = np.array(list(itertools.product(range(len(SPLITS)), repeat=groups)), dtype=np.int64)
        best: Ints = every[int(np.argmin(_costs(every, counts)))]
        return best
    assigned = np.arange(groups) % 5  # 3 of 5 train: the shares wanted
    assigned = np.where(assigned < 3, 0, assigned - 2)[
        np.argsort(np.argsort(-counts.sum(axis=1), kind="stable"))
    ]
    cost = float(_costs(assigned[None], counts)[0])
    while True:
        near = _neighbours(assigned)
        found = _costs(near, counts)
        place = int(np.argmin(found))
        if found[place] >= cost:
            return assigned
        assigned, cost = near[place], float(found[place])


def _neighbours(assigned: Ints) -> Ints:
    """(N, groups) the assignments that move one group, or exchange two."""
    rows = []
    for group, split in itertools.product(range(len(assigned)), range(len(SPLITS))):
        row = assigned.copy()
        row[group] = split
        rows.append(row)
    for first, second in itertools.combinations(range(len(assigned)), 2):
        if assigned[first] != assigned[second]:
            row = assigned.copy()
            row[[first, second]] = row[[second, first]]
            rows.append(row)
    return np.array(rows)


def _by_hash(
    videos: Sequence[SourceVideo], classes: int, section: Mapping[str, object], unit: str
) -> Division:
    """Shares by hash, with the seed of those tried that comes nearest to the shares in every class."""
    seeds = max(1, min(MOST_SEEDS, HASHES // max(1, len(videos))))
    whole = dict(section) | {"shares": dict(SHARES)}
    placed = assign_splits(videos, _config(whole), folds=0)
    groups = [video.video_id if video.group is None else video.group for video in placed]
    names = sorted(set(groups))
    number = {name: place for place, name in enumerate(names)}
    counts = _table([number[group] for group in groups], videos, len(names), classes)
    # The draw of assign_splits, for all groups and seeds at once.
    draws = np.array(
        [
            [int(digest(f"{seed}:{name}".encode())[:13], 16) / 16**13 for name in names]
            for seed in range(seeds)
        ]
    )
    bounds = np.cumsum(list(SHARES.values()))[:-1]
    costs = _costs(np.searchsorted(bounds, draws, side="right"), counts)
    seed = int(np.argmin(costs))
    why = (
        f"{unit}, by hash; of {seeds} seeds the one whose classes are nearest to these shares in every split"
    )
    return counted(videos, whole | {"seed": seed}, classes, why)
