"""Generations of a dataset: what each returns, what a run goes on with, what changed, and being killed in between."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cliplift.configs.sections import ConfigError
from cliplift.launch import cli
from cliplift.sharding.build.finalize import add_catalog, describe, remove_videos
from cliplift.sharding.build.verify import verify
from cliplift.sharding.build.writer import ShardWriter
from cliplift.sharding.manifest import (
    DATASET_FILE,
    SAMPLES_FILE,
    ManifestError,
    dump_dataset,
    generation_file,
    load_dataset,
)
from cliplift.sharding.read import difference
from cliplift.sharding.read.difference import compare
from cliplift.sharding.read.generations import named_generation, open_dataset
from cliplift.sharding.read.reader import RemovedError, ShardDataset
from cliplift.sharding.read.subsets import Subset
from cliplift.sharding.storage import LocalStore, open_store

StopAfter = Callable[[int], AbstractContextManager[None]]

CLIPS, PER_SHARD = 24, 5
CLASSES = ("a", "b", "c")


def clip(number: int) -> bytes:
    return bytes([number]) * (10 + number)


def row(number: int) -> dict[str, Any]:
    return {
        "key": f"k{number:02d}", "video_id": f"v{number // 3}", "source": f"{number // 3}.mp4",
        "split": ("train", "val")[number // 6 % 3 == 2], "label": number % 3, "labels": (), "folds": (),
        "group": f"g{number // 6}", "start_seconds": float(number % 3), "end_seconds": number % 3 + 1.0,
        "num_frames": 20, "fps": 20.0, "width": 40, "height": 30, "keyframes": (0, 16),
        "source_sha256": f"{number // 3}",
    }  # fmt: skip


def write(folder: Path, *, catalog: bool = True, change: Callable[[int], dict[str, Any]] = row) -> str:
    store = open_store(str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    indexes = []
    for shard, first in enumerate(range(0, CLIPS, PER_SHARD)):
        writer = ShardWriter(store, f"s/{shard}.tar", shard=shard, split="s", plan_id="p")
        for i in range(first, min(CLIPS, first + PER_SHARD)):
            writer.add(mp4=clip(i), facts={"i": i}, picture_hashes=(), **change(i))
        indexes.append(writer.commit())
    dataset = describe(
        indexes,
        table=folder / SAMPLES_FILE,
        name="n",
        classes=CLASSES,
        folds=0,
        missing=0,
        plan_id="p",
        settings={},
    )
    store.write(DATASET_FILE, dump_dataset(dataset))
    if catalog:
        add_catalog(str(folder))
    return str(folder)


@pytest.fixture(params=["version 1", "catalog"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return write(tmp_path / "set", catalog=request.param == "catalog")


def numbers(dataset: ShardDataset) -> list[int]:
    return [dataset.read(i)[0] for i in range(len(dataset))]


def of(split: str | None, without: tuple[int, ...] = ()) -> list[int]:
    """The clips of a split, but for those of some videos."""
    return [n for n in range(CLIPS) if split in (None, row(n)["split"]) and n // 3 not in without]


def contents(folder: str) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()
    }


@pytest.mark.parametrize("split", [None, "train", "val"])
def test_removed_videos_are_returned_by_no_generation(url: str, split: str | None) -> None:
    before, shards = contents(url), ShardDataset(url).shards
    base, latest = remove_videos(url, ["v2", "v5", "never seen"])
    assert (base.generation, latest.generation, latest.samples) == (1, 2, CLIPS - 6)
    assert numbers(ShardDataset(url, split=split)) == of(split, (2, 5))
    remove_videos(url, ["v0", "v2"])
    assert numbers(ShardDataset(url, split=split)) == of(split, (0, 2, 5))
    for generation in (1, 2, 3):
        dataset = ShardDataset(f"{url}@{generation}", split=split)
        assert numbers(dataset) == of(split, (0, 2, 5)), generation
        assert [dataset.key(i) for i in range(len(dataset))] == [f"k{n:02d}" for n in of(split, (0, 2, 5))]
    after = contents(url)
    assert {n: after[n] for n in before if n != DATASET_FILE} == {
        n: before[n] for n in before if n != DATASET_FILE
    }
    assert after["generations/000001/dataset.json"] == before[DATASET_FILE]
    assert after["generations/000003/dataset.json"] == after[DATASET_FILE]
    assert after["generations/000003/removed.txt"] == b"never seen\nv0\nv2\nv5\n"
    assert len(shards) == len(load_dataset(after[DATASET_FILE], file="d").shards)
    assert b'"cliplift-shards/3"' in after[DATASET_FILE], "an earlier version is told that it cannot read it"
    for generation in ("", "@1", "@2", "@3"):
        report = verify(f"{url}{generation}", decode="none")
        assert [p for p in report.problems if p.error] == [], generation


@pytest.mark.parametrize(
    "subset", [None, Subset(held_out_share=0.4, seed=1), Subset(label_share=0.5, seed=2)]
)
def test_a_run_keeps_its_numbers_and_does_not_get_what_was_removed(url: str, subset: Subset | None) -> None:
    then = ShardDataset(url, split="train", subset=subset)
    expected = [then.read(i) for i in range(len(then))]
    remove_videos(url, ["v1", "v6"])
    now = ShardDataset(f"{url}@1", split="train", subset=subset, keep_numbers=True)
    assert now.fingerprint == then.fingerprint
    assert now.shard_ranges == then.shard_ranges
    for dataset in (now, pickle.loads(pickle.dumps(now))):
        assert len(dataset) == len(expected)
        for i, data in enumerate(expected):
            if data[0] // 3 in (1, 6):
                with pytest.raises(RemovedError, match="its video was removed from the dataset"):
                    dataset.read(i)
            else:
                assert dataset.read(i) == data
    left = ShardDataset(f"{url}@1", split="train", subset=subset)
    assert numbers(left) == [data[0] for data in expected if data[0] // 3 not in (1, 6)]
    assert left.fingerprint != then.fingerprint, "its samples have other numbers"


def test_removing_again_changes_nothing_and_all_is_refused(url: str) -> None:
    remove_videos(url, ["v1"])
    before = contents(url)
    base, same = remove_videos(url, ["v1"])
    assert base == same
    with pytest.raises(ConfigError, match="would have no clip left"):
        remove_videos(url, [f"v{n}" for n in range(CLIPS // 3)])
    assert contents(url) == before


def test_killed_at_any_write_the_dataset_is_one_generation_or_the_other(
    tmp_path: Path, stop_after: StopAfter
) -> None:
    whole = write(tmp_path / "whole")
    killed = write(tmp_path / "killed")
    remove_videos(whole, ["v2"])
    for files in range(7):
        with stop_after(files), pytest.raises(KeyboardInterrupt):
            remove_videos(killed, ["v2"])
        assert numbers(ShardDataset(killed)) == of(None), "the manifest at the root comes last"
    with stop_after(7):
        remove_videos(killed, ["v2"])
    assert contents(killed) == contents(whole)


def test_opening_reads_a_manifest_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many shards it takes longer to read than all else; an earlier generation needs its own and the latest."""
    remove_videos(url, ["v2"])
    read: list[str] = []
    real = LocalStore.read

    def counted(store: LocalStore, name: str) -> bytes:
        read.append(name)
        return real(store, name)

    monkeypatch.setattr(LocalStore, "read", counted)
    pickle.loads(pickle.dumps(ShardDataset(url)))
    assert read.count(DATASET_FILE) == 2, "once by each of two processes"
    read.clear()
    ShardDataset(f"{url}@1")
    assert [name for name in read if name.endswith(DATASET_FILE)] == [
        DATASET_FILE,
        generation_file(1, DATASET_FILE),
    ]


