"""The rows of a catalog, made of the table of samples: to finalize a dataset, and for datasets without a catalog.

The table is read twice, some thousand rows at a time: once for what the head says and for the order in which videos
and groups appear, once to write the rows. What grows with the samples lies in a scratch folder.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from cliplift.sharding.manifest import (
    CATALOG_ROWS_FILE,
    SAMPLES_FILE,
    Dataset,
    ManifestError,
    check_samples,
    digest,
)
from cliplift.sharding.read.catalog import (
    BLOCK_ROWS,
    CHECKSUM,
    LABEL,
    NO_SPLIT,
    SEVERAL_SPLITS,
    CatalogHead,
    Ints,
    Labels,
    Records,
    row_type,
)
from cliplift.sharding.scratch import scratch_folder
from cliplift.sharding.tables import batches

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

# Columns of the table that a catalog has as they are.
COPIED = ("mp4_offset", "mp4_bytes", "mp4_crc32", "label", "num_frames", "fps", "width", "height")
COPIED_FLOW = ("flow_offset", "flow_bytes", "flow_crc32")
LISTS = ("labels", "folds", "split", "video_id", "group")
PART_ROWS = 1 << 20  # rows whose names are numbered in memory at once
HASHED = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8")])


class Columns(NamedTuple):
    """What a catalog is made of."""

    head: CatalogHead
    rows: Records
    labels: Labels


def columns_of(
    table: pq.ParquetFile, dataset: Dataset, *, samples_bytes: int, file: str = SAMPLES_FILE
) -> Columns:
    """The rows of all samples in memory, in the table's order; raises as :func:`write_rows` does."""
    with scratch_folder() as folder:
        path = folder / CATALOG_ROWS_FILE
        head = write_rows(table, dataset, path, samples_bytes=samples_bytes, file=file)
        rows = np.fromfile(path, dtype=row_type(head), count=head.rows)
        labels = np.fromfile(path, dtype=LABEL, count=head.label_values, offset=rows.nbytes)
    return Columns(head, rows, labels)


def write_rows(
    table: pq.ParquetFile, dataset: Dataset, target: Path, *, samples_bytes: int, file: str = SAMPLES_FILE
) -> CatalogHead:
    """Write ``catalog.bin`` in memory that does not grow with the samples, and return the head that belongs to it.

    Args:
        table: ``samples.parquet``.
        dataset: its manifest.
        target: the file to write.
        samples_bytes: length of ``samples.parquet``.
        file: for messages.

    Raises:
        ManifestError: the table has values that cannot be true, or is not in the order of the shards.
    """
    with scratch_folder() as folder:
        survey = _Survey(dataset, folder, file)
        for batch in batches(table, file=file):
            survey.add(batch)
        head = survey.head(samples_bytes=samples_bytes, flow="flow_bytes" in table.schema_arrow.names)
        videos, groups = survey.videos.numbers(), survey.groups.numbers()
        head = replace(head, videos=survey.videos.count, groups=survey.groups.count)
        wanted = [*COPIED, *LISTS, *(COPIED_FLOW if head.flow else ())]
        labels = folder / "labels"
        row_sums, label_sums = _Sums(row_type(head).itemsize), _Sums(LABEL.itemsize)
        with target.open("wb") as out, labels.open("wb") as label_file:
            first = starts = 0
            for batch in batches(table, file=file, columns=wanted):
                rows, lists = _rows(batch, dataset, head, first=first, labels_start=starts, file=file)
                stop = first + len(rows)
                rows["video"], rows["group"] = videos[first:stop], groups[first:stop]
                row_sums.write(rows, out)
                label_sums.write(lists, label_file)
                first, starts = stop, starts + len(lists)
            label_file.flush()
            with labels.open("rb") as written:
                while part := written.read(1 << 20):
                    out.write(part)
            checksums = np.array([*row_sums.finished(), *label_sums.finished()], dtype=CHECKSUM)
            out.write(checksums.tobytes())
    return replace(head, checksums_sha256=digest(checksums.tobytes()))


class _Sums:
    """The CRC-32 of every block of what is written."""

    def __init__(self, item_bytes: int) -> None:
        self._block_bytes = BLOCK_ROWS * item_bytes
        self._sums: list[int] = []
        self._running = self._inside = 0

    def write(self, items: npt.NDArray[np.generic], out: BinaryIO) -> None:
        data = memoryview(items.tobytes())
        out.write(data)
        while data:
            part = data[: self._block_bytes - self._inside]
            self._running = zlib.crc32(part, self._running)
            self._inside += len(part)
            data = data[len(part) :]
            if self._inside == self._block_bytes:
                self._end()

    def _end(self) -> None:
        self._sums.append(self._running)
        self._running = self._inside = 0

    def finished(self) -> list[int]:
        if self._inside:
            self._end()
        return self._sums


