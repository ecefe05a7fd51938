"""Clips of known content, encoded as stored clips are."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from cliplift.configs.sharding import TranscodeConfig
from cliplift.sharding.video.encode import encode

Pictures = list[NDArray[np.uint8]]


@pytest.fixture(scope="session")
def stored_clip() -> Callable[[Pictures], bytes]:
    """A stored clip of luma pictures (H, W), without colour."""

    def stored(pictures: Pictures) -> bytes:
        frames = []
        for number, luma in enumerate(pictures):
            H, W = luma.shape
            planes = np.full((H * 3 // 2, W), 128, dtype=np.uint8)
            planes[:H] = luma
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            frames.append(frame)
        return encode(frames, fps=Fraction(25), config=TranscodeConfig())

    return stored


@pytest.fixture(scope="session")
def textured() -> NDArray[np.float64]:
    """(96, 400) a smooth random picture of levels 40 to 200."""
    draw = np.random.default_rng(3).normal(size=(96, 400))
    kernel = np.exp(-0.5 * (np.arange(-12, 13) / 4.0) ** 2)
    for axis in (0, 1):
        draw = np.apply_along_axis(np.convolve, axis, draw, kernel, mode="same")
    low, high = draw.min(), draw.max()
    scaled: NDArray[np.float64] = 40 + 160 * (draw - low) / (high - low)
    return scaled
