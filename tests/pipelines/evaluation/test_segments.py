"""What happens when in a long video: ends right to a frame, and memory that does not follow the length."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from cliplift.configs.runs import PredictRun
from cliplift.configs.sections import ConfigError
from cliplift.models.protocol import InputSpec, VideoNetwork
from cliplift.pipelines.evaluation import predict
from cliplift.pipelines.evaluation.predict import run_predict
from cliplift.pipelines.evaluation.segments import (
    Present,
    Probabilities,
    Segment,
    Window,
    dump_segments,
    present,
    refined,
    segments,
)

RATE = 5  # frames/s of the films


def single(probabilities: Probabilities) -> Present:
    return present(probabilities, threshold=None, multi_label=False)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.floats(1.01, 9.0), min_size=1, max_size=8),
    step=st.floats(0.1, 0.9),
    precision=st.sampled_from([0.5, 0.04, 0.001]),
)
def test_ends_are_found_to_the_precision_asked_for(
    lengths: list[float], step: float, precision: float
) -> None:
    """Stretches longer than a step, each of another class than the one before."""
    ends = list(itertools.accumulate(lengths))
    duration = ends[-1]

    def look(time: float) -> Window:
        part = int(np.searchsorted(ends, time, side="right"))
        return Window(time - 0.5, time + 0.5, np.eye(3, dtype=np.float32)[part % 3])

    slid = [look(time) for time in np.arange(0.0, duration, step).tolist()]
    times = [one.centre_seconds for one in refined(slid, look, single, precision_seconds=precision)]
    assert times == sorted(times)
    found = list(
        segments(refined(slid, look, single, precision_seconds=precision), single, duration_seconds=duration)
    )
    assert [one.label for one in found] == [part % 3 for part in range(len(lengths))]
    assert [one.end_seconds for one in found] == pytest.approx(ends, abs=precision / 2 + 1e-9)
    assert [one.start_seconds for one in found] == [0.0, *(one.end_seconds for one in found[:-1])]
    assert [one.score for one in found] == pytest.approx([1.0] * len(found))


def windows(*probabilities: Sequence[float]) -> list[Window]:
    return [Window(k, k + 1.0, np.array(row, dtype=np.float32)) for k, row in enumerate(probabilities)]


def test_of_several_labels_each_has_its_own_segments() -> None:
    slid = windows((0.9, 0.2), (0.7, 0.6), (0.1, 0.8), (0.5, 0.1))

    def shown(row: Probabilities) -> Present:
        return present(row, threshold=None, multi_label=True)

    found = sorted(segments(slid, shown, duration_seconds=4.0))
    assert [one[:3] for one in found] == [(0.0, 2.0, 0), (1.0, 3.0, 1), (3.0, 4.0, 0)]
    assert [one.score for one in found] == pytest.approx([0.8, 0.7, 0.5])


def test_below_the_threshold_there_is_nothing_and_a_score_is_a_mean_over_time() -> None:
    # Centres at 0.5, 1.5, 2.5 and 3.5: the ends are halfway, the first and last stand for the rest.
    slid = windows((0.9, 0.1), (0.6, 0.4), (0.55, 0.45), (0.2, 0.8))

    def shown(row: Probabilities) -> Present:
        return present(row, threshold=0.58, multi_label=False)

    first, last = segments(slid, shown, duration_seconds=4.5)
    assert first[:3] == (0.0, 2.0, 0)
    assert first.score == pytest.approx((0.9 * 1 + 0.6 * 1) / 2)
    assert last[:3] == (3.0, 4.5, 1)
    assert list(segments([], shown, duration_seconds=1.0)) == []


FOUND = [("a,b.mp4", [Segment(0.0, 3661.5, 1, 0.98765), Segment(3661.5, 3662.0, 0, 0.5)])]


def test_csv_and_json_hold_every_segment() -> None:
    rows = list(csv.DictReader(io.StringIO(dump_segments(FOUND, ("x", 'say "y"'), suffix=".csv"))))
    assert rows == [
        {"video": "a,b.mp4", "start_seconds": "0.0", "end_seconds": "3661.5", "class": 'say "y"', "score": "0.9877"},
        {"video": "a,b.mp4", "start_seconds": "3661.5", "end_seconds": "3662.0", "class": "x", "score": "0.5"},
    ]  # fmt: skip
    (video,) = json.loads(dump_segments(FOUND, ("x", "y"), suffix=".json"))
    assert video["video"] == "a,b.mp4"
    assert video["segments"][1] == {
        "start_seconds": 3661.5,
        "end_seconds": 3662.0,
        "class": "x",
        "score": 0.5,
    }


def test_webvtt_is_as_its_standard_has_it() -> None:
    """Hours, minutes, seconds and thousandths; no markup, arrow or empty line in a cue's text."""
    text = dump_segments(FOUND, ("<b>in\n\n--> & out", "y"), suffix=".vtt")
    assert text == (
        "WEBVTT\n\n00:00:00.000 --> 01:01:01.500\ny 0.99\n\n"
        "01:01:01.500 --> 01:01:02.000\n&lt;b&gt;in --&gt; &amp; out 0.50\n"
    )


