"""Where a training step's time goes: data, forward, backward, update, communication. For ``cliplift bench train``."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from cliplift.configs.training import TrainingRun
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.distributed.collectives import Topology, all_reduce_mean
from cliplift.pipelines.engine.deepspeed_setup import batch_split, build_engine
from cliplift.pipelines.engine.task import Stage, TrainingEngine
from cliplift.pipelines.engine.telemetry import peak_tflops
from cliplift.pipelines.stages.run import prepare

T = TypeVar("T")

PROFILED_STEPS = 3
COLLECTIVES = ("gloo:", "nccl:", "ncclDevKernel", "ncclKernel")


@dataclass(frozen=True)
class StepTiming:
    """The step of median length and its parts, seconds, mean over ranks; ``communication`` lies inside the others."""

    data: float
    prepare: float
    forward: float
    backward: float
    update: float
    step: float
    communication: float
    clips_per_second: float
    frames_per_second: float
    memory_gib: float
    mfu: float | None

    def table(self) -> str:
        """A few lines for people."""
        parts = {
            "wait for data": self.data,
            "augment, move": self.prepare,
            "forward": self.forward,
            "backward": self.backward,
            "update": self.update,
            "whole step": self.step,
            "of it, in collectives": self.communication,
        }
        lines = [f"{name:22s} {1e3 * s:9.2f} ms {100 * s / self.step:6.1f} %" for name, s in parts.items()]
        lines.append(f"{self.clips_per_second:.1f} clips/s, {self.frames_per_second:.0f} frames/s")
        lines.append(f"peak memory of a rank {self.memory_gib:.2f} GiB")
        if self.mfu is not None:
            lines.append(f"MFU {100 * self.mfu:.1f} %")
        return "\n".join(lines)

    def json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)


def time_steps(run: TrainingRun, *, steps: int, warm_up: int, synthetic: bool) -> tuple[StepTiming, Topology]:
    """Train for a few steps, no checkpoint and no tracking, with the clock stopped between the parts.

    Devices are synchronised at every part, so a step is slower than in training, where they overlap.

    Args:
        run: a training config; its data are read unless ``synthetic``.
        steps: timed steps.
        warm_up: steps before them.
        synthetic: one random batch again and again instead of the loader's.

    Raises:
        ConfigError: as the stage itself would.
    """
    stage = prepare(run)
    try:
        source = (
            _repeated(next(stage.loader.micro_batches(start_step=0, stop_step=1)))
            if synthetic
            else stage.loader.micro_batches(start_step=0, stop_step=warm_up + steps + PROFILED_STEPS)
        )
        with tempfile.TemporaryDirectory() as folder:
            engine = build_engine(
                stage.task.module, run, folder=Path(folder), saved=None, topology=stage.topology
            )
        timer = _Timer(run, stage.task, engine, source, stage.topology)
        for _ in range(warm_up):
            timer.step()
        # Warm-up steps allocate, choose kernels and fill the workers' queues; they are run and forgotten.
        timer.seconds = {name: [] for name in timer.seconds}
        for _ in range(steps):
            timer.step()
        parts = timer.middle_step()
        communication = _communication(timer) if stage.topology.world_size > 1 else 0.0
        engine.destroy()
    finally:
        stage.loader.close()
    return _timing(run, stage.task, stage.topology, parts, communication), stage.topology


class _Timer:
    """One step after the other, each part on the clock."""

    def __init__(
        self,
        run: TrainingRun,
        task: Stage,
        engine: TrainingEngine,
        batches: Iterator[ClipBatch],
        topology: Topology,
    ) -> None:
        self.task, self.engine, self.batches, self.device = task, engine, batches, topology.device
        self.accumulation = batch_split(run, world_size=topology.world_size)[1]
        self.seconds: dict[str, list[float]] = {
            name: [] for name in ("data", "prepare", "forward", "backward", "update", "step")
        }

    def step(self) -> None:
        found = dict.fromkeys(self.seconds, 0.0)
        begun = time.perf_counter()

        def timed(name: str, call: Callable[[], T]) -> T:
            started = time.perf_counter()
            value = call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            found[name] += time.perf_counter() - started
            return value

        self.engine.train()
        for _ in range(self.accumulation):
            batch = timed("data", partial(next, self.batches))
            inputs = timed("prepare", partial(self.task.inputs, batch, training=True, step=0))
            outputs = timed("forward", partial(self.engine, inputs))
            timed("backward", partial(self.engine.backward, outputs["loss"]))
            timed("update", self.engine.step)
        found["step"] = time.perf_counter() - begun
        for name, value in found.items():
            self.seconds[name].append(value)

    def middle_step(self) -> dict[str, float]:
        """The parts of the step of median length, so that they add up."""
        steps = sorted(zip(*self.seconds.values(), strict=True), key=lambda step: step[-1])
        return dict(zip(self.seconds, steps[(len(steps) - 1) // 2], strict=True))


def _repeated(batch: ClipBatch) -> Iterator[ClipBatch]:
    while True:
        yield batch


def _communication(timer: _Timer) -> float:
    """Seconds per step in collectives, from the profiler's record of a few steps."""
    activities = [ProfilerActivity.CPU]
    if timer.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            timer.step()
    total = 0.0
    for event in profiler.key_averages():
        if event.key.startswith(COLLECTIVES):
            total += max(event.cpu_time_total, event.device_time_total)
    return total * 1e-6 / PROFILED_STEPS


def _timing(
    run: TrainingRun, task: Stage, topology: Topology, parts_here: dict[str, float], communication: float
) -> StepTiming:
    import resource

    names = sorted(parts_here)
    # The mean over ranks of each one's middle step.
    values = torch.tensor([parts_here[n] for n in names] + [communication], dtype=torch.float64)
    means = all_reduce_mean(values.to(topology.device), topology).tolist()
    parts = dict(zip([*names, "communication"], means, strict=True))
    clips_per_second = run.engine.global_batch / parts["step"]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if topology.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(topology.device) / 2**30
    peak = peak_tflops(run, topology.device)
    flops = task.flops_per_clip if peak is not None else None
    mfu = None
    if peak is not None and flops is not None:
        mfu = clips_per_second * flops / topology.world_size / (1e12 * peak)
    return StepTiming(
        **parts,
        clips_per_second=clips_per_second,
        frames_per_second=clips_per_second * task.clip_frames,
        memory_gib=memory,
        mfu=mfu,
    )
