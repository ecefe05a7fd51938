"""Cutting: windows of one length, and shots found by PySceneDetect at the frames where the picture really changes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun, ShotsCut, TranscodeConfig, WindowsCut
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.manifest import DATASET_FILE
from cliplift.sharding.read.reader import ShardDataset
from cliplift.sharding.video import cuts
from cliplift.sharding.video.cuts import spans
from cliplift.sharding.video.decode import VideoDecodeError, decode_frames
from cliplift.sharding.video.transcode import encode_array

FPS = 20
needs_scenedetect = pytest.mark.skipif(
    importlib.util.find_spec("scenedetect") is None, reason="PySceneDetect is not installed"
)


def scene(number: int, frames: int) -> np.ndarray:
    """A shot of its own colours in which a bar moves, (T, 64, 96, 3)."""
    rng = np.random.default_rng(number)
    picture = np.empty((frames, 64, 96, 3), np.uint8)
    picture[:] = np.repeat(np.repeat(rng.integers(0, 256, (4, 6, 3)), 16, axis=0), 16, axis=1)
    for t in range(frames):
        at = abs((5 * number + t) % 176 - 88)  # to and fro, without a jump
        picture[t, :, at : at + 8] = 230
    return picture


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shots of 35, 60, 10 and 90 frames: they begin at 0, 1.75, 4.75 and 5.25 s, the end is at 9.75 s."""
    frames = np.concatenate([scene(n, count) for n, count in enumerate((35, 60, 10, 90))])
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    path.write_bytes(encode_array(frames, fps=Fraction(FPS), config=TranscodeConfig()))
    return path


def shots(
    film: Path, *, start: float = 0.0, end: float | None = None, **changes: object
) -> list[tuple[float, float]]:
    cut = ShotsCut.model_validate({"max_seconds": None, **changes})
    return spans(cut, film, start=start, end=end)  # type: ignore[return-value]


@needs_scenedetect
@pytest.mark.parametrize("detector", ["content", "adaptive"])
def test_shots_begin_where_the_picture_changes(film: Path, detector: str) -> None:
    found = shots(film, detector=detector, min_seconds=0.3)
    assert found == [(0.0, 1.75), (1.75, 4.75), (4.75, 5.25), (5.25, 9.75)]


@needs_scenedetect
def test_short_shots_are_left_out_and_long_ones_cut(film: Path) -> None:
    assert shots(film) == [(0.0, 1.75), (1.75, 4.75), (5.25, 9.75)]
    assert shots(film, max_seconds=2.0) == [
        (0.0, 1.75),
        (1.75, 3.75),
        (3.75, 4.75),
        (5.25, 7.25),
        (7.25, 9.25),
    ]
    assert shots(film, max_per_video=1) == [(1.75, 4.75)]
    assert shots(film, start=2.0, end=7.0) == [(2.0, 4.75), (5.25, 7.0)]
    with pytest.raises(VideoDecodeError, match="too short: no shot of 60 s"):
        shots(film, min_seconds=60)


@needs_scenedetect
def test_a_threshold_out_of_reach_finds_one_shot(film: Path) -> None:
    assert shots(film, threshold=250.0) == [(0.0, 9.75)]


@needs_scenedetect
def test_shots_of_a_variable_frame_rate_are_timed_by_its_stamps(tmp_path: Path) -> None:
    """After a pause of a second inside the first shot everything comes a second later."""
    frames = np.concatenate([scene(0, 40), scene(1, 40)])
    path = tmp_path / "paused.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number + (FPS if number >= 20 else 0), Fraction(1, FPS)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    (first, second) = shots(path)
    assert first == pytest.approx((0.0, 3.0))
    assert second[0] == pytest.approx(3.0)


@needs_scenedetect
def test_a_build_cuts_shots(film: Path, make_run: Callable[..., ShardRun], tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/film.mp4").write_bytes(film.read_bytes())
    (tmp_path / "videos/cut.mp4").write_bytes(film.read_bytes()[: film.stat().st_size * 2 // 3])
    run = make_run(
        tmp_path / "out",
        source={"kind": "folder", "root": str(tmp_path / "videos"), "layout": "flat"},
        cut={"kind": "shots"},
        limits={"max_refused_share": 0.5},
    )
    report = run_shard(run)
    assert report.clips_written == 3
    assert sum(report.refused.values()) == 1  # a cut file is in the ledger
    dataset = ShardDataset(run.output)
    assert [dataset.facts(i).span_seconds for i in range(3)] == [(0.0, 1.75), (1.75, 4.75), (5.25, 9.75)]
    for i, (scene_number, at) in enumerate(((0, 0), (1, 0), (3, 0))):
        shown = decode_frames(dataset.read(i), [at], decoder="pyav")[0].astype(int)
        assert np.abs(shown - scene(scene_number, 1)[0]).mean() < 12  # other scenes differ by about 80
    assert "scenedetect" in json.loads((tmp_path / "out" / DATASET_FILE).read_text())["versions"]


def test_without_pyscenedetect_the_cut_says_what_to_install(
    make_run: Callable[..., ShardRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuts, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"PySceneDetect is not installed; pip install 'cliplift\[shots\]'"):
        run_shard(make_run(tmp_path / "out", cut={"kind": "shots"}))


@needs_scenedetect
def test_a_long_search_says_that_it_is_alive(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuts, "HEARTBEAT_SECONDS", 1.0)
    beats: list[None] = []
    spans(ShotsCut(), film, start=0.0, end=None, alive=lambda: beats.append(None))
    assert len(beats) == 9


def test_a_decoder_that_never_ends_is_stopped(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scenedetect")
    with av.open(str(film)) as container:
        one = next(container.decode(video=0))

    def endless(*_: object, **__: object) -> object:
        number = 0
        while True:
            yield number / FPS, one
            number += 1

    monkeypatch.setattr(cuts, "timed_frames", endless)
    monkeypatch.setattr(cuts, "BYTES_PER_FRAME", 1 << 30)
    with pytest.raises(VideoDecodeError, match="more than 1000 frames come out of the file"):
        shots(film)


def test_windows(film: Path) -> None:
    cut = WindowsCut(length_seconds=4.0, min_seconds=1.0)
    assert spans(cut, film, start=0.0, end=None) == [(0.0, 4.0), (4.0, 8.0), (8.0, 9.75)]
    assert spans(cut, film, start=1.0, end=6.5) == [(1.0, 5.0), (5.0, 6.5)]
    with pytest.raises(VideoDecodeError, match=r"0\.50 s hold no window of 1 s"):
        spans(cut, film, start=9.25, end=None)
