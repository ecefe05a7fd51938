"""Pairs of clips whose vectors are similar, within one set or between two, cluster by cluster."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cliplift.sharding.scratch import scratch_folder
from cliplift.sharding.similar.dealt import DealtVectors
from cliplift.sharding.similar.exact import STEPS, Floats, Ints, Shorts, VectorRows, products
from cliplift.sharding.similar.kmeans import centroids_of, default_clusters

TILE = 2048  # vectors compared at once with as many
MOST_PER_CLIP = 32
SEED = 0
ALL_COMPARED = 20_000  # clips of the second set up to which every pair is compared
KEPT_BEFORE_CUT = 1 << 22  # pairs held before those beyond the most similar of each query are let go

Mask = NDArray[np.bool_]
Rows = tuple[Ints, Shorts]  # numbers and vectors
Allowed = Callable[[Ints, Ints], Mask]  # rows (n, 1) and (1, m) -> which pairs count


@dataclass(frozen=True)
class Pairs:
    """M pairs, sorted by ``first``, then from the most similar on.

    Attributes:
        first: (M,) rows of the first set.
        second: (M,) rows of the second, or of the same set.
        cosine: (M,) of their vectors.
        cut: whether a row of the first set has more than are listed.
    """

    first: Ints
    second: Ints
    cosine: Floats
    cut: bool


def pairs_between(
    first: VectorRows,
    second: VectorRows,
    *,
    threshold: float,
    most: int = MOST_PER_CLIP,
    clusters: int | None = None,
    seed: int = SEED,
) -> Pairs:
    """Pairs of a clip of one set and a clip of another whose vectors have a cosine of at least a threshold.

    Call it with the larger set first and with the set that is protected, such as a test set, second::

        with stored_embeddings(*open_dataset(train)) as a:
            with stored_embeddings(*open_dataset(test), facts_digest=a.facts.digest) as b:
                pairs = pairs_between(a, b, threshold=0.9)

    ``similar.groups.same_clips`` goes on from there: it says which of these pairs show the same.

    Args:
        first, second: vectors of the same network, read twice each. Memory is bounded: some 50 bytes a clip, and blocks
            of vectors; scratch space is 2 D bytes a clip.
        threshold: of the cosine, exact to .001.
        most: pairs listed of a clip of the first set, the most similar ones.
        clusters: of the second set; None is the square root of its size. Clips are compared in four clusters; with one
            cluster nothing is missed, at the cost of a product of every two clips.
        seed: of the clusters.
    """
    assert first.width == second.width
    if clusters is None:
        clusters = default_clusters(second.rows) if second.rows > ALL_COMPARED else 1
    centroids = centroids_of(second, clusters=clusters, seed=seed)
    with scratch_folder() as folder:
        queries = DealtVectors(first, centroids, folder)
        targets = DealtVectors(second, centroids, folder)
        try:
            return similar(queries, targets, threshold=threshold, most=most)
        finally:
            queries.close()
            targets.close()


def similar(
    queries: DealtVectors,
    targets: DealtVectors,
    *,
    threshold: float,
    most: int,
    allowed: Allowed | None = None,
    active: Mask | None = None,
) -> Pairs:
    """Pairs of a query and a target, each in a cluster of the target that the query lies in or visits.

    Args:
        queries, targets: dealt to the same clusters; may be the same.
        threshold: of the cosine.
        most: pairs kept of a query.
        allowed: which pairs count.
        active: (N,) which rows of targets and queries are looked at, where both are the same.
    """
    found, limit = _Found(most), np.float32(threshold * STEPS**2)
    for cluster in range(targets.clusters):
        for of_target in targets.home_of(cluster):
            rows, vectors = _active(of_target, active)
            if not len(rows):
                continue
            for of_query in itertools.chain(queries.home_of(cluster), queries.visitors_of(cluster)):
                mine, own = _active(of_query, active)
                for start in range(0, len(mine), TILE):
                    part = slice(start, start + TILE)
                    found.add(_in_tiles((mine[part], own[part]), (rows, vectors), limit, most, allowed))
    first, second, score, cut = found.found()
    return Pairs(first, second, score / np.float32(STEPS**2), cut)


def _active(of: Rows, active: Mask | None) -> Rows:
    if active is None:
        return of
    kept = active[of[0]]
    return of[0][kept], of[1][kept]


def _in_tiles(
    queries: Rows, targets: Rows, limit: np.float32, most: int, allowed: Allowed | None
) -> tuple[Ints, Ints, Floats, bool]:
    """The pairs of at most TILE queries with some targets of a cluster."""
    tile = _Found(most)
    left = queries[1].astype(np.float32)
    for start in range(0, len(targets[0]), TILE):
        rows = targets[0][start : start + TILE]
        scores = products(left, targets[1][start : start + TILE])
        keep = scores >= limit
        if allowed is not None and keep.any():
            keep &= allowed(queries[0][:, None], rows[None, :])
        at, to = np.nonzero(keep)
        tile.add((queries[0][at], rows[to], scores[at, to], False))
    return tile.found()


class _Found:
    """Pairs as they are found, of each query the most similar ones."""

    def __init__(self, most: int) -> None:
        self._most, self._cut, self._waiting = most, False, 0
        self._parts: list[tuple[Ints, Ints, Floats]] = []

    def add(self, part: tuple[Ints, Ints, Floats, bool]) -> None:
        first, second, score, cut = part
        self._cut |= cut
        if len(first):
            self._parts.append((first, second, score))
            self._waiting += len(first)
        if self._waiting > KEPT_BEFORE_CUT:
            self._parts = [self._settled()]
            self._waiting = 0

    def found(self) -> tuple[Ints, Ints, Floats, bool]:
        """Them, and whether some were let go."""
        settled = self._settled()
        return (*settled, self._cut)

    def _settled(self) -> tuple[Ints, Ints, Floats]:
        """Each pair once, sorted, cut to the most similar of each query."""
        if not self._parts:
            none = np.zeros(0, dtype=np.int64)
            return none, none, np.zeros(0, dtype=np.float32)
        first, second, score = (np.concatenate([part[i] for part in self._parts]) for i in range(3))
        order = np.lexsort((second, -score, first))
        first, second, score = first[order], second[order], score[order]
        new = np.ones(len(first), dtype=bool)  # a pair may be found in two clusters
        new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
        first, second, score = first[new], second[new], score[new]
        starts = np.flatnonzero(np.concatenate([[True], first[1:] != first[:-1]]))
        rank = np.arange(len(first)) - np.repeat(starts, np.diff(starts, append=len(first)))
        kept = rank < self._most
        self._cut |= not bool(kept.all())
        return first[kept], second[kept], score[kept]
