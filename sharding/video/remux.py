"""Cutting without re-encoding: the packets of a span, moved as they are into a stored clip.

Only a source that already is what an encode would make is cut so: H.264, 8 bit 4:2:0, progressive, upright, of the
wanted size and rate, in closed groups no longer than wanted, with a key frame at the cut. Time stamps are written anew,
one frame apart, so that no edit list and no rounding of the source survives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

import av
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.stream import VideoStream

from cliplift.configs.sharding import TranscodeConfig
from cliplift.sharding.scratch import scratch_folder
from cliplift.sharding.video.decode import (
    VideoDecodeError,
    decoded_frames,
    frame_rate,
)
from cliplift.sharding.video.full_decode import CheckedClip, check_clip
from cliplift.sharding.video.regular_frames import ROUND_UP, target_rate, target_size, turns

CONTAINERS = ("mov", "matroska")  # whose seeks land where they say, and whose packets are framed by length
IDR, LENGTH_SIZE_AT = (
    5,
    4,
)  # NAL unit type of an instantaneous refresh; where avcC says how lengths are written
BT601 = (5, 6, 2)  # bt470bg, smpte170m, unspecified: what decoders take a small video for
LIMITED = (0, 1)  # unspecified, mpeg


VideoPacket: TypeAlias = "Packet[VideoStream]"


class NotCopiedError(Exception):
    """The span must be encoded; the message says why, in words that can be counted."""


@dataclass(frozen=True)
class CopiedClip:
    """A clip cut without re-encoding, and what its full decode proved."""

    data: bytes
    checked: CheckedClip


def copy_span(
    container: InputContainer,
    stream: VideoStream,
    *,
    start_seconds: float,
    end_seconds: float | None,
    config: TranscodeConfig,
) -> CopiedClip:
    """Cut a span of an open video without re-encoding and decode the result in full.

    Args:
        container, stream: the open video; its position is changed.
        start_seconds: start of the span after the first frame of the video, seconds.
        end_seconds: end of the span, seconds; None is the end of the video.
        config: what an encode would make.

    Raises:
        NotCopiedError: the source does not fit, or the copy does not decode as it should.
    """
    fps = _require_fit(container, stream, config)
    try:
        _require_upright(container, stream)
        packets, ranks = _packets(
            container, stream, start=start_seconds, end=end_seconds, fps=fps, config=config
        )
        keys = tuple(rank for packet, rank in zip(packets, ranks, strict=True) if packet.is_keyframe)
        # Copied packets are only believed once they decode: an open GOP or a missing reference shows nowhere else.
        data = _mux(stream, packets, ranks, fps)
        checked = check_clip(data, hash_pictures=True)
    except (FFmpegError, VideoDecodeError) as error:
        raise NotCopiedError("it does not decode") from error
    size = (stream.codec_context.width, stream.codec_context.height)
    if (checked.frames, checked.keyframes) != (len(packets), keys):
        raise NotCopiedError("its copy decodes to other frames")
    if (checked.width, checked.height) != size or checked.fps != fps or checked.interlaced:
        raise NotCopiedError("its copy is interlaced or of another size")
    return CopiedClip(data, checked)


def _require_fit(container: InputContainer, stream: VideoStream, config: TranscodeConfig) -> Fraction:
    """What the headers say; returns the frame rate."""
    context = stream.codec_context
    fps = frame_rate(stream)
    size = (context.width, context.height)
    # Told by the container's first name: matroska stands for webm too.
    checks = (
        (
            container.format.name.split(",")[0] in CONTAINERS,
            f"container {container.format.name.split(',')[0]}",
        ),
        (config.codec == context.name == "h264", f"codec {context.name}"),
        (context.pix_fmt == "yuv420p", f"pixels {context.pix_fmt}"),
        (target_size(*size, config.short_side_pixels) == size, "size"),
        ((stream.sample_aspect_ratio or 1) == 1, "sample aspect"),
        (fps is not None and target_rate(fps, config) == fps, "frame rate"),
        ((context.extradata or b"")[:1] == b"\x01", "no avcC header"),
        (config.deinterlace != "always", "deinterlace: always"),
    )
    for fits, reason in checks:
        if not fits:
            raise NotCopiedError(reason)
    assert fps is not None
    return fps


def _require_upright(container: InputContainer, stream: VideoStream) -> None:
    """What only a decoded frame says."""
    frame = next(decoded_frames(container, stream), None)
    if frame is None or frame.is_corrupt:
        raise NotCopiedError("it does not decode")
    if turns(frame):
        raise NotCopiedError("rotation")
    if frame.interlaced_frame:
        raise NotCopiedError("interlaced")
    if frame.colorspace not in BT601 or frame.color_range not in LIMITED:
        raise NotCopiedError("colours")
    container.seek(stream.start_time or 0, stream=stream)


def _packets(
    container: InputContainer,
    stream: VideoStream,
    *,
    start: float,
    end: float | None,
    fps: Fraction,
    config: TranscodeConfig,
) -> tuple[list[VideoPacket], list[int]]:
    """The packets of a span in order of decoding, and each one's place in order of display."""
    if stream.time_base is None:
        raise NotCopiedError("time stamps")
    step = 1 / (fps * stream.time_base)
    # The first frame shown is the last one whose time rounds to the start of the span, as in an encode.
    first = (stream.start_time or 0) + float(start / stream.time_base) + float(step) * (1 - ROUND_UP)
    limit = config.max_seconds * float(fps) if end is None else round((end - start) * float(fps))
    if limit > config.max_seconds * float(fps):
        raise NotCopiedError("too long")
    container.seek(int(first), stream=stream)
    groups = _closed_groups(container, stream)
    group: list[VideoPacket] = next(groups, [])
    if not group or abs(_shown_at(group[0]) - (first - float(step) * (1 - ROUND_UP))) > float(step) / 2:
        raise NotCopiedError("no key frame at the cut")
    begin = _shown_at(group[0])
    packets: list[VideoPacket] = []
    while group and len(packets) < limit:
        if len(group) > config.gop_frames:
            raise NotCopiedError("long groups")
        packets += group
        group = next(groups, [])
    if end is None and (group or len(packets) > limit):
        raise NotCopiedError("too long")
    ranks = [round((_shown_at(packet) - begin) / step) for packet in packets]
    if sorted(ranks) != list(range(len(ranks))) or any(
        abs(_shown_at(packet) - begin - rank * step) > step / 2
        for packet, rank in zip(packets, ranks, strict=True)
    ):
        raise NotCopiedError("variable frame rate")
    count = min(len(packets), int(limit))
    if sorted(ranks[:count]) != list(range(count)):
        raise NotCopiedError("the end is inside a run of B frames")
    return packets[:count], ranks[:count]


