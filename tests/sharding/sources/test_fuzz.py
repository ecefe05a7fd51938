"""Bytes at random in place of tars, indexes, tables and lists: used, or refused by an error of ours, within bounds."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cliplift.configs.sections import ConfigError
from cliplift.configs.sources import CsvSource
from cliplift.sharding.manifest import ManifestError, load_dataset, load_index, read_table
from cliplift.sharding.sources.lists import SourceError, read_rows
from cliplift.sharding.sources.tars import read_tar

ROUNDS = 1500
REFUSALS = (ConfigError, SourceError, ManifestError)


def damaged(data: bytes, draw: np.random.Generator) -> bytes:
    """A few bytes changed, runs of them repeated or left out, or the end cut off."""
    found = bytearray(data)
    for _ in range(int(draw.integers(1, 5))):
        at, kind = int(draw.integers(0, len(found) + 1)), int(draw.integers(0, 4))
        length = int(draw.integers(1, 600))
        if kind == 0:
            found[at : at + 1] = bytes([int(draw.integers(0, 256))])
        elif kind == 1:
            found[at : at + length] = b""
        elif kind == 2:
            found[at:at] = found[at : at + length]
        else:
            found = found[:at] or bytearray(b"\0")
    return bytes(found)


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in (
            ("a.mp4", b"v" * 900), ("a.json", b'{"label": "x"}'), ("é" * 80 + ".mp4", b"v"), ("b.mp4", b"v"),
            ("b.cls", b"1"),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.slow
def test_tars(tmp_path: Path) -> None:
    draw, whole = np.random.default_rng(0), tar()
    for _ in range(ROUNDS):
        (tmp_path / "a.tar").write_bytes(damaged(whole, draw))
        content = read_tar(tmp_path / "a.tar", label_key="label")
        size = (tmp_path / "a.tar").stat().st_size
        assert all(video.member.offset + video.member.size <= size for video in content.videos)


@pytest.mark.slow
def test_indexes_and_manifests(built: Path) -> None:
    draw = np.random.default_rng(1)
    for file, load in (
        (next(built.rglob("*.index.json")), load_index),
        (built / "dataset.json", load_dataset),
    ):
        whole = file.read_bytes()
        for _ in range(ROUNDS):
            with contextlib.suppress(ManifestError):
                load(damaged(whole, draw), file="fuzzed")
        for tree in ([], 3, {"format": json.loads(whole)["format"], "samples": 5, "shards": [3]}):
            with pytest.raises(ManifestError):
                load(json.dumps(tree).encode(), file="fuzzed")
        with pytest.raises(ManifestError):
            load(b"[" * 200_000, file="fuzzed")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["list.csv", "list.parquet"])
def test_lists(tmp_path: Path, name: str) -> None:
    draw = np.random.default_rng(2)
    file = tmp_path / name
    if name.endswith(".csv"):
        file.write_text('path,label,t\n"a, b.mp4",x,1\nc.mp4,"y ""z""",2\n' * 20)
    else:
        pq.write_table(pa.table({"path": ["a.mp4", "b.mp4"], "label": ["x", "y"], "t": [1.0, 2.0]}), file)
    source, whole = CsvSource(file=str(file)), file.read_bytes()
    for _ in range(ROUNDS):
        file.write_bytes(damaged(whole, draw))
        with contextlib.suppress(*REFUSALS):
            for row in read_rows(source.file, needed=("path", "label")):
                row.text("path")


def test_a_small_table_that_unpacks_to_gigabytes_is_refused() -> None:
    column = pa.array([""]).take(pa.array(np.zeros(20_000_000, dtype=np.int8)))
    out = io.BytesIO()
    pq.write_table(pa.table({"path": column}), out, compression="zstd")
    assert len(out.getvalue()) < 1 << 20
    with pytest.raises(ManifestError, match="20000000 rows"):
        read_table(out.getvalue(), file="list.parquet")
