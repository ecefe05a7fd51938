"""Stops and resumes over every ZeRO stage, change of world size and kind of stop; each is a run of real processes.

The short form of this is in test_engine.py and test_engine_state.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("training_worker.py")
STEPS, GLOBAL_BATCH = 40, 8
# The same sums in another order: a few units in the last place of fp32 per step, grown over 40 steps.
ROUNDING = 2e-5


def launch(ranks: int, results: Path, case: dict[str, Any]) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [*words, str(WORKER), str(results), json.dumps(case)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=150)
    assert process.returncode == 0, said[-4000:]
    return said


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of one process at stage 0, which test_engine.py holds against a plain loop."""
    place = tmp_path_factory.mktemp("unbroken")
    finish(launch(1, place / "r.json", case(place / "run", 0)))
    (found,) = json.loads((place / "r.json").read_text())
    losses: list[float] = found["losses"]
    return losses


def case(output: Path, stage: int) -> dict[str, Any]:
    return {
        "output": str(output),
        "engine__zero_stage": stage,
        "schedule": {"steps": STEPS, "name": "cosine"},
        "checkpoint": {"every_steps": 4, "keep_last": 3},
    }


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("ranks", [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stop_and_resume(
    tmp_path: Path, unbroken: list[float], stage: int, ranks: tuple[int, int], stop: signal.Signals
) -> None:
    before, after = ranks
    output = tmp_path / "run"
    process = launch(before, tmp_path / "first.json", case(output, stage) | {"slow_seconds": 0.05})
    deadline = time.monotonic() + 100
    while not list(output.glob("checkpoints/step_????????/COMPLETE.json")):
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.01)
    pids = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    if stop == signal.SIGKILL:
        for pid in (process.pid, *pids):  # the launcher first, so that it restarts nothing
            os.kill(pid, signal.SIGKILL)
        process.communicate()
    else:
        os.kill(pids[-1], signal.SIGTERM)
        finish(process)
    stopped = max(int(path.name[5:]) for path in output.glob("checkpoints/step_????????"))
    assert 4 <= stopped < STEPS, "it was stopped before the end"
    for file in output.glob("seen-*"):
        file.unlink()
    said = finish(launch(after, tmp_path / "second.json", case(output, stage)))
    assert f"continues from step {stopped}" in said
    (found,) = json.loads((tmp_path / "second.json").read_text())
    assert found["losses"] == pytest.approx(unbroken, abs=ROUNDING), "every step once, as in the unbroken run"
    assert positions(output) == {
        step: Counter(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)) for step in range(stopped, STEPS)
    }


def positions(output: Path) -> dict[int, Counter[int]]:
    """The samples read in every step, over all ranks."""
    found: dict[int, Counter[int]] = {}
    for file in output.glob("seen-*"):
        for line in file.read_text().splitlines():
            step, *samples = map(int, line.split())
            found.setdefault(step, Counter()).update(samples)
    return found
