"""Test views of video files that are in no shard: whole, or in windows sliding over a long one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from cliplift.configs.data import DataConfig
from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import FlowConfig, TranscodeConfig
from cliplift.configs.sources import VIDEO_SUFFIXES
from cliplift.pipelines.data.batch import NUM_DRAWS, OUTSIDE_TRAINING, ClipBatch
from cliplift.pipelines.data.clip_plan import cut, view_boxes, view_frames
from cliplift.sharding.scratch import scratch_folder
from cliplift.sharding.sources.files import find_files, sort_out, warn_left_out
from cliplift.sharding.storage import StorageError, is_out_of_space, open_store
from cliplift.sharding.video.decode import Frames, VideoDecodeError, decode_frames, probe
from cliplift.sharding.video.flow import decode_flow, flow_member
from cliplift.sharding.video.transcode import EncodedClip, SpanCutter, transcode_span

Value = TypeVar("Value")

# The form a file is brought to before it is seen: that of shards, of any length up to an hour.
FOREIGN = TranscodeConfig(min_frames=1, max_seconds=3600.0)


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


def read_each(videos: Iterable[str], read: Callable[[str], Value]) -> Iterator[tuple[str, Value | None]]:
    """Every video with what ``read`` makes of it; None, and a line on stderr, where it cannot be read."""
    for video in videos:
        try:
            value = read(video)
        except (VideoDecodeError, StorageError, OSError) as error:
            if is_out_of_space(error):  # the disk's fault, not this video's: the next would fail too
                raise
            print(f"cliplift: {video}: cannot be read: {error}", file=sys.stderr)
            yield video, None
        else:
            yield video, value


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


def clips_of_video(path: Path, data: DataConfig) -> ClipBatch:
    """All test views of a local video file that is in no shard. Raises VideoDecodeError."""
    return clips_of_stored(transcode_span(path, start_seconds=0.0, end_seconds=None, config=FOREIGN), data)


def clips_of_stored(stored: EncodedClip, data: DataConfig) -> ClipBatch:
    """All test views of a clip that was brought to the form shards have by ``FOREIGN``.

    Upright, square pixels, constant rate: the network sees what it was trained on. Flow is computed with the default
    method and range. Raises VideoDecodeError.
    """
    if data.modality == "flow":
        member = flow_member(stored.data, FlowConfig(), FOREIGN)
        frames = decode_flow(member, range(stored.checked.frames), decoder=data.decoder)
    else:
        frames = decode_frames(stored.data, range(stored.checked.frames), decoder=data.decoder)
    return clips_of_frames(frames, data, fps=float(stored.checked.fps))


def clips_of_frames(frames: Frames, data: DataConfig, *, fps: float) -> ClipBatch:
    """All test views of a decoded video (N, H, W, C) of a constant rate, frames/s."""
    clips = view_frames(
        data.sampling,
        num_frames=len(frames),
        fps=fps,
        clips=data.views.clips,
        from_start=data.views.position == "from_start",
        every_frames=data.views.every_frames,
    )
    boxes = view_boxes(data, height=frames.shape[1], width=frames.shape[2], crops=data.views.crops)
    cuts = [cut(frames[numbers], box, pixels=data.crop_pixels) for numbers in clips for box in boxes]
    B = len(cuts)
    return ClipBatch(
        clips=torch.stack(cuts),
        labels=torch.full((B,), -1),
        sample_index=torch.zeros(B, dtype=torch.int64),
        video_index=torch.zeros(B, dtype=torch.int64),
        views=torch.arange(B),
        draws=torch.full((B, NUM_DRAWS), 0.5),
        epochs=torch.full((B,), OUTSIDE_TRAINING),
        positions=torch.arange(B),
    )


def sliding_windows(
    path: Path, data: DataConfig, *, window_seconds: float, stride_seconds: float
) -> Iterator[tuple[float, float, ClipBatch]]:
    """(start, end, views) of windows over a local file, in seconds; only one window is decoded at a time.

    The last window ends at the end of the video; a video shorter than a window is one window. Raises VideoDecodeError.
    """
    duration = duration_of(path)
    starts = np.arange(0.0, max(duration - window_seconds, 0.0) + 1e-6, stride_seconds).tolist()
    if starts[-1] + window_seconds < duration - 1e-6:
        starts.append(duration - window_seconds)
    with SpanCutter(path, FOREIGN) as cutter:
        for start in starts:
            end = min(start + window_seconds, duration)
            stored = cutter.cut(start_seconds=start, end_seconds=None if end >= duration - 1e-6 else end)
            yield start, end, clips_of_stored(stored, data)


def window_around(
    path: Path, data: DataConfig, centre_seconds: float, *, window_seconds: float
) -> tuple[float, float, ClipBatch]:
    """(start, end, views) of the one window around a time, which lies inside the file. Raises VideoDecodeError."""
    start = max(centre_seconds - window_seconds / 2, 0.0)
    end = start + window_seconds
    stored = transcode_span(path, start_seconds=start, end_seconds=end, config=FOREIGN)
    return start, end, clips_of_stored(stored, data)


def duration_of(path: Path) -> float:
    """Length of a local file, seconds. Raises VideoDecodeError where its container does not say it."""
    duration = probe(path).duration_seconds
    if duration is None:
        raise VideoDecodeError(
            f"{path}: its container does not say how long it is, which sliding windows need"
        )
    return duration
