"""Decoded frames of a raw video made regular: whole pictures, upright, square pixels, constant rate."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction

import av.error
import av.filter
import numpy as np
from av.container import InputContainer
from av.filter import Graph
from av.sidedata.sidedata import SideData
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from cliplift.configs.sharding import TranscodeConfig
from cliplift.sharding.video.decode import (
    VideoDecodeError,
    decoded_frames,
    decoded_packet,
    demuxed_packets,
)

# Containers whose seeks land where they say (measured); the others are decoded from the start.
SEEKABLE = ("mov", "matroska", "webm")
SEEK_MARGIN_SECONDS = 1.0
ASPECT_TOLERANCE = 0.01
# A frame half-way between two slots (60 -> 30 frames/s) goes to the later one, also when its time stamp is rounded
# to milliseconds: otherwise slots would take now the one, now the other of two neighbours.
ROUND_UP = 0.52
SLOT_SLACK = 0.1  # the last frame does not make a slot of its own when a tenth of it or less is left

FALLBACK_FPS = Fraction(25)  # where the file states no rate
# Recordings that are joined, or miss a part, jump in their time stamps. ffmpeg's limits for transport and program
# streams (`-dts_delta_threshold`); everywhere else a long pause is a picture that is shown long.
JUMPING = ("mpegts", "mpeg")
JUMP_FORWARD_SECONDS = 10.0
# A stamp this little before the last one is out of order, not a new beginning.
JUMP_BACK_SECONDS = 1.0

LONG_FRAME = 1.5  # a last frame shown this many times longer than usual is a slide

TimedFrame = tuple[float, VideoFrame]


class RisingTimes:
    """Times of frames in the decoder's order, which is the order of display: each later than the one before.

    At a jump of the time stamps the time goes on where the last frame ended. A single stamp that does not rise counts
    as one frame later.
    """

    def __init__(self, source_fps: Fraction, *, jumps_forward: bool) -> None:
        self.step = 1 / float(source_fps)
        self.most = JUMP_FORWARD_SECONDS if jumps_forward else math.inf
        self.previous: float | None = None
        self.shift = 0.0  # seconds added to every time stamp from here on
        self.skipped = 0.0  # seconds in which the time stamps jumped over nothing

    def time(self, stamp: float | None) -> float:
        """The time of the next frame, given its time stamp, both in seconds."""
        if self.previous is None:
            self.previous = stamp or 0.0
            return self.previous
        expected = self.previous + self.step
        time = expected if stamp is None else stamp + self.shift
        gap = time - expected
        if time <= self.previous - JUMP_BACK_SECONDS or gap > self.most:
            self.shift -= gap
            self.skipped += max(0.0, gap)
            time = expected
        elif time <= self.previous:
            time = expected
        self.previous = time
        return time


def _stamped(container: InputContainer, stream: VideoStream) -> Iterator[tuple[int | None, VideoFrame]]:
    """Decoded frames with their time stamps, in units of the stream's time base.

    AVI has no stamps of display, and the ones guessed for B frames jump back and forth: there the k-th frame shown
    takes the k-th stamp of the packets, which count frames.
    """
    if container.format.name != "avi":
        for frame in decoded_frames(container, stream):
            yield frame.pts, frame
        return
    stamps: deque[int] = deque()
    for packet in demuxed_packets(container, stream):
        if packet.size and packet.dts is not None:
            stamps.append(packet.dts)
        for frame in decoded_packet(packet):
            yield stamps.popleft() if stamps else None, frame


def timed_frames(
    container: InputContainer,
    stream: VideoStream,
    *,
    start_seconds: float,
    source_fps: Fraction,
    clock: RisingTimes | None = None,
) -> Iterator[TimedFrame]:
    """Decoded frames and their times after the first frame of the video, seconds.

    Args:
        container, stream: the open video.
        start_seconds: frames before this time may be left out.
        source_fps: frames/s, the length of a frame where the stamps do not say it.
        clock: what turns stamps into times, for callers that ask it afterwards how much was jumped over.

    Raises:
        VideoDecodeError: a frame is damaged, or the seek landed after the start.
    """
    clock = clock or rising_times(container, source_fps)
    origin: float | None = None
    if start_seconds > SEEK_MARGIN_SECONDS and is_seekable(container, stream):
        assert stream.start_time is not None and stream.time_base is not None  # noqa: PT018 - see is_seekable
        # After a seek the first stamp is not the video's first, so the origin comes from the container.
        origin = float(stream.start_time * stream.time_base)
        container.seek(
            stream.start_time + int((start_seconds - SEEK_MARGIN_SECONDS) / stream.time_base), stream=stream
        )
    for units, frame in _stamped(container, stream):
        if frame.is_corrupt:
            raise VideoDecodeError(f"decode: damaged frame after {max(clock.previous or 0, 0):.2f} s")
        stamp = None if units is None or frame.time_base is None else float(units * frame.time_base)
        if origin is None:
            origin = stamp or 0.0
        elif clock.previous is None and stamp is not None and stamp - origin > start_seconds:
            raise VideoDecodeError("decode: the seek landed after the start of the clip")
        yield clock.time(None if stamp is None else stamp - origin), frame


def is_seekable(container: InputContainer, stream: VideoStream) -> bool:
    """Whether a seek into this video lands where it says; the others are decoded from their first frame."""
    timed = stream.start_time is not None and stream.time_base is not None
    return timed and container.format.name.split(",")[0] in SEEKABLE


def rising_times(container: InputContainer, source_fps: Fraction) -> RisingTimes:
    """The clock for a container: only transport and program streams jump forwards."""
    return RisingTimes(source_fps, jumps_forward=container.format.name in JUMPING)


def progressive_frames(
    timed: Iterable[TimedFrame], config: TranscodeConfig, *, time_base: Fraction
) -> Iterator[TimedFrame]:
    """Weave the two fields of interlaced frames into whole pictures; progressive frames pass untouched."""
    graph: Graph | None = None
    layout: tuple[int, int, str] | None = None
    times: deque[float] = deque()  # the filter answers one frame late
    for time, frame in timed:
        shape = (frame.width, frame.height, frame.format.name)
        if graph is not None and shape != layout:
            yield from zip(times, _drained(graph), strict=False)
            times.clear()
            graph = None
        wanted = config.deinterlace == "always" or (
            config.deinterlace == "flagged" and frame.interlaced_frame
        )
        if graph is None and not wanted:
            yield time, frame
            continue
        if graph is None:
            extent = "all" if config.deinterlace == "always" else "interlaced"
            graph, layout = _graph(frame, time_base, [("bwdif", f"mode=send_frame:deint={extent}")]), shape
        times.append(time)
        graph.push(frame)
        try:
            done = graph.vpull()
        except av.error.BlockingIOError:
            continue
        yield times.popleft(), done
    if graph is not None:
        yield from zip(times, _drained(graph), strict=False)


def _drained(graph: Graph) -> Iterator[VideoFrame]:
    graph.push(None)
    while True:
        try:
            yield graph.vpull()
        except (av.error.EOFError, av.error.BlockingIOError):
            return


def _graph(frame: VideoFrame, time_base: Fraction, steps: list[tuple[str, str]]) -> Graph:
    """A single-threaded chain of filters for frames like this one."""
    graph = av.filter.Graph()
    graph.threads = 1
    nodes = [
        graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=time_base)
    ]
    nodes += [graph.add(name, options) if options else graph.add(name) for name, options in steps]
    graph.link_nodes(*nodes, graph.add("buffersink")).configure()
    return graph


def constant_rate(
    timed: Iterable[TimedFrame],
    *,
    start: float,
    end: float | None,
    source_fps: Fraction,
    fps: Fraction,
    config: TranscodeConfig,
    left_out: list[float] | None = None,
) -> Iterator[VideoFrame]:
    """Frames at a constant rate: slot k shows the last frame whose time rounds to k or earlier.

    The times, in seconds, of frames that no slot shows (``transcode.max_fps``) are added to ``left_out``.

    Raises:
        VideoDecodeError: the span is longer than ``config.max_seconds``.
    """
    rate = float(fps)
    last_slot = math.inf if end is None else round((end - start) * rate)
    limit = config.max_seconds * rate
    held: VideoFrame | None = None
    held_until = 0.0  # in slots
    slot = 0
    unseen: float | None = None  # time of the held frame while no slot shows it, if it belongs to the span
    left_out = [] if left_out is None else left_out
    for time, frame in timed:
        at = math.floor((time - start) * rate + ROUND_UP)
        if at > limit:
            raise VideoDecodeError(f"too long: more than {config.max_seconds:g} s; cut it into windows")
        while held is not None and slot < min(at, last_slot):
            yield held
            slot, unseen = slot + 1, None
        if unseen is not None:
            left_out.append(unseen)
        if slot >= last_slot:
            return
        unseen = time if at >= 0 else None
        held, held_until = frame, (time - start + _seconds_shown(frame, source_fps)) * rate
    if min(held_until, last_slot) > limit + 1:
        raise VideoDecodeError(f"too long: more than {config.max_seconds:g} s; cut it into windows")
    while held is not None and slot < min(held_until - SLOT_SLACK, last_slot):
        yield held
        slot, unseen = slot + 1, None
    if unseen is not None:
        left_out.append(unseen)


def _seconds_shown(frame: VideoFrame, source_fps: Fraction) -> float:
    """How long the last frame is shown: a slide's own duration, else that of any frame (durations are rounded)."""
    usual = 1 / float(source_fps)
    stated = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else usual
    return stated if stated > LONG_FRAME * usual else usual


