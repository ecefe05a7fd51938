"""How far a report's predictions can be trusted: calibration, and precision, recall and ROC over every threshold.

K classes; every class is judged against all others.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from cliplift.pipelines.evaluation.metrics import (
    Reliability,
    area_under_curve,
    average_precision,
    expected_calibration_error,
    precision_recall_curve,
    reliability,
    roc_curve,
)
from cliplift.pipelines.report.charts import COLOURS, Line, reliability_chart, share_chart
from cliplift.pipelines.runs.predictions import Predictions
from cliplift.pipelines.runs.records import RunGroup

Floats = npt.NDArray[np.float64]
MOST_POINTS = 300  # of a curve that is drawn
MOST_PALE, PALE_POINTS = 40, 60  # classes without a colour that are drawn, and their points
PALE = COLOURS - 1  # the palette's grey, of all classes beyond the first few
Curve = Callable[[Floats, npt.NDArray[np.bool_]], tuple[Floats, Floats]]


@dataclass(frozen=True)
class ClassCurves:
    """One class against all others; numbers are means over the runs in which it and others occur."""

    name: str
    clips: int
    average_precision: float
    area_under_curve: float
    colour: int | None  # of its curves; None is pale


@dataclass(frozen=True)
class ReliabilityBin:
    """A row of the reliability diagram's table."""

    low: float
    high: float
    clips: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Confidence:
    """Of a group's runs, their predictions together."""

    group: RunGroup
    samples: int
    calibration_error: float  # mean over the runs
    confidence: float
    accuracy: float
    diagram: Markup
    bins: tuple[ReliabilityBin, ...]
    precision_recall: Markup
    roc: Markup
    classes: tuple[ClassCurves, ...]  # the least average precision first

    @property
    def of_two(self) -> bool:
        """Whether the curves are those of one of two classes."""
        return len(self.classes) == 1

    @property
    def mean_average_precision(self) -> float:
        return statistics.fmean(one.average_precision for one in self.classes)

    @property
    def mean_area_under_curve(self) -> float:
        return statistics.fmean(one.area_under_curve for one in self.classes)


def confidence(group: RunGroup) -> Confidence | None:
    """What a group's predictions with single labels say of their confidence; None where there are none."""
    tables = [_labelled(run.predictions) for run in group.runs if run.predictions is not None]
    tables = [table for table in tables if len(table.keys) and table.probabilities.shape[1] > 1]
    if not tables:
        return None
    classes = next(run.classes() for run in group.runs if run.predictions is not None)
    probabilities = np.concatenate([table.probabilities for table in tables])
    labels = np.concatenate([table.labels for table in tables])
    found = reliability(probabilities, labels)
    errors = [expected_calibration_error(table.probabilities, table.labels) for table in tables]
    kept = np.flatnonzero(found.counts)
    M = len(found.counts)
    rows = _class_rows(tables, classes)
    return Confidence(
        group=group,
        samples=len(labels),
        calibration_error=statistics.fmean(errors),
        confidence=float(probabilities.max(axis=1).mean(dtype=np.float64)),
        accuracy=float((probabilities.argmax(axis=1) == labels).mean()),
        diagram=_diagram(found, group, statistics.fmean(errors)),
        bins=tuple(
            ReliabilityBin(
                m / M, (m + 1) / M, int(found.counts[m]), float(found.confidence[m]), float(found.accuracy[m])
            )
            for m in kept.tolist()
        ),
        precision_recall=_curves(tables, classes, rows, group, curve=precision_recall_curve),
        roc=_curves(tables, classes, rows, group, curve=roc_curve),
        classes=rows,
    )


def _labelled(table: Predictions) -> Predictions:
    return table if table.labelled.all() else table.rows(np.flatnonzero(table.labelled))


def _diagram(found: Reliability, group: RunGroup, error: float) -> Markup:
    title = f"Reliability of {group.label}: expected calibration error {100 * error:.1f} %"
    return reliability_chart(found, colour=group.colour, title=title)


