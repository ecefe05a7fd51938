"""How the values of a column are spread: counts in bins, and a few quantiles, for terminals and pages."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

BINS = 20
WIDTH = 40  # of the longest bar, characters
LOG_RANGE = 100.0  # between the 5th and the 95th of a hundred, from which on bins grow by a factor
QUANTILES = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1.0}

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Histogram:
    """The spread of a column.

    Attributes:
        name: of the column.
        edges: (K + 1,) rising; a bin holds its lower edge, the last one both.
        counts: (K,) clips in each bin.
        missing: clips without a value.
        quantiles: by name; empty where no clip has a value.
    """

    name: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    missing: int
    quantiles: dict[str, float]

    @property
    def clips(self) -> int:
        """Clips that have a value."""
        return sum(self.counts)


def histogram(name: str, values: NDArray[np.generic], *, bins: int = BINS) -> Histogram:
    """Count the values of a column in bins of equal width, or of equal ratio where they span orders of magnitude.

    Args:
        name: of the column.
        values: (N,) NaN where a clip has none.
        bins: how many; columns of true and false have two.
    """
    numbers = values.astype(np.float64)
    known = numbers[~np.isnan(numbers)]
    missing = len(numbers) - len(known)
    if not len(known):
        return Histogram(name, (), (), missing, {})
    found = np.quantile(known, list(QUANTILES.values()), method="inverted_cdf")
    quantiles = dict(zip(QUANTILES, found.tolist(), strict=True))
    edges = (
        np.array([0.0, 1.0, 2.0]) if values.dtype.kind in "bu" and known.max() <= 1 else _edges(known, bins)
    )
    counts = np.histogram(known, edges)[0]
    return Histogram(name, tuple(edges.tolist()), tuple(counts.tolist()), missing, quantiles)


def _edges(known: Floats, bins: int) -> Floats:
    least, most = float(known.min()), float(known.max())
    positive = known[known > 0]
    if least >= 0 and len(positive):
        low, high = np.quantile(positive, [0.05, 0.95], method="inverted_cdf").tolist()
        if high > LOG_RANGE * low:
            # All below the first ratio, zero among them, is one bin.
            return np.concatenate([[0.0], np.geomspace(max(low, most / 1e6), most, bins)])
    return np.linspace(least, most if most > least else least + 1, bins + 1)


def text_histogram(found: Histogram, *, marks: tuple[float, ...] = ()) -> str:
    """Lines for a terminal: quantiles, then a bar for each bin.

    Args:
        found: the histogram.
        marks: thresholds; the bins that hold one are marked.
    """
    without = f", {found.missing} without a value" if found.missing else ""
    head = f"{found.name}: {found.clips} clips{without}"
    if not found.counts:
        return head
    lines = [f"{head}; " + ", ".join(f"{name} {value:.4g}" for name, value in found.quantiles.items())]
    most = max(found.counts)
    last = len(found.counts) - 1
    for place, ((low, high), count) in enumerate(zip(pairwise(found.edges), found.counts, strict=True)):
        inside = [m for m in marks if low <= m < high or (place == last and m == high)]
        mark = f"  <- {', '.join(f'{m:g}' for m in inside)}" if inside else ""
        bar = "#" * -(-WIDTH * count // most)  # at least one where there is a clip
        lines.append(f"  {low:10.4g} to {high:10.4g} {count:>9} {bar}{mark}".rstrip())
    return "\n".join(lines)
