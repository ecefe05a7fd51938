"""``cliplift check``: would this run work, fit and end in time? Asked before it is queued, answered in one table.

Nothing is trained: data are opened and a few clips decoded, the model is built without memory, and what a step
needs is measured on fake tensors. A row that fails names the number to change.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cliplift.configs.runs import ClassificationRun, FinetuneRun, TransferRun
from cliplift.configs.sections import ConfigError
from cliplift.launch.check_cost import Cost, check_cost
from cliplift.launch.doctor import memory_bytes, usable_cores
from cliplift.launch.findings import Finding, exit_code, table
from cliplift.launch.jobs import load
from cliplift.launch.machine import Machine, choose_machine
from cliplift.models.registry import ModelError
from cliplift.pipelines.deepspeed_config import batch_split
from cliplift.sharding.manifest import ManifestError, dataset_fingerprint
from cliplift.sharding.reader import ShardDataset, read_dataset
from cliplift.sharding.storage import StorageError, open_store

UNREADABLE = (ConfigError, ManifestError, StorageError, OSError)


@dataclass
class Known:
    """What the looks before have found; a later look that needs something missing says nothing."""

    train: list[ShardDataset] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    micro_batch: int = 0
    accumulation: int = 0

    @property
    def samples(self) -> int:
        return sum(len(one) for one in self.train)


def run_check(arguments: argparse.Namespace) -> int:
    loaded = load(arguments.subject, arguments.rest)
    run = loaded.run
    if not isinstance(run, TransferRun | ClassificationRun):
        raise ConfigError(
            f"is {getattr(run, 'stage', '')!r}, which does not train",
            key="stage",
            file=str(loaded.file),
            hint="check takes transfer, pretrain and finetune; `cliplift verify` checks shards",
        )
    machine = choose_machine(
        nodes=arguments.nodes,
        gpus=arguments.gpus,
        gpu=arguments.gpu,
        memory_gib=arguments.memory,
        cores=arguments.cores,
        cores_here=usable_cores(),
        memory_here=memory_bytes(),
    )
    findings = check(run, machine, mfu=arguments.mfu)
    print(table(findings))
    return exit_code(findings)


def check(run: TransferRun | ClassificationRun, machine: Machine, *, mfu: float | None) -> list[Finding]:
    """Every look at a run, in the order one would repair it."""
    known = Known()
    findings = check_fit(run, machine, known)
    if not any(f.status == "fail" and f.subject in ("model", "batch") for f in findings):
        cost = Cost(run=run, machine=machine, classes=len(known.classes), train=known.train, mfu=mfu)
        findings += check_cost(cost)
    return [*findings, *check_tracking(run)]


def check_fit(run: TransferRun | ClassificationRun, machine: Machine, known: Known) -> list[Finding]:
    """Whether data, batch, model and weights fit together; fills in what is ``known``."""
    findings = [Finding("ok", "run", f"{run.stage} {run.name} on {machine.text}")]
    looks: tuple[Callable[[TransferRun | ClassificationRun, Machine, Known], Iterator[Finding]], ...] = (
        _training_data,
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


def _training_data(run: TransferRun | ClassificationRun, _: Machine, known: Known) -> Iterator[Finding]:
    data = run.data
    for url in data.shards:
        try:
            dataset = read_dataset(open_store(url))
            opened = ShardDataset(url, split=data.split, fold=data.fold)
        except UNREADABLE as error:
            yield Finding("fail", "data", f"{url}: {error}")
            continue
        again = dataset_fingerprint(dataset.name, dataset.classes, dataset.shards, dataset.samples_sha256)
        if again != dataset.fingerprint:
            remedy = "the manifest was changed by hand: run `cliplift shard` with --phase finalize"
            yield Finding(
                "fail", "data", f"{url}: fingerprint {dataset.fingerprint[:12]} is not its content's", remedy
            )
            continue
        known.train.append(opened)
        text = f"{url}: {len(opened)} clips in {len(opened.shards)} shards, fingerprint {dataset.fingerprint[:12]}"
        yield Finding("ok", f"data, {data.split}", text)
        yield from _missing_shards(url, opened)
    if known.train:
        known.classes = known.train[0].classes


def _missing_shards(url: str, dataset: ShardDataset) -> Iterator[Finding]:
    store = open_store(url)
    wrong = [s.file for s in dataset.shards if store.size(s.file) != s.bytes]
    if wrong:
        remedy = f"copy {wrong[0]} again, or build it again with `cliplift shard`"
        yield Finding("fail", "shards", f"{len(wrong)} of {len(dataset.shards)} missing or cut short", remedy)


def _other_splits(run: TransferRun | ClassificationRun, _: Machine, known: Known) -> Iterator[Finding]:
    if not known.train:
        return
    splits = [run.data.val_split, *([run.test_split] if isinstance(run, FinetuneRun) else [])]
    for split in splits:
        try:
            found = [ShardDataset(url, split=split, fold=run.data.fold) for url in run.data.shards]
        except UNREADABLE as error:
            yield Finding("fail", f"data, {split}", str(error))
            continue
        yield Finding("ok", f"data, {split}", f"{sum(len(one) for one in found)} clips")


def _labels(run: TransferRun | ClassificationRun, _: Machine, known: Known) -> Iterator[Finding]:
    if not known.train:
        return
    different = [one.url for one in known.train if one.classes != known.classes]
    if different:
        yield Finding("fail", "labels", f"{different[0]} has other classes than {known.train[0].url}",
                      "build both with the same class list")  # fmt: skip
        return
    if isinstance(run, TransferRun):
        videos = len({v for one in known.train for v in one.column("video_id")})
        enough = videos > run.correspondence.negatives_per_clip
        remedy = "" if enough else f"correspondence.negatives_per_clip={max(1, videos - 1)}, or more videos"
        yield Finding(
            "ok" if enough else "fail", "videos", f"{videos} source videos to draw negatives from", remedy
        )
        return
    labels = np.concatenate([one.labels for one in known.train])
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


def _batches(run: TransferRun | ClassificationRun, machine: Machine, known: Known) -> Iterator[Finding]:
    G, N = run.engine.global_batch, machine.world_size
    try:
        known.micro_batch, known.accumulation = batch_split(run, world_size=N)
    except ConfigError as error:
        yield Finding("fail", "batch", str(error))
        return
    text = f"{G} clips = {N} ranks x {known.micro_batch} x {known.accumulation} accumulation steps"
    if not known.train:
        yield Finding("ok", "batch", text)
        return
    if known.samples < G:
        yield Finding("fail", "batch", f"{text}, and the split has {known.samples}",
                      f"engine.global_batch={max(1, known.samples // N * N)} or less")  # fmt: skip
        return
    steps, left = divmod(known.samples, G)
    yield Finding("ok", "batch", f"{text}; {steps} steps an epoch, {left} clips of each epoch left out")


def _order(run: TransferRun | ClassificationRun, machine: Machine, known: Known) -> Iterator[Finding]:
    if not known.train:
        return
    data = run.data
    shards = sum(len(one.shards) for one in known.train)
    readers = machine.world_size * max(1, data.workers)
    text = f"{shards} shards for {readers} readers, order {data.order}"
    if data.order == "windowed" and shards < data.streams:
        # Every reader takes any sample, so few shards starve nobody; they only make the windows more alike.
        yield Finding(
            "note", "reading", text, f"data.streams={shards}: there are no more shards to read side by side"
        )
        return
    yield Finding("ok", "reading", text)


def _model(run: TransferRun | ClassificationRun, _: Machine, known: Known) -> Iterator[Finding]:
    from cliplift.models.measure import measure_model
    from cliplift.pipelines.stage import check_model

    options = dict[str, Any](run.model.options)
    classes = len(known.classes) if isinstance(run, ClassificationRun) else 0
    try:
        check_model(run)
        found = measure_model(
            run.model.name,
            num_classes=classes,
            in_frames=run.data.sampling.frames,
            crop=run.data.crop_pixels,
            **options,
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
    yield Finding("ok", "model", f"{text}, {found.parameters:,} parameters, {found.gmacs:.2f} GMACs a clip")


def _sources(run: TransferRun | ClassificationRun, _: Machine, __: Known) -> Iterator[Finding]:
    """Weights the run starts from: a stage of a chain may still have to write them."""
    named = {"model.pretrained": run.model.pretrained}
    if isinstance(run, ClassificationRun):
        named["initialise_from"] = run.initialise_from
    for key, value in named.items():
        if value is None or value.removeprefix("2d:") in ("imagenet",):
            continue
        exists = Path(value.removeprefix("2d:")).exists()
        remedy = "" if exists else "run the stage that writes it first"
        yield Finding("ok" if exists else "note", key, value if exists else f"{value} does not exist", remedy)


def check_tracking(run: TransferRun | ClassificationRun) -> Iterator[Finding]:
    from cliplift.pipelines.tracking import wandb_mode

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
