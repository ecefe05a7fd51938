"""Filters at training: the same clips on any number of ranks; columns that lack clips, or lose bytes in use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cliplift.configs.data import DataConfig
from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun
from cliplift.pipelines.data.loader import ClipLoader
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.manifest import ManifestError
from cliplift.sharding.read.generations import open_dataset
from cliplift.sharding.read.reader import ShardDataset
from cliplift.sharding.scores.carried import stored_scores
from cliplift.sharding.scores.measures import score_clip
from cliplift.sharding.scores.stored import BLOCK_ROWS, ColumnFacts, ScoresHead, open_columns, write_columns
from cliplift.sharding.scoring.run import score_dataset

MOVING = ["k0", "k2", "k7"]  # of train; three clips of nine, none of which is still or damaged


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_ranks_share_the_clips_that_a_filter_leaves(scored: Path, workers: int) -> None:
    """Two epochs of the three clips, one a step: each is seen once an epoch, by whatever rank."""
    data = DataConfig(
        shards=(str(scored),), where="motion > 0.00098", sampling={"frames": 4, "stride": 1}, crop_pixels=32,
        workers=workers,
    )  # fmt: skip

    def seen(world_size: int) -> list[str]:
        keys: dict[int, list[str]] = {}
        for rank in range(world_size):
            loader = ClipLoader(
                data.model_copy(update={"clips_per_sample": 2}), seed=3, global_batch=2 * world_size,
                micro_batch=2, rank=rank, world_size=world_size,
            )  # fmt: skip
            for step, batch in enumerate(loader.micro_batches(start_step=0, stop_step=6 // world_size)):
                keys.setdefault(step, []).extend(
                    loader.dataset.facts(int(i)).key for i in batch.sample_index[::2]
                )
            loader.close()
        return [key for step in sorted(keys) for key in keys[step]]

    alone = seen(1)
    assert sorted(alone[:3]) == sorted(alone[3:6]) == MOVING
    assert sorted(seen(3)[:3]) == MOVING
    assert seen(3) == alone, "the sequence is a function of the clips alone"


@pytest.mark.slow
def test_clips_added_after_scoring_have_no_score_until_it_is_called_again(
    make_run: Callable[..., ShardRun], demo_videos: Path, tmp_path: Path
) -> None:
    videos = sorted((demo_videos / "labelled/train").rglob("*.mp4"))[:3]
    folder = tmp_path / "videos/train/a"
    folder.mkdir(parents=True)
    for number, path in enumerate(videos[:2]):
        shutil.copy(path, folder / f"{number}.mp4")
    source = {"kind": "folder", "root": str(tmp_path / "videos"), "layout": "split/class"}
    run = make_run(tmp_path / "set", source=source, workers=1)
    run_shard(run)
    url = str(tmp_path / "set")
    score_dataset(url, ["motion"], workers=1)
    before = column(url, "motion")
    shutil.copy(videos[2], folder / "2.mp4")
    run_shard(run, add=True)
    dataset = open_dataset(url)[1]
    assert (dataset.generation, dataset.samples) == (3, 3)
    with stored_scores(*open_dataset(url)) as found:
        assert found.facts["motion"] == ColumnFacts("motion", "number", 1, unscored=1)
    assert column(url, "motion")[:2] == before
    with pytest.raises(ConfigError, match=r"1 clips of .*cliplift score \S+/set motion"):
        ShardDataset(url, where="motion >= 0")
    report = score_dataset(url, ["motion"], workers=1)
    assert (report.new, report.scored, report.dataset.generation) == (True, 1, 4), (
        "the new shard alone is decoded"
    )
    whole = ShardDataset(url, where="motion >= 0")
    assert len(whole) == 3
    expected = [score_clip(whole.read(i), ["motion"])["motion"] for i in range(3)]
    assert column(url, "motion") == pytest.approx(expected, rel=1e-6)


def column(url: str, name: str) -> list[float]:
    with stored_scores(*open_dataset(url)) as found:
        values: list[Any] = found.column(name).tolist()
    return values


def test_values_cut_short_while_they_are_read_are_noticed_at_the_next_block(tmp_path: Path) -> None:
    import numpy as np

    rows = 2 * BLOCK_ROWS + 5
    head = ScoresHead("0", rows=rows, block_rows=BLOCK_ROWS, columns=(ColumnFacts("motion", "number", 1),))
    path = tmp_path / "scores.bin"
    found = open_columns(
        path, write_columns(path, head, [np.arange(rows, dtype=np.float32)]), file="scores.bin"
    )
    assert found.values("motion", 0, 3).tolist() == [0, 1, 2]
    os.truncate(path, 4096)
    with pytest.raises(ManifestError, match=r"scores\.bin: was cut short while it was read; copy it again"):
        found.values("motion", BLOCK_ROWS, BLOCK_ROWS + 1)
