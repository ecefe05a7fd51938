"""The embeddings of a generation's clips: ``vectors.json`` says which there are and in which files they lie.

The files belong to shards (``vectors``), and a generation names them by the checksum of their heads; so adding clips,
removing videos and further scores copy none of them. Which clips of a shard's file are in a generation follows from
its catalog.
"""

from __future__ import annotations

import dataclasses
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cliplift.sharding.manifest import (
    DATASET_FILE,
    VECTORS_FILE,
    Dataset,
    ManifestError,
    ShardFacts,
    canonical,
    digest,
    parsed_json,
    require_true,
    typed,
)
from cliplift.sharding.scores.vectors import (
    MAX_WIDTH,
    EmbeddingFacts,
    Floats,
    Ints,
    VectorPart,
    part_file,
    sketch_of,
)
from cliplift.sharding.scratch import local_copy
from cliplift.sharding.storage import Store

VECTORS_FORMAT = "cliplift-vectors/1"
MODEL_NAME = re.compile(r"\w[\w-]{0,99}", re.ASCII)  # it is part of a file's name
MOST_COLUMNS = 64
ROWS_AT_ONCE = 4096
OPEN_PARTS = 32

Halves = NDArray[np.float16]


class ShardVectors(NamedTuple):
    """A shard, and the checksum of the head of its file."""

    shard: int
    head_sha256: str


@dataclass(frozen=True)
class VectorColumn:
    """One embedding of the clips.

    Attributes:
        facts: what made it.
        failed: clips that do not decode; they have none.
        shards: those that are embedded, rising.
    """

    facts: EmbeddingFacts
    failed: int
    shards: tuple[ShardVectors, ...]


@dataclass(frozen=True)
class VectorsHead:
    """``vectors.json``."""

    samples_sha256: str  # of the table whose clips these are
    columns: tuple[VectorColumn, ...]


def dump_vectors_head(head: VectorsHead) -> bytes:
    """``vectors.json`` as bytes."""
    return canonical({"format": VECTORS_FORMAT, **dataclasses.asdict(head)}) + b"\n"


def read_vectors_head(store: Store, dataset: Dataset) -> VectorsHead:
    """``vectors.json`` of a generation; without columns where it has none.

    Raises:
        ManifestError: it is missing or damaged, or says what cannot be true.
    """
    if not dataset.vectors_sha256:
        return VectorsHead(dataset.samples_sha256, ())
    name = dataset.file(VECTORS_FILE)
    file = f"{store.url}/{name}"
    try:
        data = store.read(name)
    except FileNotFoundError:
        raise ManifestError(f"{file}: does not exist; copy it too") from None
    if digest(data) != dataset.vectors_sha256:
        raise ManifestError(f"{file}: does not belong to {DATASET_FILE}; copy it again")
    head = typed(VectorsHead, parsed_json(data, file, VECTORS_FORMAT), file, "a list of embeddings")
    known = {shard.shard for shard in dataset.shards}
    names = [column.facts.name for column in head.columns]
    right = {
        "samples_sha256": head.samples_sha256 == dataset.samples_sha256,
        "columns": 0 < len(names) <= MOST_COLUMNS and len(set(names)) == len(names),
        "model": all(MODEL_NAME.fullmatch(column.facts.model) for column in head.columns),
        "width": all(0 < column.facts.width <= MAX_WIDTH for column in head.columns),
        "failed": all(0 <= column.failed <= dataset.samples for column in head.columns),
        "shards": all(_rising(column, known) for column in head.columns),
    }
    require_true(right, file)
    return head


def _rising(column: VectorColumn, known: set[int]) -> bool:
    numbers = [one.shard for one in column.shards]
    return numbers == sorted(set(numbers)) and known.issuperset(numbers)


def publish_vectors(store: Store, dataset: Dataset, columns: tuple[VectorColumn, ...]) -> Dataset:
    """Write ``vectors.json`` of a generation; the manifest that names it is returned and not written."""
    if not columns:
        return replace(dataset, vectors_sha256="")
    ordered = tuple(sorted(columns, key=lambda column: column.facts.name))
    data = dump_vectors_head(VectorsHead(dataset.samples_sha256, ordered))
    store.write(dataset.file(VECTORS_FILE), data)
    return replace(dataset, vectors_sha256=digest(data))


