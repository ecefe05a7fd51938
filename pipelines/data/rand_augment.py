"""RandAugment (arXiv 1909.13719) for clips: a few random operations, each with the same parameters in all frames.

Operations and strengths are those of timm's ``rand-m*-mstd*-inc1`` (increasing with the magnitude), the recipe of
VideoMAE and Hiera. They work on uint8 on any device and compute what PIL does; statistics (histogram, mean) are those
of the whole clip, so that a clip does not flicker. Geometric operations interpolate bilinearly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cliplift.configs.data import AugmentConfig

FILL = (124, 116, 104)  # ImageNet's mean colour, where a geometric operation looks outside the picture


class Operation(NamedTuple):
    """An operation with its argument: degrees, share of the side, factor, bits or level."""

    name: str
    argument: float


def rand_augmented(clips: Tensor, seeds: Sequence[int], config: AugmentConfig) -> Tensor:
    """Apply RandAugment to each clip.

    Args:
        clips: uint8 (B, T, H, W, 3).
        seeds: one per clip; the operations are a function of it.
        config: number of operations, magnitude and its spread, and share of operations carried out.
    """
    done = []
    for clip, seed in zip(clips, seeds, strict=True):
        changed = clip
        for operation in drawn_operations(seed, config):
            changed = OPERATIONS[operation.name](changed, operation.argument)
        done.append(changed)
    return torch.stack(done)


def drawn_operations(seed: int, config: AugmentConfig) -> list[Operation]:
    """The operations of one clip, drawn with replacement."""
    rng = np.random.default_rng(seed)
    chosen = []
    for _ in range(config.rand_augment_ops):
        name = NAMES[int(rng.integers(len(NAMES)))]
        carried_out = rng.random() < config.rand_augment_probability
        magnitude = rng.normal(config.rand_augment_magnitude, config.rand_augment_magnitude_std)
        sign = 1.0 if rng.random() < 0.5 else -1.0
        if carried_out:
            chosen.append(Operation(name, argument_of(name, min(max(magnitude, 0.0), 10.0) / 10, sign)))
    return chosen


def argument_of(name: str, strength: float, sign: float) -> float:
    """The argument of an operation at a strength from 0 to 1 (timm, auto_augment.py, the ``inc1`` table)."""
    arguments = {
        "rotate": sign * 30.0 * strength,
        "posterize": max(1, 4 - int(4 * strength)),  # bits kept; timm goes down to none, a black clip
        "solarize": 256 - int(256 * strength),
        "solarize_add": min(128, int(110 * strength)),
    }
    arguments |= dict.fromkeys(("shear_x", "shear_y"), sign * 0.3 * strength)
    arguments |= dict.fromkeys(("translate_x", "translate_y"), sign * 0.45 * strength)
    arguments |= dict.fromkeys(
        ("color", "contrast", "brightness", "sharpness"), max(0.1, 1.0 + sign * 0.9 * strength)
    )
    return arguments.get(name, 0.0)


def autocontrast(clip: Tensor, _: float = 0.0) -> Tensor:
    """Stretch each channel to the full range."""
    tables = []
    levels = torch.arange(256, dtype=torch.float64, device=clip.device)
    for channel in range(3):
        values = clip[..., channel]
        low, high = values.min().double(), values.max().double()
        stretched = ((levels - low) * 255.0 / (high - low).clamp_min(1.0)).clamp(0, 255)
        tables.append(torch.where(high > low, stretched, levels))
    return _looked_up(clip, tables)


def equalize(clip: Tensor, _: float = 0.0) -> Tensor:
    """Spread the levels of each channel so that their histogram is flat."""
    tables = []
    levels = torch.arange(256, device=clip.device)
    for channel in range(3):
        values = clip[..., channel].flatten()
        # Not bincount or a mask, whose sizes depend on the values: they would wait for the device.
        histogram = torch.zeros_like(levels).scatter_add_(0, values.long(), torch.ones_like(values).long())
        brightest = (levels * (histogram > 0)).amax()
        step = (histogram.sum() - histogram.gather(0, brightest[None])[0]) // 255
        before = torch.cumsum(histogram, 0) - histogram
        spread = ((before + step // 2) // step.clamp_min(1)).clamp(max=255)
        tables.append(torch.where(step > 0, spread, levels))
    return _looked_up(clip, tables)


def _looked_up(clip: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """Each channel's levels replaced by those of its table (256,)."""
    table = torch.stack(list(tables)).to(device=clip.device, dtype=torch.uint8)
    return torch.stack([table[channel][clip[..., channel].int()] for channel in range(3)], dim=-1)


def invert(clip: Tensor, _: float = 0.0) -> Tensor:
    return 255 - clip


def posterize(clip: Tensor, bits: float) -> Tensor:
    kept: Tensor = clip & (256 - 2 ** (8 - int(bits)))
    return kept


