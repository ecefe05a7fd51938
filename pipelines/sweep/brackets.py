"""Who runs how long: successive halving (Jamieson and Talwalkar, arXiv 1502.07943) and Hyperband (Li et al., arXiv
1603.06560).

A trial that goes on to the next rung is trained anew, with more steps and a schedule laid out for them: what is
compared is always runs that ended their schedule. Beside going on from the checkpoint this costs the steps of the rung
before, one in ``factor``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bracket:
    """Trials that start together, and the rungs they climb.

    Attributes:
        trials: their numbers.
        rungs: (trials, optimizer steps) of each rung; the first has all of them.
    """

    trials: tuple[int, ...]
    rungs: tuple[tuple[int, int], ...]


def climbs(*, longest: int, least: int, factor: int) -> int:
    """How often steps can grow by ``factor`` from at least ``least`` to ``longest``."""
    times = 0
    while least * factor ** (times + 1) <= longest:
        times += 1
    return times


def halving(*, trials: int, longest: int, least: int, factor: int) -> list[Bracket]:
    """One bracket: all trials with few steps, the best one in ``factor`` of them with ``factor`` times as many, ...

    It stops climbing where a rung would have no trial; its last rung has ``longest`` steps all the same.
    """
    times = climbs(longest=longest, least=least, factor=factor)
    while trials // factor**times < 1:
        times -= 1
    return [_bracket(0, trials, times, longest=longest, factor=factor)]


def hyperband(*, longest: int, least: int, factor: int) -> list[Bracket]:
    """The brackets of Table 1 of the paper, the one with the shortest runs first."""
    most = climbs(longest=longest, least=least, factor=factor)
    brackets, first = [], 0
    for times in range(most, -1, -1):
        trials = (most + 1) // (times + 1) * factor**times
        brackets.append(_bracket(first, trials, times, longest=longest, factor=factor))
        first += trials
    return brackets


def _bracket(first: int, trials: int, times: int, *, longest: int, factor: int) -> Bracket:
    rungs = [(trials // factor**i, round(longest / factor ** (times - i))) for i in range(times + 1)]
    return Bracket(tuple(range(first, first + trials)), tuple(rungs))


def survivors(results: Mapping[int, float | None], *, count: int, maximise: bool) -> tuple[int, ...]:
    """The numbers of the best trials, in ascending order; equals by number, those without a result never."""
    known = [(number, value) for number, value in results.items() if value is not None]
    known.sort(key=lambda item: (-item[1] if maximise else item[1], item[0]))
    return tuple(sorted(number for number, _ in known[:count]))


def total_steps(brackets: Sequence[Bracket]) -> int:
    """Optimizer steps of all runs together."""
    return sum(count * steps for bracket in brackets for count, steps in bracket.rungs)
