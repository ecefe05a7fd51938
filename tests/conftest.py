"""Fixtures shared by all tests. CPU runs must not start a compiler or talk to a network."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "2")

ROOT = Path(__file__).resolve().parents[1]


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
