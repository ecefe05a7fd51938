"""The mutants of a file: cosmic-ray's operators and one of ours, and a sample of them that is the same every time."""

from __future__ import annotations

import ast
import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import parso
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from parso.tree import NodeOrLeaf

Position = tuple[int, int]  # line from 1, column from 0
DELETE_STATEMENT = "delete statement"


class DeleteStatement(Operator):
    """A call whose result nobody uses, or a change in place, becomes ``pass``: cosmic-ray has nothing of the kind."""

    def mutation_positions(self, node: NodeOrLeaf) -> Iterator[tuple[Position, Position]]:
        alone = node.parent is not None and node.parent.type == "simple_stmt"
        call = node.type == "atom_expr" and node.children[-1].type == "trailer"
        in_place = (
            node.type == "expr_stmt" and node.children[1].type == "operator" and node.children[1] != "="
        )
        if alone and (call or in_place):
            yield node.start_pos, node.end_pos

    def mutate(self, node: NodeOrLeaf, index: int) -> NodeOrLeaf:
        replacement = parso.parse("pass").children[0]
        replacement.get_first_leaf().prefix = node.get_first_leaf().prefix
        return replacement

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    operator: str
    occurrence: int  # which of the places where the operator applies
    line: int
    column: int

    @property
    def name(self) -> str:
        return f"{self.operator} {self.occurrence}"


def operator_named(name: str) -> Operator:
    """An operator of cosmic-ray by its name there, or ours."""
    return DeleteStatement() if name == DELETE_STATEMENT else plugins.get_operator(name)()


def mutants_of(source: str) -> list[Mutant]:
    """All mutants of a file, except those of annotations, which nothing evaluates."""
    tree = get_ast(source)
    nodes = list(ast_nodes(tree))
    unevaluated = list(_annotations(source))
    # Operators with arguments replace variables by others of the same scope; they are off in cosmic-ray too.
    names = [name for name in plugins.operator_names() if not plugins.get_operator(name).arguments()]
    # Whether equal numbers and strings are one object is the interpreter's choice, so `is` for `==` shows nothing.
    names = [name for name in names if not (name.endswith(("_Is", "_IsNot")) and "Operator_Is" not in name)]
    found = []
    for name in [*sorted(names), DELETE_STATEMENT]:
        operator = operator_named(name)
        places = (place for node in nodes for place in operator.mutation_positions(node))
        for occurrence, (start, _) in enumerate(places):
            if not any(first <= start < last for first, last in unevaluated):
                found.append(Mutant(name, occurrence, *start))
    return found


def _annotations(source: str) -> Iterator[tuple[Position, Position]]:
    for node in ast.walk(ast.parse(source)):
        annotation = getattr(node, "returns", None) or getattr(node, "annotation", None)
        if annotation is not None:
            # ast counts columns in bytes; our code lines are ASCII wherever an annotation stands.
            yield (
                (annotation.lineno, annotation.col_offset),
                (annotation.end_lineno, annotation.end_col_offset),
            )


def sample(mutants: list[Mutant], number: int, *, seed: str) -> list[Mutant]:
    """``number`` mutants, by hash: every place of the file is drawn once before any is drawn twice."""

    def hashed(*parts: object) -> bytes:
        return hashlib.sha256(repr((seed, *parts)).encode()).digest()

    by_place: dict[Position, list[Mutant]] = {}
    for mutant in sorted(mutants, key=lambda m: hashed(m.operator, m.occurrence)):
        by_place.setdefault((mutant.line, mutant.column), []).append(mutant)
    places = sorted(by_place.values(), key=lambda place: hashed(place[0].operator, place[0].occurrence))
    rounds = range(max(map(len, places), default=0))
    in_turn = [place[turn] for turn in rounds for place in places if turn < len(place)]
    return in_turn[:number]


def mutated(source: str, mutant: Mutant) -> str | None:
    """The file with one change; None where the operator finds no such place."""
    code: str | None = mutate_code(source, operator_named(mutant.operator), mutant.occurrence)
    return code


def difference(source: str, changed: str, file: Path) -> str:
    """A unified diff without context."""
    lines = difflib.unified_diff(
        source.splitlines(), changed.splitlines(), str(file), str(file), lineterm="", n=0
    )
    return "\n".join(lines)
