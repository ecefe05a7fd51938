"""What the demo's clips show: shapes, backgrounds and colours; no two splits share any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

SPRITE_PIXELS = 96


@dataclass(frozen=True)
class Look:
    """Shapes, backgrounds and colours of one split; no two splits share any of them."""

    seed: int
    shapes: tuple[str, ...]
    backgrounds: tuple[str, ...]
    hues: tuple[tuple[float, float], ...]


LOOKS: Mapping[str, Look] = {
    "train": Look(1, ("triangle", "square", "hexagon", "star5", "gear"), ("clouds", "stripes", "checks"),
                  ((0.00, 0.08), (0.22, 0.30), (0.44, 0.52), (0.66, 0.74), (0.85, 0.92))),
    "val": Look(2, ("pentagon", "star6"), ("rings", "clouds_fine"), ((0.10, 0.14), (0.54, 0.58), (0.76, 0.79))),
    "test": Look(3, ("cross", "drop", "star4"), ("waves", "cells"),
                 ((0.16, 0.20), (0.32, 0.42), (0.60, 0.64), (0.94, 0.98))),
    "unlabelled": Look(4, ("triangle", "square", "hexagon", "star5", "gear"), ("clouds", "stripes", "checks"),
                       ((0.00, 0.08), (0.22, 0.30), (0.44, 0.52), (0.66, 0.74), (0.85, 0.92))),
}  # fmt: skip


def textured_shape(rng: np.random.Generator, look: Look) -> Array:
    """A textured shape, RGBA in [0, 1], (S, S, 4). Its texture has a direction, so that its turn can be seen."""
    axis = np.linspace(-1, 1, SPRITE_PIXELS, dtype=np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    distance, angle = np.hypot(x, y), np.arctan2(y, x)
    edge = outline(look.shapes[rng.integers(len(look.shapes))], angle)
    alpha = np.clip((edge - distance) * 14, 0, 1)
    first, second = colour(rng, look), colour(rng, look)
    wave = 0.5 + 0.5 * np.sin(
        rng.uniform(4, 9) * (x * np.cos(a := rng.uniform(0, 2 * np.pi)) + y * np.sin(a)) + rng.uniform(0, 6)
    )
    side = (x > rng.uniform(-0.2, 0.2)).astype(np.float32)
    mix = np.clip(0.65 * side + 0.35 * wave, 0, 1)[..., None]
    colours = first * mix + second * (1 - mix)
    rim = np.clip((distance - edge + 0.16) * 8, 0, 1)[..., None]
    return np.concatenate([colours * (1 - 0.6 * rim), alpha[..., None]], axis=-1).astype(np.float32)


def outline(shape: str, angle: Array) -> Array:
    """Radius of a shape's edge at each angle, at most 1."""
    corners = {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6}
    if shape in corners:
        half = np.pi / corners[shape]
        return np.asarray(np.cos(half) / np.cos((angle % (2 * half)) - half), np.float32)
    if shape.startswith("star"):
        points = int(shape[4:])
        return np.asarray(0.42 + 0.58 * np.abs((angle * points / np.pi) % 2 - 1) ** 1.3, np.float32)
    if shape == "gear":
        return np.asarray(0.85 + 0.15 * np.sign(np.sin(8 * angle)), np.float32)
    if shape == "cross":
        quarter = (angle + np.pi / 4) % (np.pi / 2) - np.pi / 4
        return np.asarray(np.where(np.abs(np.tan(quarter)) < 0.38, 0.93 / np.cos(quarter), 0.5), np.float32)
    assert shape == "drop", shape
    return np.asarray(0.55 + 0.45 * np.maximum(0, np.cos(angle)) ** 6, np.float32)


def colour(rng: np.random.Generator, look: Look) -> Array:
    low, high = look.hues[rng.integers(len(look.hues))]
    return _rgb(rng.uniform(low, high), rng.uniform(0.35, 0.95), rng.uniform(0.35, 1.0))


def _rgb(hue: float, saturation: float, value: float) -> Array:
    channel = (np.array([5, 3, 1]) + hue * 6) % 6
    return np.asarray(value * (1 - saturation * np.clip(np.minimum(channel, 4 - channel), 0, 1)), np.float32)


def background(rng: np.random.Generator, look: Look, side: int) -> Array:
    """A texture that closes at its edges, RGB in [0, 1], (H, W, 3)."""
    family = look.backgrounds[rng.integers(len(look.backgrounds))]
    axis = np.arange(side, dtype=np.float32) / side
    y, x = np.meshgrid(axis, axis, indexing="ij")
    phase = rng.uniform(0, 2 * np.pi, 4)
    a, b = rng.integers(1, 5, 2)
    wobble = 0.25 * np.sin(2 * np.pi * x + phase[0]) + 0.25 * np.cos(2 * np.pi * y + phase[1])
    field: Array
    if family.startswith("clouds"):
        field = _clouds(rng, side, finest=3 if family == "clouds" else 5)
    elif family == "stripes":
        field = np.sin(2 * np.pi * (a * x + b * y) + phase[2] + 2 * wobble)
    elif family == "checks":
        field = np.sign(
            np.sin(2 * np.pi * (a + 1) * x + phase[2]) * np.sin(2 * np.pi * (b + 1) * y + phase[3])
        )
    elif family == "rings":
        field = np.sin(8 * np.hypot(np.sin(np.pi * (x - 0.5)), np.sin(np.pi * (y - 0.5))) * a + phase[2])
    elif family == "waves":
        field = np.sin(2 * np.pi * a * x + phase[2] + 3 * np.sin(2 * np.pi * b * y + phase[3]))
    else:
        assert family == "cells", family
        field = _cells(rng, x, y)
    mix = np.asarray(0.5 + 0.5 * field / np.abs(field).max(), np.float32)[..., None]
    grain = 0.06 * _clouds(rng, side, finest=6)[..., None]
    return np.asarray(
        np.clip(0.8 * (colour(rng, look) * mix + colour(rng, look) * (1 - mix)) + grain, 0, 1), np.float32
    )


def _clouds(rng: np.random.Generator, side: int, *, finest: int) -> Array:
    """Smooth noise in about [-1, 1] that closes at its edges: white noise filtered on the torus."""
    white = np.fft.rfft2(rng.standard_normal((side, side)))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :]) * side
    noise = np.fft.irfft2(white * np.exp(-((frequency / (2.0 * finest)) ** 2)), s=(side, side))
    return np.asarray(noise / (np.abs(noise).max() + 1e-9), np.float32)


def _cells(rng: np.random.Generator, x: NDArray[np.float64], y: NDArray[np.float64]) -> Array:
    points = rng.random((12, 2))
    apart = np.stack([np.hypot((x - px + 0.5) % 1 - 0.5, (y - py + 0.5) % 1 - 0.5) for px, py in points])
    return np.asarray(apart.min(axis=0) * 6 - 1, np.float32)
