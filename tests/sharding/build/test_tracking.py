"""W&B of a build, offline: what a killed and continued build, its parts and its numbers look like there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cliplift.configs.sharding import ShardRun
from cliplift.sharding.build import tracking
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.build.tracking import BuildTracker, progress_numbers, wandb_mode
from cliplift.sharding.build.unit import Progress

MakeRun = Callable[..., ShardRun]


class Recorder:
    """Stands for ``wandb.init`` and the run it returns."""

    def __init__(self) -> None:
        self.starts: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.artifacts: list[Any] = []
        self.summary: dict[str, Any] = {}
        self.ends: list[int] = []

    def init(self, **options: Any) -> Recorder:
        self.starts.append(options)
        return self

    def log(self, numbers: dict[str, float]) -> None:
        self.logged.append(numbers)

    def log_artifact(self, artifact: Any) -> None:
        self.artifacts.append(artifact)

    def finish(self, *, exit_code: int) -> None:
        self.ends.append(exit_code)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    import wandb

    recorder = Recorder()
    monkeypatch.setattr(wandb, "init", recorder.init)
    return recorder


def build(run: ShardRun, **options: Any) -> None:
    with BuildTracker(run, part=options.get("part")) as tracker:
        tracker.finish(run_shard(run, on_progress=tracker.update, **options))


def test_a_build_is_a_run_of_its_own_kind_and_continues_it(
    recorder: Recorder, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "out", track={"wandb": "offline", "every_seconds": 1e-6, "tags": ["test"]})
    with pytest.raises(RuntimeError), BuildTracker(run) as tracker:
        raise RuntimeError("killed")
    build(run)
    first, second = recorder.starts
    assert first["id"] == second["id"] == json.loads((tmp_path / "out/wandb.json").read_text())["id"]
    assert (first["job_type"], first["group"], first["name"], first["mode"]) == (
        "shard",
        "tiny",
        "tiny",
        "offline",
    )
    assert first["config"]["transcode"]["crf"] == 23
    assert recorder.ends == [1, 0]
    assert [numbers["videos_done"] for numbers in recorder.logged] == list(range(1, 41))
    assert recorder.logged[-1]["seconds_left"] == 0
    assert recorder.summary["samples"] == recorder.summary["clips_written"] == 40
    assert recorder.summary["verified"] is True
    assert recorder.summary["duplicates/exact"] == 0
    (artifact,) = recorder.artifacts
    assert (artifact.type, artifact.name) == ("dataset", "shards-tiny")
    assert artifact.metadata["fingerprint"] == recorder.summary["fingerprint"]
    assert tracker is not None


@pytest.mark.slow
def test_parts_are_runs_of_one_group(recorder: Recorder, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "out", track={"wandb": "offline", "every_seconds": 1000.0})
    for part in ((0, 2), (1, 2)):
        build(run, part=part)
    assert [start["name"] for start in recorder.starts] == ["tiny part 0 of 2", "tiny part 1 of 2"]
    assert {start["group"] for start in recorder.starts} == {"tiny"}
    assert len({start["id"] for start in recorder.starts}) == 2
    assert len(recorder.logged) == 4  # the first and the last video of each part
    assert len(recorder.artifacts) == 1  # once the dataset is complete


def test_disabled_is_quiet(recorder: Recorder, make_run: MakeRun, tmp_path: Path) -> None:
    with BuildTracker(make_run(tmp_path / "out", track={"wandb": "disabled"})) as tracker:
        tracker.update(Progress(videos_done=1, videos_total=1))
    assert recorder.starts == []
    assert not (tmp_path / "out/wandb.json").exists()


def test_refusals_and_copies_are_numbers() -> None:
    progress = Progress(videos_done=2, videos_total=4, clips=1, seconds=3.0, copied=1)
    progress.refused["read"] = 1
    progress.not_copied["size"] = 2
    numbers = progress_numbers(progress)
    assert (numbers["refused/read"], numbers["copied"], numbers["not_copied/size"]) == (1, 1, 2)
    assert (numbers["seconds_left"], numbers["clips_per_second"]) == (3.0, pytest.approx(1 / 3))


def test_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tracking.Path, "home", lambda: tmp_path)
    assert wandb_mode("auto", {}) == "offline"
    assert wandb_mode("auto", {"WANDB_API_KEY": "x"}) == "online"
    assert wandb_mode("auto", {"WANDB_API_KEY": "x", "WANDB_MODE": "disabled"}) == "disabled"
    assert wandb_mode("online", {"WANDB_MODE": "disabled"}) == "online"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n")
    assert wandb_mode("auto", {}) == "online"


@pytest.mark.slow
def test_real_offline_files(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "out", track={"wandb": "offline", "folder": str(tmp_path / "logs")})
    build(run)
    (record,) = (tmp_path / "logs").rglob("*.wandb")
    deadline = time.monotonic() + 30
    while b"clips_per_second" not in (data := record.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)  # W&B's service writes the file on its own time
    assert b"clips_per_second" in data
    assert b"duplicates/exact" in data
