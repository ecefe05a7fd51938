"""``cliplift check``: would this run work, fit and end in time? Asked before it is queued, answered in one table.

Nothing is trained: data are opened and a few clips decoded, the model is built without memory, and what a step
needs is measured on fake tensors. A row that fails names the number to change.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cliplift.configs.sections import ConfigError
from cliplift.configs.training import TrainingRun
from cliplift.launch.check.cost import Cost, check_cost
from cliplift.launch.check.findings import Finding
from cliplift.launch.check.machine import Machine
from cliplift.models.protocol import ModelError
from cliplift.pipelines.data.clip_plan import doubts_about
from cliplift.pipelines.data.loader import ClipLoader
from cliplift.pipelines.data.source import ClipSource
from cliplift.pipelines.engine.deepspeed_setup import batch_split, data_ranks
from cliplift.pipelines.stages.run import check_model, stage_of
from cliplift.sharding.manifest import Dataset, ManifestError, dataset_fingerprint
from cliplift.sharding.read.generations import open_dataset
from cliplift.sharding.scoring.census import census
from cliplift.sharding.storage import StorageError, Store

UNREADABLE = (ConfigError, ManifestError, StorageError, OSError)


@dataclass
class Known:
    """What earlier checks have found; a later one that needs something missing yields nothing."""

    train: ClipSource | None = None
    classes: tuple[str, ...] = ()


def check(run: TrainingRun, machine: Machine, *, mfu: float | None, runs: int = 1) -> list[Finding]:
    """All checks of a run, in the order in which one would repair it; ``runs`` like it are to be made."""
    known = Known()
    findings = check_fit(run, machine, known)
    if not any(f.status == "fail" and f.subject in ("model", "batch") for f in findings):
        cost = Cost(
            run=run, machine=machine, classes=len(known.classes), train=known.train, mfu=mfu, runs=runs
        )
        findings += check_cost(cost)
    return [*findings, *check_tracking(run)]


def check_fit(run: TrainingRun, machine: Machine, known: Known) -> list[Finding]:
    """Whether data, batch, model and weights fit together; fills in what is ``known``."""
    findings = [Finding("ok", "run", f"{run.stage} {run.name} on {machine.text}")]
    looks: tuple[Callable[[TrainingRun, Machine, Known], Iterator[Finding]], ...] = (
        _training_data,
        _filter,
        _other_splits,
        _labels,
        _batches,
        _order,
        _model,
        _sources,
    )
    for look in looks:
        findings += look(run, machine, known)
    return findings


def _training_data(run: TrainingRun, _: Machine, known: Known) -> Iterator[Finding]:
    whole = True
    for url in run.data.urls:
        try:
            store, dataset = open_dataset(url)
        except UNREADABLE as error:
            yield Finding("fail", "data", f"{url}: {error}")
            whole = False
            continue
        again = dataset_fingerprint(dataset.name, dataset.classes, dataset.shards, dataset.samples_sha256)
        text = f"{url}: fingerprint {dataset.fingerprint[:12]}"
        if again != dataset.fingerprint:
            remedy = "the manifest was changed by hand: run `cliplift shard` with --phase finalize"
            yield Finding("fail", "data", f"{text} is not its content's", remedy)
            whole = False
            continue
        yield Finding("ok", "data", f"{text}, {dataset.samples} clips in {len(dataset.shards)} shards")
        yield from _missing_shards(store, dataset)
    if not whole:
        return
    try:
        known.train = ClipSource(run.data, split=run.data.split, seed=run.seed)
    except UNREADABLE as error:
        yield Finding("fail", f"data, {run.data.split}", str(error))
        return
    known.classes = tuple(known.train.classes)
    yield Finding("ok", f"data, {run.data.split}", f"{len(known.train)} clips")


def _filter(run: TrainingRun, _: Machine, known: Known) -> Iterator[Finding]:
    """What ``data.where`` leaves of each dataset; of other splits than training's it is told and not used."""
    where = run.data.where
    if where is None or known.train is None:
        return
    for url in run.data.urls:
        for split in census(url, where, fold=run.data.fold):
            used = split.split == run.data.split
            text = f"{url}, {split.split}: {split.left} of {split.clips} clips"
            worst = sorted(split.classes.items(), key=lambda item: (item[1][0] / item[1][1], item[0]))[:3]
            text += "; " + ", ".join(f"{name} {left} of {clips}" for name, (left, clips) in worst)
            remedy = "" if used else "evaluation takes all of them"
            if used and split.lost:
                remedy = (
                    f"nothing is left of {len(split.lost)} classes, such as {split.lost[0]}: relax data.where"
                )
            yield Finding("note" if remedy else "ok", "data.where", text, remedy)


