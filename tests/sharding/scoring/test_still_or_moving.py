"""Videos that move against the same videos standing still, from file to score."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest

from cliplift.configs.sharding import ShardRun, TranscodeConfig
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.read.generations import open_dataset
from cliplift.sharding.read.reader import ShardDataset
from cliplift.sharding.scores.carried import stored_scores
from cliplift.sharding.scores.measures import score_clip
from cliplift.sharding.scoring.run import score_dataset
from cliplift.sharding.video.transcode import SpanCutter

pytestmark = pytest.mark.slow


def stand_still(video: Path, target: Path) -> None:
    """The same video with its first frame in place of all others, coded badly, so that there is noise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(video)) as source, av.open(str(target), "w") as out:
        first = next(source.decode(video=0))
        stream = out.add_stream("libx264", rate=25, options={"crf": "34", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = first.width, first.height, "yuv420p"
        planes = first.reformat(format="yuv420p").to_ndarray()
        for number in range(40):
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts = number
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


@pytest.fixture(scope="module")
def both(demo_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of two classes: the demo's videos, and the same standing still."""
    folder = tmp_path_factory.mktemp("both")
    for number, video in enumerate(sorted((demo_videos / "labelled" / "train").rglob("*.mp4"))):
        moving = folder / "videos" / "train" / "moving" / f"{number}.mp4"
        moving.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, moving)
        stand_still(video, folder / "videos" / "train" / "still" / f"{number}.mp4")
    run = {
        "name": "both", "output": str(folder / "set"), "workers": 2, "shards": {"videos_per_shard": 6},
        "source": {"kind": "folder", "root": str(folder / "videos"), "layout": "split/class"},
    }  # fmt: skip
    run_shard(ShardRun.model_validate(run))
    return folder / "set"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_motion_separates_still_from_moving(both: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(both, tmp_path / "set"))
    score_dataset(str(folder), ["motion"], workers=2)
    dataset = ShardDataset(str(folder))
    with stored_scores(*open_dataset(str(folder))) as found:
        values = found.column("motion").tolist()
    of: dict[str, list[float]] = {name: [] for name in dataset.classes}
    for value, label in zip(values, dataset.labels.tolist(), strict=True):
        of[dataset.classes[label]].append(float(value))
    assert len(of["still"]) == len(of["moving"]) == 20
    above = sum(m > s for m in of["moving"] for s in of["still"]) / 400
    assert above >= 0.95
    assert max(of["still"]) < 0.00098


def test_motion_separates_real_clips_from_the_same_standing_still(
    shared_data: Path, repository: Path, load_module: Callable[[Path], ModuleType]
) -> None:
    """Forty clips of all folders, chosen by a digest of their names, those in which nothing happens among them."""
    study = load_module(repository / "benchmarks/curation.py")
    files = [
        file
        for folder in ("unlabeled", "unlabeled_more", "clips", "tankwagon", "arid6")
        for file in (shared_data / folder).rglob("*")
        if file.suffix in (".mp4", ".webm", ".mpg")
    ]
    files.sort(key=lambda f: hashlib.sha256(f.relative_to(shared_data).as_posix().encode()).hexdigest())
    moving, still = [], []
    for file in files[:40]:
        with SpanCutter(file, TranscodeConfig(preset="veryfast"), alive=lambda: None) as cutter:
            stored = cutter.cut(start_seconds=0.0, end_seconds=2.0).data
        moving.append(score_clip(stored, ["motion"])["motion"])
        still.append(score_clip(study.still_clip(stored), ["motion"])["motion"])
    assert study.area_under_curve(np.array(moving), np.array(still)) >= 0.95
    assert max(still) < 0.00098
