"""Stops and resumes over every ZeRO stage, change of world size and kind of stop; each is a run of real processes.

A run that was stopped is continued by one, two and four ranks, each from a copy of it; what a run that was not stopped
gives is computed once for each number of ranks and stage.

The short form of this is in test_engine.py and test_engine_state.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FORKED = Path(__file__).with_name("forked_ranks.py")
STEPS, GLOBAL_BATCH = 40, 8
RANKS, STOPS = (1, 2, 4), (signal.SIGKILL, signal.SIGTERM)
# The same sums in another order: a few units in the last place of fp32 per step, grown over 40 steps.
ROUNDING = 2e-5


class Launcher:
    """Starts groups of ranks, one group at a time (forked_ranks.py)."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, ranks: int, results: Path, *cases: dict[str, Any]) -> list[int]:
        """The process numbers of the ranks that train these cases."""
        assert self._process.stdin is not None
        self._results = results
        group = {"ranks": ranks, "results": str(results), "cases": cases}
        self._process.stdin.write(json.dumps(group) + "\n")
        self._process.stdin.flush()
        found: list[int] = json.loads(self._answer())
        return found

    def finish(self) -> list[int]:
        """The exit codes of the ranks, when all have ended."""
        found: list[int] = json.loads(self._answer())
        return found

    def finish_well(self) -> None:
        """Wait for the ranks' end, and show what they said unless all ended with 0."""
        codes = self.finish()
        said = [
            f.read_text()[-2000:]
            for f in sorted(self._results.parent.glob(f"{self._results.stem}.rank*.txt"))
        ]
        assert not any(codes), "\n".join(said)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        assert answer, "the process that forks has ended"
        return answer


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with subprocess.Popen(
        [sys.executable, str(FORKED)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        yield Launcher(process)
        assert process.stdin is not None
        process.stdin.close()
    assert process.returncode == 0


def case(output: Path, stage: int) -> dict[str, Any]:
    return {
        "output": str(output),
        "engine__zero_stage": stage,
        "schedule": {"steps": STEPS, "name": "cosine"},
        "optim__average_decay": 0.9,
        "checkpoint": {"every_steps": 4, "keep_last": 3},
    }


def run_cases(
    launcher: Launcher, ranks: int, place: Path, outputs: dict[tuple[int, str], Path]
) -> dict[tuple[int, str], Any]:
    """Many cases of one group of ranks: what each gave, by (stage, anything)."""
    place.mkdir(parents=True, exist_ok=True)
    launcher.start(ranks, place / "results.json", *(case(path, key[0]) for key, path in outputs.items()))
    launcher.finish_well()
    return dict(zip(outputs, json.loads((place / "results.json").read_text()), strict=True))


@pytest.fixture(scope="module")
def unbroken(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Any]:
    """What runs that were not stopped give, by (ranks, stage); test_engine.py holds one against a plain loop."""
    place = tmp_path_factory.mktemp("unbroken")
    return {
        (ranks, stage): found
        for ranks in RANKS
        for (stage, _), found in run_cases(
            launcher, ranks, place / str(ranks), {(s, ""): place / f"{ranks}-{s}" for s in range(4)}
        ).items()
    }


@pytest.fixture(scope="module", params=RANKS, ids=lambda ranks: f"before{ranks}")
def stopped(
    launcher: Launcher, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path]:
    """Runs of so many ranks, at every stage, stopped by each signal: folders ``STAGE-SIGNAL``."""
    place = tmp_path_factory.mktemp(f"before{request.param}")
    for stage in range(4):
        for stop in STOPS:
            stop_a_run(launcher, place / f"{stage}-{stop.name}", stage=stage, ranks=request.param, stop=stop)
    return request.param, place


def stop_a_run(launcher: Launcher, output: Path, *, stage: int, ranks: int, stop: signal.Signals) -> None:
    """Start a run, and stop it soon after its first checkpoint."""
    pids = launcher.start(ranks, output.with_suffix(".json"), case(output, stage) | {"slow_seconds": 0.05})
    deadline = time.monotonic() + 200
    while not list(output.glob("checkpoints/step_????????/COMPLETE.json")):
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.01)
    if stop == signal.SIGKILL:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # a rank may have died of another's death
                os.kill(pid, signal.SIGKILL)
        assert launcher.finish()[0] == -signal.SIGKILL
    else:
        os.kill(pids[-1], signal.SIGTERM)
        launcher.finish_well()
    for file in output.glob("seen-*"):
        file.unlink()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("after", RANKS, ids=lambda ranks: f"after{ranks}")
def test_stop_and_resume(
    launcher: Launcher,
    tmp_path: Path,
    unbroken: dict[tuple[int, int], Any],
    stopped: tuple[int, Path],
    after: int,
) -> None:
    """Every step once, with the numbers of a run that was not stopped: of as many ranks to the last bit."""
    before, place = stopped
    outputs = {(stage, stop.name): tmp_path / f"{stage}-{stop.name}" for stage in range(4) for stop in STOPS}
    steps = {}
    for key, output in outputs.items():
        shutil.copytree(place / output.name, output)
        steps[key] = max(int(path.name[5:]) for path in output.glob("checkpoints/step_????????"))
        assert 4 <= steps[key] < STEPS, "it was stopped before the end"
    for key, found in run_cases(launcher, after, tmp_path / "resumed", outputs).items():
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
