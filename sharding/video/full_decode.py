"""The full decode that every written clip must pass before its shard is sealed."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from av import VideoFrame
from av.error import FFmpegError

from cliplift.sharding.video.decode import (
    VideoDecodeError,
    decoded_frames,
    frame_rate,
    open_container,
    plain_reason,
    video_stream,
)
from cliplift.sharding.video.picture_hash import picture_hash


@dataclass(frozen=True)
class CheckedClip:
    """What a full decode of a clip proved."""

    frames: int
    width: int
    height: int
    fps: Fraction
    keyframes: tuple[int, ...]
    interlaced: bool = False
    picture_hashes: tuple[int, ...] = ()  # of every key frame, where asked for
    looks: tuple[
        int, ...
    ] = ()  # picture hashes of every `look_step`-th frame from the first, where asked for
    look_step: int = 0


def check_clip(data: bytes, *, hash_pictures: bool = False, looks_per_second: float = 0.0) -> CheckedClip:
    """Decode a stored clip in full: every frame present, undamaged, of one size, at evenly spaced rising times.

    Args:
        data: bytes of the mp4.
        hash_pictures: also hash the picture of every key frame, to find near-duplicates.
        looks_per_second: also hash so many pictures a second, about and at most all, to find parts of the clip.

    Raises:
        VideoDecodeError: with the first thing that is wrong.
    """
    keyframes: list[int] = []
    hashes: list[int] = []
    looks: list[int] = []
    size: tuple[int, int] | None = None
    number = 0
    interlaced = False
    with open_container(data) as container:
        stream = video_stream(container)
        stream.codec_context.thread_count = 1
        rate = frame_rate(stream)
        if rate is None or stream.time_base is None:
            raise VideoDecodeError("the clip states no frame rate")
        step = 1 / (rate * stream.time_base)
        look_step = max(1, round(float(rate) / looks_per_second)) if looks_per_second else 0
        start: int | None = None
        try:
            for frame in decoded_frames(container, stream):
                start = _whole_stamp(frame, number) if start is None else start
                _require_next(frame, number, start=start, step=step, size=size)
                size = (frame.width, frame.height)
                interlaced |= bool(frame.interlaced_frame)
                if frame.key_frame:
                    keyframes.append(number)
                    if hash_pictures:
                        hashes.append(picture_hash(frame))
                if look_step and number % look_step == 0:
                    looks.append(picture_hash(frame))
                number += 1
        except FFmpegError as error:
            raise VideoDecodeError(f"frame {number}: {plain_reason(error)}") from error
        claimed = stream.frames
    if size is None:
        raise VideoDecodeError("the clip has no frame")
    if claimed and claimed != number:
        raise VideoDecodeError(f"the container claims {claimed} frames, {number} decode")
    width, height = size
    return CheckedClip(
        number,
        width,
        height,
        fps=rate,
        keyframes=tuple(keyframes),
        interlaced=interlaced,
        picture_hashes=tuple(hashes),
        looks=tuple(looks),
        look_step=look_step,
    )


def _whole_stamp(frame: VideoFrame, number: int) -> int:
    if frame.pts is None or frame.is_corrupt:
        raise VideoDecodeError(f"frame {number} is damaged")
    return frame.pts


def _require_next(
    frame: VideoFrame, number: int, *, start: int, step: Fraction, size: tuple[int, int] | None
) -> None:
    """Raise VideoDecodeError unless a frame is whole, of the size of those before it, and comes at its time."""
    # Half a frame of slack: time bases round stamps, but never by that much.
    if abs(_whole_stamp(frame, number) - start - number * step) > step / 2:
        raise VideoDecodeError(f"frame {number} has time stamp {frame.pts}: frames are lost or repeated")
    if size is not None and size != (frame.width, frame.height):
        raise VideoDecodeError(f"frame {number} changes the size of the picture")