class Brightness(VideoNetwork):
    """``bright`` where the mean of a clip is above the middle; remembers this process's own memory."""

    feature_dim, num_classes = 1, 2
    input_spec = InputSpec.square(32, frames=4, frame_stride=1, mean=(0.5,) * 3, std=(0.5,) * 3)

    def __init__(self) -> None:
        super().__init__()
        self.own_mib: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        status = Path("/proc/self/status").read_text()
        self.own_mib.append(int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) / 1024)
        mean = x.mean(dim=(1, 2, 3, 4))
        return torch.stack([-9 * mean, 9 * mean], dim=1)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Brightness:
    found = Brightness()
    card = {"classes": ("dark", "bright"), "sampling": {"frames": 4, "stride": 1}, "crop_pixels": 32}
    monkeypatch.setattr(predict, "load_finished", lambda _run: (found, None, card))
    return found


def film(path: Path, changes: Sequence[int], frames: int) -> Path:
    """Dark at first; at every frame of ``changes`` it turns bright or dark."""
    with av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=RATE, options={"preset": "ultrafast"})
        stream.width, stream.height = 48, 32
        pictures = [
            av.VideoFrame.from_ndarray(np.full((32, 48, 3), level, dtype=np.uint8)) for level in (20, 220)
        ]
        for frame in range(frames):
            picture = pictures[sum(frame >= change for change in changes) % 2]
            picture.pts = None
            target.mux(stream.encode(picture))
        target.mux(stream.encode())
    return path


def check_ends(found: list[dict[str, Any]], changes: Sequence[int], frames: int) -> None:
    assert [one["class"] for one in found] == [
        ("dark", "bright")[part % 2] for part in range(len(changes) + 1)
    ]
    ends = [round(one["end_seconds"] * RATE, 3) for one in found]
    assert ends == pytest.approx([*changes, frames], abs=1.0), "right to a frame"


def test_segments_of_a_real_video_are_right_to_a_frame(
    tmp_path: Path, network: Brightness, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = (61, 133, 160)
    video = film(tmp_path / "a.mp4", changes, 200)
    run = PredictRun(
        run="any", videos=(str(video),), window_seconds=0.8, window_stride_seconds=4.0,
        segments=str(tmp_path / "s.json"),
    )  # fmt: skip
    assert run_predict(run) == 0
    (told,) = json.loads((tmp_path / "s.json").read_text())
    check_ends(told["segments"], changes, 200)
    assert len(network.own_mib) <= 11 + 5 * len(changes), "few windows more than those that slide"
    lines = [line for line in capsys.readouterr().out.splitlines() if " s to " in line]
    assert [line.split()[-2] for line in lines] == ["dark", "bright", "dark", "bright"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"segments": "s.txt", "window_seconds": 1.0}, "does not end in .csv, .json, .vtt"),
        ({"segments": "s.csv"}, "say window_seconds=2 too"),
        ({"segment_threshold": 0.5}, "none are asked for"),
        ({"segment_precision_seconds": 0.5, "window_seconds": 1.0}, "none are asked for"),
    ],
)
def test_what_cannot_be_segmented_is_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=re.escape(sentence)):
        PredictRun.model_validate({"run": "r", "videos": ("v.mp4",), **changes})


def test_subtitles_of_several_videos_are_refused_before_the_work(tmp_path: Path) -> None:
    run = PredictRun(
        run="none", videos=("a.mp4", "b.mp4"), window_seconds=1.0, segments=str(tmp_path / "s.vtt")
    )
    with pytest.raises(ConfigError, match="WebVTT belongs to one video"):
        run_predict(run)


@pytest.mark.slow
def test_two_hours_take_no_more_memory_than_minutes(tmp_path: Path, network: Brightness) -> None:
    frames = 2 * 3600 * RATE
    generator = np.random.default_rng(0)
    changes = np.cumsum(generator.integers(30 * RATE, 400 * RATE, size=60))
    changes = changes[changes < frames - 30 * RATE]
    video = film(tmp_path / "long.mp4", changes.tolist(), frames)
    run = PredictRun(
        run="any", videos=(str(video),), window_seconds=0.8, window_stride_seconds=20.0,
        segments=str(tmp_path / "s.json"),
    )  # fmt: skip
    assert run_predict(run) == 0
    (told,) = json.loads((tmp_path / "s.json").read_text())
    check_ends(told["segments"], changes.tolist(), frames)
    quarter = len(network.own_mib) // 4
    assert max(network.own_mib[-quarter:]) < max(network.own_mib[:quarter]) + 16
