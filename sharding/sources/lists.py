"""Reading lists: rows of CSV and Parquet files that know where they stand, and what a source returns."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cliplift.configs.sections import ConfigError
from cliplift.sharding.manifest import NO_LABEL, SourceVideo, read_table
from cliplift.sharding.storage import open_store

UNASSIGNED = ""


class SourceError(ValueError):
    """A row of a list is wrong; the message names file, line and column."""


@dataclass(frozen=True)
class Listing:
    """Everything a source says, before splits are assigned.

    ``videos`` carry the split the source gave, or :data:`UNASSIGNED`; ``missing`` are listed but absent.
    """

    videos: tuple[SourceVideo, ...]
    classes: tuple[str, ...]
    root: str
    missing: tuple[SourceVideo, ...] = ()
    folds: int = 0


def number_labels(
    names: Sequence[str | None], given: Sequence[str], *, key: str
) -> tuple[tuple[str, ...], list[int]]:
    """Class names in label order and the label of each video; ``None`` is unlabelled."""
    found = sorted({n for n in names if n is not None})
    classes = tuple(given) or tuple(found)
    if unknown := [n for n in found if n not in set(classes)]:
        raise ConfigError(f"does not name the class {unknown[0]!r}", key=key, value=list(given))
    number = {name: i for i, name in enumerate(classes)}
    return classes, [NO_LABEL if n is None else number[n] for n in names]


@dataclass(frozen=True)
class Row:
    """One row of a list and where it stands: an error names file, line and column."""

    file: str
    line: int
    cells: dict[str, Any]

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
            value = float(self.cells[column])
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
        table = read_table(data, file=url)
        header = list(table.column_names)
        rows: Iterable[tuple[int, list[Any]]] = enumerate(
            (list(r.values()) for r in table.to_pylist()), start=1
        )
    else:
        reader = csv.reader(io.StringIO(_text(data, name), newline=""), delimiter=delimiter)
        header = [cell.strip() for cell in next(reader, [])]
        rows = ((reader.line_num, row) for row in reader if any(cell.strip() for cell in row))
    if missing := [c for c in needed if c not in header]:
        raise SourceError(
            f"{name}, line 1: column {missing[0]!r} is missing; the columns are {', '.join(header)}"
        )
    for line, row in rows:
        if len(row) != len(header):
            raise SourceError(f"{name}, line {line}: {len(row)} cells, the header has {len(header)}")
        yield Row(name, line, dict(zip(header, row, strict=True)))


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
