"""Loaders on real shards: the same clips whatever the ranks, workers, accumulation, stops and failures."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cliplift.configs.data import DataConfig
from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.configs.sections import ConfigError
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.data.clip_plan import Box, cut, training_box, view_boxes
from cliplift.pipelines.data.eval_loader import EvalLoader
from cliplift.pipelines.data.failures import TooManyFailuresError
from cliplift.pipelines.data.loader import ClipLoader
from cliplift.pipelines.data.source import ClipSource
from cliplift.pipelines.data.video_files import clips_of_video
from cliplift.sharding.build.finalize import remove_videos
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.demo.synthetic import write_demo_videos
from cliplift.sharding.read.reader import ShardDataset, ShardReadError
from cliplift.sharding.video.decode import decode_frames

G = 12  # global batch


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> str:
    """40 training clips in several shards, 10 test clips."""
    folder = tmp_path_factory.mktemp("clips")
    write_demo_videos(
        folder / "v",
        seed=2,
        train_per_class=4,
        val_per_class=1,
        test_per_class=1,
        unlabelled=1,
        size_pixels=64,
    )
    words = [
        f"source.root={folder}/v/labelled",
        f"output={folder}/s",
        "workers=2",
        "shards.videos_per_shard=9",
    ]
    run_shard(load_run(repository / "configs" / "shard" / "demo_actions.yaml", RUNS, words).run)
    return str(folder / "s")


def config(shards: str, **changes: Any) -> DataConfig:
    tree: dict[str, Any] = {
        "shards": shards,
        "sampling": {"frames": 4, "stride": 2},
        "crop_pixels": 32,
        "window_samples": 16,
        "streams": 3,
        **changes,
    }
    return DataConfig.model_validate(tree)


def loader(
    data: DataConfig, *, rank: int = 0, ranks: int = 1, accumulation: int = 1, seed: int = 0
) -> ClipLoader:
    return ClipLoader(
        data, seed=seed, global_batch=G, micro_batch=G // ranks // accumulation, rank=rank, world_size=ranks
    )


def steps(
    data: DataConfig, start: int, stop: int, *, ranks: int = 1, accumulation: int = 1
) -> list[dict[int, bytes]]:
    """For each optimizer step: sample -> its pixels and draws, over all ranks."""
    found: list[dict[int, bytes]] = [{} for _ in range(start, stop)]
    for rank in range(ranks):
        one = loader(data, rank=rank, ranks=ranks, accumulation=accumulation)
        for number, batch in enumerate(one.micro_batches(start_step=start, stop_step=stop)):
            assert len(batch.labels) == G // ranks // accumulation, "every rank always has the same number"
            for row in range(len(batch.labels)):
                content = batch.clips[row].numpy().tobytes() + batch.draws[row].numpy().tobytes()
                found[number // accumulation][int(batch.sample_index[row])] = content
    return found


@pytest.fixture(scope="module")
def reference(shards: str) -> list[dict[int, bytes]]:
    return steps(config(shards), 0, 7)


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 3), (2, 1), (2, 3), (3, 2), (4, 1), (6, 2), (12, 1)])
def test_ranks_and_accumulation_change_nothing(
    shards: str, reference: list[dict[int, bytes]], ranks: int, accumulation: int
) -> None:
    assert steps(config(shards), 0, 7, ranks=ranks, accumulation=accumulation) == reference


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(
    shards: str, reference: list[dict[int, bytes]], workers: int
) -> None:
    assert steps(config(shards, workers=workers), 0, 4, ranks=2) == reference[:4]


@pytest.mark.parametrize("start", [1, 3, 5])
def test_resuming_anywhere_on_other_ranks_continues_the_sequence(
    shards: str, reference: list[dict[int, bytes]], start: int
) -> None:
    assert steps(config(shards), start, 7, ranks=3, accumulation=2) == reference[start:]


def test_an_epoch_has_every_sample_once_and_the_next_differs(reference: list[dict[int, bytes]]) -> None:
    first = [index for step in reference[:3] for index in step]  # 40 // 12 steps an epoch
    assert len(first) == len(set(first)) == 36
    second = {index: clip for step in reference[3:6] for index, clip in step.items()}
    both = [(reference[i // 12][s], second[s]) for i, s in enumerate(first) if s in second]
    assert both
    assert all(a != b for a, b in both), "a sample is cut anew in every epoch"


@pytest.mark.parametrize(
    "changes", [{"cache_decoded_mib": 500}, {"cache_decoded_mib": 1}, {"decoder": "decord"}]
)
def test_cache_and_decoder_change_nothing(
    shards: str, reference: list[dict[int, bytes]], changes: dict[str, Any]
) -> None:
    """1 MiB holds a few videos only: the others are decoded again."""
    assert steps(config(shards, **changes), 0, 4) == reference[:4]


def test_the_cache_tells_what_stood_at_a_place_from_what_stands_there_now(
    shards: str, tmp_path: Path
) -> None:
    """A dataset that changes while a process lives has other clips under the same numbers."""
    place = str(shutil.copytree(shards, tmp_path / "s"))
    kept = config(place, cache_decoded_mib=500)
    before = ClipSource(kept, split="train")
    for index in range(len(before)):
        before.test_views(index)
    remove_videos(place, [before.facts(0).video_id])
    now, plain = ClipSource(kept, split="train"), ClipSource(config(place), split="train")
    assert len(now) == len(before) - 1
    for index in range(len(now)):
        for found, expected in zip(now.test_views(index).clips, plain.test_views(index).clips, strict=True):
            assert torch.equal(found, expected), index


def test_labels_and_videos_belong_to_their_samples(shards: str) -> None:
    data = ShardDataset(shards, split="train")
    for batch in loader(config(shards)).micro_batches(start_step=0, stop_step=3):
        for index, label in zip(batch.sample_index.tolist(), batch.labels.tolist(), strict=True):
            assert data.facts(index).label == label
    assert len(set(loader(config(shards)).dataset.video_index.tolist())) == 40


def test_two_datasets_are_read_as_one(shards: str) -> None:
    two = loader(config(shards).model_copy(update={"shards": (shards, shards)}))
    assert two.num_samples == 80
    seen = [i for b in two.micro_batches(start_step=0, stop_step=6) for i in b.sample_index.tolist()]
    assert len(set(seen)) == 72
    assert two.dataset.facts(41).key == two.dataset.facts(1).key


def broken(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    read = ShardDataset.read

    def sometimes(self: ShardDataset, i: int) -> bytes:
        if i in bad:
            raise ShardReadError("x.tar", str(i), "damaged by the test")
        return read(self, i)

    monkeypatch.setattr(ShardDataset, "read", sometimes)


def test_an_unreadable_sample_is_replaced_the_same_way_everywhere(
    shards: str, monkeypatch: pytest.MonkeyPatch, reference: list[dict[int, bytes]]
) -> None:
    broken(monkeypatch, {3, 17})
    data = config(shards, max_failed_share=1.0)
    batches = list(loader(data).micro_batches(start_step=0, stop_step=3))
    messages = [message for batch in batches for message in batch.failed]
    assert len(messages) == len({3, 17} & {i for step in reference[:3] for i in step})
    assert all("damaged by the test" in message and shards in message for message in messages)
    assert all(len(batch.labels) == G for batch in batches), "a batch is never shortened"
    seen = [i for batch in batches for i in batch.sample_index.tolist()]
    assert not {3, 17} & set(seen)
    again = [loader(data, rank=r, ranks=2).micro_batches(start_step=0, stop_step=3) for r in range(2)]
    union = sorted(i for part in again for batch in part for i in batch.sample_index.tolist())
    assert union == sorted(seen)


def test_too_many_failures_stop_the_run(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, set(range(40)))
    with pytest.raises(TooManyFailuresError, match="damaged by the test"):
        list(loader(config(shards)).micro_batches(start_step=0, stop_step=1))
    monkeypatch.undo()
    broken(monkeypatch, set(range(0, 40, 4)))
    with pytest.raises(TooManyFailuresError, match="max_failed_share"):
        list(loader(config(shards)).micro_batches(start_step=0, stop_step=40))


@pytest.mark.parametrize(
    ("start", "stop", "final"), [(0, 3, False), (1, 2, True)], ids=["end of an epoch", "end of a run"]
)
def test_the_share_is_judged_where_little_was_read(
    shards: str, monkeypatch: pytest.MonkeyPatch, start: int, stop: int, final: bool
) -> None:
    """Fewer than a hundred samples say little in between, but an epoch or a run that ends has said all it will."""
    loaded = loader(config(shards))
    assert loaded.num_samples < 100
    broken(monkeypatch, set(range(0, 60, 6)))
    list(loader(config(shards)).micro_batches(start_step=1, stop_step=2))
    with pytest.raises(
        TooManyFailuresError,
        match=r"of \d\d? samples could not be read .*damaged by the test.*max_failed_share",
    ):
        list(loaded.micro_batches(start_step=start, stop_step=stop, final=final))


def test_a_mistake_of_ours_is_not_taken_for_a_bad_sample(
    shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: ShardDataset, i: int) -> bytes:
        raise KeyError("a bug")

    monkeypatch.setattr(ShardDataset, "read", wrong)
    with pytest.raises(KeyError, match="a bug"):
        list(loader(config(shards)).micro_batches(start_step=0, stop_step=1))


@pytest.mark.parametrize(("ranks", "views"), [(1, (1, 1)), (2, (3, 1)), (3, (2, 3)), (4, (1, 10))])
def test_evaluation_sees_every_sample_once_with_all_views(
    shards: str, ranks: int, views: tuple[int, int]
) -> None:
    data = config(shards, views={"clips": views[0], "crops": views[1]})
    seen: list[tuple[int, int]] = []
    for rank in range(ranks):
        for batch in EvalLoader(data, split="test", batch=8, rank=rank, world_size=ranks):
            seen += list(zip(batch.sample_index.tolist(), batch.views.tolist(), strict=True))
    assert sorted(seen) == [(s, v) for s in range(10) for v in range(views[0] * views[1])]


def test_part_of_a_split_is_chosen_by_number_alone(shards: str) -> None:
    chosen = [
        sorted(
            i
            for rank in range(ranks)
            for b in EvalLoader(
                config(shards), split="test", batch=3, rank=rank, world_size=ranks, max_samples=4
            )
            for i in b.sample_index.tolist()
        )
        for ranks in (1, 3)
    ]
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) == 4


def test_a_centre_view_is_the_pixels_of_the_file(shards: str) -> None:
    """No resize is needed where the crop is as large as asked: the stored pixels come through untouched."""
    dataset = ShardDataset(shards, split="test")
    data = config(shards, crop_pixels=64, resize_short_side_pixels=64)
    (batch,) = EvalLoader(data, split="test", batch=1, rank=0, world_size=1, max_samples=1)
    index = int(batch.sample_index[0])
    start = (dataset.facts(index).num_frames - 7) // 2
    frames = decode_frames(dataset.read(index), [start, start + 2, start + 4, start + 6], decoder="pyav")
    assert np.array_equal(batch.clips[0].numpy(), frames)


def test_views_of_a_file_outside_any_shard(shards: str, tmp_path: Path) -> None:
    dataset = ShardDataset(shards, split="test")
    file = tmp_path / "a.mp4"
    file.write_bytes(dataset.read(0))
    batch = clips_of_video(file, config(shards, views={"clips": 2, "crops": 3}))
    assert batch.clips.shape == (6, 4, 32, 32, 3)
    assert batch.labels.tolist() == [-1] * 6


def test_the_users_mistakes(shards: str) -> None:
    with pytest.raises(ConfigError, match="train"):
        loader(config(shards, split="trian"))
    with pytest.raises(ConfigError, match="at most 40"):
        ClipLoader(config(shards), seed=0, global_batch=41, micro_batch=41, rank=0, world_size=1)


BOXES = ("random_resized", "multi_scale_corner", "random", "centre")


@pytest.mark.parametrize("crop", BOXES)
@pytest.mark.parametrize(("height", "width"), [(48, 48), (64, 90), (97, 33)])
def test_training_boxes_lie_inside(crop: str, height: int, width: int) -> None:
    data = config("unused", augment={"crop": crop, "scale": (0.3, 1.0)})
    rng = np.random.default_rng(0)
    for _ in range(200):
        box = training_box(data.augment, data, height=height, width=width, rng=rng)
        assert box.top >= 0
        assert box.left >= 0
        assert 0 < box.height <= height - box.top
        assert 0 < box.width <= width - box.left
        if crop == "random_resized" and box.height != box.width:
            assert 0.25 < box.height * box.width / (height * width) <= 1.0
            assert 0.6 < box.width / box.height < 1.7


def test_corner_crops_in_thirteen_places_and_of_unequal_sides() -> None:
    """TSN's and VideoMAE's: 4 sides, 10 pairs that are one step apart or less, quarters of what is left over."""
    augment = {"crop": "multi_scale_corner", "corner_distortion": 1, "corner_places": 13}
    data = config("unused", augment=augment)
    rng = np.random.default_rng(0)
    boxes = {training_box(data.augment, data, height=200, width=300, rng=rng) for _ in range(4000)}
    sides = [200, 175, 150, 132]
    pairs = {(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1}
    assert {(box.height, box.width) for box in boxes} == pairs
    places = {(box.top, box.left) for box in boxes if (box.height, box.width) == (132, 150)}
    quarters = {
        (0, 0),
        (0, 4),
        (4, 0),
        (4, 4),
        (2, 2),
        (0, 2),
        (4, 2),
        (2, 4),
        (2, 0),
        (1, 1),
        (1, 3),
        (3, 1),
        (3, 3),
    }
    assert places == {(68 * down // 4, 150 * across // 4) for down, across in quarters}


def test_ten_crops_are_five_and_their_mirrors() -> None:
    data = config("unused", crop_pixels=32, resize_short_side_pixels=64)
    boxes = view_boxes(data, height=64, width=100, crops=10)
    places = [(b.top, b.left) for b in boxes[:5]]
    assert places == [(0, 0), (0, 68), (32, 0), (32, 68), (16, 34)]
    assert [(b.top, b.left, b.flip) for b in boxes[5:]] == [(*place, True) for place in places]
    assert [b.left for b in view_boxes(data, height=64, width=100, crops=3)] == [0, 34, 68]
    assert [b.top for b in view_boxes(data, height=100, width=64, crops=3)] == [0, 34, 68]


def test_cutting_resizes_as_in_floating_point() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    box = Box(4, 6, 30, 36)
    part = torch.from_numpy(frames[:, 4:34, 6:42]).permute(0, 3, 1, 2).double()
    expected = torch.nn.functional.interpolate(part, size=(16, 16), mode="bilinear", antialias=True)
    found = cut(frames, box, pixels=16).permute(0, 3, 1, 2).double()
    assert (found - expected).abs().max() <= 1.0  # rounding to whole levels, once in each direction
    mirrored = cut(frames, Box(4, 6, 30, 36, flip=True), pixels=16)
    assert torch.equal(mirrored.flip(2), cut(frames, box, pixels=16))


def test_batches_move_as_one(shards: str) -> None:
    batch = next(iter(loader(config(shards)).micro_batches(start_step=0, stop_step=1)))
    moved = batch.to(torch.device("cpu"))
    assert isinstance(moved, ClipBatch)
    assert torch.equal(moved.clips, batch.clips)
    assert moved.failed == batch.failed
