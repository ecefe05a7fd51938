"""All ranks say what they run, and stop together when one runs something else.

A rank with another batch size, an older checkout or other shards does not crash: it hangs in a collective, or trains
on silently wrong gradients. So before anything is computed every rank shows config, code and data to the others.
"""

from __future__ import annotations

import hashlib
import platform
import socket
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cliplift.configs.sections import ConfigError, Section
from cliplift.pipelines.distributed import Topology

V = TypeVar("V")

SECONDS = 60.0  # a rank that has not answered by then is missing
DATA_SECONDS = 300.0  # a remote index may take its time
PACKAGES = ("configs", "models", "sharding", "pipelines", "launch")
NODE_LOCAL = {"data.cache_folder"}  # may differ between hosts by design
ABSENT = "(not set)"
ROOT = Path(__file__).resolve().parents[1]


def agree_on_run(run: Section, topology: Topology) -> None:
    """Compare config, code and versions of all ranks.

    Raises:
        ConfigError: on every rank, naming the rank that differs, the key and both values; or the rank that is silent.
    """
    if topology.world_size > 1:
        agree(run_facts(run) | code_facts() | {"device": topology.device.type}, topology)


def agreed_data(make: Callable[[], V], fingerprint: Callable[[V], str], topology: Topology) -> V:
    """Open the data on every rank, and compare what was found.

    Raises:
        ConfigError: ranks see different data, or one of them none; on every rank, so that none waits for another.
    """
    if topology.world_size == 1:
        return make()
    opened: V | None = None
    failure: ValueError | OSError | None = None
    try:
        opened = make()
    except (ValueError, OSError) as error:  # our user errors, and a file system that is not mounted here
        failure = error
    facts = {"data": fingerprint(opened) if opened is not None else f"unreadable: {failure}"}
    try:
        agree(facts, topology, seconds=DATA_SECONDS)
    except ConfigError as disagreement:
        raise disagreement from failure
    if failure is not None:  # all ranks agree that it cannot be read: the error itself is the clearest
        raise failure
    assert opened is not None
    return opened


def agree(facts: Mapping[str, str], topology: Topology, *, seconds: float = SECONDS) -> None:
    """Compare ``facts`` of all ranks with those of rank 0.

    Raises:
        ConfigError: on every rank, when any of them differs or has not answered after ``seconds``.
    """
    mine = {"facts": dict(facts), "host": socket.gethostname()}
    # Of gloo also beside NCCL: it needs no GPU, and its time limit is ours.
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
    try:
        dist.monitored_barrier(group, timeout=timedelta(seconds=seconds), wait_all_ranks=True)
        everyone: list[Any] = [None] * topology.world_size
        dist.all_gather_object(everyone, mine, group=group)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"not every rank has come to compare its config after {seconds:.0f} s: {first}",
            file="ranks",
            hint="look at the log of the missing rank",
        ) from error
    finally:
        dist.destroy_process_group(group)
    difference = first_difference(everyone)
    if difference is not None:
        raise difference


def first_difference(everyone: Sequence[Mapping[str, Any]]) -> ConfigError | None:
    """The first rank whose facts are not rank 0's, as an error that names both."""
    first = everyone[0]
    for rank, other in enumerate(everyone):
        keys = [*first["facts"], *(key for key in other["facts"] if key not in first["facts"])]
        for key in keys:
            here, there = first["facts"].get(key, ABSENT), other["facts"].get(key, ABSENT)
            if here != there:
                return ConfigError(
                    f"rank {rank} on {other['host']} has {there} and rank 0 on {first['host']} has {here}",
                    key=key,
                    value=there,
                    file="ranks disagree",
                    hint="start all ranks with the same command, code and data",
                )
    return None


def run_facts(run: Section) -> dict[str, str]:
    """Every config value by its dotted key, except what may differ between hosts."""
    facts: dict[str, str] = {}

    def walk(tree: Any, prefix: str) -> None:
        if isinstance(tree, Mapping) and tree:
            for key, value in tree.items():
                walk(value, f"{prefix}.{key}" if prefix else str(key))
        elif prefix not in NODE_LOCAL:
            facts[prefix] = repr(tree)

    walk(run.model_dump(mode="json"), "")
    return facts


def code_facts() -> dict[str, str]:
    """What of the software decides the numbers."""
    return {
        "cliplift's code": code_digest(),
        "torch version": torch.__version__,
        "deepspeed version": metadata.version("deepspeed"),
        "python version": ".".join(platform.python_version_tuple()[:2]),
    }


def code_digest(root: Path = ROOT) -> str:
    """A short digest of all our source files, as installed: an edited checkout counts, not only the version."""
    total = hashlib.sha256()
    for path in sorted(file for package in PACKAGES for file in (root / package).glob("*.py")):
        total.update(f"{path.parent.name}/{path.name}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()[:12]
