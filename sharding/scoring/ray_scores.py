"""Scores made on a Ray cluster: a shard is a task, and its node stores the scores beside the dataset itself.

What a lost process had not stored is made again by Ray, so the columns have the same bytes as without a cluster. Only
the last step, one generation out of all shards' scores, is this process's own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from cliplift.sharding.build.ray_engine import TASKS_AHEAD, connect, ray_module, task_result
from cliplift.sharding.scoring.likeness import Likeness
from cliplift.sharding.scoring.run import (
    MOST_REASONS,
    ScoreError,
    ScoreProgress,
    ScoreReport,
    lacking_shards,
    score_dataset,
)

RETRIES = 3  # times a shard is scored whose process or node was lost


def score_on_ray(
    url: str,
    names: Sequence[str],
    *,
    address: str | None = None,
    clip_timeout_seconds: float = 60.0,
    likeness: Likeness | None = None,
    on_progress: Callable[[ScoreProgress], None] | None = None,
) -> ScoreReport:
    """Score all clips of a dataset that every node of a cluster can reach; a core a task.

    Args:
        url: folder or URL of the dataset.
        names: as of :func:`score_dataset`.
        address: HOST:PORT of the cluster; None takes ``RAY_ADDRESS``, else the one here, or starts one on this machine.
        clip_timeout_seconds: time a clip may take.
        likeness: as of :func:`score_dataset`.
        on_progress: called after every shard.

    Raises:
        ConfigError: Ray is not installed, no cluster answers, or there is no such dataset or score.
        ManifestError: the dataset's files are damaged.
        ScoreError: a clip cannot be read, or a shard's process was lost too often.
    """
    url = url if "://" in url else str(Path(url).absolute())  # a node has a working directory of its own
    lacking = lacking_shards(url, names)
    scored, reasons = 0, list[str]()
    if lacking:
        ray = ray_module()
        mine = connect(ray, address=address, cores=len(os.sched_getaffinity(0)))
        try:
            arguments = (url, tuple(names), max(lacking) + 1, clip_timeout_seconds)
            scored, reasons = _score_all(ray, arguments, lacking, on_progress or (lambda progress: None))
        finally:
            if mine:
                ray.shutdown()
    report = score_dataset(url, names, clip_timeout_seconds=clip_timeout_seconds, likeness=likeness)
    return replace(report, scored=report.scored + scored, reasons=(*reasons, *report.reasons)[:MOST_REASONS])


def _score_all(
    ray: ModuleType,
    arguments: tuple[str, tuple[str, ...], int, float],
    lacking: Mapping[int, int],
    on_progress: Callable[[ScoreProgress], None],
) -> tuple[int, list[str]]:
    """The shards' tasks, a few ahead of those that can run; how many clips were scored, and why some were not."""
    progress = ScoreProgress(clips_total=sum(lacking.values()), shards_total=len(lacking))
    started = time.monotonic()
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(score_one)
    at_once = TASKS_AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = sorted(lacking, reverse=True)
    running: dict[object, int] = {}
    scored, reasons = 0, dict[int, tuple[str, ...]]()
    while waiting or running:
        while waiting and len(running) < at_once:
            shard = waiting.pop()
            running[task.remote(shard, *arguments)] = shard
        done, _ = ray.wait(list(running), num_returns=1)
        for reference in done:
            shard = running.pop(reference)
            count, reasons[shard] = _result(ray, reference, shard, others=running)
            scored += count
            progress.clips_done += count
            progress.shards_done += 1
        progress.seconds = time.monotonic() - started
        on_progress(progress)
    return scored, [reason for shard in sorted(reasons) for reason in reasons[shard]]


def _result(
    ray: ModuleType, reference: object, shard: int, *, others: Mapping[object, int]
) -> tuple[int, tuple[str, ...]]:
    lost = ScoreError(
        f"the Ray process that scored shard {shard} was lost {RETRIES + 1} times; the others are kept, call it again"
    )
    try:
        found: tuple[int, tuple[str, ...]] = task_result(ray, reference, others=others, lost=lost)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise error.cause from error  # the sentence without the node's traceback
        raise
    return found


def score_one(
    shard: int, url: str, names: Sequence[str], parts: int, timeout: float
) -> tuple[int, tuple[str, ...]]:
    """The task: the scores of one shard; how many clips were scored, and why some were not."""
    report = score_dataset(url, names, workers=1, part=(shard, parts), clip_timeout_seconds=timeout)
    return report.scored, report.reasons
