"""Hang watchdog: a process that shows no progress writes all its threads' stacks and ends.

The timer runs in C (``faulthandler``), so it fires even while Python is stuck inside a collective or a driver call.
Every rank watches itself. A rank that hangs keeps the others waiting in their next collective, so that all of them
dump within the same time and the launcher can restart the group.
"""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


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