class _Survey:
    """What the head of a catalog says, of rows that come batch by batch; also checks them."""

    def __init__(self, dataset: Dataset, folder: Path, file: str) -> None:
        self._dataset, self._file = dataset, file
        self.videos = _Numbered(folder / "videos", dataset.samples)
        self.groups = _Numbered(folder / "groups", dataset.samples)
        self._ends = np.cumsum([shard.samples for shard in dataset.shards], dtype=np.int64)
        self._shard_numbers = np.array([shard.shard for shard in dataset.shards], dtype=np.int64)
        folds = max(1, dataset.folds)
        # Splits are numbered as they appear; the head gives them the numbers of their sorted names.
        self._names: dict[str, int] = {}
        self._counts = [np.zeros(0, dtype=np.int64) for _ in range(folds)]
        self._most = [np.zeros(0, dtype=np.int64) for _ in range(folds)]
        self._lowest = np.full((len(dataset.shards), folds), np.iinfo(np.int64).max)
        self._highest = np.full((len(dataset.shards), folds), -2)
        self._rows = self._label_values = self._most_labels = 0

    def add(self, batch: pa.Table) -> None:
        first, stop = self._rows, self._rows + batch.num_rows
        check_samples(batch, self._dataset, file=self._file, first=first)
        places = np.searchsorted(self._ends, np.arange(first, stop), side="right")
        if (
            stop > self._dataset.samples
            or (batch.column("shard").to_numpy() != self._shard_numbers[places]).any()
        ):
            raise self._wrong_shards()
        self.videos.add(batch.column("video_id"), first)
        self.groups.add(named_groups(batch), first)
        lengths = _lengths(batch, "labels")
        for name in _split_names(batch, self._dataset, self._file, first):
            if name:
                self._names.setdefault(name, len(self._names))
        codes = _split_codes(batch, self._dataset, self._names, absent=-1)
        for fold, column in enumerate(codes.T):
            chosen = column >= 0
            self._counts[fold] = _grown(self._counts[fold], len(self._names))
            self._counts[fold] += np.bincount(column[chosen], minlength=len(self._names))
            self._most[fold] = _grown(self._most[fold], len(self._names))
            np.maximum.at(self._most[fold], column[chosen], lengths[chosen])
            np.minimum.at(self._lowest[:, fold], places, column)
            np.maximum.at(self._highest[:, fold], places, column)
        self._rows = stop
        self._label_values += int(lengths.sum())
        self._most_labels = max(self._most_labels, int(lengths.max(initial=0)))

    def _wrong_shards(self) -> ManifestError:
        return ManifestError(
            f"{self._file}: does not hold the samples that the manifest counts, shard by shard"
        )

    def head(self, *, samples_bytes: int, flow: bool) -> CatalogHead:
        """The head; the numbers of videos and groups, and the checksums, are not yet known."""
        if self._rows != self._dataset.samples:
            raise self._wrong_shards()
        splits = tuple(sorted(self._names))
        if len(splits) >= SEVERAL_SPLITS:
            raise ManifestError(f"{self._file}: names {len(splits)} splits, more than {SEVERAL_SPLITS - 1}")
        order = [self._names[name] for name in splits]
        return CatalogHead(
            samples_sha256=self._dataset.samples_sha256,
            samples_bytes=samples_bytes,
            rows=self._rows,
            block_rows=BLOCK_ROWS,
            videos=0,
            groups=0,
            flow=flow,
            most_labels=self._most_labels,
            label_values=self._label_values,
            splits=splits,
            folded=self._dataset.folds > 0,
            counts=tuple(tuple(_grown(c, len(order))[order].tolist()) for c in self._counts),
            split_labels=tuple(tuple(_grown(m, len(order))[order].tolist()) for m in self._most),
            shard_splits=tuple(
                self._shard_splits(splits, fold) for fold in range(max(1, self._dataset.folds))
            ),
        )

    def _shard_splits(self, splits: tuple[str, ...], fold: int) -> tuple[tuple[int, int], ...]:
        """Runs of shards whose samples are all of one split; a shard without samples goes with those before it."""
        number = {self._names[name]: place for place, name in enumerate(splits)} | {-1: NO_SPLIT}
        filled = np.flatnonzero(self._highest[:, fold] >= -1)
        of_filled = [
            number[low] if low == high else SEVERAL_SPLITS
            for low, high in zip(
                self._lowest[filled, fold].tolist(), self._highest[filled, fold].tolist(), strict=True
            )
        ]
        before = np.maximum(np.searchsorted(filled, np.arange(len(self._highest)), side="right") - 1, 0)
        return tuple(
            (code, len(list(run))) for code, run in groupby(of_filled[place] for place in before.tolist())
        )


def _grown(array: Ints, length: int) -> Ints:
    return np.pad(array, (0, length - len(array)))


