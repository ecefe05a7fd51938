"""Real signals to real runs: a command made of several runs, or inside a long evaluation, stops as a whole."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cliplift.configs.load import dump_run, load_run
from cliplift.configs.runs import RUNS
from cliplift.pipelines import repeats
from cliplift.pipelines.engine.faults import beat
from cliplift.pipelines.stages.run import StageResult, run_stage
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.demo.synthetic import write_demo_videos

CLIPLIFT = [sys.executable, "-m", "cliplift.launch.cli"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
BEAT = "cliplift.pipelines.evaluation.over_split.beat"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    write_demo_videos(folder / "videos", train_per_class=2, val_per_class=1, test_per_class=1, unlabelled=1,
                      size_pixels=64)  # fmt: skip
    words = [f"source.root={folder}/videos/labelled", f"output={folder}/shards", "workers=2"]
    run_shard(load_run(repository / "configs/shard/demo_actions.yaml", RUNS, words).run)
    return folder / "shards"


def finetune(repository: Path, shards: Path, output: Path, *words: str) -> Any:
    """Two steps, evaluated after each, with dropout in between so that random state counts."""
    always = [f"data.shards={shards}", f"output={output}", "track.wandb=disabled", "schedule.steps=2", "data.workers=0",
              "evaluation.every_steps=1", "evaluation.batch=2", "track.every_steps=1",
              "engine.global_batch=8"]  # fmt: skip
    return load_run(repository / "configs/finetune/demo_scratch.yaml", RUNS, [*always, *words]).run


def rows(folder: Path) -> list[dict[str, float]]:
    """The logged numbers without those of clock and memory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            key: value
            for key, value in line.items()
            if key != "time" and not key.startswith(("speed/", "memory/"))
        }
        for line in lines
    ]


def signal_at(count: int, number: signal.Signals) -> Callable[[], None]:
    """A ``beat`` that sends this process a signal when it is called for the ``count``-th time."""
    calls = 0

    def beating() -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), number)
        beat()

    return beating


@pytest.mark.parametrize(
    ("number", "between"),
    [
        (signal.SIGTERM, "before the next run"),
        (signal.SIGUSR1, "after the run"),
        (signal.SIGINT, "after the run"),
    ],
)
def test_a_signal_between_two_runs_stops_the_whole(  # noqa: PLR0917 (fixtures)
    tmp_path: Path,
    repository: Path,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    between: str,
) -> None:
    started: list[Path] = []

    def with_signal(run: Any, *, command: list[str]) -> StageResult:
        started.append(Path(run.output))
        if len(started) == 2 and between.startswith("before"):
            os.kill(os.getpid(), number)
        result = run_stage(run, command=command)
        if len(started) == 1 and between.startswith("after"):
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(repeats, "run_stage", with_signal)
    run = finetune(repository, shards, tmp_path / "runs", "seeds=[0,1,2]", "evaluation.max_samples=2")
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    stopped = repeats.run_all(run, command=[])
    assert stopped.requeue
    assert not stopped.finished
    assert len(started) == 2, "the second run sees the signal and the third is not started"
    assert (started[0] / "result.json").is_file()
    assert not list(started[1].glob("checkpoints/*")), "not a step was made"
    assert {n: signal.getsignal(n) for n in before} == before


