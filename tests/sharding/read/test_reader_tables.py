"""What a reader takes of a dataset: splits, folds, places and errors, over shards of a few bytes with a known table.

Each with the catalog of version 2 of the format, and without one, as version 1 was.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from cliplift.configs.sections import ConfigError
from cliplift.sharding.build.finalize import add_catalog, describe
from cliplift.sharding.build.writer import ShardWriter
from cliplift.sharding.manifest import (
    CATALOG_FILE,
    DATASET_FILE,
    SAMPLES_FILE,
    SCORES_FILE,
    SCORES_VALUES_FILE,
    ManifestError,
    dump_dataset,
)
from cliplift.sharding.read.fetch import OpenFiles
from cliplift.sharding.read.generations import read_dataset
from cliplift.sharding.read.reader import ShardDataset, ShardReadError, fold_count
from cliplift.sharding.read.subsets import Subset
from cliplift.sharding.scores.carried import publish_scores
from cliplift.sharding.scores.stored import ColumnFacts
from cliplift.sharding.scratch import scratch_folder
from cliplift.sharding.storage import open_store

# Ten clips in three shards; fold 2 leaves clip 4 out, fold 3 the clips 0 and 9.
FOLDS = [
    ("train", "train", ""), ("train", "test", "train"), ("test", "train", "train"), ("train", "train", "test"),
    ("test", "", "train"), ("train", "train", "train"), ("test", "test", "train"), ("train", "train", "test"),
    ("train", "test", "train"), ("test", "train", ""),
]  # fmt: skip
SHARDS = ((0, 4), (4, 5), (5, 10))


def clip(number: int) -> bytes:
    return bytes([number]) * (10 + number)


def sample(number: int, *, folds: bool) -> dict[str, Any]:
    return {
        "key": f"k{number}", "video_id": f"v{number // 2}", "source": f"{number}.mp4",
        "split": "all" if folds else ("train", "val")[number % 5 == 0],
        "label": -1 if number == 7 else number % 3, "labels": (0, 2, 4)[: number % 4],
        "folds": FOLDS[number] if folds else (),
        "group": None if number else "g", "start_seconds": number * 1.5, "end_seconds": number * 1.5 + 1,
        "num_frames": 20 + number, "fps": 12.5, "width": 40, "height": 30 + number, "keyframes": (0, 16),
        "source_sha256": "",
    }  # fmt: skip


def write_dataset(url: str, *, folds: bool = False, flow: bool = True) -> None:
    store = open_store(url)
    indexes = []
    for number, (start, stop) in enumerate(SHARDS):
        # Shard numbers with a gap, as where a whole shard was refused.
        writer = ShardWriter(store, f"s/{number}.tar", shard=2 * number + 1, split="s", plan_id="p")
        for i in range(start, stop):
            extra = b"flow" if flow and i % 2 else b""
            writer.add(mp4=clip(i), flow=extra, facts={"i": i}, picture_hashes=(), **sample(i, folds=folds))
        indexes.append(writer.commit())
    with scratch_folder() as scratch:
        dataset = describe(
            indexes, table=scratch / SAMPLES_FILE, name="tiny", classes=("a", "b", "c"), folds=3 if folds else 0,
            missing=0, plan_id="p", settings={},
        )  # fmt: skip
        store.publish(scratch / SAMPLES_FILE, SAMPLES_FILE)
    store.write(DATASET_FILE, dump_dataset(dataset))


@pytest.fixture(params=["version 1", "catalog"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def plain(tmp_path: Path, version: str) -> str:
    return write_version(tmp_path / "plain", version, folds=False)


@pytest.fixture
def folded(tmp_path: Path, version: str) -> str:
    return write_version(tmp_path / "folded", version, folds=True)


def write_version(folder: Path, version: str, *, folds: bool) -> str:
    write_dataset(str(folder), folds=folds)
    if version == "catalog":
        add_catalog(str(folder))
    return str(folder)


def keys(dataset: ShardDataset) -> list[str]:
    return [dataset.key(i) for i in range(len(dataset))]


@pytest.mark.parametrize("fold", [1, 2, 3])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_fold_gives_the_rows_its_list_names(folded: str, fold: int, split: str) -> None:
    dataset = ShardDataset(folded, fold=fold, split=split)
    expected = [number for number in range(10) if FOLDS[number][fold - 1] == split]
    assert keys(dataset) == [f"k{number}" for number in expected]
    assert [dataset.read(i) for i in range(len(dataset))] == [clip(number) for number in expected]
    assert {dataset.facts(i).split for i in range(len(dataset))} == {split}
    assert dataset.splits == ("test", "train"), "what a fold leaves out is no split"


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_rows_a_fold_leaves_out_are_in_none_of_its_splits(folded: str, fold: int) -> None:
    whole = keys(ShardDataset(folded, fold=fold))
    assert whole == [f"k{number}" for number in range(10) if FOLDS[number][fold - 1]]
    with pytest.raises(ConfigError, match=r"it has test \(\d\), train \(\d\)$"):
        ShardDataset(folded, fold=fold, split="val")


def test_without_a_fold_all_rows_of_a_folded_dataset_are_one_split(folded: str, plain: str) -> None:
    assert (
        keys(ShardDataset(folded)) == keys(ShardDataset(folded, split="all")) == [f"k{i}" for i in range(10)]
    )
    assert ShardDataset(folded).splits == ("all",)
    with pytest.raises(ConfigError, match="has no split 'train'"):
        ShardDataset(folded, split="train")
    assert (fold_count(folded), fold_count(plain)) == (3, 0)


def test_folds_a_dataset_does_not_have_are_refused(folded: str, plain: str) -> None:
    with pytest.raises(ConfigError, match="has 3 folds") as caught:
        ShardDataset(folded, fold=4)
    assert (caught.value.key, caught.value.value) == ("data.fold", 4)
    with pytest.raises(ConfigError, match="single split") as caught:
        ShardDataset(plain, fold=1)
    assert (caught.value.key, caught.value.value) == ("data.fold", 1)


def test_samples_lie_in_the_shards_that_the_table_says(plain: str) -> None:
    """The shards hold the clips 0 1 2 3 | 4 | 5 6 7 8 9, of which 0 and 5 are of split "val"."""
    dataset = ShardDataset(plain, split="train")
    assert keys(dataset) == ["k1", "k2", "k3", "k4", "k6", "k7", "k8", "k9"]
    assert dataset.shard_ranges == [(0, 3), (3, 4), (4, 8)]
    assert [dataset.shard_of(i) for i in range(8)] == [0, 0, 0, 1, 2, 2, 2, 2]
    assert [facts.shard for facts in dataset.shards] == [1, 3, 5]
    held_out = ShardDataset(plain, split="val")
    assert keys(held_out) == ["k0", "k5"]
    assert held_out.shard_ranges == [(0, 1), (1, 2)]
    assert [facts.file for facts in held_out.shards] == ["s/0.tar", "s/2.tar"], (
        "a shard without samples is none"
    )
    assert [held_out.read(i) for i in (0, 1)] == [clip(0), clip(5)]


def test_facts_and_shapes_are_those_of_the_row(plain: str) -> None:
    dataset = ShardDataset(plain)
    for number in (0, 3, 7, 9):
        row, facts, shape = sample(number, folds=False), dataset.facts(number), dataset.shape(number)
        for name in ("key", "labels", "split", "video_id", "group", "num_frames", "fps", "width", "height", "keyframes",
                     "source"):  # fmt: skip
            assert getattr(facts, name) == row[name], name
        assert facts.label == (None if number == 7 else number % 3)
        assert facts.span_seconds == (number * 1.5, number * 1.5 + 1)
        assert facts.shard == (1 if number < 4 else 5)
        assert shape == (20 + number, 12.5, 30 + number, 40)
        assert dataset.read_json(number) == {"i": number}
    assert dataset.most_labels == 3
    assert dataset.column("video_id") == [f"v{number // 2}" for number in range(10)]
    names, codes = dataset.encoded("video_id")
    assert (names, codes.tolist()) == ([f"v{n}" for n in range(5)], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4])


@pytest.mark.parametrize("number", [-1, 10])
@pytest.mark.parametrize("call", ["facts", "shape", "key", "shard_of", "read", "read_json"])
def test_numbers_outside_are_an_index_error(plain: str, call: str, number: int) -> None:
    with pytest.raises(IndexError, match=f"sample {number} of 10"):
        getattr(ShardDataset(plain), call)(number)


def test_flow_is_read_where_it_is_stored(plain: str, tmp_path: Path) -> None:
    dataset = ShardDataset(plain)
    assert dataset.has_flow
    assert dataset.read_flow(1) == b"flow"
    with pytest.raises(ShardReadError, match=r"s/0.tar, k0.flow.mp4: the sample has no such member"):
        dataset.read_flow(0)


def test_a_subset_is_taken_of_the_split(plain: str) -> None:
    subset = Subset(label_share=0.5, seed=3)
    whole, part = ShardDataset(plain, split="train"), ShardDataset(plain, split="train", subset=subset)
    rows = [whole.facts(i) for i in range(len(whole))]
    taken = subset.mask(
        labels=[-1 if r.label is None else r.label for r in rows],
        groups=[r.group for r in rows],
        video_ids=[r.video_id for r in rows],
    )
    assert 0 < len(part) < len(whole)
    assert keys(part) == [row.key for row, kept in zip(rows, taken, strict=True) if kept]
    assert part.fingerprint != whole.fingerprint != ShardDataset(plain).fingerprint


def damaged(plain: str, harm: Callable[[Path], object]) -> str:
    dataset = ShardDataset(plain)
    harm(Path(plain) / "s/0.tar")
    with pytest.raises(ShardReadError) as caught:
        dataset.read(1)
    assert (caught.value.file, caught.value.member) == ("s/0.tar", "k1.mp4")
    assert str(caught.value) == f"s/0.tar, k1.mp4: {caught.value.reason}"
    return caught.value.reason


def test_damage_is_told_apart(plain: str) -> None:
    """Clip 1 stands behind headers and members of one block each: clip 0 with JSON (4 blocks) and its own header."""
    offset, whole = 5 * 512, (Path(plain) / "s/0.tar").read_bytes()
    assert whole[offset:][:11] == clip(1)

    sums = []
    for bit in range(8):
        data = whole[: offset + 1] + bytes([whole[offset + 1] ^ 1 << bit]) + whole[offset + 2 :]
        sums.append(zlib.crc32(data[offset:][:11]))
        assert damaged(plain, lambda path, data=data: path.write_bytes(data)) == (
            "crc32 differs: the bytes are damaged"
        )
    assert min(sums) < zlib.crc32(clip(1)) < max(sums), "checksums above and below the stored one"
    cut = damaged(plain, lambda path: path.write_bytes(whole[: offset + 7]))
    assert cut == "11 bytes expected, 7 found: the shard is cut short"
    assert damaged(plain, Path.unlink) == "the shard does not exist"


def test_a_file_system_that_fails_is_an_error_of_the_sample(
    plain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale mount or a bad sector raises OSError: named like all damage, so that the loader can count it."""

    def fail(self: OpenFiles, path: Path, offset: int, length: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(OpenFiles, "read", fail)
    with pytest.raises(
        ShardReadError, match=r"s/2.tar, k5.mp4: cannot be read: \[Errno 5\] Input/output error"
    ) as caught:
        ShardDataset(plain).read(5)
    assert isinstance(caught.value.__cause__, OSError)


def test_the_system_is_asked_for_exactly_the_bytes_of_a_member(
    plain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda _, start, length, what: asked.append((start, length, what))
    )
    dataset = ShardDataset(plain)
    assert dataset.announce(1)
    assert dataset.announce(1, "flow")
    assert asked == [(5 * 512, 11, os.POSIX_FADV_WILLNEED), (9 * 512, 4, os.POSIX_FADV_WILLNEED)]
    assert (Path(plain) / "s/0.tar").read_bytes()[9 * 512 :][:4] == b"flow"
    monkeypatch.delattr(os, "posix_fadvise")
    assert not dataset.announce(1), "a system without it"


def test_remote_ranges_hold_the_member_alone_and_are_not_announced() -> None:
    url, fs = "memory://tables", fsspec.filesystem("memory")
    write_dataset(url, flow=False)
    try:
        dataset = ShardDataset(url)
        assert [dataset.read(i) for i in range(10)] == [clip(i) for i in range(10)]
        assert not dataset.announce(0)
        # No cache was asked for; without one nothing is kept.
        fs.pipe_file("/tables/s/0.tar", b"")
        with pytest.raises(ShardReadError, match="10 bytes expected, 0 found"):
            dataset.read(0)
    finally:
        fs.rm("/tables", recursive=True)


def test_a_cache_keeps_whole_shards_of_what_was_read(tmp_path: Path) -> None:
    """From then on the store is not asked again; a shard nobody read is not there."""
    url, fs = "memory://tables", fsspec.filesystem("memory")
    write_dataset(url)
    try:
        dataset = ShardDataset(url, cache_folder=str(tmp_path))
        assert dataset.read(4) == clip(4)
        assert dataset.read_flow(1) == b"flow"
        fs.rm("/tables/s", recursive=True)
        assert [dataset.read(i) for i in range(5)] == [clip(i) for i in range(5)]
        assert {p.name for p in tmp_path.glob("*.tar")} == {f"{dataset.shards[n].sha256}.tar" for n in (0, 1)}
        with pytest.raises(ShardReadError, match=r"s/2.tar, k5.mp4: the shard does not exist"):
            dataset.read(5)
    finally:
        fs.rm("/tables", recursive=True)


def test_a_cache_folder_is_for_remote_shards_alone(plain: str, tmp_path: Path) -> None:
    dataset = ShardDataset(plain, cache_folder=str(tmp_path / "cache"))
    assert dataset.read(3) == clip(3)
    assert not (tmp_path / "cache").exists()


def test_the_checksum_is_the_stored_one(plain: str) -> None:
    """The table's own value, and the crc32 of the bytes as zlib has it."""
    assert ShardDataset(plain).column("mp4_crc32") == [zlib.crc32(clip(i)) for i in range(10)]


def test_there_is_no_flow_where_none_was_stored(tmp_path: Path, version: str) -> None:
    write_dataset(str(tmp_path), flow=False)
    if version == "catalog":
        add_catalog(str(tmp_path))
    dataset = ShardDataset(str(tmp_path))
    assert not dataset.has_flow
    for number in (0, 1):
        with pytest.raises(ShardReadError, match=r"flow\.mp4: the sample has no such member"):
            dataset.read_flow(number)


def most(numbers: Iterable[int]) -> int:
    return max(len(sample(number, folds=False)["labels"]) for number in numbers)


def test_the_most_labels_of_a_sample_are_those_of_what_is_taken(plain: str, folded: str) -> None:
    assert ShardDataset(plain).most_labels == most(range(10)) == 3
    assert ShardDataset(plain, split="val").most_labels == most((0, 5)) == 1
    assert ShardDataset(folded).most_labels == 3
    for fold in (1, 2, 3):
        for split in ("train", "test"):
            taken = [number for number in range(10) if FOLDS[number][fold - 1] == split]
            assert ShardDataset(folded, split=split, fold=fold).most_labels == most(taken), (fold, split)


def test_a_catalog_is_read_in_place_of_the_table(tmp_path: Path) -> None:
    """Where it is missing although the manifest names it, that is said, and the table is not read instead."""
    url = write_version(tmp_path / "with", "catalog", folds=False)
    table = Path(url) / SAMPLES_FILE
    kept = table.read_bytes()
    table.write_bytes(bytes(len(kept)))
    dataset = ShardDataset(url, split="train")
    assert dataset.read(0) == clip(1)
    table.write_bytes(kept)
    (Path(url) / CATALOG_FILE).unlink()
    with pytest.raises(ManifestError, match=r"does not exist; copy it too, or finalize again"):
        ShardDataset(url)


@pytest.mark.parametrize("gone", [SCORES_FILE, SCORES_VALUES_FILE])
def test_a_filter_without_the_scores_it_names_is_refused(tmp_path: Path, gone: str) -> None:
    url = write_version(tmp_path / "scored", "catalog", folds=False)
    store = open_store(url)
    motion = np.linspace(0, 0.9, 10)
    facts = ColumnFacts("motion", "number", version=1, unscored=0, failed=0)
    with scratch_folder() as scratch:
        dataset = publish_scores(store, read_dataset(store), {"motion": (facts, motion)}, scratch)
    store.write(DATASET_FILE, dump_dataset(dataset))
    moving = ShardDataset(url, where="motion > 0.65")
    assert keys(moving) == ["k7", "k8", "k9"]
    assert [shard.file for shard in moving.shards] == ["s/2.tar"], "the others hold none of them"
    (Path(url) / gone).unlink()
    assert len(ShardDataset(url)) == 10
    with pytest.raises(ManifestError, match="not exist; copy"):
        ShardDataset(url, where="motion > 0.65")
