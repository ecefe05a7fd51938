"""Ranks and the collectives the stages need. One process or many; gloo on CPU, NCCL on CUDA.

The same code runs as plain ``python``, under ``torchrun``, the ``deepspeed`` launcher, ``srun`` and MPI launchers: all
of them set rank and world size in environment variables, which :func:`start` reads (``launchers.py``).
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cliplift.configs.sections import ConfigError
from cliplift.configs.training import EngineConfig
from cliplift.pipelines.distributed.host_memory import keep_freed_memory
from cliplift.pipelines.distributed.launchers import Place, find_place, variables_of

V = TypeVar("V")

MEETING_SECONDS = 60.0  # from the first process that is ready to the last


@dataclass(frozen=True)
class Topology:
    """This process among the others, and the device it computes on.

    ``sequence_parallel`` neighbouring ranks share their clips (``sequence.py``): to what deals clips they are one rank
    of the ``data_ranks``.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    sequence_parallel: int = 1

    @property
    def data_rank(self) -> int:
        return self.rank // self.sequence_parallel

    @property
    def data_ranks(self) -> int:
        return self.world_size // self.sequence_parallel

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(engine: EngineConfig) -> Topology:
    """Join the process group. Safe to call again for the next run of the same process.

    Raises:
        ConfigError: CUDA was asked for and there is no GPU, or the environment names a rank outside the world.
    """
    place = find_place(os.environ)
    device = _device(engine, place.local_rank)
    if device.type == "cpu":
        keep_freed_memory()
    if not dist.is_initialized():
        _quiet()
        _init_process_group(engine, device, place)
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=place.local_rank,
        device=device,
        sequence_parallel=engine.sequence_parallel,
    )


def leave(exit_code: int) -> None:
    """End this process among other ranks with ``exit_code``; a process alone goes on, its group stays for the next run.

    Gloo's threads may still drop the last tensors while Python takes itself apart, which aborts the process (signal
    6) after all its work is done (pytorch/pytorch#179291), and the launcher then calls the run failed. So the process
    ends without that: exit handlers are run and streams flushed first.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _device(engine: EngineConfig, local_rank: int) -> torch.device:
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "no CUDA device is visible",
            key="engine.device",
            value="cuda",
            hint="use engine.device=cpu, or a GPU machine",
        )
    if engine.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _init_process_group(engine: EngineConfig, device: torch.device, place: Place) -> None:
    """DeepSpeed's process group, without the compile stall of its CPU operators."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it; it means nothing without a rank
    backend = "gloo" if device.type == "cpu" else "nccl"
    timeout = timedelta(seconds=engine.collective_timeout_seconds)
    if place.world_size == 1:
        # A world of one meets in memory: no port to collide on, nothing in the environment for children to inherit.
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        store = meet(place, seconds=MEETING_SECONDS)
        store.set_timeout(timeout)
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout
        )
    import deepspeed

    if device.type == "cpu":
        skip_shared_memory_operator()
    deepspeed.init_distributed(
        dist_backend=backend,
        timeout=timeout,
        verbose=False,
        auto_mpi_discovery=False,
        rank=place.rank,
        world_size=place.world_size,
    )
    # DeepSpeed reduces gradients in groups of its own, which torch gives 30 minutes (gloo) or 10 (NCCL) whatever the
    # world was given: a cut cable would be noticed only then.
    deepspeed.comm.comm.cdb.new_group = partial(dist.new_group, timeout=timeout)


def meet(place: Place, *, seconds: float) -> dist.Store:  # type: ignore[name-defined]
    """Wait for the other processes at the address of ``place`` and return the store they share.

    Raises:
        ConfigError: they did not come in time; names the variables that made this process one of many.
    """
    found = variables_of(place, os.environ)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(place.rank), str(place.world_size)
    os.environ["LOCAL_RANK"] = str(place.local_rank)
    os.environ.setdefault("MASTER_ADDR", place.master_address)
    os.environ.setdefault("MASTER_PORT", str(place.master_port))
    try:
        # Ranks other than 0 try to connect twice, each time for the whole time limit.
        limit = timedelta(seconds=seconds if place.rank == 0 else seconds / 2)
        meeting = dist.rendezvous(  # type: ignore[attr-defined]
            "env://", place.rank, place.world_size, timeout=limit
        )
        store: dist.Store = next(iter(meeting))[0]  # type: ignore[name-defined]
    except dist.DistError as error:
        settings = ", ".join(f"{name}={os.environ[name]}" for name in found)
        raise ConfigError(
            f"this is rank {place.rank} of {place.world_size} by the environment ({settings}), and the processes did "
            f"not meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {seconds:g} s "
            f"({str(error).splitlines()[0]:.120})",
            file="environment",
            hint=f"for one process alone: unset {' '.join(found)}; for many, start them all with torchrun or srun",
        ) from error
    return dist.PrefixStore("cliplift", store)  # type: ignore[attr-defined]


def skip_shared_memory_operator() -> None:
    """Keep DeepSpeed from compiling ``deepspeed_shm_comm`` at the first ``init_distributed`` on a CPU.

    It takes minutes with the compiler and serves only inference; DeepSpeed has no switch for it, so the table of
    operators it believes it could build is emptied.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def _quiet() -> None:
    """Keep DeepSpeed from logging each of its defaults at INFO; our own log has what matters."""
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\..*|deepspeed\..*")


def barrier(topology: Topology) -> None:
    if topology.world_size > 1:
        dist.barrier()


def broadcast_object(value: V, topology: Topology, *, group: dist.ProcessGroup | None = None) -> V:
    """Rank 0's value, on every rank. ``group``: of all ranks, another than that of the training."""
    if topology.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def gather_objects(
    items: Sequence[V], topology: Topology, *, group: dist.ProcessGroup | None = None
) -> list[V]:
    """The items of all ranks, in rank order, on every rank. Ranks may have different numbers of them.

    ``group``: of all ranks, another than that of the training.
    """
    if topology.world_size == 1:
        return list(items)
    parts: list[list[V]] = [[] for _ in range(topology.world_size)]
    dist.all_gather_object(parts, list(items), group=group)
    return [item for part in parts for item in part]


def all_gather_tensor(values: Tensor, topology: Topology) -> Tensor:
    """(B, ...) of every rank -> (ranks * B, ...) in rank order. Carries no gradient."""
    if topology.world_size == 1:
        return values
    values = values.detach().contiguous()
    gathered = [torch.empty_like(values) for _ in range(topology.world_size)]
    dist.all_gather(gathered, values)
    return torch.cat(gathered)


def all_reduce_sum(values: Tensor, topology: Topology) -> Tensor:
    """Sum over ranks of a tensor."""
    if topology.world_size == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def all_reduce_mean(values: Tensor, topology: Topology) -> Tensor:
    """Mean over ranks of a float tensor."""
    if topology.world_size == 1:
        return values
    return all_reduce_sum(values, topology) / topology.world_size


def all_reduce_max(value: float, topology: Topology) -> float:
    """The largest value any rank has."""
    if topology.world_size == 1:
        return value
    box = torch.tensor([value], dtype=torch.float64, device=topology.device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return float(box.item())
