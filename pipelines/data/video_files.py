"""Test views of video files that are in no shard: whole, or in windows sliding over a long one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cliplift.configs.data import DataConfig
from cliplift.configs.sections import ConfigError
from cliplift.configs.sources import VIDEO_SUFFIXES
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.data.source import FOREIGN, clips_of_stored, clips_of_video
from cliplift.sharding.scratch import scratch_folder
from cliplift.sharding.sources.files import find_files, sort_out, warn_left_out
from cliplift.sharding.storage import open_store
from cliplift.sharding.video.decode import VideoDecodeError, probe
from cliplift.sharding.video.transcode import SpanCutter


def video_names(names: tuple[str, ...]) -> Iterator[str]:
    """Files as given, folders expanded to the videos that a shard build of them takes, in sorted order."""
    if not names:
        raise ConfigError("names no video", key="videos", hint="give files or folders after the run")
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside, left_out = sort_out(find_files(open_store(name)), VIDEO_SUFFIXES)
            warn_left_out(name, left_out)
            if not inside:
                raise ConfigError(f"{name!r} holds no video file", key="videos", value=name)
            yield from map(str, sorted(path / file for file in inside))
        else:
            yield name


@contextlib.contextmanager
def local_copy(video: str) -> Iterator[Path]:
    """A local file as it is; anything behind a URL as a temporary copy."""
    if "://" not in video:
        yield Path(video)
        return
    folder, _, name = video.rpartition("/")
    with scratch_folder() as scratch:
        open_store(folder).fetch(name, scratch / "video")
        yield scratch / "video"


def views_of_video(video: str, data: DataConfig) -> ClipBatch:
    """All test views of a file or URL. Raises VideoDecodeError."""
    with local_copy(video) as path:
        return clips_of_video(path, data)


def sliding_windows(
    path: Path, data: DataConfig, *, window_seconds: float, stride_seconds: float
) -> Iterator[tuple[float, float, ClipBatch]]:
    """(start, end, views) of windows over a local file, in seconds; only one window is decoded at a time.

    The last window ends at the end of the video; a video shorter than a window is one window. Raises VideoDecodeError.
    """
    duration = probe(path).duration_seconds
    if duration is None:
        raise VideoDecodeError(
            f"{path}: its container does not say how long it is, which sliding windows need"
        )
    starts = np.arange(0.0, max(duration - window_seconds, 0.0) + 1e-6, stride_seconds).tolist()
    if starts[-1] + window_seconds < duration - 1e-6:
        starts.append(duration - window_seconds)
    with SpanCutter(path, FOREIGN) as cutter:
        for start in starts:
            end = min(start + window_seconds, duration)
            stored = cutter.cut(start_seconds=start, end_seconds=None if end >= duration - 1e-6 else end)
            yield start, end, clips_of_stored(stored, data)
