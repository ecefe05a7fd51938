"""What a run does about a step whose loss is not finite, or far above those before it.

Signals that ask a run to stop: a scheduler's SIGTERM before preemption, SIGUSR1 by Slurm's ``--signal``.

Hang watchdog: a process that shows no progress writes all its threads' stacks and ends.

The timer runs in C (``faulthandler``), so it fires even while Python is stuck inside a collective or a driver call.
Every rank watches itself. A rank that hangs keeps the others waiting in their next collective, so that all of them
dump within the same time and the launcher can restart the group.
"""

from __future__ import annotations

import contextlib
import faulthandler
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TextIO

import torch
from torch import Tensor

from cliplift.configs.training import EngineConfig
from cliplift.pipelines.distributed.collectives import Topology, all_reduce_mean

Verdict = Literal["fine", "not finite", "spike", "overflow"]
VERDICTS: tuple[Verdict, ...] = (
    "fine",
    "not finite",
    "spike",
    "overflow",
)  # by the number the device knows them by


class DivergedError(ValueError):
    """The run cannot go on: too many bad steps in a row, too many rewinds, or ``on_bad_step: stop``."""


class LossGuard:
    """Judges every step's loss, the mean over all ranks, so that all ranks judge alike; on the device alone.

    The window of the last good losses lies on the device too, so that a spike is known there before its update.
    """

    def __init__(self, engine: EngineConfig, topology: Topology) -> None:
        self.factor, self.topology = engine.loss_spike_factor, topology
        window = engine.loss_spike_window_steps
        self._recent = torch.zeros(window, dtype=torch.float64, device=topology.device)
        self._known = torch.zeros((), dtype=torch.int64, device=topology.device)

    def judge(self, loss: Tensor, *, signalled: bool) -> Tensor:
        """float64 (2,): the number of the verdict in ``VERDICTS``, and above 0 where a signal has reached any rank.

        One exchange between the ranks serves both. ``spike``: above ``loss_spike_factor`` times the median of a full
        window. Bad losses enter no window.
        """
        loss = loss.detach().double()
        caught = torch.full_like(loss, float(signalled))
        mean, caught = all_reduce_mean(torch.stack([loss, caught]), self.topology).unbind()
        finite = mean.isfinite()
        # Not torch.where with numbers, which copies them to the device and waits.
        verdict = torch.zeros_like(mean).masked_fill(~finite, 1.0)
        if self.factor is not None:
            spike = finite & (self._known >= len(self._recent)) & (mean > self.factor * self._median())
            verdict = verdict.masked_fill(spike, 2.0)
            fine = finite & ~spike
            self._recent = torch.where(fine, torch.cat([self._recent[1:], mean[None]]), self._recent)
            self._known = self._known + fine
        return torch.stack([verdict, caught])

    def _median(self) -> Tensor:
        values, middle = self._recent.sort().values, len(self._recent) // 2
        if len(values) % 2:
            return values[middle]
        return (values[middle - 1] + values[middle]) / 2

    def forget(self) -> None:
        """Start a new window."""
        self._known.zero_()


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGUSR1 instead of dying of them; the handlers from before come back afterwards."""
    caught: list[int] = []
    before = {}
    with contextlib.suppress(ValueError):  # signals can be caught in the main thread only
        for number in (signal.SIGTERM, signal.SIGUSR1):
            before[number] = signal.signal(number, lambda n, _: caught.append(n))
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Timer:
    """The one timer a process has."""

    seconds: float | None = None
    file: TextIO | None = None


_timer = _Timer()


@contextlib.contextmanager
def watched(*, seconds: float | None, folder: Path, rank: int) -> Iterator[None]:
    """Arm the watchdog inside; None leaves it off.

    Args:
        seconds: longest time between two beats.
        folder: where ``rankN.txt`` with the stacks is written.
        rank: N.
    """
    if seconds is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank{rank}.txt"
    with path.open("a", encoding="utf-8") as file:
        _timer.seconds, _timer.file = seconds, file
        beat()
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            _timer.seconds = _timer.file = None
    if not path.stat().st_size:
        path.unlink()


def stacks_of_last_hang(folder: Path) -> list[Path]:
    """Files an earlier start's watchdog wrote before it ended that start."""
    return [path for path in sorted(folder.glob("rank*.txt")) if path.stat().st_size]


def beat() -> None:
    """Say that the run is alive; called after every step and evaluation batch."""
    if _timer.seconds is not None:
        assert _timer.file is not None
        faulthandler.dump_traceback_later(_timer.seconds, exit=True, file=_timer.file)
