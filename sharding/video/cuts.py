"""Where a video is cut into clips: whole, in windows of one length, or where the shot changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from av.error import FFmpegError
from av.video.frame import VideoFrame

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import Cut, ShotsCut, WholeCut, WindowsCut
from cliplift.sharding.video.decode import (
    Frames,
    VideoDecodeError,
    claimed_seconds,
    demuxed_packets,
    frame_rate,
    open_container,
    video_stream,
)
from cliplift.sharding.video.regular_frames import FALLBACK_FPS, JUMPING, rising_times, timed_frames

if TYPE_CHECKING:
    from scenedetect import SceneDetector

Span = tuple[float, float | None]

# The detectors look at small pictures, as PySceneDetect's own command does.
DETECTOR_WIDTH_PIXELS = 256
HEARTBEAT_SECONDS = 60.0  # of video
BYTES_PER_FRAME = (
    4  # no codec writes frames this small for long: more of them come from a decoder gone astray
)


def require_cutter(cut: Cut) -> None:
    """Check that what the cut needs is installed, before a build starts.

    Raises:
        ConfigError: PySceneDetect is missing.
    """
    if isinstance(cut, ShotsCut) and (find_spec("scenedetect") is None or find_spec("cv2") is None):
        raise ConfigError(
            "PySceneDetect is not installed",
            key="cut.kind",
            value="shots",
            hint="pip install 'cliplift[shots]'",
        )


def spans(
    cut: Cut, path: Path, *, start: float, end: float | None, alive: Callable[[], None] = lambda: None
) -> list[Span]:
    """The clips a video is cut into, as (start, end) in seconds after its first frame; end None is its end.

    Args:
        cut: how to cut.
        path: local video file.
        start: start of the part to cut, seconds.
        end: its end, seconds; None is the end of the video.
        alive: called now and then while a long video is searched for shots.

    Raises:
        VideoDecodeError: the video states no length, is too short, or cannot be decoded.
    """
    if isinstance(cut, WholeCut):
        return [(start, end)]
    if isinstance(cut, ShotsCut):
        found = _shots(cut, path, start=start, end=end, alive=alive)
    else:
        found = _windows(cut, start=start, end=end, seconds=_length_seconds(path))
    limit = cut.max_per_video
    if limit is not None and len(found) > limit:
        found = [found[(2 * i + 1) * len(found) // (2 * limit)] for i in range(limit)]
    return found


def _length_seconds(path: Path) -> float | None:
    """Length of a video, seconds: the container's, except where its time stamps jump, which its packets tell.

    Where the file states no length of the pictures alone, as in FLV with sound, the container's is an upper bound.
    """
    with open_container(path) as container:
        stream = video_stream(container)
        claimed = claimed_seconds(container, stream)
        if claimed is None and container.duration:
            claimed = float(container.duration / 1_000_000)
        if container.format.name not in JUMPING or stream.time_base is None:
            return claimed
        clock = rising_times(container, frame_rate(stream) or FALLBACK_FPS)
        first: float | None = None
        for packet in demuxed_packets(container, stream):
            if packet.size and packet.dts is not None:
                now = clock.time(float(packet.dts * stream.time_base))
                first = now if first is None else first
    if not clock.shift or clock.previous is None or first is None:
        return claimed
    return clock.previous - first + clock.step


def _windows(cut: WindowsCut, *, start: float, end: float | None, seconds: float | None) -> list[Span]:
    stop = min((e for e in (end, seconds) if e is not None), default=None)
    if stop is None:
        raise VideoDecodeError("the container states no length, so it cannot be cut into windows")
    found = _evenly(
        start, stop, cut.length_seconds, cut.stride_seconds or cut.length_seconds, cut.min_seconds
    )
    if not found:
        raise VideoDecodeError(f"too short: {stop - start:.2f} s hold no window of {cut.min_seconds:g} s")
    return found


def _evenly(start: float, stop: float, length: float, stride: float, least: float) -> list[Span]:
    found: list[Span] = []
    at = start
    # A millisecond of slack: 3.999 s of video hold a window of 4 s whose last frame starts before the end.
    while at + min(least, length) <= stop + 1e-3:
        found.append((round(at, 6), round(min(at + length, stop), 6)))
        at = start + len(found) * stride
    return found


def _shots(
    cut: ShotsCut, path: Path, *, start: float, end: float | None, alive: Callable[[], None]
) -> list[Span]:
    """The shots, each shown from its first frame until the next one's; long ones in pieces, short ones left out."""
    bounds = list(shot_bounds(cut, path, start=start, end=end, alive=alive))
    found: list[Span] = []
    for first, last in itertools.pairwise(bounds):
        if last - first < cut.min_seconds - 1e-3:
            continue
        length = cut.max_seconds if cut.max_seconds is not None else last - first
        found += _evenly(first, last, length, length, cut.min_seconds)
    if not found:
        raise VideoDecodeError(f"too short: no shot of {cut.min_seconds:g} s")
    return found