def _closed_groups(container: InputContainer, stream: VideoStream) -> Iterator[list[VideoPacket]]:
    """Packets from one key frame to the next. No frame of a group may be shown before its key frame."""
    assert stream.codec_context.extradata is not None, "_require_fit found its avcC header"
    length_size = (stream.codec_context.extradata[LENGTH_SIZE_AT] & 3) + 1
    group: list[VideoPacket] = []
    for packet in container.demux(stream):
        if packet.size == 0:
            continue
        if packet.pts is None or packet.is_corrupt or packet.is_discard:
            raise NotCopiedError("edit list" if packet.is_discard else "time stamps")
        if packet.is_keyframe:
            if group:
                yield group
            group = []
            if IDR not in _nal_types(bytes(packet), length_size):
                raise NotCopiedError("open groups")
        elif not group:
            raise NotCopiedError("no key frame at the cut")
        elif packet.pts < _shown_at(group[0]):
            raise NotCopiedError("open groups")
        group.append(packet)
    if group:
        yield group


def _shown_at(packet: VideoPacket) -> int:
    """Time stamp of display, in units of the stream's time base."""
    assert packet.pts is not None, "_closed_groups refuses packets without one"
    return packet.pts


def _nal_types(data: bytes, length_size: int) -> set[int]:
    """Types of the NAL units of one H.264 packet in mp4 form (each unit after its length)."""
    types, at = set(), 0
    while at + length_size < len(data):
        types.add(data[at + length_size] & 31)
        at += length_size + int.from_bytes(data[at : at + length_size], "big")
    return types


def _mux(stream: VideoStream, packets: list[VideoPacket], ranks: list[int], fps: Fraction) -> bytes:
    """An mp4 of the packets, one frame apart, as an encoder would have stamped them."""
    delay = max(place - rank for place, rank in enumerate(ranks))
    with scratch_folder() as folder:
        path = folder / "clip.mp4"
        options = {"movflags": "+faststart", "fflags": "+bitexact"}
        with av.open(f"file:{path.absolute()}", "w", format="mp4", options=options) as out:
            target = out.add_stream_from_template(stream)
            target.time_base = 1 / fps
            target.metadata.clear()
            for place, (packet, rank) in enumerate(zip(packets, ranks, strict=True)):
                packet.stream = target
                packet.time_base = 1 / fps
                packet.pts, packet.dts, packet.duration = rank, place - delay, 1
                out.mux(packet)
        return path.read_bytes()
