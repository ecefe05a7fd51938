"""ZeRO stage 3 needs every rank to make the same number of forward passes; evaluation splits are rarely even."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cliplift.configs.data import DataConfig
from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.pipelines.data.eval_loader import EvalLoader
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.demo.synthetic import write_demo_videos


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    folder = tmp_path_factory.mktemp("uneven")
    write_demo_videos(
        folder / "videos",
        seed=1,
        train_per_class=1,
        val_per_class=1,
        test_per_class=1,
        unlabelled=2,
        size_pixels=64,
    )
    words = [f"source.root={folder}/videos/labelled", f"output={folder}/shards", "workers=2"]
    run_shard(load_run(repository / "configs" / "shard" / "demo_actions.yaml", RUNS, words).run)
    return folder / "shards"


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 16])
@pytest.mark.parametrize(("samples", "batch"), [(5, 2), (3, 1), (8, 4)])
def test_fillers_even_out_the_batches(shards: Path, world_size: int, samples: int, batch: int) -> None:
    data = DataConfig(shards=(str(shards),), crop_pixels=32)
    passes, seen = set(), []
    for rank in range(world_size):
        loader = EvalLoader(
            data, split="val", batch=batch, rank=rank, world_size=world_size, max_samples=samples
        )
        own = list(loader)
        seen += [int(i) for b in own for i in b.sample_index]
        passes.add(len(own) + len(list(loader.fillers())))
        loader.close()
    assert len(passes) == 1, "every rank makes as many forward passes"
    assert len(seen) == len(set(seen)) == samples, "and still evaluates each sample once"


@pytest.mark.slow
def test_stage_3_evaluates_an_uneven_split(shards: Path, repository: Path, tmp_path: Path) -> None:
    """Three validation samples in batches of one on two ranks: two passes on one rank, one on the other."""
    recipe = repository / "configs" / "pretrain" / "demo.yaml"
    words = [f"data.shards={shards}", f"output={tmp_path}", "schedule.steps=2", "engine.global_batch=4",
             "engine.zero_stage=3", "engine.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}",
             "engine.collective_timeout_seconds=40", "evaluation.batch=1", "evaluation.max_samples=3",
             "evaluation.every_steps=1", "track.wandb=disabled"]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "cliplift.launch.cli", "pretrain", str(recipe), *words],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"eval/samples": 3.0' in (tmp_path / "metrics.jsonl").read_text()