class _Numbered:
    """Numbers names in order of appearance; what is kept of a name is a hash of 128 bits, on disk.

    A name and its later appearances fall into one part by their hash. Each part says at which row its names appear
    first; the rows that are first are then numbered in order.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        folder.mkdir()
        self._folder, self._rows = folder, rows
        self._parts = -(-rows // PART_ROWS)
        self.count = 0

    def add(self, names: pa.ChunkedArray, first: int) -> None:
        """The names of the rows from ``first`` on."""
        coded = names.combine_chunks().dictionary_encode()
        digests = b"".join(
            hashlib.blake2b(name.encode(), digest_size=16).digest() for name in coded.dictionary.to_pylist()
        )
        found = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)[coded.indices.to_numpy()]
        rows = np.empty(len(found), dtype=HASHED)
        rows["high"], rows["low"] = found.T
        rows["row"] = np.arange(first, first + len(found))
        parts = rows["high"] % max(1, self._parts)
        for part in np.unique(parts).tolist():
            with (self._folder / f"{part}").open("ab") as file:
                file.write(rows[parts == part].tobytes())

    def numbers(self) -> npt.NDArray[np.uint32]:
        """(N,) the number of every row's name, mapped from a file."""
        shape = (self._rows,)
        firsts = np.memmap(self._folder / "firsts", dtype=np.int64, mode="w+", shape=shape)
        for part in range(self._parts):
            path = self._folder / f"{part}"
            if not path.exists():
                continue
            rows = np.fromfile(path, dtype=HASHED)
            path.unlink()
            rows = rows[
                np.lexsort((rows["low"], rows["high"]))
            ]  # stable: equal names stay in the order of their rows
            new = np.ones(len(rows), dtype=bool)
            new[1:] = (np.diff(rows["high"]) != 0) | (np.diff(rows["low"]) != 0)
            firsts[rows["row"]] = rows["row"][new][np.cumsum(new) - 1]
        numbers: npt.NDArray[np.uint32] = np.memmap(
            self._folder / "numbers", dtype=np.uint32, mode="w+", shape=shape
        )
        for start in range(0, self._rows, PART_ROWS):
            part_firsts = firsts[start : start + PART_ROWS]
            new = part_firsts == np.arange(start, start + len(part_firsts))
            numbers[start : start + len(new)][new] = np.arange(self.count, self.count + int(new.sum()))
            numbers[start : start + len(new)] = numbers[part_firsts]
            self.count += int(new.sum())
        return numbers


def _rows(
    batch: pa.Table, dataset: Dataset, head: CatalogHead, *, first: int, labels_start: int, file: str
) -> tuple[Records, Labels]:
    """The rows of a batch, without the numbers of videos and groups, and their lists of labels."""
    rows: Records = np.zeros(batch.num_rows, dtype=row_type(head))
    for name in COPIED + (COPIED_FLOW if head.flow else ()):
        values = batch.column(name).to_numpy()
        rows[name] = values.astype(rows.dtype[name])
        wrong = np.flatnonzero(rows[name] != values)
        if len(wrong):
            raise ManifestError(
                f"{file}: row {first + wrong[0]}: {name} is {values[wrong[0]]}, which cannot be"
            )
    number = {name: place for place, name in enumerate(head.splits)}
    rows["splits"] = _split_codes(batch, dataset, number, absent=NO_SPLIT)
    lengths = _lengths(batch, "labels")
    if head.label_values:
        rows["labels_start"], rows["labels_count"] = labels_start + np.cumsum(lengths) - lengths, lengths
    return rows, batch.column("labels").combine_chunks().flatten().to_numpy().astype(LABEL)


def _lengths(batch: pa.Table, name: str) -> Ints:
    """Length of every list of a column."""
    lengths = batch.column(name).combine_chunks().value_lengths()
    found: Ints = lengths.to_numpy(zero_copy_only=False).astype(np.int64)
    return found


def named_groups(table: pa.Table | pa.RecordBatch) -> pa.ChunkedArray | pa.Array:
    """The name of what may not be cut: the sample's group, or its video where it has none."""
    import pyarrow.compute as pc

    group = table.column("group")
    unnamed = pc.fill_null(pc.equal(group, ""), True)
    return pc.if_else(unnamed, table.column("video_id"), group)


def _split_column(batch: pa.Table, dataset: Dataset) -> pa.Array:
    """The split of every row, or of every row and fold, one row after the other."""
    if dataset.folds:
        return batch.column("folds").combine_chunks().flatten()
    return batch.column("split").combine_chunks()


def _split_names(batch: pa.Table, dataset: Dataset, file: str, first: int) -> Iterator[str]:
    """The names of the splits in order of appearance. Raises ManifestError where a row has none."""
    if dataset.folds:
        wrong = np.flatnonzero(_lengths(batch, "folds") != dataset.folds)
        if len(wrong):
            raise ManifestError(
                f"{file}: row {first + wrong[0]}: names no split for each of {dataset.folds} folds"
            )
    column = _split_column(batch, dataset)
    if column.null_count:
        raise ManifestError(f"{file}: a split is empty")
    yield from column.unique().to_pylist()


def _split_codes(batch: pa.Table, dataset: Dataset, numbers: dict[str, int], *, absent: int) -> Ints:
    """(N, folds) the number of every row's split; ``absent`` for an empty name."""
    coded = _split_column(batch, dataset).dictionary_encode()
    code = np.array([numbers.get(name, absent) for name in coded.dictionary.to_pylist()], dtype=np.int64)
    found: Ints = code[coded.indices.to_numpy()].reshape(batch.num_rows, -1)
    return found
