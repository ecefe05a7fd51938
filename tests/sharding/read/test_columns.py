"""Tables and catalogs made in parts, against the same made of all rows at once, on random tables."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cliplift.sharding.build.finalize import describe
from cliplift.sharding.manifest import (
    ManifestError,
    Sample,
    ShardIndex,
    SourceVideo,
    digest,
    read_table,
)
from cliplift.sharding.read import columns
from cliplift.sharding.read.catalog import NO_SPLIT, SEVERAL_SPLITS
from cliplift.sharding.tables import Parts, TableFile, batches, open_table, schema_of, table_of

SPLITS = ("train", "val", "a", "Ω", "z-9")


def random_samples(seed: int, rows: int, *, folds: int, flow: bool) -> list[Sample]:
    draw = np.random.default_rng(seed)
    names = [SPLITS[n] for n in draw.integers(0, draw.integers(1, 6), rows)]
    found = []
    for number in range(rows):
        several = tuple(draw.integers(0, 4, draw.integers(0, 4)).tolist()) if seed % 2 else ()
        found.append(
            Sample(
                key=f"k{number}",
                mp4_offset=int(draw.integers(0, 900)),
                mp4_bytes=int(draw.integers(1, 90)),
                mp4_crc32=int(draw.integers(0, 2**32)),
                json_offset=3,
                json_bytes=2,
                json_crc32=7,
                video_id=f"v{draw.integers(0, max(1, rows // 3))}",
                source=f"{number}.mp4",
                split=names[number],
                label=int(draw.integers(-1, 4)),
                labels=several,
                folds=tuple(("train", "", "test")[n] for n in draw.integers(0, 3, folds).tolist()),
                group=[None, "", "g", f"g{draw.integers(0, 5)}"][draw.integers(0, 4)],
                start_seconds=0.0,
                end_seconds=1.5,
                num_frames=int(draw.integers(1, 99)),
                fps=float(draw.random() + 1),
                width=34,
                height=25,
                keyframes=(0, 8),
                source_sha256="0" * 64,
                flow_offset=5 * flow,
                flow_bytes=int(flow and draw.integers(1, 9)),
                flow_crc32=(number + 1) * flow,
            )
        )  # fmt: skip
    return found


def indexes_of(samples: list[Sample], seed: int) -> list[ShardIndex]:
    """Shards of any size, some of them empty, whose numbers have gaps."""
    draw = np.random.default_rng(seed)
    cuts = sorted(draw.integers(0, len(samples) + 1, 6).tolist())
    ranges = zip([0, *cuts], [*cuts, len(samples)], strict=True)
    return [
        ShardIndex(shard=3 * n + 1, split="s", tar=f"s/{n}.tar", tar_bytes=1000, tar_sha256=f"{n:064d}", plan_id="p",
                   samples=tuple(samples[a:b]), refused=())
        for n, (a, b) in enumerate(ranges)
    ]  # fmt: skip


def expected_columns(samples: list[Sample], indexes: list[ShardIndex], folds: int) -> dict[str, Any]:
    """The catalog's contents in plain Python, from what the format says."""

    def numbered(names: list[str]) -> list[int]:
        seen: dict[str, int] = {}
        return [seen.setdefault(name, len(seen)) for name in names]

    splits = [s.folds if folds else (s.split,) for s in samples]
    names = sorted({name for row in splits for name in row if name})
    codes = [[names.index(name) if name else NO_SPLIT for name in row] for row in splits]
    width = max(1, folds)
    runs = []
    for fold in range(width):
        of_shards: list[int | None] = []
        first = 0
        for index in indexes:
            held = {codes[first + i][fold] for i in range(len(index.samples))}
            first += len(index.samples)
            of_shards.append(None if not held else held.pop() if len(held) == 1 else SEVERAL_SPLITS)
        known = next(code for code in of_shards if code is not None)
        joined: list[list[int]] = []
        for code in of_shards:
            known = known if code is None else code
            if joined and joined[-1][0] == known:
                joined[-1][1] += 1
            else:
                joined.append([known, 1])
        runs.append(tuple(map(tuple, joined)))
    return {
        "videos": numbered([s.video_id for s in samples]),
        "groups": numbered([s.group or s.video_id for s in samples]),
        "splits": tuple(names),
        "codes": codes,
        "counts": tuple(
            tuple(sum(row[fold] == n for row in codes) for n in range(len(names))) for fold in range(width)
        ),
        "split_labels": tuple(
            tuple(max((len(s.labels) for s, row in zip(samples, codes, strict=True) if row[fold] == n), default=0)
                  for n in range(len(names)))
            for fold in range(width)
        ),
        "shard_splits": tuple(runs),
    }  # fmt: skip


