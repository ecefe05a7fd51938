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
SPEEDS = (0.5, 2 / 3, 0.8, 1.0, 1.25, 1.5, 2.0)
LEAST_ENERGY = 1.0  # of what moves, squares of 8-bit levels: below it a correlation says nothing
LEAST_OVERLAP = 0.5  # of the shorter clip
REFINED = 1.3  # sum of both correlations from which on the crop is looked for more closely
# Correlations from which on two clips show the same: of what moves, over all pictures and in each of most, and of the
# mean pictures, the higher the less what moves says.
SAME_MOVING, SAME_PICTURES, SAME_PLACE = 0.93, 0.88, 0.987
LIKELY_MOVING, LIKELY_PLACE = 0.7, 0.9975
QUIET_LEVELS, SAME_STILL = 0.5, 0.998
FINE = (0.02, 0.005)  # steps in which the crop is looked for, one after the other, shares of the side
HELD = 64  # prepared sketches, of 2 MiB each

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
    """(H, W, 3) -> (32, 32) gray in 8-bit levels, means of equal parts."""
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
        moving: correlation of what moves; light that comes and goes is taken off where the clips are near enough.
        still: correlation of the mean pictures, cropped and mirrored as it agrees best.
        levels: deviation over time of the clip that moves less, 8-bit levels; without light as well.
        pictures: correlation of what moves in a single picture, which of five of those in which more than the half
            moves four exceed; so that one flash alone decides nothing.
    """

    moving: float
    still: float
    levels: float
    pictures: float = -1.0


class Box(NamedTuple):
    """A part of a picture, in shares of its side."""

    top: float
    left: float
    size: float


COARSE = (
    Box(0.0, 0.0, 1.0),
    *(
        Box(top, left, size)
        for size in (0.95, 0.9)
        for top in (0.0, (1 - size) / 2, 1 - size)
        for left in (0.0, (1 - size) / 2, 1 - size)
    ),
)


class _Views(NamedTuple):
    """A clip cut to V boxes, its mean picture and what moves apart from each other."""

    boxes: tuple[Box, ...]
    still: Floats  # (V, 1024), of mean 0
    moving: Floats  # (V, T, 1024)
    products: Floats  # (V, T, T) of what moves


class Sketch:
    """A clip's pictures, prepared.

    Args:
        spacing: seconds between them.
        pictures: (T, 32, 32) in 8-bit levels, at least one.
    """

    def __init__(self, spacing: float, pictures: Floats) -> None:
        self.spacing = spacing
        mean = pictures.mean(axis=0)
        self._pictures: Floats = np.concatenate([mean[None], pictures - mean]).astype(np.float32)
        self._coarse = self._views(COARSE)
        self.levels = float(np.sqrt(np.trace(self._coarse.products[0]) / len(pictures))) / SKETCH_SIDE

    def compare(self, other: Sketch) -> Compared:
        """How far both agree, over all views, speeds and shifts."""
        best, ways = Compared(-1.0, -1.0, min(self.levels, other.levels)), {}
        for turned, (cropped, whole) in enumerate(((self, other), (other, self))):
            for mirrored in (False, True):
                found, box = cropped._agreement(cropped._coarse, whole, best, mirrored=mirrored)
                ways[found] = (turned, mirrored, box)
        best = max(ways, key=lambda found: found.moving + found.still)
        if best.moving + best.still < REFINED:
            return best
        turned, mirrored, box = ways[best]
        cropped, whole = (other, self) if turned else (self, other)
        for step in FINE:
            found, nearer = cropped._agreement(
                cropped._views(_near(box, step)), whole, best, mirrored=mirrored
            )
            if found.moving + found.still > best.moving + best.still:
                best, box = found, nearer
        return cropped._without_light(box, whole, best, mirrored=mirrored)

    def same(self, other: Sketch) -> float | None:
        """How alike the clips are, up to 1, where they show the same; None where they do not."""
        found = self.compare(other)
        alike = found.moving >= SAME_MOVING and found.pictures >= SAME_PICTURES and found.still >= SAME_PLACE
        alike |= found.moving >= LIKELY_MOVING and found.still >= LIKELY_PLACE
        alike |= found.levels < QUIET_LEVELS and found.still >= SAME_STILL
        return found.still if alike else None

    def _views(self, boxes: tuple[Box, ...]) -> _Views:
        seen = np.stack([_cut(self._pictures, box) for box in boxes])  # (V, 1 + T, 32, 32)
        still = seen[:, 0] - seen[:, 0].mean(axis=(1, 2), keepdims=True)
        moving = seen[:, 1:].reshape(len(boxes), len(self._pictures) - 1, -1)
        return _Views(boxes, still.reshape(len(boxes), -1), moving, moving @ moving.transpose(0, 2, 1))

    def _agreement(
        self, views: _Views, whole: Sketch, least: Compared, *, mirrored: bool
    ) -> tuple[Compared, Box]:
        """The best agreement of views of this clip with another clip, and where it is cut for it."""
        ratio = round(self.spacing / whole.spacing, 3)
        paths = _paths(len(self._pictures) - 1, len(whole._pictures) - 1, ratio)
        pictures, picture = whole._coarse.moving[0], whole._coarse.still[:1]
        if mirrored:
            pictures, picture = _mirrored(pictures), _mirrored(picture)
        between = views.moving @ pictures.T  # (V, T of this clip, T of the whole)
        moving, path = _highest(views.products, whole._coarse.products[0], between, paths)
        count = paths.first[path].sum(axis=1, keepdims=True)
        # The mean pictures are those of what is shown together: a clip that is cut elsewhere has another mean.
        own = views.still + np.einsum("vt,vtc->vc", paths.first[path], views.moving) / count
        others = picture + paths.second[path] @ pictures / count
        still = (_unit(own) * _unit(others)).sum(axis=1)
        at = int(np.argmax(moving + still))
        return least._replace(moving=float(moving[at]), still=float(still[at])), views.boxes[at]

    def _without_light(self, box: Box, whole: Sketch, found: Compared, *, mirrored: bool) -> Compared:
        """The agreement of what moves at the best path, apart from what light does to the whole picture.

        Light adds to a picture some of the mean picture and some of an even one. Both are taken off each picture, so
        that lamps, clouds and the camera's exposure, which all clips of a place share, are no evidence.
        """
        views = self._views((box,))
        ratio = round(self.spacing / whole.spacing, 3)
        paths = _paths(len(self._pictures) - 1, len(whole._pictures) - 1, ratio)
        pictures, picture = whole._coarse.moving[0], whole._coarse.still[:1]
        if mirrored:
            pictures, picture = _mirrored(pictures), _mirrored(picture)
        between = views.moving @ pictures.T
        _, path = _highest(views.products, whole._coarse.products[0], between, paths)
        own, others = np.nonzero(paths.pairs[path[0]].reshape(between.shape[1:]))
        first = _lit_evenly(views.moving[0, own], views.still[0])
        second = _lit_evenly(pictures[others], picture[0])
        products, energies = (first * second).sum(axis=1), (first * first).sum(axis=1)
        energies = np.sqrt(energies * (second * second).sum(axis=1))
        lengths = [float(np.sqrt((part * part).mean())) for part in (first, second)]
        size = first.size * lengths[0] * lengths[1]
        lively = energies >= np.median(energies)
        each = products[lively] / np.maximum(energies[lively], LEAST_ENERGY)
        return found._replace(
            moving=float(products.sum()) / max(size, LEAST_ENERGY),
            levels=min(lengths),
            pictures=float(np.quantile(each, 0.2)),
        )


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


def _highest(first: Floats, second: Floats, between: Floats, paths: Paths) -> tuple[Floats, Ints]:
    """(V,) the highest correlation over all paths, and (V,) which path it is.

    Of pictures without the mean of those that are shown together.

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
    found = together / np.sqrt(np.maximum(own * others, LEAST_ENERGY**2))
    return found.max(axis=1), found.argmax(axis=1)


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
    """(32, 32) weights of cells in each of 32 equal parts of [start, start + size], in shares of the side."""
    edges = (start + size * np.arange(SKETCH_SIDE + 1) / SKETCH_SIDE) * SKETCH_SIDE
    cells = np.arange(SKETCH_SIDE)
    low = np.maximum(edges[:-1, None], cells)
    high = np.minimum(edges[1:, None], cells + 1)
    overlap = np.maximum(high - low, 0.0)
    # What is cut between the cells is blurred by that; all views are blurred as much again, so that they compare.
    beside = np.clip(cells[:, None] + np.array([-1, 0, 1]), 0, SKETCH_SIDE - 1)
    blur = sum(w * np.eye(SKETCH_SIDE)[beside[:, i]] for i, w in enumerate((0.25, 0.5, 0.25)))
    weights: Floats = (blur @ (overlap / overlap.sum(axis=1, keepdims=True))).astype(np.float32)
    return weights


