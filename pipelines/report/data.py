"""What a report says of the data of its runs: test clips in training, and what a filter left of each class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cliplift.pipelines.runs.leaks import LeakStatement, stored_statements
from cliplift.pipelines.runs.records import RunGroup
from cliplift.pipelines.runs.trained_on import FILTERED

MOST_CLASSES = 12  # of a filter's table, those that lose most


@dataclass(frozen=True)
class FilteredClass:
    """How many clips of a class a filter left, and of how many."""

    name: str
    left: int
    clips: int

    @property
    def share(self) -> float:
        """Of the clips that are left."""
        return self.left / self.clips if self.clips else 0.0


@dataclass(frozen=True)
class Filtered:
    """What a filter left of a dataset's training split."""

    group: RunGroup
    where: str
    dataset: str
    split: str
    left: int
    clips: int
    classes: tuple[FilteredClass, ...]  # those that lose most
    more: int  # classes that are not shown


def leaks(groups: Sequence[RunGroup]) -> list[tuple[RunGroup, list[LeakStatement]]]:
    """What the evaluations of each group say of test clips in training, each statement once."""
    found = []
    for group in groups:
        statements = [one for run in group.runs for one in stored_statements(run.result or {})]
        if statements:
            found.append((group, list(dict.fromkeys(statements))))
    return found


def filters(groups: Sequence[RunGroup]) -> list[Filtered]:
    """What the filters of each group's first run left."""
    found = []
    for group in groups:
        rows = group.runs[0].start.get(FILTERED)
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, dict) and (one := _filtered(group, row)) is not None:
                found.append(one)
    return found


def _filtered(group: RunGroup, row: dict[str, object]) -> Filtered | None:
    """None where the row is damaged."""
    counts = row.get("classes")
    left, clips = row.get("left"), row.get("clips")
    if not isinstance(counts, dict) or not isinstance(left, int) or not isinstance(clips, int):
        return None
    classes = []
    for name, pair in counts.items():
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(one, int) for one in pair):
            return None
        classes.append(FilteredClass(str(name), *pair))
    classes.sort(key=lambda one: (one.share, one.name))
    return Filtered(
        group=group,
        where=str(group.runs[0].setting("data.where") or ""),
        dataset=str(row.get("dataset") or ""),
        split=str(row.get("split") or ""),
        left=left,
        clips=clips,
        classes=tuple(classes[:MOST_CLASSES]),
        more=max(0, len(classes) - MOST_CLASSES),
    )
