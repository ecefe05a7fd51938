"""The catalog: the same samples as the table it is made of, checked block by block, small to send, safe to write."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from cliplift.launch import cli
from cliplift.sharding.build.finalize import add_catalog, describe
from cliplift.sharding.build.verify import verify
from cliplift.sharding.manifest import (
    CATALOG_FILE,
    CATALOG_ROWS_FILE,
    DATASET_FILE,
    FORMAT,
    SAMPLES_FILE,
    ManifestError,
    Sample,
    ShardIndex,
    digest,
    dump_dataset,
    load_dataset,
)
from cliplift.sharding.read.catalog import (
    BLOCK_ROWS,
    CatalogHead,
    checksums_of,
    dump_head,
    layout_of,
    load_head,
    open_catalog,
    row_type,
)
from cliplift.sharding.read.reader import ShardDataset
from cliplift.sharding.read.selection import Rows
from cliplift.sharding.read.shared import SENT_BYTES
from cliplift.sharding.read.subsets import Subset
from cliplift.sharding.storage import open_store

StopAfter = Callable[[int], AbstractContextManager[None]]

ROWS, PER_SHARD = 10_000, 700  # three blocks, shards that blocks cut
VIDEO_ROWS, GROUP_ROWS = 3, 21  # that follow each other and are of one video, and of one group


def sample(number: int) -> Sample:
    """Every shard but each fourth is of one split; a shard of mixed splits has every third sample in "val"."""
    shard, inside = divmod(number, PER_SHARD)
    split = "test" if shard % 5 == 1 else "val" if shard % 4 == 3 and inside % 3 == 0 else "train"
    return Sample(
        key=f"k{number:06d}", mp4_offset=512 + 100 * inside, mp4_bytes=90, mp4_crc32=(number * 2654435761) % 2**32,
        json_offset=0, json_bytes=2, json_crc32=7, video_id=f"v{number // VIDEO_ROWS}", source=f"{number}.mp4",
        split=split, label=number % 5 if number % 11 else -1, labels=tuple(range(number % 4)),
        folds=("train", split), group=f"g{number // GROUP_ROWS}" if number % 2 else None, start_seconds=0.0,
        end_seconds=1.5, num_frames=10 + number % 90, fps=12.5 + number % 3, width=340, height=256 + number % 2,
        keyframes=(0, 8), source_sha256="0" * 64, flow_offset=200 + number % 7, flow_bytes=20, flow_crc32=number,
    )  # fmt: skip


def write(folder: Path, *, folds: int = 0) -> str:
    """A dataset of version 1, without tars."""
    samples = [sample(number) for number in range(ROWS)]
    indexes = [
        ShardIndex(
            shard=first // PER_SHARD, split="s", tar=f"s/{first}.tar", tar_bytes=100_000, tar_sha256=f"{first:064d}",
            plan_id="p", samples=tuple(samples[first : first + PER_SHARD]), refused=(),
        )
        for first in range(0, ROWS, PER_SHARD)
    ]  # fmt: skip
    store = open_store(str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    dataset = describe(
        indexes, table=folder / SAMPLES_FILE, name="n", classes=tuple("abcde"), folds=folds, missing=0, plan_id="p",
        settings={},
    )  # fmt: skip
    store.write(DATASET_FILE, dump_dataset(dataset))
    return str(folder)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write(tmp_path_factory.mktemp("catalog") / "old"))


@pytest.fixture(scope="module")
def new(old: Path) -> Path:
    folder = Path(shutil.copytree(old, old.parent / "new"))
    add_catalog(str(folder))
    return folder


@pytest.fixture
def copy(new: Path, tmp_path: Path) -> Path:
    """A dataset with a catalog, to damage."""
    return Path(shutil.copytree(new, tmp_path / "copy"))


def numbers(dataset: ShardDataset) -> list[int]:
    assert [dataset.key(i) for i in (0, len(dataset) - 1, 7)] == [
        dataset.column("key")[i] for i in (0, -1, 7)
    ]
    return [int(key[1:]) for key in dataset.column("key")]


@pytest.mark.parametrize("split", [None, "train", "val", "test"])
@pytest.mark.parametrize(
    "subset",
    [None, Subset(label_share=0.1, seed=3), Subset(held_out_share=0.2, seed=1),
     Subset(held_out_share=0.2, held_out=True, label_share=0.5, seed=1)],
    ids=["all", "few labels", "training part", "few of the held-out part"],
)  # fmt: skip
def test_both_versions_give_the_rows_that_the_names_say(
    old: Path, new: Path, split: str | None, subset: Subset | None
) -> None:
    rows = [sample(n) for n in range(ROWS) if split in (None, sample(n).split)]
    if subset is not None:
        mask = subset.mask(
            labels=[r.label for r in rows],
            groups=[r.group for r in rows],
            video_ids=[r.video_id for r in rows],
        )
        rows = [row for row, kept in zip(rows, mask, strict=True) if kept]
    found = [ShardDataset(str(url), split=split, subset=subset) for url in (old, new)]
    for dataset in found:
        assert numbers(dataset) == [int(row.key[1:]) for row in rows]
        assert dataset.labels.tolist() == [row.label for row in rows]
        assert dataset.most_labels == max(len(row.labels) for row in rows)
        named = [row.video_id for row in rows]
        assert [dataset.video(i) for i in range(0, len(dataset), 97)] == dataset.videos[::97].tolist()
        assert len(set(zip(named, dataset.videos.tolist(), strict=True))) == len(set(named))
        for i in range(0, len(rows), 83):
            row = rows[i]
            assert dataset.shape(i) == (row.num_frames, row.fps, row.height, row.width)
            assert (dataset.label(i), dataset.label_set(i)) == (row.label, row.labels)
            assert dataset.facts(i).split == row.split
            shard = dataset.shard_of(i)
            assert dataset.shards[shard].shard == int(row.key[1:]) // PER_SHARD
            assert dataset.shard_ranges[shard][0] <= i < dataset.shard_ranges[shard][1]
    assert found[0].fingerprint == found[1].fingerprint
    assert found[0].shards == found[1].shards
    assert found[0].splits == found[1].splits == ("test", "train", "val")


@pytest.mark.parametrize("fold", [1, 2])
def test_folds_are_found_in_mixed_shards(tmp_path: Path, fold: int) -> None:
    url = write(tmp_path / "folds", folds=2)
    old = ShardDataset(url, fold=fold, split="train")
    add_catalog(url)
    new = ShardDataset(url, fold=fold, split="train")
    expected = [n for n in range(ROWS) if sample(n).folds[fold - 1] == "train"]
    assert new._rows.array().tolist() == old._rows.array().tolist() == expected
    assert new.splits == old.splits == (("train",), ("test", "train", "val"))[fold - 1]
    assert new.fingerprint == old.fingerprint


def test_runs_of_rows_are_the_rows() -> None:
    draw = np.random.default_rng(4)
    for share in (0.0, 0.02, 0.5, 0.97, 1.0):
        mask = draw.random(300) < share
        expected = np.flatnonzero(mask)
        rows = Rows(*Rows.of_mask(mask))
        assert rows.array().tolist() == expected.tolist()
        assert [rows.row(i) for i in range(len(rows))] == expected.tolist()
        assert rows.before(np.arange(301)).tolist() == [int((expected < row).sum()) for row in range(301)]
        half = draw.random(len(expected)) < 0.5
        assert rows.taken(half).array().tolist() == expected[half].tolist()
        assert pickle.loads(pickle.dumps(rows)).array().tolist() == expected.tolist()


def test_what_is_sent_does_not_grow_with_the_samples(old: Path, new: Path) -> None:
    """Of a dataset without a catalog the rows that its opener made are shared, not made again and not sent."""
    subset = Subset(label_share=0.5, seed=3)
    for url in (old, new):
        dataset = ShardDataset(str(url), split="train", subset=subset)
        data = pickle.dumps(dataset)
        assert len(data) < 3 * SENT_BYTES < layout_of(dataset._catalog.head).end
        again = pickle.loads(data)
        assert (again.splits, again.shards, again.fingerprint) == (
            dataset.splits,
            dataset.shards,
            dataset.fingerprint,
        )
        assert again._rows.array().tolist() == dataset._rows.array().tolist()
        assert [again.shape(i) for i in range(0, 2000, 7)] == [dataset.shape(i) for i in range(0, 2000, 7)]
        assert len(pickle.dumps(again)) == len(data), "it can be sent on"
        if url == old:
            assert isinstance(again._made.rows.array.base, np.memmap)
            file = again._made.rows._file
            first = dataset.shape(0)
            del dataset
            assert not file.exists(), "it goes with the array that it is a copy of"
            assert again.shape(0) == first, "and stays for those who have it open"


def test_a_dataset_written_anew_is_not_another_process_s_dataset(copy: Path) -> None:
    data = pickle.dumps(ShardDataset(str(copy)))
    facts = load_dataset((copy / DATASET_FILE).read_bytes(), file="d")
    (copy / DATASET_FILE).write_bytes(dump_dataset(dataclasses.replace(facts, fingerprint="other")))
    with pytest.raises(ManifestError, match="was written anew since the run began"):
        pickle.loads(data)


def test_adding_a_catalog_gives_the_same_bytes_and_keeps_the_rest(old: Path, new: Path, copy: Path) -> None:
    before = {path.name: path.read_bytes() for path in new.iterdir()}
    add_catalog(str(copy))
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert set(before) == {DATASET_FILE, SAMPLES_FILE, CATALOG_FILE, CATALOG_ROWS_FILE}
    assert before[SAMPLES_FILE] == (old / SAMPLES_FILE).read_bytes()
    facts = [load_dataset((folder / DATASET_FILE).read_bytes(), file="d") for folder in (old, new)]
    assert facts[0] == dataclasses.replace(facts[1], catalog_sha256="")
    assert FORMAT.encode() in (old / DATASET_FILE).read_bytes()
    assert FORMAT.encode() not in before[DATASET_FILE], "an older version is told so"


def test_the_command_upgrades(
    old: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(old, tmp_path / "old"))
    assert cli.main(["finalize", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: catalog of {ROWS} samples in 15 shards written\n"
    assert (folder / DATASET_FILE).read_bytes() == (new / DATASET_FILE).read_bytes()
    (folder / SAMPLES_FILE).write_bytes(b"")
    for place, error in ((folder, "does not belong to dataset.json"), (tmp_path, "holds no dataset.json")):
        assert cli.main(["finalize", str(place)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert error in line


def test_a_catalog_half_written_is_not_used(old: Path, tmp_path: Path, stop_after: StopAfter) -> None:
    """Whatever file a killed process got to, the dataset is the one before; the manifest comes last."""
    folder = Path(shutil.copytree(old, tmp_path / "killed"))
    for files in range(3):
        with stop_after(files), pytest.raises(KeyboardInterrupt):
            add_catalog(str(folder))
        assert (folder / DATASET_FILE).read_bytes() == (old / DATASET_FILE).read_bytes()
        assert ShardDataset(str(folder))._made is not None, "read as version 1"
    with stop_after(3):
        add_catalog(str(folder))
    assert ShardDataset(str(folder))._made is None
    assert ShardDataset(str(folder)).fingerprint == ShardDataset(str(old)).fingerprint


def test_a_damaged_block_is_found_when_it_is_touched_and_not_before(copy: Path) -> None:
    dataset = ShardDataset(str(copy))
    head = dataset._catalog.head
    path = copy / CATALOG_ROWS_FILE
    whole = path.read_bytes()
    for row in (0, BLOCK_ROWS, ROWS - 1):
        data = bytearray(whole)
        data[row * row_type(head).itemsize + 9] ^= 4
        path.write_bytes(data)
        dataset = ShardDataset(str(copy))
        for other in (0, BLOCK_ROWS, ROWS - 1):
            if other // BLOCK_ROWS == row // BLOCK_ROWS:
                with pytest.raises(
                    ManifestError, match=rf"{CATALOG_ROWS_FILE}: rows \d+ to \d+: crc32 differs"
                ):
                    dataset.shape(other)
            else:
                dataset.shape(other)
        report = verify(str(copy), decode="none")
        assert ("damaged", CATALOG_FILE) in {(p.kind, p.file) for p in report.problems}
    data = bytearray(whole)
    data[layout_of(head).labels + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ManifestError, match=r"labels 0 to 4096: crc32 differs"):
        ShardDataset(str(copy)).label_set(3)
    data = bytearray(whole)
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ManifestError, match="its checksums differ"):
        ShardDataset(str(copy))


@pytest.mark.parametrize(
    "harm", ["cut", "longer", "empty", "gone", "head gone", "head changed", "table gone"]
)
def test_files_that_are_not_whole_are_refused_at_once(copy: Path, harm: str) -> None:
    rows, head = copy / CATALOG_ROWS_FILE, copy / CATALOG_FILE
    whole = rows.read_bytes()
    if harm in ("cut", "longer", "empty"):
        rows.write_bytes({"cut": whole[:-4], "longer": whole + b"\0", "empty": b""}[harm])
    elif harm == "head changed":
        head.write_bytes(head.read_bytes().replace(b'"rows":10000', b'"rows":10001'))
    else:
        {"gone": rows, "head gone": head, "table gone": copy / SAMPLES_FILE}[harm].unlink()
    with pytest.raises(ManifestError, match="finalize"):
        ShardDataset(str(copy))


def test_a_file_cut_short_while_it_is_read_is_noticed_at_the_next_block(copy: Path) -> None:
    dataset = ShardDataset(str(copy))
    dataset.shape(0)
    os.truncate(copy / CATALOG_ROWS_FILE, 4096)
    with pytest.raises(ManifestError, match=f"{CATALOG_ROWS_FILE}: was cut short while it was read"):
        dataset.shape(BLOCK_ROWS)
    with pytest.raises(ManifestError, match="was cut short"):
        dataset.label_set(BLOCK_ROWS + 3)


def rewritten(folder: Path, change: Callable[[Any, Any], None], **head_values: Any) -> None:
    """Change rows and labels, or the head, and make all checksums right again."""
    dataset = load_dataset((folder / DATASET_FILE).read_bytes(), file="d")
    head = load_head((folder / CATALOG_FILE).read_bytes(), dataset, file="c")
    catalog = open_catalog(folder / CATALOG_ROWS_FILE, head, dataset, file="c")
    rows, labels = catalog.rows.copy(), catalog.labels.copy()
    change(rows, labels)
    checksums = checksums_of(head, rows, labels)
    (folder / CATALOG_ROWS_FILE).write_bytes(rows.tobytes() + labels.tobytes() + checksums.tobytes())
    head = dataclasses.replace(head, checksums_sha256=digest(checksums.tobytes()), **head_values)
    (folder / CATALOG_FILE).write_bytes(dump_head(head))
    dataset = dataclasses.replace(dataset, catalog_sha256=digest(dump_head(head)))
    (folder / DATASET_FILE).write_bytes(dump_dataset(dataset))


@pytest.mark.parametrize(
    ("name", "value"),
    [("mp4_offset", -5), ("mp4_offset", 10**15), ("mp4_bytes", 10**15), ("mp4_bytes", -1), ("mp4_bytes", 2**63 - 1),
     ("flow_offset", 10**15), ("label", 5), ("label", -2), ("num_frames", 0), ("fps", float("nan")),
     ("fps", float("inf")), ("fps", -1.0),
     ("width", -2), ("height", 0), ("video", 2**32 - 1), ("group", 2**32 - 1), ("splits", 3), ("labels_start", -1),
     ("labels_start", 2**62), ("labels_count", 2**32 - 1), ("labels_count", 4)],
)  # fmt: skip
def test_rows_that_cannot_be_true_are_refused(copy: Path, name: str, value: float) -> None:
    def change(rows: Any, _: Any) -> None:
        rows[name][5000] = value

    rewritten(copy, change)
    dataset = ShardDataset(str(copy))
    dataset.shape(0)
    with pytest.raises(ManifestError, match=rf"{CATALOG_ROWS_FILE}: row 5000: \w+ is .*, which cannot be"):
        dataset.read(5001)
    assert not verify(str(copy), decode="none").ok


@pytest.mark.parametrize("value", [-1, 5, 2**31 - 1])
def test_listed_labels_of_no_class_are_refused(copy: Path, value: int) -> None:
    def change(_: Any, labels: Any) -> None:
        labels[2] = value

    rewritten(copy, change)
    with pytest.raises(ManifestError, match="labels 0 to 4096: one is of no class"):
        ShardDataset(str(copy)).label_set(3)


@pytest.mark.parametrize(
    "values",
    [{"rows": 9_999}, {"rows": 2**62}, {"block_rows": 0}, {"block_rows": 2**40}, {"videos": 0}, {"videos": 2**40},
     {"label_values": -1}, {"label_values": 2**60}, {"splits": ("a", "a", "b")}, {"splits": ("", "a", "b")},
     {"splits": ()}, {"counts": ((1, 2),)}, {"counts": ()}, {"counts": ((2**40, 0, 0),)}, {"folded": True},
     {"shard_splits": (((0, 3),),)}, {"shard_splits": (((7, 15),),)}, {"shard_splits": (((0, 16), (0, -1)),)},
     {"flow": False}, {"samples_sha256": "0"}, {"samples_bytes": 1}],
    ids=lambda values: " ".join(f"{k}={v}" for k, v in values.items()),
)  # fmt: skip
def test_heads_that_cannot_be_true_are_refused(copy: Path, values: dict[str, Any]) -> None:
    rewritten(copy, lambda *_: None, **values)
    with pytest.raises(ManifestError, match=CATALOG_FILE.removesuffix("json") + "|" + SAMPLES_FILE):
        ShardDataset(str(copy))


def test_verify_compares_the_catalog_with_the_table(copy: Path) -> None:
    """A row that could be true, with right checksums, but is not what the table says."""

    def change(rows: Any, _: Any) -> None:
        rows["num_frames"][77] += 1

    kinds = {p.kind for p in verify(str(copy), decode="none").problems if p.file == CATALOG_FILE}
    assert kinds == set()
    rewritten(copy, change)
    kinds = {p.kind for p in verify(str(copy), decode="none").problems if p.file == CATALOG_FILE}
    assert kinds == {"catalog"}


def test_names_that_are_not_numbered_in_order_are_refused(copy: Path) -> None:
    def change(rows: Any, _: Any) -> None:
        rows["video"][:3] = 9

    rewritten(copy, change)
    with pytest.raises(ManifestError, match="not numbered as they appear"):
        ShardDataset(str(copy), subset=Subset(label_share=0.5))


def test_a_table_that_is_not_in_the_order_of_the_shards_is_refused(old: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(old, tmp_path / "turned"))
    table = pq.read_table(folder / SAMPLES_FILE)
    pq.write_table(table.take(np.arange(ROWS)[::-1]), folder / SAMPLES_FILE)
    facts = load_dataset((folder / DATASET_FILE).read_bytes(), file="d")
    facts = dataclasses.replace(facts, samples_sha256=digest((folder / SAMPLES_FILE).read_bytes()))
    (folder / DATASET_FILE).write_bytes(dump_dataset(facts))
    for call in (ShardDataset, add_catalog):
        with pytest.raises(ManifestError, match="shard by shard"):
            call(str(folder))


def test_a_remote_catalog_is_fetched_once_for_all_processes(new: Path, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.put(str(new), "/catalog/once", recursive=True)
    url, kept = "memory://catalog/once", tmp_path / "kept"
    local = ShardDataset(str(new), split="val")
    try:
        first = ShardDataset(url, split="val", cache_folder=str(kept))
        fs.rm(f"/catalog/once/{CATALOG_ROWS_FILE}")
        second = ShardDataset(url, split="val", cache_folder=str(kept))
        for dataset in (first, second, pickle.loads(pickle.dumps(first))):
            assert [dataset.shape(i) for i in range(0, len(local), 9)] == [
                local.shape(i) for i in range(0, len(local), 9)
            ]
        assert second.key(3) == local.key(3)
        assert sorted(path.suffix for path in kept.iterdir() if path.suffix != ".lock") == [
            ".bin",
            ".parquet",
        ]
        with pytest.raises(ManifestError, match=f"{CATALOG_ROWS_FILE}: does not exist"):
            ShardDataset(url, cache_folder=str(tmp_path / "other"))
    finally:
        fs.rm("/catalog", recursive=True)


def test_a_billion_samples_open_as_a_sparse_file(tmp_path: Path) -> None:
    """Nothing is read but the head and the checksums; the blocks that are touched are the ones that are there."""
    rows, per_shard = 10**9, 10**6
    head = CatalogHead(
        samples_sha256="0", samples_bytes=0, rows=rows, block_rows=BLOCK_ROWS, videos=rows, groups=rows, flow=False,
        most_labels=0, label_values=0, splits=("train",), counts=((rows,),), split_labels=((0,),),
        shard_splits=(((0, rows // per_shard),),), folded=False,
    )  # fmt: skip
    old = load_dataset(Path(write(tmp_path / "small"), DATASET_FILE).read_bytes(), file="d")
    shards = [
        dataclasses.replace(old.shards[0], shard=n, file=f"s/{n}.tar", samples=per_shard, bytes=2**40)
        for n in range(rows // per_shard)
    ]
    block = np.zeros(BLOCK_ROWS, dtype=row_type(head))
    for name in ("num_frames", "fps", "width", "height"):
        block[name] = 7
    written = 123_456
    checksums = np.zeros(-(-rows // BLOCK_ROWS), dtype=np.uint32)
    checksums[written] = checksums_of(head, block, np.zeros(0, dtype=np.int32))[0]
    path = tmp_path / CATALOG_ROWS_FILE
    with path.open("wb") as file:
        file.seek(written * block.nbytes)
        file.write(block.tobytes())
        file.seek(layout_of(head).checksums)
        file.write(checksums.tobytes())
    head = dataclasses.replace(head, checksums_sha256=digest(checksums.tobytes()))
    (tmp_path / CATALOG_FILE).write_bytes(dump_head(head))
    (tmp_path / SAMPLES_FILE).touch()
    dataset = dataclasses.replace(
        old, shards=tuple(shards), samples=rows, samples_sha256="0", catalog_sha256=digest(dump_head(head))
    )
    (tmp_path / DATASET_FILE).write_bytes(dump_dataset(dataset))
    found = ShardDataset(str(tmp_path), split="train")
    assert len(found) == rows
    assert found.shape(written * BLOCK_ROWS + 5) == (7, 7.0, 7, 7)
    assert found.shard_of(rows - 1) == rows // per_shard - 1
    with pytest.raises(ManifestError, match="crc32 differs"):
        found.shape(0)
    assert len(pickle.dumps(found)) < 1 << 16
    assert path.stat().st_blocks * 512 < 64 << 20
