"""A video decoded forwards for spans that come in order of their starts.

mp4 and Matroska are entered near each span. Transport and program streams, AVI, FLV and WMV have no index to trust:
they are decoded from their first frame on, once for all spans that do not overlap, so that the cost grows with the
length of the video and not with its square. Every span gets the frames that decoding from the start would give it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from av.error import FFmpegError

from cliplift.configs.sharding import TranscodeConfig
from cliplift.sharding.video.cuts import HEARTBEAT_SECONDS
from cliplift.sharding.video.decode import VideoDecodeError, frame_rate, open_container, video_stream
from cliplift.sharding.video.regular_frames import (
    FALLBACK_FPS,
    ROUND_UP,
    TimedFrame,
    is_seekable,
    progressive_frames,
    rising_times,
    target_rate,
    timed_frames,
)

# Windows that overlap k-fold take k decoders at once, for each begins behind the one before. A decoder keeps the
# pictures that others refer to and those it has to put in order, 16 each at most, and there are usually fewer.
FEWEST_PASSES, MOST_PASSES = 8, 64
PICTURES_KEPT, DECODER_BYTES = 24, 512 << 20


def most_passes(width_pixels: int, height_pixels: int) -> int:
    """Decoders that may be under way in a video; beyond, a window is decoded from the start of the file."""
    picture_bytes = max(1, 2 * width_pixels * height_pixels)
    return min(MOST_PASSES, max(FEWEST_PASSES, DECODER_BYTES // (PICTURES_KEPT * picture_bytes)))


class Pass:
    """One decoder on its way through a video.

    Attributes:
        container, stream: the open video.
        time_base: unit of the stream's time stamps, seconds.
        source_fps, fps: frames/s of the video and of the stored clips.
        sample_aspect: width over height of a pixel, as the header says.
        clock: what turned the time stamps into times so far.
    """

    def __init__(
        self, path: str | Path, config: TranscodeConfig, *, start: float, alive: Callable[[], None]
    ) -> None:
        self._alive = alive
        self.container = open_container(path)
        try:
            self.stream = video_stream(self.container)
            if self.stream.time_base is None:
                raise VideoDecodeError("decode: the stream states no time base")
            self.time_base = self.stream.time_base
            self.stream.codec_context.thread_count = 1
            self.source_fps = frame_rate(self.stream) or FALLBACK_FPS
            self.fps = target_rate(self.source_fps, config)
            self.sample_aspect = self.stream.sample_aspect_ratio
            self.clock = rising_times(self.container, self.source_fps)
            self.enters = is_seekable(self.container, self.stream)
        except BaseException:
            self.container.close()
            raise
        timed = timed_frames(
            self.container,
            self.stream,
            start_seconds=start,
            source_fps=self.source_fps,
            clock=self.clock,
        )
        self._timed = progressive_frames(timed, config, time_base=self.time_base)
        # The frame that a span ended before, and the one shown until then: the next span may begin with either.
        self._last: deque[TimedFrame] = deque(maxlen=2)
        self._damage: str | None = None
        self._broken = False

    def close(self) -> None:
        """Close the file."""
        self._last.clear()
        self.container.close()

    @property
    def position(self) -> float:
        """Time of the first frame that can still be had, seconds."""
        return self._last[0][0] if self._last else 0.0

    def reaches(self, start: float) -> bool:
        """Whether all frames of a span from ``start`` seconds on can still be had."""
        # The first frame a span shows is the last one that falls in its first slot or before, see constant_rate.
        ahead = not self._last or (self.position - start) * float(self.fps) + ROUND_UP < 1
        return ahead and not self.enters and not self._broken

    def frames(self, start: float) -> Iterator[TimedFrame]:
        """Frames and their times, seconds, from one that a span from ``start`` on begins with.

        Raises:
            VideoDecodeError: a frame is damaged; again for every later span.
        """
        yield from tuple(self._last)
        last_alive = self.position
        while (timed := self._next()) is not None:
            if timed[0] < start and timed[0] - last_alive > HEARTBEAT_SECONDS:
                last_alive = timed[0]
                self._alive()
            yield timed

    def _next(self) -> TimedFrame | None:
        if self._damage is not None:
            raise VideoDecodeError(self._damage)
        try:
            timed = next(self._timed, None)
        except VideoDecodeError as error:
            self._damage = str(error)
            raise
        except FFmpegError as error:
            self._damage = f"decode: {error.strerror}"
            raise VideoDecodeError(self._damage) from error
        except BaseException:  # out of memory, say: a later span should try again
            self._broken = True
            raise
        if timed is not None:
            self._last.append(timed)
        return timed


class Passes:
    """The decoders under way in one video file.

    Args:
        path: local video file.
        config: how frames are made regular.
        alive: called now and then while frames before a span are passed over.
    """

    def __init__(
        self, path: str | Path, config: TranscodeConfig, *, alive: Callable[[], None] = lambda: None
    ) -> None:
        self._path, self._config, self._alive = path, config, alive
        self._open: list[Pass] = []

    def to(self, start: float) -> Pass:
        """The decoder nearest before ``start`` seconds, or one more.

        Raises:
            VideoDecodeError: the file is not a readable video.
        """
        found = max(
            (one for one in self._open if one.reaches(start)), key=lambda one: one.position, default=None
        )
        if found is not None:
            return found
        most = most_passes(self._open[0].stream.width, self._open[0].stream.height) if self._open else 1
        for one in [one for one in self._open if one.enters] or self._open[most - 1 :]:
            self._open.remove(one)
            one.close()
        self._open.append(Pass(self._path, self._config, start=start, alive=self._alive))
        return self._open[-1]

    def close(self) -> None:
        """Close all of them."""
        while self._open:
            self._open.pop().close()
