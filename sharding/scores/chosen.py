"""The clips that an expression of ``data.where`` leaves, found block by block on columns that are mapped into memory.

Numbers are compared as they are stored, in 64 bits, so that the answer is Python's own. A clip that has no value in a
column that the expression names is left out, whatever the expression says of it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial, reduce

import numpy as np
from numpy.typing import NDArray

from cliplift.configs.sections import ConfigError
from cliplift.configs.where import (
    KEY,
    Arithmetic,
    Column,
    Compared,
    Constant,
    Expression,
    Joined,
    Kind,
    Negative,
    Not,
    Within,
    columns_of,
    parts_of,
)
from cliplift.sharding.manifest import NO_LABEL
from cliplift.sharding.scores.stored import SCORE_NAMES, ScoreColumns

BLOCK_ROWS = 1 << 16

Ints = NDArray[np.int64]
Block = NDArray[np.generic]
Blocks = Mapping[str, Block]
OPERATORS: Mapping[str, Callable[[Block, Block], Block]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


@dataclass(frozen=True)
class ClipColumn:
    """A column as an expression sees it.

    Attributes:
        kind: of its values.
        values: gives those of the rows ``first`` to ``stop``; the numbers of its texts, where these are its values.
        texts: the number of each text.
        unscored: clips that have no value yet.
    """

    kind: Kind
    values: Callable[[int, int], Block]
    texts: Mapping[str, int] = field(default_factory=dict)
    unscored: int = 0


def catalog_columns(
    column_of: Callable[[str, int, int], Block], classes: tuple[str, ...]
) -> dict[str, ClipColumn]:
    """The columns that every dataset has.

    Args:
        column_of: gives a column of the catalog for the rows ``first`` to ``stop``.
        classes: names of the labels.
    """

    def stored(name: str) -> ClipColumn:
        return ClipColumn("number", lambda first, stop: column_of(name, first, stop))

    def seconds(first: int, stop: int) -> Block:
        frames, rates = column_of("num_frames", first, stop), column_of("fps", first, stop)
        return frames.astype(np.float64) / rates.astype(np.float64)

    columns = {name: stored(name) for name in ("width", "height", "fps")}
    columns |= {"frames": stored("num_frames"), "bytes": stored("mp4_bytes")}
    columns["seconds"] = ClipColumn("number", seconds)
    names = {name: number for number, name in enumerate(classes)} | {"": NO_LABEL}
    columns["class"] = ClipColumn("text", lambda first, stop: column_of("label", first, stop), names)
    return columns


def score_columns(scores: ScoreColumns | None) -> dict[str, ClipColumn]:
    """The columns of scores; none where a dataset has none."""

    def stored(name: str, found: ScoreColumns) -> ClipColumn:
        facts = found.facts[name]
        values = partial(found.values, name)
        return ClipColumn("number" if facts.kind == "number" else "boolean", values, unscored=facts.unscored)

    return {} if scores is None else {name: stored(name, scores) for name in scores.facts}


def not_scored(url: str, columns: Mapping[str, ClipColumn]) -> dict[str, str]:
    """What to do to have the columns that a dataset could have and has not."""
    root = url.rpartition("@")[0] or url
    return {
        name: f"run `cliplift score {root} {name}`, and read the generation that it makes"
        for name in SCORE_NAMES
        if name not in columns
    }


def check_texts(expression: Expression, columns: Mapping[str, ClipColumn]) -> None:
    """Refuse texts that a column never has. Raises ConfigError."""
    for part in parts_of(expression):
        match part:
            case Compared(Column(name), ((_, Constant(str(text))),)):
                texts = [text]
            case Within(Column(name), values):
                texts = [value.value for value in values if isinstance(value.value, str)]
            case _:
                continue
        for text in texts:
            if text not in columns[name].texts:
                near = get_close_matches(text, columns[name].texts, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "`cliplift show` lists them"
                raise ConfigError(f"no {name} is called {text!r}", key=KEY, value=text, hint=hint)


def chosen_rows(
    expression: Expression, columns: Mapping[str, ClipColumn], firsts: Ints, stops: Ints
) -> tuple[Ints, Ints]:
    """Which rows an expression leaves of some runs of rows, in memory that grows with the runs found alone.

    Args:
        expression: of these columns.
        columns: by name.
        firsts: (K,) first row of each run.
        stops: (K,) the row after its last.

    Returns:
        (M,) first row of each run of rows that are left, and (M,) how many there are.
    """
    found_firsts, found_stops = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    end = int(stops[-1]) if len(stops) else 0
    for first in range(0, end, BLOCK_ROWS):
        stop = min(end, first + BLOCK_ROWS)
        here = slice(int(stops.searchsorted(first, side="right")), int(firsts.searchsorted(stop)))
        if here.start == here.stop:
            continue
        inside = np.zeros(stop - first + 1, dtype=np.int8)
        inside[np.maximum(firsts[here] - first, 0)] += 1
        inside[np.minimum(stops[here], stop) - first] -= 1
        left = mask_of(expression, columns, first, stop) & (np.cumsum(inside[:-1], dtype=np.int8) > 0)
        edges = np.diff(left.astype(np.int8), prepend=0, append=0)
        found_firsts.append(np.flatnonzero(edges == 1) + first)
        found_stops.append(np.flatnonzero(edges == -1) + first)
    begins, ends = np.concatenate(found_firsts), np.concatenate(found_stops)
    if not len(begins):
        return begins, ends
    # Runs that only a block's edge cuts are one.
    apart = begins[1:] != ends[:-1]
    begins, ends = begins[np.concatenate([[True], apart])], ends[np.concatenate([apart, [True]])]
    return begins, ends - begins


def mask_of(
    expression: Expression, columns: Mapping[str, ClipColumn], first: int, stop: int
) -> NDArray[np.bool_]:
    """(stop - first,) whether each row is left."""
    blocks: dict[str, Block] = {}
    whole = np.ones(stop - first, dtype=bool)
    for name in columns_of(expression):
        values = columns[name].values(first, stop)
        if columns[name].kind == "number":
            values = values.astype(np.float64)
            whole &= ~np.isnan(values)
        blocks[name] = values.astype(bool) if columns[name].kind == "boolean" else values
    with np.errstate(all="ignore"):
        found = np.broadcast_to(_value(expression, blocks, columns), whole.shape)
    chosen: NDArray[np.bool_] = whole & found.astype(bool)
    return chosen


def _value(expression: Expression, blocks: Blocks, columns: Mapping[str, ClipColumn]) -> Block:
    """The value of an expression for every row, or one for all where it names no column."""
    match expression:
        case Constant(value):
            found = np.asarray(value)
        case Column(name):
            found = blocks[name]
        case Negative(of):
            found = np.negative(_value(of, blocks, columns))
        case Not(of):
            found = np.logical_not(_value(of, blocks, columns))
        case Joined(word, parts):
            join = np.logical_and if word == "and" else np.logical_or
            found = reduce(join, (_value(part, blocks, columns) for part in parts))
        case Within(of, values):
            found = reduce(np.logical_or, (_pair(of, "==", value, blocks, columns) for value in values))
        case Compared(before, rest):
            found = np.asarray(True)
            for sign, part in rest:
                found = np.logical_and(found, _pair(before, sign, part, blocks, columns))
                before = part
        case Arithmetic(first, terms):
            found = _value(first, blocks, columns)
            for operation, term in terms:
                found = OPERATORS[operation](found, _value(term, blocks, columns))
    return found


def _pair(
    first: Expression, sign: str, second: Expression, blocks: Blocks, columns: Mapping[str, ClipColumn]
) -> Block:
    if isinstance(second, Constant) and isinstance(second.value, str):  # a text is compared as its number
        assert isinstance(first, Column)
        number = np.asarray(columns[first.name].texts[second.value])
        return OPERATORS[sign](blocks[first.name], number)
    return OPERATORS[sign](_value(first, blocks, columns), _value(second, blocks, columns))