def _missing_shards(store: Store, dataset: Dataset) -> Iterator[Finding]:
    wrong = [s.file for s in dataset.shards if store.size(s.file) != s.bytes]
    if wrong:
        remedy = f"copy {wrong[0]} again, or build it again with `cliplift shard`"
        yield Finding("fail", "shards", f"{len(wrong)} of {len(dataset.shards)} missing or cut short", remedy)


def _other_splits(run: TrainingRun, _: Machine, known: Known) -> Iterator[Finding]:
    if known.train is None:
        return
    for split in stage_of(run).splits().values():
        try:
            found = ClipSource(run.data, split=split)
        except UNREADABLE as error:
            yield Finding("fail", f"data, {split}", str(error))
            continue
        yield Finding("ok", f"data, {split}", f"{len(found)} clips")


def _labels(run: TrainingRun, _: Machine, known: Known) -> Iterator[Finding]:
    stage = stage_of(run)
    if known.train is None:
        return
    if not stage.needs_labels:
        if stage.needs_videos == 1:
            return
        videos = len(np.unique(known.train.video_index))
        enough = videos >= stage.needs_videos
        remedy = "" if enough else f"correspondence.negatives_per_clip={max(1, videos - 1)}, or more videos"
        yield Finding(
            "ok" if enough else "fail", "videos", f"{videos} source videos to draw negatives from", remedy
        )
        return
    labels = known.train.labels
    K, unlabelled = len(known.classes), int((labels < 0).sum())
    if not K or unlabelled:
        text = f"{K} classes, {unlabelled} of {len(labels)} clips without a label"
        yield Finding("fail", "labels", text, "shard a labelled source, or run transfer, which needs none")
        return
    if int(labels.max()) >= K:
        yield Finding(
            "fail", "labels", f"label {int(labels.max())} of {K} classes", "finalize the shards again"
        )
        return
    counts = np.bincount(labels, minlength=K)
    empty = [known.classes[i] for i in np.flatnonzero(counts == 0)]
    text = f"{K} classes with {int(counts.min())} to {int(counts.max())} clips"
    remedy = f"{len(empty)} classes have no training clip, such as {empty[0]}" if empty else ""
    yield Finding("note" if empty else "ok", "labels", text, remedy)
    for key, doubt in doubts_about(run.data, known.classes):
        yield Finding("note", key, doubt)


def _batches(run: TrainingRun, machine: Machine, known: Known) -> Iterator[Finding]:
    G, N = run.engine.global_batch, machine.world_size
    try:
        micro_batch, accumulation = batch_split(run, world_size=N)
    except ConfigError as error:
        yield Finding("fail", "batch", str(error))
        return
    N, shared = data_ranks(run.engine, world_size=N), run.engine.sequence_parallel
    dealt_to = f"{N} ranks" if shared == 1 else f"{N} groups of {shared} ranks"
    text = f"{G} clips = {dealt_to} x {micro_batch} x {accumulation} accumulation steps"
    if known.train is None:
        yield Finding("ok", "batch", text)
        return
    try:
        loader = ClipLoader(
            run.data, seed=run.seed, global_batch=G, micro_batch=micro_batch, rank=0, world_size=N
        )
    except ConfigError as error:
        most = len(known.train) * run.data.clips_per_sample // N * N
        remedy = f"engine.global_batch={most} or less" if 0 < most < G else ""
        yield Finding("fail", "batch", f"{text}; {error}", remedy)
        return
    left = loader.num_samples - loader.steps_per_epoch * loader.samples_per_step
    loader.close()
    yield Finding(
        "ok",
        "batch",
        f"{text}; {loader.steps_per_epoch} steps per epoch, {left} clips of each epoch left out",
    )


