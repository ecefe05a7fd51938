"""The kinds of objects in the demo's clips: what a network that knows pictures tells apart.

Within a kind, variants differ in shape and pattern: the number of petals, the stripes of a fish. Train, validation and
test share no variant, no background and no colour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cliplift.sharding.demo.shapes import LOOKS, SPRITE_PIXELS, Array, colour

# Numbers of the variants of each kind that a split shows.
VARIANTS: Mapping[str, tuple[int, ...]] = {
    "train": (0, 3, 6),
    "val": (1, 4),
    "test": (2, 5),
    "unlabelled": (0, 3, 6, 7),
}
Colours = tuple[Array, Array]
Real = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class _Canvas:
    """Coordinates of a sprite's pixels, (S, S), in [-1, 1]; ``distance`` and ``angle`` are polar."""

    x: Array
    y: Array
    distance: Array
    angle: Array


def object_sprite(rng: np.random.Generator, kind: str, split: str) -> Array:
    """An object of a kind, RGBA in [0, 1], (S, S, 4).

    Args:
        rng: draws the variant, the colours and the proportions.
        kind: one of :data:`KINDS`.
        split: whose variants and colours are used.
    """
    look = LOOKS[split]
    variant = VARIANTS[split][rng.integers(len(VARIANTS[split]))]
    axis = np.linspace(-1, 1, SPRITE_PIXELS, dtype=np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    canvas = _Canvas(x, y, np.hypot(x, y), np.arctan2(y, x))
    colours = (colour(rng, look), colour(rng, look))
    picture, inside = KINDS[kind](rng, canvas, colours, variant)
    alpha = np.clip(inside * 16, 0, 1)
    return np.concatenate([np.clip(picture, 0, 1), alpha[..., None]], axis=-1).astype(np.float32)


def _mix(first: Real, second: Real, share: Real) -> Array:
    """First where ``share`` (S, S) is 0, second where it is 1; (S, S, 3)."""
    share = np.clip(share, 0, 1)[..., None]
    return np.asarray(first * (1 - share) + second * share, np.float32)


def _ball(rng: np.random.Generator, at: _Canvas, colours: Colours, variant: int) -> tuple[Real, Real]:
    """A sphere lit from one side, with stripes or patches."""
    depth = np.sqrt(np.clip(0.9 - at.distance**2, 0, 1))
    axis = rng.standard_normal(3)
    axis /= np.linalg.norm(axis)
    along = axis[0] * at.x + axis[1] * at.y + axis[2] * depth
    bands = np.sin((3 + variant) * along + rng.uniform(0, 6))
    other = np.sin((3 + variant) * (axis[1] * at.x - axis[0] * at.y + 0.4 * depth) + rng.uniform(0, 6))
    pattern = bands * other if variant % 2 else bands
    light = np.clip(0.35 + 0.75 * (-0.45 * at.x - 0.55 * at.y + 0.7 * depth), 0.12, 1.15)
    shine = np.exp(-(((at.x + 0.34) ** 2 + (at.y + 0.4) ** 2) / 0.03))
    picture = _mix(colours[0], colours[1], pattern * 6 + 0.5) * light[..., None] + 0.75 * shine[..., None]
    return picture, 0.93 - at.distance


def _flower(rng: np.random.Generator, at: _Canvas, colours: Colours, variant: int) -> tuple[Real, Real]:
    """Petals around a centre of another colour."""
    petals = 5 + variant
    wave = np.abs(np.cos(at.angle * petals / 2 + rng.uniform(0, 6)))
    edge = 0.42 + 0.53 * wave ** rng.uniform(0.5, 0.9)
    heart = rng.uniform(0.2, 0.3)
    share = at.distance / edge
    petal = _mix(0.45 * colours[0], np.clip(1.25 * colours[0], 0, 1), share) * (0.45 + 0.55 * wave)[..., None]
    seeds = 0.75 + 0.25 * np.sin(40 * at.x) * np.sin(40 * at.y)
    picture = _mix(petal, colours[1] * seeds[..., None], (heart - at.distance) * 20)
    return picture, edge - at.distance


def _leaf(rng: np.random.Generator, at: _Canvas, colours: Colours, variant: int) -> tuple[Real, Real]:
    """A pointed blade with a middle rib and side veins."""
    width = 0.42 + 0.05 * (variant % 3)
    half = width * np.clip(1 - (np.abs(at.x) / 0.97) ** 1.6, 0, 1)
    teeth = 0.03 * np.sin((14 + 4 * variant) * at.x)
    rib = np.exp(-((at.y / 0.035) ** 2))
    slant = at.x - rng.uniform(0.7, 1.1) * np.abs(at.y)
    veins = np.clip(1.3 * np.cos((16 + 2 * variant) * slant) - 0.6, 0, 1)
    blade = colours[0] * (0.65 + 0.35 * (at.y > 0) + 0.12 * np.cos(9 * slant))[..., None]
    picture = _mix(blade, np.clip(colours[0] * 0.3 + 0.65, 0, 1), np.maximum(rib, 0.7 * veins))
    return picture, half + teeth - np.abs(at.y)


def _fish(rng: np.random.Generator, at: _Canvas, colours: Colours, variant: int) -> tuple[Real, Real]:
    """A body with scales, an eye, a tail and fins."""
    body = 1 - np.hypot((at.x + 0.18) / 0.72, at.y / (0.4 + 0.04 * (variant % 3)))
    tail = np.minimum(np.minimum(at.x - 0.38, 0.92 - at.x), (at.x - 0.3) * 0.95 - np.abs(at.y))
    fin = np.minimum(0.62 - np.abs(at.y), 0.3 - np.abs(at.x + 0.15) - 0.2 * np.abs(at.y))
    scales = np.cos((18 + variant) * at.x) * np.cos((18 + variant) * at.y)
    stripes = np.sin((5 + 2 * variant) * at.x + rng.uniform(0, 6)) if variant % 2 else 0 * at.x - 1
    back = np.clip(0.8 - 0.7 * at.y, 0.3, 1.3)
    skin = _mix(colours[0], colours[1], stripes * 5) * ((0.82 + 0.18 * scales) * back)[..., None]
    picture = np.where(
        (body > 0)[..., None], skin, 0.7 * colours[1] * (0.8 + 0.2 * np.sin(40 * at.angle))[..., None]
    )
    eye = np.hypot(at.x + 0.6, at.y + 0.1)
    picture = _mix(picture, np.ones(3, np.float32), (0.11 - eye) * 30)
    picture = _mix(picture, np.zeros(3, np.float32), (0.06 - eye) * 30)
    return picture, np.maximum(np.maximum(0.5 * body, tail), fin)


# What a kind draws: RGB (S, S, 3), and how far inside its edge each pixel is (S, S), negative outside.
Draw = Callable[[np.random.Generator, _Canvas, Colours, int], tuple[Real, Real]]
KINDS: Mapping[str, Draw] = {"ball": _ball, "fish": _fish, "flower": _flower, "leaf": _leaf}
