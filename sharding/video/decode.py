"""Reading video: facts of a file and frames of a stored clip.

Frames are counted from 0 in display order. A stored clip has a constant frame rate, so frame k is shown at k / fps.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

Decoder = Literal["decord", "pyav", "torchcodec"]
Frames = NDArray[np.uint8]
PADDED_ROWS = "DECORDArrayCopyFromTo"

# PyAV seeks to the first frame wanted from here on, and to the next one when it is this far ahead; nearer, decoding
# on is cheaper. Stored clips have a key frame every 16 frames.
SEEK_FIRST_FRAMES = 16
SEEK_AHEAD_FRAMES = 32

# FFmpeg's demuxers (names as in `ffmpeg -demuxers`) that read one binary file and never open another. A name here is
# matched against every alias, so "mov" stands for "mov,mp4,m4a,3gp,3g2,mj2".
CONTAINER_FORMATS = (
    "mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "m4v", "h264",
    "hevc", "h263", "av1", "obu", "ivf", "flv", "live_flv", "asf", "ogg", "gif", "apng", "mxf", "nut", "rm", "dv",
    "wtv", "yuv4mpegpipe", "mjpeg", "swf", "vc1", "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm",
)  # fmt: skip


# The largest picture that is decoded, 8192 x 8192. A few kilobytes may claim 16,000 x 16,000: 400 MB per frame.
MOST_PIXELS = 1 << 26
PICTURE_LIMIT = {"max_pixels": str(MOST_PIXELS)}


class VideoDecodeError(ValueError):
    """A video cannot be decoded as asked; the message says where it failed."""


class PastTheEndError(VideoDecodeError):
    """A span begins behind the last frame of its video."""


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


def video_stream(container: InputContainer) -> VideoStream:
    """The first video stream that is not an attached picture (cover art).

    Raises:
        VideoDecodeError: there is none, or none that this FFmpeg can decode, or its pictures are too large.
    """
    unknown = False
    for stream in container.streams.video:
        if stream.codec_context is None:
            unknown = True
        elif not stream.disposition & stream.disposition.attached_pic:
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > MOST_PIXELS:
                raise VideoDecodeError(
                    f"its pictures of {width} x {height} pixels exceed {MOST_PIXELS} pixels"
                )
            stream.codec_context.options = PICTURE_LIMIT
            return stream
    raise VideoDecodeError("no decoder for its codec" if unknown else "no video stream")


def open_container(source: bytes | str | Path) -> InputContainer:
    """An open PyAV container for a file or for bytes.

    Every input is opened here. FFmpeg would otherwise choose the demuxer by content, and the text formats among
    them (concat, HLS, DASH, SDP) open other files and sockets; it would also read a file name such as
    `http:host.mp4` as an address. So the formats and the protocols are listed, and a name is always a path.

    Raises:
        VideoDecodeError: the file is not a readable video, or its container is not one of CONTAINER_FORMATS.
    """
    options = {"format_whitelist": ",".join(CONTAINER_FORMATS)}
    opened: io.BytesIO | str
    if isinstance(source, bytes):
        opened, options["protocol_whitelist"] = io.BytesIO(source), "none"
    else:
        opened, options["protocol_whitelist"] = f"file:{Path(source).absolute()}", "file"
    try:
        # The streams' options hold for the pictures that are decoded while the file is opened.
        return av.open(
            opened, "r", options=PICTURE_LIMIT, container_options=options, metadata_errors="replace"
        )
    except av.error.ArgumentError as error:  # FFmpeg's answer to a format that is not on the list
        raise VideoDecodeError(
            "cannot be opened: not a container format that cliplift reads (Invalid argument)"
        ) from error
    except (FFmpegError, ValueError) as error:
        raise VideoDecodeError(f"cannot be opened: {plain_reason(error)}") from error


def decoded_frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """The frames of a stream, in order of display.

    Raises:
        VideoDecodeError: a picture is too large, or a stream begins in the middle of the file.
    """
    for packet in demuxed_packets(container, stream):
        yield from decoded_packet(packet)


def decoded_packet(packet: Packet[VideoStream]) -> list[VideoFrame]:
    """The frames that a decoder gives after one more packet.

    Raises:
        VideoDecodeError: a picture is too large.
    """
    try:
        return packet.decode()
    except av.error.ArgumentError as error:  # FFmpeg's answer to PICTURE_LIMIT, among others
        raise VideoDecodeError(
            f"decode: a picture is damaged or exceeds {MOST_PIXELS} pixels (Invalid argument)"
        ) from error


def demuxed_packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """The packets of a stream, in order of decoding; the last one is empty and drains the decoder.

    Raises:
        VideoDecodeError: a stream begins in the middle of the file (PyAV answers it with an IndexError).
    """
    try:
        yield from container.demux(stream)
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


def frame_rate(stream: VideoStream) -> Fraction | None:
    """The stream's frame rate, frames/s: the average where it is credible, else the guessed one."""
    for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate):
        if rate is not None and 1 <= rate <= 1000:
            return Fraction(rate).limit_denominator(1001)
    return None