def test_a_signal_inside_an_evaluation_saves_and_the_rest_is_unchanged(
    tmp_path: Path, repository: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the evaluation of step 1, of step 2, and in the test split: logs and result as without a signal."""
    unbroken = run_stage(finetune(repository, shards, tmp_path / "unbroken"), command=[])
    run = finetune(repository, shards, tmp_path / "stopped")
    per_evaluation = 5  # 10 validation clips, 2 a batch
    for batches, step in ((2, 1), (per_evaluation + 2, 2), (per_evaluation + 3, 2)):
        # Each start makes the evaluation anew that was stopped; then come those that are still due.
        monkeypatch.setattr(BEAT, signal_at(batches, signal.SIGTERM))
        stopped = run_stage(run, command=[])
        assert stopped.requeue
        assert not (tmp_path / "stopped/result.json").exists()
        newest = max((tmp_path / "stopped/checkpoints").glob("step_*"))
        assert newest.name == f"step_{step:08d}"
        assert (newest / "COMPLETE.json").is_file()
    monkeypatch.setattr(BEAT, beat)
    finished = run_stage(run, command=[])
    assert finished.finished
    assert rows(tmp_path / "stopped") == rows(tmp_path / "unbroken")
    assert finished.metrics == unbroken.metrics


def test_a_signal_in_the_pass_for_batchnorm_stops_there_and_leaves_no_trace(
    tmp_path: Path, repository: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass before an evaluation may take as long as that: it beats the watchdog, and it looks for signals."""
    words = ["evaluation.precise_batchnorm_batches=4", "evaluation.max_samples=4", "engine.micro_batch=4"]
    unbroken = run_stage(finetune(repository, shards, tmp_path / "unbroken", *words), command=[])
    run = finetune(repository, shards, tmp_path / "stopped", *words)
    # The first beat is the first step's, the four after it are the batches' of the pass.
    monkeypatch.setattr("cliplift.pipelines.engine.loop.beat", signal_at(3, signal.SIGTERM))
    stopped = run_stage(run, command=[])
    assert stopped.requeue
    newest = max((tmp_path / "stopped/checkpoints").glob("step_*"))
    assert newest.name == "step_00000001"
    assert not [row for row in rows(tmp_path / "stopped") if "eval/loss" in row], "no evaluation was made"
    monkeypatch.setattr("cliplift.pipelines.engine.loop.beat", beat)
    finished = run_stage(run, command=[])
    assert finished.finished
    assert rows(tmp_path / "stopped") == rows(tmp_path / "unbroken")
    assert finished.metrics == unbroken.metrics


SIGNALLED_RANK = """
import os, signal, sys
from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.pipelines.distributed.collectives import leave
from cliplift.pipelines.engine import faults
from cliplift.pipelines.evaluation import over_split
from cliplift.pipelines.stages.run import run_stage

batches = 0

def beat():
    global batches
    batches += 1
    if batches == 2 and os.environ["RANK"] == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGTERM)
    faults.beat()

over_split.beat = beat
result = run_stage(load_run(sys.argv[2], RUNS, sys.argv[3:]).run, command=[])
print("requeue", result.requeue, "batches", batches, flush=True)
leave(0)
"""


@pytest.mark.slow
def test_two_ranks_stop_together_inside_an_evaluation(tmp_path: Path, repository: Path, shards: Path) -> None:
    """Only rank 1 gets the signal; both leave the evaluation after the same batch, with the step saved."""
    run = finetune(repository, shards, tmp_path / "run", "engine.global_batch=8", "schedule.steps=1")
    config = tmp_path / "run.yaml"
    config.write_text(dump_run(run))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SIGNALLED_RANK, "1", str(config)],
            env=ENVIRONMENT
            | {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    for text in said:
        assert "requeue True batches 2" in text, said
    assert (tmp_path / "run/checkpoints/step_00000001/COMPLETE.json").is_file()
    assert not (tmp_path / "run/result.json").exists()


def stopped_when(command: list[str], ready: Callable[[], bool], number: signal.Signals) -> tuple[int, str]:
    """Exit status and output of a process that gets the signal as soon as ``ready``."""
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 200
    while not ready():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.01)
    process.send_signal(number)
    said, _ = process.communicate(timeout=200)
    return process.returncode, said


@pytest.mark.slow
def test_an_evaluation_ends_at_once_with_a_clear_word(tmp_path: Path, repository: Path, shards: Path) -> None:
    run = finetune(repository, shards, tmp_path / "run", "schedule.steps=1", "evaluation.every_steps=null")
    assert run_stage(run, command=[]).finished
    # So many views that the evaluation would take minutes.
    words = ["views.clips=2000", "batch=1", "split=test", f"output={tmp_path / 'evaluated'}", "device=cpu"]
    status, said = stopped_when(
        [*CLIPLIFT, "evaluate", str(tmp_path / "run"), *words],
        (tmp_path / "evaluated/run.json").is_file,
        signal.SIGTERM,
    )
    assert status == 128 + signal.SIGTERM, said
    assert "cliplift: stopped by SIGTERM" in said
    assert "Traceback" not in said
    assert not (tmp_path / "evaluated/result.json").exists()


@pytest.mark.parametrize("phase", ["videos", pytest.param("shards", marks=pytest.mark.slow)])
def test_the_demo_stops_while_it_makes_videos_or_shards(tmp_path: Path, phase: str) -> None:
    """SIGTERM ends it with the hint to start it again, and leaves no process behind that still writes."""
    ready = {
        "videos": lambda: any(tmp_path.rglob("*.mp4")),
        "shards": (tmp_path / "demo/shards").is_dir,
    }
    small = ["size_pixels=48", "unlabelled=8"] if phase == "shards" else []
    words = [f"output={tmp_path / 'demo'}", *small]
    if small:
        words += ["train_per_class=2", "val_per_class=1", "test_per_class=1"]
    status, said = stopped_when([*CLIPLIFT, "demo", *words], ready[phase], signal.SIGTERM)
    assert status == 0, said
    assert "stopped by a signal; start it again to continue" in said
    files = sorted(tmp_path.rglob("*"))
    time.sleep(0.5)
    assert sorted(tmp_path.rglob("*")) == files
