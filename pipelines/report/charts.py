"""Charts of the report as inline SVG: curves with axes, reliability, confusion heat map, strips of single results.

Colours are CSS classes (``c0`` to ``c5``, defined in report.css), so the charts follow the page into dark mode.
All text goes through markupsafe and is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from cliplift.pipelines.evaluation.metrics import Reliability

Floats = npt.NDArray[np.float64]

COLOURS = 6
MAX_POINTS = 400  # per line: more than the pixels it is drawn on
MARKED_POINTS = 12  # lines with at most this many points show each of them
SMOOTHED_FROM = 40  # points from which a noisy line also gets its moving mean
MAX_NAMED_CLASSES = 30
MAX_CELLS = 12_000
SHARES = [0.0, 0.25, 0.5, 0.75, 1.0]  # ticks of an axis of shares


@dataclass(frozen=True)
class Line:
    """One line of a chart: ``values`` over ``steps``, NaN where there is none."""

    label: str
    colour: int
    steps: Floats
    values: Floats
    dashed: bool = False
    smoothed: bool = False  # noisy: drawn pale, with its moving mean on top
    overlaid: bool = False  # one of several of its colour: thinner, and of a noisy line only the mean
    faint: bool = False  # behind the mean of its kind
    unmarked: bool = False  # a curve whose few points are no measurements of their own
    spread: Floats | None = None  # half the height of a band around the line


@dataclass(frozen=True)
class _Frame:
    """Where data land on the SVG: the plot's rectangle in user units and the data ranges it shows."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]

    def at_x(self, value: float) -> float:
        return self.left + (value - self.x[0]) / (self.x[1] - self.x[0]) * self.width

    def at_y(self, value: float) -> float:
        return self.top + (1 - (value - self.y[0]) / (self.y[1] - self.y[0])) * self.height


def line_chart(lines: Sequence[Line], *, title: str, percent: bool = False) -> Markup:
    """Curves over optimizer steps.

    Args:
        lines: drawn in order; lines without a finite value are left out.
        title: read out for those who cannot see the chart.
        percent: values are shares; the axis runs from 0 to 100 %.
    """
    lines = [line for line in lines if np.isfinite(line.values).any()]
    if not lines:
        return Markup("")
    all_y = np.concatenate([line.values[np.isfinite(line.values)] for line in lines])
    last = max(float(line.steps.max()) for line in lines)
    x_ticks = nice_ticks(0.0, last, count=5) if last > 0 else [0.0]
    y_ticks = SHARES if percent else nice_ticks(float(all_y.min()), float(all_y.max()), count=5)
    frame = _Frame(
        left=46,
        top=8,
        width=298,
        height=178,
        x=(0.0, last or 1.0),
        y=(min(y_ticks[0], float(all_y.min())), max(y_ticks[-1], float(all_y.max()))),
    )
    parts = [_axes(frame, x_ticks, y_ticks, _percent if percent else short_number, x_title="optimizer step")]
    parts += [_draw(line, frame) for line in lines]
    return Markup('<svg class="chart" viewBox="0 0 360 224" role="img" aria-label="{}">{}</svg>').format(
        title, Markup("").join(parts)
    )


def scatter(points: Floats, groups: Sequence[int], names: Sequence[str], *, title: str) -> Markup:
    """Points in the plane, coloured by group; beyond the palette, colours come round with another shape.

    Args:
        points: (N, 2).
        groups: group of each point.
        names: of the groups, shown when a point is hovered.
        title: read out for those who cannot see the chart.
    """
    low, high = points.min(axis=0), points.max(axis=0)
    places = 8 + 284 * (points - low) / np.maximum(high - low, 1e-12)
    parts = []
    for (x, y), group in zip(places.tolist(), groups, strict=True):
        shape = (
            Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="2.4"/>').format(x, y)
            if group // COLOURS % 2 == 0
            else Markup('<rect class="dot" x="{:.1f}" y="{:.1f}" width="4.4" height="4.4"/>').format(
                x - 2.2, y - 2.2
            )
        )
        parts.append(
            Markup('<g class="c{}"><title>{}</title>{}</g>').format(group % COLOURS, names[group], shape)
        )
    return Markup('<svg class="chart" viewBox="0 0 300 300" role="img" aria-label="{}">{}</svg>').format(
        title, Markup("").join(parts)
    )


