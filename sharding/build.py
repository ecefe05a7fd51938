"""``plan -> build -> finalize -> verify``: raw videos to a shard dataset, resumable at any point.

One shard is one unit of work and a pure function of the plan, so any number of workers, parts or interruptions
gives the same bytes.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun
from cliplift.sharding.finalize import finalize
from cliplift.sharding.manifest import (
    BUILD_FILE,
    Dataset,
    ManifestError,
    Refused,
    ShardIndex,
    SourceVideo,
    canonical,
    index_file,
    load_index,
)
from cliplift.sharding.plan import Plan, PlannedShard, plan_once
from cliplift.sharding.pool import Job, VideoResult, WorkerPool
from cliplift.sharding.sources import video_url
from cliplift.sharding.storage import Store, open_store
from cliplift.sharding.verify import VerifyReport, file_sha256, verify
from cliplift.sharding.writer import ShardWriter

Phase = Literal["plan", "build", "finalize", "verify"]
PHASES: tuple[Phase, ...] = ("plan", "build", "finalize", "verify")
# Reasons that may go away by themselves: a busy machine, a network, a file that arrived since.
RETRIED_STAGES = ("read", "timeout", "crash")


@dataclass
class Progress:
    """How far a build is; handed to ``on_progress`` after every video."""

    videos_done: int = 0
    videos_total: int = 0
    shards_done: int = 0
    shards_total: int = 0
    clips: int = 0
    bytes: int = 0
    seconds: float = 0.0
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def clips_per_second(self) -> float:
        return self.clips / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        if not self.videos_done:
            return None
        return self.seconds / self.videos_done * (self.videos_total - self.videos_done)


@dataclass(frozen=True)
class BuildReport:
    """What a call of :func:`run_shard` did."""

    url: str
    plan_id: str
    shards_total: int
    shards_built: int
    shards_kept: int
    clips_written: int
    bytes_written: int
    refused: dict[str, int]
    missing: int
    seconds: float
    dataset: Dataset | None = None
    verified: VerifyReport | None = None


def run_shard(
    run: ShardRun,
    *,
    phases: Sequence[Phase] = PHASES,
    part: tuple[int, int] | None = None,
    retry_failed: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> BuildReport:
    """Run phases of a build; each continues what earlier calls left.

    Args:
        run: the validated config.
        phases: which of plan, build, finalize and verify to run, in that order.
        part: (I, N) builds the shards whose number is I modulo N, I from 0; nothing is finalized until all are there.
        retry_failed: build again the shards that hold clips refused for reading, time or a crash.
        on_progress: called after every video.

    Raises:
        ConfigError: the config cannot be used with this source or this output.
        BuildError: shards are missing, or more clips were refused than allowed.
    """
    started = time.monotonic()
    store = open_store(run.output)
    plan = plan_once(run, store)
    progress = Progress(shards_total=len(plan.shards))
    built: list[ShardIndex] = []
    kept = 0
    if "build" in phases:
        mine = _my_part(plan, part)
        todo, kept = _unfinished(plan, mine, store, retry_failed=retry_failed)
        progress.shards_total, progress.videos_total = len(mine), sum(s.stop - s.start for s in todo)
        progress.shards_done = kept
        built = build_shards(run, plan, todo, store, progress=progress, on_progress=on_progress)
    dataset = None
    whole = part is None or {index_file(s.tar) for s in plan.shards} <= set(store.list())
    if "finalize" in phases and whole:
        dataset = finalize(plan, store, max_refused_share=run.limits.max_refused_share)
    report = BuildReport(
        url=run.output,
        plan_id=plan.plan_id,
        shards_total=len(plan.shards),
        shards_built=len(built),
        shards_kept=kept,
        clips_written=sum(len(index.samples) for index in built),
        bytes_written=sum(index.tar_bytes for index in built),
        refused=dict(dataset.refused) if dataset else dict(progress.refused),
        missing=plan.missing,
        seconds=round(time.monotonic() - started, 3),
        dataset=dataset,
        verified=verify(run.output, decode=run.verify_decode, workers=_workers(run))
        if "verify" in phases and whole
        else None,
    )
    if dataset is not None:
        _write_build_record(report, store)
    return report


def _workers(run: ShardRun) -> int:
    return run.workers or len(os.sched_getaffinity(0))


def _my_part(plan: Plan, part: tuple[int, int] | None) -> list[PlannedShard]:
    if part is None:
        return list(plan.shards)
    number, parts = part
    if not 0 <= number < parts:
        raise ConfigError(
            f"part {number} of {parts} does not exist", key="part", value=part, hint="count from 0"
        )
    return [shard for shard in plan.shards if shard.shard % parts == number]


def _unfinished(
    plan: Plan, shards: Sequence[PlannedShard], store: Store, *, retry_failed: bool
) -> tuple[list[PlannedShard], int]:
    """Shards to build, and how many are already there and whole."""
    todo = []
    present = set(store.list())
    for shard in shards:
        if index_file(shard.tar) not in present:
            todo.append(shard)
            continue
        index = _committed(plan, shard, store)
        failed = index is not None and any(r.stage in RETRIED_STAGES for r in index.refused)
        if index is None or (retry_failed and failed):
            # The commit mark goes first: it must never stand beside a tar it does not describe.
            store.remove(index_file(shard.tar))
            todo.append(shard)
    return todo, len(shards) - len(todo)


def _committed(plan: Plan, shard: PlannedShard, store: Store) -> ShardIndex | None:
    """The shard's index if the shard stands whole and belongs to this plan. Local tars are hashed again."""
    name = index_file(shard.tar)
    try:
        index = load_index(store.read(name), file=name)
    except (FileNotFoundError, ManifestError):
        return None
    if index.plan_id != plan.plan_id or index.tar != shard.tar or store.size(shard.tar) != index.tar_bytes:
        return None
    path = store.local_path(shard.tar)
    return index if path is None or file_sha256(path) == index.tar_sha256 else None


