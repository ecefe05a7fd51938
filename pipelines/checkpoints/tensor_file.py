"""One safetensors file of which runs of elements are read: mapped from a disk, or by ranges from a store.

In a store the header is read once, and after it only the bytes of the elements asked for. The header comes from
outside: what it says is believed only where it fits the file's size.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import torch
from safetensors import safe_open
from torch import Tensor

from cliplift.models.weight_files import TYPES
from cliplift.sharding.storage import StorageError, Store, without_secrets

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
HEADER_GUESS_BYTES = 1 << 16  # most headers come with the first request
RANGE_BYTES = 32 << 20  # of one request: a failed one is repeated alone
DTYPES = {name: dtype for dtype, name in TYPES.items()}


class TensorFile(Protocol):
    """A safetensors file."""

    def keys(self) -> Sequence[str]: ...

    def metadata(self) -> Mapping[str, str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def elements(self, key: str, first: int, stop: int) -> Tensor:
        """(stop - first,): elements of the flattened tensor, on the CPU."""
        ...


@dataclass(frozen=True)
class StoredFile:
    """A file in a store."""

    store: Store
    name: str

    def __str__(self) -> str:
        return f"{without_secrets(self.store.url)}/{self.name}"


def open_tensors(file: Path | StoredFile) -> TensorFile:
    """Open a file.

    Raises:
        ValueError, SafetensorError: it is none of safetensors.
        OSError, StorageError: it cannot be read.
    """
    return MappedFile(file) if isinstance(file, Path) else RangedFile(file)


class MappedFile:
    """A file on a disk; values lie in the mapped file until they are copied."""

    def __init__(self, path: Path) -> None:
        self._handle: Any = safe_open(path, framework="pt")

    def keys(self) -> Sequence[str]:
        return list(self._handle.keys())

    def metadata(self) -> Mapping[str, str]:
        return dict(self._handle.metadata() or {})

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._handle.get_slice(key).get_shape())

    def elements(self, key: str, first: int, stop: int) -> Tensor:
        shape = self.shape(key)
        part = self._handle.get_slice(key)
        if len(shape) == 1:
            values: Tensor = part[first:stop]
            return values
        if not shape:
            whole: Tensor = self._handle.get_tensor(key)
            return whole.reshape(1)[first:stop]
        # A whole tensor of formats 1 and 2: rows are read, and what is too much of the first and last is cut off.
        row = math.prod(shape[1:])
        rows: Tensor = part[first // row : -(-stop // row)]
        return rows.reshape(-1)[first % row : first % row + stop - first]


class RangedFile:
    """A file in a store, of which nothing is read but the header and what is asked for."""

    def __init__(self, file: StoredFile) -> None:
        self._file = file
        size = file.store.size(file.name)
        if size is None:
            raise StorageError(f"{file}: is not there")
        start = file.store.read_range(file.name, 0, min(size, HEADER_GUESS_BYTES))
        length = struct.unpack("<Q", start[:LENGTH_BYTES])[0] if len(start) >= LENGTH_BYTES else -1
        if not 0 <= length <= min(size - LENGTH_BYTES, MAX_HEADER_BYTES):
            raise ValueError("its header does not fit its size")
        self._data = LENGTH_BYTES + length
        if len(start) < self._data:
            start += file.store.read_range(file.name, len(start), self._data - len(start))
        header = json.loads(start[LENGTH_BYTES : self._data])
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata is no object of strings")
        self._metadata: dict[str, str] = metadata
        self._tensors = {key: _place(key, facts, size - self._data) for key, facts in header.items()}

    def keys(self) -> Sequence[str]:
        return list(self._tensors)

    def metadata(self) -> Mapping[str, str]:
        return self._metadata

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensors[key].shape

    def elements(self, key: str, first: int, stop: int) -> Tensor:
        place = self._tensors[key]
        values = torch.empty(stop - first, dtype=place.dtype)
        into = memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]
        at = self._data + place.begin + first * place.dtype.itemsize
        for done in range(0, len(into), RANGE_BYTES):
            length = min(RANGE_BYTES, len(into) - done)
            block = self._file.store.read_range(self._file.name, at + done, length)
            if len(block) != length:
                raise StorageError(f"{self._file}: {length} bytes were asked for, {len(block)} came")
            into[done : done + length] = block
        return values


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes begin behind the header, and what they are."""

    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def _place(key: str, facts: object, data_bytes: int) -> _Place:
    if not isinstance(facts, dict) or facts.get("dtype") not in DTYPES:
        raise ValueError(f"{key!r:.80} has no known type")
    dtype, shape, offsets = DTYPES[facts["dtype"]], facts.get("shape"), facts.get("data_offsets")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{key!r:.80} has no shape or place")
    begin, end = offsets
    if end > data_bytes or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the bytes {begin} to {end} of {key!r:.80} do not fit its shape or the file")
    return _Place(begin, dtype, tuple(shape))


def _are_counts(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
