"""Reading lists: rows of CSV and Parquet files that know where they stand, and what a source returns."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from cliplift.configs.sections import ConfigError
from cliplift.configs.sources import VIDEO_SUFFIXES
from cliplift.sharding.manifest import SourceVideo, read_table
from cliplift.sharding.sources.files import LeftOut
from cliplift.sharding.storage import open_store

UNASSIGNED = ""


class SourceError(ValueError):
    """A row of a list is wrong; the message names file, line and column."""


@dataclass(frozen=True)
class Listing:
    """Everything a source says, before splits are assigned.

    ``videos`` carry the split the source gave, or :data:`UNASSIGNED`; ``missing`` are listed but absent; ``left_out``
    lie there and are not used; ``places`` says where the rows of a clip (source, start, end) stand.
    """

    videos: tuple[SourceVideo, ...]
    classes: tuple[str, ...]
    root: str
    missing: tuple[SourceVideo, ...] = ()
    folds: int = 0
    left_out: tuple[LeftOut, ...] = ()
    places: Mapping[tuple[str, float | None, float | None], Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One row of a list and where it stands: an error names file, line and column."""

    file: str
    line: int
    cells: dict[str, object]

    def place(self, column: str) -> str:
        """Where a cell stands, for messages."""
        return f"{self.file}, line {self.line}, column {column!r}"

    def text(self, column: str) -> str:
        """A cell that must not be empty."""
        value = self.cells.get(column)
        if value is None or not str(value).strip():
            raise SourceError(f"{self.place(column)}: is empty")
        return str(value).strip()

    def seconds(self, column: str | None) -> float | None:
        """A cell with a time in seconds; None where it is empty."""
        if column is None or self.cells.get(column) in (None, ""):
            return None
        try:
            value = float(self.cells[column])  # type: ignore[arg-type]  # what is no number raises
        except (TypeError, ValueError):
            value = -1.0
        if not 0 <= value < float("inf"):
            raise SourceError(f"{self.place(column)}: {self.cells[column]!r} is not a time in seconds")
        return value


def read_rows(
    url: str, *, delimiter: str = ",", needed: Sequence[str] = (), key: str = "source.file"
) -> Iterator[Row]:
    """Rows of a CSV or Parquet list.

    Raises:
        ConfigError: the file does not exist.
        SourceError: a column is missing, or a row has too many or too few cells.
    """
    data = read_url(url, key=key)
    name = url.rsplit("/", 1)[-1]
    if name.endswith(".parquet"):
        header, rows = _parquet_rows(data, url)
    else:
        header, rows = _csv_rows(_text(data, name), name, delimiter)
    _check_header(header, needed, name)
    for line, row in rows:
        if len(row) != len(header):
            raise SourceError(f"{name}, line {line}: {len(row)} cells, the header has {len(header)}")
        yield Row(name, line, dict(zip(header, row, strict=True)))


def _csv_rows(
    text: str, name: str, delimiter: str
) -> tuple[list[str], Iterator[tuple[int, Sequence[object]]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)

    def rows() -> Iterator[tuple[int, Sequence[object]]]:
        try:
            for row in reader:
                if any(cell.strip() for cell in row):
                    yield reader.line_num, row
        except csv.Error as error:
            raise SourceError(
                f"{name}, line {reader.line_num}: {error}; a quotation mark that is never closed?"
            ) from error

    lines = rows()
    header = [str(cell).strip() for cell in next(lines, (0, []))[1]]
    return header, lines


def _parquet_rows(data: bytes, url: str) -> tuple[list[str], Iterator[tuple[int, Sequence[object]]]]:
    table = read_table(data, file=url)
    try:
        columns = [[_cell(value) for value in column.to_pylist()] for column in table.columns]
    except UnicodeDecodeError as error:
        raise SourceError(f"{url}: a cell is not UTF-8") from error
    return list(table.column_names), enumerate((list(row) for row in zip(*columns, strict=True)), start=1)


def _cell(value: object) -> object:
    return value.decode() if isinstance(value, bytes) else value


def _check_header(header: Sequence[str], needed: Sequence[str], name: str) -> None:
    if missing := [c for c in needed if c not in header]:
        # What looks like a path is no name of a column: the first line is a row already.
        row = any("/" in cell or PurePosixPath(cell).suffix.lower() in VIDEO_SUFFIXES for cell in header)
        hint = f"; the list has no header: put a line with {','.join(needed)} above it" if row else ""
        raise SourceError(
            f"{name}, line 1: column {missing[0]!r} is missing; the columns are {', '.join(header)}{hint}"
        )
    if twice := [c for c in needed if Counter(header)[c] > 1]:
        raise SourceError(f"{name}, line 1: {Counter(header)[twice[0]]} columns are called {twice[0]!r}")


def read_url(url: str, *, key: str) -> bytes:
    """The bytes of a list named in the config.

    Raises:
        ConfigError: there is no such file.
    """
    folder, _, name = url.rpartition("/")
    try:
        return open_store(folder or ".").read(name)
    except FileNotFoundError:
        raise ConfigError(
            "no such file", key=key, value=url, hint=f"{url!r} is looked for from the working directory"
        ) from None


def read_text(url: str, *, key: str) -> str:
    """A text list named in the config; raises as :func:`read_url`, and for bytes that are not UTF-8."""
    return _text(read_url(url, key=key), url.rsplit("/", 1)[-1])


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SourceError(f"{name}, line {line}: byte {error.start} is not UTF-8") from error
