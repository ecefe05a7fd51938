"""Decoding stored clips: every backend gives the same pixels at every width."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from cliplift.configs.sharding import TranscodeConfig
from cliplift.sharding.video.decode import VideoDecodeError, decode_frames
from cliplift.sharding.video.transcode import encode_array


def clip(width: int) -> bytes:
    frames = np.random.default_rng(width).integers(0, 256, (9, 64, width, 3), dtype=np.uint8)
    return encode_array(frames, fps=Fraction(15), config=TranscodeConfig())


@pytest.mark.parametrize("width", [16, 24, 34, 48, 64, 72, 80, 86, 114])
def test_decord_and_pyav_agree_at_every_width(width: int) -> None:
    """decord 0.6 fails on frames of 16, 24, 48 and 72 pixels: its copy expects rows without padding."""
    data = clip(width)
    ours = decode_frames(data, [7, 0, 3, 3], decoder="decord")
    assert ours.shape == (4, 64, width, 3)
    assert np.array_equal(ours, decode_frames(data, [7, 0, 3, 3], decoder="pyav"))


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_frames_that_do_not_exist_are_an_error(decoder: str) -> None:
    for numbers in ([9], [-1], []):
        with pytest.raises(VideoDecodeError):
            decode_frames(clip(64), numbers, decoder=decoder)  # type: ignore[arg-type]