def shot_bounds(
    cut: ShotsCut, path: Path, *, start: float, end: float | None, alive: Callable[[], None]
) -> Iterator[float]:
    """Times at which shots begin, seconds after the first frame of the video, and the end of the last one."""
    try:
        yield from _detected(cut, path, start=start, end=end, alive=alive)
    except FFmpegError as error:
        raise VideoDecodeError(f"decode: {error.strerror}") from error


def _detected(
    cut: ShotsCut, path: Path, *, start: float, end: float | None, alive: Callable[[], None]
) -> Iterator[float]:
    from scenedetect import FrameTimecode

    detector = _detector(cut)
    most_frames = max(1000, path.stat().st_size // BYTES_PER_FRAME)
    times: list[float] = []
    cuts: set[int] = set()
    with open_container(path) as container:
        stream = video_stream(container)
        stream.codec_context.thread_count = 1
        fps = frame_rate(stream)
        if fps is None:
            raise VideoDecodeError("the container states no frame rate, so its shots cannot be timed")
        last_alive = start
        for time, frame in timed_frames(container, stream, start_seconds=start, source_fps=fps):
            if time < start - 0.5 / float(fps):
                continue
            if end is not None and time >= end - 0.5 / float(fps):
                break
            if len(times) > most_frames:
                raise VideoDecodeError(f"decode: more than {most_frames} frames come out of the file")
            times.append(time)
            # The detector counts frames, whatever their times: its numbers index `times`.
            now = FrameTimecode(timecode=len(times) - 1, fps=float(fps))
            cuts.update(found.frame_num for found in detector.process_frame(now, _small(frame)))
            if time - last_alive > HEARTBEAT_SECONDS:
                last_alive = time
                alive()
    if not times:
        raise VideoDecodeError("decode: no frame in the span")
    cuts.update(found.frame_num for found in detector.post_process(now))
    yield times[0]
    yield from (times[number] for number in sorted(cuts) if 0 < number < len(times))
    yield times[-1] + 1 / float(fps)


def _detector(cut: ShotsCut) -> SceneDetector:
    import cv2
    from scenedetect.detectors import AdaptiveDetector, ContentDetector

    cv2.setNumThreads(1)
    # Every cut is wanted: what is too short is left out afterwards, not joined to a neighbour.
    if cut.detector == "content":
        return ContentDetector(
            min_scene_len=1, **({} if cut.threshold is None else {"threshold": cut.threshold})
        )
    return AdaptiveDetector(
        min_scene_len=1, **({} if cut.threshold is None else {"adaptive_threshold": cut.threshold})
    )


def _small(frame: VideoFrame) -> Frames:
    width = min(frame.width, DETECTOR_WIDTH_PIXELS)
    height = max(1, round(frame.height * width / frame.width))
    small = frame.reformat(width=width, height=height, format="bgr24", interpolation="AREA")
    return small.to_ndarray().astype(np.uint8, copy=False)
