"""The walls of the house: who imports whom, what the wheel holds, what importing costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("configs", "models", "sharding", "pipelines", "launch")
MAY_IMPORT = {
    "configs": set(),
    "models": set(),
    "sharding": {"configs"},
    "pipelines": {"configs", "models", "sharding"},
    "launch": {"configs", "models", "sharding", "pipelines"},
}
# Plug-ins are found in one way everywhere. The module needs the standard library alone, and a test keeps it so.
ALSO_IMPORTED = {"models": "cliplift.configs.discovery"}
FORBIDDEN_OUTSIDE = {
    "configs": {"torch", "deepspeed", "numpy", "wandb", "av", "decord"},
    "models": {"deepspeed", "wandb", "webdataset", "decord", "av", "pydantic", "yaml"},
    "sharding": {"torch", "deepspeed"},
}
BANNED_NAMES = {"utils", "util", "helper", "helpers", "common", "misc", "base"}
# Rooms and ground files of each folder, bottom to top. What stands on one floor imports only what stands on floors
# below it, and its own room; a module named alone is a ground file.
ROOMS: dict[str, list[set[str]]] = {
    "configs": [
        {"sections", "discovery", "yaml_text"},
        {"load", "where"},
        {"plugins", "where_reader"},
        {"sources", "data"},
        {"training"},
        {"sharding", "supervision", "objectives", "sweeps"},
        {"runs"},
    ],
    "models": [
        {"protocol"},
        {"weight_files"},
        {"registry", "state_dicts", "streams"},
        {"inflate", "layers"},
        {"factory", "correspondence"},
        {"image", "measure"},
        {"conv3d", "timesformer", "video_vit", "convrnn"},
        {"late_temporal", "per_frame", "hiera"},
    ],
    "sharding": [
        {"redirects"},
        {"storage"},
        {"manifest", "scratch"},
        {"tables"},
        {"video", "sources"},
        {"scores"},
        {"similar"},
        {"read", "demo"},
        {"build"},
        {"scoring"},
        {"leaks"},
    ],
    "pipelines": [
        {"distributed"},
        {"data"},
        {"runs"},
        {"checkpoints", "compute"},
        {"engine"},
        {"evaluation"},
        {"probes", "embeddings"},
        {"stages", "report", "api"},
        {"cost", "repeats"},
        {"sweep"},
    ],
    "launch": [{"jobs"}, {"check"}, {"start"}, {"commands", "completion"}, {"cli"}],
}
MAX_FILES_IN_A_ROOM = 12
MAX_LINES = 500
MAX_FUNCTION_LINES = 60  # signature and docstring included
MAX_MODEL_LINES = 10_000  # of models/ without the rooms video_vit and hiera
MAX_ANY = 120  # lines with an `Any`, imports included, over all packages


def modules(repository: Path, package: str) -> list[Path]:
    return sorted((repository / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a module imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write cliplift.{path.parent.name}..."
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(repository: Path, package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    for path in modules(repository, package):
        for name in imports(path):
            if name.startswith(ALSO_IMPORTED.get(package, "-")):
                continue
            top, _, rest = name.partition(".")
            assert top not in PACKAGES, f"{path}: plain `import {top}`; import cliplift.{top}"
            if top == "cliplift" and rest:
                assert rest.split(".")[0] in allowed, (
                    f"{path} imports {name}; {package} may import {sorted(allowed)}"
                )
            # torchcodec and Ray are optional and may be imported where they are used.
            assert top not in FORBIDDEN_OUTSIDE.get(package, set()), f"{path} imports {name}"


def test_discovery_needs_the_standard_library_alone(repository: Path) -> None:
    for name in imports(repository / "configs" / "discovery.py"):
        assert name.split(".")[0] in sys.stdlib_module_names, name


def room_of(path: Path, package: str, repository: Path) -> str:
    return path.relative_to(repository / package).with_suffix("").parts[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_are_known_and_import_downwards(repository: Path, package: str) -> None:
    floor = {room: level for level, rooms in enumerate(ROOMS[package]) for room in rooms}
    for path in modules(repository, package):
        room = room_of(path, package, repository)
        if room == "__init__":
            continue
        assert room in floor, f"{path}: the room {room!r} is not in the table; add it, or move the file"
        for name in imports(path):
            words = name.split(".")
            if words[:2] != ["cliplift", package] or len(words) < 3 or words[2] not in floor:
                continue
            assert words[2] == room or floor[words[2]] < floor[room], (
                f"{path} imports {name}: {words[2]} does not stand below {room}"
            )


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_are_small_and_well_named(repository: Path, package: str) -> None:
    for path in modules(repository, package):
        assert path.stem not in BANNED_NAMES, f"{path}: say what is in it"
        assert len(path.relative_to(repository / package).parts) <= 2, (
            f"{path}: rooms have no rooms of their own"
        )
    for room in (repository / package).glob("*/__init__.py"):
        files = [path for path in room.parent.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= MAX_FILES_IN_A_ROOM, f"{room.parent} has {len(files)} files"
        assert ast.get_docstring(ast.parse(room.read_text())), (
            f"{room}: say in one docstring what is in the room"
        )


@pytest.mark.parametrize("folder", [*PACKAGES, "tests", "benchmarks"])
def test_files_hold_one_idea(repository: Path, folder: str) -> None:
    for path in modules(repository, folder):
        lines = len(path.read_text().splitlines())
        assert lines <= MAX_LINES, f"{path} has {lines} lines and holds more than one idea; cut it in two"


def test_functions_fit_on_a_screen(repository: Path) -> None:
    long = [
        f"{path}:{node.lineno}: {node.name} has {(node.end_lineno or 0) - node.lineno + 1} lines"
        for package in PACKAGES
        for path in modules(repository, package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert not long, long


def test_models_repeat_little(repository: Path) -> None:
    """Every line of every network, comments included: what a family shares is written once."""
    lines = sum(
        len(path.read_text().splitlines())
        for path in modules(repository, "models")
        if room_of(path, "models", repository) not in ("video_vit", "hiera")
    )
    assert lines < MAX_MODEL_LINES, f"models/ has {lines} lines"


def test_nobody_asks_which_kind_of_run_it_has(repository: Path) -> None:
    """What differs between stages is in the stage, or in a table by type: a new stage adds rows, not branches."""
    from cliplift.configs.runs import RUNS

    kinds = {base.__name__ for run in RUNS.values() for base in run.__mro__ if base.__name__.endswith("Run")}
    assert {"TrainingRun", "ClassificationRun", "FinetuneRun", "ShardRun"} <= kinds
    asked = []
    for path in (path for package in PACKAGES for path in modules(repository, package)):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                named = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
                asked += [f"{path}:{node.lineno}: {name}" for name in named & kinds]
            elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot):
                sides = [node.left, *node.comparators]
                named = {side.id for side in sides if isinstance(side, ast.Name)}
                asked += [f"{path}:{node.lineno}: {name}" for name in named & kinds]
    assert not asked, asked


def test_few_annotations_give_up_on_a_type(repository: Path) -> None:
    """``Any`` is for libraries without types, such as DeepSpeed's engine; a value from outside is an ``object``."""
    lines = [
        f"{path}:{number}"
        for package in PACKAGES
        for path in modules(repository, package)
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(r"\bAny\b", line)
    ]
    assert len(lines) < MAX_ANY, lines


