"""Reading video: facts of a file, frames of a stored clip, and the full decode every written clip must pass.

Frames are counted from 0 in display order. A stored clip has a constant frame rate, so frame k is shown at k / fps.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray

from cliplift.sharding.duplicates import picture_hash

Decoder = Literal["decord", "pyav", "torchcodec"]
Frames = NDArray[np.uint8]
PADDED_ROWS = "DECORDArrayCopyFromTo"

# PyAV seeks when the next wanted frame is this far ahead; nearer, decoding on is cheaper than a seek.
SEEK_AHEAD_FRAMES = 32


class VideoDecodeError(ValueError):
    """A video cannot be decoded as asked; the message says where it failed."""


@dataclass(frozen=True)
class VideoFacts:
    """What the container says about its first real video stream. Containers lie: nothing here is proof."""

    width: int
    height: int
    fps: Fraction | None
    duration_seconds: float | None
    frames: int | None
    codec: str
    pix_fmt: str
    container: str
    has_audio: bool


def video_stream(container: Any) -> Any:
    """The first video stream that is not an attached picture (cover art).

    Raises:
        VideoDecodeError: there is none, or none that this FFmpeg can decode.
    """
    unknown = False
    for stream in container.streams.video:
        if stream.codec_context is None:
            unknown = True
        elif not stream.disposition & stream.disposition.attached_pic:
            return stream
    raise VideoDecodeError("no decoder for its codec" if unknown else "no video stream")


def open_container(source: bytes | str | Path) -> Any:
    """An open PyAV container for a file or for bytes.

    Raises:
        VideoDecodeError: the file is not a readable video.
    """
    try:
        return av.open(
            io.BytesIO(source) if isinstance(source, bytes) else str(source), metadata_errors="replace"
        )
    except (FFmpegError, ValueError) as error:
        raise VideoDecodeError(f"cannot be opened: {_plain(error)}") from error


def decoded_frames(container: Any, stream: Any) -> Iterator[Any]:
    """The frames of a stream, in order of display.

    Raises:
        VideoDecodeError: a stream begins in the middle of the file (PyAV answers it with an IndexError).
    """
    try:
        yield from container.decode(stream)
    except IndexError as error:
        raise VideoDecodeError("decode: a new stream begins inside the file") from error


def probe(source: bytes | str | Path) -> VideoFacts:
    """Read the header of a video.

    Raises:
        VideoDecodeError: it cannot be opened, or holds no video.
    """
    with open_container(source) as container:
        stream = video_stream(container)
        return VideoFacts(
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            fps=frame_rate(stream),
            duration_seconds=claimed_seconds(container, stream),
            frames=stream.frames or None,
            codec=stream.codec_context.name,
            pix_fmt=stream.codec_context.pix_fmt or "unknown",
            container=container.format.name,
            has_audio=bool(container.streams.audio),
        )


def frame_rate(stream: Any) -> Fraction | None:
    """The stream's frame rate, frames/s: the average where it is credible, else the guessed one."""
    for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate):
        if rate is not None and 1 <= rate <= 1000:
            return Fraction(rate).limit_denominator(1001)
    return None


