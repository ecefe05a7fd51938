"""Clusters and similar pairs against brute force, the same bits whatever the order of sums, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from cliplift.sharding.similar import dealt, pairs
from cliplift.sharding.similar.exact import STEPS, ArrayVectors, products, whole
from cliplift.sharding.similar.kmeans import centroids_of, default_clusters, nearest
from cliplift.sharding.similar.pairs import pairs_between


def planted(rows: int, width: int, *, copies: int, seed: int = 0) -> np.ndarray:
    """Vectors around 20 centres; the last ``copies`` are the first ones with a little noise, of a cosine of .95."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(20, width))
    found = centres[rng.integers(0, 20, rows)] + 0.9 * rng.normal(size=(rows, width))
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    noise = rng.normal(size=(copies, width)) / np.sqrt(width)
    found[rows - copies :] = found[:copies] + 0.33 * noise
    return found


def test_products_are_exact_in_any_order() -> None:
    rng = np.random.default_rng(1)
    a, b = (whole((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16))
            for x in (rng.normal(size=(50, 777)), rng.normal(size=(60, 777))))  # fmt: skip
    expected = a.astype(np.int64) @ b.astype(np.int64).T
    assert (products(a, b) == expected).all()
    order = rng.permutation(777)
    assert (products(a[:, order], b[:, order]) == expected).all()
    same = products(a, a).diagonal() / STEPS**2
    assert np.abs(same - 1).max() < 0.002


def test_clusters_are_those_of_the_centres_and_do_not_depend_on_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(2)
    centres = np.linalg.qr(rng.normal(size=(32, 32)))[0][:6]
    of = rng.integers(0, 6, 900)
    vectors = ArrayVectors(centres[of] + 0.05 * rng.normal(size=(900, 32)))
    centroids = centroids_of(vectors, clusters=30, seed=0)
    home, _ = nearest(np.concatenate([whole(b) for _, b in vectors.blocks()]), centroids)
    pairs_of = set(zip(home.tolist(), of.tolist(), strict=True))
    assert len(pairs_of) == len(set(home.tolist())) >= 25, "no cluster holds vectors of two centres"
    monkeypatch.setattr("cliplift.sharding.similar.exact.ROWS_AT_ONCE", 7)
    np.testing.assert_array_equal(centroids_of(vectors, clusters=30, seed=0), centroids)
    assert not np.array_equal(centroids_of(vectors, clusters=30, seed=1), centroids)


def test_more_clusters_than_vectors_and_clips_without_a_vector() -> None:
    values = np.eye(8)[[0, 0, 0, 1, 2]]
    values[4] = np.nan
    found = centroids_of(ArrayVectors(values), clusters=7, seed=0)
    assert {tuple(row) for row in found.tolist()} <= {tuple(row) for row in (np.eye(8)[:2] * STEPS).tolist()}
    assert default_clusters(10**6) == 1000


def brute(a: np.ndarray, b: np.ndarray, threshold: float) -> dict[tuple[int, int], float]:
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return {
        (int(i), int(j)): float(a[i] @ b[j]) for i, j in zip(*np.nonzero(a @ b.T >= threshold), strict=True)
    }


def test_pairs_between_two_sets_are_those_of_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "TILE", 64)
    monkeypatch.setattr(dealt, "READ_ROWS", 50)
    values = planted(1500, 64, copies=200)
    a, b = values[200:], values[:200]
    found = pairs_between(ArrayVectors(a), ArrayVectors(b), threshold=0.9)
    expected = brute(a, b, 0.9)
    surely = {pair for pair, cosine in expected.items() if cosine > 0.901}
    listed = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert surely <= listed
    assert listed <= set(brute(a, b, 0.899))
    assert len(surely) >= 190
    for i, j, cosine in zip(found.first, found.second, found.cosine, strict=True):
        assert abs(cosine - a[i] @ b[j] / np.linalg.norm(a[i]) / np.linalg.norm(b[j])) < 0.002
    assert not found.cut


def test_borders_between_clusters_part_few_pairs() -> None:
    values = planted(6000, 64, copies=1000, seed=3)
    a, b = values[1000:], values[:1000]
    expected = set(brute(a, b, 0.901))
    found = pairs_between(ArrayVectors(a), ArrayVectors(b), threshold=0.9, clusters=30)
    listed = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert len(expected & listed) >= 0.99 * len(expected)


def test_of_many_pairs_the_most_similar_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "KEPT_BEFORE_CUT", 100)
    monkeypatch.setattr(pairs, "TILE", 16)
    rng = np.random.default_rng(4)
    a = 1 + 0.2 * rng.normal(size=(40, 32))
    b = 1 + 0.2 * rng.normal(size=(90, 32))
    found = pairs_between(ArrayVectors(a), ArrayVectors(b), threshold=0.5, most=5)
    assert found.cut
    assert (np.bincount(found.first) == 5).all()
    steps = [
        np.concatenate([whole(block) for _, block in ArrayVectors(x).blocks()]).astype(np.int64)
        for x in (a, b)
    ]
    best = np.sort(steps[0] @ steps[1].T, axis=1)[:, ::-1][:, :5] / STEPS**2
    np.testing.assert_allclose(found.cosine.reshape(40, 5), best, rtol=1e-6)


class MadeAsRead:
    """Vectors made as they are read, never all at once."""

    def __init__(self, rows: int, width: int) -> None:
        self.rows, self.width = rows, width

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        for first in range(0, self.rows, 128):
            values = np.random.default_rng(first).normal(size=(128, self.width))
            yield first, (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


def test_memory_does_not_grow_with_the_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    monkeypatch.setattr(pairs, "TILE", 256)
    monkeypatch.setattr(dealt, "READ_ROWS", 512)
    tracemalloc.start()
    pairs_between(MadeAsRead(128, 256), MadeAsRead(4096, 256), threshold=0.99, clusters=16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4096 * 256 * 4, "less than the vectors take in float32"
