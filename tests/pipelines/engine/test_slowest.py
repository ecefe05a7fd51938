"""A rank that holds the others up is named, with its cause, and nobody else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cliplift.pipelines.distributed.slowest import ForwardClock, SlowestRank, find_slowest

WORKER = Path(__file__).with_name("slowest_worker.py")
HOSTS = ("alpha", "beta", "gamma", "delta")


def ranks(waited: tuple[float, ...], forward: tuple[float, ...]) -> np.ndarray:
    return np.stack([waited, forward], axis=1)


EVEN = ranks((0.02, 0.03, 0.02, 0.01), (0.30, 0.31, 0.30, 0.29))
LATE_DATA = ranks((0.02, 0.03, 0.42, 0.01), (0.30, 0.31, 0.30, 0.29))
SLOW_CARD = ranks((0.02, 0.03, 0.02, 0.01), (0.30, 0.45, 0.30, 0.29))


def test_a_rank_is_named_when_it_was_the_slowest_twice_and_then_no_more() -> None:
    slowest = SlowestRank(HOSTS)
    assert slowest.look(LATE_DATA, step_seconds=1.0) is None, "once may be chance"
    told = slowest.look(LATE_DATA, step_seconds=1.0)
    assert told is not None
    # A step of 1 s with 0.42 - 0.02 s of waiting would take 0.6 s: two thirds longer than it need be.
    assert told.startswith(
        "rank 2 on gamma holds the others up by 67 %: it waits for data 0.42 s, the others 0.02 s"
    )
    assert slowest.look(LATE_DATA, step_seconds=1.0) is None
    assert slowest.look(SLOW_CARD, step_seconds=1.0) is None
    told = slowest.look(SLOW_CARD, step_seconds=1.0)
    assert told is not None
    assert told.startswith(
        "rank 1 on beta holds the others up by 50 %: its forward pass takes 0.45 s, the others 0.3 s"
    )


def test_between_two_that_are_slow_a_good_one_starts_the_count_anew() -> None:
    slowest = SlowestRank(HOSTS)
    for seen in (LATE_DATA, EVEN, LATE_DATA, SLOW_CARD, LATE_DATA):
        assert slowest.look(seen, step_seconds=1.0) is None


@pytest.mark.parametrize(
    ("waited", "forward"),
    [
        ((0.02, 0.02), (0.3, 0.38)),  # 27 %
        ((0.0, 0.22), (0.3, 0.3)),  # 0.22 of 0.78: 28 %
        ((0.0, 0.04), (0.001, 0.04)),  # much longer than the other's, and nothing of a step
    ],
)
def test_less_is_not_named(waited: tuple[float, float], forward: tuple[float, float]) -> None:
    assert find_slowest(step_seconds=1.0, waited=np.array(waited), forward=np.array(forward)) is None


def test_a_rank_alone_holds_nobody_up() -> None:
    slowest = SlowestRank(("alpha",))
    for _ in range(3):
        assert slowest.look(ranks((0.9,), (0.1,)), step_seconds=1.0) is None


def test_the_clock_tells_each_pass_once() -> None:
    clock = ForwardClock(torch.device("cpu"))
    assert clock.taken() == 0
    for _ in range(2):
        with clock.measured():
            pass
    assert clock.taken() > 0
    assert clock.taken() == 0


@pytest.mark.slow
@pytest.mark.parametrize("cause", ["data", "compute"])
def test_of_two_real_ranks_the_slow_one_is_named_within_fifty_steps(tmp_path: Path, cause: str) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(WORKER), str(tmp_path / "run"), cause],
        capture_output=True, text=True, check=False, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    told = [line for line in done.stdout.splitlines() if "holds the others up" in line]
    assert len(told) == 1, done.stdout
    assert "rank 1 on " in told[0]
    assert {"data": "it waits for data", "compute": "its forward pass takes"}[cause] in told[0]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] <= 50