def test_names_of_generations(url: str) -> None:
    assert named_generation("s3://user@host/a@12") == ("s3://user@host/a", 12)
    for name in ("a", "a@0", "a@1/b", "a@x", "@3"):
        assert named_generation(name) == (name, None)
    assert open_dataset(f"{url}@1")[1] == open_dataset(url)[1]
    with pytest.raises(ConfigError, match="has no generation 4") as caught:
        ShardDataset(f"{url}@4")
    assert "it has 1 to 1" in str(caught.value)


def test_a_folder_whose_own_name_ends_like_a_generation_is_itself(url: str) -> None:
    remove_videos(url, ["v2"])
    for generation in (1, 2):
        shutil.copytree(url, f"{url}@{generation}")
        with pytest.raises(
            ConfigError, match=f"is a folder of that name and generation {generation} of"
        ) as caught:
            ShardDataset(f"{url}@{generation}")
        assert f"name a generation of its own as {url}@{generation}@1" in str(caught.value)
        assert named_generation(f"{url}@{generation}@1") == (f"{url}@{generation}", 1)
    shutil.copytree(url, f"{url}@3")
    remove_videos(f"{url}@3", ["v0"])
    assert named_generation(f"{url}@3") == (f"{url}@3", None)
    assert named_generation(f"{url}@3@2") == (f"{url}@3", 2)
    assert numbers(ShardDataset(f"{url}@3")) == of(None, (0, 2))
    assert open_dataset(f"{url}@3@2")[1].samples == CLIPS - 3
    Path(f"{url}@4").mkdir()  # a folder without a dataset is none
    assert named_generation(f"{url}@4") == (url, 4)


