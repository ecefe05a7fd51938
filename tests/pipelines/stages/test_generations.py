"""A run that is stopped, then its dataset grows and loses a video, then it is started again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.pipelines.engine.faults import beat
from cliplift.pipelines.stages.run import run_stage
from cliplift.sharding.build.finalize import remove_videos
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.demo.synthetic import write_demo_videos
from cliplift.sharding.read.reader import ShardDataset

BEAT = "cliplift.pipelines.evaluation.over_split.beat"


def finetune(repository: Path, shards: Path, output: Path) -> Any:
    words = [f"data.shards={shards}", f"output={output}", "track.wandb=disabled", "schedule.steps=2", "data.workers=1",
             "evaluation.every_steps=1", "evaluation.batch=2", "engine.global_batch=8"]  # fmt: skip
    return load_run(repository / "configs/finetune/demo_scratch.yaml", RUNS, words).run


def record(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


@pytest.mark.slow
def test_a_run_goes_on_across_an_addition_and_a_removal(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_demo_videos(tmp_path / "videos", train_per_class=2, val_per_class=1, test_per_class=1, unlabelled=1,
                      size_pixels=64)  # fmt: skip
    labelled, shards = tmp_path / "videos" / "labelled", tmp_path / "shards"
    late = sorted((labelled / "train").rglob("*.mp4"))[0]
    late.rename(tmp_path / "late.mp4")
    words = [f"source.root={labelled}", f"output={shards}", "workers=1"]
    build = load_run(repository / "configs/shard/demo_actions.yaml", RUNS, words).run
    run_shard(build)
    whole = run_stage(finetune(repository, shards, tmp_path / "whole"), command=["cliplift"])
    expected = record(whole.folder, "result.json")["data_fingerprint"]

    calls = 0

    def stopping() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        beat()

    monkeypatch.setattr(BEAT, stopping)
    run = finetune(repository, shards, tmp_path / "stopped")
    assert not run_stage(run, command=["cliplift"]).finished
    assert record(tmp_path / "stopped", "run.json")["datasets"] == [str(shards)]

    (tmp_path / "late.mp4").rename(late)
    assert run_shard(build, add=True).clips_written == 1
    gone = ShardDataset(str(shards), split="train").facts(3).video_id
    remove_videos(str(shards), [gone])
    assert run_stage(run, command=["cliplift"]).finished
    assert record(tmp_path / "stopped", "run.json")["datasets"] == [f"{shards}@1"]
    assert record(tmp_path / "stopped", "result.json")["data_fingerprint"] == expected

    latest = run_stage(finetune(repository, shards, tmp_path / "latest"), command=["cliplift"])
    assert record(latest.folder, "run.json")["datasets"] == [f"{shards}@3"]
    assert f"{shards}@3" in (latest.folder / "config.yaml").read_text()
    assert record(latest.folder, "result.json")["data_fingerprint"] != expected
