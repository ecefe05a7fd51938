"""The closing check of ``verify``: stored clips decoded in full once more, and clips that look alike."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from cliplift.configs.sharding import TranscodeConfig, WholeCut
from cliplift.sharding.video.picture_hash import near_duplicates
from cliplift.sharding.manifest import Dataset, Sample, ShardFacts
from cliplift.sharding.build.pool import Job, VideoResult, WorkerPool
from cliplift.sharding.storage import join

DecodeExtent = Literal["none", "sample", "full"]
SAMPLE_EVERY = 50  # "sample" decodes the first clip of every shard and one in fifty of the others


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. ``error`` makes the verification fail; a warning is for the reader to judge."""

    kind: str
    file: str
    detail: str
    error: bool = True


def decode_clips(
    dataset: Dataset,
    samples: Sequence[Sample],
    url: str,
    *,
    extent: DecodeExtent,
    workers: int,
    timeout: float,
) -> tuple[list[Problem], int]:
    """Decode stored clips in isolated processes; what is wrong, and how many were decoded.

    Args:
        dataset: the manifest.
        samples: all samples, in the order of the shards.
        url: folder or URL of the dataset.
        extent: all clips, or one in :data:`SAMPLE_EVERY` of every shard.
        workers: processes; 0 is one per core.
        timeout: a clip not decoded in this time is an error, seconds.
    """
    jobs = list(_jobs(dataset, samples, url, extent))
    hello = {
        "cut": WholeCut().model_dump(),
        "transcode": TranscodeConfig().model_dump(mode="json"),
        "memory_mib": None,
    }
    problems: list[Problem] = []
    looks: list[list[int]] = []
    count = min(workers or len(os.sched_getaffinity(0)), max(1, len(jobs)))
    with WorkerPool(workers=count, hello=hello, clip_timeout_seconds=timeout, attempts=1) as pool:
        for job, result in pool.run(jobs):
            looks.append(result.clips[0][0]["look"] if result.clips else [])
            problems += _wrong(*job.tag, result)
    problems += _look_alikes([job.tag[1] for job in jobs], looks)
    return problems, len(jobs)


def _jobs(
    dataset: Dataset, samples: Sequence[Sample], url: str, extent: DecodeExtent
) -> Iterator[Job[tuple[ShardFacts, Sample]]]:
    number = 0
    for shard in dataset.shards:
        for i, sample in enumerate(samples[number : number + shard.samples]):
            if extent == "full" or i % SAMPLE_EVERY == 0:
                place = {"offset": sample.mp4_offset, "bytes": sample.mp4_bytes}
                yield Job({"check": True, "url": join(url, shard.file), **place}, (shard, sample))
        number += shard.samples


def _wrong(shard: ShardFacts, sample: Sample, result: VideoResult) -> Iterator[Problem]:
    """What a full decode of one clip contradicts."""
    member = f"{sample.key}.mp4"
    for _, _, reason in result.refused:
        yield Problem("decode", shard.file, f"{member}: {reason}")
    for found, _ in result.clips:
        expected = {name: getattr(sample, name) for name in ("num_frames", "width", "height")}
        expected["keyframes"] = list(sample.keyframes)
        wrong = [name for name, value in expected.items() if found[name] != value]
        if wrong:
            detail = f"{member}: {wrong[0]} is {found[wrong[0]]}, the index says {expected[wrong[0]]}"
            yield Problem("decode", shard.file, detail)


def _look_alikes(samples: Sequence[Sample], looks: Sequence[Sequence[int]]) -> Iterator[Problem]:
    """Clips of different videos that look alike, as warnings: a hash of few bits is a hint, not a proof."""
    for first, second in near_duplicates(looks):
        a, b = samples[first], samples[second]
        if a.video_id == b.video_id or a.source_sha256 == b.source_sha256:
            continue  # windows of one video, or exact copies, which are reported as such
        where = ", in another split" if (a.split, a.folds) != (b.split, b.folds) else ""
        yield Problem("near-duplicate", a.source, f"looks like {b.source}{where}", error=False)
