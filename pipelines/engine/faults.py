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
import math
import signal
import statistics
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TextIO

from cliplift.configs.training import EngineConfig

Verdict = Literal["fine", "not finite", "spike", "overflow"]


class DivergedError(ValueError):
    """The run cannot go on: too many bad steps in a row, too many rewinds, or ``on_bad_step: stop``."""


class LossGuard:
    """Judges every step's loss, the mean over all ranks, so that all ranks judge alike."""

    def __init__(self, engine: EngineConfig) -> None:
        self.factor = engine.loss_spike_factor
        self.recent: deque[float] = deque(maxlen=engine.loss_spike_window_steps)

    def judge(self, loss: float) -> Verdict:
        """``spike``: above ``loss_spike_factor`` times the median of a full window. Bad losses enter no window."""
        if not math.isfinite(loss):
            return "not finite"
        full = len(self.recent) == self.recent.maxlen
        if self.factor is not None and full and loss > self.factor * statistics.median(self.recent):
            return "spike"
        self.recent.append(loss)
        return "fine"


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
