"""Whether two clips show the same, by small gray pictures of them at even distances in time.

Clips of one camera look alike, and so do their embeddings; what tells a copy from another clip of the same place is
what moves, where and when. So the pictures of both are compared after the mean picture of each is taken off: a copy
moves in the same way, also where it was encoded again, recoloured, mirrored, cropped by a tenth, played at another
speed or cut elsewhere. Where nothing moves in either clip, the mean pictures are all there is to compare.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cliplift.sharding.scores.vectors import SKETCH_FRAMES, SKETCH_SIDE

THRESHOLD = 0.7  # of the cosine of embeddings, below which sketches are not compared
PICTURES_PER_SECOND = 8.0
LUMA = (77, 150, 29)  # of 256 (ITU-R BT.601)
CROPS = (1.0, 0.95, 0.9)  # sides of what one clip shows of the other's picture
SPEEDS = (0.5, 2 / 3, 0.8, 1.0, 1.25, 1.5, 2.0)
LEAST_ENERGY = 1.0  # of what moves, squares of 8-bit levels: below it a correlation says nothing
LEAST_OVERLAP = 0.5  # of the shorter clip
SAME_MOVING = 0.88  # correlation from which on two clips show the same
STILL_LEVELS = 0.3  # deviation over time, root mean square in 8-bit levels, below which nothing moves
SAME_STILL = 0.995  # correlation of the mean pictures from which on two such clips show the same
HELD = 256  # prepared sketches

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def sketch_frames(num_frames: int, fps: float) -> tuple[Ints, float]:
    """Frame numbers of a clip's sketch, at most 24, and the seconds between them.

    Eight a second of a clip of up to three seconds, and fewer of one that is longer.
    """
    step = max(num_frames / SKETCH_FRAMES, fps / PICTURES_PER_SECOND, 1.0)
    numbers = np.floor(np.arange(SKETCH_FRAMES) * step + 1e-9).astype(np.int64)
    return numbers[numbers < num_frames], step / fps


def picture(frame: Bytes) -> Floats:
    """(H, W, 3) -> (16, 16) gray in 8-bit levels, means of equal parts."""
    H, W = frame.shape[:2]
    luma = (frame.astype(np.uint32) @ np.array(LUMA, dtype=np.uint32)) >> 8
    rows, columns = (np.arange(SKETCH_SIDE) * n // SKETCH_SIDE for n in (H, W))
    sums = np.add.reduceat(np.add.reduceat(luma, rows, axis=0), columns, axis=1)
    counts = np.outer(*(np.maximum(np.diff(at, append=n), 1) for at, n in ((rows, H), (columns, W))))
    found: Floats = (sums / counts).astype(np.float32)
    return found


class Compared(NamedTuple):
    """How far two sketches agree where they agree best.

    Attributes:
        moving: correlation of what moves.
        still: correlation of the mean pictures, cropped and mirrored as it agrees best.
        levels: deviation over time of the clip that moves less, 8-bit levels.
    """

    moving: float
    still: float
    levels: float


class Sketch:
    """A clip's pictures, prepared.

    Args:
        spacing: seconds between them.
        pictures: (T, 16, 16) in 8-bit levels, at least one.
    """

    def __init__(self, spacing: float, pictures: Floats) -> None:
        self.spacing = spacing
        values = pictures.astype(np.float32)
        mean = values.mean(axis=0)
        views = _views(np.concatenate([mean[None], values - mean]))
        still = views[:, 0] - views[:, 0].mean(axis=(1, 2), keepdims=True)
        self.still = _unit(still.reshape(len(still), -1))  # (V, 256), of length 1
        self.moving = views[:, 1:].reshape(len(views), len(values), -1)  # (V, T, 256)
        self.products = self.moving @ self.moving.transpose(0, 2, 1)  # (V, T, T)
        energy = float(np.trace(self.products[0])) / len(values)
        self.levels = np.sqrt(energy) / SKETCH_SIDE

    def compare(self, other: Sketch) -> Compared:
        """How far both agree, over all views, speeds and shifts."""
        best = Compared(-1.0, -1.0, float(min(self.levels, other.levels)))
        for cropped, whole in ((self, other), (other, self)):
            ratio = round(cropped.spacing / whole.spacing, 3)
            paths = _paths(cropped.moving.shape[1], whole.moving.shape[1], ratio)
            for mirrored in (False, True):
                pictures, picture = whole.moving[0], whole.still[:1]
                if mirrored:
                    pictures, picture = _mirrored(pictures), _mirrored(picture)
                between = cropped.moving @ pictures.T  # (V, T of the cropped, T of the whole)
                moving = _agreement(cropped.products, whole.products[0], between, paths)
                still = cropped.still @ picture[0]
                at = int(np.argmax(moving + still))
                if moving[at] + still[at] > best.moving + best.still:
                    best = best._replace(moving=float(moving[at]), still=float(still[at]))
        return best

    def same(self, other: Sketch) -> float | None:
        """How alike the clips are, up to 1, where they show the same; None where they do not."""
        found = self.compare(other)
        if found.levels < STILL_LEVELS:  # what is left after the mean is the noise of coding
            return found.still if found.still >= SAME_STILL else None
        likeness = min(found.moving, found.still)
        return likeness if likeness >= SAME_MOVING else None


@dataclass(frozen=True)
class Paths:
    """Which pictures of two clips are shown at the same time, for P speeds and shifts.

    Attributes:
        first: (P, T) 1 for the pictures of the first clip that are shown with one of the second.
        second: (P, U) with how many of the first each picture of the second is shown.
        pairs: (P, T U) 1 for pictures that are shown together.
    """

    first: Floats
    second: Floats
    pairs: Floats


def _agreement(first: Floats, second: Floats, between: Floats, paths: Paths) -> Floats:
    """(V,) the highest correlation over all paths, of pictures without the mean of those that are shown together.

    Args:
        first: (V, T, T) products of the pictures of the first clip with each other.
        second: (U, U) those of the second.
        between: (V, T, U) of the first with the second.
        paths: P of them.
    """
    count = paths.first.sum(axis=1)
    together = between.reshape(len(between), -1) @ paths.pairs.T
    together -= ((paths.first @ between) * paths.second).sum(axis=2) / count
    own = np.diagonal(first, axis1=1, axis2=2) @ paths.first.T
    own = own - ((paths.first @ first) * paths.first).sum(axis=2) / count
    others = (
        np.diagonal(second) @ paths.second.T - ((paths.second @ second) * paths.second).sum(axis=1) / count
    )
    found: Floats = (together / np.sqrt(np.maximum(own * others, LEAST_ENERGY**2))).max(axis=1)
    return found


@cache
def _paths(first: int, second: int, ratio: float) -> Paths:
    """Paths through T and U pictures whose distances in time have this ratio."""
    at = np.arange(first)
    rows = []
    for speed in SPEEDS:
        pace = ratio * speed
        for shift in np.arange(-np.ceil(first * pace), second + 1):
            to = np.floor(at * pace + shift + 0.5).astype(np.int64)
            overlap = int(((to >= 0) & (to < second)).sum())
            if overlap >= max(1.0, LEAST_OVERLAP * min(first, second / pace)):
                rows.append(np.where((to >= 0) & (to < second), to, second))
    chosen = np.unique(np.stack(rows), axis=0)
    pairs = (chosen[:, :, None] == np.arange(second)).astype(np.float32)  # (P, T, U)
    return Paths(pairs.sum(axis=2), pairs.sum(axis=1), pairs.reshape(len(pairs), -1))


@cache
def _resampling(start: float, size: float) -> Floats:
    """(16, 16) weights of cells in each of 16 equal parts of [start, start + size], in shares of the side."""
    edges = (start + size * np.arange(SKETCH_SIDE + 1) / SKETCH_SIDE) * SKETCH_SIDE
    cells = np.arange(SKETCH_SIDE)
    low = np.maximum(edges[:-1, None], cells)
    high = np.minimum(edges[1:, None], cells + 1)
    overlap = np.maximum(high - low, 0.0)
    found: Floats = (overlap / overlap.sum(axis=1, keepdims=True)).astype(np.float32)
    return found


def _views(pictures: Floats) -> Floats:
    """(n, 16, 16) -> (V, n, 16, 16): whole, then cropped to each of some boxes."""
    found = [pictures]
    for size in CROPS[1:]:
        for top in (0.0, (1 - size) / 2, 1 - size):
            for left in (0.0, (1 - size) / 2, 1 - size):
                found.append(
                    (_resampling(top, size) @ pictures @ _resampling(left, size).T).astype(np.float32)
                )
    return np.stack(found)


def _mirrored(rows: Floats) -> Floats:
    return rows.reshape(-1, SKETCH_SIDE, SKETCH_SIDE)[:, :, ::-1].reshape(len(rows), -1)


def _unit(rows: Floats) -> Floats:
    found: Floats = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
    return found


class Sketches:
    """Prepared sketches by row; the last few thousand are held.

    Args:
        read: gives spacing and pictures of a row.
    """

    def __init__(self, read: Callable[[int], tuple[float, Floats]]) -> None:
        self._read = read
        self._held: OrderedDict[int, Sketch] = OrderedDict()

    def of(self, row: int) -> Sketch:
        """The sketch of a clip."""
        found = self._held.get(row)
        if found is None:
            found = Sketch(*self._read(row))
            while len(self._held) >= HELD:
                self._held.popitem(last=False)
            self._held[row] = found
        self._held.move_to_end(row)
        return found
