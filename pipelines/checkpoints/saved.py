"""A checkpoint on disk, opened: small things are read at once, slices when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cliplift.configs.sections import ConfigError
from cliplift.pipelines.checkpoints.folder import STATE, Folder, read_small, sealed_files
from cliplift.pipelines.checkpoints.slices import SliceReader
from cliplift.pipelines.checkpoints.stored import StoredFolder
from cliplift.pipelines.checkpoints.tensor_file import StoredFile
from cliplift.pipelines.distributed.collectives import Topology


@dataclass(frozen=True)
class SavedState:
    """A checkpoint of any format: every rank's slices, and this rank's buffers and random state.

    Format 3 has slices of every rank. Formats 1 and 2 have one file of whole tensors each; format 1 has no average.
    """

    path: Folder
    parameters: SliceReader  # all parameters, frozen ones included
    optimizer: SliceReader  # "parameter name|state name"
    average: SliceReader  # of the trainable parameters at least; of none without EMA
    buffers: Mapping[str, Tensor]
    average_buffers: Mapping[str, Tensor]
    random_state: Mapping[str, Tensor]
    state: Mapping[str, Any]

    @property
    def bytes_read(self) -> int:
        """Of parameters, optimizer state and average, by this process."""
        return sum(reader.bytes_read for reader in (self.parameters, self.optimizer, self.average))


def open_checkpoint(path: Folder, *, topology: Topology) -> SavedState:
    """Open a checkpoint. Another number of ranks that clips are dealt to takes rank 0's buffers and starts the ranks'
    random state afresh. Ranks that share their clips have the same of both.

    Raises:
        CheckpointError: a file cannot be read as what it should be.
    """
    state = json.loads(read_small(path, STATE).decode("utf-8"))
    names = sealed_files(path)
    shared = int(state.get("sequence_parallel", 1))
    same_dealing = state["world_size"] == topology.data_ranks * shared
    rank = topology.data_rank * shared if same_dealing else 0

    def reader(kind: str) -> SliceReader:
        ours = (f"{kind}-rank{n}.safetensors" for n in range(state["world_size"]))
        files = [name for name in (f"{kind}.safetensors", *ours) if name in names]
        return SliceReader([_file(path, name) for name in files])

    def small(kind: str) -> dict[str, Tensor]:
        name = f"{kind}-rank{rank}.safetensors"
        if name not in names:
            return {}
        shaped = SliceReader([_file(path, name)])
        return {key: shaped.whole(key).clone() for key in shaped}

    average, buffers = reader("average"), small("buffers")
    averaged = {name: average.whole(name).clone() for name in buffers if name in average}  # format 2
    saved = SavedState(
        path=path,
        parameters=reader("parameters"),
        optimizer=reader("optimizer"),
        average=average,
        buffers=buffers,
        average_buffers=averaged or small("average-buffers"),
        random_state=small("random") if same_dealing else {},
        state={"data_offset": 0, "rewinds": 0, "average_updates": 0, **state},
    )
    if isinstance(path, StoredFolder):
        path.let_go()  # the copies are mapped
    return saved


def _file(path: Folder, name: str) -> Path | StoredFile:
    """A file on a disk: its own, or the copy made when it was checked. Of a store's others, ranges are read."""
    if isinstance(path, Path):
        return path / name
    copy = path.local / name
    return copy if copy.is_file() else StoredFile(path.store, name)


def check_fits(module: nn.Module, saved: SavedState) -> None:
    """Refuse a checkpoint whose parameters and buffers are not those of the module, by name and shape.

    Raises:
        ConfigError: names the first difference.
    """
    own = {name: tuple(p.shape) for name, p in module.named_parameters()}
    values = {name: saved.parameters.shape(name) for name in saved.parameters}
    own |= {name: tuple(b.shape) for name, b in module.named_buffers()}
    values |= {name: tuple(b.shape) for name, b in saved.buffers.items()}
    different = sorted(own.keys() ^ values.keys()) or [n for n in own if own[n] != values[n]]
    if different:
        raise ConfigError(
            f"the checkpoint is of another network ({len(different)} differences, first {different[0]})",
            key="model",
            hint="use another output, or checkpoint.resume=never",
        )


@torch.no_grad()
def load_buffers(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy those of a module's buffers that are given."""
    for name, buffer in module.named_buffers():
        if name in values:
            buffer.copy_(values[name])


class TrainedTensors(Mapping[str, Tensor]):
    """The tensors of a trained module by name, each read from a checkpoint when it is asked for.

    Parameters are fp32, averaged where ``averaged`` and the checkpoint has their average; ``buffers`` are given.
    """

    def __init__(self, saved: SavedState, *, buffers: Mapping[str, Tensor], averaged: bool) -> None:
        self._parameters, self._buffers = saved.parameters, dict(buffers)
        self._average = saved.average if averaged else None

    def __getitem__(self, name: str) -> Tensor:
        if name in self._buffers:
            return self._buffers[name]
        if self._average is not None and name in self._average:
            return self._average.whole(name)
        if name not in self._parameters:
            raise KeyError(name)
        return self._parameters.whole(name)

    def __iter__(self) -> Iterator[str]:
        yield from self._parameters
        yield from self._buffers

    def __len__(self) -> int:
        return sum(1 for _ in self)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators that a model's own draws (dropout, drop path) use."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the generators back where they were."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
