"""Which of clips that show the same stays: one of each group, chosen by rank.

Clips are taken in the order of their rank. One that shows the same as a kept clip goes, and all others are kept; only
kept clips are compared with, so that a chain of near-duplicates removes nothing that resembles none of what is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cliplift.sharding.similar.dealt import DealtVectors
from cliplift.sharding.similar.exact import Ints, Shorts, VectorRows
from cliplift.sharding.similar.pairs import MOST_PER_CLIP, Mask, Pairs, pairs_between, similar
from cliplift.sharding.similar.sketches import THRESHOLD, Sketches

MOST_ROUNDS = 20


class SketchedVectors(VectorRows, Protocol):
    """Vectors of clips whose sketches are at hand; ``sharding.scores.embeddings.Embeddings`` are some."""

    def sketch(self, row: int) -> tuple[float, NDArray[np.float32]]:
        """Seconds between the pictures of a clip's sketch, and the pictures (T, 32, 32)."""
        ...


class SameClips(NamedTuple):
    """Two clips that show the same."""

    first: int
    second: int
    cosine: float  # of their embeddings
    likeness: float  # of their sketches


@dataclass(frozen=True)
class Grouped:
    """Clusters of N clips, and which of them show what a kept clip shows.

    Attributes:
        cluster: int32 (N,) -1 for a clip without a vector.
        of: int64 (N,) the kept clip that a clip shows again, -1 where it is kept itself.
        compared: pairs whose sketches were compared.
    """

    cluster: NDArray[np.int32]
    of: Ints
    compared: int


def same_clips(
    first: SketchedVectors, second: SketchedVectors, *, threshold: float = THRESHOLD
) -> Iterator[SameClips]:
    """The clips of one set that show what a clip of another shows, for each the one that is most alike.

    With the larger set first and the one that is protected second::

        with stored_embeddings(*open_dataset(train)) as a:
            with stored_embeddings(*open_dataset(test), facts_digest=a.facts.digest) as b:
                for pair in same_clips(a, b):
                    ...  # row pair.first of the catalog of `train` shows row pair.second of that of `test`

    ``stored_embeddings`` is in ``sharding.read.embeddings``. Candidates are the pairs of ``pairs_between``; of a clip
    of the first set the 32 most similar clips of the second are looked at.

    Args:
        first, second: embeddings by the same network; the sets are distinct, and clips of one video are not told apart.
        threshold: of the cosine; pairs below it are not looked at.

    Yields:
        Pairs by rising row of the first set; a clip is in at most one as the first.

    Raises:
        ManifestError: a file of embeddings is damaged.
    """
    pairs = pairs_between(first, second, threshold=threshold)
    sketches, others = Sketches(first.sketch), Sketches(second.sketch)
    starts = np.flatnonzero(np.diff(pairs.first, prepend=-1)).tolist()
    for start, stop in zip(starts, [*starts[1:], len(pairs.first)], strict=True):
        row = int(pairs.first[start])
        best: SameClips | None = None
        for at in range(start, stop):
            other = int(pairs.second[at])
            likeness = sketches.of(row).same(others.of(other))
            if likeness is not None and (best is None or likeness > best.likeness):
                best = SameClips(row, other, float(pairs.cosine[at]), likeness)
        if best is not None:
            yield best


def group_clips(
    vectors: SketchedVectors,
    centroids: Shorts,
    *,
    rank: Ints,
    video: NDArray[np.generic],
    folder: Path,
    threshold: float = THRESHOLD,
) -> Grouped:
    """Clusters of the clips of a set, and which of them repeat another video's clip; a function of its arguments.

    Args:
        vectors: of N clips.
        centroids: (K, D), of ``kmeans.centroids_of``.
        rank: (N,) different numbers: of clips that show the same the one of lowest rank stays.
        video: (N,) equal for clips of one video, which are never each other's duplicates.
        folder: scratch space for 2 D bytes a clip.
        threshold: of the cosine; pairs below it are not looked at.
    """
    dealt = DealtVectors(vectors, centroids, folder)
    try:
        search = _Search(dealt, Sketches(vectors.sketch), rank, video, threshold)
        search.equal_vectors()
        for _ in range(MOST_ROUNDS):
            more = search.similar_vectors()
            if not search.follow() and not more:
                break
        return Grouped(dealt.home, search.of, search.compared)
    finally:
        dealt.close()


class _Search:
    """What has been found to repeat a kept clip so far."""

    def __init__(
        self,
        dealt: DealtVectors,
        sketches: Sketches,
        rank: Ints,
        video: NDArray[np.generic],
        threshold: float,
    ) -> None:
        self._dealt, self._sketches, self._rank, self._video = dealt, sketches, rank, video
        self._threshold = threshold
        self.of: Ints = np.full(len(rank), -1, dtype=np.int64)
        self.compared = 0

    def equal_vectors(self) -> None:
        """Of clips with the same vector all but the first of its kind go, however many there are."""
        has = np.flatnonzero(self._dealt.home >= 0)
        order = has[np.lexsort((self._rank[has], self._dealt.hashes[has]))]
        same = self._dealt.hashes[order[1:]] == self._dealt.hashes[order[:-1]]
        leader = -1
        for number, row in enumerate(order.tolist()):
            if not number or not same[number - 1]:
                leader = row
            elif self._video[row] != self._video[leader] and self._same(row, leader) is not None:
                self.of[row] = leader

    def similar_vectors(self) -> bool:
        """Compare what is left; whether some pairs were left out, which others that went now make room for."""
        active: Mask = self.of < 0
        found = similar(
            self._dealt,
            self._dealt,
            threshold=self._threshold,
            most=MOST_PER_CLIP,
            allowed=self._allowed,
            active=active,
        )
        went = self._settle(found)
        return found.cut and went > 0

    def follow(self) -> int:
        """Clips whose kept clip went later repeat what that one repeats, or are looked at again; how many these are."""
        again = 0
        lost = np.flatnonzero((self.of >= 0) & (self.of[self.of] >= 0))
        for row in lost[np.argsort(self._rank[lost], kind="stable")].tolist():
            further = int(self.of[self.of[row]])
            while further >= 0 and self.of[further] >= 0:
                further = int(self.of[further])
            same = (
                further >= 0
                and self._video[row] != self._video[further]
                and self._same(row, further) is not None
            )
            self.of[row] = further if same else -1
            again += not same
        return again

    def _allowed(self, first: Ints, second: Ints) -> Mask:
        """Pairs of a clip and one of another video that goes before it."""
        lower: Mask = (self._rank[second] < self._rank[first]) & (self._video[second] != self._video[first])
        return lower

    def _settle(self, pairs: Pairs) -> int:
        """Take the clips of pairs by rank; how many went."""
        starts = np.flatnonzero(np.diff(pairs.first, prepend=-1))
        stops = np.append(starts[1:], len(pairs.first))
        went = 0
        for at in np.argsort(self._rank[pairs.first[starts]], kind="stable").tolist():
            row = int(pairs.first[starts[at]])
            for other in pairs.second[starts[at] : stops[at]].tolist():
                if self.of[other] < 0 and self._same(row, other) is not None:
                    self.of[row] = other
                    went += 1
                    break
        return went

    def _same(self, row: int, other: int) -> float | None:
        self.compared += 1
        return self._sketches.of(row).same(self._sketches.of(other))
