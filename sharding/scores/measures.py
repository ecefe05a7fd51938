"""What the pictures of a clip say: one number a score, a function of the stored clip alone.

All of them look at luma, and only motion and shots at how it changes. A score that is computed otherwise one day gets
another version, so that columns of two versions never meet in one table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cliplift.sharding.scores.overlays import overlaid_share
from cliplift.sharding.scores.pictures import Luma, Picture, Run, decode_pictures, summed

BLACK, LEVELS = 16.0, 219.0  # of limited range
COARSE_SIDE = 64  # short side of the pictures that changes are looked for in, about
PATCH = 8  # side of the patches whose motion is estimated, coarse pixels
NOISE_LEVELS = 0.5  # change of a coarse pixel that coding alone makes, root mean square
LEAST_GRADIENT_LEVELS = 1.0  # added to a patch's contrast: where there is none, nothing is known of motion
REGIONS = 4  # regions along the short side for `patch_motion`
DARK_LEVEL = 0.08  # mean of a row or column that is a border, share of white
EVEN_LEVEL = 0.03  # its standard deviation at most
CUT_LEVELS, CUT_RATIO, CUT_WINDOW = 10.0, 3.0, 2

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Seen:
    """What the pictures of a clip gave; scores are made of it.

    Attributes:
        runs: the sampled pictures.
        changes: (T - 1,) mean absolute change from each picture of the clip to the next, 8-bit levels; empty unless a
            score asked for it.
    """

    runs: tuple[Run, ...]
    changes: Sequence[float] = field(default_factory=list)

    @property
    def stills(self) -> list[Picture]:
        """Every other sampled picture: with many groups the key frame of each."""
        return [picture for run in self.runs for picture in run][::2]

    @cached_property
    def displacements(self) -> NDArray[np.float64]:
        """(pairs, patches down, patches across) motion a frame; several scores share it."""
        return _displacements(self.runs)


def motion(seen: Seen) -> float:
    """How far the picture moves from one frame to the next, mean over pictures and patches.

    In shares of height plus width, as the field counts motion vectors; .00098 of it is about half a pixel of 340 x 256.
    """
    return float(np.mean(seen.displacements))


def patch_motion(seen: Seen) -> float:
    """The motion of the region that moves least: near 0 for a moving inset in a still picture."""
    mean = seen.displacements.mean(axis=0)
    side = max(1, min(mean.shape) // REGIONS)
    return float(min(region.mean() for region in _tiles(mean, side)))


def brightness(seen: Seen) -> float:
    """Mean luma; 0 is black and 1 is white."""
    return float(np.mean([_share(float(p.luma.mean(dtype=np.float64)), p) for p in seen.stills]))


def sharpness(seen: Seen) -> float:
    """Variance of the Laplacian of the luma in 8-bit levels (Pech-Pacheco et al., ICPR 2000), median over pictures."""
    return float(np.median([_laplacian_variance(picture.luma) for picture in seen.stills]))


def borders(seen: Seen) -> float:
    """Share of the picture that rows and columns along its edges take which stay dark and even; 1 where all is dark."""
    rows = _band(seen.stills, axis=1)
    if rows.stop == rows.start:
        return 1.0
    columns = _band(seen.stills, axis=0, rows=rows)
    height, width = seen.stills[0].luma.shape
    inside = int((rows.stop - rows.start) * (columns.stop - columns.start))
    return 1.0 - inside / int(height * width)


def text(seen: Seen) -> float:
    """Share of the picture that letters, and graphics of strokes as thin, cover which stay in place."""
    return overlaid_share(seen.runs)


def shots(seen: Seen) -> float:
    """Shots: one more than the cuts. A cut changes the whole picture, and far more than its neighbours do."""
    changes = np.asarray(seen.changes)
    cuts = 0
    for place in np.flatnonzero(changes >= CUT_LEVELS).tolist():
        near = [*changes[max(0, place - CUT_WINDOW) : place], *changes[place + 1 : place + 1 + CUT_WINDOW]]
        cuts += bool(near) and bool(changes[place] >= CUT_RATIO * np.mean(near))
    return 1.0 + cuts


@dataclass(frozen=True)
class Score:
    """A score: how it is made, which version of it this is, and whether it needs every picture of the clip."""

    measure: Callable[[Seen], float]
    version: int = 1
    every_picture: bool = False

    @property
    def meaning(self) -> str:
        """One line."""
        return (self.measure.__doc__ or "").strip().splitlines()[0]


SCORES: Mapping[str, Score] = {
    "motion": Score(motion),
    "patch_motion": Score(patch_motion),
    "brightness": Score(brightness),
    "sharpness": Score(sharpness),
    "borders": Score(borders),
    "text": Score(text),
    "shots": Score(shots, every_picture=True),
}


def score_clip(data: bytes, names: Sequence[str]) -> dict[str, float]:
    """Scores of a stored clip from one decode.

    Args:
        data: bytes of the mp4.
        names: of :data:`SCORES`.

    Raises:
        VideoDecodeError: the clip cannot be decoded.
    """
    changes = _Changes()
    every = changes.add if any(SCORES[name].every_picture for name in names) else None
    seen = Seen(decode_pictures(data, every=every), changes.found)
    return {name: SCORES[name].measure(seen) for name in names}


class _Changes:
    """The change from each picture to the next, while they are decoded."""

    def __init__(self) -> None:
        self.found: list[float] = []
        self._before: Floats | None = None

    def add(self, picture: Picture) -> None:
        coarse = _coarse(picture)
        if self._before is not None and self._before.shape == coarse.shape:
            self.found.append(float(np.abs(coarse - self._before).mean(dtype=np.float64)))
        self._before = coarse


def _displacements(runs: Sequence[Run]) -> NDArray[np.float64]:
    """(pairs, patches down, patches across) motion a frame between neighbouring pictures of a run.

    Of each patch the change is divided by the contrast (Lucas and Kanade, IJCAI 1981, without the direction): what
    moves by d pixels across a gradient g changes by d * g. The change that coding alone makes is taken off.
    """
    found = []
    for run in runs:
        coarse = [_coarse(picture) for picture in run]
        for k in range(len(run) - 1):
            first, second = coarse[k], coarse[k + 1]
            factor = run[k].luma.shape[0] / first.shape[0]
            moved = _patch_motion(first, second) * factor / (run[k + 1].number - run[k].number)
            found.append(moved / sum(run[k].luma.shape))
    if not found:  # one picture does not move
        return np.zeros((1, 1, 1))
    return np.stack(found)


def _patch_motion(first: Floats, second: Floats) -> NDArray[np.float64]:
    """Displacement of every patch between two coarse pictures, coarse pixels."""
    down, across = (np.asarray(part, dtype=np.float32) for part in np.gradient((first + second) / 2))
    contrast = _patches(down * down + across * across) / 2  # of a direction that is not known
    delta: Floats = second - first
    delta -= np.float32(delta.mean(dtype=np.float64))  # the whole picture growing brighter is no motion
    change = _patches(np.square(delta)) - NOISE_LEVELS**2
    moved: NDArray[np.float64] = np.sqrt(np.maximum(change, 0) / (contrast + LEAST_GRADIENT_LEVELS**2))
    return moved


def _patches(values: Floats) -> NDArray[np.float64]:
    """Mean over patches; what is left at the edges belongs to none."""
    side = min(PATCH, *values.shape)
    rows, columns = values.shape[0] // side, values.shape[1] // side
    cut = values[: rows * side, : columns * side].astype(np.float64)
    means: NDArray[np.float64] = cut.reshape(rows, side, columns, side).mean(axis=(1, 3))
    return means


def _tiles(values: NDArray[np.float64], side: int) -> list[NDArray[np.float64]]:
    """Square regions of ``side``; the last of a row or column takes what is left."""
    rows, columns = (max(1, length // side) for length in values.shape)
    return [part for band in np.array_split(values, rows) for part in np.array_split(band, columns, axis=1)]


def _coarse(picture: Picture) -> Floats:
    """The picture averaged to a short side of about 64 pixels, in levels of limited range; noise averages out."""
    factor = max(1, min(picture.luma.shape) // COARSE_SIDE)
    scale = (LEVELS / 255 if picture.full_range else 1.0) / factor**2
    coarse: Floats = summed(picture.luma, factor).astype(np.float32) * np.float32(scale)
    return coarse


def _share(level: float, picture: Picture) -> float:
    """A level as a share of white."""
    return level / 255 if picture.full_range else (level - BLACK) / LEVELS


def _laplacian_variance(luma: Luma) -> float:
    if min(luma.shape) < 3:
        return 0.0
    levels = luma.astype(np.int16)
    inner = levels[1:-1, 1:-1]
    laplacian = levels[:-2, 1:-1] + levels[2:, 1:-1] + levels[1:-1, :-2] + levels[1:-1, 2:] - 4 * inner
    # In whole numbers, so that the result is the same whatever order they are added in.
    count, total = laplacian.size, int(laplacian.sum(dtype=np.int64))
    squares = int(np.square(laplacian, dtype=np.int64).sum())
    return squares / count - (total / count) ** 2


def _band(pictures: Sequence[Picture], *, axis: int, rows: slice = slice(None)) -> slice:
    """The rows (axis 1) or columns (axis 0) between the dark edges; empty where all are dark."""
    lit: NDArray[np.bool_] | None = None
    for picture in pictures:
        luma = picture.luma[rows]
        scale, count = 255.0 if picture.full_range else LEVELS, luma.shape[axis]
        # Sums of whole numbers: exact, and faster than those of fractions.
        total = luma.sum(axis=axis, dtype=np.uint32).astype(np.int64)
        squares = np.square(luma, dtype=np.uint16).sum(axis=axis, dtype=np.uint32).astype(np.int64)
        mean = (total / count - (0 if picture.full_range else BLACK)) / scale
        even = np.sqrt(squares * count - total * total) / count / scale
        found = (mean > DARK_LEVEL) | (even > EVEN_LEVEL)
        lit = found if lit is None else lit | found
    assert lit is not None
    places = np.flatnonzero(lit)
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)