@pytest.mark.parametrize("harm", ["gone", "changed", "manifest", "number"])
def test_damaged_lists_of_removed_videos_are_refused(url: str, harm: str) -> None:
    remove_videos(url, ["v2"])
    removed = Path(url) / "generations/000002/removed.txt"
    if harm == "gone":
        removed.unlink()
    elif harm == "changed":
        removed.write_text("")
    elif harm == "manifest":
        manifest = Path(url) / "generations/000001/dataset.json"
        manifest.write_bytes((Path(url) / DATASET_FILE).read_bytes())
    else:
        facts = json.loads((Path(url) / DATASET_FILE).read_text())
        (Path(url) / DATASET_FILE).write_text(json.dumps(facts | {"generation": 0}))
    with pytest.raises(ManifestError, match=r"removed.txt|manifest of generation 2|generation 0 cannot be"):
        ShardDataset(f"{url}@1")


def changed_row(number: int) -> dict[str, Any]:
    """Video 0 is gone, 8 is new, clip 4 has another label, clip 7 another group."""
    found = row(number)
    if number < 3:
        found |= {"video_id": "v8", "source": "8.mp4"}
    return found | ({"label": 2} if number == 4 else {}) | ({"group": "other"} if number == 7 else {})


@pytest.mark.parametrize("part", [2, 1000])
def test_a_difference_is_the_one_of_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr(difference, "PART_ROWS", part)
    first, second = write(tmp_path / "first"), write(tmp_path / "second", change=changed_row)
    found = compare(first, second)
    assert [(side.clips, side.videos, side.examples) for side in found.only] == [
        (3, 1, ["v0"]),
        (3, 1, ["v8"]),
    ]
    assert dict(found.only[0].splits) == {"train": 3}
    # Clips 0 to 2 are others; of the rest, the bytes of no clip changed.
    assert (found.same, found.changed_clips, dict(found.changed)) == (CLIPS - 5, 2, {"label": 1, "group": 1})
    assert found.changed_examples == ["1.mp4 at 1 s: label 'b' -> 'c'", "2.mp4 at 1 s: group 'g1' -> 'other'"]
    assert not compare(first, first).found


def test_a_difference_is_of_classes_and_not_of_their_numbers(tmp_path: Path) -> None:
    first, second = write(tmp_path / "first"), write(tmp_path / "second")
    facts = load_dataset((tmp_path / "second" / DATASET_FILE).read_bytes(), file="d")
    (tmp_path / "second" / DATASET_FILE).write_bytes(dump_dataset(replace(facts, classes=("b", "a", "c"))))
    found = compare(first, second)
    assert found.changed_clips == sum(n % 3 != 2 for n in range(CLIPS))
    assert "the classes are the same in another order" in found.summary("A", "B")


def test_the_commands(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.txt").write_text("v1\n\nv3\n")
    assert cli.main(["remove", url, "--list", str(tmp_path / "list.txt"), "--videos", "v4"]) == 0
    assert capsys.readouterr().out == f"{url}: generation 2 has {CLIPS - 9} clips, 9 fewer\n"
    assert cli.main(["remove", url, "--videos", "v4"]) == 0
    assert "all of them were removed before; generation 2 stays" in capsys.readouterr().out
    assert cli.main(["remove", url]) == 2
    assert "names no video" in capsys.readouterr().err
    assert cli.main(["diff", url, f"{url}@2"]) == 0
    assert f"the same: {CLIPS - 9} clips" in capsys.readouterr().out
    assert cli.main(["diff", f"{url}@1", url]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"only in {url}@1: 9 clips (train 6, val 3), 3 whole videos"
    assert said[1:4] == ["  v1", "  v3", "  v4"]
    assert cli.main(["diff", f"{url}@7", url]) == 2


def test_a_group_that_is_removed_whole_leaves_an_empty_shard(tmp_path: Path) -> None:
    """Shards 0 and 1 lose all their clips; random access counts over them."""
    url = write(tmp_path / "set")
    remove_videos(url, ["v0", "v1", "v2", "v3"])
    dataset = ShardDataset(url)
    assert numbers(dataset) == of(None, (0, 1, 2, 3))
    assert [shard.shard for shard in dataset.shards] == [2, 3, 4]
    assert np.array_equal(dataset.videos, np.array([n // 3 - 4 for n in of(None, (0, 1, 2, 3))]))
    assert verify(url, decode="none").ok
    shutil.rmtree(tmp_path / "set" / "generations" / "000001")
    assert numbers(ShardDataset(url)) == of(None, (0, 1, 2, 3)), "a generation needs no other"
