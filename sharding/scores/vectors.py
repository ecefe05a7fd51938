"""The embeddings of one shard's clips in a file of their own, ``vectors/NNNNNN/NAME.bin``, mapped where it is read.

A file is a function of the shard's tar and of what made the embeddings alone, and it never changes: all generations of
a dataset share it, and none copies it. It holds a head of 1,024 bytes (JSON in a line, then spaces), the clips' places
in the tar (N int64, rising), a record a clip, and a CRC-32 of the places and of every block of records. A record has
the embedding (D float16, of length 1; NaN for a clip that does not decode) and the clip's sketch: up to 24 gray
pictures of 32 x 32 pixels at even distances in time, by which two clips are compared whose embeddings are similar.
"""

from __future__ import annotations

import dataclasses
import mmap
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cliplift.sharding.manifest import (
    ManifestError,
    ShardFacts,
    canonical,
    digest,
    map_file,
    parsed_json,
    require_true,
    typed,
)
from cliplift.sharding.storage import Store

VECTORS_PART_FORMAT = "cliplift-vectors-part/2"
HEAD_BYTES = 1024
BLOCK_ROWS = 256
MAX_ROWS, MAX_WIDTH = 1 << 40, 1 << 16
SKETCH_FRAMES, SKETCH_SIDE = 24, 32
MEAN_STEPS, MOST_STEPS = 256, 127
LENGTH_TOLERANCE = 0.02  # of an embedding's length, which is 1 before it is rounded to float16
OFFSET, CHECKSUM = np.dtype("<i8"), np.dtype("<u4")

Ints = NDArray[np.int64]
Records = NDArray[np.void]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class EmbeddingFacts:
    """What made an embedding. Two embeddings can be compared where all of it is equal.

    Attributes:
        model: its registered name.
        weights_sha256: of all its tensors, by name.
        input: which frames of a clip it sees and how they are cut, in words.
        width: D.
        version: of how embeddings and sketches are made.
    """

    model: str
    weights_sha256: str
    input: str
    width: int
    version: int

    @property
    def name(self) -> str:
        """What the column and its files are called: the model, and a part of the digest of all facts."""
        return f"{self.model}-{self.digest[:12]}"

    @property
    def digest(self) -> str:
        return digest(canonical(dataclasses.asdict(self)))


@dataclass(frozen=True)
class PartHead:
    """The head of the file."""

    tar_sha256: str
    facts_sha256: str
    rows: int
    width: int
    checksums_sha256: str


def record_type(width: int) -> np.dtype[np.void]:
    """One clip: its vector, and its sketch.

    Of the sketch: seconds between pictures, how many there are (0: the clip does not decode), their mean in steps of
    1/256 of an 8-bit level, and how each differs from it in steps of its own. What moves is often less than a level.
    """
    side = (SKETCH_SIDE, SKETCH_SIDE)
    return np.dtype(
        [
            ("spacing", "<f4"),
            ("step", "<f4"),
            ("frames", "<u2"),
            ("values", "<f2", (width,)),
            ("mean", "<u2", side),
            ("moving", "i1", (SKETCH_FRAMES, *side)),
        ]
    )


def put_sketch(record: Records, spacing: float, pictures: Floats) -> None:
    """Write a sketch of (T, 32, 32), in 8-bit levels, into a record of shape (1,)."""
    mean = np.rint(pictures.mean(axis=0, dtype=np.float64) * MEAN_STEPS)
    moving = pictures.astype(np.float64) - mean / MEAN_STEPS
    step = np.float32(np.abs(moving).max() / MOST_STEPS)
    record["spacing"], record["frames"], record["step"] = spacing, len(pictures), step
    record["mean"][0] = mean
    if step:
        record["moving"][0, : len(pictures)] = np.rint(moving / step).clip(-MOST_STEPS, MOST_STEPS)


def sketch_of(record: Records) -> tuple[float, Floats]:
    """Spacing and pictures (T, 32, 32), in 8-bit levels, of a record of shape (1,)."""
    moving = record["moving"][0, : int(record["frames"][0])].astype(np.float32)
    return float(record["spacing"][0]), moving * record["step"][0] + record["mean"][0] / np.float32(
        MEAN_STEPS
    )


