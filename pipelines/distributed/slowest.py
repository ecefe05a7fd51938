"""Which rank holds the others up, and by what: data that come late, or passes that take longer.

All ranks finish a step together, so each rank's own step takes as long as the slowest one's. What tells them apart is
what a rank does alone: how long it waits for its data, and how long its forward pass takes. Both are sent along with
the numbers of a logged line, in the collective that is made for that line anyway.

At ZeRO stage 3 a forward pass waits for the other ranks' parts of the weights: there only data can be told of.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

BEHIND = 0.3  # share by which a rank is slower than the others before it is named
LEAST_SHARE = 0.05  # of a step that the difference takes at least

Seconds = npt.NDArray[np.floating]  # (ranks,)


@dataclass
class ForwardClock:
    """How long forward passes took; on a GPU by events that are read when the passes are done, never waited for."""

    device: torch.device
    _seconds: float = 0.0
    _passes: int = 0
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Around a forward pass."""
        if self.device.type == "cuda":
            begun = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begun.record()
            yield
            ended.record()
            self._events.append((begun, ended))
            return
        asked = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - asked
        self._passes += 1

    def taken(self) -> float:
        """Mean seconds of the passes that are done and were not told of; 0 where there are none."""
        while self._events and self._events[0][1].query():  # type: ignore[no-untyped-call]
            begun, ended = self._events.pop(0)
            self._seconds += begun.elapsed_time(ended) / 1000
            self._passes += 1
        mean = self._seconds / self._passes if self._passes else 0.0
        self._seconds, self._passes = 0.0, 0
        return mean


@dataclass(frozen=True)
class Suspect:
    """A rank that is slower than the others, in what, and by how much of a step without it."""

    rank: int
    cause: str  # data or compute
    behind: float


class SlowestRank:
    """Looks at what every rank measured, and names one that was the slowest twice in a row.

    Args:
        hosts: of every rank.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._before: Suspect | None = None
        self._named: set[tuple[int, str]] = set()

    def look(self, ranks: npt.NDArray[np.floating], *, step_seconds: float) -> str | None:
        """A sentence about a rank that is not yet named; None where there is nothing to say.

        Args:
            ranks: (ranks, 2) the share of its time that each waited for data, and the seconds of its forward pass.
            step_seconds: a step.
        """
        if len(ranks) == 1:
            return None
        waited, forward = ranks[:, 0] * step_seconds, ranks[:, 1]
        found = find_slowest(step_seconds=step_seconds, waited=waited, forward=forward)
        before, self._before = self._before, found
        if found is None or before is None or (found.rank, found.cause) != (before.rank, before.cause):
            return None
        if (found.rank, found.cause) in self._named:
            return None
        self._named.add((found.rank, found.cause))
        times = waited if found.cause == "data" else forward
        others = float(np.median(np.delete(times, found.rank)))
        who = f"rank {found.rank} on {self._hosts[found.rank]} holds the others up by {100 * found.behind:.0f} %"
        both = f"{times[found.rank]:.3g} s, the others {others:.3g} s"
        if found.cause == "data":
            return (
                f"{who}: it waits for data {both} of a step; look at its disk, its network and its other work"
            )
        return f"{who}: its forward pass takes {both}; is its device throttled or shared?"


def find_slowest(*, step_seconds: float, waited: Seconds, forward: Seconds) -> Suspect | None:
    """The rank that is at least ``BEHIND`` slower than the median of the others, if there is one."""
    suspects = []
    for cause, times in (("data", waited), ("compute", forward)):
        rank = int(times.argmax())
        others = float(np.median(np.delete(times, rank)))
        more = float(times[rank]) - others
        if more < LEAST_SHARE * step_seconds:
            continue
        # What a step would take without the waiting; a forward pass stands for all that the rank computes.
        usual = max(step_seconds - more, 1e-9) if cause == "data" else max(others, 1e-9)
        suspects.append(Suspect(rank, cause, more / usual))
    worst = max(suspects, key=lambda one: one.behind, default=None)
    return worst if worst is not None and worst.behind >= BEHIND else None
