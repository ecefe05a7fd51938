"""How many clips an expression of ``data.where`` leaves, by split and by class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cliplift.sharding.read.reader import ShardDataset
from cliplift.sharding.read.selection import NothingLeftError

UNLABELLED = "without a label"


@dataclass(frozen=True)
class SplitCensus:
    """What an expression leaves of one split.

    Attributes:
        split: its name.
        classes: of each class that has clips here, by name: how many are left, and how many there are.
    """

    split: str
    classes: dict[str, tuple[int, int]]

    @property
    def left(self) -> int:
        return sum(left for left, _ in self.classes.values())

    @property
    def clips(self) -> int:
        return sum(clips for _, clips in self.classes.values())

    @property
    def lost(self) -> tuple[str, ...]:
        """Classes of which nothing is left."""
        return tuple(name for name, (left, _) in self.classes.items() if not left)


def census(url: str, where: str, *, fold: int | None = None) -> tuple[SplitCensus, ...]:
    """Count the clips that an expression leaves of every split of a dataset.

    Raises:
        ConfigError: there is no such dataset or fold, or the expression cannot be used with it.
        ManifestError: the dataset's files are damaged.
    """
    found = []
    for split in ShardDataset(url, fold=fold).splits:
        whole = ShardDataset(url, split=split, fold=fold)
        before = _counts(whole)
        try:
            after = _counts(ShardDataset(url, split=split, fold=fold, where=where))
        except NothingLeftError:
            after = np.zeros_like(before)
        names = (*whole.classes, UNLABELLED)
        found.append(
            SplitCensus(
                split, {name: (int(a), int(b)) for name, a, b in zip(names, after, before, strict=True) if b}
            )
        )
    return tuple(found)


def census_table(found: tuple[SplitCensus, ...]) -> str:
    """Lines for a terminal: each split, and its classes below it, those that lose most first."""
    lines = []
    for split in found:
        lines.append(f"{split.split}: {split.left} of {split.clips} clips ({split.left / split.clips:.1%})")
        by_share = sorted(split.classes.items(), key=lambda item: (item[1][0] / item[1][1], item[0]))
        width = max(len(name) for name in split.classes)
        lines += [f"  {name:{width}}  {left} of {clips}" for name, (left, clips) in by_share]
    return "\n".join(lines)


def _counts(dataset: ShardDataset) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """(K + 1,) clips of every class, and at the end those without a label."""
    labels = dataset.labels
    K = len(dataset.classes)
    return np.bincount(np.where(labels < 0, K, labels), minlength=K + 1)
