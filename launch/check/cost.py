"""What a run costs: memory of a rank, hours, processor cores and bandwidth to feed it, disk for its checkpoints."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from cliplift.configs.sections import ConfigError
from cliplift.configs.training import TrainingRun
from cliplift.launch.check.findings import Finding
from cliplift.launch.check.machine import ASSUMED_MFU, FP32_SHARE, Machine
from cliplift.pipelines.checkpoints.folder import checkpoint_bytes
from cliplift.pipelines.cost.memory_plan import MemoryPlan, Sizes, parts, plan_memory
from cliplift.pipelines.data.failures import TooManyFailuresError
from cliplift.pipelines.data.loader import ClipLoader
from cliplift.pipelines.data.source import ClipSource
from cliplift.pipelines.engine.deepspeed_setup import batch_split
from cliplift.pipelines.engine.optim import optimizer_moments, total_steps
from cliplift.pipelines.engine.task import as_trained
from cliplift.pipelines.runs.folder import HISTORY, RUN
from cliplift.pipelines.stages.run import stage_of
from cliplift.sharding.read.reader import ShardReadError

GIB = 2**30
# Driver context, NCCL's buffers, cuDNN workspaces; and what the caching allocator cannot use for its fragments.
GPU_RESERVE_BYTES, FRAGMENTS_SHARE = 2.0 * GIB, 0.05
CPU_RESERVE_BYTES = 1.0 * GIB  # the interpreter with torch and DeepSpeed, measured at 0.7
MEASURED_FLOPS = 2e11  # a larger CPU step is not tried: it would take longer than reading the table
DECODED_CLIPS = 8
SAVING_SHARE = 0.05  # of the time between checkpoints that training may stand still for one


class Speed(NamedTuple):
    """Clips per second of the whole run, and where the number is from."""

    clips_per_second: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A run on a machine, with what is known of its data."""

    run: TrainingRun
    machine: Machine
    classes: int
    train: ClipSource | None
    mfu: float | None
    runs: int = 1  # of folds and seeds, of which this is the first

    @property
    def samples(self) -> int:
        return 0 if self.train is None else len(self.train) * self.run.data.clips_per_sample

    def planned(self, **engine: float | str) -> tuple[MemoryPlan, Sizes]:
        """The memory plan with other engine settings."""
        run = self.run.model_copy(update={"engine": self.run.engine.model_copy(update=engine)})
        classes = self.classes or 1
        return plan_memory(
            run, classes=classes, world_size=self.machine.world_size, on_gpu=self.machine.gpu is not None
        )

    @cached_property
    def flops_per_clip(self) -> float | None:
        """Operations of a training step on one clip, None where they cannot be counted."""
        return stage_of(self.run, classes=[str(k) for k in range(self.classes)]).flops_per_clip

    def fits(self, plan: MemoryPlan) -> bool:
        return plan.total + self.reserve_bytes <= self.machine.memory_per_rank

    @property
    def reserve_bytes(self) -> float:
        if self.machine.gpu is None:
            return CPU_RESERVE_BYTES
        return GPU_RESERVE_BYTES + FRAGMENTS_SHARE * self.machine.memory_bytes


def check_cost(cost: Cost) -> Iterator[Finding]:
    """Rows on memory, time, feeding and disk."""
    plan, sizes = cost.planned()
    yield from _memory(cost, plan)
    flops = cost.flops_per_clip
    speed = estimated_speed(cost, flops, plan)
    yield from _time(cost, flops, speed)
    if cost.train is not None:
        yield from _feeding(cost, cost.train, speed)
    yield from check_disk(cost, sizes)
    yield from check_saving(cost, sizes, speed)


def _memory(cost: Cost, plan: MemoryPlan) -> Iterator[Finding]:
    what = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts(plan) if size)
    room = cost.machine.memory_per_rank / GIB
    text = f"{plan.total / GIB:.2f} GiB ({what}) + {cost.reserve_bytes / GIB:.1f} reserve, of {room:.1f}"
    kind = "GPU" if cost.machine.gpu else "rank"
    if cost.fits(plan):
        yield Finding("ok", f"memory per {kind}", text)
    else:
        yield Finding("fail", f"memory per {kind}", text, _less_memory(cost))
    yield Finding("ok", "activations", _recomputation(cost, plan))


