"""What every row of the table uses: the setting, timings in turns, and counted operations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Numbers = dict[str, Any]
Step = Callable[[], object]
MAX_INNER_STEPS = 200
BACKWARD_AND_FORWARD = 3.0  # operations of a training step over those of its forward pass


@dataclass(frozen=True)
class Setting:
    """Where the rows run. ``small`` shrinks every net and batch, so that a CPU runs them all in a test.

    ``peak_tflops`` is the card's arithmetic peak in bf16, measured by the first row; None before it and on CPUs.
    """

    device: torch.device
    small: bool
    folder: Path
    shards: Path | None = None
    peak_tflops: float | None = None

    @property
    def half(self) -> torch.dtype:
        return torch.bfloat16

    def size(self, large: int, small: int) -> int:
        return small if self.small else large


@dataclass(frozen=True)
class Row:
    """One line of the table: ``run`` gives its numbers; ``goal`` says in words what they should reach."""

    name: str
    goal: str
    run: Callable[[Setting], Numbers]
    limit_seconds: float = 60.0  # longer than this and the row is given up


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(step: Step, device: torch.device, steps: int) -> float:
    """Seconds per step, over several in a row."""
    synchronise(device)
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    synchronise(device)
    return (time.perf_counter() - begun) / steps


def alternating(
    sides: Mapping[str, Step], setting: Setting, *, budget_seconds: float = 3.0, rounds: int = 5
) -> dict[str, float]:
    """Median milliseconds per step of each side, which take turns; compilation and the first steps are thrown away."""
    rounds = 1 if setting.small else rounds
    once = {}
    for name, step in sides.items():
        seconds_of(step, setting.device, 1 if setting.small else 3)
        once[name] = seconds_of(step, setting.device, 1)
    each = budget_seconds / rounds / len(sides)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in sides if turn % 2 else reversed(list(sides)):
            steps = 1 if setting.small else min(MAX_INNER_STEPS, max(1, int(each / once[name])))
            found[name].append(seconds_of(sides[name], setting.device, steps))
    return {name: 1e3 * statistics.median(values) for name, values in found.items()}


def backward_of(forward: Callable[[], Tensor], module: nn.Module) -> Step:
    """A step: forward to a loss, backward; gradients start from None."""

    def step() -> None:
        module.zero_grad(set_to_none=True)
        forward().backward()

    return step


def forward_operations(forward: Callable[[], object]) -> float:
    """Floating-point operations of matrix products, convolutions and attention in one forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return float(counter.get_total_flops())


def mfu(operations: float, milliseconds: float, setting: Setting) -> float | None:
    """Share of the measured peak that a step of so many operations reaches."""
    if setting.peak_tflops is None:
        return None
    return operations / (milliseconds * 1e-3) / (setting.peak_tflops * 1e12)


def peak_gib(setting: Setting) -> float | None:
    if setting.device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(setting.device) / 2**30


def with_smaller_batch(batch: int, run: Callable[[int], Numbers]) -> Numbers:
    """``run`` at this batch, or at half of it as often as memory is too small; says the batch."""
    while True:
        try:
            return run(batch) | {"batch": batch}
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
            torch.cuda.empty_cache()