def solarize(clip: Tensor, threshold: float) -> Tensor:
    """Invert the levels from a threshold on."""
    return torch.where(clip.int() < int(threshold), clip, 255 - clip)


def solarize_add(clip: Tensor, amount: float) -> Tensor:
    """Brighten the darker half of the levels."""
    return torch.where(clip < 128, (clip.int() + int(amount)).clamp(max=255).to(torch.uint8), clip)


def color(clip: Tensor, factor: float) -> Tensor:
    return _blended(_gray(clip), clip, factor)


def contrast(clip: Tensor, factor: float) -> Tensor:
    mean = torch.floor(_gray(clip).double().mean() + 0.5)
    return _blended(mean, clip, factor)


def brightness(clip: Tensor, factor: float) -> Tensor:
    return _blended(torch.zeros((), device=clip.device), clip, factor)


def sharpness(clip: Tensor, factor: float) -> Tensor:
    """Away from a smoothed clip (or towards it): 3x3, the centre weighs 5 of 13; borders stay."""
    smooth = clip.clone()
    if min(clip.shape[1:3]) > 2:
        x = clip.int()
        rows = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
        total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * x[:, 1:-1, 1:-1]
        smooth[:, 1:-1, 1:-1] = ((2 * total + 13) // 26).to(torch.uint8)
    return _blended(smooth, clip, factor)


def _gray(clip: Tensor) -> Tensor:
    """(T, H, W, 3) -> (T, H, W, 1): ITU-R BT.601 in 16-bit fixed point."""
    x = clip.int()
    return ((19595 * x[..., :1] + 38470 * x[..., 1:2] + 7471 * x[..., 2:] + 0x8000) >> 16).to(torch.uint8)


def _blended(from_: Tensor, to: Tensor, factor: float) -> Tensor:
    """``from_`` at factor 0, ``to`` at 1, beyond it above; cut to whole levels."""
    start = from_.float()
    return (start + factor * (to.float() - start)).clamp(0, 255).to(torch.uint8)


def rotate(clip: Tensor, degrees: float) -> Tensor:
    """Counter-clockwise about the centre."""
    H, W = clip.shape[1:3]
    angle = -math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = W / 2, H / 2
    return _warped(clip, (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y))


def shear_x(clip: Tensor, amount: float) -> Tensor:
    return _warped(clip, (1.0, amount, 0.0, 0.0, 1.0, 0.0))


def shear_y(clip: Tensor, amount: float) -> Tensor:
    return _warped(clip, (1.0, 0.0, 0.0, amount, 1.0, 0.0))


def translate_x(clip: Tensor, share: float) -> Tensor:
    return _warped(clip, (1.0, 0.0, share * clip.shape[2], 0.0, 1.0, 0.0))


def translate_y(clip: Tensor, share: float) -> Tensor:
    return _warped(clip, (1.0, 0.0, 0.0, 0.0, 1.0, share * clip.shape[1]))


def _warped(clip: Tensor, matrix: tuple[float, float, float, float, float, float]) -> Tensor:
    """Output (x, y) shows input (a x + b y + c, d x + e y + f), in pixels from the corner, bilinearly."""
    T, H, W, _ = clip.shape
    a, b, c, d, e, f = matrix
    rows = torch.arange(H, dtype=torch.float64, device=clip.device)[:, None] + 0.5
    columns = torch.arange(W, dtype=torch.float64, device=clip.device)[None] + 0.5
    x, y = a * columns + b * rows + c, d * columns + e * rows + f
    outside = (x < 0) | (x >= W) | (y < 0) | (y >= H)
    left, top = torch.floor(x - 0.5), torch.floor(y - 0.5)
    dx, dy = (x - 0.5 - left)[..., None], (y - 0.5 - top)[..., None]
    pixels = clip.reshape(T, H * W, 3)

    def at(row: Tensor, column: Tensor) -> Tensor:
        place = row.clamp(0, H - 1).long() * W + column.clamp(0, W - 1).long()
        return pixels[:, place.flatten()].reshape(T, H, W, 3).double()

    upper = torch.lerp(at(top, left), at(top, left + 1), dx)
    lower = torch.lerp(at(top + 1, left), at(top + 1, left + 1), dx)
    found = torch.lerp(upper, lower, dy).clamp(0, 255).to(torch.uint8)
    return torch.where(outside[..., None], _fill(clip.device), found)


@cache
def _fill(device: torch.device) -> Tensor:
    """FILL on a device; copied there once."""
    return torch.tensor(FILL, dtype=torch.uint8, device=device)


OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "autocontrast": autocontrast,
    "equalize": equalize,
    "invert": invert,
    "rotate": rotate,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "color": color,
    "contrast": contrast,
    "brightness": brightness,
    "sharpness": sharpness,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
}
NAMES = tuple(OPERATIONS)
