"""Weights written tensor by tensor, against safetensors' own reader and the Hub's own cutting into files."""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from cliplift.models.factory import create_model, from_pretrained, save_pretrained
from cliplift.models.protocol import ModelError
from cliplift.models.weight_files import (
    INDEX,
    TYPES,
    WEIGHTS,
    TensorToWrite,
    has_weights,
    read_weights,
    weight_files,
    write_tensors,
    write_weights,
)


def to_write(tensors: Mapping[str, Tensor]) -> list[TensorToWrite]:
    return [
        TensorToWrite(name=n, dtype=t.dtype, shape=tuple(t.shape), read=lambda t=t: t)  # type: ignore[misc]
        for n, t in tensors.items()
    ]


def test_any_type_and_shape_is_read_back_by_safetensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes: list[tuple[int, ...]] = [(), (0,), (3,), (2, 3), (2, 1, 5)]
    tensors = {
        f"{dtype} {len(shape)} é": (torch.randn(shape) * 100).to(dtype) for dtype in TYPES for shape in shapes
    }
    tensors["permuted"] = torch.randn(4, 3).t()
    path = tmp_path / "x.safetensors"
    written = write_tensors(path, to_write(tensors), metadata={"format": "pt", "a": '{"b": 1}'})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "a": '{"b": 1}'}
    assert (written.size_bytes, written.crc32) == (path.stat().st_size, zlib.crc32(path.read_bytes()))


def test_one_tensor_is_asked_for_after_the_other(tmp_path: Path) -> None:
    """What was written is let go before the next is read."""
    import weakref

    alive: list[weakref.ref[Tensor]] = []

    def read() -> Tensor:
        assert all(reference() is None for reference in alive)
        tensor = torch.ones(1000)
        alive.append(weakref.ref(tensor))
        return tensor

    tensors = [TensorToWrite(name=str(n), dtype=torch.float32, shape=(1000,), read=read) for n in range(5)]
    write_tensors(tmp_path / "x.safetensors", tensors, metadata={})
    assert len(alive) == 5


def test_files_and_index_are_those_of_the_hub(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    tensors = {f"layer.{n}": torch.full((25,), float(n)) for n in range(7)} | {"wide": torch.ones(70)}
    write_weights(tmp_path, to_write(tensors), max_file_bytes=210)
    expected = hub.split_torch_state_dict_into_shards(tensors, max_shard_size=210)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"] == expected.tensor_to_filename
    assert index["metadata"]["total_size"] == expected.metadata["total_size"]
    for name, keys in expected.filename_to_tensors.items():
        assert load_file(tmp_path / name).keys() == set(keys)
    assert not (tmp_path / WEIGHTS).exists()
    found = read_weights(tmp_path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_writing_again_leaves_no_files_of_before(tmp_path: Path) -> None:
    tensors = {str(n): torch.full((25,), float(n)) for n in range(4)}
    for limit, count in ((100, 4), (200, 2), (10**9, 1), (200, 2)):
        write_weights(tmp_path, to_write(tensors), max_file_bytes=limit)
        files = weight_files(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted(files)
        assert len([file for file in files if file.name != INDEX]) == count
        assert read_weights(tmp_path).keys() == tensors.keys()


class Lazy(Mapping[str, Tensor]):
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.read = tensors, list[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_a_model_on_the_meta_device_is_saved_from_tensors_read_one_by_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("t3d_tiny", num_classes=3).eval()
    with torch.device("meta"):
        empty = create_model("t3d_tiny", num_classes=3)
    weights = Lazy(model.state_dict())
    folder = save_pretrained(empty, tmp_path, name="t3d_tiny", weights=weights, max_file_bytes=1_000_000)
    assert has_weights(folder)
    assert len(weight_files(folder)) > 2
    assert sorted(weights.read) == sorted(model.state_dict()), "each once"
    again = from_pretrained(folder).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    short = {n: t for n, t in model.state_dict().items() if n != "features.conv0.weight"}
    with pytest.raises(ModelError, match="1 differences, first features"):
        save_pretrained(empty, tmp_path, name="t3d_tiny", weights=short)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "no file of this folder"),
        ('{"weight_map": {"a": 3}}', "no file of this folder"),
        ('{"weight_map": {"a": "code.py"}}', "no file of this folder"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors is missing"),
        (
            '{"weight_map": {"a": "here.safetensors"}}',
            "differs from model.safetensors.index.json in 2 tensors",
        ),
    ],
)
def test_a_malformed_index_is_one_sentence(tmp_path: Path, index: str, said: str) -> None:
    write_tensors(tmp_path / "here.safetensors", to_write({"b": torch.ones(1)}), metadata={})
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(ModelError, match=said):
        read_weights(tmp_path)


@pytest.mark.parametrize("max_file_bytes", [10**9, 4000])
def test_a_full_disk_leaves_the_earlier_model(max_file_bytes: int, tmp_path: Path) -> None:
    """The disk is full while the second of the new tensors is read, that is, behind the first file of several."""
    earlier = {"a": torch.zeros(1000), "b": torch.zeros(1000)}
    write_weights(tmp_path, to_write(earlier), max_file_bytes=max_file_bytes)
    files = sorted(path.name for path in tmp_path.iterdir())

    def full() -> Tensor:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    first, second = to_write({"a": torch.ones(1000), "b": torch.ones(1000)})
    with pytest.raises(OSError, match="No space left"):
        write_weights(tmp_path, [first, replace(second, read=full)], max_file_bytes=max_file_bytes)
    assert sorted(path.name for path in tmp_path.iterdir()) == files, "nothing half written is left"
    found = read_weights(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in earlier.items())
