"""Tensors in slices over many files: every rank writes its own, and reads what it needs of everybody's.

A file is safetensors. Each of its tensors is one flat run of elements of a larger tensor; the file's metadata says of
which: ``{"slices": '{"KEY": {"name": ..., "start": ..., "length": ..., "shape": [...]}}'}``. A file without that
metadata holds whole tensors, as those of formats 1 and 2 do.

Not ``torch.distributed.checkpoint``: its default writer pickles the plan (``.metadata``), and its safetensors writer
needs a planner and read items of our own before it loads slices of another cut. What is needed here is less than that
glue: ``get_slice`` of safetensors reads any run of elements out of a mapped file, and touches no other bytes; from a
store they are read as ranges (``tensor_file.py``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from cliplift.models.weight_files import TensorToWrite, WrittenFile, write_tensors
from cliplift.pipelines.checkpoints.tensor_file import StoredFile, TensorFile, open_tensors
from cliplift.sharding.storage import StorageError

SLICES = "slices"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; names the file and what is wrong with it."""


@dataclass(frozen=True)
class Slice:
    """Some elements of a tensor.

    Attributes:
        values: (n,), the elements from ``start`` on, in the order of the flattened tensor. A view costs nothing.
        start: where they begin in the flattened tensor.
        shape: of the whole tensor.
    """

    values: Tensor
    start: int
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> Slice:
        """A tensor that is not cut."""
        return cls(tensor.detach().reshape(-1), 0, tuple(tensor.shape))


def write_slices(path: Path, slices: Mapping[str, Slice]) -> WrittenFile:
    """Write slices by the name of the tensor they belong to, one at a time. Raises OSError."""
    facts = {
        name: {
            "name": name,
            "start": part.start,
            "length": part.values.numel(),
            "shape": list(part.shape),
        }
        for name, part in slices.items()
    }
    tensors = [
        TensorToWrite(
            name=name, dtype=part.values.dtype, shape=tuple(part.values.shape), read=partial(_values, part)
        )
        for name, part in slices.items()
    ]
    return write_tensors(path, tensors, metadata={SLICES: json.dumps(facts, ensure_ascii=False)})


def _values(part: Slice) -> Tensor:
    return part.values


@dataclass(frozen=True)
class _Piece:
    """Where a run of elements lies: in ``file`` under ``key``."""

    file: TensorFile
    key: str
    start: int
    length: int


class SliceReader:
    """Reads any run of elements of any tensor out of files of slices; no file is read whole.

    ``bytes_read`` counts the bytes of the values asked for.

    Raises:
        CheckpointError: a file's header is malformed, or two files disagree about a tensor's shape.
        OSError, StorageError: a file is missing or cannot be read.
    """

    def __init__(self, files: Sequence[Path | StoredFile]) -> None:
        self.bytes_read = 0
        self._pieces: dict[str, list[_Piece]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            self._list(file)
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece.start)

    def _list(self, file: Path | StoredFile) -> None:
        try:
            opened = open_tensors(file)
            metadata = opened.metadata()
            facts = json.loads(metadata[SLICES]) if SLICES in metadata else None
            for key in opened.keys():  # noqa: SIM118 (no mapping)
                stored = opened.shape(key)
                name, start, shape = (key, 0, stored) if facts is None else _checked(facts[key], stored)
                if self._shapes.setdefault(name, shape) != shape:
                    raise ValueError(f"{name} has the shape {shape}, elsewhere {self._shapes[name]}")
                piece = _Piece(opened, key, start, math.prod(stored))
                self._pieces.setdefault(name, []).append(piece)
        except StorageError:
            raise
        except (SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(f"{file}: not a file of slices ({error})") from error

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self._shapes[name]

    def read(self, name: str, start: int, length: int) -> Tensor:
        """(length,): elements ``start`` to ``start + length`` of the flattened tensor, on the CPU.

        The values may lie in the mapped file: copy them before the reader goes, and never write into them.

        Raises:
            CheckpointError: no file holds some of them.
        """
        found: list[Tensor] = []
        at, end = start, start + length
        for piece in self._pieces.get(name, ()):
            if piece.start <= at < piece.start + piece.length and at < end:
                stop = min(end, piece.start + piece.length)
                found.append(piece.file.elements(piece.key, at - piece.start, stop - piece.start))
                at = stop
        if at < end or name not in self._shapes:
            raise CheckpointError(f"no file holds elements {at} to {end} of {name}")
        values = found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)
        self.bytes_read += values.numel() * values.element_size()
        return values

    def whole(self, name: str) -> Tensor:
        """The whole tensor."""
        shape = self._shapes[name]
        return self.read(name, 0, math.prod(shape)).reshape(shape)


def _checked(fact: Any, stored: tuple[int, ...]) -> tuple[str, int, tuple[int, ...]]:
    """Name, start and whole shape from a file's metadata, believed only where they fit the stored tensor."""
    name, start, length, shape = (fact[key] for key in ("name", "start", "length", "shape"))
    counts = [start, length, *shape]
    if not isinstance(name, str) or any(type(count) is not int or count < 0 for count in counts):
        raise ValueError(f"malformed facts of the slice {name!s:.80}")
    if stored != (length,) or start + length > math.prod(shape):
        raise ValueError(f"{name}: {length} elements from {start} on do not fit {stored} of {tuple(shape)}")
    return name, start, tuple(shape)