def carry_vectors(store: Store, base: Dataset, dataset: Dataset) -> Dataset:
    """Name the embeddings of the last generation in the next one; returns the manifest that does.

    Raises:
        ManifestError: the list of the last generation is missing or damaged.
    """
    columns = read_vectors_head(store, base).columns
    # How many of the clips that are left failed is told again when they are embedded again.
    kept = tuple(replace(c, failed=min(c.failed, dataset.samples)) for c in columns)
    return publish_vectors(store, dataset, kept)


class Embeddings:
    """The embeddings of a generation's clips by row of its catalog. Holds a few files mapped, whatever their number.

    Args:
        store: where the dataset is.
        dataset: the generation.
        column: one of its embeddings, which has all of its shards.
        offsets_of: gives the places in their tars of the rows ``first`` to ``stop``.

    Attributes:
        facts: what made them.
        rows: N, clips of the generation.
        width: D.
    """

    def __init__(
        self, store: Store, dataset: Dataset, column: VectorColumn, offsets_of: Callable[[int, int], Ints]
    ) -> None:
        self.facts, self.rows, self.width = column.facts, dataset.samples, column.facts.width
        self._store, self._offsets_of = store, offsets_of
        self._heads = dict(column.shards)
        self._shards = [shard for shard in dataset.shards if shard.samples]
        self._stops: Ints = np.cumsum([shard.samples for shard in self._shards], dtype=np.int64)
        self._open: OrderedDict[int, tuple[ExitStack, VectorPart, Ints]] = OrderedDict()

    def __enter__(self) -> Embeddings:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        while self._open:
            self._drop()

    def blocks(self) -> Iterator[tuple[int, Halves]]:
        """The first row of a block, and its embeddings (n, D) of length 1, NaN for a clip that does not decode.

        Raises:
            ManifestError: a file is missing or damaged.
        """
        for number, stop in enumerate(self._stops.tolist()):
            _, part, places = self._part(number)
            first = stop - len(places)
            for start in range(0, len(places), ROWS_AT_ONCE):
                yield first + start, part.records(places[start : start + ROWS_AT_ONCE])["values"]
            self._drop()

    def sketch(self, row: int) -> tuple[float, Floats]:
        """Seconds between the pictures of a clip's sketch, and its pictures (T, 32, 32) in 8-bit levels.

        Raises:
            ManifestError: the file is missing or damaged.
        """
        number = int(self._stops.searchsorted(row, side="right"))
        _, part, places = self._part(number)
        inside = row - int(self._stops[number]) + len(places)
        return sketch_of(part.records(places[inside : inside + 1]))

    def check_everything(self, shards: Collection[int]) -> None:
        """Check the files of these shards, clip by clip. Raises ManifestError."""
        for number, shard in enumerate(self._shards):
            if shard.shard in shards:
                self._part(number)[1].check_everything()
                self._drop()

    def _part(self, number: int) -> tuple[ExitStack, VectorPart, Ints]:
        """The file of a shard, and the numbers in it of the generation's clips."""
        found = self._open.get(number)
        if found is None:
            while len(self._open) >= OPEN_PARTS:
                self._drop(last=False)
            found = self._opened(self._shards[number], int(self._stops[number]))
            self._open[number] = found
        self._open.move_to_end(number)
        return found

    def _opened(self, shard: ShardFacts, stop: int) -> tuple[ExitStack, VectorPart, Ints]:
        name = part_file(shard.shard, self.facts)
        file = f"{self._store.url}/{name}"
        held = ExitStack()
        try:
            path = held.enter_context(local_copy(self._store, name))
        except FileNotFoundError:
            raise ManifestError(f"{file}: does not exist; copy it too") from None
        try:
            part = VectorPart(path, shard, self.facts, head_sha256=self._heads[shard.shard], file=file)
            return held, part, part.places(self._offsets_of(stop - shard.samples, stop))
        except ManifestError:
            held.close()
            raise

    def _drop(self, *, last: bool = True) -> None:
        self._open.popitem(last=last)[1][0].close()
