"""A first look at a raw video, before anything is packed: what its header says, and four of its pictures.

The pictures stand at fixed shares of the length, so that another encoding of the same video has the same ones. Each is
reached from the key frame before it; a file whose key frames lie far apart gives the frame that is reached within the
limit. This is a look, not a check: the full decode of every clip is the build's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypedDict

from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from cliplift.sharding.video.decode import (
    VideoDecodeError,
    claimed_seconds,
    decoded_frames,
    frame_rate,
    open_container,
    plain_reason,
    video_stream,
)
from cliplift.sharding.video.picture_hash import picture_hash

SHARES = (0.125, 0.375, 0.625, 0.875)  # of the length, where the pictures stand
MOST_FRAMES = 300  # decoded from a key frame on to reach one of them


class Glance(TypedDict):
    """What is seen of a video. ``fps`` and ``seconds`` are 0 where the header does not say."""

    width: int
    height: int
    fps: float
    seconds: float
    codec: str
    container: str
    picture_hashes: list[int]
    brightness: float  # mean luma of the pictures, 0 black and 1 white


def glance(path: str) -> Glance:
    """Look at a local video file.

    Raises:
        VideoDecodeError: it cannot be opened, or no picture of it decodes.
    """
    with open_container(path) as container:
        stream = video_stream(container)
        stream.codec_context.thread_count = 1
        seconds, rate = claimed_seconds(container, stream), frame_rate(stream)
        hashes: list[int] = []
        lumas: list[float] = []
        width = height = 0
        for frame in _pictures(container, stream, seconds or 0.0):
            width, height = frame.width, frame.height
            if frame.rotation % 180:
                width, height = height, width
            hashes.append(picture_hash(frame))
            gray = frame.reformat(width=16, height=16, format="gray", interpolation="AREA")
            lumas.append(float(gray.to_ndarray().mean()) / 255)
        if not hashes:
            raise VideoDecodeError("no picture of it decodes")
        return Glance(
            width=width,
            height=height,
            fps=float(rate or 0),
            seconds=seconds or 0.0,
            codec=stream.codec_context.name,
            container=container.format.name,
            picture_hashes=hashes,
            brightness=sum(lumas) / len(lumas),
        )


def _pictures(container: InputContainer, stream: VideoStream, seconds: float) -> Iterator[VideoFrame]:
    """The pictures at ``SHARES`` of the length; the first one alone where no length is stated."""
    if not seconds or stream.time_base is None:
        frame = _frame_at(container, stream, None)
        if frame is not None:
            yield frame
        return
    begin = stream.start_time or 0
    for share in SHARES:
        frame = _frame_at(container, stream, begin + int(share * seconds / stream.time_base))
        if frame is not None:
            yield frame


def _frame_at(container: InputContainer, stream: VideoStream, stamp: int | None) -> VideoFrame | None:
    """The first frame at or after a time stamp, or the last one before it; None where nothing decodes there."""
    found: VideoFrame | None = None
    try:
        if stamp is not None:
            container.seek(stamp, stream=stream)
        for number, frame in enumerate(decoded_frames(container, stream)):
            found = frame
            late = stamp is None or frame.pts is None or frame.pts >= stamp
            if late or number >= MOST_FRAMES:
                break
    except FFmpegError as error:
        if found is None and stamp is None:
            raise VideoDecodeError(f"cannot be decoded: {plain_reason(error)}") from error
    return found
