"""Sums of what happened since the last logged line.

Arithmetic of a training step: floating-point operations per clip, and a device's peak, for MFU.

Model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B): operations the model needs, forward once and backward
twice that, over the peak of the devices. Recomputed activations do not count.

The torch profiler over chosen steps of a run, as a trace file for Perfetto or chrome://tracing.
"""

from __future__ import annotations

import logging
import re
import resource
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cliplift.configs.training import ModelConfig, TrainingRun
from cliplift.models.measure import measure_model
from cliplift.models.protocol import ModelError
from cliplift.pipelines.distributed.collectives import (
    Topology,
    all_reduce_mean,
    all_reduce_sum,
)
from cliplift.pipelines.engine.task import TrainingTask


@dataclass
class TrainingWindow:
    """Sums since the last logged line."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    clip_sums: dict[str, Tensor] = field(default_factory=dict)  # of this rank's clips, float64
    steps: int = 0
    clips: int = 0  # of all ranks
    seconds: float = 0.0
    waited: float = 0.0
    failed: int = 0

    def add(
        self,
        values: Mapping[str, Tensor],
        *,
        clip_sums: Mapping[str, Tensor],
        clips: int,
        seconds: float,
        waited: float,
    ) -> None:
        """A step: means over its micro-batches, and sums over this rank's part of its ``clips``."""
        for kept, new in ((self.sums, values), (self.clip_sums, clip_sums)):
            for name, value in new.items():
                kept[name] = kept[name] + value if name in kept else value
        self.clips += clips
        self.steps += 1
        self.seconds += seconds
        self.waited += waited

    def means(self, topology: Topology, *, forward_seconds: float) -> tuple[list[str], Tensor, Tensor]:
        """Means over steps and ranks, and ``data_wait_share`` of the rank that waited longest; on the device.

        The last are (ranks, 2): of each rank the share of its time that it waited for data, and its forward pass.
        """
        names = sorted(self.sums)
        sums = torch.stack([self.sums[name].double() for name in names])
        own = torch.zeros(topology.world_size, 2, dtype=torch.float64, device=sums.device)
        own[topology.rank, 0].fill_(self.waited / self.seconds)
        own[topology.rank, 1].fill_(forward_seconds)
        ranks = all_reduce_sum(own, topology)
        means = all_reduce_mean(sums, topology) / self.steps
        if self.clip_sums:
            # The mean over clips takes the place of that over micro-batches, whose roundings depend on their size.
            # Ranks that share their clips all have the same sums.
            counted = self.clips * topology.sequence_parallel
            exact = all_reduce_sum(torch.stack(list(self.clip_sums.values())), topology) / counted
            of_clips = dict(zip(self.clip_sums, exact, strict=True))
            means = torch.stack([of_clips.get(name, mean) for name, mean in zip(names, means, strict=True)])
        return [*names, "data_wait_share"], torch.cat([means, ranks[:, 0].max().reshape(1)]), ranks

    def numbers(self, run: TrainingRun, topology: Topology, *, frames: int) -> dict[str, float | None]:
        """What the host knows of these steps: speed, memory, replaced samples."""
        clips_per_second = self.steps * run.engine.global_batch / self.seconds
        return {
            "speed/clips_per_second": clips_per_second,
            "speed/frames_per_second": clips_per_second * frames,
            "speed/step_seconds": self.seconds / self.steps,
            "memory/process_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "memory/gpu_gib": _gpu_gib(topology),
            "data/failed_samples": float(self.failed),
        }


def _gpu_gib(topology: Topology) -> float | None:
    if topology.device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(topology.device) / 2**30


log = logging.getLogger(__name__)

# Dense bf16/fp16 tensor-core peaks of the vendor's data sheets, 1e12 operations per second.
HALF_PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A40": 149.7,
    "L40S": 362.0,
    "L4": 121.0,
    "V100": 125.0,
    "T4": 65.0,
}
BACKWARD_TO_FORWARD = 2.0


def forward_flops(
    model: ModelConfig, *, classes: int, frames: int | None = None, crop_pixels: int | None = None
) -> float | None:
    """Operations of one forward pass on one clip (or image), counted on the meta device; None where that fails."""
    options = {name: value for name, value in model.options.items() if name != "crop" or crop_pixels is None}
    try:
        found = measure_model(
            model.name,
            num_classes=classes,
            in_frames=frames,
            crop=crop_pixels,
            **options,
        )
    except (ModelError, NotImplementedError, RuntimeError) as error:
        log.warning("the operations of %s cannot be counted, so MFU is not logged: %s", model.name, error)
        return None
    return 2e9 * found.gmacs


def training_flops(forward: float | None) -> float | None:
    """Operations of forward and backward; frozen parts are counted as if they were trained."""
    return None if forward is None else forward * (1.0 + BACKWARD_TO_FORWARD)


def utilisation(
    run: TrainingRun, topology: Topology, task: TrainingTask, *, clips_per_second: float
) -> dict[str, float]:
    """Model FLOPs utilisation where the device's peak is known."""
    peak = peak_tflops(run, topology.device)
    flops = task.flops_per_clip if peak is not None else None
    if peak is None or flops is None:
        return {}
    each = clips_per_second * flops / topology.world_size / 1e12
    return {"speed/tflops_per_device": each, "speed/mfu": each / peak}


def peak_tflops(run: TrainingRun, device: torch.device) -> float | None:
    """Peak of one device at the run's precision, 1e12 operations per second; None for CPUs and unknown cards."""
    if run.track.peak_tflops is not None:
        return run.track.peak_tflops
    if device.type != "cuda" or run.engine.precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    half = next((peak for known, peak in HALF_PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name)), None)
    return half / 2 if half is not None and run.engine.precision == "tf32" else half


class StepProfiler:
    """Records the steps ``first`` to ``last`` (counted from 1) of every rank into a file of its own."""

    def __init__(
        self, steps: tuple[int, int] | None, *, folder: Path, rank: int, device: torch.device
    ) -> None:
        self.steps, self.folder, self.rank = steps, folder, rank
        self.activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self.activities.append(ProfilerActivity.CUDA)
        self._running: profile | None = None

    def before(self, step: int) -> None:
        """Start when ``step`` is the first one."""
        if self.steps is not None and step == self.steps[0]:
            self._running = profile(activities=self.activities, record_shapes=True)
            self._running.start()

    def after(self, step: int) -> Path | None:
        """Write the trace once ``step`` is the last one; returns its path."""
        if self._running is None or self.steps is None or step < self.steps[1]:
            return None
        return self.close()

    def close(self) -> Path | None:
        """Write what has been recorded, also where the run ends before the last step."""
        if self._running is None or self.steps is None:
            return None
        running, self._running = self._running, None
        running.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"steps_{self.steps[0]:08d}-{self.steps[1]:08d}_rank{self.rank}.json.gz"
        running.export_chrome_trace(str(path))
        return path
