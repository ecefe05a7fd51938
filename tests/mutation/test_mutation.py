"""The tool behind ``make mutants``: which changes it makes, which sample it draws, what its table counts."""

from __future__ import annotations

import ast
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("cosmic_ray", reason="install the extra mutation, as make mutants does")
HERE = Path(__file__).parent
SOURCE = '''
from __future__ import annotations

LIMIT: int | None = 3


def add(a: int | str, b: int = 1) -> int | None:
    """The sum."""
    total = a + b
    total += LIMIT
    print(total)
    return total if a < b else None
'''


@pytest.fixture(scope="module")
def tool(load_module: Callable[[Path], ModuleType]) -> Iterator[SimpleNamespace]:
    """The modules, which import each other by their plain names; what the script puts first in the path is undone."""
    path = list(sys.path)
    names = ("mutations", "report", "run")
    yield SimpleNamespace(**{name: load_module(HERE / f"{name}.py") for name in names})
    sys.path[:] = path
    for name in names:
        sys.modules.pop(name, None)


def test_every_mutant_is_one_change_of_code_that_runs(tool: SimpleNamespace) -> None:
    mutants = tool.mutations.mutants_of(SOURCE)
    lines = SOURCE.splitlines()
    assert {m.line for m in mutants} == {4, 7, 9, 10, 11, 12}
    for mutant in mutants:
        changed = tool.mutations.mutated(SOURCE, mutant)
        ast.parse(changed)
        before, after = lines, changed.splitlines()
        assert len(before) == len(after)
        different = [n for n in range(len(before)) if before[n] != after[n]]
        assert different == [mutant.line - 1], mutant
        assert "int | " in after[3], "an annotation is not evaluated, so a change of it shows nothing"
        assert "a: int | str" in after[6]


def test_a_statement_is_left_out(tool: SimpleNamespace) -> None:
    left_out = [m for m in tool.mutations.mutants_of(SOURCE) if m.operator == tool.mutations.DELETE_STATEMENT]
    changed = [tool.mutations.mutated(SOURCE, m).splitlines()[m.line - 1] for m in left_out]
    assert [(m.line, text) for m, text in zip(left_out, changed, strict=True)] == [
        (10, "    pass"),
        (11, "    pass"),
    ]


def test_a_sample_takes_every_place_once_before_any_twice(tool: SimpleNamespace) -> None:
    mutants = tool.mutations.mutants_of(SOURCE)
    places = {(m.line, m.column) for m in mutants}
    first = tool.mutations.sample(mutants, len(places), seed="a")
    assert {(m.line, m.column) for m in first} == places
    assert tool.mutations.sample(mutants[::-1], len(places), seed="a") == first
    assert tool.mutations.sample(mutants, len(places), seed="b") != first
    assert tool.mutations.sample(mutants, 3, seed="a") == first[:3], "a larger sample holds the smaller one"
    assert set(tool.mutations.sample(mutants, 10**6, seed="a")) == set(mutants)


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (0, "survived"), (1, "killed"), (2, "killed"), (4, "killed"), (-signal.SIGSEGV, "killed"),
        (-signal.SIGXCPU, "timeout"), (-signal.SIGKILL, "timeout"),
    ],
)  # fmt: skip
def test_what_an_exit_status_says(tool: SimpleNamespace, status: int, outcome: str) -> None:
    assert tool.run.outcome_of(status) == outcome


def test_the_table_leaves_equivalent_mutants_out_of_the_share(tool: SimpleNamespace, tmp_path: Path) -> None:
    """Four mutants: two killed, one equivalent, one survivor: 2 of 3."""

    def result(outcome: str, line: str) -> SimpleNamespace:
        changed = tool.mutations.difference(SOURCE, SOURCE.replace("    print(total)", line), Path("add.py"))
        return SimpleNamespace(
            module="add", mutant=line, file="add.py", line=11, outcome=outcome, diff=changed
        )

    results = [result("killed", "a"), result("timeout", "b"), result("survived", "    print( total)"),
               result("survived", "    pass")]  # fmt: skip
    (tmp_path / "equivalent.toml").write_text(
        "[[add]]\nbefore = 'print(total)'\nafter = 'print( total)'\nreason = 'the same call'\n"
    )
    (tmp_path / "add.sample.json").write_text(json.dumps({"all": 9, "sample": [r.mutant for r in results]}))
    text = tool.report.summary({"add": {r.mutant: r for r in results}}, tmp_path, tmp_path)
    assert "| add | 9 | 4 | 1 | 1 | 1 | 1 | 67 |" in text
    assert "add.py:11 (    pass)\n    -    print(total)\n    +    pass" in text
    assert "print( total)" not in text


def test_results_hold_as_long_as_what_they_were_of(tool: SimpleNamespace, tmp_path: Path) -> None:
    """Killed: while the module is the same. Survived: while its tests are too. A line cut short is passed over."""
    module = tool.run.modules()["order"]
    source, tests = module.source_digest(), module.tests_digest()
    lines = [
        ("same", "killed", source, "other"), ("module changed", "killed", "other", tests),
        ("survivor", "survived", source, tests), ("tests changed", "survived", source, "other"),
    ]  # fmt: skip
    fields = {"module": "order", "file": "", "line": 1, "seconds": 0.0, "diff": ""}
    text = [json.dumps(fields | {"mutant": m, "outcome": o, "source": s, "tests": t}) for m, o, s, t in lines]
    (tmp_path / "order.jsonl").write_text("\n".join(text) + '\n{"module": "or')
    assert tool.run.recorded(tmp_path, module).keys() == {"same", "survivor"}


def test_modules_and_tests_that_are_named_exist(tool: SimpleNamespace, repository: Path) -> None:
    modules = tool.run.modules()
    assert len(modules) == 13
    for module in modules.values():
        assert (repository / module.file).is_file()
        assert all((repository / test).is_file() for test in module.tests)
    for name, known in tool.report.equivalents(HERE).items():
        source = (repository / modules[name].file).read_text()
        for one in known:
            assert one.before in source, f"equivalent.toml: {name} has no line {one.before!r} any more"
            assert one.reason
