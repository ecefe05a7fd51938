"""Embeddings of all clips of a dataset, shard by shard, named by its next generation.

Who computes them is given: this folder knows no networks. A shard is one unit of work; its file is a function of its
tar and of the embedding alone, so any number of parts and interruptions gives the same bytes.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cliplift.sharding.manifest import Dataset, ShardFacts, digest
from cliplift.sharding.read.catalog import Catalog
from cliplift.sharding.read.embeddings import stored_catalog
from cliplift.sharding.scores.embeddings import (
    Embeddings,
    ShardVectors,
    VectorColumn,
    read_vectors_head,
)
from cliplift.sharding.scores.vectors import (
    HEAD_BYTES,
    EmbeddingFacts,
    Ints,
    Records,
    part_file,
    put_sketch,
    record_type,
    stored_head,
    write_vectors,
)
from cliplift.sharding.scoring.generation import next_generation
from cliplift.sharding.scoring.run import MOST_REASONS, ScoreError, ScoreProgress, scorable
from cliplift.sharding.scratch import scratch_folder
from cliplift.sharding.storage import StorageError, Store, open_store

Floats = NDArray[np.float32]


class ClipPlace(NamedTuple):
    """Where a stored clip lies, and what it is like."""

    url: str  # of the dataset
    file: str  # tar
    offset: int
    bytes: int
    crc32: int
    num_frames: int
    fps: float
    height: int
    width: int


@dataclass(frozen=True)
class EmbeddedClip:
    """What is stored of a clip.

    Attributes:
        values: (D,) of any length above 0; None where the clip does not decode.
        spacing: seconds between the pictures of its sketch.
        sketch: (T, 32, 32) in 8-bit levels, at most 24 pictures.
        reason: why it does not decode.
    """

    values: Floats | None
    spacing: float = 0.0
    sketch: Floats = field(default_factory=lambda: np.zeros((0, 32, 32), dtype=np.float32))
    reason: str = ""


class Embedder(Protocol):
    """Makes the embeddings: a frozen network."""

    facts: EmbeddingFacts

    def embed(self, clips: Iterable[ClipPlace]) -> Iterator[EmbeddedClip]:
        """What each of these clips gives, in their order, whatever stands beside it."""
        ...


@dataclass(frozen=True)
class EmbedReport:
    """What a call of :func:`embed_dataset` did.

    Attributes:
        dataset: the latest generation; the one there was where nothing was left to do, or a part alone was embedded.
        column: the embedding; None where a part alone was embedded.
        embedded: clips that were decoded.
        reasons: of clips that do not decode, the first few.
        new: whether there is a new generation.
    """

    dataset: Dataset
    column: VectorColumn | None
    embedded: int
    reasons: tuple[str, ...] = ()
    new: bool = False


class _Unit(NamedTuple):
    """A shard, and the rows of its clips in the catalog."""

    shard: ShardFacts
    first: int
    stop: int


def read_clip(place: ClipPlace) -> bytes:
    """The bytes of a stored clip.

    Raises:
        ScoreError: they cannot be read, or are not those that were written.
    """
    where = f"{place.url}/{place.file}, byte {place.offset}"
    hint = "the shards that are done are kept; repair the cause and call it again, or `cliplift remove` the video"
    try:
        data = open_store(place.url).read_range(place.file, place.offset, place.bytes)
    except (OSError, StorageError) as error:
        raise ScoreError(f"{where}: cannot be read: {error}; {hint}") from None
    if len(data) != place.bytes:
        raise ScoreError(f"{where}: {place.bytes} bytes expected, {len(data)} found; {hint}")
    if zlib.crc32(data) != place.crc32:
        raise ScoreError(f"{where}: crc32 differs: the bytes are damaged; {hint}")
    return data


def embed_dataset(
    url: str,
    embedder: Embedder,
    *,
    part: tuple[int, int] | None = None,
    on_progress: Callable[[ScoreProgress], None] | None = None,
) -> EmbedReport:
    """Embed all clips of a dataset; what earlier calls computed is not computed again.

    Args:
        url: folder or URL of a finalized dataset, without a generation.
        embedder: computes the embeddings.
        part: (I, N) embeds the shards whose number is I modulo N, from 0, and makes no generation.
        on_progress: called after every clip.

    Raises:
        ConfigError: there is no such dataset.
        ManifestError: the dataset's files are damaged.
        ScoreError: a clip cannot be read.
    """
    store, base = scorable(url)
    number, parts = part or (0, 1)
    with stored_catalog(store, base) as catalog, scratch_folder() as folder:
        units = [unit for unit in _units(base, catalog) if unit.shard.shard % parts == number]
        heads = {
            u.shard.shard: stored_head(store, u.shard, embedder.facts, _offsets(catalog, u)) for u in units
        }
        lacking = [unit for unit in units if heads[unit.shard.shard] is None]
        work = _Work(store, embedder, catalog, lacking, folder=folder, on_progress=on_progress)
        for unit in lacking:
            heads[unit.shard.shard] = work.embed(unit)
        if part is not None:
            return EmbedReport(base, None, work.clips, tuple(work.reasons))
        shards = tuple(ShardVectors(shard, head) for shard, head in sorted(heads.items()) if head is not None)
        column = VectorColumn(embedder.facts, 0, shards)
        column = replace(column, failed=_failed(store, base, catalog, column))
        before = read_vectors_head(store, base).columns
        if column in before:
            return EmbedReport(base, column, work.clips, tuple(work.reasons))
        others = tuple(one for one in before if one.facts.name != column.facts.name)
        dataset, _ = next_generation(store, base, catalog, (), vectors=(*others, column))
    return EmbedReport(dataset, column, work.clips, tuple(work.reasons), new=True)


def _units(base: Dataset, catalog: Catalog) -> Iterator[_Unit]:
    for shard, stop in zip(base.shards, catalog.shard_ends.tolist(), strict=True):
        if shard.samples:
            yield _Unit(shard, stop - shard.samples, stop)


def _offsets(catalog: Catalog, unit: _Unit) -> Ints:
    return catalog.column_of("mp4_offset", unit.first, unit.stop).astype(np.int64)


def _failed(store: Store, base: Dataset, catalog: Catalog, column: VectorColumn) -> int:
    """Clips of the generation that have no embedding; reads all of them, which checks them too."""

    def offsets(first: int, stop: int) -> Ints:
        return catalog.column_of("mp4_offset", first, stop).astype(np.int64)

    with Embeddings(store, base, column, offsets) as found:
        return sum(int(np.isnan(block[:, 0]).sum()) for _, block in found.blocks())


class _Work:
    """The clips of several shards, embedded in one stream, so that decoding goes on from shard to shard."""

    def __init__(
        self,
        store: Store,
        embedder: Embedder,
        catalog: Catalog,
        units: Sequence[_Unit],
        *,
        folder: Path,
        on_progress: Callable[[ScoreProgress], None] | None,
    ) -> None:
        self._store, self._catalog, self._folder = store, catalog, folder
        self.facts, self._on_progress = embedder.facts, on_progress
        self._progress = ScoreProgress(
            clips_total=sum(u.stop - u.first for u in units), shards_total=len(units)
        )
        self._started = time.monotonic()
        self.reasons: list[str] = []
        self._embedded = embedder.embed(place for unit in units for place in self._places(unit))

    @property
    def clips(self) -> int:
        return self._progress.clips_done

    def embed(self, unit: _Unit) -> str:
        """Store the embeddings of the next shard; returns the sha256 of its file's head."""
        path = self._folder / "part"
        write_vectors(path, unit.shard, self.facts, _offsets(self._catalog, unit), self._records(unit))
        with path.open("rb") as file:
            head = digest(file.read(HEAD_BYTES))
        self._store.publish(path, part_file(unit.shard.shard, self.facts))
        self._progress.shards_done += 1
        return head

    def _places(self, unit: _Unit) -> Iterator[ClipPlace]:
        names = ("mp4_offset", "mp4_bytes", "mp4_crc32", "num_frames")
        for row in range(unit.first, unit.stop):
            offset, size, crc32, frames = map(int, self._catalog.values(row, *names))
            fps, height, width = self._catalog.values(row, "fps", "height", "width")
            yield ClipPlace(
                self._store.url,
                unit.shard.file,
                offset,
                size,
                crc32,
                frames,
                float(fps),
                int(height),
                int(width),
            )

    def _records(self, unit: _Unit) -> Iterator[Records]:
        for row in range(unit.first, unit.stop):
            found = next(self._embedded)
            if found.values is None and len(self.reasons) < MOST_REASONS:
                offset = int(self._catalog.values(row, "mp4_offset")[0])
                self.reasons.append(f"{unit.shard.file}, byte {offset}: {found.reason}")
            yield _record(found, self.facts.width)
            self._progress.clips_done += 1
            self._progress.seconds = time.monotonic() - self._started
            if self._on_progress is not None:
                self._on_progress(self._progress)


def _record(found: EmbeddedClip, width: int) -> Records:
    record = np.zeros(1, dtype=record_type(width))
    if found.values is None:
        record["values"] = np.nan
        return record
    values = found.values.astype(np.float64)
    assert values.shape == (width,)
    record["values"][0] = values / np.sqrt((values * values).sum())
    put_sketch(record, found.spacing, found.sketch)
    return record
