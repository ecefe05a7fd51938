"""The reader's contract: order, splits, ranges, pickling, forks, remote reads through a cache."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from cliplift.configs.sections import ConfigError
from cliplift.sharding.demo.motions import CLASSES
from cliplift.sharding.manifest import ManifestError
from cliplift.sharding.read.reader import ShardDataset, ShardReadError
from cliplift.sharding.video.full_decode import check_clip


def test_samples_are_ordered_shard_by_shard(built: Path) -> None:
    dataset = ShardDataset(str(built), split="train")
    assert len(dataset) == 20
    assert dataset.classes == CLASSES
    assert dataset.shard_ranges == [(0, 5), (5, 10), (10, 15), (15, 20)]
    for i in range(len(dataset)):
        facts = dataset.facts(i)
        start, stop = dataset.shard_ranges[dataset.shard_of(i)]
        assert start <= i < stop
        assert dataset.shards[dataset.shard_of(i)].shard == facts.shard
        assert facts.split == "train"
        assert CLASSES[facts.label or 0] == Path(facts.source).parent.name


def test_facts_describe_the_clip(built: Path) -> None:
    dataset = ShardDataset(str(built))
    for i in range(0, len(dataset), 7):
        facts, checked = dataset.facts(i), check_clip(dataset.read(i))
        assert (facts.num_frames, facts.width, facts.height) == (
            checked.frames,
            checked.width,
            checked.height,
        )
        assert facts.keyframes == checked.keyframes
        assert all(b - a <= 16 for a, b in zip(facts.keyframes, facts.keyframes[1:], strict=False))
        assert facts.fps == pytest.approx(float(checked.fps))
        assert dataset.read_json(i)["key"] == facts.key


def test_splits_partition_the_dataset(built: Path) -> None:
    counts = {split: len(ShardDataset(str(built), split=split)) for split in ("train", "val", "test")}
    assert counts == {"train": 20, "val": 10, "test": 10}
    assert len(ShardDataset(str(built))) == 40


def test_unknown_places_are_named(built: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no split 'training'.*train \(20\)"):
        ShardDataset(str(built), split="training")
    with pytest.raises(ConfigError, match="single split"):
        ShardDataset(str(built), fold=1)
    with pytest.raises(ConfigError, match=r"holds no dataset\.json"):
        ShardDataset(str(tmp_path))


def test_fingerprints_tell_datasets_and_splits_apart(built: Path, dataset: Path) -> None:
    train = ShardDataset(str(built), split="train").fingerprint
    assert train == ShardDataset(str(dataset), split="train").fingerprint
    assert train != ShardDataset(str(built), split="val").fingerprint


def test_a_table_of_another_build_is_refused(dataset: Path) -> None:
    table = dataset / "samples.parquet"
    table.write_bytes(table.read_bytes() + b" ")
    with pytest.raises(ManifestError, match="finalize again"):
        ShardDataset(str(dataset))


def test_indices_out_of_range(built: Path) -> None:
    dataset = ShardDataset(str(built), split="val")
    for i in (-1, 10):
        with pytest.raises(IndexError):
            dataset.read(i)


def test_a_fork_and_a_fresh_process_read_the_same(built: Path, tmp_path: Path) -> None:
    dataset = ShardDataset(str(built), split="val")
    tails = [dataset.read(i)[-64:] for i in range(len(dataset))]  # files are open in the parent
    pipe_out, pipe_in = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(pipe_in, b"".join(dataset.read(i)[-64:] for i in range(len(dataset))))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(pipe_out, 1 << 16) == b"".join(tails)
    os.close(pipe_out)
    os.close(pipe_in)
    (tmp_path / "dataset.pickle").write_bytes(pickle.dumps(dataset))
    script = (
        "import pickle, sys; d = pickle.load(open(sys.argv[1], 'rb'));"
        "sys.stdout.buffer.write(b''.join(d.read(i)[-64:] for i in range(len(d))))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "dataset.pickle")]
    assert subprocess.run(command, check=True, capture_output=True, timeout=60).stdout == b"".join(tails)
    assert [dataset.read(i)[-64:] for i in range(len(dataset))] == tails


def test_a_dataset_pickles_small_and_errors_pickle_whole(built: Path) -> None:
    dataset = ShardDataset(str(built), split="train")
    dataset.read(0)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.read(3) == dataset.read(3)
    error = pickle.loads(pickle.dumps(ShardReadError("a.tar", "k.mp4", "gone")))
    assert (error.file, error.member, error.reason) == ("a.tar", "k.mp4", "gone")


def test_open_files_are_bounded_and_closed(dataset: Path) -> None:
    def open_tars() -> int:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        opened = [link.readlink() for link in links]
        return sum(str(dataset) in str(path) and path.suffix == ".tar" for path in opened)

    reader = ShardDataset(str(dataset))
    for i in range(len(reader)):
        reader.read(i)
    assert open_tars() == 8
    reader.close()
    assert open_tars() == 0
    reader.read(0)
    del reader
    assert open_tars() == 0
    assert str(dataset) not in Path("/proc/self/maps").read_text(), "the catalog is not mapped any more"


@pytest.fixture
def in_memory(built: Path) -> str:
    """The dataset in fsspec's memory file system."""
    fs = fsspec.filesystem("memory")
    fs.put(str(built), "/reader/tiny", recursive=True)
    yield "memory://reader/tiny"
    fs.rm("/reader", recursive=True)


def test_remote_reads_by_range_and_through_the_cache(built: Path, in_memory: str, tmp_path: Path) -> None:
    local = ShardDataset(str(built), split="test")
    ranged = ShardDataset(in_memory, split="test")
    cached = ShardDataset(in_memory, split="test", cache_folder=str(tmp_path / "cache"))
    assert ranged.fingerprint == cached.fingerprint == local.fingerprint
    for i in range(len(local)):
        assert ranged.read(i) == cached.read(i) == local.read(i)
    kept = list((tmp_path / "cache").glob("*.tar"))
    assert len(kept) == len(local.shards)
    fsspec.filesystem("memory").rm("/reader/tiny/test", recursive=True)
    assert cached.read(0) == local.read(0)  # from the cache alone
    with pytest.raises(ShardReadError, match="does not exist"):
        ranged.read(0)


def test_the_cache_keeps_to_its_size(built: Path, in_memory: str, tmp_path: Path) -> None:
    largest = max(shard.bytes for shard in ShardDataset(str(built)).shards)
    limit_gib = 2.5 * largest / 2**30
    cached = ShardDataset(in_memory, cache_folder=str(tmp_path / "cache"), cache_gib=limit_gib)
    whole = ShardDataset(str(built))
    for i in (0, 39, 5, 20, 1, 33, 12):
        assert cached.read(i) == whole.read(i)
        assert sum(p.stat().st_size for p in (tmp_path / "cache").glob("*.tar")) <= limit_gib * 2**30
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_shard_cut_short_on_the_way_is_not_cached(in_memory: str, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    cached = ShardDataset(in_memory, split="val", cache_folder=str(tmp_path / "cache"))
    path = f"/reader/tiny/{cached.shards[0].file}"
    data = fs.cat_file(path)
    fs.pipe_file(path, data[:-512])
    with pytest.raises(ShardReadError, match="bytes expected"):
        cached.read(0)
    assert not list((tmp_path / "cache").glob("*.tar"))
    fs.pipe_file(path, data)
    assert cached.read(0)


def test_a_dataset_can_be_moved(built: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(built, tmp_path / "elsewhere"))
    assert ShardDataset(str(moved)).read(0) == ShardDataset(str(built)).read(0)
