"""The unit of work: one shard, built from its part of the plan alone. Engines only decide where units run.

How far a build is, for whoever watches it.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from cliplift.configs.sharding import ShardRun
from cliplift.sharding.build.plan import Plan, PlannedShard
from cliplift.sharding.build.pool import Job, VideoResult, WorkerPool
from cliplift.sharding.build.worker import ClipFacts, WorkerSettings
from cliplift.sharding.build.writer import ShardWriter
from cliplift.sharding.manifest import Refused, SampleRow, ShardIndex, SourceVideo
from cliplift.sharding.sources.read import video_url
from cliplift.sharding.storage import Store, without_secrets


@dataclass
class Progress:
    """How far a build is; handed to ``on_progress`` after every video, or after every shard on a Ray cluster."""

    videos_done: int = 0
    videos_total: int = 0
    shards_done: int = 0
    shards_total: int = 0
    clips: int = 0
    bytes: int = 0
    seconds: float = 0.0
    refused: Counter[str] = field(default_factory=Counter)
    copied: int = 0
    not_copied: Counter[str] = field(default_factory=Counter)

    @property
    def clips_per_second(self) -> float:
        return self.clips / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Time the rest takes at the pace so far; None before the first video."""
        if not self.videos_done:
            return None
        return self.seconds / self.videos_done * (self.videos_total - self.videos_done)

    def add(self, other: Progress) -> None:
        """Add what another process has done. Totals and time are this one's own."""
        for name in ("videos_done", "shards_done", "clips", "bytes", "copied"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.refused.update(other.refused)
        self.not_copied.update(other.not_copied)


@dataclass(frozen=True)
class BuiltShard:
    """What became of one unit."""

    shard: int
    clips: int
    tar_bytes: int

    @classmethod
    def of(cls, index: ShardIndex) -> BuiltShard:
        return cls(shard=index.shard, clips=len(index.samples), tar_bytes=index.tar_bytes)


def local_workers(run: ShardRun) -> int:
    """Worker processes of this machine."""
    return run.workers or len(os.sched_getaffinity(0))


def build_shards(
    run: ShardRun,
    plan: Plan,
    shards: Sequence[PlannedShard],
    store: Store,
    *,
    workers: int,
    progress: Progress,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[BuiltShard]:
    """Build shards one after the other while the workers already cut the videos of the next."""
    if not shards:
        return []
    started = time.monotonic()
    settings: WorkerSettings = {
        "cut": run.cut.model_dump(mode="json"),
        "transcode": run.transcode.model_dump(mode="json"),
        "flow": None if run.flow is None else run.flow.model_dump(mode="json"),
        "memory_mib": run.limits.memory_mib,
        "private_redirects": run.limits.private_redirects,
    }
    pool = WorkerPool[_Place](
        workers=min(workers, sum(s.stop - s.start for s in shards)),
        settings=settings,
        clip_timeout_seconds=run.limits.clip_timeout_seconds,
        attempts=run.limits.attempts,
    )
    built: list[BuiltShard] = []
    writer: ShardWriter | None = None
    with pool:
        try:
            for job, result in pool.run(_jobs(plan, shards)):
                shard, number, _ = job.context
                if writer is None:
                    writer = ShardWriter(
                        store, shard.tar, shard=shard.shard, split=shard.split, plan_id=plan.plan_id
                    )
                _add_video(writer, plan, job.context, result)
                _count(progress, result)
                progress.seconds = time.monotonic() - started
                # Results come in the order of the plan, so a shard's last video ends it.
                if shard.start + number + 1 == shard.stop:
                    built.append(BuiltShard.of(writer.commit()))
                    writer = None
                    progress.shards_done += 1
                if on_progress is not None:
                    on_progress(progress)
        finally:
            if writer is not None:
                writer.abandon()
    return built


def _count(progress: Progress, result: VideoResult) -> None:
    progress.videos_done += 1
    progress.clips += len(result.clips)
    progress.bytes += sum(len(mp4) for _, mp4 in result.clips)
    progress.refused.update(stage for _, stage, _ in result.refused)
    for facts, _ in result.clips:
        progress.copied += bool(facts["source_facts"].get("copied"))
        if facts["not_copied"] is not None:
            progress.not_copied[facts["not_copied"]] += 1


_Place = tuple[PlannedShard, int, SourceVideo]  # which video of which shard a job cuts


def _jobs(plan: Plan, shards: Sequence[PlannedShard]) -> Iterator[Job[_Place]]:
    for shard in shards:
        for number, video in enumerate(plan.videos[shard.start : shard.stop]):
            message = {
                "url": video_url(plan.root, video),
                "start": video.start_seconds,
                "end": video.end_seconds,
                "listed": "://" in video.source or "::" in video.source,
            }
            yield Job(message=message, context=(shard, number, video))


def _add_video(writer: ShardWriter, plan: Plan, place: _Place, result: VideoResult) -> None:
    shard, number, video = place
    for facts, data in result.clips:
        mp4, flow = data[: len(data) - facts["flow_bytes"]], data[len(data) - facts["flow_bytes"] :]
        key = f"{shard.shard:06d}-{number:05d}-{facts['clip']:05d}"
        row: SampleRow = {
            "key": key,
            "video_id": video.video_id,
            "source": without_secrets(video.source),
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
        sample_json = _sample_json(plan, video, facts, row)
        hashes = tuple(facts["picture_hashes"])
        writer.add(mp4=mp4, flow=flow, facts=sample_json, picture_hashes=hashes, **row)
    for clip, stage, reason in result.refused:
        writer.refuse(
            Refused(
                video_id=video.video_id,
                source=without_secrets(video.source),
                clip=clip,
                stage=stage,
                reason=reason.replace(video.source, without_secrets(video.source)),
            )
        )


def _sample_json(plan: Plan, video: SourceVideo, facts: ClipFacts, row: SampleRow) -> dict[str, object]:
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
