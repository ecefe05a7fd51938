"""Optical flow of a stored clip, as a second video of the same length: what a flow stream learns from.

Flow of frame t is where its pixels are in frame t + 1, x to the right and y down, in pixels of the stored clip. The
last frame has no successor and repeats the flow before it, so that frame numbers mean the same in both videos.

Stored as published flow is (TSN's dense_flow and arXiv 2008.01232's frames): clipped to +-20 pixels and mapped
linearly to 8 bits, no motion in the middle. A video has no two-channel format, so x and y stand one above the other in
the luma plane of a picture twice as high, which every decoder reads at full resolution (chroma would be halved).

* ``dis``: Kroeger et al., "Fast Optical Flow using Dense Inverse Search", arXiv 1603.03590; in every OpenCV;
* ``tvl1``: Zach et al., "A Duality Based Approach for Realtime TV-L1 Optical Flow", DAGM 2007, as in the two-stream
  papers; some hundred times slower, and in OpenCV's contributed modules only.

Needs the extra ``flow`` (OpenCV). T frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from importlib import import_module

import av
import numpy as np
import numpy.typing as npt
from av.error import FFmpegError

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import FlowConfig, TranscodeConfig
from cliplift.sharding.video.decode import (
    Decoder,
    Frames,
    VideoDecodeError,
    decode_frames,
    frame_rate,
    open_container,
    video_stream,
)
from cliplift.sharding.video.encode import encode

Gray = npt.NDArray[np.uint8]  # (H, W)
Flow = npt.NDArray[np.float32]  # (H, W, 2), x and y, pixels per frame
MIDDLE = 127.5


def require_flow(options: FlowConfig) -> None:
    """Check that the method can be had here, before a build starts. Raises :class:`ConfigError`."""
    _estimator(options)


def flow_fields(frames: Iterable[Gray], options: FlowConfig) -> Iterator[Flow]:
    """T grey frames (H, W) -> T flow fields (H, W, 2); one frame alone does not move.

    Raises:
        ConfigError: OpenCV or the method is not installed.
    """
    estimate = _estimator(options)
    before: Gray | None = None
    latest: Flow | None = None
    for frame in frames:
        if before is not None:
            with _one_thread():
                latest = np.asarray(estimate(before, frame, None), dtype=np.float32)
            yield latest
        before = frame
    if before is not None:
        yield np.zeros((*before.shape, 2), np.float32) if latest is None else latest


def to_bytes(flow: Flow, bound_pixels: float) -> npt.NDArray[np.uint8]:
    """(..., 2) pixels -> 0 to 255; no motion is 128, the nearest to the middle of 127.5."""
    scaled = np.clip(flow / bound_pixels, -1, 1) * MIDDLE + MIDDLE
    stored: npt.NDArray[np.uint8] = np.rint(scaled).astype(np.uint8)
    return stored


def to_pixels(stored: npt.NDArray[np.uint8], bound_pixels: float) -> npt.NDArray[np.float32]:
    """The inverse of :func:`to_bytes`, to half a step of ``bound_pixels / 127.5``."""
    return ((stored.astype(np.float32) - MIDDLE) / MIDDLE * bound_pixels).astype(np.float32)


def flow_member(data: bytes, options: FlowConfig, config: TranscodeConfig) -> bytes:
    """The flow video of a stored clip: as many frames at the same rate, as wide and twice as high.

    Args:
        data: the clip, an mp4 as a shard holds it.
        options: method and range.
        config: how the flow video is encoded.

    Raises:
        VideoDecodeError: the clip cannot be decoded.
        ConfigError: OpenCV or the method is not installed.
    """
    with open_container(data) as container:
        stream = video_stream(container)
        stream.codec_context.thread_count = 1
        fps = frame_rate(stream)
        if fps is None:
            raise VideoDecodeError("flow: the clip has no frame rate")
        grey = (
            frame.to_ndarray(format="gray").astype(np.uint8, copy=False) for frame in container.decode(stream)
        )
        pictures = (_picture(flow, options.bound_pixels) for flow in flow_fields(grey, options))
        try:
            return encode(pictures, fps=Fraction(fps), config=config)
        except FFmpegError as error:
            raise VideoDecodeError(f"flow: {error.strerror}") from error


def decode_flow(data: bytes, frame_numbers: Sequence[int], *, decoder: Decoder = "decord") -> Frames:
    """Frames of a flow video by number: uint8 (T, H, W, 2), x and y; :func:`to_pixels` turns them into pixels.

    Raises:
        VideoDecodeError: the video cannot be decoded, or its height is odd: not a flow video.
    """
    pictures = decode_frames(data, frame_numbers, decoder=decoder)[..., 0]  # grey: all three channels agree
    if pictures.shape[1] % 2:
        raise VideoDecodeError(f"flow: a height of {pictures.shape[1]} is not two planes")
    height = pictures.shape[1] // 2
    planes: Frames = np.stack([pictures[:, :height], pictures[:, height:]], axis=-1)
    return planes


def _picture(flow: Flow, bound_pixels: float) -> av.VideoFrame:
    """x above y as a yuv420p frame without colour."""
    stored = to_bytes(flow, bound_pixels)
    grey = np.concatenate([stored[..., 0], stored[..., 1]], axis=0)
    rgb = np.ascontiguousarray(np.repeat(grey[..., None], 3, axis=2))
    return av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(
        format="yuv420p", dst_colorspace=5, dst_color_range=1
    )


def _estimator(options: FlowConfig) -> Callable[[Gray, Gray, None], Flow]:
    """``calc`` of OpenCV's estimator: (before, after, None) -> (H, W, 2)."""
    try:
        cv2 = import_module("cv2")
    except ImportError:
        raise ConfigError(
            "optical flow needs OpenCV",
            key="flow.method",
            value=options.method,
            hint="pip install 'cliplift[flow]'",
        ) from None
    if options.method == "dis":
        preset = getattr(cv2, f"DISOPTICAL_FLOW_PRESET_{options.preset.upper()}")
        fast: Callable[[Gray, Gray, None], Flow] = cv2.DISOpticalFlow_create(preset).calc
        return fast
    if not hasattr(cv2, "optflow"):
        raise ConfigError(
            f"this OpenCV ({cv2.__version__}) has no TV-L1",
            key="flow.method",
            value="tvl1",
            hint="install opencv-contrib-python-headless, or use dis",
        )
    slow: Callable[[Gray, Gray, None], Flow] = cv2.optflow.DualTVL1OpticalFlow_create().calc
    return slow


@contextmanager
def _one_thread() -> Iterator[None]:
    """OpenCV on one thread: a build has one process per core already, and sums do not depend on the machine."""
    cv2 = import_module("cv2")
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)
