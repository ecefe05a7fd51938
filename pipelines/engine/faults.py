"""Faults of a run: bad losses, signals that ask it to stop, and hangs.

A step whose loss is not finite, or far above those before it, is judged on the device.

Signals that ask a command to stop: a scheduler's SIGTERM before preemption, SIGUSR1 by Slurm's ``--signal``, SIGINT
from the keyboard. They are caught once for a whole command, however many runs it consists of. Each run checks
for the request where it can stop: after a step, after a batch of an evaluation, and before it starts.

Hang watchdog: a process that shows no progress writes all its threads' stacks and ends.

The timer runs in C (``faulthandler``), so it fires even while Python is stuck inside a collective or a driver call.
Every rank watches itself. A rank that hangs keeps the others waiting in their next collective, so that all of them
dump within the same time and the launcher can restart the group.
"""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Literal, TextIO

import torch
from torch import Tensor

from cliplift.configs.training import EngineConfig
from cliplift.pipelines.distributed.collectives import Topology, all_reduce_max, all_reduce_mean
from cliplift.pipelines.distributed.flight_recorder import FILES

STACKS = "stacks"  # folder in the run's folder

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


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# One Ctrl-C may arrive twice, from the terminal and from the launcher; a second one after this long is meant.
SECOND_INTERRUPT_SECONDS = 2.0


class StoppedBySignalError(KeyboardInterrupt):
    """A signal asked the command to stop, and the work under way was given up.

    A KeyboardInterrupt, so that no handler of ordinary errors takes it for one. ``exit_status`` is the shell's
    128 + number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_status = 128 + number


class _StopRequest:
    """The one request to stop that a process can have."""

    number = 0  # of the first signal; 0 without one
    since = 0.0  # time.monotonic() of that signal
    catching = 0  # open caught_signals() contexts
    at_once = False


_stop = _StopRequest()


def _on_signal(number: int, _: FrameType | None) -> None:
    if not _stop.number:
        _stop.number, _stop.since = number, time.monotonic()
    elif number == signal.SIGINT and time.monotonic() - _stop.since > SECOND_INTERRUPT_SECONDS:
        raise KeyboardInterrupt
    if _stop.at_once:
        raise StoppedBySignalError(number)


@contextlib.contextmanager
def caught_signals() -> Iterator[None]:
    """Remember SIGTERM, SIGUSR1 and SIGINT as a request to stop instead of dying of them.

    The outermost context counts: a request stays until it is left, and the handlers from before come back then. A
    second SIGINT, some seconds after the first signal, raises KeyboardInterrupt.
    """
    before = {}
    if not _stop.catching:
        _stop.number = 0
        with contextlib.suppress(ValueError):  # signals can be caught in the main thread only
            for number in STOP_SIGNALS:
                before[number] = signal.signal(number, _on_signal)
    _stop.catching += 1
    try:
        yield
    finally:
        _stop.catching -= 1
        for number, handler in before.items():
            signal.signal(number, handler)
        if not _stop.catching:
            _stop.number = 0


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """Inside, a signal that :func:`caught_signals` catches raises StoppedBySignalError wherever the process is.

    For work of one process that is repeated, or continued, when the command is started again.
    """
    _stop.at_once = True
    try:
        if _stop.number:
            raise StoppedBySignalError(_stop.number)
        yield
    finally:
        _stop.at_once = False


def stop_requested() -> bool:
    """Whether a signal has reached this process; the other ranks may not know of it yet."""
    return _stop.number > 0


def stop_agreed(topology: Topology) -> bool:
    """Whether a signal has reached any rank. Collective: all ranks get the same answer, and the host waits for it."""
    _stop.number = int(all_reduce_max(float(_stop.number), topology))
    return _stop.number > 0


def stop_together(topology: Topology) -> None:
    """Raise StoppedBySignalError on all ranks when a signal has reached any of them. Collective."""
    if stop_agreed(topology):
        raise StoppedBySignalError(_stop.number)


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
    """Files that the watchdogs of an earlier start wrote before they ended it: stacks, and the collectives of NCCL."""
    files = sorted([*folder.glob("rank*.txt"), *folder.glob(f"{FILES}*")])
    return [path for path in files if path.stat().st_size]


def beat() -> None:
    """Tell the watchdog that the run is alive; called after every step and evaluation batch."""
    if _timer.seconds is not None:
        assert _timer.file is not None
        faulthandler.dump_traceback_later(_timer.seconds, exit=True, file=_timer.file)
