"""``cliplift bench train`` on real shards and a real model, in one process and in two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.launch.cli import main
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.demo.synthetic import write_demo_videos


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> list[str]:
    place = tmp_path_factory.mktemp("bench")
    write_demo_videos(
        place / "videos",
        seed=1,
        train_per_class=2,
        val_per_class=1,
        test_per_class=1,
        unlabelled=1,
        size_pixels=48,
    )
    source = [f"source.root={place}/videos/labelled", f"output={place}/shards", "workers=1"]
    run_shard(load_run(repository / "configs/shard/demo_actions.yaml", RUNS, source).run)
    return [f"data.shards={place}/shards", "engine.global_batch=4", "data.workers=0", f"output={place}/run"]


def test_parts_add_up_to_the_step(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "timing.json"
    command = ["bench", "train", "pretrain/demo", *words, "track.peak_tflops=0.05"]
    assert main([*command, "--steps", "4", "--warm-up", "1", "--synthetic", "--output", str(out)]) == 0
    found = json.loads(out.read_text())
    parts = sum(found[name] for name in ("data", "prepare", "forward", "backward", "update"))
    assert 0.8 * found["step"] < parts <= found["step"], "parts of one step; the rest is the loop itself"
    assert min(found["forward"], found["backward"], found["update"]) > 0
    assert found["clips_per_second"] == pytest.approx(4 / found["step"])
    assert found["frames_per_second"] == pytest.approx(8 * 4 / found["step"])
    assert found["communication"] == 0, "one process has nobody to talk to"
    assert 0 < found["mfu"] < 100
    said = capsys.readouterr().out
    assert "a synthetic batch" in said
    assert "of it, in collectives" in said
    assert not Path(words[-1].removeprefix("output=")).exists(), "nothing is written into the run's folder"


@pytest.mark.slow
def test_two_ranks_spend_time_in_collectives(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "timing.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "cliplift.launch.cli", "bench", "train", "pretrain/demo", *words, "--steps", "3",
         "--warm-up", "1", "--synthetic", "--output", str(out)],
        capture_output=True, text=True, timeout=150, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert 0 < found["communication"] < found["step"]


def test_a_shard_config_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", "shard/folder", "source.root=x", "output=y"]) == 2
    assert "not a stage that trains" in capsys.readouterr().err