def _cut(pictures: Floats, box: Box) -> Floats:
    """(n, 32, 32) -> the same of a box, blurred."""
    found: Floats = (_resampling(box.top, box.size) @ pictures @ _resampling(box.left, box.size).T).astype(
        np.float32, copy=False
    )
    return found


def _near(box: Box, step: float) -> tuple[Box, ...]:
    """Boxes around one, up to a step larger, smaller or beside it."""
    found: dict[Box, None] = {}
    moves = (-step, -step / 2, 0.0, step / 2, step)
    for size in (box.size - step, box.size, min(1.0, box.size + step)):
        for down in moves:
            for across in moves:
                rest = 1 - size
                top, left = (min(rest, max(0.0, at)) for at in (box.top + down, box.left + across))
                found[Box(round(top, 4), round(left, 4), round(size, 4))] = None
    return tuple(found)


def _lit_evenly(moving: Floats, still: Floats) -> Floats:
    """(n, 1024) what moves in some pictures without their mean, and without what is even or like the mean picture."""
    rows = moving - moving.mean(axis=0)
    rows = rows - rows.mean(axis=1, keepdims=True)
    (unit,) = _unit(still[None])
    found: Floats = rows - np.outer(rows @ unit, unit)
    return found


def _mirrored(rows: Floats) -> Floats:
    return rows.reshape(-1, SKETCH_SIDE, SKETCH_SIDE)[:, :, ::-1].reshape(len(rows), -1)


def _unit(rows: Floats) -> Floats:
    """Rows of mean 0 and length 1; zeros where all is even."""
    rows = rows - rows.mean(axis=1, keepdims=True)
    found: Floats = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
    return found


class Sketches:
    """Prepared sketches by row; the last few are held.

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
