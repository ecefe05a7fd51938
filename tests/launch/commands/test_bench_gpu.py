"""The prepared run on a GPU, in miniature: its program, on a CPU. No time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

QUICK = ("memory: resnet", "checkpoint")  # each is a process; all rows run in the slow test below


def run(repository: Path, output: Path, *words: str) -> dict[str, Any]:
    """The rows by name."""
    program = [
        sys.executable,
        str(repository / "benchmarks" / "gpu"),
        "--small",
        "--output",
        str(output),
        *words,
    ]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=1500, env=os.environ)
    assert output.exists(), done.stderr[-2000:]
    return {row["name"]: row for row in json.loads(output.read_text())["rows"]}


@pytest.mark.slow
def test_rows_are_recorded_one_by_one(repository: Path, tmp_path: Path) -> None:
    rows = run(repository, tmp_path / "gpu.json", "--minutes", "20", "--only", *QUICK)
    assert {name: row["error"] for name, row in rows.items() if "error" in row} == {}
    assert next(iter(rows)) == "machine"
    assert len(rows) == 1 + len(QUICK)
    assert rows["machine"]["numbers"]["torch"]
    assert rows["checkpoint of 1 B parameters"]["numbers"]["bytes"] > 0
    assert rows["memory: resnet3d_18 fp32 zero 0"]["numbers"]["planned_gib"] > 0


@pytest.mark.slow
def test_a_row_that_fails_or_dies_is_recorded_and_the_others_run(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if '--child' in sys.argv:\n"
        f"    sys.path[:0] = [{str(repository / 'benchmarks' / 'gpu')!r}, {str(repository / 'benchmarks')!r}]\n"
        "    import os, engine\n"
        "    from measure import Row\n"
        "    def fails(setting): raise ValueError('by design')\n"
        "    def dies(setting): os._exit(9)\n"
        "    engine.LOOPS[:] = [Row('fails', '', fails), Row('dies', '', dies), Row('runs', '', lambda s: {'a': 1})]\n"
    )
    output = tmp_path / "gpu.json"
    program = [sys.executable, str(repository / "benchmarks" / "gpu"), "--small", "--minutes", "20",
               "--output", str(output), "--only", "fails", "dies", "runs"]  # fmt: skip
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=280,
                          env=os.environ | {"PYTHONPATH": path})  # fmt: skip
    rows = {row["name"]: row for row in json.loads(output.read_text())["rows"]}
    assert done.returncode == 1
    assert "ValueError: by design" in rows["fails"]["error"]
    assert "ended with 9" in rows["dies"]["error"]
    assert rows["runs"]["numbers"] == {"a": 1}
    late = run(repository, tmp_path / "late.json", "--minutes", "0", "--only", "attention")
    assert late["attention kernels"] == {
        "name": "attention kernels",
        "goal": "which one to pin",
        "not_reached": True,
    }


@pytest.mark.slow
def test_every_row_runs_in_miniature(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    rows = run(repository, tmp_path / "gpu.json", "--minutes", "20")
    assert {name: row["error"] for name, row in rows.items() if "error" in row} == {}
    assert not any(row.get("not_reached") for row in rows.values())
