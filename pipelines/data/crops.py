"""Where a frame is cut, and cutting it: boxes in the stored picture, resized to the network's square, in uint8."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cliplift.configs.data import AugmentConfig, DataConfig
from cliplift.models.streams import FLOW_CHANNELS
from cliplift.sharding.video.decode import Frames


@dataclass(frozen=True)
class Box:
    """A rectangle of the stored picture, pixels; ``flip`` mirrors what is cut (ten-crop testing)."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


def training_box(
    augment: AugmentConfig, data: DataConfig, *, height: int, width: int, rng: np.random.Generator
) -> Box:
    """The box of one training clip; the same for all its frames."""
    if augment.crop == "random_resized":
        return _random_resized(augment, height=height, width=width, rng=rng)
    if augment.crop == "multi_scale_corner":
        side = max(
            1,
            round(min(height, width) * augment.corner_scales[int(rng.integers(len(augment.corner_scales)))]),
        )
        return _five(height, width, side)[int(rng.integers(5))]
    side = _crop_side(data, height, width)
    if augment.crop == "random":
        if augment.short_side_pixels is not None:
            low, high = augment.short_side_pixels
            side = _crop_side(data, height, width, resized=int(rng.integers(low, high + 1)))
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        return Box(top, left, side, side)
    return _five(height, width, side)[-1]


def _random_resized(augment: AugmentConfig, *, height: int, width: int, rng: np.random.Generator) -> Box:
    """A box of random area and aspect ratio (Inception's), the largest centred one after ten misses."""
    low, high = (math.log(r) for r in augment.ratio)
    for _ in range(10):
        area = height * width * rng.uniform(*augment.scale)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
    side = min(height, width)
    return Box((height - side) // 2, (width - side) // 2, side, side)


def view_boxes(data: DataConfig, *, height: int, width: int, crops: int) -> list[Box]:
    """Test crops: centre; three along the long side; four corners and centre; those five and their mirrors."""
    side = _crop_side(data, height, width)
    five = _five(height, width, side)
    if crops == 1:
        return [five[-1]]
    if crops == 3:
        if width >= height:
            top = (height - side) // 2
            return [Box(top, left, side, side) for left in (0, (width - side) // 2, width - side)]
        left = (width - side) // 2
        return [Box(top, left, side, side) for top in (0, (height - side) // 2, height - side)]
    if crops == 5:
        return five
    return five + [Box(b.top, b.left, b.height, b.width, flip=True) for b in five]


def _crop_side(data: DataConfig, height: int, width: int, *, resized: int | None = None) -> int:
    """Side of the crop before resizing: the crop's share of the resized short side, of the stored short side."""
    resized = resized or data.resize_short_side_pixels or round(data.crop_pixels * 8 / 7)
    short = min(height, width)
    return max(1, min(short, round(short * data.crop_pixels / resized)))


def _five(height: int, width: int, side: int) -> list[Box]:
    """Four corners, then the centre."""
    bottom, right = height - side, width - side
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
    return [Box(top, left, side, side) for top, left in corners]


def cut(frames: Frames, box: Box, *, pixels: int) -> Tensor:
    """(T, H, W, C) -> the box resized to (T, pixels, pixels, C), uint8, bilinear with antialiasing.

    Flow (C = 2) keeps its values: they are pixels of the stored clip, as published flow is when frames are resized.
    """
    part = frames[:, box.top : box.top + box.height, box.left : box.left + box.width]
    tensor = torch.from_numpy(np.ascontiguousarray(part))
    if (box.height, box.width) != (pixels, pixels):
        planes = F.interpolate(
            tensor.permute(0, 3, 1, 2),
            size=(pixels, pixels),
            mode="bilinear",
            antialias=True,
            align_corners=False,
        )
        tensor = planes.permute(0, 2, 3, 1)
    if box.flip:
        tensor = tensor.flip(2)
        if tensor.shape[-1] == FLOW_CHANNELS:  # what moved to the right moves to the left
            tensor[..., 0] = 255 - tensor[..., 0]
    return tensor.contiguous()
