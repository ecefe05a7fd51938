"""Checkpoints in a form that knows neither ranks nor ZeRO stages.

``checkpoints/step_00000040/`` holds fp32 parameters and buffers by name, optimizer state by parameter name, each
rank's buffers and random state, and ``state.json`` (step, schedule, fingerprints). ``COMPLETE.json`` lists every file
with size and crc32 and is written last; the folder is renamed into place only then. A folder without it, or with a
file that differs from it, is skipped with a warning; the previous checkpoint is used.

DeepSpeed's own files are not used: they refuse another world size and another stage.

Format 2 added the weights' moving average and the data offset left by rewinds; format 1 reads as without either.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cliplift.configs.sections import ConfigError
from cliplift.pipelines.distributed.collectives import Topology, gather_objects
from cliplift.pipelines.runs.folder import write_json

log = logging.getLogger(__name__)

FORMAT = 2
READABLE_FORMATS = (1, 2)
COMPLETE, STATE = "COMPLETE.json", "state.json"
PARAMETERS, OPTIMIZER = "parameters.safetensors", "optimizer.safetensors"
AVERAGE = "average.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; names the file and what is wrong with it."""


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds of the training state; tensors in fp32 on the CPU."""

    parameters: Mapping[str, Tensor]
    optimizer: Mapping[
        str, Tensor
    ]  # "parameter name|state name" -> tensor of the parameter's shape, or a scalar
    buffers: Mapping[str, Tensor]  # this rank's
    random_state: Mapping[str, Tensor]  # this rank's
    state: Mapping[str, Any]
    average: Mapping[str, Tensor] = field(default_factory=dict)  # parameters and buffers; empty without EMA


class Saver:
    """Writes checkpoints, all ranks together; with ``asynchronous`` the large files are written by a thread of rank 0.

    The next save and :meth:`wait` are where a failure in that thread is raised, on all ranks.
    """

    def __init__(self, topology: Topology, *, asynchronous: bool) -> None:
        self.topology = topology
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous and topology.is_main else None
        self.asynchronous = asynchronous
        self._unfinished: tuple[Path, Future[None] | None] | None = None

    def save(self, folder: Path, snapshot: Snapshot, *, keep_last: int) -> Path:
        """Write one checkpoint; older ones beyond ``keep_last`` are removed after it is complete."""
        self.wait()
        final = folder / f"step_{int(snapshot.state['step']):08d}"
        partial = folder / f"{final.name}.partial"
        topology = self.topology
        with _agreed_failure(partial, topology):
            if topology.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with _agreed_failure(partial, topology):
            _save_tensors(partial / f"buffers-rank{topology.rank}.safetensors", snapshot.buffers)
            _save_tensors(partial / f"random-rank{topology.rank}.safetensors", snapshot.random_state)

        def finish() -> None:
            _write_whole(partial, snapshot, world_size=topology.world_size)
            _complete(partial, final)
            for old in complete_checkpoints(folder)[:-keep_last]:
                shutil.rmtree(old)

        if self.asynchronous:
            self._unfinished = partial, self._thread.submit(finish) if self._thread else None
        else:
            with _agreed_failure(partial, topology):
                if topology.is_main:
                    finish()
        return final

    def wait(self) -> None:
        """Until the last checkpoint is complete. Raises CheckpointError where it could not be written."""
        if self._unfinished is None:
            return
        (partial, writing), self._unfinished = self._unfinished, None
        with _agreed_failure(partial, self.topology):
            if writing is not None:
                writing.result()


def _write_whole(partial: Path, snapshot: Snapshot, *, world_size: int) -> None:
    """What rank 0 writes for all."""
    _save_tensors(partial / PARAMETERS, snapshot.parameters)
    _save_tensors(partial / OPTIMIZER, snapshot.optimizer)
    if snapshot.average:
        _save_tensors(partial / AVERAGE, snapshot.average)
    write_json(partial / STATE, {"format": FORMAT, "world_size": world_size, **snapshot.state})


def _complete(partial: Path, final: Path) -> None:
    """Seal the folder with the list of its files, and give it its name."""
    files = {p.name: {"bytes": p.stat().st_size, "crc32": _crc32(p)} for p in sorted(partial.iterdir())}
    write_json(partial / COMPLETE, {"format": FORMAT, "files": files})
    for path in (*partial.iterdir(), partial):
        _to_disk(path)
    if final.exists():
        shutil.rmtree(final)
    partial.replace(final)
    _to_disk(final.parent)


def _to_disk(path: Path) -> None:
    """Have the system write a file or a folder's entries: only then does a checkpoint outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _agreed_failure(partial: Path, topology: Topology) -> Iterator[None]:
    """All ranks wait for each other at the end; where one could not write, all raise, and none waits in vain."""
    problem: list[str] = []
    try:
        yield
    except (OSError, SafetensorError) as error:
        problem.append(f"rank {topology.rank}: {error}")
    problems = gather_objects(problem, topology)
    if problems:
        if topology.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{partial.parent}: the checkpoint {partial.stem} could not be written ({problems[0]}); "
            "the ones before it are untouched: free some space and start again"
        )


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were written to the end, oldest first."""
    return sorted(path for path in folder.glob("step_????????") if (path / COMPLETE).is_file())


def newest_usable(folder: Path, *, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are all as they were written; damaged ones are told about and passed over."""
    for path in reversed(complete_checkpoints(folder)):
        problem = damage(path)
        if problem is None:
            return path
        say(f"checkpoint {path.name} is damaged ({problem}); using the previous one")
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        files = _sealed_files(path / COMPLETE)
        for name, (size, crc) in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size or _crc32(file) != crc:
                return f"{name} differs from what was written"
    except (OSError, ValueError, RecursionError) as error:
        return f"{COMPLETE}: {error}"
    return None


