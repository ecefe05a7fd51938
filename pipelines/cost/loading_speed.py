"""How fast a run's loader is, where its time goes, and how many cores would feed how many GPUs.

What this process and the processes below it use: CPU time, memory, open files. Linux, from /proc.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cliplift.configs.data import DataConfig
from cliplift.models.protocol import InputSpec
from cliplift.pipelines.data.augment import DeviceAugment
from cliplift.pipelines.data.batch import ClipBatch, Costs
from cliplift.pipelines.data.loader import training_loader

PROC = Path("/proc")
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)


def descendants(root: int | None = None) -> list[int]:
    """Process ids below a process (this one), children of children included."""
    children: dict[int, list[int]] = {}
    for folder in PROC.iterdir():
        if folder.name.isdigit():
            with suppress(*_GONE):
                children.setdefault(int(_status(int(folder.name))[1]), []).append(int(folder.name))
    found, queue = [], [os.getpid() if root is None else root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, seconds: its own and that of the children it has waited for."""
    return sum(int(value) for value in _status(pid)[11:15]) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    """Memory of a process, MiB; pages shared with others count in part (PSS)."""
    for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


def open_files(pid: int) -> int:
    return len(list((PROC / str(pid) / "fd").iterdir()))


def descendants_cpu_seconds() -> float:
    """CPU time of all processes below this one, and of this one."""
    total = cpu_seconds(os.getpid())
    for pid in descendants():
        with suppress(*_GONE):
            total += cpu_seconds(pid)
    return total


def _status(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name, which may hold spaces: state, parent, ..."""
    return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True)
class LoadingSpeed:
    """What was measured over a number of batches after a warm-up."""

    clips: int
    frames: int
    seconds: float
    workers: int
    cpu_seconds: float  # of the worker processes, or of this one where there are none
    costs: Costs
    waits_ms: dict[int, float]  # percentile -> time from one batch to the next
    augment_ms_per_clip: float  # flip, colour and normalisation, on ``device``
    device: str
    failed: int

    @property
    def clips_per_second(self) -> float:
        return self.clips / self.seconds

    @property
    def frames_per_second_per_core(self) -> float:
        """Frames for each second of CPU time."""
        return self.frames / self.cpu_seconds

    @property
    def mb_per_second(self) -> float:
        return self.costs.read_bytes / self.seconds / 1e6

    @property
    def cpu_ms_per_clip(self) -> float:
        return 1000 * self.cpu_seconds / self.clips

    def shares(self) -> dict[str, float]:
        """Share of the workers' time in each part; ``other`` is drawing, sending, and waiting for the trainer."""
        total = self.seconds * max(1, self.workers)
        costs = self.costs
        parts = {
            "read": costs.read_seconds / total,
            "decode": costs.decode_seconds / total,
            "crop and resize": costs.cut_seconds / total,
            "collate": costs.collate_seconds / total,
        }
        return parts | {"other": max(0.0, 1.0 - sum(parts.values()))}

    def cores_for(self, *, gpus: int, clips_per_second_per_gpu: float) -> int:
        """Cores that decode as many clips as so many GPUs take, with a tenth to spare."""
        needed = 1.1 * gpus * clips_per_second_per_gpu * self.cpu_seconds / self.clips
        return math.ceil(needed - 1e-9)

    def table(self) -> str:
        """The numbers as lines of text."""
        waits = "  ".join(f"p{p} {self.waits_ms[p]:.0f} ms" for p in PERCENTILES[:-1])
        lines = [
            f"{self.clips_per_second:.1f} clips/s  {self.frames / self.seconds:.0f} frames/s"
            f"  {self.frames_per_second_per_core:.0f} frames/s/core  {self.mb_per_second:.2f} MB/s read",
            f"a batch every: {waits}  most {self.waits_ms[100]:.0f} ms",
            f"CPU time {self.cpu_ms_per_clip:.2f} ms per clip, {self.cpu_seconds / self.seconds:.2f} cores busy"
            f" in {self.workers or 'no'} worker processes",
            "time of the workers: "
            + "  ".join(f"{name} {100 * share:.0f} %" for name, share in self.shares().items()),
            f"augmentation on {self.device}: {self.augment_ms_per_clip:.2f} ms per clip, beside the training step",
            f"unreadable samples: {self.failed}",
        ]
        return "\n".join(lines)

    def json(self) -> str:
        facts = dataclasses.asdict(self) | {
            "clips_per_second": self.clips_per_second,
            "frames_per_second_per_core": self.frames_per_second_per_core,
            "mb_per_second": self.mb_per_second,
            "cpu_ms_per_clip": self.cpu_ms_per_clip,
            "shares": self.shares(),
        }
        return json.dumps(facts, indent=1)


def measure_loading(
    data: DataConfig, *, seed: int, micro_batch: int, batches: int, warm_up: int, device: torch.device
) -> LoadingSpeed:
    """Run the training loader of one rank as fast as it goes.

    Args:
        data: the data section; ``workers`` as in training.
        seed: of the run.
        micro_batch: clips of a batch.
        batches: how many are timed.
        warm_up: how many are drawn before.
        device: where the augmentation is timed.

    Raises:
        ConfigError, TooManyFailuresError, WorkerError: as in training.
    """
    loader = training_loader(
        data, seed=seed, global_batch=micro_batch, micro_batch=micro_batch, rank=0, world_size=1
    )
    with closing(loader):
        # More is asked for than is timed, so that the workers are as busy at the end as in the middle.
        ahead = max(1, data.workers) * data.prefetch_batches
        stream = loader.micro_batches(start_step=0, stop_step=warm_up + batches + ahead)
        last = [next(stream) for _ in range(max(1, warm_up))][-1]
        busy, waits, costs, clips, failed = _busy_seconds(data), [], Costs(), 0, 0
        began = asked = time.perf_counter()
        for _ in range(batches):
            last = next(stream)
            now = time.perf_counter()
            waits.append(now - asked)
            asked = now
            costs += last.costs
            clips += len(last.labels)
            failed += len(last.failed)
        seconds = time.perf_counter() - began
        busy = _busy_seconds(data) - busy
        _close(stream)
    at = np.percentile(1000 * np.array(waits), PERCENTILES)
    return LoadingSpeed(
        clips=clips,
        frames=clips * data.sampling.frames,
        seconds=seconds,
        workers=data.workers,
        cpu_seconds=max(busy, 1 / os.sysconf("SC_CLK_TCK")),
        costs=costs,
        waits_ms=dict(zip(PERCENTILES, at.tolist(), strict=True)),
        augment_ms_per_clip=_augment_ms(last, data, device),
        device=str(device),
        failed=failed,
    )


def _close(stream: Iterator[ClipBatch]) -> None:
    close = getattr(stream, "close", None)
    if close is not None:
        close()


def _busy_seconds(data: DataConfig) -> float:
    """CPU time of the processes that decode."""
    own = cpu_seconds(os.getpid())
    return descendants_cpu_seconds() - own if data.workers else own


def _augment_ms(batch: ClipBatch, data: DataConfig, device: torch.device, *, rounds: int = 5) -> float:
    """Milliseconds per clip for the device's part of augmentation, the copy to the device included."""
    spec = InputSpec(mean=(0.45, 0.45, 0.45), std=(0.225, 0.225, 0.225))
    views = DeviceAugment(data.augment, spec, training=True)
    spent = []
    for _ in range(rounds):
        began = time.perf_counter()
        views(batch.to(device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent.append(time.perf_counter() - began)
    return 1000 * min(spent) / len(batch.labels)
