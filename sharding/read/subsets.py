"""Parts of a split that its shards do not name: whole groups held out for validation, and few-label subsets.

Both are functions of the samples' ids and a seed alone: the same on every machine and rank, and independent of the
order of the samples. Groups (the scene, the person, the source video) are never cut: what is held out has nothing in
common with what is trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cliplift.configs.sections import ConfigError

Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Draws = npt.NDArray[np.uint64]


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
        """One boolean a sample, by names; :meth:`mask_of_numbers` of a catalog's columns.

        Raises:
            ConfigError: there are too few groups to hold any out.
        """
        named = [group or video for group, video in zip(groups, video_ids, strict=True)]
        (group_numbers, group_names), (video_numbers, video_names) = _numbered(named), _numbered(video_ids)
        return self.mask_of_numbers(
            labels=np.asarray(labels, dtype=np.int64),
            groups=group_numbers,
            videos=video_numbers,
            group_draws=draws(group_names, self.seed),
            video_draws=draws(video_names, self.seed),
        )

    def mask_of_numbers(
        self, *, labels: Ints, groups: Ints, videos: Ints, group_draws: Draws, video_draws: Draws
    ) -> Mask:
        """One boolean a sample.

        Args:
            labels: (N,) class of every sample.
            groups: (N,) number of its group, or of its video where it has none.
            videos: (N,) number of its video.
            group_draws: (groups, 2) what :func:`draws` makes of the groups' names; not used without a held-out share.
            video_draws: (videos, 2) the same of the videos' ids; not used where all labels are kept.

        Raises:
            ConfigError: there are too few groups to hold any out.
        """
        keep = np.ones(len(labels), dtype=bool)
        if self.held_out_share:
            keep = _held_out(labels, groups, group_draws, share=self.held_out_share) == self.held_out
        if self.label_share < 1:
            keep &= _few_labels(labels, videos, video_draws, keep=keep, share=self.label_share)
        return keep


def held_out(labels: Sequence[int], groups: Sequence[str], *, share: float, seed: int) -> Mask:
    """The samples of whole groups that together come near ``share`` of every class.

    Groups are taken in the order of a hash of their name. One is held out while the classes it is mostly of still
    lack samples; a group that many classes share goes as a whole, with all its classes. No class is held out whole.

    Raises:
        ConfigError: some class has all its samples in one group.
    """
    numbers, names = _numbered(groups)
    return _held_out(np.asarray(labels, dtype=np.int64), numbers, draws(names, seed), share=share)


def few_labels(
    labels: Sequence[int], video_ids: Sequence[str], *, keep: Mask, share: float, seed: int
) -> Mask:
    """``share`` of the videos of every class, rounded up, in the order of a hash of their ids, of those in ``keep``."""
    numbers, names = _numbered(video_ids)
    return _few_labels(
        np.asarray(labels, dtype=np.int64), numbers, draws(names, seed), keep=keep, share=share
    )


def draws(names: Iterable[str], seed: int) -> Draws:
    """(names, 2) a hash of 128 bits of each name, the higher half first."""
    hashes = (hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest() for name in names)
    return np.frombuffer(b"".join(hashes), dtype=">u8").reshape(-1, 2)


def _numbered(names: Sequence[str]) -> tuple[Ints, list[str]]:
    """The number of every name in order of appearance, and the names."""
    numbers: dict[str, int] = {}
    found = [numbers.setdefault(name, len(numbers)) for name in names]
    return np.array(found, dtype=np.int64), list(numbers)


def _places(draws: Draws) -> Ints:
    """The place of every draw in their order."""
    places = np.empty(len(draws), dtype=np.int64)
    places[np.lexsort((draws[:, 1], draws[:, 0]))] = np.arange(len(draws))
    return places


def _held_out(labels: Ints, groups: Ints, draws: Draws, *, share: float) -> Mask:
    classes, label_rows = np.unique(labels, return_inverse=True)
    K = len(classes)
    # How many samples of which class each group has, the groups in the order of their draws.
    places = _places(draws)[groups]
    pairs, counts = np.unique(places * K + label_rows, return_counts=True)
    ends = np.flatnonzero(np.diff(pairs // K, append=-1)) + 1
    totals = np.bincount(label_rows, minlength=K).tolist()
    left, taken = list(totals), [0] * K
    chosen = np.zeros(len(draws), dtype=bool)
    start = 0
    for end in map(int, ends):
        members = list(zip((pairs[start:end] % K).tolist(), counts[start:end].tolist(), strict=True))
        # A class still lacks this group if taking it brings the class nearer its share than leaving it.
        lacking = sum(n for label, n in members if taken[label] + n / 2 <= share * totals[label])
        whole = any(left[label] == n for label, n in members)
        if 2 * lacking > sum(n for _, n in members) and not whole:
            chosen[pairs[start] // K] = True
            for label, n in members:
                taken[label] += n
                left[label] -= n
        start = end
    if not chosen.any():
        raise ConfigError(
            f"holds nothing out: {len(ends)} groups of {K} classes cannot be cut without losing a class",
            key="data.val_share",
            value=share,
            hint="use a larger share, or data with more groups per class",
        )
    found: Mask = chosen[places]
    return found


def _few_labels(labels: Ints, videos: Ints, draws: Draws, *, keep: Mask, share: float) -> Mask:
    classes, label_rows = np.unique(labels, return_inverse=True)
    pairs = label_rows * len(draws) + _places(draws)[videos]
    # The videos of every class, one class after the other, each in the order of their draws.
    kept = np.unique(pairs[keep])
    of_class = kept // len(draws)
    sizes = np.bincount(of_class, minlength=len(classes))
    places = np.arange(len(kept)) - (np.cumsum(sizes) - sizes)[of_class]
    chosen = kept[places < np.ceil(share * sizes)[of_class]]
    return np.isin(pairs, chosen)
