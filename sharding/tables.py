"""Tables of more rows than fit into memory: written by row group, read batch by batch, and dealt to parts on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from cliplift.sharding.manifest import (
    FLOW_COLUMNS,
    ManifestError,
    SourceVideo,
    arrow_type,
    check_unpacking,
    whole_parquet,
)

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from _typeshed import DataclassInstance

ROWS_OF_A_GROUP = 1 << 20  # as pyarrow writes a table that it is given at once
ROWS_OF_A_BATCH = 1 << 16


def schema_of(row_type: type[DataclassInstance], *extra: str) -> pa.Schema:
    """The columns of a dataclass's rows, and further ones of int64."""
    import pyarrow as pa

    fields = [(field.name, arrow_type(str(field.type))) for field in dataclasses.fields(row_type)]
    return pa.schema([*fields, *((name, pa.int64()) for name in extra)])


def table_of(
    rows: Sequence[object], schema: pa.Schema, *, extra: Mapping[str, Sequence[int]] | None = None
) -> pa.Table:
    """Rows of a dataclass as an Arrow table of :func:`schema_of`."""
    import pyarrow as pa

    given = extra or {}
    names = [name for name in schema.names if name not in given]
    values = zip(*map(attrgetter(*names), rows), strict=True) if rows else [()] * len(names)
    columns: dict[str, Sequence[object]] = {**dict(zip(names, values, strict=True)), **given}
    arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def videos_of(table: pa.Table) -> list[SourceVideo]:
    """The rows of a table that has the columns of videos."""
    columns = []
    for field in dataclasses.fields(SourceVideo):
        values = table.column(field.name).to_pylist()
        columns.append(list(map(tuple, values)) if "tuple" in str(field.type) else values)
    return [SourceVideo(*values) for values in zip(*columns, strict=True)]


def conformed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table of samples with all columns of a schema; those of optical flow are zero where it has none."""
    import pyarrow as pa

    columns = []
    for field in schema:
        if field.name in table.column_names:
            columns.append(table.column(field.name).cast(field.type))
        else:
            columns.append(pa.repeat(pa.scalar(0, type=field.type), table.num_rows))
    return pa.Table.from_arrays(columns, schema=schema)


def without_videos(table: pa.Table, ids: frozenset[str]) -> pa.Table:
    """The rows that are of none of these videos."""
    import pyarrow as pa
    import pyarrow.compute as pc

    gone = pc.is_in(table.column("video_id"), value_set=pa.array(sorted(ids), type=pa.string()))
    return table.filter(pc.invert(gone))


class TableFile:
    """A Parquet file of rows that come batch by batch; its bytes depend on the rows alone, not on the batches.

    Columns of optical flow are left out where the rows of the first group have none.

    Args:
        path: the file.
        schema: of the rows.
        group_rows: rows of a row group.

    Raises:
        ManifestError: flow comes after a whole group without.
    """

    def __init__(self, path: Path, schema: pa.Schema, *, group_rows: int = ROWS_OF_A_GROUP) -> None:
        self._path, self._group_rows = path, group_rows
        self._waiting: list[pa.Table] = [schema.empty_table()]
        self._schema, self._rows = schema, 0
        self._writer: pq.ParquetWriter | None = None

    def add(self, table: pa.Table) -> None:
        """Append rows."""
        self._waiting.append(table)
        self._rows += table.num_rows
        while self._rows >= self._group_rows:
            self._write_group(self._group_rows)

    def close(self) -> None:
        """Write the rows that wait, and the end of the file."""
        if self._rows or self._writer is None:
            self._write_group(self._rows)
        assert self._writer is not None
        self._writer.close()

    def _write_group(self, rows: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        whole = pa.concat_tables(self._waiting)
        self._waiting, self._rows = [whole.slice(rows)], whole.num_rows - rows
        # Pages are cut where chunks end, so that a group of several chunks would be other bytes.
        group = whole.slice(0, rows).combine_chunks()
        if self._writer is None:
            flow = sorted(FLOW_COLUMNS & set(group.column_names))
            if not any(_any(group, name) for name in flow):
                self._schema = group.drop_columns(flow).schema
            self._writer = pq.ParquetWriter(self._path, self._schema, compression="zstd", store_schema=False)
        for name in set(group.column_names) - set(self._schema.names):
            if _any(group, name):
                raise ManifestError(f"{name} comes after {rows} clips without optical flow; build them again")
        self._writer.write_table(group.select(self._schema.names), row_group_size=max(1, rows))


def _any(table: pa.Table, name: str) -> bool:
    return bool(table.column(name).to_numpy().any())


def open_table(path: Path, *, file: str) -> pq.ParquetFile:
    """A Parquet file to be read in parts.

    Raises:
        ManifestError: it is damaged, or says that it unpacks to far more than it holds.
    """
    import pyarrow.parquet as pq

    with whole_parquet(file):
        opened = pq.ParquetFile(path)
    check_unpacking(opened.metadata, path.stat().st_size, file=file)
    return opened


def batches(
    opened: pq.ParquetFile, *, file: str, columns: Sequence[str] | None = None, rows: int = ROWS_OF_A_BATCH
) -> Iterator[pa.Table]:
    """The rows of a Parquet file in order, a few at a time. Raises ManifestError where it is damaged."""
    import pyarrow as pa

    wanted = None if columns is None else list(columns)
    with whole_parquet(file):
        for batch in opened.iter_batches(rows, columns=wanted, use_threads=False):
            yield pa.Table.from_batches([batch])


class Parts:
    """Rows dealt to files of a scratch folder by a number; each part is read back in the order in which it came."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, part: str, table: pa.Table) -> None:
        """Append rows to a part."""
        import pyarrow as pa

        # A stream of its own each time: no file stays open, however many parts there are.
        with (
            (self._folder / f"{part}.arrows").open("ab") as file,
            pa.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(table)

    def read(self, part: str) -> Iterator[pa.Table]:
        """The tables of a part."""
        import pyarrow as pa

        path = self._folder / f"{part}.arrows"
        if not path.exists():
            return
        size = path.stat().st_size
        with path.open("rb") as file:
            while file.tell() < size:
                yield pa.ipc.open_stream(file).read_all()

    def remove(self, part: str) -> None:
        """Give back the space of a part."""
        (self._folder / f"{part}.arrows").unlink(missing_ok=True)
