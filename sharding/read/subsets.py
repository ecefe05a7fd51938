"""Parts of a split that its shards do not name: whole groups held out for validation, and few-label subsets.

Both are functions of the samples' ids and a seed alone: the same on every machine and rank, and independent of the
order of the samples. Groups (the scene, the person, the source video) are never cut: what is held out has nothing in
common with what is trained on.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cliplift.configs.sections import ConfigError

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Subset:
    """Which samples of a split are taken.

    ``held_out_share`` of each class's samples, in whole groups, form the held-out part; ``held_out`` says which side
    of the cut is meant. ``label_share`` of each class's videos, at least one, are kept of that side; a smaller share
    is part of a larger one.
    """

    held_out_share: float = 0.0
    held_out: bool = False
    label_share: float = 1.0
    seed: int = 0

    def mask(self, *, labels: Sequence[int], groups: Sequence[str | None], video_ids: Sequence[str]) -> Mask:
        """One boolean a sample.

        Raises:
            ConfigError: there are too few groups to hold any out.
        """
        keep = np.ones(len(labels), dtype=bool)
        if self.held_out_share:
            named = [group or video for group, video in zip(groups, video_ids, strict=True)]
            keep = held_out(labels, named, share=self.held_out_share, seed=self.seed) == self.held_out
        if self.label_share < 1:
            keep &= few_labels(labels, video_ids, keep=keep, share=self.label_share, seed=self.seed)
        return keep


def held_out(labels: Sequence[int], groups: Sequence[str], *, share: float, seed: int) -> Mask:
    """The samples of whole groups that together come near ``share`` of every class.

    Groups are taken in the order of a hash of their name. One is held out while the classes it is mostly of still
    lack samples; a group that many classes share goes as a whole, with all its classes. No class is held out whole.

    Raises:
        ConfigError: some class has all its samples in one group.
    """
    members: dict[str, Counter[int]] = defaultdict(Counter)
    for label, group in zip(labels, groups, strict=True):
        members[group][int(label)] += 1
    totals = Counter(int(label) for label in labels)
    left, taken = Counter(totals), Counter[int]()
    chosen = set()
    for group in sorted(members, key=lambda name: _draw(seed, name)):
        counts = members[group]
        # A class still lacks this group if taking it brings the class nearer its share than leaving it.
        lacking = sum(n for label, n in counts.items() if taken[label] + n / 2 <= share * totals[label])
        whole = any(left[label] == n for label, n in counts.items())
        if 2 * lacking > counts.total() and not whole:
            chosen.add(group)
            taken.update(counts)
            left.subtract(counts)
    if not chosen:
        raise ConfigError(
            f"holds nothing out: {len(members)} groups of {len(totals)} classes cannot be cut without losing a class",
            key="data.val_share",
            value=share,
            hint="use a larger share, or data with more groups per class",
        )
    return np.array([group in chosen for group in groups])


def few_labels(
    labels: Sequence[int], video_ids: Sequence[str], *, keep: Mask, share: float, seed: int
) -> Mask:
    """``share`` of the videos of every class, rounded up, in the order of a hash of their ids, of those in ``keep``."""
    videos: dict[int, set[str]] = defaultdict(set)
    for label, video, kept in zip(labels, video_ids, keep.tolist(), strict=True):
        if kept:
            videos[int(label)].add(video)
    chosen = {
        (label, video)
        for label, names in videos.items()
        for video in sorted(names, key=lambda name: _draw(seed, name))[: math.ceil(share * len(names))]
    }
    return np.array([(int(label), video) in chosen for label, video in zip(labels, video_ids, strict=True)])


def _draw(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