@pytest.mark.parametrize("folds", [0, 2])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 90), part=st.integers(1, 40))
def test_a_catalog_made_in_parts_is_the_one_in_plain_python(
    rows_to_parquet: Callable[..., bytes], folds: int, seed: int, rows: int, part: int
) -> None:
    import tempfile

    samples = random_samples(seed, rows, folds=folds, flow=seed % 3 == 0)
    indexes = indexes_of(samples, seed)
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "PART_ROWS", part)
        patch.setattr(columns, "batches", lambda *a, **k: batches(*a, **k, rows=part))
        table = Path(temporary) / "samples.parquet"
        dataset = describe(indexes, table=table, name="n", classes=tuple("abcd"), folds=folds, missing=0,
                           plan_id="p", settings={})  # fmt: skip
        # The same bytes as all rows written at once.
        shard_numbers = [index.shard for index in indexes for _ in index.samples]
        assert table.read_bytes() == rows_to_parquet(samples, Sample, extra={"shard": shard_numbers})
        head, found, labels = columns.columns_of(open_table(table, file="t"), dataset, samples_bytes=7)
    expected = expected_columns(samples, indexes, folds)
    assert found["video"].tolist() == expected["videos"]
    assert found["group"].tolist() == expected["groups"]
    assert (head.videos, head.groups) == (max(expected["videos"]) + 1, max(expected["groups"]) + 1)
    assert found["splits"].tolist() == expected["codes"]
    for name in ("splits", "counts", "split_labels", "shard_splits"):
        assert getattr(head, name) == expected[name], name
    for name in (*columns.COPIED, *(columns.COPIED_FLOW if head.flow else ())):
        assert found[name].tolist() == [getattr(sample, name) for sample in samples]
    assert head.flow == any(sample.flow_bytes for sample in samples)
    assert labels.tolist() == [label for sample in samples for label in sample.labels]
    if head.label_values:
        ends = np.cumsum([len(sample.labels) for sample in samples])
        assert (found["labels_start"] + found["labels_count"]).tolist() == ends.tolist()
    assert head.most_labels == max(len(sample.labels) for sample in samples)


def test_blocks_are_summed_where_they_end_and_not_where_batches_do(tmp_path: Path) -> None:
    samples = random_samples(1, 9000, folds=0, flow=False)
    indexes = indexes_of(samples, 1)
    table = tmp_path / "samples.parquet"
    dataset = describe(indexes, table=table, name="n", classes=tuple("abcd"), folds=0, missing=0, plan_id="p",
                       settings={})  # fmt: skip
    sums = []
    with pytest.MonkeyPatch.context() as patch:
        for size in (700, 4096, 10_000):
            patch.setattr(columns, "batches", lambda *a, size=size, **k: batches(*a, **k, rows=size))
            path = tmp_path / f"{size}"
            head = columns.write_rows(open_table(table, file="t"), dataset, path, samples_bytes=1)
            sums.append((head, path.read_bytes()))
    assert sums[0] == sums[1] == sums[2]
    head, data = sums[0]
    _, rows, labels = columns.columns_of(open_table(table, file="t"), dataset, samples_bytes=1)
    blocks = [rows[a : a + 4096] for a in (0, 4096, 8192)]
    blocks += [labels[a : a + 4096] for a in range(0, len(labels), 4096)]
    checksums = np.array([zlib.crc32(block.tobytes()) for block in blocks], dtype="<u4").tobytes()
    assert data == rows.tobytes() + labels.tobytes() + checksums
    assert head.checksums_sha256 == digest(checksums)


@pytest.mark.parametrize("sizes", [[1] * 25, [25], [10, 10, 5], [9, 2, 14], [0, 25, 0]])
def test_the_bytes_of_a_table_do_not_depend_on_its_batches(tmp_path: Path, sizes: list[int]) -> None:
    """Row groups are those of pyarrow, given all rows at once."""
    rows = [SourceVideo(f"v{n}", f"{n}.mp4", "s", n, (n, 1), (), None if n % 2 else "g", None, n / 3)
            for n in range(25)]  # fmt: skip
    schema = schema_of(SourceVideo)
    expected = io.BytesIO()
    whole = table_of(rows, schema)
    pq.write_table(whole, expected, compression="zstd", store_schema=False, row_group_size=10)
    file = TableFile(tmp_path / "t", schema, group_rows=10)
    first = 0
    for size in sizes:
        file.add(whole.slice(first, size))
        first += size
    file.close()
    assert (tmp_path / "t").read_bytes() == expected.getvalue()
    assert pq.read_table(tmp_path / "t").equals(whole.cast(pq.read_schema(tmp_path / "t")))


def test_flow_that_comes_late_is_refused(tmp_path: Path) -> None:
    without, late = (random_samples(0, 6, folds=0, flow=flow) for flow in (False, True))
    late = [replace(sample, flow_bytes=4) for sample in late]
    schema = schema_of(Sample)
    file = TableFile(tmp_path / "t", schema, group_rows=6)
    file.add(table_of(without, schema))
    with pytest.raises(ManifestError, match="comes after 6 clips without optical flow"):
        file.add(table_of(late, schema))


def test_parts_give_back_what_they_got_in_order(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    for number in range(7):
        parts.add(f"{number % 2}", pa.table({"n": [number, -number]}))
    assert [row for table in parts.read("1") for row in table.column("n").to_pylist()] == [
        1,
        -1,
        3,
        -3,
        5,
        -5,
    ]
    assert list(parts.read("2")) == []
    parts.remove("1")
    assert list(parts.read("1")) == []


@pytest.mark.parametrize(
    "change", [lambda data: data[:-9], lambda data: b"", lambda data: b"PAR1" + data[4:40]]
)
def test_a_table_that_is_not_whole_is_refused(
    tmp_path: Path, rows_to_parquet: Callable[..., bytes], change: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "t"
    path.write_bytes(change(rows_to_parquet(random_samples(0, 6, folds=0, flow=False), Sample)))
    with pytest.raises(ManifestError, match="t: not a whole Parquet file"):
        open_table(path, file="t")


def test_a_name_of_a_column_that_is_not_utf8_is_damage(tmp_path: Path) -> None:
    out = io.BytesIO()
    pq.write_table(pa.table({"path": ["a.mp4"], "label": ["x"]}), out)
    damaged = tmp_path / "list.parquet"
    damaged.write_bytes(out.getvalue().replace(b"path", b"p\x80th"))
    with pytest.raises(ManifestError, match=r"list\.parquet: not a whole Parquet file"):
        read_table(damaged.read_bytes(), file="list.parquet")
    with pytest.raises(ManifestError, match=r"list\.parquet: not a whole Parquet file"):
        open_table(damaged, file="list.parquet")
