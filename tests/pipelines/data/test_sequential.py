"""Training from tars without an index: less is promised, and that much holds."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from cliplift.configs.data import DataConfig
from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.configs.sections import ConfigError
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.data.failures import TooManyFailuresError
from cliplift.pipelines.data.loader import ClipLoader, training_loader
from cliplift.pipelines.data.sequential import SequentialLoader
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.demo.synthetic import write_demo_videos
from cliplift.sharding.read.reader import ShardDataset

PER_CLASS = 2


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> str:
    folder = tmp_path_factory.mktemp("sequential")
    write_demo_videos(
        folder / "v", seed=6, train_per_class=PER_CLASS, val_per_class=1, test_per_class=1, unlabelled=1,
        size_pixels=48, workers=2,
    )  # fmt: skip
    words = [
        f"source.root={folder}/v/labelled",
        f"output={folder}/s",
        "workers=2",
        "shards.videos_per_shard=9",
    ]
    run_shard(load_run(repository / "configs" / "shard" / "demo_actions.yaml", RUNS, words).run)
    return str(folder / "s")


@pytest.fixture
def tars(shards: str, tmp_path: Path) -> Path:
    """Plain tars of the training clips, labels by name in the JSON, four clips a tar, no index."""
    dataset = ShardDataset(shards, split="train")
    for start in range(0, len(dataset), 4):
        with webdataset.TarWriter(str(tmp_path / f"plain-{start // 4:03d}.tar")) as writer:
            for i in range(start, min(start + 4, len(dataset))):
                label = dataset.facts(i).label
                assert label is not None
                facts = {"action": dataset.classes[label] if i % 2 else label, "number": i}
                writer.write(
                    {"__key__": f"clip{i:03d}", "mp4": dataset.read(i), "json": json.dumps(facts).encode()}
                )
    return tmp_path


def config(shards: str, tars: str, **changes: Any) -> DataConfig:
    stream = {"tars": tars, "samples_per_epoch": 20, "label_key": "action", "shuffle_samples": 6}
    stream |= changes.pop("sequential", {})
    tree = {"shards": shards, "sequential": stream, "sampling": {"frames": 3}, "crop_pixels": 24}
    return DataConfig.model_validate(tree | changes)


def batches(
    data: DataConfig, *, steps: int, rank: int = 0, ranks: int = 1, start: int = 0
) -> list[ClipBatch]:
    loader = SequentialLoader(
        data, seed=0, global_batch=8, micro_batch=8 // ranks, rank=rank, world_size=ranks
    )
    return list(loader.micro_batches(start_step=start, stop_step=start + steps))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_clip_is_one_of_the_tars_with_its_label(shards: str, tars: Path, workers: int) -> None:
    data = config(
        shards, str(tars / "plain-{000..004}.tar"), workers=workers, augment={"crop": "centre", "flip": False}
    )
    dataset = ShardDataset(shards, split="train")
    # Tars are drawn with replacement, and with workers by chance: of 60 draws of five one is missing once in 10^5.
    found = batches(data, steps=30)
    assert len(found) == 30
    assert all(batch.clips.shape == (8, 3, 24, 24, 3) for batch in found)
    labels = np.concatenate([batch.labels.numpy() for batch in found])
    names = np.concatenate([batch.video_index.numpy() for batch in found])
    of_name = {name: set(labels[names == name]) for name in names}
    assert all(len(labels) == 1 for labels in of_name.values()), "a video has one label"
    assert len(of_name) == len(dataset), "240 draws of 20 videos: all were seen"
    assert sorted(label for (label,) in of_name.values()) == sorted(dataset.labels.tolist())
    assert all(not batch.failed for batch in found)


def test_ranks_get_equal_batches_and_go_on_without_end(shards: str, tars: Path) -> None:
    data = config(shards, str(tars / "plain-000.tar"))  # four samples: every rank passes over them many times
    for rank in range(4):
        found = batches(data, steps=7, rank=rank, ranks=4)
        assert [len(batch.labels) for batch in found] == [2] * 7
    loader = SequentialLoader(data, seed=0, global_batch=8, micro_batch=4, rank=0, world_size=1)
    assert (loader.steps_per_epoch, loader.num_samples) == (2, 20)
    assert len(list(loader.micro_batches(start_step=3, stop_step=5))) == 4
    assert loader.classes == ShardDataset(shards).classes


def test_several_clips_of_a_sample(shards: str, tars: Path) -> None:
    (batch,) = batches(config(shards, str(tars / "plain-001.tar"), clips_per_sample=2), steps=1)
    pairs = batch.video_index.view(4, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all()
    assert batch.views.tolist() == [0, 1] * 4


def test_bad_videos_are_counted_and_left_out(shards: str, tars: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed.tar"
    with webdataset.TarWriter(str(mixed)) as writer:
        writer.write({"__key__": "bad", "mp4": b"not a video", "json": b'{"action": 1}'})
        writer.write({"__key__": "bare", "json": b"{}"})
        writer.write(
            {"__key__": "odd", "mp4": ShardDataset(shards).read(0), "json": b'{"action": "juggling"}'}
        )
        writer.write({"__key__": "good", "mp4": ShardDataset(shards).read(0), "json": b'{"action": 3}'})
    (batch,) = batches(config(shards, str(mixed), max_failed_share=1.0, max_failed_in_row=1000), steps=1)
    assert set(batch.labels.tolist()) == {3}
    reasons = " ".join(batch.failed)
    assert "mixed.tar bad: cannot be opened" in reasons
    assert "has no .mp4 member" in reasons
    assert "'juggling' is not one of" in reasons
    with pytest.raises(TooManyFailuresError, match="max_failed_share"):
        batches(config(shards, str(mixed)), steps=20)


def test_streams_that_cannot_give_anything_end(shards: str, tmp_path: Path) -> None:
    with pytest.raises(TooManyFailuresError, match=r"nothing\.tar: cannot be opened"):
        batches(config(shards, str(tmp_path / "nothing.tar")), steps=1)
    with tarfile.open(tmp_path / "empty.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("readme"), io.BytesIO())
    with pytest.raises(TooManyFailuresError, match="no sample in 100 tars"):
        batches(config(shards, str(tmp_path / "empty.tar")), steps=1)
    marker = tmp_path / "ran"
    with pytest.raises(TooManyFailuresError, match="cannot be opened"):
        batches(config(shards, f"pipe:touch {marker}"), steps=1)
    assert not marker.exists(), "no shell command of a config is ever run"


def test_a_damaged_tar_does_not_end_the_run(shards: str, tars: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.tar"
    shutil.copy(tars / "plain-002.tar", cut)
    with cut.open("r+b") as file:
        file.truncate(cut.stat().st_size * 3 // 5)
    (batch,) = batches(config(shards, str(cut)), steps=1)
    assert len(batch.labels) == 8


def test_the_config_chooses_the_loader(shards: str, tars: Path) -> None:
    streamed = config(shards, str(tars / "plain-000.tar"))
    options = {"seed": 0, "global_batch": 8, "micro_batch": 8, "rank": 0, "world_size": 1}
    assert isinstance(training_loader(streamed, **options), SequentialLoader)
    assert isinstance(
        training_loader(streamed.model_copy(update={"sequential": None}), **options), ClipLoader
    )
    with pytest.raises(ConfigError, match=r"data\.sequential"):
        ClipLoader(streamed, **options)
    short = config(shards, "x.tar", sequential={"samples_per_epoch": 7})
    with pytest.raises(ConfigError, match="samples_per_epoch"):
        training_loader(short, **options)