def _recomputation(cost: Cost, plan: MemoryPlan) -> str:
    """What is kept from forward to backward, and what all would be if blocks were recomputed otherwise."""
    engine = cost.run.engine
    share, selective = engine.checkpoint_blocks_share, engine.recompute == "selective"
    kept = f"{plan.saved_activations / GIB:.3f} GiB kept for backward at checkpoint_blocks_share={share:g}"
    if selective:  # what is kept of a block beside its input is nothing that autograd saves
        kept = f"checkpoint_blocks_share={share:g}, selectively"
    others: list[str] = []
    for text, other, how in (
        ("none recomputed", 0.0, "everything"),
        ("all blocks recomputed", 1.0, "everything"),
        ("all selectively", 1.0, "selective"),
    ):
        if (other, how == "selective") == (share, selective):
            continue
        try:
            else_plan, _ = cost.planned(checkpoint_blocks_share=other, recompute=how)
        except ConfigError:  # a model without named blocks
            continue
        others.append(f"{else_plan.total / GIB:.2f} with {text}")
    return "; in all ".join([kept, ", ".join(others)]) if others else kept


def _less_memory(cost: Cost) -> str:
    """The first of the usual ways that would fit: recompute, smaller micro-batches, both, partitioned weights."""
    micro_batch, _ = batch_split(cost.run, world_size=cost.machine.world_size)
    sizes = [n for n in range(micro_batch - 1, 0, -1) if micro_batch % n == 0]
    ways: list[dict[str, float | str]] = [{"checkpoint_blocks_share": 1.0, "recompute": "selective"}]
    ways.append({"checkpoint_blocks_share": 1.0})
    ways += [{"micro_batch": n} for n in sizes]
    ways += [{"micro_batch": n, "checkpoint_blocks_share": 1.0} for n in sizes]
    if cost.machine.world_size > 1 and cost.run.engine.zero_stage < 3:
        ways.append({"micro_batch": 1, "checkpoint_blocks_share": 1.0, "zero_stage": 3})
    for way in ways:
        plan, _ = cost.planned(**way)
        if cost.fits(plan):
            settings = " ".join(
                f"engine.{key}={value if isinstance(value, str) else format(value, 'g')}"
                for key, value in way.items()
            )
            return f"{settings} takes {plan.total / GIB:.2f}"
    return "too large even with micro_batch=1, recomputation and ZeRO 3: use more GPUs or a smaller model"


def estimated_speed(cost: Cost, flops: float | None, plan: MemoryPlan) -> Speed | None:
    """From this run's own log where it has one, else from the peak and MFU, else by trying a step on this CPU."""
    logged = logged_speed(Path(cost.run.output), world_size=cost.machine.world_size)
    if logged is not None and cost.mfu is None:
        return logged
    peak = cost.machine.peak_tflops
    if cost.run.track.peak_tflops is not None:
        peak = cost.run.track.peak_tflops
    if peak is not None and flops is not None:
        if cost.run.engine.precision == "fp32":
            peak *= FP32_SHARE
        mfu = ASSUMED_MFU if cost.mfu is None else cost.mfu
        rate = mfu * peak * 1e12 * cost.machine.world_size / flops
        said = "assumed: measure yours and give --mfu" if cost.mfu is None else "given"
        return Speed(rate, f"{100 * mfu:.0f} % MFU of {peak:.0f} TFLOPS, {said}")
    quick = flops is not None and flops <= MEASURED_FLOPS
    if cost.machine.gpu is None and quick and plan.total < cost.machine.memory_per_rank:
        return Speed(
            tried_speed(cost.run, cost.classes) * cost.machine.world_size, "one step tried on this CPU"
        )
    return None


def logged_speed(folder: Path, *, world_size: int) -> Speed | None:
    """The median of the run's own log, when it was made by as many ranks."""
    log, record = folder / HISTORY, folder / RUN
    if not (log.is_file() and record.is_file()):
        return None
    if json.loads(record.read_text(encoding="utf-8")).get("world_size") != world_size:
        return None
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    rates = [line["speed/clips_per_second"] for line in lines if line.get("speed/clips_per_second")]
    return Speed(median(rates), f"measured by {log}") if rates else None


