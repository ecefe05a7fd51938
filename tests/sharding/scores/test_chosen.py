"""Filters against plain Python, row by row, on random tables and random expressions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from cliplift.configs.sections import ConfigError
from cliplift.configs.where import check_kinds
from cliplift.configs.where_reader import parse
from cliplift.sharding.scores import chosen
from cliplift.sharding.scores.chosen import ClipColumn, check_texts, chosen_rows

CLASSES = ("archery", "bowling", "cricket")
NUMBERS, COMPARISONS = ("motion", "height"), ("<", "<=", ">", ">=", "==", "!=")
SIGNS: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne
}  # fmt: skip

# An expression as text, and the same in Python: a function of a row, which is a dictionary.
Both = tuple[str, Callable[[dict[str, Any]], Any]]


def constants() -> st.SearchStrategy[Both]:
    values = st.sampled_from([0.0, 0.5, 1.0, 2.0, 0.02, 240.0])
    return values.map(lambda v: (f"{v}", lambda _: v))


def columns() -> st.SearchStrategy[Both]:
    return st.sampled_from(NUMBERS).map(lambda name: (name, lambda row: row[name]))


def numbers() -> st.SearchStrategy[Both]:
    def more(inner: st.SearchStrategy[Both]) -> st.SearchStrategy[Both]:
        def joined(sign: str, a: Both, b: Both) -> Both:
            do = {"+": operator.add, "-": operator.sub, "*": operator.mul}[sign]
            return f"({a[0]} {sign} {b[0]})", lambda row: do(a[1](row), b[1](row))

        negative = inner.map(lambda a: (f"-{a[0]}", lambda row: -a[1](row)))
        return negative | st.builds(joined, st.sampled_from("+-*"), inner, inner)

    return st.recursive(constants() | columns(), more, max_leaves=3)


def conditions() -> st.SearchStrategy[Both]:
    def compared(first: Both, rest: list[tuple[str, Both]]) -> Both:
        def holds(row: dict[str, Any]) -> bool:
            values = [first[1](row), *(part[1](row) for _, part in rest)]
            return all(SIGNS[sign](values[i], values[i + 1]) for i, (sign, _) in enumerate(rest))

        return " ".join([first[0], *(f"{sign} {part[0]}" for sign, part in rest)]), holds

    def texts(negated: bool, names: list[str]) -> Both:
        listed = ", ".join(f"'{name}'" for name in names)
        return f"class {'not ' * negated}in ({listed})", lambda row: (row["class"] in names) != negated

    def equal(sign: str, name: str) -> Both:
        return f'class {sign} "{name}"', lambda row: SIGNS[sign](row["class"], name)

    pair = st.tuples(st.sampled_from(COMPARISONS), numbers())
    leaves = (
        st.builds(compared, numbers(), st.lists(pair, min_size=1, max_size=2))
        | st.builds(texts, st.booleans(), st.lists(st.sampled_from(CLASSES), min_size=1, max_size=2))
        | st.builds(equal, st.sampled_from(("==", "!=")), st.sampled_from(CLASSES))
        | st.just(("duplicate", lambda row: row["duplicate"]))
    )

    def more(inner: st.SearchStrategy[Both]) -> st.SearchStrategy[Both]:
        def both(a: Both, b: Both) -> Both:
            return f"({a[0]} and {b[0]})", lambda row: a[1](row) and b[1](row)

        def either(a: Both, b: Both) -> Both:
            return f"({a[0]} or {b[0]})", lambda row: a[1](row) or b[1](row)

        opposite = inner.map(lambda a: (f"not ({a[0]})", lambda row: not a[1](row)))
        return opposite | st.builds(both, inner, inner) | st.builds(either, inner, inner)

    return st.recursive(leaves, more, max_leaves=4)


def table(rows: int, seed: int) -> tuple[dict[str, np.ndarray], dict[str, ClipColumn]]:
    draw = np.random.default_rng(seed)
    motion = draw.choice([0.0, 0.02, 0.5, 1.0, np.nan], size=rows).astype("<f4")
    values = {
        "motion": motion,
        "height": draw.choice([1, 2, 240], size=rows).astype("<i4"),
        "duplicate": draw.integers(2, size=rows).astype("u1"),
        "class": draw.integers(-1, 3, size=rows).astype("<i4"),
    }
    names = {name: number for number, name in enumerate(CLASSES)}
    kinds = {"motion": "number", "height": "number", "duplicate": "boolean", "class": "text"}
    made = {
        name: ClipColumn(kinds[name], lambda a, b, v=v: v[a:b], names if name == "class" else {})  # type: ignore[arg-type, misc]
        for name, v in values.items()
    }
    return values, made


def row_of(values: dict[str, np.ndarray], i: int) -> dict[str, Any]:
    label = int(values["class"][i])
    return {
        "motion": float(values["motion"][i]),
        "height": int(values["height"][i]),
        "duplicate": bool(values["duplicate"][i]),
        "class": CLASSES[label] if label >= 0 else None,
    }


@settings(max_examples=40)
@given(both=conditions(), seed=st.integers(0, 5), edges=st.lists(st.integers(0, 40), max_size=6, unique=True))
def test_filters_choose_what_python_chooses(both: Both, seed: int, edges: list[int]) -> None:
    text, holds = both
    values, made = table(40, seed)
    expression = parse(text)
    check_kinds(expression, {name: one.kind for name, one in made.items()})
    check_texts(expression, made)
    edges = sorted(edges)[: len(edges) // 2 * 2]
    firsts, stops = np.array(edges[::2], dtype=np.int64), np.array(edges[1::2], dtype=np.int64)
    inside = [i for a, b in zip(firsts, stops, strict=True) for i in range(a, b)]
    wanted = []
    for i in inside:
        row = row_of(values, i)
        if "motion" in text and math.isnan(row["motion"]):  # no value, so left out whatever is asked
            continue
        if holds(row):
            wanted.append(i)
    for block in (7, 1 << 16):  # whatever the blocks are
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chosen, "BLOCK_ROWS", block)
            begins, lengths = chosen_rows(expression, made, firsts, stops)
        found = [int(a) + k for a, n in zip(begins, lengths, strict=True) for k in range(n)]
        assert found == wanted, text
        assert all(a + n < b for a, n, b in zip(begins, lengths, begins[1:], strict=False)), "runs are whole"


def test_numbers_are_compared_as_python_compares_them() -> None:
    values = np.array([0.02, 0.1], dtype="<f4")  # 0.0199999996 and 0.1000000015
    made = {"motion": ClipColumn("number", lambda a, b: values[a:b])}
    for text, wanted in (("motion >= 0.02", [1]), ("motion < 0.02", [0]), ("motion > 0.1", [1])):
        begins, lengths = chosen_rows(parse(text), made, np.array([0]), np.array([2]))
        assert [int(a) + k for a, n in zip(begins, lengths, strict=True) for k in range(n)] == wanted, text


def test_division_by_nothing_is_no_error() -> None:
    values = np.array([0, 1, 2], dtype="<i4")
    made = {"height": ClipColumn("number", lambda a, b: values[a:b])}
    begins, lengths = chosen_rows(parse("1 / height > 0.6"), made, np.array([0]), np.array([3]))
    assert (begins.tolist(), lengths.tolist()) == ([0], [2])


def test_a_class_that_there_is_not_is_named_with_the_nearest() -> None:
    _, made = table(1, 0)
    for text in ("class == 'bowlin'", "not (class in ('archery', 'bowlin'))"):
        with pytest.raises(ConfigError, match="no class is called 'bowlin'; did you mean 'bowling'"):
            check_texts(parse(text), made)
