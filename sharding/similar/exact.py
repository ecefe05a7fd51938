"""Vectors of length 1 as whole numbers, so that their products are exact: the same bits on every machine.

A component is rounded to 1/2048. The sum of |a_i b_i| of two vectors of length 2048 is at most 2048^2, by Cauchy and
Schwarz, which is far below 2^24: every partial sum of their product is a whole number that float32 holds. So a matrix
product in float32 has no rounding, whatever the order of its sums, the number of threads or the library. The rounding
of the components moves a cosine by .0002 or so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

STEPS = 2048
ROWS_AT_ONCE = 4096

Floats = NDArray[np.float32]
Halves = NDArray[np.float16]
Shorts = NDArray[np.int16]
Ints = NDArray[np.int64]


class VectorRows(Protocol):
    """Vectors of N clips; ``sharding.scores.embeddings.Embeddings`` are some.

    Attributes:
        rows: N.
        width: D.
    """

    rows: int
    width: int

    def blocks(self) -> Iterator[tuple[int, Halves]]:
        """The first row of each block, and its vectors (n, D) of length 1, NaN for a clip that has none; all rows."""
        ...


class ArrayVectors:
    """Vectors that are in memory, (N, D), of any length; each is brought to length 1."""

    def __init__(self, values: NDArray[np.floating]) -> None:
        self.rows, self.width = values.shape
        self._values = values

    def blocks(self) -> Iterator[tuple[int, Halves]]:
        for first in range(0, self.rows, ROWS_AT_ONCE):
            some = self._values[first : first + ROWS_AT_ONCE].astype(np.float64)
            yield first, (some / np.sqrt((some * some).sum(axis=1, keepdims=True))).astype(np.float16)


def whole(values: Halves) -> Shorts:
    """(n, D) of length 1 -> in steps of 1/2048; zeros for a clip without a vector."""
    steps = np.rint(np.nan_to_num(values.astype(np.float32)) * STEPS)
    return steps.astype(np.int16)


def products(first: Shorts | Floats, second: Shorts | Floats) -> Floats:
    """(n, D) and (m, D) -> (n, m), exact; ``STEPS ** 2`` is a cosine of 1."""
    found: Floats = first.astype(np.float32) @ second.astype(np.float32).T
    return found


def rows_at_once(columns: int) -> int:
    """Rows whose products with so many columns take no more than 64 MiB."""
    return max(1, min(ROWS_AT_ONCE, (1 << 24) // max(1, columns)))
