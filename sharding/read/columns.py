"""The rows of a catalog, made of the table of samples: to finalize a dataset, and for datasets without a catalog."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cliplift.sharding.manifest import SAMPLES_FILE, Dataset, ManifestError, check_samples
from cliplift.sharding.read.catalog import (
    BLOCK_ROWS,
    LABEL,
    NO_SPLIT,
    SEVERAL_SPLITS,
    CatalogHead,
    Ints,
    Labels,
    Records,
    row_type,
)

if TYPE_CHECKING:
    import pyarrow as pa

# Columns of the table that a catalog has as they are.
COPIED = ("mp4_offset", "mp4_bytes", "mp4_crc32", "label", "num_frames", "fps", "width", "height")
COPIED_FLOW = ("flow_offset", "flow_bytes", "flow_crc32")


class Columns(NamedTuple):
    """What a catalog is made of; ``head`` lacks the checksums."""

    head: CatalogHead
    rows: Records
    labels: Labels


def columns_of(table: pa.Table, dataset: Dataset, *, samples_bytes: int, file: str = SAMPLES_FILE) -> Columns:
    """The rows of all samples, in the table's order.

    Args:
        table: ``samples.parquet``.
        dataset: its manifest.
        samples_bytes: length of that file.
        file: for messages.

    Raises:
        ManifestError: the table has values that cannot be true, or is not in the order of the shards.
    """
    check_samples(table, dataset, file=file)
    shards = np.repeat([shard.shard for shard in dataset.shards], [shard.samples for shard in dataset.shards])
    found = table.column("shard").to_numpy()
    if not np.array_equal(found, shards):
        raise ManifestError(f"{file}: does not hold the samples that the manifest counts, shard by shard")
    videos, video_names = _numbered(table.column("video_id"))
    groups, group_names = _numbered(named_groups(table))
    splits, codes = _split_codes(table, dataset, file)
    counts, starts, values, most = _label_lists(table)
    head = CatalogHead(
        samples_sha256=dataset.samples_sha256,
        samples_bytes=samples_bytes,
        rows=table.num_rows,
        block_rows=BLOCK_ROWS,
        videos=len(video_names),
        groups=len(group_names),
        flow="flow_bytes" in table.column_names,
        most_labels=most,
        label_values=len(values),
        splits=splits,
        folded=dataset.folds > 0,
        counts=tuple(
            tuple(np.bincount(column[column != NO_SPLIT], minlength=len(splits)).tolist())
            for column in codes.T
        ),
        split_labels=tuple(
            tuple(int(counts[column == code].max(initial=0)) for code in range(len(splits)))
            for column in codes.T
        ),
        shard_splits=tuple(_shard_splits(column, dataset) for column in codes.T),
    )
    rows: Records = np.zeros(table.num_rows, dtype=row_type(head))
    for name in COPIED + (COPIED_FLOW if head.flow else ()):
        _copy(table.column(name).to_numpy(), rows, name, file)
    rows["video"], rows["group"], rows["splits"] = videos, groups, codes
    if len(values):
        rows["labels_start"], rows["labels_count"] = starts, counts
    return Columns(head, rows, values)


def _copy(values: npt.NDArray[Any], rows: Records, name: str, file: str) -> None:
    rows[name] = values.astype(rows.dtype[name])
    wrong = np.flatnonzero(rows[name] != values)
    if len(wrong):
        raise ManifestError(f"{file}: row {wrong[0]}: {name} is {values[wrong[0]]}, which cannot be")


def _numbered(column: pa.ChunkedArray) -> tuple[Ints, pa.Array]:
    """The number of every cell's value, counted in order of appearance, and the values."""
    coded = column.dictionary_encode().combine_chunks()
    return coded.indices.to_numpy().astype(np.int64), coded.dictionary


def named_groups(table: pa.Table | pa.RecordBatch) -> pa.ChunkedArray | pa.Array:
    """The name of what may not be cut: the sample's group, or its video where it has none."""
    import pyarrow.compute as pc

    group = table.column("group")
    unnamed = pc.fill_null(pc.equal(group, ""), True)
    return pc.if_else(unnamed, table.column("video_id"), group)


def _split_codes(
    table: pa.Table, dataset: Dataset, file: str
) -> tuple[tuple[str, ...], npt.NDArray[np.uint16]]:
    """The names of all splits, sorted, and (N, folds) the number of every sample's."""
    if dataset.folds:
        lists = table.column("folds").combine_chunks()
        lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
        if (lengths != dataset.folds).any():
            row = int(np.flatnonzero(lengths != dataset.folds)[0])
            raise ManifestError(f"{file}: row {row}: names no split for each of {dataset.folds} folds")
        column = lists.flatten()
    else:
        column = table.column("split").combine_chunks()
    coded = column.dictionary_encode()
    if coded.null_count:
        raise ManifestError(f"{file}: a split is empty")
    found: list[str] = coded.dictionary.to_pylist()
    splits = sorted(name for name in found if name)
    if len(splits) >= SEVERAL_SPLITS:
        raise ManifestError(f"{file}: names {len(splits)} splits, more than {SEVERAL_SPLITS - 1}")
    numbers = {name: number for number, name in enumerate(splits)}
    code = np.array([numbers.get(name, NO_SPLIT) for name in found], dtype=np.uint16)
    return tuple(splits), code[coded.indices.to_numpy()].reshape(table.num_rows, -1)


def _shard_splits(codes: npt.NDArray[np.uint16], dataset: Dataset) -> tuple[tuple[int, int], ...]:
    """Runs of shards whose samples are all of one split; a shard without samples goes with those before it."""
    sizes = np.array([shard.samples for shard in dataset.shards], dtype=np.int64)
    filled = np.flatnonzero(sizes)
    starts = (np.cumsum(sizes) - sizes)[filled]
    lowest, highest = np.minimum.reduceat(codes, starts), np.maximum.reduceat(codes, starts)
    of_filled = np.where(lowest == highest, lowest, SEVERAL_SPLITS)
    before = np.maximum(np.searchsorted(filled, np.arange(len(sizes)), side="right") - 1, 0)
    return tuple((int(code), len(list(run))) for code, run in groupby(of_filled[before].tolist()))


def _label_lists(table: pa.Table) -> tuple[Ints, Ints, Labels, int]:
    """Length and start of every sample's list of labels, the lists in one array, and the length of the longest."""
    column = table.column("labels").combine_chunks()
    counts = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    labels = column.flatten().to_numpy().astype(LABEL)
    return counts, np.cumsum(counts) - counts, labels, int(counts.max(initial=0))
