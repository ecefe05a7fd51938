"""Weights on disk: safetensors written tensor by tensor, whole models in files of at most 5 GB with an index.

safetensors' own ``save_file`` wants every tensor at once in the host's memory. :func:`write_tensors` asks for one after
the other, so a model is written from slices or from a GPU with one tensor in memory, and the checksum comes with it.
The format: https://huggingface.co/docs/safetensors/index#format. The index is that of Hugging Face's ``transformers``.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cliplift.models.protocol import ModelError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PART_PATTERN = "model-?????-of-?????.safetensors"
MAX_FILE_BYTES = 5 * 10**9
TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TensorToWrite:
    """What the header of a file says of a tensor, and where its values come from when it is their turn."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class WrittenFile:
    """Size and checksum (zlib's crc32) of a file as it was written."""

    size_bytes: int
    crc32: int


def write_tensors(
    path: Path, tensors: Sequence[TensorToWrite], *, metadata: Mapping[str, str]
) -> WrittenFile:
    """Write one safetensors file, with one tensor at a time in the host's memory, and have it reach the disk.

    Raises:
        OSError: it cannot be written.
    """
    # As safetensors orders them: wide types first, so that every tensor begins at a multiple of its own width.
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.size_bytes],
        }
        at += tensor.size_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        # A call each, so that no name here keeps a tensor while the next is read.
        written = _append(file, struct.pack("<Q", len(text)) + text, WrittenFile(0, 0))
        for tensor in ordered:
            written = _append(file, _bytes_of(tensor), written)
        file.flush()
        os.fsync(file.fileno())
    return written


def _append(file: BinaryIO, block: bytes | memoryview, before: WrittenFile) -> WrittenFile:
    file.write(block)
    return WrittenFile(before.size_bytes + len(block), zlib.crc32(block, before.crc32))


def _bytes_of(tensor: TensorToWrite) -> bytes | memoryview:
    values = tensor.read()
    assert (values.dtype, tuple(values.shape)) == (tensor.dtype, tensor.shape), tensor.name
    flat = values.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if len(flat) else b""


def write_weights(
    folder: Path, tensors: Sequence[TensorToWrite], *, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write a model's weights: ``model.safetensors``, or several files and their index where that would be too large.

    The files take their names when all are written, the index last; what an earlier write left under other names is
    removed.

    Args:
        folder: an existing folder.
        tensors: the weights by name.
        max_file_bytes: of the values in one file; a single larger tensor gets a file of its own.

    Raises:
        OSError: one of them cannot be written; nothing of them is left, and an earlier model stays as it was.
    """
    groups = _groups(tensors, max_file_bytes)
    one = len(groups) == 1
    count = len(groups)
    names = [WEIGHTS if one else f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    partials = {name: folder / f".{name}.partial" for name in (names if one else [*names, INDEX])}
    try:
        for name, group in zip(names, groups, strict=True):
            write_tensors(partials[name], group, metadata={"format": "pt"})
        if not one:
            index = {
                "metadata": {"total_size": sum(tensor.size_bytes for tensor in tensors)},
                "weight_map": {
                    t.name: name for name, group in zip(names, groups, strict=True) for t in group
                },
            }
            partials[INDEX].write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name, partial in partials.items():
            partial.replace(folder / name)
    except OSError:  # a full disk, which half a model would keep full
        for partial in partials.values():
            partial.unlink(missing_ok=True)
        raise
    # Only now: until the new weights are whole, the old ones stay readable.
    stale = {INDEX} if one else {WEIGHTS}
    stale |= {path.name for path in folder.glob(PART_PATTERN)} - set(names)
    for name in stale:
        (folder / name).unlink(missing_ok=True)


def write_huggingface_folder(
    folder: str | Path,
    state: Mapping[str, Tensor],
    *,
    config: Mapping[str, object],
    processor: Mapping[str, object],
) -> Path:
    """Write what ``from_pretrained`` of ``transformers`` reads: weights, config and preprocessing."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    # a clone each: safetensors refuses tensors that share their memory
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    for name, content in (("config.json", config), ("preprocessor_config.json", processor)):
        (target / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return target


def _groups(tensors: Sequence[TensorToWrite], max_file_bytes: int) -> list[list[TensorToWrite]]:
    """Tensors in their order, files filled one after the other, as ``huggingface_hub`` does it."""
    groups: list[list[TensorToWrite]] = []
    current: list[TensorToWrite] = []
    filled = 0
    for tensor in tensors:
        if tensor.size_bytes > max_file_bytes:
            groups.append([tensor])
            continue
        if filled + tensor.size_bytes > max_file_bytes:
            groups.append(current)
            current, filled = [], 0
        current.append(tensor)
        filled += tensor.size_bytes
    return [*groups, current] if current or not groups else groups


def has_weights(folder: str | Path) -> bool:
    """Whether a folder holds a model's weights, in one file or in several."""
    return any((Path(folder) / name).is_file() for name in (WEIGHTS, INDEX))


def weight_files(folder: str | Path) -> list[Path]:
    """The files of a folder that hold its weights: one, or those of its index with the index itself last.

    Raises:
        ModelError: no weights there, or an index that is malformed or names a file that is missing.
    """
    whole, index = Path(folder) / WEIGHTS, Path(folder) / INDEX
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise ModelError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}")
    files = [Path(folder) / name for name in sorted(set(_weight_map(index).values()))]
    for file in files:
        if not file.is_file():
            raise ModelError(f"{index}: {file.name} is missing; copy the folder again, with all its files")
    return [*files, index]


def read_json(path: Path) -> object:
    """A JSON file from outside. Raises ModelError where it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8
        raise ModelError(f"{path}: not valid JSON ({error})") from None


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found:
        raise ModelError(f"{index}: has no weight_map")
    for key, name in found.items():
        # A name from outside: it may name a file of this folder and nothing else.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: puts {key!r:.80} into {name!r:.80}, which is no file of this folder")
    return found


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """All weights of a folder, from one file or several.

    Raises:
        ModelError: no weights there, a damaged file, or files that hold other tensors than their index says.
    """
    *files, last = weight_files(folder)
    if not files:
        return read_safetensors(last)
    expected, found = _weight_map(last), dict[str, Tensor]()
    for file in files:
        tensors = read_safetensors(file)
        wrong = tensors.keys() ^ {key for key, name in expected.items() if name == file.name}
        if wrong:
            raise ModelError(f"{file}: differs from {INDEX} in {len(wrong)} tensors, first {min(wrong)}")
        found |= tensors
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. Raises ModelError where it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error})") from error
