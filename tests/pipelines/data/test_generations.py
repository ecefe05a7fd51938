"""A run goes on with the generation it began with, and is not given what was removed since."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from cliplift.configs.data import DataConfig
from cliplift.configs.sections import ConfigError
from cliplift.pipelines.data.loader import ClipLoader, _Training
from cliplift.pipelines.data.source import ClipSource, on_its_generations
from cliplift.sharding.build.finalize import add_catalog, describe, remove_videos
from cliplift.sharding.build.writer import ShardWriter
from cliplift.sharding.manifest import DATASET_FILE, SAMPLES_FILE, dump_dataset
from cliplift.sharding.storage import open_store

CLIPS, REMOVED = 60, (3, 7, 11)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Clips of a byte, one a video."""
    folder = tmp_path / "set"
    store = open_store(str(folder))
    folder.mkdir()
    indexes = []
    for shard in range(6):
        writer = ShardWriter(store, f"s/{shard}.tar", shard=shard, split="s", plan_id="p")
        for n in range(shard * 10, shard * 10 + 10):
            writer.add(
                mp4=bytes([n]), facts={}, picture_hashes=(), key=f"k{n}", video_id=f"v{n}", source=f"{n}.mp4",
                split="train", label=n % 2, labels=(), folds=(), group=None, start_seconds=0.0, end_seconds=1.0,
                num_frames=32, fps=20.0, width=40, height=30, keyframes=(0,), source_sha256=f"{n}",
            )  # fmt: skip
        indexes.append(writer.commit())
    dataset = describe(indexes, table=folder / SAMPLES_FILE, name="n", classes=("a", "b"), folds=0, missing=0,
                       plan_id="p", settings={})  # fmt: skip
    store.write(DATASET_FILE, dump_dataset(dataset))
    add_catalog(str(folder))
    return str(folder)


def data_of(url: str, **changes: Any) -> DataConfig:
    return DataConfig.model_validate(
        {"shards": url, "sampling": {"frames": 2, "stride": 1}, "streams": 2, "window_samples": 20} | changes
    )


class Clip:
    """Stands for a decoded clip: the byte that was read."""

    def __init__(self, data: bytes) -> None:
        self.number = data[0]

    def asked_for(self, **_: object) -> Clip:
        return self


def sequence(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[tuple[int, list[str]]]]:
    """The fingerprint, and the clip and the failures of every position of two epochs."""
    monkeypatch.setattr(ClipSource, "training_clips", lambda self, sample, epoch: Clip(self.read(sample)))
    loader = ClipLoader(data, seed=3, global_batch=4, micro_batch=4, rank=0, world_size=1)
    training = _Training(loader.dataset, loader.order)
    found = []
    for epoch in range(2):
        for position in range(loader.num_samples):
            clip, failed = training._clip(epoch, position, loader.order.draw(epoch, position))
            found.append((clip.number, failed))  # type: ignore[attr-defined]
    return loader.fingerprint, found


def test_the_sequence_stays_but_for_what_was_removed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint, before = sequence(data_of(url), monkeypatch)
    assert sorted(n for n, _ in before) == sorted([*range(CLIPS)] * 2)
    remove_videos(url, [f"v{n}" for n in REMOVED])
    again, after = sequence(on_its_generations(data_of(url), [url]), monkeypatch)
    assert again == fingerprint, "what a checkpoint compares"
    for (then, _), (now, failed) in zip(before, after, strict=True):
        assert now not in REMOVED
        assert now == then or then in REMOVED
        assert failed == [], "to leave out what was removed is no failure"
    latest, rest = sequence(on_its_generations(data_of(url), None), monkeypatch)
    assert latest != fingerprint
    assert sorted(n for n, _ in rest) == sorted([n for n in range(CLIPS) if n not in REMOVED] * 2)


def test_a_run_names_the_generation_it_begins_with_and_keeps_it(url: str, tmp_path: Path) -> None:
    other = str(shutil.copytree(url, tmp_path / "other"))
    data = data_of(url, shards=[{"url": url, "weight": 1}, {"url": other, "weight": 2}])
    assert on_its_generations(data, None) == data, "as long as there is one generation"
    remove_videos(url, ["v1"])
    began = on_its_generations(data, None)
    assert began.urls == (f"{url}@2", other)
    assert began.weights == (1, 2)
    remove_videos(url, ["v2"])
    remove_videos(other, ["v2"])
    assert on_its_generations(data, began.urls).urls == (f"{url}@2", f"{other}@1")
    assert on_its_generations(data, data.urls).urls == (f"{url}@1", f"{other}@1"), (
        "begun before there were any"
    )
    assert on_its_generations(data, None).urls == (f"{url}@3", f"{other}@2")
    named = data_of(f"{url}@1")
    assert on_its_generations(named, None) == on_its_generations(named, began.urls) == named
    with pytest.raises(ConfigError, match=r"holds no dataset.json"):
        on_its_generations(data_of(str(tmp_path)), None)


def test_evaluation_leaves_out_what_was_removed(url: str) -> None:
    remove_videos(url, ["v5"])
    source = ClipSource(data_of(f"{url}@1"), split="train")
    assert [source.read(i)[0] for i in range(len(source))] == [n for n in range(CLIPS) if n != 5]
