"""The notebooks of the documentation: their cells run in order as they are written, and hold no outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
LEFT = {"own_folder": "runs/mine-frames/result.json", "pretraining": "runs/masked/result.json"}


def cells(name: str) -> list[dict[str, Any]]:
    tree = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert (tree["nbformat"], tree["nbformat_minor"]) == (4, 5)
    found: list[dict[str, Any]] = tree["cells"]
    return found


def test_every_notebook_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(LEFT)


@pytest.mark.parametrize("name", LEFT)
def test_notebooks_hold_no_outputs(name: str) -> None:
    ids = [cell["id"] for cell in cells(name)]
    assert len(set(ids)) == len(ids)
    for cell in cells(name):
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            compile("".join(cell["source"]), cell["id"], "exec")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LEFT)
def test_the_cells_run_in_order(name: str, tmp_path: Path) -> None:
    code = "\n\n".join("".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == "code")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "disabled",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert (tmp_path / LEFT[name]).is_file()
