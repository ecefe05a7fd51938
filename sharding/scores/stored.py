"""Columns of scores beside the catalog: fixed width, one after the other, mapped by all processes of a host.

``scores.bin`` holds each column whole, beginning at a multiple of 64 bytes, then a CRC-32 of every block of each.
``scores.json`` says which columns these are and has the checksum of the checksums; its own stands in ``dataset.json``.
A block is checked when it is first touched. Nothing is read that is not asked for, whatever the number of clips.
"""

from __future__ import annotations

import dataclasses
import mmap
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cliplift.sharding.manifest import (
    DATASET_FILE,
    SCORES_FILE,
    SCORES_VALUES_FILE,
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
from cliplift.sharding.storage import Store

SCORES_FORMAT = "cliplift-scores/1"
BLOCK_ROWS, MAX_BLOCK_ROWS = 4096, 1 << 20
MOST_COLUMNS = 256
ALIGNMENT = 64
TYPES: Mapping[str, np.dtype[np.generic]] = {"number": np.dtype("<f4"), "boolean": np.dtype("u1")}
CHECKSUM = np.dtype("<u4")
# What `cliplift score` makes; said here, so that whoever only reads columns loads no decoder.
SCORE_NAMES = (
    "motion",
    "patch_motion",
    "brightness",
    "sharpness",
    "borders",
    "text",
    "shots",
    "duplicate",
    "cluster",
    "near_duplicate",
)

Values = NDArray[np.generic]  # of one of TYPES


@dataclass(frozen=True)
class ColumnFacts:
    """One column: what it is called, which version of the score it holds, and how many clips have no value."""

    name: str
    kind: Literal["number", "boolean"]
    version: int
    unscored: int = 0  # clips that were added since; the column is not whole
    failed: int = 0  # clips that do not decode; they have no score
    of: str = ""  # what it was made of besides the clips: an embedding, and numbers


@dataclass(frozen=True)
class ScoresHead:
    """``scores.json``."""

    samples_sha256: str  # of the table whose rows these are
    rows: int
    block_rows: int
    columns: tuple[ColumnFacts, ...]
    checksums_sha256: str = ""


def dump_scores_head(head: ScoresHead) -> bytes:
    """``scores.json`` as bytes."""
    return canonical({"format": SCORES_FORMAT, **dataclasses.asdict(head)}) + b"\n"


def load_scores_head(data: bytes, dataset: Dataset, *, file: str) -> ScoresHead:
    """Read ``scores.json``.

    Raises:
        ManifestError: it is damaged, or another dataset's, or says what cannot be true.
    """
    if digest(data) != dataset.scores_sha256:
        raise ManifestError(f"{file}: does not belong to {DATASET_FILE}; copy it again")
    head = typed(ScoresHead, parsed_json(data, file, SCORES_FORMAT), file, "a list of scores")
    names = [column.name for column in head.columns]
    right = {
        "samples_sha256": head.samples_sha256 == dataset.samples_sha256,
        "rows": head.rows == dataset.samples,
        "block_rows": 1 <= head.block_rows <= MAX_BLOCK_ROWS,
        "columns": 0 < len(names) <= MOST_COLUMNS
        and len(set(names)) == len(names)
        and all(name.isidentifier() and name.isascii() for name in names)
        and all(
            c.unscored >= 0 and c.failed >= 0 and c.unscored + c.failed <= head.rows for c in head.columns
        ),
    }
    require_true(right, file)
    return head


def layout_of(head: ScoresHead) -> tuple[list[int], int, int]:
    """Where each column of ``scores.bin`` begins, where the checksums do, and where it ends, bytes."""
    starts, place = [], 0
    for column in head.columns:
        starts.append(place)
        place += -(-head.rows * TYPES[column.kind].itemsize // ALIGNMENT) * ALIGNMENT
    blocks = -(-head.rows // head.block_rows) * len(head.columns)
    return starts, place, place + blocks * CHECKSUM.itemsize


def scores_bytes(head: ScoresHead) -> int:
    """Length of ``scores.bin``."""
    return layout_of(head)[2]


def write_columns(path: Path, head: ScoresHead, columns: Sequence[Values]) -> ScoresHead:
    """Write ``scores.bin`` block by block, and return the head with its checksum.

    Args:
        path: the file to write.
        head: which columns.
        columns: (N,) the values of each; arrays that are mapped from files will do.
    """
    starts, checksums_at, _ = layout_of(head)
    sums: list[int] = []
    with path.open("wb") as out:
        for start, facts, values in zip(starts, head.columns, columns, strict=True):
            assert len(values) == head.rows
            out.write(bytes(start - out.tell()))
            for first in range(0, head.rows, head.block_rows):
                part = np.asarray(values[first : first + head.block_rows], dtype=TYPES[facts.kind]).tobytes()
                sums.append(zlib.crc32(part))
                out.write(part)
        out.write(bytes(checksums_at - out.tell()))
        checksums = np.array(sums, dtype=CHECKSUM).tobytes()
        out.write(checksums)
    return dataclasses.replace(head, checksums_sha256=digest(checksums))


class ScoreColumns:
    """The columns of a dataset by name. Reads nothing before it is asked."""

    def __init__(self, head: ScoresHead, data: mmap.mmap, *, file: str) -> None:
        self.head, self._file, self._mapped = head, file, data
        starts, checksums_at, _ = layout_of(head)
        blocks = -(-head.rows // head.block_rows)
        found = np.frombuffer(data, dtype=CHECKSUM, offset=checksums_at)
        if digest(found.tobytes()) != head.checksums_sha256:
            raise ManifestError(
                f"{file}: its checksums differ from those of {SCORES_FILE}: the bytes are damaged"
            )
        self._values: dict[str, Values] = {}
        self._sums: dict[str, NDArray[np.uint32]] = {}
        for place, (start, column) in enumerate(zip(starts, head.columns, strict=True)):
            self._values[column.name] = np.frombuffer(
                data, dtype=TYPES[column.kind], count=head.rows, offset=start
            )
            self._sums[column.name] = found[place * blocks : (place + 1) * blocks]
        self._unchecked = {name: bytearray(b"\1" * blocks) for name in self._values}

    @property
    def facts(self) -> Mapping[str, ColumnFacts]:
        """The columns there are."""
        return {column.name: column for column in self.head.columns}

    def values(self, name: str, first: int, stop: int) -> Values:
        """The values of the rows ``first`` to ``stop`` where they lie; NaN where a clip has none.

        Raises:
            ManifestError: their bytes are damaged.
        """
        unchecked, size = self._unchecked[name], self.head.block_rows
        for block in range(first // size, -(-stop // size)):
            if unchecked[block]:
                self._check(name, block)
        return self._values[name][first:stop]

    def column(self, name: str) -> Values:
        """(N,) all values of a column, checked, where they lie."""
        return self.values(name, 0, self.head.rows)

    def check_everything(self) -> None:
        """Check all columns. Raises ManifestError."""
        for name in self._values:
            values = self.column(name)
            if self.facts[name].kind == "number":
                missing = int(np.isnan(values).sum())
                told = self.facts[name].unscored + self.facts[name].failed
                if missing != told:
                    raise ManifestError(
                        f"{self._file}: {name}: {missing} clips have no value, {told} are said to"
                    )

    def _check(self, name: str, block: int) -> None:
        first = block * self.head.block_rows
        part = self._values[name][first : first + self.head.block_rows]
        where = f"{self._file}: {name}, rows {first} to {first + len(part)}"
        require_uncut(self._mapped, file=self._file)
        if zlib.crc32(part.view(np.uint8).data) != self._sums[name][block]:
            raise ManifestError(f"{where}: crc32 differs: the bytes are damaged")
        wrong = np.isinf(part) if part.dtype.kind == "f" else np.greater(part, 1)
        if wrong.any():
            raise ManifestError(f"{where}: one is {part[wrong][0]}, which cannot be")
        self._unchecked[name][block] = 0


def open_scores(store: Store, dataset: Dataset, place: Callable[[str, int], Path]) -> ScoreColumns:
    """The columns of a generation that has some.

    Args:
        store: where the dataset is.
        dataset: the generation.
        place: gives the local path of a file of the store that has so many bytes; it may fetch it.

    Raises:
        ManifestError: they are missing or damaged.
    """
    name, values = dataset.file(SCORES_FILE), dataset.file(SCORES_VALUES_FILE)
    file = f"{store.url}/{name}"
    try:
        head = load_scores_head(store.read(name), dataset, file=file)
        path = place(values, scores_bytes(head))
    except FileNotFoundError as error:
        raise ManifestError(f"{file}: it, or its values, do not exist; copy them too") from error
    return open_columns(path, head, file=f"{store.url}/{values}")


def open_columns(path: Path, head: ScoresHead, *, file: str) -> ScoreColumns:
    """Map ``scores.bin`` into memory.

    Raises:
        ManifestError: it is missing, of another length, or its checksums are damaged.
    """
    data = map_file(
        path, scores_bytes(head), told_by=SCORES_FILE, file=file, cut="copy it again", gone="copy it too"
    )
    return ScoreColumns(head, data, file=file)
