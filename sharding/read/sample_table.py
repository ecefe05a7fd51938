"""Strings and lists of samples (key, source, video id, key frames), read from ``samples.parquet`` when needed."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cliplift.sharding.manifest import (
    DATASET_FILE,
    SAMPLES_FILE,
    Dataset,
    ManifestError,
    check_columns,
    check_unpacking,
)
from cliplift.sharding.read.fetch import HostFiles
from cliplift.sharding.storage import Store

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BATCH_ROWS = 8192


class SampleTable:
    """The rows of ``samples.parquet`` by number, in memory that does not grow with them.

    Threads may read side by side. Rows that follow each other are read in one pass over their row group.

    Args:
        store: where the dataset is.
        host_files: where a remote one's table is kept; it is fetched when the first row is asked for.
        dataset: the manifest, which has the table's checksum.
        size: length of the table, bytes.
        file: for messages.
    """

    def __init__(
        self, store: Store, host_files: HostFiles, dataset: Dataset, *, size: int, file: str
    ) -> None:
        self._store, self._host_files = store, host_files
        self._dataset, self._size, self._file = dataset, size, file
        self._lock = threading.Lock()
        self._opened: pq.ParquetFile | None = None
        self._owner = 0
        self._cursors: dict[tuple[str, ...], _Cursor] = {}

    def row(self, number: int, *names: str) -> dict[str, Any]:
        """Some columns of a row, or all.

        Raises:
            ManifestError: the table is damaged or not the manifest's.
        """
        with self._lock:
            table = self._table()
            if names not in self._cursors:
                self._cursors[names] = _Cursor(table, names)
            return self._cursors[names].row(number)

    def columns(self, *names: str) -> pa.Table:
        """Some columns, whole. Raises ManifestError."""
        with self._lock:
            return self._table().read(columns=list(names), use_threads=False)

    def batches(self, *names: str) -> Iterator[pa.RecordBatch]:
        """Some columns, a few thousand rows at a time. Raises ManifestError."""
        with self._lock:
            table = self._table()
        yield from table.iter_batches(BATCH_ROWS, columns=list(names), use_threads=False)

    def close(self) -> None:
        """Close the file; reading opens it again."""
        with self._lock:
            self._opened, self._cursors = None, {}

    def _table(self) -> pq.ParquetFile:
        if self._opened is None or self._owner != os.getpid():  # a fork has no threads and shares no files
            self._opened, self._owner, self._cursors = self._open(), os.getpid(), {}
        return self._opened

    def _open(self) -> pq.ParquetFile:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            path = self._host_files.path(
                self._store,
                self._dataset.file(SAMPLES_FILE),
                identity=self._dataset.samples_sha256,
                size=self._size,
            )
            # The table is read for messages and reports alone, so that whoever needs none of it never pays for this.
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != self._dataset.samples_sha256:
                    raise ManifestError(f"{self._file}: does not belong to {DATASET_FILE}; finalize again")
            opened = pq.ParquetFile(path)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ManifestError(f"{self._file}: cannot be read: {error}") from error
        check_unpacking(opened.metadata, path.stat().st_size, file=self._file)
        check_columns(opened.schema_arrow, file=self._file)
        if opened.metadata.num_rows != self._dataset.samples:
            raise ManifestError(
                f"{self._file}: has {opened.metadata.num_rows} rows, {DATASET_FILE} counts {self._dataset.samples}"
            )
        return opened


class _Cursor:
    """A place in a table, from which reading goes on."""

    def __init__(self, table: pq.ParquetFile, names: tuple[str, ...]) -> None:
        self._table, self._names = table, list(names) or None
        self._stops: list[int] = []
        for group in range(table.num_row_groups):
            self._stops.append((self._stops[-1] if group else 0) + table.metadata.row_group(group).num_rows)
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._first = self._stop = self._end = 0  # rows of the batch at hand, and where its row group ends
        self._batch: pa.RecordBatch | None = None

    def row(self, number: int) -> dict[str, Any]:
        if not self._stop <= number < self._end and not self._first <= number < self._stop:
            group = next(g for g, stop in enumerate(self._stops) if number < stop)
            self._stop, self._end = (self._stops[group - 1] if group else 0), self._stops[group]
            self._batches = self._table.iter_batches(
                BATCH_ROWS, row_groups=[group], columns=self._names, use_threads=False
            )
        while number >= self._stop:
            self._batch = next(self._batches)
            self._first, self._stop = self._stop, self._stop + self._batch.num_rows
        assert self._batch is not None
        found: dict[str, Any] = self._batch.slice(number - self._first, 1).to_pylist()[0]
        return found
