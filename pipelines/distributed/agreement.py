"""Ranks compare what they run before the first step, and stop together when one of them differs.

A rank with another batch size, an older checkout or other shards does not crash: it hangs in a collective, or trains
on wrong gradients without a word. So all ranks first compare config, code, plug-ins and data.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TypedDict, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

import cliplift.pipelines
from cliplift.configs.discovery import plugin_versions
from cliplift.configs.sections import ConfigError, Section
from cliplift.pipelines.distributed.collectives import Topology

V = TypeVar("V")

SECONDS = 60.0  # a rank that has not answered by then counts as missing
DATA_SECONDS = 300.0  # reading a remote index may be slow
PACKAGES = ("configs", "models", "sharding", "pipelines", "launch")
NODE_LOCAL = {"data.cache_folder", "track.group"}  # may differ between hosts by design: rank 0 alone tracks
ABSENT = "(not set)"
FILE = "ranks disagree"  # stands where a ConfigError names the file at fault
FAREWELL_SECONDS = 10.0
PACKAGE_FILE = cliplift.pipelines.__file__
assert PACKAGE_FILE
ROOT = Path(PACKAGE_FILE).resolve().parents[1]  # independent of how deep this file stands


class Facts(TypedDict):
    """What one rank shows the others."""

    host: str
    facts: dict[str, str]


class Disagreement(TypedDict):
    """What of one rank is not rank 0's: the parts of a :class:`ConfigError`, as the store carries them."""

    key: str
    value: str
    reason: str
    hint: str


class Outcome(Disagreement):
    """The disagreement that all ranks stop with, and the ranks that have not answered."""

    missing: list[int]


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

    Over the store where the ranks have met, not a collective: it needs no second process group, whose network
    interface might be the wrong one, and it can say who is missing.

    Raises:
        ConfigError: on every rank, when any of them differs or has not answered after ``seconds``.
    """
    store = _store()
    mine: Facts = {"host": socket.gethostname(), "facts": dict(facts)}
    if topology.is_main:
        store.set("facts", json.dumps(mine))
    first = json.loads(_get(store, "facts", seconds, "rank 0"))
    store.set(f"verdict/{topology.rank}", json.dumps(difference(first, mine, rank=topology.rank)))
    if topology.is_main:
        store.set("outcome", json.dumps(_outcome(store, topology.world_size, seconds)))
    # Rank 0 itself waits up to ``seconds`` for the verdicts before it can answer.
    outcome: Outcome | None = json.loads(_get(store, "outcome", 2 * seconds, "rank 0"))
    if outcome is None:
        return
    store.set(f"seen/{topology.rank}", "")
    if topology.is_main:  # the store may live in this process: the others still have to read why
        for rank in range(topology.world_size):
            _wait(store, f"seen/{rank}", 0.2 if rank in outcome["missing"] else FAREWELL_SECONDS)
    raise ConfigError(
        outcome["reason"],
        key=outcome["key"],
        value=outcome["value"],
        file=FILE,
        hint=outcome["hint"],
    )


# All ranks make the same comparisons in the same order, so their counts agree without being exchanged.
_calls = itertools.count()


def _store() -> Store:
    """The store of the process group, with keys no earlier comparison has used.

    A restarted worker's store is a new one, or torch keeps its keys apart from those of the starts before.
    """
    default = dist.distributed_c10d._get_default_store()
    return PrefixStore(f"cliplift/agree/{next(_calls)}", default)


def _outcome(store: Store, world_size: int, seconds: float) -> Outcome | None:
    """On rank 0: the first difference any rank has found, or who has not said anything; None when all agree."""
    until = time.monotonic() + seconds
    # One deadline for all: many silent ranks must not add up to many times the waiting.
    missing = [r for r in range(world_size) if not _wait(store, f"verdict/{r}", until - time.monotonic())]
    verdicts = [json.loads(store.get(f"verdict/{r}")) for r in range(world_size) if r not in missing]
    found: Disagreement | None = next((v for v in verdicts if v is not None), None)
    # A difference explains a silence: a rank with other code may have died of it.
    if found is None and missing:
        names = ", ".join(map(str, missing))
        reason = f"rank {names} of {world_size} has not answered after {seconds:.0f} s"
        found = Disagreement(key="", value="", reason=reason, hint="look at its log")
    return None if found is None else Outcome(**found, missing=missing)


def _get(store: Store, key: str, seconds: float, who: str) -> bytes:
    """The value of a key, as soon as another rank has set it."""
    if not _wait(store, key, seconds):
        raise ConfigError(f"{who} has not answered after {seconds:.0f} s", file=FILE, hint="look at its log")
    return store.get(key)


def _wait(store: Store, key: str, seconds: float) -> bool:
    """Whether a key came in time."""
    try:
        store.wait([key], timedelta(seconds=max(seconds, 0.05)))
    except dist.DistError:
        return False
    return True


def difference(first: Facts, other: Facts, *, rank: int) -> Disagreement | None:
    """What of a rank's facts is not rank 0's, as the parts of a sentence that names both; None when all are."""
    ours, theirs = first["facts"], other["facts"]
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        here, there = ours.get(key, ABSENT), theirs.get(key, ABSENT)
        if here != there:
            reason = f"rank {rank} on {other['host']} has {there} and rank 0 on {first['host']} has {here}"
            hint = "start all ranks with the same command, code and data"
            return Disagreement(key=key, value=there, reason=reason, hint=hint)
    return None


def run_facts(run: Section) -> dict[str, str]:
    """Every config value by its dotted key, except what may differ between hosts."""
    facts: dict[str, str] = {}

    def walk(tree: object, prefix: str) -> None:
        if isinstance(tree, Mapping) and tree:
            for key, value in tree.items():
                walk(value, f"{prefix}.{key}" if prefix else str(key))
        elif prefix not in NODE_LOCAL:
            facts[prefix] = repr(tree)

    walk(run.model_dump(mode="json"), "")
    if facts.get("checkpoint.url", "None") != "None":
        del facts["output"]  # with a store, each host may have a folder of its own
    return facts


def code_facts() -> dict[str, str]:
    """What of the software decides the numbers."""
    return {
        "cliplift's code": code_digest(),
        "torch version": torch.__version__,
        "deepspeed version": metadata.version("deepspeed"),
        "python version": ".".join(platform.python_version_tuple()[:2]),
    } | {f"plug-in {name}": version for name, version in plugin_versions().items()}


def code_digest(root: Path = ROOT) -> str:
    """A short digest of all our source files, as installed: an edited checkout counts, not only the version."""
    total = hashlib.sha256()
    for path in source_files(root):
        total.update(f"{path.relative_to(root).as_posix()}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


def source_files(root: Path = ROOT) -> list[Path]:
    """Every Python file of the package at any depth, in an order that does not depend on the file system."""
    found = sorted(file for package in PACKAGES for file in (root / package).rglob("*.py"))
    assert found, f"no source files below {root}: ranks with different code would agree"
    return found
