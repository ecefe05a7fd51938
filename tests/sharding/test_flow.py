"""Optical flow: known motion is found, bytes and pixels convert, and a clip's member decodes to the same motion."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import TranscodeConfig
from cliplift.sharding import flow as flow_module
from cliplift.sharding.flow import (
    FlowOptions,
    decode_flow,
    flow_fields,
    flow_member,
    require_flow,
    to_bytes,
    to_pixels,
)
from cliplift.sharding.transcode import encode_array
from cliplift.sharding.video import VideoDecodeError, probe

CONFIG = TranscodeConfig()


@pytest.fixture
def opencv() -> None:
    pytest.importorskip("cv2", reason="the extra 'flow' (OpenCV) is not installed")


def drifting(
    dx: int, dy: int, *, frames: int = 5, height: int = 48, width: int = 64
) -> npt.NDArray[np.uint8]:
    """(T, H, W): a smooth random texture that moves by whole pixels a frame, so the true flow is (dx, dy)."""
    noise = np.random.default_rng(0).normal(size=(height + 64, width + 64))
    for _ in range(3):  # blurred over 7 x 7 pixels
        noise = sum(np.roll(noise, s, axis=0) for s in range(-3, 4)) / 7
        noise = sum(np.roll(noise, s, axis=1) for s in range(-3, 4)) / 7
    noise = (noise - noise.min()) / (noise.max() - noise.min()) * 255
    rows = [
        noise[32 - t * dy : 32 - t * dy + height, 32 - t * dx : 32 - t * dx + width] for t in range(frames)
    ]
    return np.stack(rows).astype(np.uint8)


@pytest.mark.usefixtures("opencv")
@pytest.mark.parametrize(("dx", "dy"), [(2, 0), (0, -3), (-1, 2)])
def test_known_motion_is_found(dx: int, dy: int) -> None:
    """x to the right and y down. DIS is exact to a fraction of a pixel away from the borders."""
    fields = list(flow_fields(drifting(dx, dy), FlowOptions()))
    assert len(fields) == 5
    for field in fields:
        assert field.shape == (48, 64, 2)
        middle = np.median(field[8:-8, 8:-8], axis=(0, 1))
        np.testing.assert_allclose(middle, (dx, dy), atol=0.1)
    assert np.array_equal(fields[-1], fields[-2]), "the last frame repeats the flow before it"


@pytest.mark.usefixtures("opencv")
def test_what_stands_still_does_not_move() -> None:
    still = np.repeat(drifting(0, 0, frames=1), 3, axis=0)
    assert all(np.abs(field).max() < 0.05 for field in flow_fields(still, FlowOptions()))
    (alone,) = flow_fields(still[:1], FlowOptions())
    assert alone.shape == (48, 64, 2)
    assert not alone.any()
    assert list(flow_fields([], FlowOptions())) == []


def test_bytes_and_pixels() -> None:
    """TSN's rule: -20 to 20 pixels onto 0 to 255, longer motion cut."""
    pixels = np.array([-30.0, -20.0, -10.0, 0.0, 10.0, 20.0, 30.0], np.float32)
    assert to_bytes(pixels, 20.0).tolist() == [0, 0, 64, 128, 191, 255, 255]
    many = np.linspace(-20, 20, 1001, dtype=np.float32)
    half_step = 20 / 127.5 / 2
    assert np.abs(to_pixels(to_bytes(many, 20.0), 20.0) - many).max() <= half_step + 1e-5


@pytest.mark.usefixtures("opencv")
@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_the_member_of_a_clip_holds_its_flow(decoder: str) -> None:
    grey = drifting(3, -2, frames=8)
    clip = encode_array(np.repeat(grey[..., None], 3, axis=3), fps=Fraction(25), config=CONFIG)
    member = flow_member(clip, FlowOptions(), CONFIG)
    facts = probe(member)
    assert (facts.width, facts.height) == (64, 96)
    planes = decode_flow(member, range(8), decoder=decoder)
    assert planes.shape == (8, 48, 64, 2)
    assert planes.dtype == np.uint8
    middle = np.median(to_pixels(planes, 20.0)[:, 8:-8, 8:-8], axis=(1, 2))
    # 0.16 pixels a byte; the clip and the flow are both compressed, and limited range has 219 steps for 255
    np.testing.assert_allclose(middle, np.broadcast_to((3.0, -2.0), (8, 2)), atol=0.5)
    picked = decode_flow(member, [6, 1], decoder=decoder)
    assert np.array_equal(picked, planes[[6, 1]])


@pytest.mark.usefixtures("opencv")
def test_the_same_clip_gives_the_same_bytes() -> None:
    clip = encode_array(np.repeat(drifting(1, 1)[..., None], 3, axis=3), fps=Fraction(25), config=CONFIG)
    assert flow_member(clip, FlowOptions(), CONFIG) == flow_member(clip, FlowOptions(), CONFIG)


@pytest.mark.usefixtures("opencv")
def test_a_clip_that_is_none_is_refused() -> None:
    with pytest.raises(VideoDecodeError):
        flow_member(b"not a video", FlowOptions(), CONFIG)


def test_missing_opencv_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(flow_module, "import_module", absent)
    with pytest.raises(ConfigError, match=r"needs OpenCV; pip install 'cliplift\[flow\]'"):
        require_flow(FlowOptions())


@pytest.mark.usefixtures("opencv")
def test_tvl1_is_found_or_said_to_be_missing() -> None:
    import cv2

    options = FlowOptions(method="tvl1")
    if hasattr(cv2, "optflow"):
        field = next(flow_fields(drifting(2, 0, frames=2), options))
        np.testing.assert_allclose(np.median(field[8:-8, 8:-8], axis=(0, 1)), (2, 0), atol=0.2)
    else:
        with pytest.raises(ConfigError, match="has no TV-L1; install opencv-contrib-python-headless"):
            require_flow(options)


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"flow\.bound_pixels"):
        FlowOptions(bound_pixels=0)
    with pytest.raises(ConfigError, match=r"flow\.method: 'farneback' must be one of dis, tvl1"):
        FlowOptions(method="farneback")  # type: ignore[arg-type]