def test_every_package_is_in_the_wheel(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())
    found = {
        "cliplift." + ".".join(path.parent.relative_to(repository).parts)
        for package in PACKAGES
        for path in (repository / package).rglob("__init__.py")
    } | {"cliplift"}
    assert set(project["tool"]["setuptools"]["packages"]) == found
    for package in PACKAGES:
        assert (repository / package / "py.typed").is_file()


def test_the_wheel_holds_code_recipes_and_types(repository: Path, tmp_path: Path) -> None:
    """Built by setuptools itself, from a copy, so that nothing is left in the checkout."""
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    copy = tmp_path / "copy"
    for name in tracked:
        if (repository / name).is_file():
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((repository / name).read_bytes())
    script = "from setuptools.build_meta import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    built = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=copy, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    import zipfile

    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"cliplift/{name}"
        for name in tracked
        if (name.split("/")[0] in PACKAGES or name == "__init__.py") and (repository / name).is_file()
    }
    assert expected <= held, f"missing from the wheel: {sorted(expected - held)}"
    outside = {name for name in held if not name.startswith(("cliplift/", "cliplift-"))}
    assert not outside, f"the wheel would install {sorted(outside)} at top level"


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False, timeout=120
    )


def test_models_need_no_engine(tmp_path: Path) -> None:
    """Promise 5: create_model works without DeepSpeed, W&B, a GPU or a network, and from any directory."""
    (tmp_path / "models").mkdir()
    (tmp_path / "configs").mkdir()
    code = (
        "import sys\n"
        "from cliplift.models import create_model, list_models\n"
        "assert 't3d_121' in list_models()\n"
        "create_model('t3d_tiny', num_classes=3)\n"
        "heavy = {'deepspeed', 'wandb', 'webdataset', 'decord', 'av'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_configs_and_sharding_need_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, cliplift.configs.runs, cliplift.sharding.read.reader, cliplift.sharding.build.run\n"
        "import cliplift.launch.cli\n"
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules\n"
    )
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_package_itself_imports_nothing(tmp_path: Path) -> None:
    """``import cliplift`` costs nothing; each of its names is found when it is used."""
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import cliplift as cl\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "assert new == {'cliplift'}, new\n"
        "assert [name for name in cl.__all__ if not hasattr(cl, name)] == []\n"
        "assert set(cl.__all__) <= set(dir(cl)) and cl.models.list_models is cl.list_models\n"
        "assert cl.__version__.count('.') == 2\n"
        "try: cl.lode\n"
        "except AttributeError as error: assert 'lode' in str(error)\n"
        "else: raise AssertionError\n"
    )
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
