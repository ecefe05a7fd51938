"""Fixtures shared by all tests. CPU runs must not start a compiler or talk to a network."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest

# No example fails for being slow: on a busy machine any may take longer than hypothesis allows by default.
hypothesis.settings.register_profile("cliplift", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "cliplift"))

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")
# Several test processes share the cores. Two threads each, which wait for one another by spinning, take up to ten times
# as long on cores that are busy, and tensors as small as those of the tests gain nothing from the second.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
# The rest follows in order of the files. What takes longest starts first, so that the processes end together.
LONGEST_FIRST = (
    "tests/pipelines/stages/test_recipes.py",
    "tests/pipelines/stages/conftest.py",
    "tests/pipelines/engine/",
    "tests/pipelines/stages/",
    "tests/launch/",
    "tests/pipelines/",
    "tests/test_",
)


def group_of(item: pytest.Item) -> str:
    """Tests of a group run in one process, so that what they share is made once: those of a file, and all of a suite
    of stages that starts from the same runs."""
    fixtures = getattr(item, "fixturenames", ())
    path = item.path.relative_to(ROOT).as_posix()
    if path.startswith("tests/pipelines/stages/") and {"transferred", "finetuned"} & {*fixtures}:
        return "tests/pipelines/stages/conftest.py"
    return path


def rank_of(group: str) -> int:
    return next((n for n, start in enumerate(LONGEST_FIRST) if group.startswith(start)), len(LONGEST_FIRST))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Say which tests stay together, for ``--dist loadgroup``, and which groups start first."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    groups = {item: group_of(item) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: rank_of(groups[item]))


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real clips beside the checkout; tests that need them are skipped, with the reason, where there are none."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real clips: {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def load_module() -> Callable[[Path], ModuleType]:
    """Import a file of the tests that is no test, under its own name; tests are not packages."""

    def load(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def tf_records(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """Writes records of YouTube-8M: ``record(example(id, labels))``."""
    return load_module(ROOT / "tests/tf_records.py")


@pytest.fixture(scope="session")
def failing_s3(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """An S3 API on loopback that fails as it is told to: ``served(bucket)``."""
    for package in ("s3fs", "moto.server"):
        pytest.importorskip(package)
    return load_module(ROOT / "tests/failing_s3.py")