def _sealed_files(seal: Path) -> dict[str, tuple[int, int]]:
    """Name -> (bytes, crc32) of every file a COMPLETE.json lists; raises ValueError where it is malformed."""
    complete = json.loads(seal.read_text(encoding="utf-8"))
    if not isinstance(complete, dict):
        raise ValueError(f"holds a {type(complete).__name__}, not an object")
    written = complete.get("format")
    if not _is_count(written) or written not in READABLE_FORMATS:
        raise ValueError(f"format {written!r:.40}, this version reads {READABLE_FORMATS}")
    listed = complete.get("files")
    if not isinstance(listed, dict) or STATE not in listed:
        raise ValueError(f"does not list {STATE}")
    files: dict[str, tuple[int, int]] = {}
    for name, facts in listed.items():
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ValueError(f"lists {name!r:.80}, which is no file of this folder")
        size, crc = (facts.get("bytes"), facts.get("crc32")) if isinstance(facts, dict) else (None, None)
        if not (_is_count(size) and _is_count(crc)):
            raise ValueError(f"gives no size and crc32 of {name!r:.80}")
        files[name] = size, crc
    return files


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def load(path: Path, *, topology: Topology) -> Snapshot:
    """Read a checkpoint. Another world size takes rank 0's buffers and starts the ranks' random state afresh."""
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    same_world = state["world_size"] == topology.world_size
    rank = topology.rank if same_world else 0
    return Snapshot(
        parameters=load_file(path / PARAMETERS),
        optimizer=load_file(path / OPTIMIZER),
        buffers=load_file(path / f"buffers-rank{rank}.safetensors"),
        random_state=load_file(path / f"random-rank{rank}.safetensors") if same_world else {},
        state={"data_offset": 0, "rewinds": 0, "average_updates": 0, **state},
        average=load_file(path / AVERAGE) if (path / AVERAGE).is_file() else {},
    )


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators that a model's own draws (dropout, drop path) use."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def load_module(module: nn.Module, saved: Snapshot) -> None:
    """Copy parameters and buffers by name; every one of them must be there."""
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    values = {**saved.parameters, **saved.buffers}
    different = sorted(own.keys() ^ values.keys()) or [n for n in own if own[n].shape != values[n].shape]
    if different:
        raise ConfigError(
            f"the checkpoint is of another network ({len(different)} differences, first {different[0]})",
            key="model",
            hint="use another output, or checkpoint.resume=never",
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(values[name])


def load_buffers(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copy buffers alone; parameters that an engine has partitioned go through ``sharded_state``."""
    for name, buffer in module.named_buffers():
        buffer.copy_(saved[name])


def set_aside(folder: Path, *, say: Callable[[str], None]) -> None:
    """Rename the checkpoints of an earlier run, so that a fresh start neither resumes, keeps nor returns them."""
    if not folder.exists():
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
        number += 1
    folder.replace(aside)
    say(f"starts afresh; the checkpoints of the run before are in {aside.name}")


def check_space(
    folder: Path, *, parameters: int, trainable: int, moments: int, averaged: bool = False
) -> None:
    """Refuse to start a run whose first checkpoint cannot fit on the disk.

    Args:
        folder: where checkpoints go; its nearest existing parent is asked for free space.
        parameters, trainable: numbers of fp32 values; the trainable ones also have optimizer state.
        moments: optimizer tensors per trainable parameter (AdamW 2, SGD with momentum 1).
        averaged: whether a moving average of the parameters is saved too.

    Raises:
        ConfigError: fewer bytes are free than one checkpoint takes.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    needed, free = 4 * (parameters * (1 + averaged) + moments * trainable), shutil.disk_usage(place).free
    if free < needed:
        raise ConfigError(
            f"one checkpoint takes {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free",
            key="output",
            value=str(folder.parent),
            hint="free some space, or choose another folder",
        )
