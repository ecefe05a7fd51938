"""Temporal sampling against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cliplift.configs.data import DataConfig, SamplingConfig
from cliplift.pipelines.data.clip_plan import doubts_about, training_frames, view_frames


def draw(value: float, frames: int = 16) -> np.ndarray:
    return np.full(frames + 1, value)


def test_dense_clips_start_anywhere_they_fit() -> None:
    sampling = SamplingConfig(frames=4, stride=2)  # spans 7 frames: starts 0 to 3 in a video of 10
    starts = [
        training_frames(sampling, num_frames=10, fps=30, draw=draw(d))[0] for d in (0.0, 0.26, 0.51, 0.999)
    ]
    assert starts == [0, 1, 2, 3]
    assert training_frames(sampling, num_frames=10, fps=30, draw=draw(0.999)).tolist() == [3, 5, 7, 9]


def test_a_short_video_loops_or_holds() -> None:
    loop = SamplingConfig(frames=6, stride=2, short_clips="loop")
    hold = SamplingConfig(frames=6, stride=2, short_clips="hold")
    assert training_frames(loop, num_frames=5, fps=30, draw=draw(0.9)).tolist() == [0, 2, 4, 1, 3, 0]
    assert training_frames(hold, num_frames=5, fps=30, draw=draw(0.9)).tolist() == [0, 2, 4, 4, 4, 4]


def test_a_target_rate_is_sampled_by_time() -> None:
    halved = SamplingConfig(frames=4, stride=1, fps=12.5)
    assert view_frames(halved, num_frames=7, fps=25, clips=1)[0].tolist() == [0, 2, 4, 6]
    ntsc = SamplingConfig(frames=5, stride=1, fps=12)  # 29.97 / 12 = 2.4975 stored frames apart
    assert view_frames(ntsc, num_frames=10, fps=29.97, clips=1)[0].tolist() == [0, 2, 4, 7, 9]


def test_segments_take_one_frame_of_each_part() -> None:
    sampling = SamplingConfig(frames=4, mode="segments")
    shifts = np.array([0.9, 0.0, 0.5, 0.99, 0.0])  # the first draw is the dense start, unused here
    assert training_frames(sampling, num_frames=40, fps=30, draw=shifts).tolist() == [0, 15, 29, 30]
    assert view_frames(sampling, num_frames=40, fps=30, clips=1)[0].tolist() == [5, 15, 25, 35]


@pytest.mark.parametrize("num_frames", [16, 37, 100, 101])
def test_the_two_test_clips_of_videomae(num_frames: int) -> None:
    """Their index sets for Something-Something: int(tick * x), and int(tick / 2 + tick * x)."""
    tick = num_frames / 16
    expected = [[int(tick * x) for x in range(16)], [int(tick / 2 + tick * x) for x in range(16)]]
    sampling = SamplingConfig(frames=16, mode="segments")
    found = view_frames(sampling, num_frames=num_frames, fps=30, clips=2, from_start=True)
    assert [view.tolist() for view in found] == expected


def test_views_are_spread_from_start_to_end() -> None:
    sampling = SamplingConfig(frames=2, stride=1)
    found = [view.tolist() for view in view_frames(sampling, num_frames=12, fps=30, clips=3)]
    assert found == [[0, 1], [5, 6], [10, 11]]
    assert view_frames(sampling, num_frames=12, fps=30, clips=1)[0].tolist() == [5, 6]


@given(
    frames=st.integers(1, 40),
    stride=st.integers(1, 8),
    num_frames=st.integers(1, 300),
    fps=st.floats(5, 60),
    target=st.one_of(st.none(), st.floats(2, 60)),
    mode=st.sampled_from(["dense", "segments"]),
    short=st.sampled_from(["loop", "hold"]),
    value=st.floats(0, 1, exclude_max=True),
)
def test_every_frame_asked_for_exists(
    *,
    frames: int,
    stride: int,
    num_frames: int,
    fps: float,
    target: float | None,
    mode: str,
    short: str,
    value: float,
) -> None:
    sampling = SamplingConfig.model_validate(
        {"frames": frames, "stride": stride, "fps": target, "mode": mode, "short_clips": short}
    )
    clips = [training_frames(sampling, num_frames=num_frames, fps=fps, draw=draw(value, frames))]
    clips += view_frames(sampling, num_frames=num_frames, fps=fps, clips=3)
    for clip in clips:
        assert len(clip) == frames
        assert clip.min() >= 0
        assert clip.max() < num_frames


@pytest.mark.parametrize("clips", [1, 2, 5])
def test_a_video_of_one_frame_is_that_frame(clips: int) -> None:
    for view in view_frames(SamplingConfig(frames=4), num_frames=1, fps=30, clips=clips):
        assert view.tolist() == [0, 0, 0, 0]


def test_every_frames_covers_the_video_with_whole_clips() -> None:
    sampling = SamplingConfig(frames=4, stride=2)  # spans 7 frames
    found = view_frames(sampling, num_frames=25, fps=30, clips=1, every_frames=8)
    assert [view.tolist() for view in found] == [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18, 20, 22]]
    (short,) = view_frames(sampling, num_frames=5, fps=30, clips=1, every_frames=8)
    assert short.tolist() == view_frames(sampling, num_frames=5, fps=30, clips=1)[0].tolist()


SIDED = ("Pushing something from left to right", "Pushing something from right to left")
TEMPLATES = (*SIDED, *(f"Doing {n} to something" for n in range(28)))


@pytest.mark.parametrize(
    ("classes", "data", "keys"),
    [
        (TEMPLATES, {"augment": {"flip": True}}, ["data.augment.flip", "data.sampling.mode"]),
        (TEMPLATES, {"augment": {"flip": False}, "sampling": {"mode": "segments"}}, []),
        (SIDED, {"augment": {"flip": True, "flip_label_pairs": [SIDED]}}, []),
        (SIDED, {"augment": {"flip": False}, "views": {"crops": 10}}, ["data.views.crops"]),
        (("swipe_left", "wave"), {"augment": {"flip": True}}, ["data.augment.flip"]),
        (("lefties", "bright lights", "something"), {"augment": {"flip": True}}, []),
    ],
)
def test_what_is_allowed_and_most_likely_a_mistake(
    classes: tuple[str, ...], data: dict[str, object], keys: list[str]
) -> None:
    """A mirror where classes tell left from right, and parts of Something-Something's videos."""
    found = list(doubts_about(DataConfig.model_validate({"shards": "a"} | data), classes))
    assert [key for key, _ in found] == keys
    if classes is TEMPLATES and "data.augment.flip" in keys:
        assert (
            "'pushing something from left to right' is 'pushing something from right to left'" in found[0][1]
        )