def claimed_seconds(container: Any, stream: Any) -> float | None:
    """Length the container claims for its video. With sound, the container's own length may be the sound's."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if container.duration and not container.streams.audio:
        return float(container.duration / 1_000_000)
    return None


def decode_frames(data: bytes, frame_numbers: Sequence[int], *, decoder: Decoder = "decord") -> Frames:
    """Decode chosen frames of a stored clip.

    Args:
        data: bytes of the mp4.
        frame_numbers: frames wanted, in any order, repeats allowed.
        decoder: library that decodes. On stored clips all of them return the same pixels.

    Returns:
        uint8 RGB frames (T, H, W, 3), in the order asked for.

    Raises:
        VideoDecodeError: a frame does not exist or cannot be decoded.
    """
    if not len(frame_numbers):
        raise VideoDecodeError("no frame was asked for")
    if min(frame_numbers) < 0:
        raise VideoDecodeError(f"frame {min(frame_numbers)} does not exist")
    if decoder == "decord":
        return _decord(data, frame_numbers)
    if decoder == "pyav":
        return _pyav(data, frame_numbers)
    if decoder == "torchcodec":
        return _torchcodec(data, frame_numbers)
    raise VideoDecodeError(f"unknown decoder {decoder!r}; use decord, pyav or torchcodec")


def _decord(data: bytes, frame_numbers: Sequence[int]) -> Frames:
    try:
        import decord
    except ImportError as error:
        raise VideoDecodeError("decord is not installed; use decoder: pyav") from error
    try:
        # The reader decodes ahead while it lives (gigabytes at 1080p), so it dies with this frame.
        reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
        if max(frame_numbers) >= len(reader):
            raise VideoDecodeError(f"frame {max(frame_numbers)} does not exist: the clip has {len(reader)}")
        batch: Frames = reader.get_batch(list(frame_numbers)).asnumpy()
        return batch
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        if PADDED_ROWS in str(error):
            # decord 0.6 cannot copy frames of some narrow widths (16, 24, 48, 72); PyAV's pixels are the same.
            return _pyav(data, frame_numbers)
        raise VideoDecodeError(f"decord: {_plain(error)}") from error


def _pyav(data: bytes, frame_numbers: Sequence[int]) -> Frames:
    wanted = sorted(set(frame_numbers))
    found: dict[int, Frames] = {}
    with open_container(data) as container:
        stream = video_stream(container)
        stream.codec_context.thread_count = 1
        rate = frame_rate(stream)
        if rate is None or stream.time_base is None:
            raise VideoDecodeError("the clip states no frame rate")
        start = stream.start_time or 0
        try:
            for number, frame in _numbered(container, stream, wanted, start=start, rate=rate):
                found[number] = frame.to_ndarray(format="rgb24")
        except FFmpegError as error:
            raise VideoDecodeError(f"pyav: {_plain(error)}") from error
    missing = [n for n in wanted if n not in found]
    if missing:
        raise VideoDecodeError(f"frame {missing[0]} does not exist")
    return np.stack([found[n] for n in frame_numbers])


def _numbered(
    container: Any, stream: Any, wanted: Sequence[int], *, start: int, rate: Fraction
) -> Iterator[tuple[int, Any]]:
    """The wanted frames with their numbers, decoding from the nearest key frame where they lie far apart."""
    position = -1
    queue = list(wanted)
    while queue:
        target = queue[0]
        if target - position > SEEK_AHEAD_FRAMES:
            container.seek(start + int(Fraction(target) / rate / stream.time_base), stream=stream)
        jumped = False
        for frame in decoded_frames(container, stream):
            position = round(Fraction(frame.pts - start) * stream.time_base * rate)
            if position == queue[0]:
                yield position, frame
                queue.pop(0)
                if not queue:
                    return
                if queue[0] - position > SEEK_AHEAD_FRAMES:
                    jumped = True
                    break
            elif position > queue[0]:
                return
        if not jumped:
            return


def _torchcodec(data: bytes, frame_numbers: Sequence[int]) -> Frames:
    try:
        from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found,unused-ignore]
    except (ImportError, RuntimeError, OSError) as error:
        raise VideoDecodeError("torchcodec is not usable here; use decoder: pyav") from error
    try:
        reader = VideoDecoder(data, num_ffmpeg_threads=1, dimension_order="NHWC")
        frames: Frames = reader.get_frames_at(indices=list(frame_numbers)).data.numpy()
        return frames
    except (RuntimeError, IndexError, ValueError) as error:
        raise VideoDecodeError(f"torchcodec: {_plain(error)}") from error


@dataclass(frozen=True)
class CheckedClip:
    """What a full decode of a clip proved."""

    frames: int
    width: int
    height: int
    fps: Fraction
    keyframes: tuple[int, ...]
    look: tuple[int, ...] = ()


def check_clip(data: bytes, *, look: bool = False) -> CheckedClip:
    """Decode a stored clip in full: every frame present, undamaged, of one size, at evenly spaced rising times.

    Args:
        data: bytes of the mp4.
        look: also hash the picture of every key frame, to find near-duplicates.

    Raises:
        VideoDecodeError: with the first thing that is wrong.
    """
    keyframes: list[int] = []
    pictures: list[int] = []
    size: tuple[int, int] | None = None
    number = 0
    with open_container(data) as container:
        stream = video_stream(container)
        stream.codec_context.thread_count = 1
        rate = frame_rate(stream)
        if rate is None or stream.time_base is None:
            raise VideoDecodeError("the clip states no frame rate")
        step = 1 / (rate * stream.time_base)
        start: int | None = None
        try:
            for frame in decoded_frames(container, stream):
                if frame.pts is None or frame.is_corrupt:
                    raise VideoDecodeError(f"frame {number} is damaged")
                start = frame.pts if start is None else start
                if abs(frame.pts - start - number * step) > step / 2:
                    raise VideoDecodeError(
                        f"frame {number} has time stamp {frame.pts}: frames are lost or repeated"
                    )
                if size is not None and size != (frame.width, frame.height):
                    raise VideoDecodeError(f"frame {number} changes the size of the picture")
                size = (frame.width, frame.height)
                if frame.key_frame:
                    keyframes.append(number)
                    if look:
                        pictures.append(picture_hash(frame))
                number += 1
        except FFmpegError as error:
            raise VideoDecodeError(f"frame {number}: {_plain(error)}") from error
        claimed = stream.frames
    if size is None:
        raise VideoDecodeError("the clip has no frame")
    if claimed and claimed != number:
        raise VideoDecodeError(f"the container claims {claimed} frames, {number} decode")
    width, height = size
    return CheckedClip(number, width, height, fps=rate, keyframes=tuple(keyframes), look=tuple(pictures))


def _plain(error: BaseException) -> str:
    """One line of an error's text without file names, so that ledgers are the same on every machine."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split())[:200] or type(error).__name__
