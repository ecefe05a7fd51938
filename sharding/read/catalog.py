"""The catalog: what reading needs of every sample, in rows of a fixed width that all processes of a host share.

``catalog.bin`` holds the rows, then the labels of samples that have a list of them, then a CRC-32 of every block of
rows and of labels. It is mapped into memory, and a block is checked, against its checksum and for values that can be
true, when it is first touched. ``catalog.json`` says what the rows hold and has the checksum of the checksums; its own
stands in ``dataset.json``. So opening costs nothing a sample, and nothing is used that was not checked.

The file is plain arrays and no Arrow or Parquet: the size of such a file follows from a few numbers, so that a hostile
one is refused before any of it is read, a process that looks up clips needs no library for it, and a block is a slice.
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cliplift.sharding.manifest import (
    CATALOG_FILE,
    CATALOG_ROWS_FILE,
    DATASET_FILE,
    NO_LABEL,
    SAMPLES_FILE,
    Dataset,
    ManifestError,
    canonical,
    digest,
    map_file,
    parsed_json,
    require_true,
    require_uncut,
    typed,
)
from cliplift.sharding.read.fetch import HostFiles
from cliplift.sharding.storage import Store

CATALOG_FORMAT = "cliplift-catalog/1"
BLOCK_ROWS, MAX_BLOCK_ROWS = 4096, 1 << 20
LABEL = np.dtype("<i4")
CHECKSUM = np.dtype("<u4")
# In place of the number of a split: a sample that a fold leaves out, and a shard whose samples are of several splits.
NO_SPLIT, SEVERAL_SPLITS = 0xFFFF, 0xFFFE

Ints = npt.NDArray[np.int64]
Records = npt.NDArray[np.void]
Labels = npt.NDArray[np.int32]


@dataclass(frozen=True)
class CatalogHead:
    """``catalog.json``.

    ``counts``, ``split_labels`` and ``shard_splits`` have an entry a fold, or one where there are no folds: the samples
    of each of ``splits``, the most labels of one of them, and runs of shards whose samples are of one split (number of
    the split, how many shards).
    """

    samples_sha256: str  # of samples.parquet, from which the catalog follows
    samples_bytes: int
    rows: int
    block_rows: int
    videos: int
    groups: int
    flow: bool
    most_labels: int
    label_values: int  # stored label numbers, of samples with a list of them
    splits: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    split_labels: tuple[tuple[int, ...], ...]
    shard_splits: tuple[tuple[tuple[int, int], ...], ...]
    folded: bool  # whether there are folds; the shards name the splits otherwise
    checksums_sha256: str = ""


def dump_head(head: CatalogHead) -> bytes:
    """``catalog.json`` as bytes."""
    return canonical({"format": CATALOG_FORMAT, **dataclasses.asdict(head)}) + b"\n"


def load_head(data: bytes, dataset: Dataset, *, file: str) -> CatalogHead:
    """Read ``catalog.json``.

    Raises:
        ManifestError: it is damaged, or another dataset's, or says what cannot be true.
    """
    if digest(data) != dataset.catalog_sha256:
        raise ManifestError(f"{file}: does not belong to {DATASET_FILE}; finalize again")
    head = typed(CatalogHead, parsed_json(data, file, CATALOG_FORMAT), file, "a catalog")
    if head.samples_sha256 != dataset.samples_sha256:
        raise ManifestError(f"{file}: does not belong to {SAMPLES_FILE}; finalize again")
    folds, shards = max(1, dataset.folds), len(dataset.shards)
    splits, runs = len(head.splits), head.shard_splits
    known = (*range(splits), NO_SPLIT, SEVERAL_SPLITS)
    right = {
        "rows": head.rows == dataset.samples == sum(shard.samples for shard in dataset.shards),
        "block_rows": 1 <= head.block_rows <= MAX_BLOCK_ROWS,
        "videos": 0 < head.videos <= head.rows,
        "groups": 0 < head.groups <= head.rows,
        "most_labels": head.most_labels >= 0,
        "label_values": head.label_values >= 0,
        "folded": head.folded == (dataset.folds > 0),
        "splits": splits < SEVERAL_SPLITS and "" not in head.splits and len(set(head.splits)) == splits,
        "counts": len(head.counts) == folds
        and all(len(c) == splits and min(c, default=0) >= 0 and sum(c) <= head.rows for c in head.counts),
        "split_labels": [len(c) for c in head.split_labels] == [splits] * folds,
        "shard_splits": len(runs) == folds
        and all(sum(n for _, n in fold) == shards for fold in runs)
        and all(n > 0 and code in known for fold in runs for code, n in fold),
    }
    require_true(right, file)
    return head


def row_type(head: CatalogHead) -> np.dtype[np.void]:
    """A row: little-endian numbers, the widest first, so that each lies at a multiple of its width."""
    lists = head.label_values > 0
    fields: list[tuple[str, str] | tuple[str, str, tuple[int]]] = [
        ("mp4_offset", "<i8"),
        ("mp4_bytes", "<i8"),
    ]
    fields += [("flow_offset", "<i8"), ("flow_bytes", "<i8")] if head.flow else []
    fields += [("labels_start", "<i8")] if lists else []
    fields += [("fps", "<f8"), ("mp4_crc32", "<u4")]
    fields += [("flow_crc32", "<u4")] if head.flow else []
    fields += [("labels_count", "<u4")] if lists else []
    fields += [(name, "<i4") for name in ("label", "num_frames", "width", "height")]
    fields += [("video", "<u4"), ("group", "<u4"), ("splits", "<u2", (len(head.shard_splits),))]
    return np.dtype(fields, align=True)


def row_struct(row: np.dtype[np.void]) -> struct.Struct:
    """The same row for :mod:`struct`; ``splits`` come last, one value a fold."""
    kinds = {"<i8": "q", "<f8": "d", "<u4": "I", "<i4": "i", "<u2": "H"}
    fields = [row[name] for name in row.names or ()]
    return struct.Struct("<" + "".join(kinds[field.base.str] * (field.shape or (1,))[0] for field in fields))


class Layout(NamedTuple):
    """Where the parts of ``catalog.bin`` begin, bytes."""

    labels: int
    checksums: int
    end: int


def layout_of(head: CatalogHead) -> Layout:
    labels = head.rows * row_type(head).itemsize
    checksums = labels + head.label_values * LABEL.itemsize
    blocks = -(-head.rows // head.block_rows) - (-head.label_values // head.block_rows)
    return Layout(labels, checksums, checksums + blocks * CHECKSUM.itemsize)


def checksums_of(head: CatalogHead, rows: Records, labels: Labels) -> npt.NDArray[np.uint32]:
    """The CRC-32 of every block of rows, then of every block of labels."""
    blocks = [
        part[first : first + head.block_rows]
        for part in (rows, labels)
        for first in range(0, len(part), head.block_rows)
    ]
    return np.array([zlib.crc32(block.tobytes()) for block in blocks], dtype=CHECKSUM)


class Catalog:
    """The rows of a dataset by number, in the order of its shards. Reads nothing before it is asked.

    Args:
        head: what the rows hold.
        rows: (N,) of :func:`row_type`.
        labels: label numbers of samples that have several, one sample after the other.
        dataset: the manifest, for the shards' sizes and the classes.
        checksums: of the blocks; None where the rows were just made of a table that was checked.
        mapped: the file that the arrays lie in.
        file: for messages.
    """

    def __init__(
        self,
        head: CatalogHead,
        rows: Records,
        labels: Labels,
        dataset: Dataset,
        *,
        checksums: npt.NDArray[np.uint32] | None = None,
        mapped: mmap.mmap | None = None,
        file: str = "",
    ) -> None:
        self.head, self.rows, self.labels, self._file = head, rows, labels, file
        self._mapped = mapped
        self.shard_ends: Ints = np.cumsum([shard.samples for shard in dataset.shards], dtype=np.int64)
        self._shard_bytes = np.array([shard.bytes for shard in dataset.shards], dtype=np.int64)
        self._classes = max(1, len(dataset.classes))
        self._checksums = checksums
        self._block_rows = head.block_rows
        self._row_blocks = -(-head.rows // head.block_rows)
        blocks = self._row_blocks - (-head.label_values // head.block_rows)
        self._unchecked = bytearray(b"\1" * blocks if checksums is not None else bytes(blocks))
        # One value of a row is looked up far more often than a column; struct does that several times as fast as numpy.
        self._row, self._row_bytes, self._bytes = (
            row_struct(rows.dtype),
            rows.itemsize,
            rows.view(np.uint8).data,
        )
        self._places = {name: place for place, name in enumerate(rows.dtype.names or ())}

    def values(self, row: int, *names: str) -> list[int | float]:
        """Values of one row."""
        block = row // self._block_rows
        if self._unchecked[block]:
            self._check_rows(block)
        found = self._row.unpack_from(self._bytes, row * self._row_bytes)
        return [found[self._places[name]] for name in names]

    def split(self, row: int, fold: int) -> str:
        """The name of a row's split under a fold, from 0; empty where the fold leaves it out."""
        self.check_rows(row, row + 1)
        number = int(self.rows["splits"][row, fold])
        return "" if number == NO_SPLIT else self.head.splits[number]

    def label_set(self, row: int) -> tuple[int, ...]:
        """The list of labels of a row."""
        if not self.head.label_values:
            return ()
        start, count = map(int, self.values(row, "labels_start", "labels_count"))
        if not count:
            return ()
        for block in range(start // self.head.block_rows, (start + count - 1) // self.head.block_rows + 1):
            if self._unchecked[self._row_blocks + block]:
                self._check_labels(block)
        return tuple(self.labels[start : start + count].tolist())

    def column(self, name: str, *, fold: int | None = None) -> npt.NDArray[np.generic]:
        """(N,) one value of all rows, where it lies; of ``splits`` those of one fold."""
        self.check_all_rows()
        return self.rows[name] if fold is None else self.rows[name][:, fold]

    def column_of(
        self, name: str, first: int, stop: int, *, fold: int | None = None
    ) -> npt.NDArray[np.generic]:
        """The same of the rows ``first`` to ``stop``."""
        self.check_rows(first, stop)
        part = self.rows[name][first:stop]
        return part if fold is None else part[:, fold]

    def check_rows(self, first: int, stop: int) -> None:
        """Check the blocks that hold these rows. Raises ManifestError."""
        for block in range(first // self.head.block_rows, -(-stop // self.head.block_rows)):
            if self._unchecked[block]:
                self._check_rows(block)

    def check_all_rows(self) -> None:
        """Check all rows. Raises ManifestError."""
        self.check_rows(0, self.head.rows)

    def check_everything(self) -> None:
        """Check all rows and all labels. Raises ManifestError."""
        self.check_all_rows()
        for block in range(len(self._unchecked) - self._row_blocks):
            if self._unchecked[self._row_blocks + block]:
                self._check_labels(block)

    def _check_rows(self, block: int) -> None:
        first = block * self.head.block_rows
        part = self.rows[first : first + self.head.block_rows]
        self._check_sum(block, part, f"rows {first} to {first + len(part)}")
        for name, good in self._possible(part, first).items():
            if not good.all():
                row = int(np.flatnonzero(~good)[0])
                raise ManifestError(
                    f"{self._file}: row {first + row}: {name} is {part[name][row]}, which cannot be"
                )
        self._unchecked[block] = 0

    def _possible(self, part: Records, first: int) -> dict[str, npt.NDArray[np.bool_]]:
        """For each column whether its values in these rows can be true."""
        head = self.head
        shards = np.searchsorted(self.shard_ends, np.arange(first, first + len(part)), side="right")
        room = self._shard_bytes[shards]
        right = {name: part[name] > 0 for name in ("num_frames", "width", "height")}
        right["fps"] = (part["fps"] > 0) & np.isfinite(part["fps"])
        right["label"] = (part["label"] >= NO_LABEL) & (part["label"] < self._classes)
        right["video"], right["group"] = part["video"] < head.videos, part["group"] < head.groups
        splits = part["splits"]
        right["splits"] = ((splits < len(head.splits)) | (splits == NO_SPLIT)).all(axis=1)
        for kind in ("mp4", "flow") if head.flow else ("mp4",):
            offset, size = part[f"{kind}_offset"], part[f"{kind}_bytes"]
            right[f"{kind}_bytes"] = (offset >= 0) & (size >= 0) & (offset <= room) & (size <= room - offset)
        if head.label_values:
            start, count = part["labels_start"], part["labels_count"].astype(np.int64)
            most = np.minimum(head.label_values - start, head.most_labels)
            right["labels_count"] = (start >= 0) & (start <= head.label_values) & (count <= most)
        return right

    def _check_labels(self, block: int) -> None:
        first = block * self.head.block_rows
        part = self.labels[first : first + self.head.block_rows]
        self._check_sum(self._row_blocks + block, part, f"labels {first} to {first + len(part)}")
        if len(part) and not 0 <= part.min() <= part.max() < self._classes:
            raise ManifestError(f"{self._file}: labels {first} to {first + len(part)}: one is of no class")
        self._unchecked[self._row_blocks + block] = 0

    def _check_sum(self, block: int, part: npt.NDArray[np.generic], what: str) -> None:
        assert self._checksums is not None
        if self._mapped is not None:
            require_uncut(self._mapped, file=self._file)
        if zlib.crc32(part.view(np.uint8).data) != self._checksums[block]:
            raise ManifestError(f"{self._file}: {what}: crc32 differs: the bytes are damaged")


def open_catalog(path: Path, head: CatalogHead, dataset: Dataset, *, file: str) -> Catalog:
    """Map ``catalog.bin`` into memory.

    Args:
        path: where it lies on this host.
        head: ``catalog.json``.
        dataset: ``dataset.json``.
        file: how messages call it.

    Raises:
        ManifestError: it is missing, of another length, or its checksums are damaged.
    """
    layout = layout_of(head)
    data = map_file(
        path, layout.end, told_by=CATALOG_FILE, file=file,
        cut="copy it again, or finalize", gone="copy it too, or finalize again",
    )  # fmt: skip
    rows = np.frombuffer(data, dtype=row_type(head), count=head.rows)
    labels = np.frombuffer(data, dtype=LABEL, count=head.label_values, offset=layout.labels)
    checksums = np.frombuffer(data, dtype=CHECKSUM, offset=layout.checksums)
    if digest(checksums.tobytes()) != head.checksums_sha256:
        raise ManifestError(
            f"{file}: its checksums differ from those of {CATALOG_FILE}: the bytes are damaged"
        )
    return Catalog(head, rows, labels, dataset, checksums=checksums, mapped=data, file=file)


def mapped_catalog(store: Store, files: HostFiles, dataset: Dataset, url: str) -> Catalog:
    """The catalog of a generation, whose files lie on this host or are fetched to it once.

    Raises:
        ManifestError: they are missing or damaged, or the table beside them is another one.
    """
    file = f"{url}/{CATALOG_FILE}"
    try:
        head = load_head(store.read(dataset.file(CATALOG_FILE)), dataset, file=file)
    except FileNotFoundError:
        raise ManifestError(f"{file}: does not exist; copy it too, or finalize again") from None
    table = dataset.file(SAMPLES_FILE)
    local = store.local_path(table) is not None
    if local and store.size(table) != head.samples_bytes:
        raise ManifestError(f"{url}/{SAMPLES_FILE}: does not belong to {DATASET_FILE}; finalize again")
    file = f"{url}/{CATALOG_ROWS_FILE}"
    try:
        rows = files.path(
            store,
            dataset.file(CATALOG_ROWS_FILE),
            identity=dataset.catalog_sha256,
            size=layout_of(head).end,
        )
    except FileNotFoundError:
        raise ManifestError(f"{file}: does not exist; copy it too, or finalize again") from None
    return open_catalog(rows, head, dataset, file=file)
