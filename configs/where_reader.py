"""The text of ``data.where`` read to an expression: a tokenizer and a recursive descent, both bounded.

Length and nesting are limited, so that whatever comes from a config is read in little time and memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from cliplift.configs.sections import ConfigError
from cliplift.configs.where import (
    COMPARISONS,
    Arithmetic,
    Column,
    Compared,
    Comparison,
    Constant,
    Expression,
    Joined,
    Negative,
    Not,
    Within,
    refusal,
)

MAX_CHARACTERS, MAX_DEPTH = 2000, 32
RESERVED = frozenset(("and", "or", "not", "in"))


def parse(text: str) -> Expression:
    """Read an expression; what it says of columns is not yet checked.

    Raises:
        ConfigError: it is not an expression, or longer or deeper than any that a person writes.
    """
    if len(text) > MAX_CHARACTERS:
        raise refusal(f"has {len(text)} characters, more than {MAX_CHARACTERS}", text[:40] + " ...")
    return _Reader(text).whole()


class _Token(NamedTuple):
    kind: str  # number, name, text, sign or end
    text: str
    place: int


TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)"
    r"""|(?P<text>"[^"]*"|'[^']*')|(?P<sign><=|>=|==|!=|[-<>+*/(),]))"""
)
INSTEAD = {"=": "==", "&": "and", "|": "or", "!": "not"}


def _tokens(text: str) -> Iterator[_Token]:
    place, end = 0, len(text.rstrip())
    while place < end:
        found = TOKEN.match(text, place)
        if found is None:
            rest = text[place:].lstrip()
            hint = f"write {INSTEAD[rest[0]]}" if rest[0] in INSTEAD else ""
            raise refusal(
                f"{rest[0]!r} at character {end - len(rest.rstrip()) + 1} is not understood", text, hint
            )
        kind = found.lastgroup
        assert kind is not None
        yield _Token(kind, found[kind], found.start(kind))
        place = found.end()
    yield _Token("end", "", len(text))


class _Reader:
    """Reads an expression by recursive descent; each method reads what its name says from the place that is reached."""

    def __init__(self, text: str) -> None:
        self._text, self._depth = text, 0
        self._tokens = list(_tokens(text))
        self._place = 0

    def whole(self) -> Expression:
        if len(self._tokens) == 1:
            raise refusal("is empty", self._text, "leave it out to use every clip")
        found = self._alternatives()
        if self._next.kind != "end":
            raise self._unexpected("the end")
        return found

    @property
    def _next(self) -> _Token:
        return self._tokens[self._place]

    def _take(self, *texts: str) -> str | None:
        """The next token, if it is one of these signs or words."""
        if self._next.kind in ("sign", "name") and self._next.text in texts:
            self._place += 1
            return self._tokens[self._place - 1].text
        return None

    def _expect(self, text: str) -> None:
        if self._take(text) is None:
            raise self._unexpected(repr(text))

    def _unexpected(self, wanted: str) -> ConfigError:
        found = self._next
        what = "it ends" if found.kind == "end" else f"{found.text!r} stands at character {found.place + 1}"
        return refusal(f"{what} where {wanted} is expected", self._text)

    def _deeper(self, read: Callable[[], Expression]) -> Expression:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise refusal(f"is nested more than {MAX_DEPTH} deep", self._text[:40] + " ...")
        found = read()
        self._depth -= 1
        return found

    def _alternatives(self) -> Expression:
        parts = [self._conditions()]
        while self._take("or"):
            parts.append(self._conditions())
        return parts[0] if len(parts) == 1 else Joined("or", tuple(parts))

    def _conditions(self) -> Expression:
        parts = [self._condition()]
        while self._take("and"):
            parts.append(self._condition())
        return parts[0] if len(parts) == 1 else Joined("and", tuple(parts))

    def _condition(self) -> Expression:
        if self._take("not"):
            return Not(self._deeper(self._condition))
        first = self._sum()
        if self._take("not"):
            self._expect("in")
            return Not(Within(first, self._list()))
        if self._take("in"):
            return Within(first, self._list())
        rest: list[tuple[Comparison, Expression]] = []
        while sign := self._take(*COMPARISONS):
            rest.append((COMPARISONS[COMPARISONS.index(sign)], self._sum()))
        return Compared(first, tuple(rest)) if rest else first

    def _list(self) -> tuple[Constant, ...]:
        self._expect("(")
        values = [self._constant()]
        while self._take(","):
            values.append(self._constant())
        self._expect(")")
        return tuple(values)

    def _constant(self) -> Constant:
        minus = self._take("-")
        found = self._atom()
        if not isinstance(found, Constant) or (minus and not _is_number(found.value)):
            self._place -= 1
            raise self._unexpected("a number or a text")
        return Constant(-found.value) if minus and not isinstance(found.value, str) else found

    def _sum(self) -> Expression:
        return self._chain(self._product, "+", "-")

    def _product(self) -> Expression:
        return self._chain(self._signed, "*", "/")

    def _chain(self, part: Callable[[], Expression], *signs: str) -> Expression:
        first, rest = part(), list[tuple[str, Expression]]()
        while sign := self._take(*signs):
            rest.append((sign, part()))
        return Arithmetic(first, tuple(rest)) if rest else first

    def _signed(self) -> Expression:
        return Negative(self._deeper(self._signed)) if self._take("-") else self._atom()

    def _atom(self) -> Expression:
        token = self._next
        if self._take("("):
            found = self._deeper(self._alternatives)
            self._expect(")")
            return found
        if token.kind in ("end", "sign") or (token.kind == "name" and token.text in RESERVED):
            raise self._unexpected("a value")
        self._place += 1
        if token.kind == "number":
            value = float(token.text)
            if value == float("inf"):
                raise refusal(f"{token.text} is too large a number", self._text)
            return Constant(value)
        if token.kind == "text":
            return Constant(token.text[1:-1])
        return Constant(token.text == "true") if token.text in ("true", "false") else Column(token.text)


def _is_number(value: float | str | bool) -> bool:
    return isinstance(value, float)
