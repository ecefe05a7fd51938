"""The share of the picture that overlaid text and graphics cover: subtitles, captions, slides, logos with letters.

What is laid over a picture is made of strokes: thin, far brighter or darker than what is beside them on both sides,
close together, and in the same place and of the same levels from one picture to the next. Strokes are what a
morphological top-hat leaves, and where many begin and end both along the rows and along the columns there are letters
(Hasan and Karam, IEEE TIP 2000, find text by morphology and such counts). Nothing is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cliplift.sharding.scores.pictures import Luma, Run, summed

SIDE = 240  # short side of the pictures that are looked at, about
STROKE_SHARE = 0.036  # of the short side: what is wider is no stroke
STROKE_LEVELS = 96  # of a stroke above or below what is beside it, 8-bit levels
SAME_LEVELS = 24  # that a stroke may change from picture to picture
CELL = 8  # side of the cells that are text or not, pixels
ACROSS, DOWN = 5, 3  # cells that are looked at together
LEAST_ACROSS, LEAST_DOWN = (
    3.0,
    0.75,
)  # ends of strokes in a row of ACROSS cells, and in a column of DOWN cells

Mask = NDArray[np.bool_]
Counts = NDArray[np.int32]
Extreme = Callable[[Luma, Luma], Luma]  # np.minimum or np.maximum


def overlaid_share(runs: Sequence[Run]) -> float:
    """Share of the picture that text covers, mean over every other run of pictures, four at most."""
    return float(np.mean([_covered(run) for run in runs[::2]]))


def _covered(run: Run) -> float:
    """The share of the cells that are text, the same at the beginning and at the end of a run."""
    first, last = (_reduced(picture.luma) for picture in (run[0], run[-1]))
    if min(first.shape) < CELL:
        return 0.0
    darkest, brightest = np.minimum(first, last), np.maximum(first, last)
    steady = brightest - darkest < SAME_LEVELS
    bright, dark = (_lettered(strokes & steady) for strokes in _strokes(darkest, brightest))
    return float((bright | dark).mean())


def _reduced(luma: Luma) -> Luma:
    factor = max(1, min(luma.shape) // SIDE)
    return luma if factor == 1 else (summed(luma, factor) // factor**2).astype(np.uint8)


def _strokes(darkest: Luma, brightest: Luma) -> Iterator[Mask]:
    """The bright, then the dark strokes that two pictures share; a stroke is thin along rows or along columns."""
    half = max(1, round(min(darkest.shape) * STROKE_SHARE / 2))
    ground = np.minimum(*(_filled(brightest, half, axis, np.minimum, np.maximum) for axis in (0, 1)))
    yield (darkest > ground) & (darkest - ground > STROKE_LEVELS)
    ground = np.maximum(*(_filled(darkest, half, axis, np.maximum, np.minimum) for axis in (0, 1)))
    yield (ground > brightest) & (ground - brightest > STROKE_LEVELS)


def _filled(luma: Luma, half: int, axis: int, shrink: Extreme, grow: Extreme) -> Luma:
    """Opening (minimum, then maximum) or closing along an axis with a line of 2 half + 1 pixels."""
    return _extreme(_extreme(luma, half, axis, shrink), half, axis, grow)


def _extreme(luma: Luma, half: int, axis: int, pick: Extreme) -> Luma:
    """Extreme over 2 half + 1 neighbours along an axis, in about log2 of that many steps."""
    pad = [(0, 0), (0, 0)]
    pad[axis] = (half, half)
    found = np.pad(luma, pad, mode="edge")
    done, width = 1, 2 * half + 1

    def part(values: Luma, start: int, stop: int) -> Luma:
        return values[start:stop] if axis == 0 else values[:, start:stop]

    while done < width:
        step = min(done, width - done)
        length = found.shape[axis]
        found = pick(part(found, 0, length - step), part(found, step, length))
        done += step
    return found


def _lettered(strokes: Mask) -> Mask:
    """(rows, columns) the cells in and around which strokes begin and end as often as those of letters do."""
    across, down = np.zeros_like(strokes), np.zeros_like(strokes)
    across[:, 1:] = strokes[:, 1:] != strokes[:, :-1]
    down[1:] = strokes[1:] != strokes[:-1]
    ends_across = _around(_cells(across), DOWN, ACROSS) / (DOWN * CELL)
    ends_down = _around(_cells(down), DOWN, ACROSS) / (ACROSS * CELL)
    letters: Mask = (ends_across >= LEAST_ACROSS) & (ends_down >= LEAST_DOWN) & (_cells(strokes) > 0)
    return letters


def _cells(mask: Mask) -> Counts:
    """How many pixels of each cell are set; what is left at the edges belongs to no cell."""
    return summed(mask.view(np.uint8), CELL).astype(np.int32)


def _around(cells: Counts, down: int, across: int) -> Counts:
    """Sums over ``down`` x ``across`` neighbouring cells, fewer at the edges."""
    for axis, size in ((0, down), (1, across)):
        pad = [(0, 0), (0, 0)]
        pad[axis] = (size // 2 + 1, size // 2)
        sums = np.cumsum(np.pad(cells, pad), axis=axis, dtype=np.int32)
        length = cells.shape[axis]
        high, low = (np.take(sums, np.arange(length) + start, axis=axis) for start in (size, 0))
        cells = high - low
    return cells
