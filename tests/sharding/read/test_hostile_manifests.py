"""A dataset's own files, damaged or made to mislead: one sentence each, and nothing outside the dataset is read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cliplift.launch import cli
from cliplift.sharding.manifest import (
    DATASET_FILE,
    SAMPLES_FILE,
    ManifestError,
    digest,
    dump_dataset,
    load_dataset,
    load_index,
)
from cliplift.sharding.read.reader import ShardDataset

Tree = dict[str, Any]


def changed(folder: Path, key: str, value: Any) -> None:
    """Set a value of dataset.json by its dotted key."""
    tree = json.loads((folder / DATASET_FILE).read_text())
    node = tree
    *above, last = key.split(".")
    for part in above:
        node = node[int(part) if part.isdigit() else part]
    node[last] = value
    (folder / DATASET_FILE).write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", ["x"]), ("name", None), ("classes", [1, 2]), ("classes", "ab"), ("classes", {"a": 1}),
        ("shards", [{}]), ("shards", {}), ("shards.0.file", 3), ("shards.0.bytes", "many"), ("samples", "x"),
        ("folds", []), ("refused", {"read": "x"}), ("splits", {"train": {"samples": "x"}}),
        ("splits", {"train": 3}), ("splits", []), ("unheard_of", 1),
        ("shards.0.file", "../outside.tar"), ("shards.0.file", "/etc/passwd"), ("shards.0.file", "a\0.tar"),
        ("shards.0.file", "http://127.0.0.1/x.tar"),
    ],
)  # fmt: skip
def test_dataset_json_with_other_types_is_refused(
    dataset: Path, key: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(dataset, key, value)
    with pytest.raises(ManifestError, match=r"dataset\.json: "):
        load_dataset((dataset / DATASET_FILE).read_bytes(), file=DATASET_FILE)
    assert cli.main(["show", str(dataset), "--output", str(dataset.parent / "s.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert DATASET_FILE in line


@pytest.mark.parametrize(
    ("key", "value"),
    [("samples", {}), ("samples", [3]), ("tar", "../x.tar"), ("tar", 3), ("refused", [{"video_id": 1}]), ("looks", 5),
     ("tar_bytes", "x"), ("plan_id", None), ("more", 1)],
)  # fmt: skip
def test_an_index_with_other_types_is_refused(built: Path, key: str, value: Any) -> None:
    tree = json.loads(next(built.rglob("*.index.json")).read_bytes()) | {key: value}
    with pytest.raises(ManifestError):
        load_index(json.dumps(tree).encode(), file="x.index.json")


def replaced(name: str, value: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        place = table.column_names.index(name)
        cells = [value, *table.column(name).to_pylist()[1:]]
        return table.set_column(place, name, pa.array(cells, table.column(name).type))

    return change


TABLES: dict[str, Callable[[pa.Table], pa.Table]] = {
    "offset before the shard": replaced("mp4_offset", -5),
    "offset behind the shard": replaced("mp4_offset", 10**15),
    "more than the shard holds": replaced("mp4_bytes", 10**15),
    "less than nothing": replaced("json_bytes", -1),
    "overflow": replaced("mp4_bytes", 2**63 - 1),
    "another shard": replaced("shard", 99),
    "no such class": replaced("label", 1000),
    "no label at all": replaced("label", None),
    "no frames": replaced("num_frames", 0),
    "no rate": replaced("fps", float("nan")),
    "no width": replaced("width", -2),
    "no column": lambda table: table.drop_columns(["key"]),
    "other type": lambda table: table.set_column(0, table.column_names[0], pa.array(range(table.num_rows))),
    "no columns": lambda _: pa.table({"x": [1]}),
}


@pytest.mark.parametrize("change", TABLES.values(), ids=TABLES)
def test_a_table_that_cannot_be_true_is_refused(
    dataset: Path, change: Callable[[pa.Table], pa.Table]
) -> None:
    pq.write_table(change(pq.read_table(dataset / SAMPLES_FILE)), dataset / SAMPLES_FILE)
    facts = load_dataset((dataset / DATASET_FILE).read_bytes(), file=DATASET_FILE)
    facts = dataclasses.replace(
        facts, samples_sha256=digest((dataset / SAMPLES_FILE).read_bytes()), catalog_sha256=""
    )
    (dataset / DATASET_FILE).write_bytes(dump_dataset(facts))
    with pytest.raises(ManifestError, match=SAMPLES_FILE):
        ShardDataset(str(dataset))


def test_the_whole_dataset_is_read(dataset: Path) -> None:
    assert len(ShardDataset(str(dataset)).read(0)) > 0
