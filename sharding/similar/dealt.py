"""Vectors in a scratch file in the order of their clusters, so that a cluster is read in one piece.

Each vector lies in its own cluster and visits the next nearest ones, so that what a border between clusters parts is
still compared.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cliplift.sharding.similar.exact import Floats, Ints, Shorts, VectorRows, products, rows_at_once, whole

VISITED = 4  # clusters in which a vector is looked for: its own, and the three that are next
READ_ROWS = 1 << 14
NONE = -1  # cluster of a clip without a vector


class DealtVectors:
    """The vectors of N clips, dealt to K clusters. Memory: some 50 bytes a clip, and a block of vectors.

    Args:
        vectors: read twice.
        centroids: (K, D).
        folder: scratch space for 2 D bytes a clip.

    Attributes:
        home: int32 (N,) the cluster of each, -1 for a clip without a vector.
        hashes: uint64 (N,) equal for equal vectors, and hardly ever for others.
    """

    def __init__(self, vectors: VectorRows, centroids: Shorts, folder: Path) -> None:
        self.width, self.clusters = vectors.width, len(centroids)
        visited = nearest_clusters(vectors, centroids)
        self.home: NDArray[np.int32] = visited[:, 0].copy()
        order = np.argsort(self.home, kind="stable")
        self._rows: Ints = order[int((self.home == NONE).sum()) :]
        self._ends = np.cumsum(np.bincount(self.home[self._rows], minlength=self.clusters))
        self._place = np.full(vectors.rows, NONE, dtype=np.int64)
        self._place[self._rows] = np.arange(len(self._rows))
        self._visits_of(visited[:, 1:])
        self._file = (
            os.open(folder, os.O_RDWR | os.O_TMPFILE) if hasattr(os, "O_TMPFILE") else _unnamed(folder)
        )
        self._write(vectors)

    def close(self) -> None:
        """Remove the scratch file."""
        os.close(self._file)

    def home_of(self, cluster: int) -> Iterator[tuple[Ints, Shorts]]:
        """(n,) rows of a cluster, and (n, D) their vectors; in parts where there are many."""
        first = int(self._ends[cluster - 1]) if cluster else 0
        stop = int(self._ends[cluster])
        for start in range(first, stop, READ_ROWS):
            count = min(READ_ROWS, stop - start)
            yield self._rows[start : start + count], self._read(start, count)

    def visitors_of(self, cluster: int) -> Iterator[tuple[Ints, Shorts]]:
        """The same of the rows that visit a cluster."""
        first = int(self._visit_ends[cluster - 1]) if cluster else 0
        stop = int(self._visit_ends[cluster])
        for start in range(first, stop, READ_ROWS):
            rows: Ints = self._visitors[start : min(stop, start + READ_ROWS)].astype(np.int64)
            found = np.empty((len(rows), self.width), dtype=np.int16)
            for number, place in enumerate(self._place[rows].tolist()):
                found[number] = self._read(place, 1)[0]
            yield rows, found

    def _visits_of(self, visits: NDArray[np.int32]) -> None:
        """The rows that visit each cluster, one cluster after the other."""
        rows, which = np.nonzero(visits != NONE)
        clusters = visits[rows, which]
        order = np.argsort(clusters, kind="stable")
        self._visitors = rows[order].astype(np.int32 if len(self.home) < 1 << 31 else np.int64)
        self._visit_ends = np.cumsum(np.bincount(clusters, minlength=self.clusters))

    def _write(self, vectors: VectorRows) -> None:
        size = 2 * self.width
        self.hashes = np.zeros(vectors.rows, dtype=np.uint64)
        for first, block in vectors.blocks():
            steps = whole(block)
            self.hashes[first : first + len(block)] = [_hash(row.tobytes()) for row in steps]
            places = self._place[first : first + len(block)]
            for number in np.argsort(places, kind="stable").tolist():
                if places[number] != NONE:
                    os.pwrite(self._file, steps[number].tobytes(), int(places[number]) * size)

    def _read(self, place: int, count: int) -> Shorts:
        size, parts = 2 * self.width, []
        at, left = place * size, count * size
        while left:  # one call reads at most 2 GiB
            part = os.pread(self._file, left, at)
            assert part
            parts.append(part)
            at, left = at + len(part), left - len(part)
        return np.frombuffer(b"".join(parts), dtype=np.int16).reshape(count, self.width)


def _unnamed(folder: Path) -> int:
    path = folder / "vectors"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    path.unlink()
    return file


def _hash(data: bytes) -> int:
    return zlib.crc32(data) << 32 | zlib.adler32(data)


def nearest_clusters(vectors: VectorRows, centroids: Shorts) -> NDArray[np.int32]:
    """(N, VISITED) the nearest clusters, the nearest first, the first of equal ones; -1 where there is none."""
    found = np.full((vectors.rows, VISITED), NONE, dtype=np.int32)
    columns: Floats = centroids.astype(np.float32)
    for first, block in vectors.blocks():
        step = rows_at_once(len(centroids))
        for start in range(0, len(block), step):
            steps = whole(block[start : start + step])
            scores = products(steps, columns)
            has = steps.any(axis=1)
            for turn in range(min(VISITED, len(centroids))):
                best = scores.argmax(axis=1)
                at = first + start
                found[at : at + len(steps), turn] = np.where(has, best, NONE)
                scores[np.arange(len(steps)), best] = -np.inf
    return found
