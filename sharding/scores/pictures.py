"""The pictures of a stored clip that its scores are made of: some of them, spread over the clip, decoded once.

Scores need no more than a few pictures, and decoding is what they cost. Groups of pictures are closed, and in order of
decoding the first packets of a group need nothing of what follows. So up to eight groups are entered, evenly spread,
and of each its first packets are decoded, sixteen pictures in all. Which pictures these are follows from the packets'
time stamps alone; a clip whose decoder gives others (a foreign one with open groups) is decoded in full, and the same
pictures are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from cliplift.sharding.video.decode import (
    VideoDecodeError,
    decoded_frames,
    decoded_packet,
    demuxed_packets,
    open_container,
    plain_reason,
    video_stream,
)

MOST_GROUPS, MOST_PICTURES = 8, 16
# Formats whose first plane is the luma, a byte a pixel; the second row of them uses all 256 levels.
PLANAR = ("yuv420p", "yuv422p", "yuv444p", "nv12", "gray", "yuvj420p", "yuvj422p", "yuvj444p")
FULL_RANGE_FORMATS = ("gray", "yuvj420p", "yuvj422p", "yuvj444p")
FULL_RANGE = 2  # AVCOL_RANGE_JPEG

Luma = NDArray[np.uint8]


@dataclass(frozen=True)
class Picture:
    """One decoded picture.

    Attributes:
        number: its place in order of display, from 0.
        luma: (H, W), as stored.
        full_range: whether black is 0 and white 255; 16 and 235 otherwise.
    """

    number: int
    luma: Luma
    full_range: bool


Run = tuple[Picture, ...]  # pictures of one group, in order of display


def decode_pictures(data: bytes, *, every: Callable[[Picture], None] | None = None) -> tuple[Run, ...]:
    """Decode the pictures that scores are made of.

    Args:
        data: bytes of the mp4.
        every: is shown each picture of the clip, in order of display; the whole clip is then decoded. What is returned
            does not depend on it.

    Raises:
        VideoDecodeError: the clip cannot be decoded.
    """
    try:
        with open_container(data) as container:
            stream = video_stream(container)
            stream.codec_context.thread_count = 1
            packets = list(demuxed_packets(container, stream))
            numbers = _numbers(packets)
            groups = [_of_group(group) for group in _entered(packets)]
            wanted = [[numbers[packet.pts] for packet in group if packet.pts in numbers] for group in groups]
            if every is None:
                fed = [packet for group in groups for packet in group]
                found = {p.number: p for p in _pictures(_decoded([*fed, packets[-1]]), numbers)}
                if sorted(found) == sorted(number for group in wanted for number in group):
                    return _runs(found, wanted)
        return _runs(_from_all(data, numbers, wanted, every), wanted)
    except FFmpegError as error:
        raise VideoDecodeError(f"pyav: {plain_reason(error)}") from error


def _numbers(packets: Sequence[Packet[VideoStream]]) -> dict[int, int]:
    """The number in order of display of every time stamp."""
    stamps = sorted({packet.pts for packet in packets if packet.size and packet.pts is not None})
    if not stamps:
        raise VideoDecodeError("the clip has no frame with a time stamp")
    return {stamp: number for number, stamp in enumerate(stamps)}


def _entered(packets: Sequence[Packet[VideoStream]]) -> list[list[Packet[VideoStream]]]:
    """The groups that are entered, each with all its packets in order of decoding."""
    starts = [place for place, packet in enumerate(packets) if packet.size and packet.is_keyframe]
    if not starts:
        raise VideoDecodeError("the clip has no key frame")
    count = min(MOST_GROUPS, len(starts))
    chosen = [(2 * i + 1) * len(starts) // (2 * count) for i in range(count)]
    ends = [*starts[1:], len(packets)]
    share = MOST_PICTURES // count
    return [[p for p in packets[starts[i] : ends[i]] if p.size][:share] for i in chosen]


def _of_group(group: list[Packet[VideoStream]]) -> list[Packet[VideoStream]]:
    """Without pictures shown before the key frame, which an open group makes of the group before."""
    first = group[0].pts
    return [p for p in group if p.pts is not None and first is not None and p.pts >= first]


def _decoded(packets: Iterable[Packet[VideoStream]]) -> Iterator[VideoFrame]:
    for packet in packets:
        yield from decoded_packet(packet)


def _pictures(frames: Iterable[VideoFrame], numbers: dict[int, int]) -> Iterator[Picture]:
    for frame in frames:
        number = None if frame.pts is None else numbers.get(frame.pts)
        if number is not None and not frame.is_corrupt:
            full = frame.color_range == FULL_RANGE or frame.format.name in FULL_RANGE_FORMATS
            yield Picture(number, _luma(frame), full)


def _luma(frame: VideoFrame) -> Luma:
    if frame.format.name not in PLANAR:
        frame = frame.reformat(format="yuv420p")
    plane = frame.planes[0]
    lines = np.frombuffer(memoryview(plane), dtype=np.uint8).reshape(-1, plane.line_size)
    return lines[: frame.height, : frame.width].copy()


def _from_all(
    data: bytes,
    numbers: dict[int, int],
    wanted: Sequence[Sequence[int]],
    every: Callable[[Picture], None] | None,
) -> dict[int, Picture]:
    """The wanted pictures of a decode of the whole clip."""
    kept = {number for group in wanted for number in group}
    found: dict[int, Picture] = {}
    with open_container(data) as container:
        stream = video_stream(container)
        stream.codec_context.thread_count = 1
        for picture in _pictures(decoded_frames(container, stream), numbers):
            if every is not None:
                every(picture)
            if picture.number in kept:
                found[picture.number] = picture
    return found


def _runs(found: dict[int, Picture], wanted: Sequence[Sequence[int]]) -> tuple[Run, ...]:
    runs = (tuple(found[number] for number in sorted(group) if number in found) for group in wanted)
    kept = tuple(run for run in runs if run)
    if not kept:
        raise VideoDecodeError("no picture of the clip decodes")
    if len({picture.luma.shape for run in kept for picture in run}) > 1:
        raise VideoDecodeError("the picture changes its size inside the clip")
    return kept


def summed(luma: Luma, factor: int) -> NDArray[np.uint32]:
    """(H, W) -> (H // factor, W // factor) sums over squares of ``factor`` pixels.

    Sums of whole numbers, which no order of adding changes; slices are added several times as fast as an axis.
    """
    rows, columns = (length // factor for length in luma.shape)
    luma = luma[: rows * factor, : columns * factor]
    down = luma[0::factor].astype(np.uint32)
    for row in range(1, factor):
        down += luma[row::factor]
    total = down[:, 0::factor].copy()
    for column in range(1, factor):
        total += down[:, column::factor]
    return total