def _class_rows(tables: Sequence[Predictions], classes: Sequence[str]) -> tuple[ClassCurves, ...]:
    """The classes that occur beside others; of two classes the second, as in the two-class metrics."""
    rows = []
    for k in [1] if len(classes) == 2 else range(len(classes)):
        known = [(t.probabilities[:, k], t.labels == k) for t in tables if _occurs(t, k)]
        if not known:
            continue
        rows.append(
            ClassCurves(
                name=classes[k],
                clips=sum(int(is_class.sum()) for _, is_class in known),
                average_precision=statistics.fmean(average_precision(p, t) for p, t in known),
                area_under_curve=statistics.fmean(area_under_curve(p, t) for p, t in known),
                colour=None,
            )
        )
    rows.sort(key=lambda row: row.average_precision)
    return tuple(
        ClassCurves(r.name, r.clips, r.average_precision, r.area_under_curve, at if at < PALE else None)
        for at, r in enumerate(rows)
    )


def _occurs(table: Predictions, k: int) -> bool:
    return 0 < int((table.labels == k).sum()) < len(table.labels)


def _curves(
    tables: Sequence[Predictions],
    classes: Sequence[str],
    rows: Sequence[ClassCurves],
    group: RunGroup,
    *,
    curve: Curve,
) -> Markup:
    """The classes' curves; those that have a colour lie on top. Empty where no class occurs beside others."""
    number = {name: k for k, name in enumerate(classes)}
    pale = [row for row in rows if row.colour is None]
    shown = [row for row in rows if row.colour is not None] + pale[:: 1 + len(pale) // MOST_PALE]
    lines = [
        _line(row, [table for table in tables if _occurs(table, number[row.name])], number[row.name], curve)
        for row in reversed(shown)
    ]
    if not lines:
        return Markup("")
    if len(classes) == 2:  # one curve, in the group's colour
        lines = [Line(lines[0].label, group.colour, lines[0].steps, lines[0].values)]
    if curve is roc_curve:
        return share_chart(lines, title=f"ROC of {group.label}", x_title="false positive rate", chance=(0, 1))
    title = f"Precision over recall of {group.label}"
    prior = [float(np.mean(np.concatenate([t.labels for t in tables]) == 1))] if len(classes) == 2 else []
    return share_chart(lines, title=title, x_title="recall", chance=prior * 2)


def _line(row: ClassCurves, tables: Sequence[Predictions], k: int, curve: Curve) -> Line:
    found = [curve(table.probabilities[:, k].astype(np.float64), table.labels == k) for table in tables]
    x, y = found[0] if len(found) == 1 else averaged(found, steps=curve is precision_recall_curve)
    if curve is precision_recall_curve:
        x, y = np.append(0.0, x), np.append(y[0], y)  # the first step's height holds from recall 0
    elif len(found) > 1:
        x, y = np.append(0.0, x), np.append(0.0, y)
    most = PALE_POINTS if row.colour is None else MOST_POINTS
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), most)).astype(int))
    return Line(
        row.name,
        PALE if row.colour is None else row.colour,
        x[kept],
        y[kept],
        overlaid=True,
        faint=row.colour is None,
        unmarked=True,
    )


def averaged(curves: Sequence[tuple[Floats, Floats]], *, steps: bool) -> tuple[Floats, Floats]:
    """The mean height of several curves at equal x (vertical averaging: Fawcett 2006, algorithm 3).

    Args:
        curves: x, ascending, and y of each.
        steps: y holds from the x before to its own, as precision over recall does; otherwise points are joined by
            straight lines, and of several points at one x the last counts.
    """
    grid = np.linspace(0.0, 1.0, MOST_POINTS + 1)
    heights = []
    for x, y in curves:
        if steps:
            heights.append(y[np.minimum(np.searchsorted(x, grid - 1e-12), len(y) - 1)])
        else:
            last = np.append(x[1:] > x[:-1], True)
            heights.append(np.interp(grid, x[last], y[last]))
    return grid, np.mean(heights, axis=0)