def share_chart(lines: Sequence[Line], *, title: str, x_title: str, chance: Sequence[float]) -> Markup:
    """Lines in the unit square: ``values`` over ``steps``, both shares.

    Args:
        lines: drawn in order.
        title: read out for those who cannot see the chart.
        x_title: what runs from left to right.
        chance: height of what guessing gives at the left and at the right edge; empty for none.
    """
    frame = _unit_square()
    parts = [_axes(frame, SHARES, SHARES, _percent, x_title=x_title, x_text=_percent)]
    if chance:
        parts.append(_straight(frame, chance[0], chance[1]))
    parts += [_draw(line, frame) for line in lines]
    return Markup('<svg class="chart" viewBox="0 0 360 224" role="img" aria-label="{}">{}</svg>').format(
        title, Markup("").join(parts)
    )


def reliability_chart(found: Reliability, *, colour: int, title: str) -> Markup:
    """A reliability diagram: each bin's accuracy, its gap to the confidence, and below how many it holds."""
    frame = _unit_square()
    M, most, foot = len(found.counts), max(int(found.counts.max()), 1), 268.0
    parts = [
        _axes(frame, SHARES, SHARES, _percent, x_title="confidence", x_text=_percent),
        _straight(frame, 0.0, 1.0),
    ]
    for m in np.flatnonzero(found.counts).tolist():
        count, accuracy, confidence = (
            int(found.counts[m]),
            float(found.accuracy[m]),
            float(found.confidence[m]),
        )
        said = (
            f"confidence {_percent(m / M)} to {_percent((m + 1) / M)}: {count} predictions, "
            f"{_percent(accuracy)} right, mean confidence {_percent(confidence)}"
        )
        x, width = frame.at_x(m / M) + 0.5, frame.width / M - 1
        low, high = sorted((accuracy, confidence))
        tall = 30.0 * count / most
        boxes = (
            ("bin", frame.at_y(accuracy), accuracy * frame.height),
            ("gap", frame.at_y(high), (high - low) * frame.height),
            ("bin", foot - tall, tall),
        )
        parts.append(Markup("<g><title>{}</title>").format(said))
        parts += [
            Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                kind, x, y, width, height
            )
            for kind, y, height in boxes
        ]
        parts.append(Markup("</g>"))
    parts.append(_text(frame.left - 6, foot, "clips", anchor="end"))
    parts.append(
        Markup('<path class="axis" d="M{:.1f} {:.1f}h{:.1f}"/>').format(frame.left, foot, frame.width)
    )
    return Markup('<svg class="chart c{}" viewBox="0 0 360 272" role="img" aria-label="{}">{}</svg>').format(
        colour % COLOURS, title, Markup("").join(parts)
    )


def _unit_square() -> _Frame:
    return _Frame(left=46, top=8, width=298, height=178, x=(0.0, 1.0), y=(0.0, 1.0))


def _straight(frame: _Frame, left: float, right: float) -> Markup:
    """The dotted line of what chance, or perfect calibration, gives."""
    return Markup('<path class="chance" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(
        frame.left, frame.at_y(left), frame.left + frame.width, frame.at_y(right)
    )


def _axes(
    frame: _Frame,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    y_text: Callable[[float], str],
    *,
    x_title: str,
    x_text: Callable[[float], str] | None = None,
) -> Markup:
    right, bottom = frame.left + frame.width, frame.top + frame.height
    parts = []
    for tick in y_ticks:
        y = frame.at_y(tick)
        parts.append(Markup('<path class="grid" d="M{:.1f} {:.1f}H{:.1f}"/>').format(frame.left, y, right))
        parts.append(_text(frame.left - 6, y + 3.5, y_text(tick), anchor="end"))
    for tick in x_ticks:
        x = frame.at_x(tick)
        if x > right + 0.5:
            continue
        parts.append(Markup('<path class="axis" d="M{:.1f} {:.1f}v4"/>').format(x, bottom))
        parts.append(_text(x, bottom + 16, (x_text or short_number)(tick), anchor="middle"))
    parts.append(Markup('<path class="axis" d="M{:.1f} {:.1f}H{:.1f}"/>').format(frame.left, bottom, right))
    parts.append(_text(frame.left + frame.width / 2, bottom + 32, x_title, anchor="middle"))
    return Markup("").join(parts)


