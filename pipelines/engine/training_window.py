"""Sums of what happened since the last logged line."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cliplift.configs.training import TrainingRun
from cliplift.pipelines.distributed.collectives import Topology, all_reduce_max, all_reduce_mean


@dataclass
class TrainingWindow:
    """Sums since the last logged line."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    failed: int = 0

    def add(self, values: Mapping[str, Tensor], *, seconds: float, waited: float) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1
        self.seconds += seconds
        self.waited += waited

    def numbers(self, run: TrainingRun, topology: Topology, *, frames: int) -> dict[str, float | None]:
        """What is logged of these steps: means over steps and ranks, speed, memory, replaced samples."""
        names = sorted(self.sums)
        sums = torch.stack([self.sums[name].double() for name in names])
        means = (all_reduce_mean(sums, topology) / self.steps).tolist()
        clips_per_second = self.steps * run.engine.global_batch / self.seconds
        return {f"train/{name}": mean for name, mean in zip(names, means, strict=True)} | {
            "speed/clips_per_second": clips_per_second,
            "speed/frames_per_second": clips_per_second * frames,
            "speed/step_seconds": self.seconds / self.steps,
            "speed/data_wait_share": all_reduce_max(self.waited / self.seconds, topology),
            "memory/process_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "memory/gpu_gib": _gpu_gib(topology),
            "data/failed_samples": float(self.failed),
        }


def _gpu_gib(topology: Topology) -> float | None:
    if topology.device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(topology.device) / 2**30
