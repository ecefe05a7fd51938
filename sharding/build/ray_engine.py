"""The Ray engine: every shard is one task on a cluster, built by isolated workers on the node it lands on.

A task reads its part of the plan and writes to the output itself, so the cluster moves no video. A task whose process
or node is lost is started again by Ray; what it had not committed is not visible, so the bytes stay the same.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any

from cliplift.configs.discovery import VARIABLE, named_modules
from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun
from cliplift.sharding.build.finalize import BuildError
from cliplift.sharding.build.plan import Plan, PlannedShard
from cliplift.sharding.build.unit import BuiltShard, Progress, build_shards, local_workers
from cliplift.sharding.storage import open_store
from cliplift.sharding.video.cuts import require_cutter
from cliplift.sharding.video.encode import require_encoder
from cliplift.sharding.video.flow import require_flow

KNOCK_SECONDS = 10.0
TASKS_AHEAD = 4  # tasks handed to Ray for each that can run, so that no node waits for the driver


def build_on_ray(
    run: ShardRun,
    plan: Plan,
    shards: Sequence[PlannedShard],
    *,
    progress: Progress,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[BuiltShard]:
    """Build shards on a Ray cluster; the output and the source must be reachable from every node.

    Raises:
        ConfigError: Ray is not installed, the cluster cannot be reached, or no node has enough cores.
        BuildError: a shard's process was lost more often than ``ray.retries``.
    """
    if not shards:
        return []
    ray = ray_module()
    mine = connect(ray, address=run.ray.address, cores=local_workers(run))
    try:
        return _map(ray, run, plan, shards, progress=progress, on_progress=on_progress)
    finally:
        if mine:
            ray.shutdown()


def ray_module() -> ModuleType:
    """Ray, which is an extra. Raises ConfigError where it is not installed."""
    try:
        return import_module("ray")
    except ImportError as error:
        raise ConfigError(
            "Ray is not installed",
            key="engine",
            value="ray",
            hint="pip install 'cliplift[ray]', or engine: local",
        ) from error


def connect(ray: ModuleType, *, address: str | None, cores: int) -> bool:
    """Join the cluster, or start one of so many cores on this machine; whether this call did.

    Raises:
        ConfigError: no cluster answers at the address, or it asks for a token that it was not shown.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"log_to_driver": False, "include_dashboard": False}
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        if address is not None:
            _knock(address)
        ray.init(address=address or "auto", log_to_driver=False)
    except Exception as error:
        if _asks_for_token(error):
            raise ConfigError(
                "the Ray cluster asks for a token and was shown none or a wrong one",
                key="ray.address",
                value=address,
                hint="set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token",
            ) from error
        if not isinstance(error, OSError):  # ConnectionError and time-outs are
            raise
        if address is not None:
            raise ConfigError(
                "no Ray cluster answers", key="ray.address", value=address, hint="give HOST:PORT of its head"
            ) from error
        ray.init(address="local", num_cpus=cores, **quiet)
    return True


def _asks_for_token(error: Exception) -> bool:
    """Whether Ray was refused for its token: an error of its own, or one that it reports inside a ConnectionError."""
    return "AuthenticationError" in f"{type(error).__name__} {error.__cause__}"


def _knock(address: str) -> None:
    """Raise OSError where nobody listens; Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()


def _map(
    ray: ModuleType,
    run: ShardRun,
    plan: Plan,
    shards: Sequence[PlannedShard],
    *,
    progress: Progress,
    on_progress: Callable[[Progress], None] | None,
) -> list[BuiltShard]:
    most = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if 0 < most < run.ray.cpus_per_shard:  # a head without cores may have an autoscaler behind it
        raise ConfigError(
            f"the largest node of the cluster has {most:g} cores",
            key="ray.cpus_per_shard",
            value=run.ray.cpus_per_shard,
            hint="a task that asks for more would wait forever",
        )
    started = time.monotonic()
    options = {"num_cpus": run.ray.cpus_per_shard, "max_retries": run.ray.retries}
    task = ray.remote(**options, runtime_env={"env_vars": _environment()})(build_one)
    at_once = max(1, int(ray.cluster_resources().get("CPU", 1) // run.ray.cpus_per_shard))
    waiting = list(reversed(shards))
    running: dict[object, PlannedShard] = {}
    built: list[BuiltShard] = []
    while waiting or running:
        while waiting and len(running) < TASKS_AHEAD * at_once:
            shard = waiting.pop()
            running[task.remote(run.model_dump_json(), *_own_part(plan, shard))] = shard
        done, _ = ray.wait(list(running), num_returns=1)
        for reference in done:
            shard = running.pop(reference)
            shards_built, theirs = _result(ray, reference, shard, run, others=running)
            built += shards_built
            progress.add(theirs)
        progress.seconds = time.monotonic() - started
        if on_progress is not None:
            on_progress(progress)
    return sorted(built, key=lambda shard: shard.shard)


def _environment() -> dict[str, str]:
    """What a task must know of this process's environment: a node's own knows nothing of ``--plugin``."""
    return {VARIABLE: os.environ[VARIABLE]} if named_modules() else {}


def _own_part(plan: Plan, shard: PlannedShard) -> tuple[Plan, PlannedShard]:
    """A plan of this shard alone: what travels to the node that builds it."""
    videos = plan.videos[shard.start : shard.stop]
    return (
        replace(plan, videos=videos, shards=(), settings={}),
        replace(shard, start=0, stop=len(videos)),
    )


def _result(
    ray: ModuleType,
    reference: object,
    shard: PlannedShard,
    run: ShardRun,
    *,
    others: dict[object, PlannedShard],
) -> tuple[list[BuiltShard], Progress]:
    lost = BuildError(
        f"the Ray process that built shard {shard.shard} was lost {run.ray.retries + 1} times; the others are kept,"
        " start the build again"
    )
    result: tuple[list[BuiltShard], Progress] = task_result(ray, reference, others=others, lost=lost)
    return result


def task_result(ray: ModuleType, reference: object, *, others: Iterable[object], lost: Exception) -> Any:
    """What a task returned. Where it failed the others are ended; ``lost`` is raised for a lost process or node."""
    try:
        return ray.get(reference)
    except Exception as error:
        for other in others:
            ray.cancel(other, force=True)
        if isinstance(error, (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError)):
            raise lost from error
        raise


def build_one(run_json: str, plan: Plan, shard: PlannedShard) -> tuple[list[BuiltShard], Progress]:
    """The task: build one shard with as many isolated workers as cores were asked for."""
    run = ShardRun.model_validate_json(run_json)
    require_cutter(run.cut)  # of this node
    require_encoder(run.transcode)
    if run.flow is not None:
        require_flow(run.flow)
    progress = Progress()
    built = build_shards(
        run, plan, [shard], open_store(run.output), workers=run.ray.cpus_per_shard, progress=progress
    )
    return built, progress
