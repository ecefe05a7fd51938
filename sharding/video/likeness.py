"""Which clips may repeat what a clip of another owner is, among any number of clips: dealt to parts on disk.

What is found holds every clip that does, and few others, so that only those need to be held and compared.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cliplift.sharding.video.picture_hash import ALIKE_BITS, BAND_BITS, BANDS, bands

BUFFERED = 1 << 17  # rows in memory before they are dealt to parts
KEY_PARTS, PARTS_A_BAND = 256, 64
PAIRS = 1 << 20  # compared at once
KEYED = np.dtype([("key", "<u8"), ("owner", "<u8"), ("number", "<i8")])
LOOKING = np.dtype([("look", "<u8"), ("owner", "<u8"), ("number", "<i8"), ("frames", "<i8")])

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Records = npt.NDArray[np.void]


class SharedKeys:
    """Takes keys of clips; says which clips have a key that a clip of another owner has too.

    Args:
        folder: a folder to make, in scratch space.
    """

    def __init__(self, folder: Path) -> None:
        self._parts = _Parts(folder)
        self._waiting: list[tuple[int, int, int]] = []

    def add(self, number: int, key: Hashable, owner: str) -> None:
        """A key of clip ``number``; a clip may have several."""
        # Keys that share a hash are compared later; owners that share one, of 64 bits, are taken for the same.
        self._waiting.append((_hash(key), _hash(owner), number))
        if len(self._waiting) >= BUFFERED:
            self._put_aside()

    def shared(self) -> Ints:
        """The numbers of those clips, rising."""
        self._put_aside()
        found = [np.zeros(0, dtype=np.int64)]
        for _, part in self._parts.taken(KEYED):
            rows = part[np.argsort(part["key"], kind="stable")]
            starts, lengths = _runs(rows["key"])
            lowest, highest = (f.reduceat(rows["owner"], starts) for f in (np.minimum, np.maximum))
            found.append(rows["number"][np.repeat(lowest != highest, lengths)])
        return np.unique(np.concatenate(found))

    def _put_aside(self) -> None:
        rows = np.array(self._waiting, dtype=KEYED)
        self._waiting = []
        self._parts.add(rows, (rows["key"] % KEY_PARTS).astype(np.int64))


class SharedLooks:
    """The same for clips that look alike, by the hashes of their key frames (``picture_hash``).

    Args:
        folder: a folder to make, in scratch space.
    """

    def __init__(self, folder: Path) -> None:
        self._parts = _Parts(folder)
        self._waiting: list[tuple[int, int, int, int]] = []

    def add(self, number: int, hashes: Sequence[int], owner: str) -> None:
        """The look of clip ``number``; one without contrast, which is like many, is left out."""
        if any(bands(hashes)):
            self._waiting.append((hashes[0], _hash(owner), number, len(hashes)))
        if len(self._waiting) >= BUFFERED:
            self._put_aside()

    def shared(self) -> Ints:
        """The numbers of clips whose first key frame is like that of a clip of as many, of another owner; rising."""
        self._put_aside()
        found = [np.zeros(0, dtype=np.int64)]
        for number, part in self._parts.taken(LOOKING):
            values = band_of(part["look"], number // PARTS_A_BAND)
            order = np.lexsort((part["look"], part["frames"], values))
            rows, values = part[order], values[order]
            starts, lengths = _runs(values * np.uint64(1 << 48) + rows["frames"].astype(np.uint64))
            several = lengths > 1
            marked = np.zeros(len(rows), dtype=bool)
            for start, length in zip(starts[several].tolist(), lengths[several].tolist(), strict=True):
                bucket = slice(start, start + length)
                marked[bucket] = _alike(rows[bucket])
            found.append(rows["number"][marked])
        return np.unique(np.concatenate(found))

    def _put_aside(self) -> None:
        rows = np.array(self._waiting, dtype=LOOKING)
        self._waiting = []
        for band in range(BANDS):
            place = band_of(rows["look"], band) * np.uint64(PARTS_A_BAND) >> np.uint64(BAND_BITS)
            self._parts.add(rows, place.astype(np.int64) + band * PARTS_A_BAND)


class HashLists:
    """Lists of picture hashes, numbered as they come, in a file.

    Args:
        path: the file to make, in scratch space.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        self._ends = array("q", [0])

    def __enter__(self) -> HashLists:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, hashes: Sequence[int]) -> None:
        """Append the hashes of one more clip."""
        self._file.write(array("Q", hashes).tobytes())
        self._ends.append(self._ends[-1] + len(hashes))

    def of(self, number: int) -> list[int]:
        """The hashes of clip ``number``."""
        self._file.seek(8 * self._ends[number])
        found = array("Q")
        found.frombytes(self._file.read(8 * (self._ends[number + 1] - self._ends[number])))
        return found.tolist()


def _alike(bucket: Records) -> npt.NDArray[np.bool_]:
    """(N,) whether another owner's row of the bucket, which is sorted by look, is like this one."""
    starts, lengths = _runs(bucket["look"])
    looks = bucket["look"][starts]
    lowest, highest = (f.reduceat(bucket["owner"], starts) for f in (np.minimum, np.maximum))
    marked = lowest != highest
    step = max(1, PAIRS // len(looks))
    for first in range(0, len(looks), step):
        mine = slice(first, first + step)
        near = set_bits(looks[mine, None] ^ looks) <= ALIKE_BITS
        others = (lowest[mine, None] != lowest) | (highest[mine, None] != highest)
        marked[mine] |= (near & others).any(axis=1)
    return np.repeat(marked, lengths)


def set_bits(words: Words) -> Words:
    """How many bits of each word are set: sums of neighbours of 1, 2 and 4 bits, then of all bytes."""
    one, two, four, byte = (
        np.uint64(mask) for mask in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F, 0x0101010101010101)
    )  # fmt: skip
    words = words - (words >> np.uint64(1) & one)
    words = (words & two) + (words >> np.uint64(2) & two)
    words = words + (words >> np.uint64(4)) & four
    return words * byte >> np.uint64(56)


def band_of(looks: Words, band: int) -> Words:
    """One of the BANDS parts of each hash."""
    return looks >> np.uint64(band * BAND_BITS) & np.uint64((1 << BAND_BITS) - 1)


def _hash(value: Hashable) -> int:
    return hash(value) & (1 << 64) - 1


def _runs(values: npt.NDArray[np.generic]) -> tuple[Ints, Ints]:
    """Where runs of equal values begin, and how long they are."""
    new = np.ones(len(values), dtype=bool)
    new[1:] = values[1:] != values[:-1]
    starts = np.flatnonzero(new)
    return starts, np.diff(starts, append=len(values))


class _Parts:
    """Records dealt to files of a folder by number."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder

    def add(self, rows: Records, parts: Ints) -> None:
        order = np.argsort(parts, kind="stable")
        rows, parts = rows[order], parts[order]
        starts, lengths = _runs(parts)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            with (self._folder / f"{int(parts[start])}").open("ab") as file:
                file.write(rows[start : start + length].tobytes())

    def taken(self, dtype: np.dtype[np.void]) -> Iterator[tuple[int, Records]]:
        """The number and the rows of every part, whose file is removed."""
        for path in sorted(self._folder.iterdir()):
            rows = np.fromfile(path, dtype=dtype)
            path.unlink()
            yield int(path.name), rows
