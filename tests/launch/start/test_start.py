"""`cliplift start` on small real videos: what it says, what it writes, and that what it writes can be run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS, FinetuneRun
from cliplift.configs.sharding import ShardRun
from cliplift.launch.cli import main
from cliplift.sharding.sources.read import read_source


def film(path: Path, *, seed: int, crf: int = 20, frames: int = 16) -> None:
    """Coloured boxes that drift, 64 x 48 pixels, 8 frames a second; a seed is a scene."""
    draw = np.random.default_rng(seed)
    scene = np.kron(draw.integers(0, 255, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=8, options={"crf": str(crf), "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            picture = np.roll(scene, number, axis=1)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))


@pytest.fixture(scope="module")
def cameras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes seen by four cameras; a copy and another encoding in other splits' cameras, and a broken file."""
    folder = tmp_path_factory.mktemp("start") / "my yard"
    for label, name in enumerate(("open", "shut")):
        for camera in range(4):
            for take in range(2):
                seed = label * 100 + camera * 10 + take
                film(folder / name / f"yard_cam{camera}_{take}.mp4", seed=seed)
    (folder / "shut/yard_cam3_9.mp4").write_bytes(b"not a video")
    shutil.copy(folder / "open/yard_cam0_0.mp4", folder / "open/yard_cam1_7.mp4")
    film(folder / "open/yard_cam2_8.mp4", seed=31, crf=34)  # the scene of open/yard_cam3_1.mp4
    return folder


def start(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["start", *words])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_a_folder_of_cameras(
    cameras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, _ = start(capsys, str(cameras), "--json")
    assert status == 0
    said = json.loads(out)
    assert said["classes"] == {"open": 10, "shut": 9}
    assert list(said["unreadable"]) == ["shut/yard_cam3_9.mp4"]
    assert said["same_file"] == [["open/yard_cam0_0.mp4", "open/yard_cam1_7.mp4"]]
    assert said["look_alike"] == [["open/yard_cam2_8.mp4", "open/yard_cam3_1.mp4"]]
    rows = {row["subject"]: row for row in said["findings"]}
    assert "yard_cam0" in rows["groups"]["found"]
    assert "--group-pattern" in rows["groups"]["remedy"]
    assert "cannot be opened" in rows["cannot be read"]["found"]
    assert [words[1] for words in said["commands"]] == ["shard", "show", "finetune", "finetune", "report"]

    runs = {file: load_run(file, RUNS).run for file in said["files"]}
    shard = runs["my-yard_shards.yaml"]
    assert isinstance(shard, ShardRun)
    assert shard.duplicates == "remove_exact"
    listed = read_source(shard)
    split_of = {video.group: video.split for video in listed.videos}
    assert set(split_of) == {f"yard_cam{camera}" for camera in range(4)}
    for split in ("train", "val", "test"):
        assert {video.label for video in listed.videos if video.split == split} == {0, 1}
    # Both pairs, and no other, are named as leaks if their cameras are in different splits.
    for subject, (one, other) in {"copies": (0, 1), "near-duplicates": (2, 3)}.items():
        apart = split_of[f"yard_cam{one}"] != split_of[f"yard_cam{other}"]
        assert ("LEAK: 1 pairs" in rows[subject]["found"]) == apart
    for name in ("frames", "3d"):
        run = runs[f"my-yard_{name}.yaml"]
        assert isinstance(run, FinetuneRun)
        assert run.data.crop_pixels <= 48
        assert run.data.sampling.frames <= 16
        assert run.data.urls == (shard.output,)

    status, _, err = start(capsys, str(cameras))
    assert status == 2
    assert "my-yard_shards.yaml: is there; --overwrite" in err
    assert start(capsys, str(cameras), "--overwrite", "--look", "4")[0] == 0


def test_each_video_alone_is_named_a_leak(
    cameras: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        str(cameras),
        "--output",
        str(tmp_path / "new"),
        "--group-pattern",
        "",
        "--look",
        "6",
        "--name",
        "alone",
    )
    status, out, _ = start(capsys, *words)
    assert status == 0
    assert "LEAK: groups are unknown" in out
    assert "looked at" in out
    assert "6 of 19, of all classes alike" in out
    run = load_run(tmp_path / "new/alone_shards.yaml", RUNS).run
    assert isinstance(run, ShardRun)
    assert run.splits.group_pattern is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--group-pattern", "cam"), "--group-pattern: has no parentheses"),
        (("--group-pattern", "(zoo)"), "--group-pattern: does not match 'open/yard_cam0_0.mp4'"),
        (("--group-pattern", "(yard)"), "--group-pattern: gives one group"),
        (("--group-pattern", "("), "--group-pattern: is no regular expression"),
        (("--name", "a/b"), "--name: 'a/b' cannot name files"),
        (("--look", "-1"), "asks for what cannot be"),
        (("--list", "no.csv"), "no such file"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    cameras: Path, tmp_path: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = start(capsys, str(cameras), "--output", str(tmp_path), *words)
    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_from_a_folder_to_a_number(cameras: Path, tmp_path: Path) -> None:
    """start, shard, check of every file, and the baseline for three steps, as a user would type them."""
    environment = os.environ | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}

    def cliplift(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "cliplift.launch.cli", *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=250,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    said = json.loads(cliplift("start", str(cameras), "--json"))
    cliplift("shard", "my-yard_shards.yaml")
    for file in said["files"][1:]:
        cliplift("check", file, "--gpus", "0")
    cliplift("finetune", "my-yard_frames.yaml", "schedule.steps=3")
    found = json.loads((tmp_path / "runs/my-yard-frames/result.json").read_text())
    assert 0 <= found["metrics"]["accuracy"] <= 1