def target_rate(source: Fraction, config: TranscodeConfig) -> Fraction:
    """Frame rate of the stored clip: the source's over the smallest whole number that brings it under the cap."""
    if config.fps is not None:
        return Fraction(config.fps).limit_denominator(1001)
    return source / max(1, math.ceil(source / Fraction(config.max_fps).limit_denominator(1001)))


def target_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Even size with the given short side and the same shape; a smaller picture keeps its size, made even."""
    scale = min(1.0, short_side / min(width, height))
    return (max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2)))


def turns(frame: VideoFrame) -> list[tuple[str, str]]:
    """The filters that show a frame as its display matrix asks, mirrored ones included, as the ffmpeg command does.

    The matrix is FFmpeg's: nine 32-bit integers (a b u, c d v, x y w), x' = a x + c y and y' = b x + d y. A matrix of
    zeros says nothing and is ignored.

    Raises:
        VideoDecodeError: it turns the picture by something else than a multiple of 90 degrees.
    """
    side = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(side, SideData):
        return []
    a, b, _, c, d, *_ = np.frombuffer(bytes(side)[:36], dtype=np.int32).tolist()
    if not (a or b) or not (c or d):
        return []
    if abs(b) < abs(a) / 50 and abs(c) < abs(d) / 50:
        return [(flip, "") for flip, negative in (("hflip", a < 0), ("vflip", d < 0)) if negative]
    if abs(a) < abs(b) / 50 and abs(d) < abs(c) / 50:
        direction = {(True, False): "clock", (False, True): "cclock", (True, True): "cclock_flip"}
        return [("transpose", direction.get((b > 0, c > 0), "clock_flip"))]
    raise VideoDecodeError(f"rotated by {frame.rotation % 360} degrees")


class Upright:
    """Brings frames to one size, upright, progressive, with square pixels, as yuv420p in BT.601 limited range."""

    def __init__(
        self, config: TranscodeConfig, time_base: Fraction, *, sample_aspect: Fraction | None
    ) -> None:
        self.config, self.time_base = config, time_base
        self.aspect = Fraction(sample_aspect) if sample_aspect else Fraction(1)
        self.rotation = 0
        self.emitted = 0
        self.ended = False  # every frame was asked for
        self._layout: tuple[object, ...] | None = None
        self._graph: Graph | None = None
        self._size: tuple[int, int] | None = None

    def frames(self, frames: Iterable[VideoFrame]) -> Iterator[VideoFrame]:
        previous: tuple[VideoFrame, VideoFrame] | None = None
        for frame in frames:
            if previous is not None and previous[0] is frame:
                upright = previous[1]
            else:
                upright = self._straighten(frame)
                previous = (frame, upright)
            self.emitted += 1
            yield upright
        self.ended = True

    def _straighten(self, frame: VideoFrame) -> VideoFrame:
        layout = (frame.width, frame.height, frame.format.name, tuple(turns(frame)),
                  frame.colorspace, frame.color_range)  # fmt: skip
        if self._graph is None or layout != self._layout:
            self._layout, self._graph = layout, self._build(frame)
        self._graph.push(frame)
        return self._graph.vpull()

    def _build(self, frame: VideoFrame) -> Graph:
        turn = turns(frame)
        width, height = max(1, round(frame.width * self.aspect)), frame.height
        if any(name == "transpose" for name, _ in turn):
            width, height = height, width
        if self._size is None:
            self._size = target_size(width, height, self.config.short_side_pixels)
            self.rotation = frame.rotation % 360 if turn else 0
        shape = self._size[0] / self._size[1]
        if abs(width / height / shape - 1) > max(ASPECT_TOLERANCE, 2 / min(self._size)):
            raise VideoDecodeError("the picture changes its shape inside the clip")
        scale = f"{self._size[0]}:{self._size[1]}:flags=bicubic:out_color_matrix=bt601:out_range=tv"
        steps = [*turn, ("scale", scale), ("format", "pix_fmts=yuv420p"), ("setsar", "1")]
        return _graph(frame, self.time_base, steps)
