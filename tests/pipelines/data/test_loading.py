"""The loader under everything that may differ between machines and runs: ranks, workers, stops, stores, hangs."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from cliplift.configs.data import DataConfig
from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.configs.sections import ConfigError
from cliplift.pipelines.data.batch import FLIP, ClipBatch
from cliplift.pipelines.data.eval_loader import EvalLoader
from cliplift.pipelines.data.failures import WorkerError
from cliplift.pipelines.data.loader import ClipLoader
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.demo.synthetic import write_demo_videos
from cliplift.sharding.manifest import (
    CATALOG_ROWS_FILE,
    DATASET_FILE,
    ManifestError,
    dump_dataset,
    load_dataset,
)
from cliplift.sharding.read.reader import ShardDataset, ShardReadError

G = 24  # clips of a global batch: a multiple of 1, 2, 3, 4 and 8 ranks

Step = list[tuple[int, int, bytes]]  # sample, which of its clips, and its pixels, draws and label; sorted


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> str:
    """60 training clips in several shards: two steps an epoch."""
    folder = tmp_path_factory.mktemp("loading")
    write_demo_videos(
        folder / "v", seed=4, train_per_class=6, val_per_class=1, test_per_class=1, unlabelled=1,
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


def config(shards: Any, **changes: Any) -> DataConfig:
    tree = {"shards": shards, "sampling": {"frames": 3, "stride": 2}, "crop_pixels": 24, "window_samples": 8,
            "streams": 3}  # fmt: skip
    return DataConfig.model_validate(tree | changes)


def content(batch: ClipBatch) -> Step:
    """What makes a clip: nothing else of it may depend on where it was made."""
    found = []
    for row in range(len(batch.labels)):
        parts = (batch.clips[row], batch.draws[row], batch.labels[row])
        made = b"".join(part.numpy().tobytes() for part in parts)
        found.append((int(batch.sample_index[row]), int(batch.views[row]), made))
    return found


def steps(data: DataConfig, start: int, stop: int, *, ranks: int = 1, accumulation: int = 1) -> list[Step]:
    """The clips of each optimizer step over all ranks."""
    found: list[Step] = [[] for _ in range(start, stop)]
    for rank in range(ranks):
        loader = ClipLoader(
            data, seed=0, global_batch=G, micro_batch=G // ranks // accumulation, rank=rank, world_size=ranks
        )
        for number, batch in enumerate(loader.micro_batches(start_step=start, stop_step=stop)):
            assert len(batch.labels) == G // ranks // accumulation, "every rank always has the same number"
            found[number // accumulation] += content(batch)
        loader.close()
    return [sorted(step) for step in found]


@pytest.fixture(scope="module")
def reference(shards: str) -> list[Step]:
    return steps(config(shards), 0, 4)


def test_two_epochs_hold_every_sample_at_most_once_each(reference: list[Step]) -> None:
    for epoch in (reference[:2], reference[2:]):
        samples = [sample for step in epoch for sample, *_ in step]
        assert len(samples) == len(set(samples)) == 2 * G
    assert reference[:2] != reference[2:]


GRID = list(itertools.product((1, 2, 3, 4, 8), (0, 1, 2, 4)))
FAST = [(ranks, 0) for ranks in (1, 2, 3, 4, 8)] + [(1, 4), (2, 2), (3, 1), (4, 1)]


@pytest.mark.parametrize(
    ("ranks", "workers"), [pytest.param(*one, marks=() if one in FAST else pytest.mark.slow) for one in GRID]
)
def test_ranks_and_workers_change_nothing(
    shards: str, reference: list[Step], ranks: int, workers: int
) -> None:
    assert steps(config(shards, workers=workers), 0, 4, ranks=ranks) == reference


WORLDS = [((1, 2), (2, 3)), ((4, 1), (3, 4)), ((8, 3), (1, 1)), ((3, 1), (8, 1))]  # (ranks, accumulation)
STOPS = [(stop, *worlds) for stop in (1, 2, 3) for worlds in WORLDS]


@pytest.mark.parametrize(
    ("stop", "before", "after"),
    [pytest.param(*one, marks=() if n % 3 == 0 else pytest.mark.slow) for n, one in enumerate(STOPS)],
)
def test_a_stop_at_any_step_and_another_world_continue_the_sequence(
    shards: str, reference: list[Step], stop: int, before: tuple[int, int], after: tuple[int, int]
) -> None:
    first = steps(config(shards), 0, stop, ranks=before[0], accumulation=before[1])
    rest = steps(config(shards), stop, 4, ranks=after[0], accumulation=after[1])
    assert first + rest == reference


@pytest.fixture
def damaged(shards: str, tmp_path: Path) -> str:
    """The shards with every seventh sample's bytes changed: real failures, in worker processes too."""
    folder = Path(shutil.copytree(shards, tmp_path / "damaged"))
    dataset = ShardDataset(str(folder), split="train")
    for index in range(0, len(dataset), 7):
        shard = dataset.shards[dataset.shard_of(index)]
        data = dataset.read(index)
        path = folder / shard.file
        tar = bytearray(path.read_bytes())
        place = tar.index(data)
        tar[place + len(data) // 2] ^= 0xFF
        path.write_bytes(tar)
    return str(folder)


def test_failures_change_nothing_either(damaged: str) -> None:
    def data(workers: int) -> DataConfig:
        return config(damaged, workers=workers, max_failed_share=1.0)

    expected = steps(data(0), 0, 4)
    assert all(sum(map(len, (step,))) >= G - 2 for step in expected), (
        "a substitute may already be in the batch"
    )
    broken = set(range(0, 60, 7))
    assert not broken & {sample for step in expected for sample, *_ in step}
    assert steps(data(2), 0, 4) == expected
    assert steps(data(0), 1, 4, ranks=1, accumulation=4) == expected[1:]


def test_a_substitute_comes_from_the_neighbourhood(damaged: str, caplog: pytest.LogCaptureFixture) -> None:
    """Streams times window samples are read at about the same time; a far shard is not opened for one sample."""
    loader = ClipLoader(
        config(damaged, max_failed_share=1.0), seed=0, global_batch=G, micro_batch=G, rank=0, world_size=1
    )
    for request in loader.requests(start_step=0, stop_step=2):
        near = {
            loader.order.draw(0, p).sample for at in request.positions for p in loader.order.substitutes(at)
        }
        (batch,) = loader.micro_batches(
            start_step=request.positions[0] // G, stop_step=request.positions[0] // G + 1
        )
        assert set(batch.sample_index.tolist()) <= near
        assert batch.failed
        for message in batch.failed:
            assert f"stands in for {message}" in caplog.text, "each is reported with its key"


@pytest.mark.parametrize("data_workers", [0, 2])
def test_a_clip_says_for_which_place_it_was_asked(damaged: str, data_workers: int) -> None:
    """Also one that stands in for another, on any rank: the columns are those of the request."""
    data = config(damaged, workers=data_workers, max_failed_share=1.0)
    replaced, places = 0, []
    for rank in range(2):
        one = ClipLoader(data, seed=0, global_batch=G, micro_batch=G // 4, rank=rank, world_size=2)
        asked = one.requests(start_step=0, stop_step=7)
        for request, batch in zip(asked, one.micro_batches(start_step=0, stop_step=7), strict=True):
            assert batch.epochs.tolist() == [request.epoch] * len(request.positions)
            assert batch.positions.tolist() == list(request.positions)
            places += [(request.epoch, at) for at in request.positions]
            wanted = [one.order.draw(request.epoch, at).sample for at in request.positions]
            replaced += sum(a != b for a, b in zip(wanted, batch.sample_index.tolist(), strict=True))
    per_epoch = 60 // G * G
    assert sorted(places) == [divmod(n, per_epoch) for n in range(7 * G)]
    assert replaced


def test_clips_of_one_sample_have_places_of_their_own(shards: str) -> None:
    data = config(shards, clips_per_sample=3)
    one = ClipLoader(data, seed=0, global_batch=G, micro_batch=G, rank=0, world_size=1)
    first = next(one.micro_batches(start_step=0, stop_step=1))
    assert sorted(first.positions.tolist()) == list(range(G))
    alone = first.to(torch.device("cpu"))
    assert torch.equal(alone.positions, first.positions)


def test_evaluation_has_places_too(shards: str) -> None:
    data = config(shards, views={"clips": 2, "crops": 1})
    loader = EvalLoader(data, split="val", batch=4, rank=1, world_size=2)
    for batch in loader:
        assert batch.epochs.tolist() == [-1] * len(batch.labels)
        assert batch.positions.tolist() == (2 * batch.sample_index + batch.views).tolist()


# --- mixtures and several clips of a sample -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A second dataset: the validation clips of the first under another name, as a training split of their own."""
    return str(shutil.copytree(shards, tmp_path_factory.mktemp("small") / "s"))


def test_a_mixture_is_the_same_for_every_world_and_after_a_stop(shards: str, small: str) -> None:
    data = config([{"url": shards, "weight": 3}, {"url": small, "weight": 1}])
    loader = ClipLoader(data, seed=0, global_batch=G, micro_batch=G, rank=0, world_size=1)
    assert (loader.num_samples, loader.steps_per_epoch) == (120, 5)
    expected = steps(data, 0, 8)
    drawn = [sample for step in expected for sample, *_ in step]
    assert abs(sum(sample < 60 for sample in drawn) / len(drawn) - 0.75) < 0.05
    assert max(drawn.count(sample) for sample in set(drawn)) <= 3, (
        "144 of 60 samples: every one two or three times"
    )
    assert steps(data, 0, 8, ranks=3, accumulation=2) == expected
    assert steps(data.model_copy(update={"workers": 2}), 0, 5, ranks=2) == expected[:5]
    assert steps(data, 3, 8, ranks=4) == expected[3:]


def test_weights_and_balanced_classes_are_two_ways_to_deal(shards: str, small: str) -> None:
    with pytest.raises(ValidationError, match="use one of the two"):
        config([{"url": shards, "weight": 3}, {"url": small, "weight": 1}], class_balanced=True)


def test_weights_are_part_of_what_a_resumed_run_must_keep(shards: str, small: str) -> None:
    def identity(**changes: Any) -> str:
        data = config(
            changes.pop("shards", [{"url": shards, "weight": 3}, {"url": small, "weight": 1}]), **changes
        )
        return ClipLoader(data, seed=0, global_batch=G, micro_batch=G, rank=0, world_size=1).fingerprint

    found = [
        identity(),
        identity(shards=[{"url": shards, "weight": 2}, {"url": small, "weight": 1}]),
        identity(shards=[shards, small]),
        identity(order="global"),
        identity(streams=2),
        identity(window_samples=9),
        identity(clips_per_sample=2),
    ]
    assert len(set(found)) == len(found)
    assert identity() == identity(workers=3, read_ahead=2, cache_decoded_mib=5, decoder="pyav")


def test_several_clips_come_from_one_decode(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    single = steps(config(shards), 0, 4)
    data = config(shards, clips_per_sample=4)
    decoded: list[int] = []
    read = ShardDataset.read
    monkeypatch.setattr(ShardDataset, "read", lambda self, i: (decoded.append(i), read(self, i))[1])
    expected = steps(data, 0, 4)
    assert len(decoded) == 4 * G // 4
    for step in expected:
        assert len(step) == G
        assert {view for _, view, _ in step} == {0, 1, 2, 3}
        assert len({clip for *_, clip in step}) == G, "every clip is cut anew"
    # All four steps lie in the first epoch, and the first clip of a sample is the one that a single clip would be.
    once = {clip for step in single[:2] for clip in step}
    assert len(once & {clip for step in expected for clip in step if clip[1] == 0}) >= 15
    monkeypatch.undo()
    assert steps(data, 0, 4, ranks=3, accumulation=2) == expected
    assert steps(data.model_copy(update={"workers": 2}), 1, 4, ranks=2) == expected[1:]
    with pytest.raises(ConfigError, match=r"data\.clips_per_sample"):
        steps(config(shards, clips_per_sample=5), 0, 1)


def test_mirrored_clips_change_class_where_left_and_right_do(shards: str) -> None:
    classes = ShardDataset(shards).classes
    pair = (classes[2], classes[5])
    plain, swapped = config(shards), config(shards, augment={"flip_label_pairs": [pair]})
    loaders = [
        ClipLoader(d, seed=0, global_batch=G, micro_batch=G, rank=0, world_size=1) for d in (plain, swapped)
    ]
    changed = 0
    for before, after in zip(*(one.micro_batches(start_step=0, stop_step=4) for one in loaders), strict=True):
        assert torch.equal(before.clips, after.clips)
        for old, new, draw in zip(before.labels, after.labels, before.draws[:, FLIP], strict=True):
            expected = {2: 5, 5: 2}.get(int(old), int(old)) if draw < 0.5 else int(old)
            assert int(new) == expected
            changed += int(new) != int(old)
    assert changed
    for pairs, message in (
        ([["nothing", classes[0]]], "nothing"),
        ([pair, (pair[0], classes[1])], "two pairs"),
    ):
        with pytest.raises(ConfigError, match=message):
            steps(config(shards, augment={"flip_label_pairs": pairs}), 0, 1)


def test_ten_crops_and_label_pairs_do_not_go_together(shards: str) -> None:
    with pytest.raises(ValidationError, match="ten crops"):
        config(shards, views={"crops": 10}, augment={"flip_label_pairs": [["a", "b"]]})


# --- reading ahead, hangs and deaths --------------------------------------------------------------------------------


@pytest.fixture
def in_memory(shards: str) -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    fs.put(shards, "/loading/s", recursive=True)
    yield "memory://loading/s"
    fs.rm("/loading", recursive=True)


@pytest.mark.parametrize("read_ahead", [0, 1, 5, 200])
def test_reading_ahead_changes_nothing(
    in_memory: str, reference: list[Step], read_ahead: int, tmp_path: Path
) -> None:
    data = config(in_memory, read_ahead=read_ahead)
    assert steps(data, 0, 4, ranks=2) == reference
    cached = data.model_copy(update={"cache_folder": str(tmp_path / "cache")})
    assert steps(cached, 0, 4, ranks=3) == reference
    assert list((tmp_path / "cache").glob("*.tar"))


def test_the_next_micro_batch_is_read_while_this_one_is_decoded(
    in_memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[int, str] = {}
    read = ShardDataset.read

    def watched(self: ShardDataset, i: int) -> bytes:
        threads[i] = threading.current_thread().name
        return read(self, i)

    monkeypatch.setattr(ShardDataset, "read", watched)
    data = config(in_memory, read_ahead=4)
    loader = ClipLoader(data, seed=0, global_batch=G, micro_batch=4, rank=0, world_size=1)
    batches = loader.micro_batches(start_step=0, stop_step=1)
    first = next(batches)
    until = time.monotonic() + 60
    while len(threads) < 8 and time.monotonic() < until:
        time.sleep(0.01)
    assert set(first.sample_index.tolist()) <= threads.keys()
    assert len(threads) == 8, "this micro-batch and as many samples of the next as allowed"
    assert all(name.startswith("read-ahead") for name in threads.values())
    loader.close()


def test_an_unreadable_remote_sample_is_replaced(in_memory: str, damaged: str, shards: str) -> None:
    fs = fsspec.filesystem("memory")
    fs.put(damaged, "/loading/damaged", recursive=True)
    changes = {"max_failed_share": 1.0}
    assert steps(config("memory://loading/damaged", **changes), 0, 4) == steps(
        config(damaged, **changes), 0, 4
    )


def hung(shards: str, folder: Path) -> str:
    """The shards with one tar replaced by a pipe nobody writes to: opening it never returns, as a dead mount's."""
    copy = Path(shutil.copytree(shards, folder / "hung"))
    for tar in (copy / "train").glob("*.tar"):
        tar.unlink()
        os.mkfifo(tar)
    return str(copy)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_hung_worker_is_said_and_ends_the_run(shards: str, tmp_path: Path, workers: int) -> None:
    data = config(hung(shards, tmp_path), workers=workers, worker_timeout_seconds=1.0)
    loader = ClipLoader(data, seed=0, global_batch=G, micro_batch=G, rank=0, world_size=1)
    before = set(multiprocessing.active_children())
    first = loader.dataset.name_of(loader.order.draw(0, 0).sample)
    with pytest.raises(WorkerError, match=r"no batch came .* for 1 s.*worker_timeout_seconds") as error:
        next(loader.micro_batches(start_step=0, stop_step=4))
    assert first in str(error.value)
    left = [process for process in multiprocessing.active_children() if process not in before]
    for process in left:
        process.join(60)
    assert not [process for process in left if process.is_alive()]


def test_a_killed_worker_is_said(shards: str) -> None:
    data = config(shards, workers=1, prefetch_batches=1)
    loader = ClipLoader(data, seed=0, global_batch=G, micro_batch=G, rank=0, world_size=1)
    before = set(multiprocessing.active_children())
    batches = loader.micro_batches(start_step=0, stop_step=1000)
    next(batches)
    (worker,) = [process for process in multiprocessing.active_children() if process not in before]
    os.kill(worker.pid or 0, signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"died \(process \d+ was killed by signal 9\).*out of memory"):
        for _ in batches:
            pass


def test_evaluation_waits_no_longer_either(shards: str, tmp_path: Path) -> None:
    copy = Path(hung(shards, tmp_path))
    data = config(str(copy), workers=1, worker_timeout_seconds=1.0)
    with pytest.raises(WorkerError, match="no batch came"):
        next(iter(EvalLoader(data, split="train", batch=4, rank=0, world_size=1)))


def test_threads_share_open_files_safely(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are let go and opened again under the hands of reading threads; every read still gets its own bytes."""
    monkeypatch.setattr("cliplift.sharding.read.fetch.MAX_OPEN_FILES", 1)
    dataset = ShardDataset(shards, split="train")
    expected = [dataset.read(i) for i in range(len(dataset))]
    wrong: list[int] = []

    def read_all(seed: int) -> None:
        for i in np.random.default_rng(seed).permutation(len(dataset)).tolist() * 5:
            try:
                if dataset.read(i) != expected[i]:
                    wrong.append(i)
            except (ShardReadError, OSError):
                wrong.append(i)

    threads = [threading.Thread(target=read_all, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_damaged_catalog_stops_the_run_where_it_is_read(shards: str, tmp_path: Path) -> None:
    """Not one of the samples that others stand in for: nothing that the catalog says can be trusted."""
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    data = bytearray((copy / CATALOG_ROWS_FILE).read_bytes())
    data[100] ^= 1
    (copy / CATALOG_ROWS_FILE).write_bytes(data)
    for workers in (0, 1):
        loader = ClipLoader(
            config(str(copy), workers=workers, max_failed_share=1.0), seed=1, global_batch=G, micro_batch=G, rank=0,
            world_size=1,
        )  # fmt: skip
        with pytest.raises(ManifestError, match=f"{CATALOG_ROWS_FILE}: rows 0 to .*: crc32 differs"):
            next(loader.micro_batches(start_step=0, stop_step=1))
        loader.close()


@pytest.mark.slow
def test_a_dataset_without_a_catalog_gives_the_same_clips(shards: str, tmp_path: Path) -> None:
    """As version 1 of the format was; a run that began on it goes on after `cliplift finalize`."""
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    facts = load_dataset((copy / DATASET_FILE).read_bytes(), file="d")
    (copy / DATASET_FILE).write_bytes(dump_dataset(replace(facts, catalog_sha256="")))
    for changes in ({}, {"workers": 1, "class_balanced": True}, {"label_share": 0.5}):
        old, new = (
            ClipLoader(config(url, **changes), seed=1, global_batch=6, micro_batch=6, rank=0, world_size=1)
            for url in (str(copy), shards)
        )
        assert old.fingerprint == new.fingerprint
        for a, b in zip(
            old.micro_batches(start_step=0, stop_step=3), new.micro_batches(start_step=0, stop_step=3), strict=True
        ):  # fmt: skip
            assert content(a) == content(b)
        old.close()
        new.close()
