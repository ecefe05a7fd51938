"""A sweep on the page: its trials as parallel coordinates (Inselberg 1985), and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from cliplift.pipelines.report.charts import short_number
from cliplift.pipelines.runs.results import formatted, metric_name
from cliplift.pipelines.runs.sweeps import SweepRecord, TrialRecord, read_sweep, shown_value

BEST_SHOWN = 5  # trials whose runs the rest of the page is about, and whose lines are in colour
MOST_LINES, MOST_ROWS = 300, 100
AXIS_WIDTH, AXIS_HEIGHT, LEFT, TOP = 150, 190, 60, 34
LOG_FROM = 20.0  # ratio of the largest to the smallest value from which an axis is logarithmic
MOST_LETTERS = 22


@dataclass(frozen=True)
class SweepRow:
    """A trial of the table, best first."""

    trial: int
    number: str
    steps: str
    values: tuple[str, ...]
    failed: str


@dataclass(frozen=True)
class SweepPage:
    """The section of one sweep."""

    name: str
    method: str
    metric: str
    parameters: tuple[str, ...]
    chart: Markup
    rows: tuple[SweepRow, ...]
    left_out: int  # rows
    drawn: int
    folders: tuple[Path, ...]  # of the best runs


def sweep_page(folder: Path) -> SweepPage | None:
    """The section of a sweep's folder; None where it is none, or no trial has a number yet.

    Raises:
        ConfigError: its record is damaged.
    """
    record = read_sweep(folder)
    if record is None:
        return None
    ranked = record.best_first()
    if not ranked:
        return None
    failed = [run for run in record.runs if run.failed]
    rows = [_row(record, run) for run in [*ranked, *failed]]
    return SweepPage(
        name=record.name,
        method=record.method,
        metric=metric_name(record.metric),
        parameters=record.parameters,
        chart=parallel_coordinates(record, ranked[:MOST_LINES]),
        rows=tuple(rows[:MOST_ROWS]),
        left_out=max(0, len(rows) - MOST_ROWS),
        drawn=min(len(ranked), MOST_LINES),
        folders=tuple(folder / run.folder for run in ranked[:BEST_SHOWN]),
    )


def _row(record: SweepRecord, run: TrialRecord) -> SweepRow:
    return SweepRow(
        trial=run.trial,
        number="" if run.value is None else formatted(record.metric, run.value),
        steps="" if run.steps is None else str(run.steps),
        values=tuple(shown_value(run.values.get(key)) for key in record.parameters),
        failed=run.failed,
    )


@dataclass(frozen=True)
class _Axis:
    """Where values land on one vertical axis, and its labels: (height as a share, text)."""

    title: str
    heights: tuple[float, ...]  # of each line, 0 at the foot
    labels: tuple[tuple[float, str], ...]


def parallel_coordinates(record: SweepRecord, runs: Sequence[TrialRecord]) -> Markup:
    """One line a trial over an axis for each parameter, the steps where they differ, and the metric on the right.

    Args:
        record: says which parameters there are.
        runs: with a number, best first; the best lie on top, in colour.
    """
    axes = [_axis(key, [run.values.get(key) for run in runs]) for key in record.parameters]
    if len({run.steps for run in runs}) > 1:
        axes.append(_axis("steps", [run.steps for run in runs]))
    axes.append(_axis(metric_name(record.metric), [run.value for run in runs]))
    width, height = 2 * LEFT + (len(axes) - 1) * AXIS_WIDTH, TOP + AXIS_HEIGHT + 16
    parts: list[Markup] = []
    for place in range(len(runs) - 1, -1, -1):
        run = runs[place]
        words = [f"{key}={shown_value(run.values.get(key))}" for key in record.parameters]
        number = formatted(record.metric, run.value or 0.0)
        points = [
            f"{LEFT + at * AXIS_WIDTH:.1f} {TOP + (1 - axis.heights[place]) * AXIS_HEIGHT:.1f}"
            for at, axis in enumerate(axes)
        ]
        kind, colour = ("line", place) if place < BEST_SHOWN else ("line thin faint", BEST_SHOWN)
        parts.append(
            Markup('<g class="c{}"><title>trial {}: {} with {}</title><path class="{}" d="M{}"/></g>').format(
                colour, run.trial, number, ", ".join(words), kind, "L".join(points)
            )
        )
    parts += [_drawn_axis(axis, LEFT + at * AXIS_WIDTH) for at, axis in enumerate(axes)]
    said = f"Parallel coordinates of {len(runs)} trials over {', '.join(axis.title for axis in axes)}"
    return Markup(
        '<svg class="parallel" viewBox="0 0 {0} {1}" width="{0}" role="img" aria-label="{2}">{3}</svg>'
    ).format(width, height, said, Markup("").join(parts))


def _axis(title: str, values: Sequence[object]) -> _Axis:
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == len(values) and len(set(numbers)) > 1:
        return _number_axis(title, numbers)
    names = sorted(dict.fromkeys(shown_value(value) for value in values))
    places = {name: (at + 0.5) / len(names) for at, name in enumerate(names)}
    return _Axis(
        title,
        tuple(places[shown_value(value)] for value in values),
        tuple((places[name], _short(name)) for name in names[:12]),
    )


def _number_axis(title: str, numbers: Sequence[float]) -> _Axis:
    low, high = min(numbers), max(numbers)
    if low > 0 and high / low >= LOG_FROM:
        span = math.log(high / low)
        heights = tuple(math.log(number / low) / span for number in numbers)
        middle = math.sqrt(low * high)
    else:
        heights = tuple((number - low) / (high - low) for number in numbers)
        middle = (low + high) / 2
    return _Axis(
        title, heights, ((0.0, short_number(low)), (0.5, short_number(middle)), (1.0, short_number(high)))
    )


def _drawn_axis(axis: _Axis, x: float) -> Markup:
    parts = [
        Markup('<path class="axis" d="M{:.1f} {}v{}"/>').format(x, TOP, AXIS_HEIGHT),
        Markup('<text class="name" x="{:.1f}" y="14" text-anchor="middle">{}</text>').format(
            x, _short(axis.title)
        ),
    ]
    parts += [
        Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="end">{}</text>').format(
            x - 5, TOP + (1 - height) * AXIS_HEIGHT + 3.5, text
        )
        for height, text in axis.labels
    ]
    return Markup("").join(parts)


def _short(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else f"…{text[1 - MOST_LETTERS :]}"
