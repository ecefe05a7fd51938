"""The scores of one shard in a file of their own, ``scores/NNNNNN/NAME-VERSION.bin``: written whole or not there.

A file is a function of the shard's tar and the score alone. Scoring that was stopped goes on behind the shards that
have theirs, and later generations compute what is new. The files may be removed; they are then made again.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from cliplift.sharding.manifest import ManifestError, ShardFacts, canonical, parsed_json, typed
from cliplift.sharding.scores.measures import SCORES
from cliplift.sharding.storage import Store

PART_FORMAT = "cliplift-score-part/1"
OFFSET, VALUE = np.dtype("<i8"), np.dtype("<f4")

Offsets = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PartFacts:
    """The first line of the file; the clips' places in the tar and their values follow."""

    tar_sha256: str
    score: str
    version: int
    rows: int
    crc32: int


def part_file(shard: ShardFacts, score: str) -> str:
    """Where the scores of a shard lie below the root."""
    return f"scores/{shard.shard:06d}/{score}-{SCORES[score].version}.bin"


def write_part(store: Store, shard: ShardFacts, score: str, offsets: Offsets, values: Floats) -> None:
    """Store the scores of a shard.

    Args:
        store: where the dataset is.
        shard: which shard.
        score: one of ``measures.SCORES``.
        offsets: (N,) where the clips lie in the tar, rising.
        values: (N,) their scores, NaN for a clip that does not decode.
    """
    payload = offsets.astype(OFFSET).tobytes() + values.astype(VALUE).tobytes()
    facts = PartFacts(
        shard.sha256, score, SCORES[score].version, rows=len(offsets), crc32=zlib.crc32(payload)
    )
    head = canonical({"format": PART_FORMAT, **asdict(facts)})
    store.write(part_file(shard, score), head + b"\n" + payload)


def read_part(store: Store, shard: ShardFacts, score: str, offsets: Offsets) -> Floats | None:
    """The scores of some clips of a shard, NaN for those that do not decode; None where they must be computed.

    Args:
        store: where the dataset is.
        shard: which shard.
        score: one of ``measures.SCORES``.
        offsets: (N,) where the clips lie in the tar, rising.
    """
    file = part_file(shard, score)
    try:
        head, _, payload = store.read(file).partition(b"\n")
        facts = typed(PartFacts, parsed_json(head, file, PART_FORMAT), file, "the scores of a shard")
    except (FileNotFoundError, ManifestError):
        return None
    expected = PartFacts(
        shard.sha256, score, SCORES[score].version, rows=facts.rows, crc32=zlib.crc32(payload)
    )
    if facts != expected or facts.rows < 0 or len(payload) != facts.rows * (OFFSET.itemsize + VALUE.itemsize):
        return None
    known = np.frombuffer(payload, dtype=OFFSET, count=facts.rows)
    values = np.frombuffer(payload, dtype=VALUE, offset=known.nbytes)
    places = np.minimum(known.searchsorted(offsets), max(0, facts.rows - 1))
    if len(offsets) and (not facts.rows or (known[places] != offsets).any()):
        return None
    return values[places].astype(np.float32)