def build_shards(
    run: ShardRun,
    plan: Plan,
    shards: Sequence[PlannedShard],
    store: Store,
    *,
    progress: Progress,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[ShardIndex]:
    """Build shards one after the other while the workers already cut the videos of the next."""
    if not shards:
        return []
    started = time.monotonic()
    hello = {
        "cut": run.cut.model_dump(mode="json"),
        "transcode": run.transcode.model_dump(mode="json"),
        "memory_mib": run.limits.memory_mib,
    }
    pool = WorkerPool(
        workers=min(_workers(run), sum(s.stop - s.start for s in shards)),
        hello=hello,
        clip_timeout_seconds=run.limits.clip_timeout_seconds,
        attempts=run.limits.attempts,
    )
    built: list[ShardIndex] = []
    writer: ShardWriter | None = None
    with pool:
        try:
            for job, result in pool.run(_jobs(plan, shards)):
                shard, number = job.tag
                if writer is None:
                    writer = ShardWriter(
                        store, shard.tar, shard=shard.shard, split=shard.split, plan_id=plan.plan_id
                    )
                _add_video(writer, plan, shard, number, result)
                progress.videos_done += 1
                progress.clips += len(result.clips)
                progress.bytes += sum(len(mp4) for _, mp4 in result.clips)
                progress.refused.update(stage for _, stage, _ in result.refused)
                progress.seconds = time.monotonic() - started
                if shard.start + number + 1 == shard.stop:
                    built.append(writer.commit())
                    writer = None
                    progress.shards_done += 1
                if on_progress is not None:
                    on_progress(progress)
        finally:
            if writer is not None:
                writer.abandon()
    return built


def _jobs(plan: Plan, shards: Sequence[PlannedShard]) -> Iterator[Job[tuple[PlannedShard, int]]]:
    for shard in shards:
        for number, video in enumerate(plan.videos[shard.start : shard.stop]):
            message = {
                "url": video_url(plan.root, video),
                "start": video.start_seconds,
                "end": video.end_seconds,
            }
            yield Job(message=message, tag=(shard, number))


def _add_video(
    writer: ShardWriter, plan: Plan, shard: PlannedShard, number: int, result: VideoResult
) -> None:
    video = plan.videos[shard.start + number]
    for facts, mp4 in result.clips:
        key = f"{shard.shard:06d}-{number:05d}-{facts['clip']:05d}"
        row: dict[str, Any] = {
            "key": key,
            "video_id": video.video_id,
            "source": video.source,
            "split": video.split,
            "label": video.label,
            "labels": video.labels,
            "folds": video.folds,
            "group": video.group,
            "start_seconds": facts["start_seconds"],
            "end_seconds": facts["end_seconds"],
            "num_frames": facts["num_frames"],
            "fps": facts["fps"][0] / facts["fps"][1],
            "width": facts["width"],
            "height": facts["height"],
            "keyframes": tuple(facts["keyframes"]),
            "source_sha256": result.sha256,
        }
        writer.add(mp4=mp4, facts=_sample_json(plan, video, facts, row), **row)
    for clip, stage, reason in result.refused:
        writer.refuse(
            Refused(video_id=video.video_id, source=video.source, clip=clip, stage=stage, reason=reason)
        )


def _sample_json(
    plan: Plan, video: SourceVideo, facts: dict[str, Any], row: dict[str, Any]
) -> dict[str, Any]:
    """The JSON member of a sample: everything a reader of the bare tar needs to know."""
    numbers = (video.label,) if video.label >= 0 else ()
    return {
        **{name: value for name, value in row.items() if name not in ("fps", "label", "folds")},
        "fps_num": facts["fps"][0],
        "fps_den": facts["fps"][1],
        "label": video.label if video.label >= 0 else None,
        "label_names": [plan.classes[n] for n in (video.labels or numbers)],
        "folds": list(video.folds),
        "source_facts": facts["source_facts"],
        "schema": 1,
    }


def _write_build_record(report: BuildReport, store: Store) -> None:
    record = {
        "plan_id": report.plan_id,
        "shards_built": report.shards_built,
        "shards_kept": report.shards_kept,
        "clips_written": report.clips_written,
        "bytes_written": report.bytes_written,
        "refused": report.refused,
        "missing": report.missing,
        "seconds": report.seconds,
        "clips_per_second": round(report.clips_written / report.seconds, 3) if report.seconds else 0.0,
        "verified": report.verified.ok if report.verified else None,
    }
    store.write(BUILD_FILE, canonical(record) + b"\n")