def _draw(line: Line, frame: _Frame) -> Markup:
    steps, values = thinned(line.steps, line.values, MAX_POINTS)
    spread = None if line.spread is None else thinned(line.steps, line.spread, MAX_POINTS)[1]
    kind = f"line{' dashed' if line.dashed else ''}{' thin' if line.overlaid else ''}{' faint' if line.faint else ''}"
    shown = Markup('<g class="c{}"><title>{}</title>').format(line.colour % COLOURS, line.label)
    finite = int(np.isfinite(values).sum())
    if line.smoothed and finite >= SMOOTHED_FROM:
        if not line.overlaid and spread is None:
            shown += Markup('<path class="raw" d="{}"/>').format(_path(steps, values, frame))
        values = moving_mean(values, max(3, finite // 20))
        spread = None if spread is None else moving_mean(spread, max(3, finite // 20))
    if finite > 1 and spread is not None:
        shown += Markup('<path class="band" d="{}"/>').format(_band(steps, values, spread, frame))
    if finite > 1:
        shown += Markup('<path class="{}" d="{}"/>').format(kind, _path(steps, values, frame))
    if finite <= MARKED_POINTS and not line.faint and not line.unmarked:
        for step, value in zip(steps, values, strict=True):
            if math.isfinite(value):
                shown += Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="2.4"/>').format(
                    frame.at_x(step), frame.at_y(value)
                )
    return shown + Markup("</g>")


def _band(steps: Floats, values: Floats, spread: Floats, frame: _Frame) -> str:
    """SVG path around the band, inside the plot."""
    known = np.isfinite(values) & np.isfinite(spread)
    low, high = frame.y
    over = np.clip(values + spread, low, high)
    under = np.clip(values - spread, low, high)
    there = _path(steps[known], over[known], frame)
    back = _path(steps[known][::-1], under[known][::-1], frame).replace("M", "L", 1)
    return f"{there}{back}Z"


def _path(steps: Floats, values: Floats, frame: _Frame) -> str:
    """SVG path through the points; the pen is lifted over values that are NaN."""
    words, drawing = [], False
    for step, value in zip(steps, values, strict=True):
        if math.isfinite(value):
            words.append(f"{'L' if drawing else 'M'}{frame.at_x(step):.1f} {frame.at_y(value):.1f}")
        drawing = math.isfinite(value)
    return "".join(words)


def thinned(steps: Floats, values: Floats, most: int) -> tuple[Floats, Floats]:
    """At most ``most`` points: means over equal stretches of a longer line; the NaN of a stretch are left out."""
    if len(steps) <= most:
        return steps, values
    edges = np.linspace(0, len(steps), most + 1).astype(int)
    means = [
        (steps[a:b].mean(), np.nan if np.isnan(values[a:b]).all() else np.nanmean(values[a:b]))
        for a, b in pairwise(edges)
    ]
    return np.array([m[0] for m in means]), np.array([m[1] for m in means])


def moving_mean(values: Floats, window: int) -> Floats:
    """Centred mean over ``window`` values, shorter at the ends; NaN stay out of the means and in the result."""
    finite = np.isfinite(values)
    kernel = np.ones(window)
    # np.convolve's "same" has the length of the longer argument: the window never exceeds the values here.
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    count = np.convolve(finite.astype(np.float64), kernel, mode="same")
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def nice_ticks(low: float, high: float, *, count: int) -> list[float]:
    """About ``count`` round numbers covering ``low`` to ``high``, steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def short_number(value: float) -> str:
    """A tick's text: 20k, 1.5M, 0.03, 3e-4."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scale = 1e3 if unit == "k" else limit
            return f"{value / scale:.4g}{unit}"
    return f"{value:.4g}"


def confusion_heatmap(confusion: npt.NDArray[np.int64], classes: Sequence[str]) -> Markup:
    """Rows are true classes, columns predicted ones; shade is the share of the row, right and wrong in two colours.

    Up to 30 classes carry names and counts; above, cells only (names as tooltips). Empty for more cells than a page
    should hold: the table of confused pairs then says it better.
    """
    K = len(classes)
    named = K <= MAX_NAMED_CLASSES
    if np.count_nonzero(confusion) > MAX_CELLS:
        return Markup("")
    cell = 30.0 if named else max(3.0, min(12.0, 720 / K))
    margin = 7.0 + min(18, max(len(name) for name in classes)) * 6.6 if named else 2.0
    size = margin + K * cell + 2
    totals = confusion.sum(axis=1)
    parts = [_class_names(classes, margin=margin, cell=cell)] if named else []
    for row, column in zip(*np.nonzero(confusion), strict=True):
        count, share = int(confusion[row, column]), confusion[row, column] / totals[row]
        x, y = margin + column * cell, margin + row * cell
        what = f"{classes[row]} predicted as {classes[column]}: {count} of {totals[row]}"
        parts.append(
            Markup(
                '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill-opacity="{:.2f}">'
                "<title>{}</title></rect>"
            ).format("hit" if row == column else "miss", x, y, cell - 1, cell - 1, 0.08 + 0.87 * share, what)
        )
        if named:
            shade = "on" if share > 0.8 else "off"
            parts.append(
                _text(x + cell / 2 - 0.5, y + cell / 2 + 3.5, str(count), anchor="middle", kind=shade)
            )
    parts.append(
        Markup('<path class="axis" d="M{0:.1f} {0:.1f}h{1:.1f}v{1:.1f}h-{1:.1f}z" fill="none"/>').format(
            margin - 0.5, K * cell
        )
    )
    return Markup(
        '<svg class="heat" viewBox="0 0 {0:.0f} {0:.0f}" width="{0:.0f}" role="img" '
        'aria-label="Confusion matrix of {1} classes, {2} samples">{3}</svg>'
    ).format(size, K, int(totals.sum()), Markup("").join(parts))


def _class_names(classes: Sequence[str], *, margin: float, cell: float) -> Markup:
    parts = []
    for k, name in enumerate(classes):
        short = name if len(name) <= 18 else f"{name[:17]}…"
        middle = margin + (k + 0.5) * cell
        parts.append(_text(margin - 6, middle + 3.5, short, anchor="end"))
        parts.append(
            Markup('<text transform="translate({:.1f} {:.1f}) rotate(-90)">{}</text>').format(
                middle + 3.5, margin - 6, short
            )
        )
    return Markup("").join(parts)


def value_strip(
    values: Sequence[float], *, mean: float | None, sd: float | None, chance: float | None, colour: int
) -> Markup:
    """One row of a comparison on a 0 to 100 % scale: a dot per seed, a tick at the mean, a band of one sd, chance.

    A number that is known and not measured has a mean and no values.
    """
    told = list(values) if values or mean is None else [mean]
    left, width, y = 6.0, 248.0, 13.0

    def at(value: float) -> float:
        return left + min(max(value, 0.0), 1.0) * width

    parts = [Markup('<path class="grid" d="M{} {}H{}"/>').format(left, y, left + width)]
    if chance is not None:
        parts.append(
            Markup('<path class="chance" d="M{0:.1f} 3V23"><title>chance {1}</title></path>').format(
                at(chance), _percent(chance)
            )
        )
    if mean is not None and sd is not None:
        low, high = at(mean - sd), at(mean + sd)
        parts.append(
            Markup('<rect class="band" x="{:.1f}" y="8" width="{:.1f}" height="10" rx="2"/>').format(
                low, high - low
            )
        )
    parts += [Markup('<circle class="dot" cx="{:.1f}" cy="{}" r="3"/>').format(at(v), y) for v in values]
    if mean is not None:
        parts.append(Markup('<path class="line" d="M{:.1f} 5V21"/>').format(at(mean)))
    return Markup('<svg class="strip c{}" viewBox="0 0 260 26" role="img" aria-label="{}">{}</svg>').format(
        colour % COLOURS, ", ".join(map(_percent, told)) or "no value", Markup("").join(parts)
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}</text>').format(
        x, y, anchor, kind, text
    )


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"