def _order(run: TrainingRun, machine: Machine, known: Known) -> Iterator[Finding]:
    if known.train is None:
        return
    data, shards = run.data, len(known.train.shard_ranges)
    readers = machine.world_size * max(1, data.workers)
    text = f"{shards} shards for {readers} readers, order {data.order}"
    if data.order == "windowed" and shards < data.streams:
        # Every reader takes any sample, so few shards starve nobody; they only make the windows more alike.
        remedy = f"data.streams={shards}: there are no more shards to read side by side"
        yield Finding("note", "reading", text, remedy)
        return
    yield Finding("ok", "reading", text)


def _model(run: TrainingRun, _: Machine, known: Known) -> Iterator[Finding]:
    from cliplift.models.measure import measure_model

    classes = len(stage_of(run, classes=known.classes).classes)
    try:
        check_model(run)
        found = measure_model(
            run.model.name,
            num_classes=classes,
            in_frames=run.data.sampling.frames,
            crop=run.data.crop_pixels,
            **{name: value for name, value in run.model.options.items() if name != "crop"},
        )
    except (ModelError, ConfigError) as error:
        yield Finding("fail", "model", str(error))
        return
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        remedy = (
            "change data.sampling.frames or data.crop_pixels; `cliplift models` shows what it was made for"
        )
        frames, side = run.data.sampling.frames, run.data.crop_pixels
        yield Finding(
            "fail", "model", f"{run.model.name} cannot take {frames} frames of {side} px: {first}", remedy
        )
        return
    shapes = "x".join(map(str, found.input_shape)), "x".join(map(str, found.feature_shape))
    text = f"{run.model.name}: {shapes[0]} -> {shapes[1]} -> {found.feature_dim} features"
    yield Finding("ok", "model", f"{text}, {found.parameters:,} parameters, {found.gmacs:.2f} GMACs per clip")


def _sources(run: TrainingRun, _: Machine, __: Known) -> Iterator[Finding]:
    """Weights the run starts from: a stage of a chain may still have to write them."""
    named = {"model.pretrained": run.model.pretrained}
    named["initialise_from"] = getattr(run, "initialise_from", None)
    for key, value in named.items():
        if value is None or value.removeprefix("2d:") in ("imagenet",):
            continue
        exists = Path(value.removeprefix("2d:")).exists()
        remedy = "" if exists else "run the stage that writes it first"
        yield Finding("ok" if exists else "note", key, value if exists else f"{value} does not exist", remedy)


def check_tracking(run: TrainingRun) -> Iterator[Finding]:
    from cliplift.sharding.build.tracking import wandb_mode

    mode = wandb_mode(run.track.wandb, os.environ)
    if mode != "online":
        yield Finding(
            "ok", "wandb", f"{mode}; metrics.jsonl holds every number" if mode == "disabled" else mode
        )
        return
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    problem = unreachable(host)
    remedy = "track.wandb=offline, and `wandb sync` later" if problem else ""
    yield Finding("fail" if problem else "ok", "wandb", f"{host}: {problem or 'reachable'}", remedy)


def unreachable(url: str, *, seconds: float = 5.0) -> str | None:
    """Why nothing listens at a URL, or None."""
    import socket
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=seconds):
            return None
    except OSError as error:
        return str(error)
