"""Which process this is and where all of them meet, for every launcher, from the environment alone.

torchrun, the deepspeed launcher and Kubeflow set everything (RANK, WORLD_SIZE, MASTER_ADDR, ...). ``srun`` sets rank
and hosts; MPI launchers set the rank alone. The addresses they leave out are derived here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from cliplift.configs.sections import ConfigError

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 29500
FIRST_DERIVED_PORT, DERIVED_PORTS = 20_000, 12_000  # below the range Linux gives out by itself, from 32768


@dataclass(frozen=True)
class Launcher:
    """The variables by which one launcher numbers its processes."""

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_size: str


LAUNCHERS = (
    Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    # An MPI program under srun has both sets; Open MPI's own are then the ones of the MPI world.
    Launcher(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher(
        "MVAPICH",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    # MPICH and Intel MPI (hydra). Slurm's PMI plug-in sets PMI_RANK too, so it comes after srun.
    Launcher("MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


@dataclass(frozen=True)
class Place:
    """This process among all, and the address where they meet."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str
    master_address: str
    master_port: int


def find_place(environment: Mapping[str, str]) -> Place:
    """The first launcher that sets both rank and world size; a single process where none does.

    Raises:
        ConfigError: a rank outside the world, a number that is none, or several hosts without a meeting point.
    """
    for launcher in LAUNCHERS:
        if launcher.rank not in environment or launcher.world_size not in environment:
            continue
        if launcher.name == "srun" and not _in_slurm_task(environment):
            continue
        rank, world_size = (_number(environment, n) for n in (launcher.rank, launcher.world_size))
        local_rank = _number(environment, launcher.local_rank) if launcher.local_rank in environment else 0
        if not 0 <= rank < world_size:
            raise ConfigError(
                f"{launcher.rank}={rank} is outside {launcher.world_size}={world_size}",
                file="environment",
                hint="start it with torchrun",
            )
        address = LOOPBACK if world_size == 1 else _master_address(environment, launcher, world_size)
        return Place(
            rank, world_size, local_rank, launcher.name, address, _master_port(environment, launcher)
        )
    return Place(0, 1, 0, "python", LOOPBACK, DEFAULT_PORT)


def ranks(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, world size, local rank)."""
    place = find_place(environment)
    return place.rank, place.world_size, place.local_rank


def variables_of(place: Place, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The variables in the environment that make this process one of many: unset, it is a process alone."""
    launcher = next(launcher for launcher in LAUNCHERS if launcher.name == place.launcher)
    names = [launcher.rank, launcher.world_size, launcher.local_rank, launcher.local_size]
    names += ["SLURM_STEP_ID", "SLURM_STEPID"] if launcher.name == "srun" else []
    return tuple(name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name in environment)


def _in_slurm_task(environment: Mapping[str, str]) -> bool:
    """Whether this is a task of ``srun``.

    A batch script and an interactive shell have SLURM_PROCID=0 and SLURM_NTASKS too, but the other tasks never come.
    """
    return "SLURM_STEP_ID" in environment or "SLURM_STEPID" in environment


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ConfigError(
            f"{name}={environment[name]!r} is not a number", file="environment", hint="start it with torchrun"
        ) from None


def _master_address(environment: Mapping[str, str], launcher: Launcher, world_size: int) -> str:
    if environment.get("MASTER_ADDR"):
        return environment["MASTER_ADDR"]
    if launcher.name == "torchrun":
        return LOOPBACK  # set by hand, without an address: one host
    if launcher.name == "srun":
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        if nodes:
            return first_host(nodes)
    local_size = environment.get(launcher.local_size, "")
    if local_size.isdigit() and int(local_size) == world_size:
        return LOOPBACK
    raise ConfigError(
        f"{launcher.name} started {world_size} processes and does not set the address of rank 0",
        key="MASTER_ADDR",
        file="environment",
        hint="pass the address of rank 0's host to all of them, such as "
        "mpirun -x MASTER_ADDR=$(hostname -i), with MASTER_PORT beside it",
    )


def _master_port(environment: Mapping[str, str], launcher: Launcher) -> int:
    if environment.get("MASTER_PORT"):
        return _number(environment, "MASTER_PORT")
    if launcher.name == "srun":
        # Two jobs or steps on one host must not meet each other: all tasks of a step derive the same port.
        step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", "0"))
        job = int(environment.get("SLURM_JOB_ID", "0")) * 7 + int(step)
        return FIRST_DERIVED_PORT + job % DERIVED_PORTS
    return DEFAULT_PORT


def first_host(nodes: str) -> str:
    """The first host of a Slurm list: ``gpu[03-07,12],cpu1`` -> ``gpu03``.

    Raises:
        ConfigError: the list is none.
    """
    match = re.match(r"([^,\[\]]+)(?:\[([0-9]+)[^\[\]]*\]([^,\[\]]*))?", nodes.strip())
    if match is None:
        raise ConfigError(
            f"{nodes!r} is not a list of hosts", key="SLURM_JOB_NODELIST", file="environment",
            hint="set MASTER_ADDR",
        )  # fmt: skip
    prefix, number, suffix = match.groups()
    return f"{prefix}{number or ''}{suffix or ''}"