def part_file(shard: int, facts: EmbeddingFacts) -> str:
    """Where the embeddings of a shard lie below the root."""
    return f"vectors/{shard:06d}/{facts.name}.bin"


def part_bytes(rows: int, width: int) -> int:
    """Length of the file."""
    return _checksums_at(rows, width) + (1 + -(-rows // BLOCK_ROWS)) * CHECKSUM.itemsize


def _checksums_at(rows: int, width: int) -> int:
    return HEAD_BYTES + rows * (OFFSET.itemsize + record_type(width).itemsize)


def write_vectors(
    path: Path, shard: ShardFacts, facts: EmbeddingFacts, offsets: Ints, records: Iterable[Records]
) -> None:
    """Write the file, holding a block of records at a time.

    Args:
        path: the file to write.
        shard: whose clips these are.
        facts: what made the embeddings.
        offsets: (N,) where the clips lie in the tar, rising.
        records: N of :func:`record_type` in this order, in arrays of any length.
    """
    places = offsets.astype(OFFSET).tobytes()
    sums, written = [zlib.crc32(places)], 0
    with path.open("wb") as out:
        out.write(bytes(HEAD_BYTES) + places)
        for block in _blocks(records, record_type(facts.width)):
            data = block.tobytes()
            sums.append(zlib.crc32(data))
            out.write(data)
            written += len(block)
        assert written == len(offsets)
        checksums = np.array(sums, dtype=CHECKSUM).tobytes()
        out.write(checksums)
        head = PartHead(shard.sha256, facts.digest, written, facts.width, digest(checksums))
        line = canonical({"format": VECTORS_PART_FORMAT, **dataclasses.asdict(head)})
        out.seek(0)
        out.write(line.ljust(HEAD_BYTES - 1) + b"\n")


def _blocks(records: Iterable[Records], kind: np.dtype[np.void]) -> Iterator[Records]:
    """The same records in arrays of ``BLOCK_ROWS``, and a last one that may be shorter."""
    waiting: list[Records] = []
    count = 0
    for some in records:
        waiting.append(some.astype(kind, copy=False))
        count += len(some)
        while count >= BLOCK_ROWS:
            whole = np.concatenate(waiting)
            yield whole[:BLOCK_ROWS]
            waiting, count = [whole[BLOCK_ROWS:]], count - BLOCK_ROWS
    if count:
        yield np.concatenate(waiting)


def read_head(data: bytes, shard: ShardFacts, facts: EmbeddingFacts, *, file: str) -> PartHead:
    """The head of a shard's file.

    Raises:
        ManifestError: it is damaged, another shard's, or says what cannot be true.
    """
    head = typed(PartHead, parsed_json(data, file, VECTORS_PART_FORMAT), file, "a shard's embeddings")
    right = {
        "tar_sha256": head.tar_sha256 == shard.sha256,
        "facts_sha256": head.facts_sha256 == facts.digest,
        "rows": 0 <= head.rows < MAX_ROWS,
        "width": head.width == facts.width and 0 < head.width <= MAX_WIDTH,
    }
    require_true(right, file)
    return head


def stored_head(store: Store, shard: ShardFacts, facts: EmbeddingFacts, offsets: Ints) -> str | None:
    """sha256 of the head of a shard's file that holds these clips; None where it must be made.

    Only head, places and checksums are read.
    """
    file = part_file(shard.shard, facts)
    try:
        data = store.read_range(file, 0, HEAD_BYTES)
        head = read_head(data, shard, facts, file=file)
        places = store.read_range(file, HEAD_BYTES, head.rows * OFFSET.itemsize)
        at = _checksums_at(head.rows, head.width)
        checksums = store.read_range(file, at, part_bytes(head.rows, head.width) - at)
    except (FileNotFoundError, ManifestError):
        return None
    if store.size(file) != at + len(checksums) or digest(checksums) != head.checksums_sha256:
        return None
    if zlib.crc32(places) != int(np.frombuffer(checksums, dtype=CHECKSUM, count=1)[0]):
        return None
    known = np.frombuffer(places, dtype=OFFSET)
    return digest(data) if np.isin(offsets, known, assume_unique=True).all() else None


class VectorPart:
    """The records of one shard, mapped. A block is checked when it is first touched.

    Args:
        path: where the file lies on this host.
        shard: whose clips these are.
        facts: what made the embeddings.
        head_sha256: of its head, as the generation states it.
        file: how messages call it.

    Raises:
        ManifestError: it is missing, another one, of another length, or its checksums or places are damaged.
    """

    def __init__(
        self, path: Path, shard: ShardFacts, facts: EmbeddingFacts, *, head_sha256: str, file: str
    ) -> None:
        again = f"remove it and run `cliplift score` with {facts.model} again"
        try:
            with path.open("rb") as opened:
                data = opened.read(HEAD_BYTES)
        except FileNotFoundError:
            raise ManifestError(f"{file}: does not exist; copy it too, or {again}") from None
        if digest(data) != head_sha256:
            raise ManifestError(
                f"{file}: is not the file that this generation names; copy it again, or {again}"
            )
        head = read_head(data, shard, facts, file=file)
        length = part_bytes(head.rows, head.width)
        self._mapped: mmap.mmap = map_file(path, length, told_by="its head", file=file, cut=again, gone=again)
        sums = np.frombuffer(self._mapped, dtype=CHECKSUM, offset=_checksums_at(head.rows, head.width))
        if digest(sums.tobytes()) != head.checksums_sha256:
            raise ManifestError(f"{file}: its checksums differ from those of its head: the bytes are damaged")
        self.rows, self._file, self._sums = head.rows, file, sums
        self.offsets: Ints = np.frombuffer(self._mapped, dtype=OFFSET, count=head.rows, offset=HEAD_BYTES)
        if zlib.crc32(self.offsets.view(np.uint8).data) != sums[0] or (np.diff(self.offsets) <= 0).any():
            raise ManifestError(f"{file}: the places of its clips are damaged")
        self._records: Records = np.frombuffer(
            self._mapped,
            dtype=record_type(head.width),
            count=head.rows,
            offset=HEAD_BYTES + head.rows * OFFSET.itemsize,
        )
        self._unchecked = bytearray(b"\1" * (len(sums) - 1))

    def places(self, offsets: Ints) -> Ints:
        """(n,) the numbers here of the clips at these places of the tar. Raises ManifestError where one has none."""
        found = np.minimum(self.offsets.searchsorted(offsets), max(0, self.rows - 1)).astype(np.int64)
        if len(offsets) and (not self.rows or (self.offsets[found] != offsets).any()):
            raise ManifestError(f"{self._file}: holds no embedding of a clip of its shard; score it again")
        return found

    def records(self, places: Ints) -> Records:
        """(n,) a copy of these records. Raises ManifestError where their bytes are damaged."""
        for block in np.unique(places // BLOCK_ROWS).tolist():
            if self._unchecked[block]:
                self._check(block)
        return self._records[places]

    def check_everything(self) -> None:
        """Check all records. Raises ManifestError."""
        for block in range(len(self._unchecked)):
            if self._unchecked[block]:
                self._check(block)

    def _check(self, block: int) -> None:
        first = block * BLOCK_ROWS
        part = self._records[first : first + BLOCK_ROWS]
        where = f"{self._file}: clips {first} to {first + len(part)}"
        if zlib.crc32(part.view(np.uint8).data) != self._sums[block + 1]:
            raise ManifestError(f"{where}: crc32 differs: the bytes are damaged")
        values = part["values"].astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = np.sqrt((values * values).sum(axis=1))
        decoded = part["frames"] > 0
        right = np.where(decoded, np.abs(lengths - 1) <= LENGTH_TOLERANCE, np.isnan(values).all(axis=1))
        right &= part["frames"] <= SKETCH_FRAMES
        for name in ("spacing", "step"):
            right &= np.isfinite(part[name]) & (part[name] >= 0)
        if not right.all():
            raise ManifestError(
                f"{where}: clip {first + int(np.argmin(right))} has an embedding that cannot be"
            )
        self._unchecked[block] = 0
