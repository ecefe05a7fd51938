"""Pages of clips in the order of a score, or on both sides of what an expression of ``data.where`` asks for."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cliplift.configs.sections import ConfigError
from cliplift.configs.where import Column, Compared, Constant, Expression, Negative, parts_of
from cliplift.configs.where_reader import parse
from cliplift.sharding.read.contact_sheet import STYLE, figure
from cliplift.sharding.read.reader import ShardDataset
from cliplift.sharding.scores.chosen import ClipColumn, mask_of
from cliplift.sharding.scoring.census import SplitCensus
from cliplift.sharding.scoring.histogram import Histogram, histogram, text_histogram
from cliplift.sharding.storage import whole_file

FRAMES = 3  # shown of each clip
FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Threshold:
    """A comparison of a column of numbers with a number, as an expression has it."""

    column: str
    sign: str
    value: float

    @property
    def text(self) -> str:
        return f"{self.column} {self.sign} {self.value:g}"


def thresholds(expression: Expression) -> tuple[Threshold, ...]:
    """The comparisons of a column with a number that are in an expression, each once, in order."""
    found: dict[Threshold, None] = {}
    for part in parts_of(expression):
        if isinstance(part, Compared):
            before = part.first
            for sign, after in part.rest:
                if isinstance(before, Column) and (value := _number(after)) is not None:
                    found[Threshold(before.name, sign, value)] = None
                elif isinstance(after, Column) and (value := _number(before)) is not None:
                    found[Threshold(after.name, FLIPPED[sign], value)] = None
                before = after
    return tuple(found)


def _number(part: Expression) -> float | None:
    if isinstance(part, Negative):
        inside = _number(part.of)
        return None if inside is None else -inside
    if isinstance(part, Constant) and not isinstance(part.value, (str, bool)):
        return float(part.value)
    return None


def column_values(dataset: ShardDataset, name: str) -> NDArray[np.generic]:
    """(N,) the values of a column that ``data.where`` may name, in the order of the samples.

    Raises:
        ConfigError: there is no such column of numbers, or true and false.
        ManifestError: its bytes are damaged.
    """
    columns = dataset.filter_columns()
    if name not in columns or columns[name].kind == "text":
        there = ", ".join(sorted(n for n, column in columns.items() if column.kind != "text"))
        root = dataset.url.rpartition("@")[0] or dataset.url
        hint = f"it has {there}; `cliplift score {root} {name}` may make it"
        raise ConfigError(f"{dataset.url} has no column {name!r}", key="--score", value=name, hint=hint)
    rows = dataset.rows
    stop = int(rows[-1]) + 1 if len(rows) else 0
    return columns[name].values(0, stop)[rows]


def spread_over(values: NDArray[np.generic], count: int) -> Ints:
    """(K,) samples whose values are evenly spread over the ranks of all, the least first; equal ones as they come."""
    known = np.flatnonzero(~np.isnan(values.astype(np.float64)))
    order = known[np.argsort(values[known], kind="stable")]
    places = np.unique(
        np.linspace(0, max(0, len(order) - 1), min(count, len(order))).round().astype(np.int64)
    )
    return order[places].astype(np.int64) if len(order) else order.astype(np.int64)


def around(values: NDArray[np.generic], threshold: Threshold, count: int) -> tuple[Ints, Ints]:
    """(K,) samples that do not meet a threshold, and those that do, nearest to it first."""
    numbers = values.astype(np.float64)
    known = np.flatnonzero(~np.isnan(numbers))
    signs: Mapping[str, NDArray[np.bool_]] = {
        "<": numbers < threshold.value, "<=": numbers <= threshold.value, ">": numbers > threshold.value,
        ">=": numbers >= threshold.value, "==": numbers == threshold.value, "!=": numbers != threshold.value,
    }  # fmt: skip
    meets = signs[threshold.sign][known]
    near = np.argsort(np.abs(numbers[known] - threshold.value), kind="stable")
    sides = [known[near[meets[near] == side]][:count].astype(np.int64) for side in (False, True)]
    return sides[0], sides[1]


def write_score_sheet(url: str, name: str, output: str | Path, *, clips: int, fold: int | None = None) -> str:
    """Write a page of clips over the range of a column, and return its histogram for a terminal.

    Args:
        url: folder or URL of a dataset, or ``URL@N``.
        name: of the column.
        output: HTML file to write.
        clips: that are shown.
        fold: official split number, from 1.

    Raises:
        ConfigError: there is no such dataset or column.
    """
    dataset = ShardDataset(url, fold=fold)
    values = column_values(dataset, name)
    found = histogram(name, values)
    shown = [
        figure(dataset, i, FRAMES, note=f"{name} {values[i]:.4g}")
        for i in spread_over(values, clips).tolist()
    ]
    parts = [f"<h1>{html.escape(name)}</h1><p>{html.escape(url)}</p>", _bars(found), *shown]
    _write(Path(output), name, parts)
    return text_histogram(found)


def write_filter_sheet(
    url: str,
    where: str,
    left: Sequence[SplitCensus],
    output: str | Path,
    *,
    clips: int,
    fold: int | None = None,
) -> str:
    """Write a page of clips on both sides of each threshold of an expression; returns the histograms for a terminal.

    Args:
        url: folder or URL of a dataset, or ``URL@N``.
        where: the expression.
        left: what it leaves, split by split.
        output: HTML file to write.
        clips: that are shown on each side.
        fold: official split number, from 1.

    Raises:
        ConfigError: there is no such dataset, or the expression cannot be used with it.
    """
    dataset = ShardDataset(url, fold=fold)
    expression = parse(where)
    parts = [f"<h1>{html.escape(where)}</h1><p>{html.escape(url)}</p>", _census(left)]
    text = []
    found = thresholds(expression)
    for one in found:
        values = column_values(dataset, one.column)
        counts = histogram(one.column, values)
        text.append(text_histogram(counts, marks=(one.value,)))
        parts.append(f"<h2>{html.escape(one.text)}</h2>{_bars(counts, mark=one.value)}")
        parts += _sides(dataset, around(values, one, clips), values, one.column)
    if not found:  # such as `not duplicate`: nothing is nearer to it than anything else
        kept = _kept(dataset, expression)
        parts += _sides(dataset, _spread_sides(kept, clips), None, "")
    _write(Path(output), where, parts)
    return "\n".join(text)


def _kept(dataset: ShardDataset, expression: Expression) -> NDArray[np.bool_]:
    """(N,) whether an expression leaves each sample."""
    rows = dataset.rows
    columns: Mapping[str, ClipColumn] = dataset.filter_columns()
    stop = int(rows[-1]) + 1 if len(rows) else 0
    return mask_of(expression, columns, 0, stop)[rows]


def _spread_sides(kept: NDArray[np.bool_], clips: int) -> tuple[Ints, Ints]:
    sides = [np.flatnonzero(kept == side) for side in (False, True)]
    places = [
        np.unique(np.linspace(0, max(0, len(s) - 1), min(clips, len(s))).round().astype(int)) for s in sides
    ]
    return sides[0][places[0]], sides[1][places[1]]


def _sides(
    dataset: ShardDataset, sides: tuple[Ints, Ints], values: NDArray[np.generic] | None, name: str
) -> Iterator[str]:
    for title, side in zip(("Left out", "Left"), sides, strict=True):
        yield f"<h3>{title}</h3>"
        for i in side.tolist():
            note = "" if values is None else f"{name} {values[i]:.4g}"
            yield figure(dataset, i, FRAMES, note=note)


def _write(target: Path, title: str, parts: Sequence[str]) -> None:
    head = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    with whole_file(target) as temporary:
        temporary.write_text("\n".join([head, *parts]), encoding="utf-8", errors="backslashreplace")


def _bars(found: Histogram, *, mark: float | None = None) -> str:
    most = max(found.counts, default=1) or 1
    rows = []
    for low, high, count in zip(found.edges, found.edges[1:], found.counts, strict=False):
        here = " ←" if mark is not None and low <= mark < high else ""
        rows.append(
            f"<tr><td>{low:.4g} to {high:.4g}{here}<td>{count}<td style='text-align:left'>"
            f"<span class=bar style='width:{12 * count / most:.2f}em'></span></tr>"
        )
    missing = f"<p>{found.missing} clips have no value.</p>" if found.missing else ""
    return f"<table><tr><th>{html.escape(found.name)}<th>clips<th></tr>{''.join(rows)}</table>{missing}"


def _census(left: Sequence[SplitCensus]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(one.split)}<td>{one.left}<td>{one.clips}<td>{one.left / one.clips:.1%}</tr>"
        for one in left
    )
    return f"<table><tr><th>split<th>left<th>of<th></tr>{rows}</table>"