def tried_speed(run: TrainingRun, classes: int) -> float:
    """Clips per second of forward and backward of a micro-batch of two on this machine, the second of two tries."""
    stage = stage_of(run, classes=[str(k) for k in range(classes)])
    built = stage.build_module(weights=False)
    module = as_trained(built, run)
    B = max(2, getattr(getattr(run, "correspondence", None), "negatives_per_clip", 0) + 1)
    inputs = stage.example_inputs(built, micro_batch=B, world_size=1)
    autocast = run.engine.precision == "autocast_bf16"
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = module(inputs)["loss"]
        loss.backward()
        seconds = time.perf_counter() - began
    return B / seconds


def _time(cost: Cost, flops: float | None, speed: Speed | None) -> Iterator[Finding]:
    schedule, G = cost.run.schedule, cost.run.engine.global_batch
    steps = schedule.steps
    if steps is None:
        if not cost.samples // G:
            return
        steps = total_steps(schedule, steps_per_epoch=cost.samples // G)
    epochs = f"{steps * G / cost.samples:.2f} epochs, " if cost.samples else ""
    operations = "" if flops is None else f", {steps * G * flops:.3g} FLOPs"
    yield Finding("ok", "length", f"{steps} steps, {epochs}{steps * G} clips{operations}")
    if speed is None:
        remedy = "give --mfu, or run a few steps: check reads the run's own log"
        yield Finding("note", "time", "the speed of this machine is not known", remedy)
        return
    hours = steps * G / speed.clips_per_second / 3600
    text = f"{hours:.2f} h at {speed.clips_per_second:.1f} clips/s ({speed.source})"
    yield Finding("ok", "time", text)
    yield from _price(cost, hours)


def _price(cost: Cost, hours: float) -> Iterator[Finding]:
    """GPU hours (node hours of a CPU run), and what they cost where a price was given; of several runs, of all."""
    machine, runs = cost.machine, cost.runs
    count, what = (machine.world_size, "GPU") if machine.gpu else (machine.nodes, "node")
    used = hours * count * runs
    text = f"{used:.{1 if used >= 10 else 2}f} {what} hours" + (f" in {runs} runs" if runs > 1 else "")
    if machine.price_per_hour is not None:
        text += f", {used * machine.price_per_hour:.2f} at {machine.price_per_hour:g} an hour"
    yield Finding("ok", "price", text)


def _feeding(cost: Cost, train: ClipSource, speed: Speed | None) -> Iterator[Finding]:
    """Cores that decode as fast as the run computes, and the bytes that takes."""
    try:
        seconds = decode_seconds(cost.run)
    except (ShardReadError, TooManyFailuresError) as error:
        yield Finding("fail", "decoding", str(error), "run `cliplift verify --decode sample` on the shards")
        return
    clip = f"{1000 * seconds:.1f} ms per clip on one core here"
    if speed is None:
        yield Finding("ok", "decoding", clip)
        return
    machine, workers = cost.machine, cost.run.data.workers
    per_node = speed.clips_per_second / machine.nodes
    cores = per_node * seconds
    text = f"{clip}: {cores:.1f} cores per node feed {per_node:.1f} clips/s"
    kept = " (from the second epoch on from memory)" if cost.run.data.cache_decoded_mib else ""
    wanted = max(1, math.ceil(cores / machine.ranks_per_node))
    if cores > machine.cores_per_node:
        share = machine.cores_per_node / cores
        remedy = f"a node has {machine.cores_per_node}: decoding allows {100 * share:.0f} % of that speed"
        yield Finding("note", "decoding", text + kept, remedy)
    elif machine.gpu is not None and workers < wanted:
        yield Finding("note", "decoding", text + kept, f"data.workers={wanted}, now {workers}")
    else:
        yield Finding("ok", "decoding", text + kept)
    stored = sum(s.bytes / s.samples for one in train.sets for s in one.shards)
    size = stored / sum(len(one.shards) for one in train.sets) / cost.run.data.clips_per_sample
    remote = any("://" in url for url in cost.run.data.urls)
    rate = f"{per_node * size / 2**20:.1f} MiB/s per node, {speed.clips_per_second * size / 2**20:.1f} in all"
    yield Finding(
        "ok", "object store" if remote else "disk reads", f"{rate} ({size / 1024:.0f} KiB per clip)"
    )


def decode_seconds(run: TrainingRun) -> float:
    """Median seconds to read, decode and cut one training clip in this process.

    Raises:
        ShardReadError: one of the clips tried cannot be read or decoded.
    """
    data = run.data.model_copy(
        update={"cache_decoded_mib": 0, "workers": 0, "order": "global", "clips_per_sample": 1}
    )
    loader = ClipLoader(data, seed=run.seed, global_batch=1, micro_batch=1, rank=0, world_size=1)
    spent = []
    try:
        began = time.perf_counter()
        for batch in loader.micro_batches(start_step=0, stop_step=min(DECODED_CLIPS, loader.num_samples)):
            if batch.failed:
                raise ShardReadError(", ".join(data.urls), "a sample", batch.failed[0])
            spent.append(time.perf_counter() - began)
            began = time.perf_counter()
    finally:
        loader.close()
    return median(spent)


def check_disk(cost: Cost, sizes: Sizes) -> Iterator[Finding]:
    run, one = cost.run, one_checkpoint_bytes(cost.run, sizes)
    kept = run.checkpoint.keep_last + 1  # a new one is whole before the oldest goes
    best = run.checkpoint.keep_best and run.evaluation.every_steps is not None
    needed = one * (kept + int(best))
    folder = Path(run.output).absolute()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    # Every rank writes its own slices, which are equal parts but for rounding.
    own = f"{one / cost.machine.world_size / GIB:.2f} written by each rank"
    stored = run.checkpoint.url is not None
    if (
        stored
    ):  # a file at a time waits on the disk of each rank for its upload; the optimizer's is the largest
        largest = max(optimizer_moments(run.optim), 1) * 4 * sizes.trained
        total, needed = needed, largest * cost.machine.ranks_per_node // cost.machine.world_size
    text = (
        f"{needed / GIB:.2f} GiB ({one / GIB:.2f} per checkpoint, {own}, {kept + int(best)} at once), "
        f"{free / GIB:.1f} free"
    )
    if stored:
        text = (
            f"{total / GIB:.2f} GiB in the store ({one / GIB:.2f} per checkpoint, {own}), "
            f"{needed / GIB:.2f} on this disk for uploads, {free / GIB:.1f} free"
        )
    if needed <= free:
        yield Finding("ok", "disk", text)
        return
    if stored:
        yield Finding("fail", "disk", text, f"free {(needed - free) / GIB:.2f} GiB at {place}")
        return
    room = int(free // one) - 1 - int(best)
    remedy = (
        f"checkpoint.keep_last={room}" if room >= 1 else f"free {(needed - free) / GIB:.2f} GiB at {place}"
    )
    yield Finding("fail", "disk", text, remedy)


def one_checkpoint_bytes(run: TrainingRun, sizes: Sizes) -> int:
    """A checkpoint of all ranks together."""
    return sizes.buffer_bytes + checkpoint_bytes(
        parameters=sizes.parameters,
        trainable=sizes.trained,
        moments=optimizer_moments(run.optim),
        averaged=run.optim.average_decay > 0,
    )


def check_saving(cost: Cost, sizes: Sizes, speed: Speed | None) -> Iterator[Finding]:
    """How long a checkpoint is written, where the bandwidth is known; and whether there is time for it between two."""
    run, machine = cost.run, cost.machine
    rate = machine.write_bytes_per_second
    if rate is None:
        return
    size = one_checkpoint_bytes(run, sizes) * machine.ranks_per_node / machine.world_size
    seconds = size / rate
    text = f"{size / GIB:.2f} GiB of each node in {seconds:.1f} s at {rate / 1e9:g} GB/s"
    asynchronous = run.checkpoint.asynchronous
    beside = machine.gpu is not None if asynchronous == "auto" else asynchronous
    text += ", while training goes on" if beside else ", while training stands still"
    if speed is None:
        yield Finding("ok", "saving", text)
        return
    step = run.engine.global_batch / speed.clips_per_second
    between = run.checkpoint.every_steps * step
    text += f"; {between:.1f} s of steps between two"
    # A save waits for the one before it, and one that training waits for should be a small share of it.
    share = 1.0 if beside else SAVING_SHARE
    if seconds <= share * between:
        yield Finding("ok", "saving", text)
        return
    yield Finding("note", "saving", text, f"checkpoint.every_steps={math.ceil(seconds / (share * step))}")
