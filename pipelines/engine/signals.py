"""Signals that ask a run to stop: a scheduler's SIGTERM before preemption, SIGUSR1 by Slurm's ``--signal``."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


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
