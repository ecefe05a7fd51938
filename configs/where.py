"""Filters of clips: the expressions of ``data.where``, such as ``motion > 0.02 and height >= 240 and not duplicate``.

A small language with a reader of its own: nothing of an expression is ever executed as Python. From weak to strong::

    or, and, not, comparisons (chained as in Python) and [not] in (...), + and -, * and /, the minus sign, ( )

Numbers, "texts", true and false stand for themselves; any other word is a column. Which columns there are, and of
which kind, is known only where the clips are: ``where_reader.parse`` checks the form, :func:`check_kinds` the meaning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from cliplift.configs.sections import ConfigError

KEY = "data.where"

Kind = Literal["number", "boolean", "text"]
Comparison = Literal["<", "<=", ">", ">=", "==", "!="]
COMPARISONS: tuple[Comparison, ...] = ("<", "<=", ">", ">=", "==", "!=")


@dataclass(frozen=True)
class Constant:
    """A number, a text, or true or false."""

    value: float | str | bool


@dataclass(frozen=True)
class Column:
    """The value of a clip in a column."""

    name: str


@dataclass(frozen=True)
class Negative:
    """Minus a number."""

    of: Expression


@dataclass(frozen=True)
class Arithmetic:
    """A number, and what is added, subtracted, multiplied or divided one after the other."""

    first: Expression
    rest: tuple[tuple[str, Expression], ...]


@dataclass(frozen=True)
class Compared:
    """A chain of comparisons, true where each of them is."""

    first: Expression
    rest: tuple[tuple[Comparison, Expression], ...]


@dataclass(frozen=True)
class Within:
    """Whether a value is one of a list of constants."""

    of: Expression
    values: tuple[Constant, ...]


@dataclass(frozen=True)
class Not:
    """The opposite."""

    of: Expression


@dataclass(frozen=True)
class Joined:
    """Several conditions, of which all (``and``) or at least one (``or``) must hold."""

    word: Literal["and", "or"]
    of: tuple[Expression, ...]


Expression = Constant | Column | Negative | Arithmetic | Compared | Within | Not | Joined


def columns_of(expression: Expression) -> tuple[str, ...]:
    """The names of the columns that an expression uses, sorted."""
    return tuple(sorted({part.name for part in parts_of(expression) if isinstance(part, Column)}))


def canonical_text(expression: Expression) -> str:
    """The expression in one form, whatever its spaces and brackets were: the same text for the same meaning."""
    match expression:
        case Constant(value):
            # A text has no escapes: it holds at most one of the two quotation marks.
            quoted = f"'{value}'" if '"' in str(value) else f'"{value}"'
            text = quoted if isinstance(value, str) else repr(value).lower()
        case Column(name):
            text = name
        case Negative(of):
            text = f"-{_bracketed(of)}"
        case Not(of):
            text = f"not {_bracketed(of)}"
        case Within(of, values):
            text = f"{_bracketed(of)} in ({', '.join(map(canonical_text, values))})"
        case Joined(word, parts):
            text = f" {word} ".join(map(_bracketed, parts))
        case Arithmetic(first, rest) | Compared(first, rest):
            text = " ".join([_bracketed(first), *(f"{sign} {_bracketed(part)}" for sign, part in rest)])
    return text


def check_kinds(expression: Expression, kinds: Mapping[str, Kind], *, hints: Mapping[str, str] = {}) -> None:
    """Refuse an expression that these columns give no meaning.

    Args:
        expression: what :func:`parse` made.
        kinds: the columns there are.
        hints: of columns that there are not, what to do to have them.

    Raises:
        ConfigError: a column is unknown, its kind does not fit, or the whole is not true or false.
    """
    for name in columns_of(expression):
        if name not in kinds:
            near = get_close_matches(name, [*kinds, *hints], n=1)
            hint = hints.get(name) or (f"did you mean {near[0]}?" if near else "")
            raise refusal(
                f"there is no column {name!r}", name, hint or f"there are {', '.join(sorted(kinds))}"
            )
    if _kind(expression, kinds) != "boolean":
        raise refusal(f"{canonical_text(expression)} is no condition", hint="compare it, as in motion > 0.02")


def parts_of(expression: Expression) -> Iterator[Expression]:
    """An expression and all its parts."""
    yield expression
    match expression:
        case Negative(of) | Not(of) | Within(of, _):
            yield from parts_of(of)
        case Joined(_, parts):
            for part in parts:
                yield from parts_of(part)
        case Arithmetic(first, rest) | Compared(first, rest):
            yield from parts_of(first)
            for _, part in rest:
                yield from parts_of(part)
        case _:
            return


def _bracketed(expression: Expression) -> str:
    text = canonical_text(expression)
    return text if isinstance(expression, Constant | Column) else f"({text})"


def _kind(expression: Expression, kinds: Mapping[str, Kind]) -> Kind:
    """The kind of a value. Raises ConfigError where a part does not fit its place."""
    match expression:
        case Constant(value):
            return "text" if isinstance(value, str) else "boolean" if isinstance(value, bool) else "number"
        case Column(name):
            return kinds[name]
        case Negative(of):
            return _require(of, kinds, "number")
        case Not(of):
            return _require(of, kinds, "boolean")
        case Joined(_, parts):
            for part in parts:
                _require(part, kinds, "boolean")
        case Arithmetic(first, rest):
            for part in (first, *(one for _, one in rest)):
                _require(part, kinds, "number")
            return "number"
        case Within(of, constants):
            for constant in constants:
                _alike(of, constant, "==", kinds)
        case Compared(first, rest):
            before = first
            for sign, part in rest:
                _alike(before, part, sign, kinds)
                before = part
    return "boolean"


def _require(expression: Expression, kinds: Mapping[str, Kind], wanted: Kind) -> Kind:
    found = _kind(expression, kinds)
    if found != wanted:
        hint = "compare it with a number, as in motion > 0.02" if wanted == "boolean" else ""
        raise refusal(f"{canonical_text(expression)} is a {found}, where a {wanted} is needed", hint=hint)
    return found


def _alike(first: Expression, second: Expression, sign: Comparison, kinds: Mapping[str, Kind]) -> None:
    one, other = _kind(first, kinds), _kind(second, kinds)
    shown = f"{canonical_text(first)} {sign} {canonical_text(second)}"
    if one != other:
        raise refusal(f"{shown} compares a {one} with a {other}")
    if one != "number" and sign not in ("==", "!="):
        raise refusal(f"{shown}: a {one} is the same or not, and never less or more", hint="use == or !=")
    if one == "text" and not (isinstance(first, Column) and isinstance(second, Constant)):
        raise refusal(f"{shown} compares no column with a text", hint='write it as in class == "archery"')


def refusal(reason: str, value: object = None, hint: str = "") -> ConfigError:
    return ConfigError(reason, key=KEY, value=value, hint=hint)
