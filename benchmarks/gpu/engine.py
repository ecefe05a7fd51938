"""Rows about the engine: its loop against a plain one, its memory and its checkpoints."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from measure import Numbers, Row, Setting, peak_gib, seconds_of, synchronise
from torch import Tensor, nn

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS, PretrainRun
from cliplift.models import create_model
from cliplift.pipelines.cost.memory_plan import plan_memory
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.distributed.collectives import Topology, start
from cliplift.pipelines.engine import loop
from cliplift.pipelines.engine.deepspeed_setup import build_engine, set_numerics
from cliplift.pipelines.engine.optim import Schedule
from cliplift.pipelines.engine.state import RunState
from cliplift.pipelines.runs.tracking import Tracker
from cliplift.pipelines.stages.classification import Classifier
from cliplift.pipelines.stages.run import stage_of

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

CLASSES, WARM_UP = 16, 8
CLASS_NAMES = tuple(f"class {number}" for number in range(CLASSES))
RECIPES = Path(__file__).resolve().parents[2] / "configs"
Shape = tuple[int, int, int, int]  # B, T, H, W


def random_batch(shape: Shape) -> ClipBatch:
    B, T, H, W = shape
    index = torch.arange(B)
    clips = torch.randint(0, 256, (B, T, H, W, 3), dtype=torch.uint8)
    batch = ClipBatch(
        clips=clips,
        labels=index % CLASSES,
        sample_index=index,
        video_index=index,
        views=torch.zeros_like(index),
        draws=torch.rand(B, 24),
        epochs=torch.zeros_like(index),
        positions=index,
    )
    return batch.pin_memory() if torch.cuda.is_available() else batch


class RepeatingLoader:
    """One pinned batch, over and over; notes when each step asked for it."""

    fingerprint, steps_per_epoch = "benchmark", 10_000

    def __init__(self, shape: Shape) -> None:
        self.batch, self.asked = random_batch(shape), list[float]()

    def micro_batches(self, *, start_step: int, stop_step: int, final: bool = False) -> Iterator[ClipBatch]:
        for _ in range(start_step, stop_step):
            self.asked.append(time.perf_counter())
            yield self.batch

    def step_ms(self) -> float:
        """Mean over the steps after the first ones; the last one ends with a checkpoint."""
        timed = self.asked[min(WARM_UP, len(self.asked) // 2) :]
        return 1e3 * (timed[-1] - timed[0]) / (len(timed) - 1)


def _moved(batch: ClipBatch, device: torch.device) -> dict[str, Tensor]:
    batch = batch.to(device)
    return {"clips": batch.clips.permute(0, 4, 1, 2, 3).float() / 255, "labels": batch.labels}


class Task:
    """Classification without augmentation."""

    best_metric, flops_per_clip = "none", None

    def __init__(self, module: nn.Module, frames: int, device: torch.device) -> None:
        self.module, self.clip_frames, self.device = module, frames, device

    def inputs(self, batch: ClipBatch, *, training: bool, step: int) -> dict[str, Tensor]:
        return _moved(batch, self.device)

    def clip_table(self, rows: int) -> None:
        return None

    def evaluate(self, *, topology: Topology) -> dict[str, float]:
        return {}


def demo_run(folder: Path, *words: str) -> PretrainRun:
    fixed = ["track.wandb=disabled", f"output={folder}", "checkpoint.keep_best=false"]
    run = load_run(RECIPES / "pretrain" / "demo.yaml", RUNS, [*fixed, *words]).run
    assert isinstance(run, PretrainRun)
    return run


def device_words(setting: Setting) -> list[str]:
    return [f"engine.device={setting.device.type}"]


def _classifier(name: str, shape: Shape) -> Classifier:
    torch.manual_seed(0)
    net = create_model(name, num_classes=CLASSES, in_frames=shape[1])
    return Classifier(net, label_smoothing=0.0, multi_label=False)


def _engine_loop(run: PretrainRun, name: str, shape: Shape, topology: Topology) -> float:
    Path(run.output).mkdir(parents=True, exist_ok=True)
    set_numerics(run.engine, topology.device)
    tracker = Tracker(run, stage="pretrain", folder=Path(run.output), topology=topology)
    loader = RepeatingLoader(shape)
    task = Task(_classifier(name, shape), shape[1], topology.device)
    loop.fit(task=task, run=run, loader=loader, topology=topology, tracker=tracker).release()
    tracker.finish()
    return loader.step_ms()


def _plain_loop(run: PretrainRun, name: str, shape: Shape, device: torch.device) -> float:
    """What one would write by hand, with no waiting either: the loss is summed on the device."""
    module, loader = _classifier(name, shape).to(device).train(), RepeatingLoader(shape)
    assert run.schedule.steps is not None
    wide = [p for p in module.parameters() if p.ndim > 1]
    rest = [p for p in module.parameters() if p.ndim <= 1]
    groups = [
        {"params": wide, "weight_decay": run.optim.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=run.optim.lr, fused=True)
    schedule = Schedule(run.schedule, total_steps=run.schedule.steps)
    autocast = run.engine.precision == "autocast_bf16"
    losses: Tensor | float = 0.0
    for step, batch in enumerate(loader.micro_batches(start_step=0, stop_step=run.schedule.steps)):
        for group in optimizer.param_groups:
            group["lr"] = run.optim.lr * schedule.factor(step)
        optimizer.zero_grad()
        inputs = _moved(batch, device)
        if run.engine.channels_last:
            inputs["clips"] = inputs["clips"].contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = module(inputs)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), run.optim.clip_grad_norm)
        optimizer.step()
        losses = losses + loss.detach()
        if step % 10 == 0:
            synchronise(device)  # what a log line every ten steps costs
    synchronise(device)
    return loader.step_ms()


def engine_loop(setting: Setting, *, name: str, shape: Shape, steps: int, stage: int) -> Numbers:
    """Step time of ``fit`` and of a hand-written loop in turns; ratio: plain over engine."""
    folder = setting.folder / f"loop-{name}-{stage}"
    if setting.small:
        name, shape, steps = "t3d_tiny", (2, 8, 32, 32), 4
    words = [
        *device_words(setting), f"engine.zero_stage={stage}", f"engine.global_batch={shape[0]}",
        "engine.precision=autocast_bf16", f"schedule.steps={steps}", f"checkpoint.every_steps={steps}",
        "optim.name=adamw", "optim.lr=0.0001", "optim.clip_grad_norm=1.0", f"model.name={name}",
        "engine.channels_last=true", "track.every_steps=10",
    ]  # fmt: skip
    found: dict[str, list[float]] = {"engine": [], "plain": []}
    for turn in range(1 if setting.small else 2):
        run = demo_run(folder / str(turn), *words)
        topology = start(run.engine)
        sides: list[Callable[[], None]] = [
            lambda: found["engine"].append(_engine_loop(run, name, shape, topology)),  # noqa: B023
            lambda: found["plain"].append(_plain_loop(run, name, shape, topology.device)),  # noqa: B023
        ]
        for side in sides if turn % 2 else reversed(sides):
            side()
            gc.collect()
    engine, plain = min(found["engine"]), min(found["plain"])
    return {"engine_ms": engine, "plain_ms": plain, "ratio": plain / engine, "zero_stage": stage,
            "all_ms": found, "shape": shape, "model": name}  # fmt: skip


MEMORY_CASES = {
    "resnet3d_18 fp32 zero 0": ("resnet3d_18", 16, 112, 16, ["engine.precision=tf32", "engine.zero_stage=0"]),
    "t3d_121 autocast zero 0": ("t3d_121", 16, 160, 4, ["engine.precision=autocast_bf16", "engine.zero_stage=0"]),
    "timesformer_base bf16 zero 1": ("timesformer_base", 8, 224, 8, ["engine.precision=bf16", "engine.zero_stage=1"]),
    "timesformer_base bf16 zero 2": ("timesformer_base", 8, 224, 8, ["engine.precision=bf16", "engine.zero_stage=2"]),
    "timesformer_base bf16 zero 3": ("timesformer_base", 8, 224, 8, ["engine.precision=bf16", "engine.zero_stage=3"]),
    "timesformer_base recomputed": ("timesformer_base", 8, 224, 8, ["engine.precision=bf16", "engine.zero_stage=1",
                                                                   "engine.checkpoint_blocks_share=1.0"]),
}  # fmt: skip


def memory(setting: Setting, *, case: str) -> Numbers:
    """What ``check`` plans against the most that two steps of the engine allocated."""
    name, frames, side, batch, engine = MEMORY_CASES[case]
    if setting.small:
        name, frames, side, batch = "t3d_tiny", 8, 32, 2
        engine = ["engine.zero_stage=1"]
    words = [
        *device_words(setting), f"model.name={name}", f"data.sampling.frames={frames}", f"data.crop_pixels={side}",
        f"data.resize_short_side_pixels={side}", f"engine.global_batch={batch}", "optim.name=adamw",
        "optim.lr=0.001", "engine.channels_last=false", *engine,
    ]  # fmt: skip
    run = demo_run(setting.folder / "memory", *words)
    on_gpu = setting.device.type == "cuda"
    topology = start(run.engine)
    set_numerics(run.engine, topology.device)
    if on_gpu:
        torch.backends.cudnn.benchmark = False  # its trials take memory once, in the first step
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    stage = stage_of(run, classes=CLASS_NAMES, topology=topology)
    built = stage.build_module(weights=True)
    engine_ = build_engine(built.module, run, folder=setting.folder, saved=None, topology=topology)
    for _ in range(2):
        inputs = stage.example_inputs(built, micro_batch=batch, world_size=1)
        engine_.backward(engine_({k: v.to(topology.device) for k, v in inputs.items()})["loss"])
        engine_.step()
    measured = torch.cuda.max_memory_allocated() - before if on_gpu else None
    engine_.destroy()
    del engine_, built
    gc.collect()
    plan, _ = plan_memory(run, classes=CLASSES, world_size=1, on_gpu=on_gpu)
    found = {"planned_gib": plan.total / 2**30, "plan": {k: v / 2**30 for k, v in vars(plan).items()}}
    if measured is not None:
        found |= {"measured_gib": measured / 2**30, "planned_over_measured": plan.total / measured}
    return found


def offload(setting: Setting) -> Numbers:
    """Optimizer state, and parameters too, on the host: that steps run, and what they cost."""
    found: Numbers = {}
    if setting.device.type != "cuda":
        return {"skipped": "offloading needs a GPU"}
    for stage, kind in ((1, "none"), (2, "optimizer"), (3, "optimizer_and_parameters")):
        run = demo_run(setting.folder / "offload", *device_words(setting), "model.name=timesformer_base",
                   "data.sampling.frames=8", "data.crop_pixels=224", "data.resize_short_side_pixels=224",
                   "engine.global_batch=8", "optim.name=adamw", "optim.lr=0.001", "engine.channels_last=false",
                   "engine.precision=bf16", f"engine.zero_stage={stage}", f"engine.offload={kind}")  # fmt: skip
        topology = start(run.engine)
        torch.cuda.reset_peak_memory_stats()
        stage_ = stage_of(run, classes=CLASS_NAMES, topology=topology)
        built = stage_.build_module(weights=True)
        engine = build_engine(built.module, run, folder=setting.folder, saved=None, topology=topology)
        inputs = stage_.example_inputs(built, micro_batch=8, world_size=1)
        inputs = {k: v.to(topology.device) for k, v in inputs.items()}

        def step(engine: DeepSpeedEngine = engine, inputs: dict[str, Tensor] = inputs) -> None:
            engine.backward(engine(inputs)["loss"])
            engine.step()

        seconds_of(step, setting.device, 2)
        found |= {f"{kind}_ms": 1e3 * seconds_of(step, setting.device, 3), f"{kind}_gib": peak_gib(setting)}
        engine.destroy()
        del engine, built, step, inputs
        gc.collect()
        torch.cuda.empty_cache()
    return found


def checkpointing(setting: Setting) -> Numbers:
    """How long training stands still for an asynchronous checkpoint, against copying the same bytes to the host."""
    width, layers = (8192, 15) if not setting.small else (16, 2)
    module = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    run = demo_run(setting.folder / "checkpoint", *device_words(setting), "engine.zero_stage=1",
                   "engine.global_batch=1", "optim.name=adamw", "optim.lr=0.001",
                   "checkpoint.asynchronous=true")  # fmt: skip
    topology = start(run.engine)
    schedule = Schedule(run.schedule, total_steps=10)
    state = RunState(module, run, schedule=schedule, identity={}, topology=topology, say=print)
    x = torch.randn(1, width, device=setting.device)
    for _ in range(2):
        state.engine.backward(state.engine(x).square().mean())
        schedule.apply(state.engine.optimizer, 0, 1e-3)
        state.engine.step()
    state.step = 1
    synchronise(setting.device)
    begun = time.perf_counter()
    state.save(None)
    stall = time.perf_counter() - begun
    state.saver.wait()
    whole = time.perf_counter() - begun
    written = sum(p.stat().st_size for p in Path(run.output).rglob("*.safetensors"))
    parameters = sum(p.numel() for p in module.parameters())
    state.engine.destroy()
    del state
    gc.collect()
    source = torch.empty(3 * parameters, device=setting.device)
    begun = time.perf_counter()
    source.cpu()
    pageable = time.perf_counter() - begun
    found = {"parameters": parameters, "bytes": written, "stall_seconds": stall, "until_written_seconds": whole,
             "pageable_copy_seconds": pageable, "stall_over_pageable_copy": stall / pageable}  # fmt: skip
    if setting.device.type == "cuda":
        target = torch.empty(source.shape, pin_memory=True)
        synchronise(setting.device)
        begun = time.perf_counter()
        target.copy_(source, non_blocking=True)
        synchronise(setting.device)
        found["pinned_copy_seconds"] = time.perf_counter() - begun
        found["stall_over_pinned_copy"] = stall / found["pinned_copy_seconds"]
    return found


SMALL_NET, LARGE_NET = ("t3d_tiny", (16, 8, 64, 64), 120), ("resnet3d_50", (16, 16, 112, 112), 40)
LOOPS = [
    Row(f"engine loop, {size} model, zero {stage}", f">= {goal} of a plain loop",
        partial(engine_loop, name=name, shape=shape, steps=steps, stage=stage))
    for size, goal, (name, shape, steps) in (("small", 0.97, SMALL_NET), ("large", 0.99, LARGE_NET))
    for stage in (0, 1)
]  # fmt: skip
MEMORY = [Row(f"memory: {case}", "within 10 %", partial(memory, case=case)) for case in MEMORY_CASES]
OFFLOAD = Row("offload", "runs", offload, 90.0)
CHECKPOINT = Row("checkpoint of 1 B parameters", "<= 1.2 of the copy", checkpointing, 120.0)
