"""The small training case that the engine's tests run, in this process and in others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

WORKER = Path(__file__).parent / "engine" / "training_worker.py"


@pytest.fixture(scope="session")
def worker(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    return load_module(WORKER)


@pytest.fixture(scope="session")
def wandb_files(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """Reads W&B's offline files: ``wandb_records(folder)``, ``wandb_history(folder)``."""
    return load_module(Path(__file__).parent / "wandb_files.py")
