"""Reading lists: rows of CSV and Parquet files that know where they stand, and what a source returns."""

from __future__ import annotations

import codecs
import csv
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from cliplift.configs.sections import ConfigError
from cliplift.configs.sources import VIDEO_SUFFIXES
from cliplift.sharding.manifest import NO_LABEL, SourceVideo
from cliplift.sharding.scratch import local_copy
from cliplift.sharding.sources.files import LeftOut
from cliplift.sharding.storage import open_store
from cliplift.sharding.tables import batches, open_table

if TYPE_CHECKING:
    import pyarrow as pa

UNASSIGNED = ""
CHUNK_BYTES = 1 << 20


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


class Entry(NamedTuple):
    """One video of a source.

    ``name`` is the name of its class, where classes are numbered once all are known; else the video has its label.
    ``place`` says where its row stands.
    """

    video: SourceVideo
    name: str | None = None
    missing: bool = False
    place: str = ""


Numbering = Callable[[Sequence[str | None]], tuple[tuple[str, ...], list[int]]]


@dataclass(frozen=True)
class Stream:
    """Everything a source says, one video after the other, so that long lists are not held in memory.

    Args:
        root: what the videos' paths lie below.
        entries: the videos, and what lies there and is not used; can be gone through once.
        number: class names in label order, and the label of each name of those given.
        folds: official splits, where there are several.
    """

    root: str
    entries: Iterable[Entry | LeftOut]
    number: Numbering
    folds: int = 0


def stream_of(listing: Listing) -> Stream:
    """A list that is in memory, and numbered already."""

    def entries() -> Iterator[Entry | LeftOut]:
        rows = {name: iter(places) for name, places in listing.places.items()}
        for video in listing.videos:
            name = (video.source, video.start_seconds, video.end_seconds)
            yield Entry(video, place=next(rows.get(name, iter(())), ""))
        yield from (Entry(video, missing=True) for video in listing.missing)
        yield from listing.left_out

    return Stream(
        listing.root, entries(), lambda names: (listing.classes, [NO_LABEL] * len(names)), listing.folds
    )


class Row(NamedTuple):
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
        text = "" if value is None else str(value).strip()
        if not text:
            raise SourceError(f"{self.place(column)}: is empty")
        return text

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
    name = url.rsplit("/", 1)[-1]
    with _local(url, key=key) as path:
        if name.endswith(".parquet"):
            header, rows = _parquet_rows(path, url)
        else:
            _require_utf8(path, name)
            header, rows = _csv_rows(path, name, delimiter)
        _check_header(header, needed, name)
        for line, row in rows:
            if len(row) != len(header):
                raise SourceError(f"{name}, line {line}: {len(row)} cells, the header has {len(header)}")
            yield Row(name, line, dict(zip(header, row, strict=True)))


def _csv_rows(
    path: Path, name: str, delimiter: str
) -> tuple[list[str], Iterator[tuple[int, Sequence[object]]]]:
    def rows() -> Iterator[tuple[int, Sequence[object]]]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
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


def _parquet_rows(path: Path, url: str) -> tuple[list[str], Iterator[tuple[int, Sequence[object]]]]:
    table = open_table(path, file=url)

    def rows() -> Iterator[Sequence[object]]:
        try:
            for batch in batches(table, file=url):
                yield from zip(*map(_cells, batch.columns), strict=True)
        except UnicodeDecodeError as error:
            raise SourceError(f"{url}: a cell is not UTF-8") from error

    return list(table.schema_arrow.names), enumerate(rows(), start=1)


def _cells(column: pa.ChunkedArray) -> list[object]:
    values: list[object] = column.to_pylist()
    return [value.decode() if isinstance(value, bytes) else value for value in values]


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


@contextmanager
def _local(url: str, *, key: str) -> Iterator[Path]:
    """A list named in the config as a local file. Raises ConfigError where there is none."""
    folder, _, name = url.rpartition("/")
    with ExitStack() as held:
        try:
            path = held.enter_context(local_copy(open_store(folder or "."), name))
            path.open("rb").close()
        except FileNotFoundError:
            raise _no_such_file(url, key) from None
        yield path


def _no_such_file(url: str, key: str) -> ConfigError:
    return ConfigError(
        "no such file", key=key, value=url, hint=f"{url!r} is looked for from the working directory"
    )


def read_url(url: str, *, key: str) -> bytes:
    """The bytes of a list named in the config.

    Raises:
        ConfigError: there is no such file.
    """
    folder, _, name = url.rpartition("/")
    try:
        return open_store(folder or ".").read(name)
    except FileNotFoundError:
        raise _no_such_file(url, key) from None


def read_text(url: str, *, key: str) -> str:
    """A text list named in the config; raises as :func:`read_url`, and for bytes that are not UTF-8."""
    data, name = read_url(url, key=key), url.rsplit("/", 1)[-1]
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(name, data[: error.start].count(b"\n") + 1, error.start) from error


def _require_utf8(path: Path, name: str) -> None:
    """Raise SourceError, with the place, unless a file is UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with path.open("rb") as file:
        while True:
            data = file.read(CHUNK_BYTES)
            held = len(decoder.getstate()[0])  # of a character that the chunk before has begun
            try:
                decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                place = file.tell() - len(data) - held + error.start
                lines = data[: max(0, error.start - held)].count(b"\n")
                raise _not_utf8(name, line + lines, place) from error
            if not data:
                return
            line += data.count(b"\n")


def _not_utf8(name: str, line: int, place: int) -> SourceError:
    return SourceError(f"{name}, line {line}: byte {place} is not UTF-8")
