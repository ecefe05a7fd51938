"""Index WebDataset tars that were written by others, so that they can be read by number, checked and verified.

The tars are not changed. Each video is decoded in full in an isolated process: only clips whose frames are all there
and evenly spaced in time are taken, the others are in the ledger.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import LimitsConfig
from cliplift.sharding.build.finalize import describe, write_tables
from cliplift.sharding.build.pool import Job, WorkerPool
from cliplift.sharding.build.worker import ClipFacts, decoding_settings, decoding_task
from cliplift.sharding.manifest import (
    FOREIGN,
    NO_LABEL,
    REFUSED_FILE,
    SAMPLES_FILE,
    Dataset,
    Refused,
    Sample,
    ShardIndex,
    canonical,
    digest,
    dump_index,
    index_file,
)
from cliplift.sharding.read.generations import refuse_generations
from cliplift.sharding.scratch import local_copy, scratch_folder
from cliplift.sharding.sources.files import LeftOut, find_files, is_hidden, warn_left_out
from cliplift.sharding.sources.labels import number_labels
from cliplift.sharding.sources.tars import TarVideo, read_tar
from cliplift.sharding.storage import StorageError, Store, join, open_store

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class _Found:
    """One sample of a foreign tar: its video member, its json member, and what they say."""

    sample: Sample
    label: str | None


@dataclass(frozen=True)
class _Scan:
    """What one tar holds."""

    found: tuple[_Found, ...]
    left_out: tuple[LeftOut, ...]
    tar_bytes: int
    sha256: str


def index_tars(
    url: str,
    *,
    name: str,
    label_key: str = "label",
    classes: tuple[str, ...] = (),
    workers: int = 0,
    clip_timeout_seconds: float = 60.0,
) -> Dataset:
    """Write an index beside every tar below ``url``, then the dataset's table and manifest.

    Args:
        url: folder or URL of the tars; the folder a tar lies in is its split, ``train`` where there is none.
        name: name of the dataset.
        label_key: key of the json member that holds the class; a ``.cls`` member goes before it.
        classes: class names in label order; empty sorts the values found.
        workers: processes that decode; 0 is one per core.
        clip_timeout_seconds: a clip not decoded in this time is refused.

    Raises:
        ConfigError: there is no tar, or no video in the tars, or the dataset has several generations.
    """
    store = open_store(url)
    refuse_generations(store, hint="index copies of the tars elsewhere")
    below = find_files(store)
    warn_left_out(url, [item for item in below.left_out if not is_hidden(item.name)])
    tars = [file for file in below.files if file.endswith(".tar")]
    if not tars:
        raise ConfigError("holds no .tar", key="url", value=url)
    scanned = [_scan(store, tar, label_key) for tar in tars]
    names, labels = number_labels(
        [f.label for scan in scanned for f in scan.found], classes, key="classes", positions=True
    )
    numbers = iter(labels)
    checked = _check(url, tars, scanned, workers=workers, timeout=clip_timeout_seconds)
    indexes = []
    for shard, (tar, scan) in enumerate(zip(tars, scanned, strict=True)):
        split = PurePosixPath(tar).parent.name or "train"
        samples = []
        refused = [Refused(i.name, tar, clip=0, stage="read", reason=i.reason) for i in scan.left_out]
        for item in scan.found:
            sample = replace(item.sample, split=split, label=next(numbers))
            facts, reason = next(checked)
            if facts is None:
                refused.append(Refused(sample.video_id, tar, clip=0, stage="decode", reason=reason))
            else:
                samples.append(_described(sample, facts))
        indexes.append(
            ShardIndex(
                shard=shard,
                split=split,
                tar=tar,
                tar_bytes=scan.tar_bytes,
                tar_sha256=scan.sha256,
                plan_id=FOREIGN + scan.sha256,
                samples=tuple(samples),
                refused=tuple(refused),
            )
        )
    return _write(indexes, store, name=name, classes=names)


def _write(indexes: list[ShardIndex], store: Store, *, name: str, classes: tuple[str, ...]) -> Dataset:
    ledger = [canonical({"shard": i.shard, **vars(r)}) + b"\n" for i in indexes for r in i.refused]
    store.write(REFUSED_FILE, b"".join(ledger))
    if not any(index.samples for index in indexes):
        refused = [r for index in indexes for r in index.refused]
        first = (
            f"; {len(refused)} are refused, the first, {refused[0].video_id}: {refused[0].reason}"
            if refused
            else ""
        )
        raise ConfigError(f"the tars hold no video that decodes{first}", key="url", value=store.url)
    plan_id = FOREIGN + digest(canonical([index.tar_sha256 for index in indexes]))
    indexes = [replace(index, plan_id=plan_id) for index in indexes]
    with scratch_folder() as folder:
        dataset = describe(
            indexes,
            table=folder / SAMPLES_FILE,
            name=name,
            classes=classes,
            folds=0,
            missing=0,
            plan_id=plan_id,
            settings={"indexed": store.url},
        )
        for index in indexes:
            store.write(index_file(index.tar), dump_index(index))
        return write_tables(dataset, folder / SAMPLES_FILE, store)


def _scan(store: Store, tar: str, label_key: str) -> _Scan:
    """One pass over a tar: its samples (runs of members with one key), its size and its sha256."""
    with local_copy(store, tar) as path:
        return _scan_file(path, label_key)


def _scan_file(path: Path, label_key: str) -> _Scan:
    with path.open("rb") as raw:
        sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
        content = read_tar(path, label_key=label_key)
        found = tuple(_hash_video(video, raw) for video in content.videos)
    left_out = content.left_out
    if content.damage:
        left_out += (LeftOut("(the rest of the tar)", f"the tar is damaged: {content.damage}"),)
    return _Scan(found, left_out, path.stat().st_size, sha256)


def _hash_video(video: TarVideo, file: BinaryIO) -> _Found:
    """The sample of a video member: one read for its crc32 and its sha256."""
    crc32, sha256 = 0, hashlib.sha256()
    file.seek(video.member.offset)
    left = video.member.size
    while left:
        part = file.read(min(CHUNK_BYTES, left))
        if not part:
            raise StorageError(f"the tar ends inside {video.key}; it was complete before")
        crc32, left = zlib.crc32(part, crc32), left - len(part)
        sha256.update(part)
    sample = Sample(
        key=video.key,
        mp4_offset=video.member.offset,
        mp4_bytes=video.member.size,
        mp4_crc32=crc32,
        json_offset=video.json_member.offset if video.json_member else 0,
        json_bytes=len(video.json_data),
        json_crc32=zlib.crc32(video.json_data),
        video_id=video.source,
        source=video.source,
        split="",
        label=NO_LABEL,
        labels=(),
        folds=(),
        group=None,
        start_seconds=0.0,
        end_seconds=0.0,
        num_frames=0,
        fps=0.0,
        width=0,
        height=0,
        keyframes=(),
        source_sha256=sha256.hexdigest(),
    )
    return _Found(sample, video.label)


def _check(
    url: str, tars: list[str], scanned: list[_Scan], *, workers: int, timeout: float
) -> Iterator[tuple[ClipFacts | None, str]]:
    """Decode every video in full; per sample its facts, or the reason why it is refused."""
    # As much memory as a build's workers have: a picture may claim any size.
    settings = decoding_settings(memory_mib=LimitsConfig().memory_mib)
    jobs = [
        Job(decoding_task(f.sample, join(url, tar)), None)
        for tar, scan in zip(tars, scanned, strict=True)
        for f in scan.found
    ]
    count = max(1, min(workers or len(os.sched_getaffinity(0)), len(jobs)))
    with WorkerPool[None](workers=count, settings=settings, clip_timeout_seconds=timeout, attempts=1) as pool:
        for _, result in pool.run(jobs):
            if result.refused:
                yield None, result.refused[0][2]
                continue
            yield result.clips[0][0], ""


def _described(sample: Sample, facts: ClipFacts) -> Sample:
    """The sample with what its full decode found."""
    fps = facts["fps"][0] / facts["fps"][1]
    return replace(
        sample,
        num_frames=facts["num_frames"],
        fps=fps,
        width=facts["width"],
        height=facts["height"],
        keyframes=tuple(facts["keyframes"]),
        end_seconds=round(facts["num_frames"] / fps, 6),
    )
