"""Every recipe in ``configs/shard`` loads; the one whose data is at hand is built."""

from __future__ import annotations

from pathlib import Path

import pytest

from cliplift.configs.load import load_run
from cliplift.configs.sharding import ShardRun
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.read.reader import ShardDataset

RECIPES = sorted((Path(__file__).resolve().parents[2] / "configs/shard").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_loads(recipe: Path) -> None:
    run = load_run(recipe, {"shard": ShardRun}).run
    assert isinstance(run, ShardRun)


@pytest.mark.slow
def test_real_clips_with_whole_groups_held_out(shared_data: Path, repository: Path, tmp_path: Path) -> None:
    overrides = [f"output={tmp_path / 'arid6'}", f"source.root={shared_data / 'arid6/train'}", "workers=2"]
    run = load_run(repository / "configs/shard/arid6.yaml", {"shard": ShardRun}, overrides).run
    report = run_shard(run)
    assert (report.clips_written, report.refused, report.missing) == (150, {}, 0)
    groups = {
        split: set(ShardDataset(run.output, split=split).column("group")) for split in ("train", "test")
    }
    assert not groups["train"] & groups["test"]
    labels = {split: set(ShardDataset(run.output, split=split).labels.tolist()) for split in groups}
    assert labels == {"train": set(range(6)), "test": set(range(6))}
