"""docs/architecture.md is true: what it names exists, and its worked changes apply and do what it says."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
FLOOR = re.compile(r"(\w*) +(\w+(?:, \w+)*)  +\S.*")
ROW = re.compile(r"\| `(\w+/[\w/]+\.py)` \| ([^|]+) \| [^|]+ \|")
CHANGES = ("model", "objective", "data set", "command")  # of this tree; a plug-in changes nothing in it
# What the page says of each, run in the changed tree in one process; what takes time is the import of torch.
SHOWN = """
import contextlib, io
from cliplift.launch.cli import main
from cliplift.pipelines.stages.run import OBJECTIVES

def output(*words):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        assert not main(words), words
    return said.getvalue()

assert "1,369,738" in output("models", "all_cnn*")
assert "square_loss" in OBJECTIVES
assert "objective: square_loss" in output("pretrain", "pretrain/demo", "objective=square_loss", "--dry-run")
assert "kind: moments_in_time" in output("shard", "shard/moments_in_time", "--dry-run")
assert "list the classes of a shard dataset" in output("--help")
"""
SOLARISED = """
import contextlib, io, sys, torch
from cliplift.launch.cli import main
from solarise import Solarise

clips = torch.tensor([0.2, 0.5, 0.9]).view(1, 1, 3, 1, 1).expand(2, 1, 3, 1, 1)
found = Solarise(probability=0.5)(clips, torch.tensor([[0.4], [0.6]])).flatten(1)
torch.testing.assert_close(found, torch.tensor([[0.2, 0.5, 0.1], [0.2, 0.5, 0.9]]))
words = ("pretrain", "pretrain/demo", "--plugin", "solarise", "--dry-run")
said = io.StringIO()
with contextlib.redirect_stdout(said):
    assert main((*words, "data.augment.plugins={solarise: {probability: 0.25}}")) == 0
assert "probability: 0.25" in said.getvalue()
assert main((*words, "data.augment.plugins={solarise: {probability: 2}}")) == 2
"""


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text()


def change(page: str, what: str) -> str:
    """The diff below the heading ``Add a WHAT``."""
    section = re.split(rf"^## Add an? {what}\n", page, flags=re.MULTILINE)[1].split("\n## ")[0]
    (diff,) = re.findall(r"^```diff\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
    return str(diff)


def apply(diff: str, folder: Path, *options: str) -> None:
    done = subprocess.run(
        ["git", "apply", *options, "-"],
        cwd=folder,
        env=os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)},
        input=diff,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"the change does not apply; make its diff anew:\n{done.stderr}\n{diff}"


def files_of(diff: str) -> list[str]:
    return re.findall(r"^\+\+\+ b/(\S+)", diff, flags=re.MULTILINE)


def run_python(*words: str, cwd: Path, path: list[Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@pytest.fixture(scope="module")
def changed(repository: Path, page: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the tree as ``cliplift``, with all changes applied; each also applies alone."""
    copy = tmp_path_factory.mktemp("changed") / "cliplift"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        if (repository / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository / name, copy / name)
    for what in CHANGES:
        apply(change(page, what), copy, "--check", "-C1")
    for what in CHANGES:  # two of them change neighbouring lines
        apply(change(page, what), copy, "-C0")
    yield copy
    shutil.rmtree(copy)


def test_the_floor_plan_is_that_of_the_architecture_test(
    page: str, repository: Path, load_module: Callable[[Path], ModuleType]
) -> None:
    rooms = load_module(repository / "tests" / "test_architecture.py").ROOMS
    (plan,) = re.findall(r"^```text\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    drawn: dict[str, list[set[str]]] = {}
    for line in filter(None, plan.splitlines()):
        floor = FLOOR.fullmatch(line)
        assert floor, line
        folder = floor[1] or next(reversed(drawn))
        drawn.setdefault(folder, []).insert(0, set(floor[2].split(", ")))
    assert drawn == rooms


def defined(path: Path) -> set[str]:
    """Functions and classes of a module, and ``Class.method``."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def test_the_walks_name_files_and_functions_that_exist(page: str, repository: Path) -> None:
    rows = ROW.findall(page)
    assert len(rows) > 40
    for file, functions in rows:
        names = re.findall(r"`([\w.]+)`", functions)
        assert names, file
        unknown = set(names) - defined(repository / file)
        assert not unknown, f"{file} has no {sorted(unknown)}"


def test_paths_in_the_readme_and_contributing_exist(repository: Path) -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        for path in re.findall(
            r"`((?:configs|models|sharding|pipelines|launch|tests|docs|\.ci)/[\w/.]*)`",
            (repository / name).read_text(),
        ):
            assert (repository / path).exists(), f"{name} names {path}"


def test_rooms_list_their_files_in_reading_order(repository: Path) -> None:
    """Every file and room is named: in the docstring, or in the list of commands."""
    for folder in ("configs", "models", "sharding", "pipelines", "launch"):
        for room in [
            repository / folder,
            *(path.parent for path in repository.glob(f"{folder}/*/__init__.py")),
        ]:
            text = (room / "__init__.py").read_text()
            assert ast.get_docstring(ast.parse(text)), room
            files = {path.stem for path in room.glob("*.py")} - {"__init__"}
            files |= {path.parent.name for path in room.glob("*/__init__.py")}
            missing = {name for name in files if not re.search(rf"(?<![\w/]){name}(?![\w/])", text)}
            assert not missing, f"{room.relative_to(repository)}/__init__.py does not name {sorted(missing)}"


@pytest.mark.slow
def test_the_changes_pass_their_own_tests_and_the_walls(page: str, changed: Path) -> None:
    files = [file for what in CHANGES for file in files_of(change(page, what))]
    tests = [file for file in files if file.startswith("tests/")]
    assert len(tests) == len(CHANGES)
    walls = "tests/test_architecture.py"
    walls_kept = [f"{walls}::test_imports_run_one_way", f"{walls}::test_rooms_are_known_and_import_downwards"]
    words = ("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *tests, *walls_kept)
    done = run_python(*words, cwd=changed, path=[changed.parent])
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    code = sorted({file for file in files if file.endswith(".py")})
    for check in (["check"], ["format", "--check"]):
        ruff = run_python("-m", "ruff", *check, "--no-cache", *code, cwd=changed, path=[])
        assert ruff.returncode == 0, ruff.stdout + ruff.stderr


@pytest.mark.slow
def test_the_changes_do_what_the_page_says(changed: Path, tmp_path: Path) -> None:
    done = run_python("-c", SHOWN, cwd=tmp_path, path=[changed.parent])
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_plug_in_works_from_its_folder(page: str, changed: Path, tmp_path: Path) -> None:
    diff = change(page, "plug-in")
    apply(diff, tmp_path)
    assert files_of(diff) == ["solarise.py"]
    done = run_python("-c", SOLARISED, cwd=tmp_path, path=[tmp_path, changed.parent])
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("cliplift:")]
    assert "data.augment.plugins.solarise.probability" in line