def claimed_seconds(container: InputContainer, stream: VideoStream) -> float | None:
    """Length the container claims for its video, seconds after its first frame.

    With sound, the container's own length may be the sound's; Matroska then states each stream's in a tag DURATION.
    Matroska counts both from 0, also where the first frame comes later.
    """
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    late = 0.0
    if container.format.name.startswith("matroska") and stream.start_time and stream.time_base:
        late = max(0.0, float(stream.start_time * stream.time_base))
    tagged = _tagged_seconds(stream.metadata.get("DURATION", ""))
    if tagged is not None and tagged > late:
        return tagged - late
    if container.duration and not container.streams.audio:
        seconds = float(container.duration / 1_000_000)
        return seconds - late if seconds > late else seconds
    return None


def _tagged_seconds(text: str) -> float | None:
    """Seconds of Matroska's "hours:minutes:seconds" with up to 9 decimals; None for anything else."""
    found = re.fullmatch(r"(\d{1,4}):(\d{2}):(\d{2}(?:\.\d{1,9})?)", text.strip(), flags=re.ASCII)
    return None if found is None else int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3])


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
    _refuse_other_formats(data)
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
        raise VideoDecodeError(f"decord: {plain_reason(error)}") from error


def _refuse_other_formats(data: bytes) -> None:
    """Raise VideoDecodeError for bytes that open_container refuses: decord and torchcodec take no list of formats."""
    open_container(data).close()


def _pyav(data: bytes, frame_numbers: Sequence[int]) -> Frames:
    wanted = sorted(set(frame_numbers))
    place = {number: row for row, number in enumerate(wanted)}
    rows: Frames | None = None
    with open_container(data) as container:
        stream = video_stream(container)
        stream.codec_context.thread_count = 1
        converter = VideoReformatter()  # keeps its tables; one made for each frame doubles the cost
        try:
            for number, frame in _numbered(container, stream, wanted):
                picture = converter.reformat(frame, format="rgb24").planes[0]
                if rows is None:
                    rows = np.empty((len(wanted), picture.height, picture.width, 3), dtype=np.uint8)
                if rows.shape[1:3] != (picture.height, picture.width):
                    raise VideoDecodeError(f"frame {number} changes the size of the picture")
                lines = np.frombuffer(memoryview(picture), dtype=np.uint8).reshape(
                    picture.height, picture.line_size
                )
                rows[place.pop(number)] = lines[:, : 3 * picture.width].reshape(rows.shape[1:])
        except FFmpegError as error:
            raise VideoDecodeError(f"pyav: {plain_reason(error)}") from error
    if place or rows is None:
        raise VideoDecodeError(f"frame {min(place)} does not exist")
    return rows if wanted == list(frame_numbers) else rows[np.searchsorted(wanted, frame_numbers)]


def _numbered(
    container: InputContainer, stream: VideoStream, wanted: Sequence[int]
) -> Iterator[tuple[int, VideoFrame]]:
    """The wanted frames with their numbers, decoding from the nearest key frame where they lie far apart."""
    number_of, stamp_of = _frame_clock(stream)
    place, position = 0, -1
    seek = wanted[0] >= SEEK_FIRST_FRAMES
    may_seek = True
    while True:
        if seek:
            container.seek(stamp_of(wanted[place]), stream=stream)
        first, seek = True, False
        for frame in decoded_frames(container, stream):
            if frame.pts is None:
                raise VideoDecodeError("a frame has no time stamp")
            number = number_of(frame.pts)
            if first and number <= position:
                may_seek = False  # key frames are too far apart for it: decode on to the end instead
            first = False
            if number > wanted[place]:
                return
            if number == wanted[place]:
                yield number, frame
                place, position = place + 1, number
                if place == len(wanted):
                    return
                seek = may_seek and wanted[place] - position > SEEK_AHEAD_FRAMES
                if seek:
                    break
        if not seek:
            return


def _frame_clock(stream: VideoStream) -> tuple[Callable[[int], int], Callable[[int], int]]:
    """Time stamp to frame number, and back, in integers. Raises VideoDecodeError where no rate is stated."""
    rate = frame_rate(stream)
    if rate is None or stream.time_base is None:
        raise VideoDecodeError("the clip states no frame rate")
    start = stream.start_time or 0
    frames = rate * stream.time_base  # frames in a unit of the time stamps
    up, down = frames.numerator, frames.denominator
    return (
        lambda pts: (2 * (pts - start) * up + down) // (2 * down),
        lambda number: int(start + number * down // up),
    )


def _torchcodec(data: bytes, frame_numbers: Sequence[int]) -> Frames:
    _refuse_other_formats(data)
    try:
        from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found,attr-defined,unused-ignore]
    except (ImportError, RuntimeError, OSError) as error:
        raise VideoDecodeError("torchcodec is not usable here; use decoder: pyav") from error
    try:
        reader = VideoDecoder(data, num_ffmpeg_threads=1, dimension_order="NHWC")
        frames: Frames = reader.get_frames_at(indices=list(frame_numbers)).data.numpy()
        return frames
    except (RuntimeError, IndexError, ValueError) as error:
        raise VideoDecodeError(f"torchcodec: {plain_reason(error)}") from error


def plain_reason(error: BaseException) -> str:
    """One line of an error's text without file names, so that ledgers are the same on every machine."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split())[:200] or type(error).__name__
