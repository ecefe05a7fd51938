"""Clusters of vectors: spherical k-means (Dhillon and Modha, 2001), a function of the vectors and a seed.

Centroids are found on some of the vectors, as faiss does: 50 a cluster, drawn by the seed. Whatever number of vectors
there is, two passes over them are enough, and products are exact (``exact``), so that the clusters are the same on any
machine.
"""

from __future__ import annotations

import math

import numpy as np

from cliplift.sharding.similar.exact import (
    STEPS,
    Floats,
    Ints,
    Shorts,
    VectorRows,
    products,
    rows_at_once,
    whole,
)

POINTS_PER_CLUSTER = 50
ITERATIONS = 10
MOST_CLUSTERS = 1 << 16


def default_clusters(rows: int) -> int:
    """The square root of the number of clips: sorting clips to clusters then costs what comparing them inside does."""
    return max(1, min(MOST_CLUSTERS, math.isqrt(max(rows, 1))))


def centroids_of(vectors: VectorRows, *, clusters: int, seed: int) -> Shorts:
    """(K, D) centroids in steps of 1/2048; fewer than asked for where there are fewer vectors.

    Args:
        vectors: of N clips; read once.
        clusters: K.
        seed: of the vectors that are drawn, and of where clusters begin.
    """
    sample = _sample(vectors, POINTS_PER_CLUSTER * clusters, seed)
    rng = np.random.Generator(np.random.Philox(key=[seed, 1]))
    begun = rng.permutation(len(sample))[:clusters]
    centroids = sample[np.sort(begun)]
    for _ in range(ITERATIONS):
        home, score = nearest(sample, centroids)
        moved = _means(sample, home, score, centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return centroids


def nearest(vectors: Shorts, centroids: Shorts) -> tuple[Ints, Floats]:
    """(n,) the most similar centroid of each vector, the first of equal ones, and (n,) the product with it."""
    home, score = np.zeros(len(vectors), dtype=np.int64), np.zeros(len(vectors), dtype=np.float32)
    columns = centroids.astype(np.float32)
    step = rows_at_once(len(centroids))
    for first in range(0, len(vectors), step):
        rows = slice(first, first + step)
        found = products(vectors[rows], columns)
        home[rows] = found.argmax(axis=1)
        score[rows] = found.max(axis=1)
    return home, score


def _sample(vectors: VectorRows, count: int, seed: int) -> Shorts:
    """(n, D) of at most ``count`` vectors, in the order of their rows, without clips that have none."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0]))
    chosen = np.sort(rng.permutation(vectors.rows)[:count])
    found = np.zeros((len(chosen), vectors.width), dtype=np.int16)
    for first, block in vectors.blocks():
        here = slice(*np.searchsorted(chosen, [first, first + len(block)]).tolist())
        found[here] = whole(block[chosen[here] - first])
    return found[found.any(axis=1)]


def _means(vectors: Shorts, home: Ints, score: Floats, centroids: Shorts) -> Shorts:
    """The direction of the sum of each cluster; a cluster that is empty begins anew at a vector that fits ill."""
    order = np.argsort(home, kind="stable")
    ends = np.cumsum(np.bincount(home, minlength=len(centroids)))
    unfit = iter(np.argsort(score, kind="stable").tolist())
    found = np.empty_like(centroids)
    for k, end in enumerate(ends.tolist()):
        mine = order[ends[k - 1] if k else 0 : end]
        total = vectors[mine].sum(axis=0, dtype=np.float64)  # of whole numbers: exact in any order
        # fsum rounds once, so that the length has the same bits everywhere.
        length = math.sqrt(math.fsum((total * total).tolist()))
        found[k] = np.rint(total / length * STEPS) if length else vectors[next(unfit)]
    return found
