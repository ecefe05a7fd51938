"""Videos in the order in which they are dealt to shards, on disk where they are too many for memory.

The order is that of a hash of seed, path and start, so that every shard is a fair draw of its split and nothing
depends on the order of the listing. Videos are kept in parts by the first byte of the hash; a part is sorted at a
time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cliplift.sharding.manifest import NO_LABEL, SourceVideo
from cliplift.sharding.sources.lists import SourceError
from cliplift.sharding.tables import Parts, schema_of

if TYPE_CHECKING:
    import pyarrow as pa

BUFFERED_VIDEOS = 1 << 17


class DealtVideos:
    """Takes the videos of a source in any order; gives them back split by split, in the order of their hash.

    Args:
        folder: an empty scratch folder.
        seed: of the hash.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        import pyarrow as pa

        self._seed = seed
        self._parts, self._splits = Parts(folder), Parts(folder)
        self._values = attrgetter(*(field.name for field in schema_of(SourceVideo)))
        added = [
            ("name", pa.string()),
            ("place", pa.string()),
            ("known", pa.bool_()),
            ("hash", pa.binary(32)),
        ]
        self._schema = pa.schema([*schema_of(SourceVideo), *(pa.field(*field) for field in added)])
        self._buffer: list[tuple[object, ...]] = []
        self._on_disk = False
        self._number: dict[str, int] = {}

    def add(
        self, video: SourceVideo, name: str | None = None, *, place: str = "", known: bool = False
    ) -> None:
        """Take a video; ``known`` marks one that is not wanted again and keeps others like it out."""
        drawn = hashlib.sha256(f"{self._seed}:{video.source}:{video.start_seconds}".encode()).digest()
        self._buffer.append((*self._values(video), name, place, known, drawn))
        if len(self._buffer) >= BUFFERED_VIDEOS:
            self._put_aside()

    def deal(self) -> dict[str, int]:
        """Sort all videos; the splits in the order of their names, and how many videos each has.

        Raises:
            SourceError: a clip is listed twice; the message says where.
        """
        counts: dict[str, int] = {}
        for table in self._sorted():
            _refuse_twice(table)
            wanted = _without_known(table)
            splits = np.asarray(wanted.column("split").to_pylist(), dtype=object)
            for split in sorted(set(splits.tolist())):
                rows = np.flatnonzero(splits == split)
                counts[split] = counts.get(split, 0) + len(rows)
                number = self._number.setdefault(split, len(self._number))
                self._splits.add(f"split-{number}", wanted.take(rows))
        return dict(sorted(counts.items()))

    def of_split(self, split: str, numbers: Mapping[str, int]) -> Iterator[pa.Table]:
        """The videos of a split in order, some thousand at a time, labelled by the number of their class's name."""
        schema = schema_of(SourceVideo)
        for table in self._splits.read(f"split-{self._number[split]}"):
            place = schema.get_field_index("label")
            yield table.select(schema.names).set_column(place, "label", _labels(table, numbers))

    def _table(self) -> pa.Table:
        import pyarrow as pa

        columns = list(zip(*self._buffer, strict=True)) or [()] * len(self._schema)
        self._buffer = []
        arrays = [
            pa.array(values, type=field.type) for values, field in zip(columns, self._schema, strict=True)
        ]
        return pa.Table.from_arrays(arrays, schema=self._schema)

    def _put_aside(self) -> None:
        """Append the buffered videos to their parts."""
        if not self._buffer:
            return
        table = self._table()
        first_bytes = (_hashes(table)[:, 0] >> np.uint64(56)).astype(np.int64)
        order = np.argsort(first_bytes, kind="stable")
        table, first_bytes = table.take(order), first_bytes[order]
        starts = np.flatnonzero(np.diff(first_bytes, prepend=-1))
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), table.num_rows], strict=True):
            self._parts.add(f"part-{int(first_bytes[start])}", table.slice(start, stop - start))
        self._on_disk = True

    def _sorted(self) -> Iterator[pa.Table]:
        """All videos in the order of their hash; those of one hash in the order in which they came."""
        import pyarrow as pa

        if not self._on_disk:
            yield _by_hash(self._table())
            return
        self._put_aside()
        for first_byte in range(256):
            tables = list(self._parts.read(f"part-{first_byte}"))
            self._parts.remove(f"part-{first_byte}")
            if tables:
                yield _by_hash(pa.concat_tables(tables))


def _hashes(table: pa.Table) -> npt.NDArray[np.uint64]:
    """(N, 4) the hashes of a table's videos, most significant first."""
    data = b"".join(table.column("hash").to_pylist())
    return np.frombuffer(data, dtype=">u8").reshape(-1, 4).astype(np.uint64)


def _labels(table: pa.Table, numbers: Mapping[str, int]) -> pa.Array:
    """The number of each video's class; one without a class's name keeps the label it has."""
    import pyarrow as pa

    names = table.column("name").combine_chunks().dictionary_encode()
    known = np.array([numbers.get(name, NO_LABEL) for name in names.dictionary.to_pylist()] + [NO_LABEL])
    place = names.indices.fill_null(-1).to_numpy()
    return pa.array(np.where(place < 0, table.column("label").to_numpy(), known[place]), type=pa.int64())


def _by_hash(table: pa.Table) -> pa.Table:
    return table.take(np.lexsort(_hashes(table).T[::-1]))


def _refuse_twice(table: pa.Table) -> None:
    """Raise SourceError where two neighbours are the same clip: one hash is one path and start."""
    hashes = _hashes(table)
    same = np.flatnonzero((hashes[1:] == hashes[:-1]).all(axis=1))
    if not len(same):
        return
    seen: dict[tuple[object, ...], str] = {}
    for row in sorted({*same.tolist(), *(same + 1).tolist()}):
        found = table.slice(row, 1).to_pylist()[0]
        name = (found["source"], found["start_seconds"], found["end_seconds"], found["known"])
        if name in seen and not found["known"]:
            places = " and ".join(place for place in (seen[name], found["place"]) if place)
            raise SourceError(
                f"{found['source']} is listed twice{f', {places}' if places else ''}; remove one of its rows"
            )
        seen[name] = found["place"]


def _without_known(table: pa.Table) -> pa.Table:
    """The videos that are not known and not like one that is."""
    known = table.column("known").to_numpy()
    if not known.any():
        return table
    names = ("source", "start_seconds", "end_seconds")
    rows = list(zip(*(table.column(name).to_pylist() for name in names), strict=True))
    of_known = {row for row, is_known in zip(rows, known.tolist(), strict=True) if is_known}
    wanted = [number for number, row in enumerate(rows) if row not in of_known]
    return table.take(np.array(wanted, dtype=np.int64))
