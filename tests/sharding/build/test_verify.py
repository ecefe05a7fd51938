"""Verify's judgement of content: duplicates, leaks between splits and groups, label balance, orphans."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cliplift.configs.sharding import ShardRun
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.build.verify import verify
from cliplift.sharding.demo.motions import CLASSES
from cliplift.sharding.manifest import DATASET_FILE, SAMPLES_FILE, digest, dump_dataset, load_dataset
from cliplift.sharding.video.picture_hash import near_duplicates


def _folder(root: Path, demo_videos: Path, copies: dict[str, int]) -> Path:
    """Videos by relative path; equal numbers are equal content."""
    films = sorted((demo_videos / "labelled/train").rglob("*.mp4"))
    for name, film in copies.items():
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(films[film].read_bytes())
    return root


def _verify(make_run: Callable[..., ShardRun], root: Path, output: Path, **changes: object):
    source = {"kind": "folder", "root": str(root), "layout": "split/class"}
    run_shard(make_run(output, source=source, **changes), phases=["plan", "build", "finalize"])
    return verify(str(output), decode="none")


def test_the_same_content_in_two_splits_is_an_error(tmp_path: Path, demo_videos: Path, make_run) -> None:
    root = _folder(tmp_path / "v", demo_videos, {"train/a/1.mp4": 0, "train/a/2.mp4": 1, "test/a/3.mp4": 0})
    report = _verify(make_run, root, tmp_path / "out")
    assert not report.ok
    assert [(p.kind, p.file) for p in report.problems] == [("leak", "test/a/3.mp4")]


@pytest.mark.parametrize(
    ("second", "words"), [("train/a/2.mp4", "same content"), ("train/b/2.mp4", "another label")]
)
def test_the_same_content_in_one_split_is_a_warning(
    tmp_path: Path, demo_videos: Path, make_run, second: str, words: str
) -> None:
    root = _folder(tmp_path / "v", demo_videos, {"train/a/1.mp4": 0, second: 0})
    report = _verify(make_run, root, tmp_path / "out")
    assert report.ok
    (problem,) = report.problems
    assert problem.kind == "duplicate"
    assert words in problem.detail


def test_a_group_in_two_splits_is_an_error(tmp_path: Path, demo_videos: Path, make_run) -> None:
    names = {"train/a/p1_0.mp4": 0, "train/a/p2_0.mp4": 1, "test/a/p1_1.mp4": 2}
    root = _folder(tmp_path / "v", demo_videos, names)
    report = _verify(make_run, root, tmp_path / "out", splits={"group_pattern": r"/(p\d)_"})
    assert [(p.kind, p.file) for p in report.problems if p.error] == [("leak", "group p1")]


def test_a_good_dataset_is_ok_and_its_labels_are_counted(built: Path) -> None:
    report = verify(str(built), decode="full", workers=2)
    assert report.ok
    assert report.problems == ()
    assert (report.shards, report.samples, report.decoded) == (8, 40, 40)
    assert report.labels["train"] == dict.fromkeys(CLASSES, 2)
    assert report.summary().endswith("ok")


def test_leftovers_and_strangers_are_warnings(dataset: Path) -> None:
    (dataset / "train" / ".x.tar.0123.tmp").write_bytes(b"half")
    (dataset / "train" / "old.tar").write_bytes(b"old")
    report = verify(str(dataset), decode="none")
    assert report.ok
    assert {p.file for p in report.problems} == {"train/.x.tar.0123.tmp", "train/old.tar"}


def test_a_removed_index_is_an_error(dataset: Path) -> None:
    index = sorted(dataset.rglob("*.index.json"))[0]
    index.unlink()
    report = verify(str(dataset), decode="none")
    assert not report.ok
    assert any("never finished" in p.detail for p in report.problems)


@pytest.mark.slow
def test_another_encoding_of_a_film_is_a_near_duplicate(shared_data: Path, tmp_path: Path, make_run) -> None:
    from cliplift.configs.sharding import TranscodeConfig
    from cliplift.sharding.video.transcode import transcode_span

    films = sorted((shared_data / "unlabeled").glob("sam2__0*.mp4"))
    assert len(films) == 5
    for film in films:
        (tmp_path / "v/train/a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "v/train/a" / film.name).write_bytes(film.read_bytes())
    smaller = TranscodeConfig(short_side_pixels=112, crf=28)
    (tmp_path / "v/test/a").mkdir(parents=True)
    copy = transcode_span(films[3], start_seconds=0.0, end_seconds=None, config=smaller).data
    (tmp_path / "v/test/a/copy.mp4").write_bytes(copy)
    source = {"kind": "folder", "root": str(tmp_path / "v"), "layout": "split/class"}
    run = make_run(tmp_path / "out", source=source, transcode={"short_side_pixels": 128})
    run_shard(run, phases=["plan", "build", "finalize"])
    report = verify(run.output, decode="full", workers=1)
    assert report.ok
    (problem,) = report.problems  # none of the other four films looks like another
    assert (problem.kind, problem.error) == ("near-duplicate", False)
    names = {problem.file, problem.detail.removeprefix("looks like ").removesuffix(", in another split")}
    assert names == {"test/a/copy.mp4", f"train/a/{films[3].name}"}


@pytest.mark.parametrize(("flipped", "found"), [(0, True), (3, True), (4, False)])
def test_alike_pictures_are_found_whichever_bits_differ(flipped: int, found: bool) -> None:
    draw = random.Random(0)
    for _ in range(50):
        looks = [[draw.getrandbits(64), draw.getrandbits(64)] for _ in range(30)]
        copy = list(looks[7])
        for bit in draw.sample(range(64), flipped):
            copy[0] ^= 1 << bit
        assert list(near_duplicates([*looks, copy])) == ([(7, 30)] if found else [])


def test_pictures_without_contrast_are_not_compared() -> None:
    assert list(near_duplicates([[0], [0], [(1 << 64) - 1], [(1 << 64) - 1], []])) == []


def _with_table(dataset: Path, change: Callable[[pa.Table], pa.Table]) -> Path:
    """The dataset with another table of samples, as one without a catalog."""
    pq.write_table(change(pq.read_table(dataset / SAMPLES_FILE)), dataset / SAMPLES_FILE)
    facts = load_dataset((dataset / DATASET_FILE).read_bytes(), file="d")
    changed = replace(facts, samples_sha256=digest((dataset / SAMPLES_FILE).read_bytes()), catalog_sha256="")
    (dataset / DATASET_FILE).write_bytes(dump_dataset(changed))
    return dataset


def _renamed(table: pa.Table, row: int) -> pa.Table:
    names = table.column("source").to_pylist()
    names[row] += "x"
    return table.set_column(table.column_names.index("source"), "source", pa.array(names))


@pytest.mark.parametrize(
    "change",
    [
        lambda table: _renamed(table, 0),
        lambda table: _renamed(table, 39),
        lambda table: table.slice(0, 39),
        lambda table: pa.concat_tables([table, table.slice(39)]),
        lambda table: table.slice(0, 0),
    ],
    ids=["first row", "last row", "shorter", "longer", "empty"],
)
def test_a_table_that_the_indexes_contradict_is_an_error(
    dataset: Path, change: Callable[[pa.Table], pa.Table]
) -> None:
    report = verify(str(_with_table(dataset, change)), decode="none")
    assert [(p.kind, p.file, p.error) for p in report.problems] == [("table", SAMPLES_FILE, True)]


def test_a_table_of_the_same_rows_in_another_file_is_the_same(dataset: Path) -> None:
    assert verify(str(_with_table(dataset, lambda table: table)), decode="none").problems == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table.drop_columns("video_id"), "no column 'video_id'"),
        (
            lambda table: table.set_column(
                table.column_names.index("folds"), "folds", pa.array([[[1]]] * 40, pa.list_(pa.list_(pa.int64())))
            ),
            "not a whole Parquet file",
        ),
    ],
    ids=["column gone", "other lists"],
)  # fmt: skip
def test_a_table_of_other_columns_is_damage(
    dataset: Path, change: Callable[[pa.Table], pa.Table], words: str
) -> None:
    (problem,) = verify(str(_with_table(dataset, change)), decode="none").problems
    assert (problem.kind, problem.file, problem.error) == ("damaged", SAMPLES_FILE, True)
    assert words in problem.detail
