"""Tensors cut into slices over files, and any run of their elements read back."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cliplift.pipelines.checkpoints.slices import CheckpointError, Slice, SliceReader, write_slices

SHAPES: dict[str, tuple[int, ...]] = {"scalar": (), "bias": (7,), "weight": (5, 3, 2), "empty": (0, 4)}


def cut_over_files(folder: Path, cuts: int, generator: random.Random) -> dict[str, torch.Tensor]:
    """Whole tensors; their slices lie in ``cuts`` files at random places."""
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    parts: list[dict[str, Slice]] = [{} for _ in range(cuts)]
    for name, tensor in tensors.items():
        flat = tensor.flatten()
        edges = [0, *sorted(generator.randint(0, len(flat)) for _ in range(cuts - 1)), len(flat)]
        order = generator.sample(range(cuts), cuts)
        for file, start, stop in zip(order, edges[:-1], edges[1:], strict=True):
            parts[file][name] = Slice(flat[start:stop], start, tuple(tensor.shape))
    for n, slices in enumerate(parts):
        write_slices(folder / f"{n}.safetensors", slices)
    return tensors


@pytest.mark.parametrize("cuts", [1, 2, 5])
def test_any_run_of_elements_is_read_from_any_cut(tmp_path: Path, cuts: int) -> None:
    generator = random.Random(cuts)
    torch.manual_seed(cuts)
    tensors = cut_over_files(tmp_path, cuts, generator)
    reader = SliceReader(sorted(tmp_path.iterdir()))
    assert set(reader) == SHAPES.keys()
    wanted = 0
    for name, tensor in tensors.items():
        assert name in reader
        assert reader.shape(name) == SHAPES[name]
        assert torch.equal(reader.whole(name), tensor)
        wanted += tensor.numel()
        for _ in range(20):
            start, stop = sorted(generator.randint(0, tensor.numel()) for _ in range(2))
            assert torch.equal(reader.read(name, start, stop - start), tensor.flatten()[start:stop])
            wanted += stop - start
    assert reader.bytes_read == 4 * wanted


def test_whole_tensors_without_facts_are_read_as_slices_too(tmp_path: Path) -> None:
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    reader = SliceReader([tmp_path / "x.safetensors"])
    for name, tensor in tensors.items():
        assert torch.equal(reader.whole(name), tensor)
        for start in range(tensor.numel()):
            for length in range(tensor.numel() - start + 1):
                assert torch.equal(reader.read(name, start, length), tensor.flatten()[start : start + length])


def test_the_header_says_what_a_slice_is_of(tmp_path: Path) -> None:
    write_slices(tmp_path / "x.safetensors", {"w": Slice(torch.arange(4.0), 2, (3, 3))})
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        facts = json.loads(file.metadata()["slices"])
        assert torch.equal(file.get_tensor("w"), torch.arange(4.0))
    assert facts == {"w": {"name": "w", "start": 2, "length": 4, "shape": [3, 3]}}


def test_elements_that_no_file_holds_are_an_error(tmp_path: Path) -> None:
    write_slices(tmp_path / "x.safetensors", {"w": Slice(torch.arange(4.0), 2, (3, 3))})
    reader = SliceReader([tmp_path / "x.safetensors"])
    assert torch.equal(reader.read("w", 3, 2), torch.tensor([1.0, 2.0]))
    for name, start, length in (("w", 0, 3), ("w", 5, 2), ("w", 6, 1), ("v", 0, 1)):
        with pytest.raises(CheckpointError, match=f"no file holds elements .* of {name}"):
            reader.read(name, start, length)


@pytest.mark.parametrize(
    "facts",
    [
        "", "3", "[]", "{}", "[" * 100_000, '{"w": 3}', '{"w": {}}',
        '{"w": {"name": "w", "start": -1, "length": 4, "shape": [9]}}',
        '{"w": {"name": "w", "start": 0, "length": 5, "shape": [9]}}',
        '{"w": {"name": "w", "start": 6, "length": 4, "shape": [9]}}',
        '{"w": {"name": "w", "start": 0, "length": 4, "shape": [-9]}}',
        '{"w": {"name": "w", "start": 0, "length": 4, "shape": "9"}}',
        '{"w": {"name": "w", "start": true, "length": 4, "shape": [9]}}',
        '{"w": {"name": ["w"], "start": 0, "length": 4, "shape": [9]}}',
    ],
)  # fmt: skip
def test_malformed_facts_are_an_error_with_the_file(tmp_path: Path, facts: str) -> None:
    save_file({"w": torch.ones(4)}, tmp_path / "x.safetensors", metadata={"slices": facts})
    with pytest.raises(CheckpointError, match=r"x\.safetensors: not a file of slices"):
        SliceReader([tmp_path / "x.safetensors"])


def test_files_that_disagree_and_files_cut_short_are_an_error(tmp_path: Path) -> None:
    write_slices(tmp_path / "a.safetensors", {"w": Slice(torch.ones(2), 0, (4,))})
    write_slices(tmp_path / "b.safetensors", {"w": Slice(torch.ones(2), 2, (2, 2))})
    with pytest.raises(CheckpointError, match="has the shape"):
        SliceReader([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        SliceReader([tmp_path / "a.safetensors"])
