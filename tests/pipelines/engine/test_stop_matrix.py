"""Stops and resumes over every ZeRO stage, change of world size and kind of stop; each is a run of real processes.

The short form of this is in test_engine.py and test_engine_state.py.
"""

from __future__ import annotations

import json
import os
import shutil
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
RANKS, STOPS = (1, 2, 4), (signal.SIGKILL, signal.SIGTERM)
# The same sums in another order: a few units in the last place of fp32 per step, grown over 40 steps.
ROUNDING = 2e-5


def launch(ranks: int, results: Path, *cases: dict[str, Any]) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [*words, str(WORKER), str(results), *map(json.dumps, cases)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said[-4000:]
    return said


def case(output: Path, stage: int) -> dict[str, Any]:
    return {
        "output": str(output),
        "engine__zero_stage": stage,
        "schedule": {"steps": STEPS, "name": "cosine"},
        "optim__average_decay": 0.9,
        "checkpoint": {"every_steps": 4, "keep_last": 3},
    }


def run_cases(ranks: int, place: Path, outputs: dict[tuple[int, str], Path]) -> dict[tuple[int, str], Any]:
    """One launch of many cases: what each gave, by (stage, anything)."""
    place.mkdir(parents=True, exist_ok=True)
    process = launch(ranks, place / "results.json", *(case(path, key[0]) for key, path in outputs.items()))
    finish(process)
    return dict(zip(outputs, json.loads((place / "results.json").read_text()), strict=True))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Any]:
    """What runs that were not stopped give, by (ranks, stage); test_engine.py holds one against a plain loop."""
    place = tmp_path_factory.mktemp("unbroken")
    return {
        (ranks, stage): found
        for ranks in RANKS
        for (stage, _), found in run_cases(
            ranks, place / str(ranks), {(s, ""): place / f"{ranks}-{s}" for s in range(4)}
        ).items()
    }


@pytest.fixture(scope="module", params=RANKS, ids=lambda ranks: f"before{ranks}")
def stopped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Runs of so many ranks, at every stage, stopped by each signal: folders ``STAGE-SIGNAL``."""
    place = tmp_path_factory.mktemp(f"before{request.param}")
    for stage in range(4):
        for stop in STOPS:
            stop_a_run(place / f"{stage}-{stop.name}", stage=stage, ranks=request.param, stop=stop)
    return request.param, place


def stop_a_run(output: Path, *, stage: int, ranks: int, stop: signal.Signals) -> None:
    """Start a run, and stop it soon after its first checkpoint."""
    results = output.with_suffix(".json")
    process = launch(ranks, results, case(output, stage) | {"slow_seconds": 0.05})
    deadline = time.monotonic() + 200
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
    for file in output.glob("seen-*"):
        file.unlink()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("after", RANKS, ids=lambda ranks: f"after{ranks}")
def test_stop_and_resume(
    tmp_path: Path, unbroken: dict[tuple[int, int], Any], stopped: tuple[int, Path], after: int
) -> None:
    """Every step once, with the numbers of a run that was not stopped: of as many ranks to the last bit."""
    before, place = stopped
    outputs = {(stage, stop.name): tmp_path / f"{stage}-{stop.name}" for stage in range(4) for stop in STOPS}
    steps = {}
    for key, output in outputs.items():
        shutil.copytree(place / output.name, output)
        steps[key] = max(int(path.name[5:]) for path in output.glob("checkpoints/step_????????"))
        assert 4 <= steps[key] < STEPS, "it was stopped before the end"
    for key, found in run_cases(after, tmp_path / "resumed", outputs).items():
        expected = unbroken[after, key[0]]
        assert found["losses"] == pytest.approx(expected["losses"], abs=ROUNDING), key
        if before == after:
            assert (found["losses"], found["checksum"]) == (expected["losses"], expected["checksum"]), key
        assert positions(outputs[key]) == {
            step: Counter(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH))
            for step in range(steps[key], STEPS)
        }, key


def positions(output: Path) -> dict[int, Counter[int]]:
    """The samples read in every step, over all ranks."""
    found: dict[int, Counter[int]] = {}
    for file in output.glob("seen-*"):
        for line in file.read_text().splitlines():
            step, *samples = map(int, line.split())
            found.setdefault(step, Counter()).update(samples)
    return found
