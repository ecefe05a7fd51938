"""Which frames of a stored video make a clip. Frame numbers only; nothing is decoded here."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cliplift.configs.data import SamplingConfig

Ints = npt.NDArray[np.int64]


def training_frames(
    sampling: SamplingConfig, *, num_frames: int, fps: float, draw: npt.NDArray[np.float64]
) -> Ints:
    """Frame numbers (T,) of a training clip.

    Args:
        sampling: the temporal sampling.
        num_frames: frames of the stored video.
        fps: its constant rate, frames/s.
        draw: T + 1 uniform numbers in [0, 1): the start, and the jitter of each segment.
    """
    if sampling.mode == "segments":
        return _segments(sampling.frames, num_frames, draw[1 : sampling.frames + 1])
    slack = _slack(sampling, num_frames, fps)
    start = min(slack, int(draw[0] * (slack + 1)))
    return _dense(sampling, num_frames, fps, start)


def view_frames(
    sampling: SamplingConfig,
    *,
    num_frames: int,
    fps: float,
    clips: int,
    from_start: bool = False,
    every_frames: int | None = None,
) -> list[Ints]:
    """Frame numbers of the test clips: spread uniformly over the video, the middle one where there is one.

    ``from_start``: clip i of n begins at share i/n of the possible starts instead, so that one clip begins
    at the first frame (the released TimeSformer code). Segments cover the whole video either way.
    ``every_frames``: clips begin at every n-th frame; a video shorter than a clip is one.
    """
    if sampling.mode == "segments":
        shifts = (np.arange(clips) + 0.5) / clips
        return [_segments(sampling.frames, num_frames, np.full(sampling.frames, shift)) for shift in shifts]
    slack = _slack(sampling, num_frames, fps)
    if every_frames is not None:
        return [_dense(sampling, num_frames, fps, at) for at in range(0, slack + 1, every_frames)]
    if from_start:
        return [_dense(sampling, num_frames, fps, slack * i // clips) for i in range(clips)]
    starts = [slack // 2] if clips == 1 else np.round(np.linspace(0, slack, clips)).astype(int).tolist()
    return [_dense(sampling, num_frames, fps, int(start)) for start in starts]


def _step(sampling: SamplingConfig, fps: float) -> float:
    """Distance of sampled frames, in stored frames; a target rate resamples by time."""
    return sampling.stride * (fps / sampling.fps if sampling.fps is not None else 1.0)


def _slack(sampling: SamplingConfig, num_frames: int, fps: float) -> int:
    """How many frames later than frame 0 a clip can start and still fit; 0 for a video shorter than a clip."""
    span = int(np.floor((sampling.frames - 1) * _step(sampling, fps) + 1e-9)) + 1
    return max(0, num_frames - span)


def _dense(sampling: SamplingConfig, num_frames: int, fps: float, start: int) -> Ints:
    at = start + np.floor(np.arange(sampling.frames) * _step(sampling, fps) + 1e-9).astype(np.int64)
    inside: Ints = at % num_frames if sampling.short_clips == "loop" else np.minimum(at, num_frames - 1)
    return inside


def _segments(frames: int, num_frames: int, shifts: npt.NDArray[np.float64]) -> Ints:
    """One frame from each of T equal parts (TSN, arXiv 1608.00859); short videos repeat frames."""
    at: Ints = np.floor((np.arange(frames) + shifts) * num_frames / frames).astype(np.int64)
    return at.clip(max=num_frames - 1)
