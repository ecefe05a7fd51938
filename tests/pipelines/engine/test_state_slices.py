"""Format 3: every rank writes its own slices and reads its own; nothing is gathered, and no moment of death harms."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open

HERE = Path(__file__).parent
FROZEN = 520  # weight (8, 8, 2, 2, 2) and bias of the second convolution
STATES = 3  # of a trainable element: master, two moments
STEPS = 8  # scalars "step", one a parameter, 4 bytes each


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Every stage, with and without a frozen part, in one launch."""
    place = tmp_path_factory.mktemp("slices")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(HERE / "slices_worker.py"), str(place / "results.json"), str(place)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return place, json.loads((place / "results.json").read_text())


def elements(folder: Path, kind: str) -> dict[str, list[int]]:
    """Name -> how often each element of the whole tensor stands in the files, from the files' own headers."""
    found: dict[str, list[int]] = {}
    for path in sorted(folder.glob(f"{kind}-rank?.safetensors")):
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["slices"])
            for key in file.keys():  # noqa: SIM118 (no mapping)
                fact = facts[key]
                assert file.get_tensor(key).shape == (fact["length"],)
                counts = found.setdefault(fact["name"], [0] * int(torch.Size(fact["shape"]).numel()))
                for at in range(fact["start"], fact["start"] + fact["length"]):
                    counts[at] += 1
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", range(8))
def test_together_the_ranks_write_every_element_once(
    worker: ModuleType, two_ranks: tuple[Path, list[dict[str, Any]]], case: int
) -> None:
    place, results = two_ranks
    found = results[case]
    folder = (
        place / f"zero{found['stage']}{'-frozen' if found['frozen'] else ''}" / "checkpoints/step_00000008"
    )
    module = worker.Net()
    sizes = {name: p.numel() for name, p in module.named_parameters()}
    trainable = {n: s for n, s in sizes.items() if not (found["frozen"] and n.startswith("body.3."))}
    for kind, expected in (
        ("parameters", sizes),
        ("average", trainable),
        ("optimizer", {f"{n}|{key}": s if key != "step" else 1
                       for n, s in trainable.items() for key in ("exp_avg", "exp_avg_sq", "step")}),
    ):  # fmt: skip
        counts = elements(folder, kind)
        assert {name: len(count) for name, count in counts.items()} == expected
        assert all(set(count) == {1} for count in counts.values()), kind
    # What the ranks write differs by little: DeepSpeed's padding, and the scalars.
    values = [
        sum(
            safe_size(folder / f"{kind}-rank{rank}.safetensors")
            for kind in ("parameters", "optimizer", "average")
        )
        for rank in range(2)
    ]
    assert max(values) <= 1.1 * min(values), values


def safe_size(path: Path) -> int:
    """Bytes of the values in a file, without its header."""
    data = path.read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


@pytest.mark.slow
@pytest.mark.parametrize("case", range(8))
def test_a_rank_reads_its_own_elements_and_no_others(
    two_ranks: tuple[Path, list[dict[str, Any]]], case: int
) -> None:
    found = two_ranks[1][case]
    frozen = 4 * FROZEN * found["frozen"]
    if found["stage"] == 3:
        frozen //= 2
    for rank in found["ranks"]:
        assert rank["equal"], "the engine holds what was saved"
        own = 4 * rank["share"] * (STATES + 1)  # and the average
        assert own + frozen <= rank["read"] <= own + frozen + 4 * 2 * STEPS
    if found["stage"]:
        shares = [rank["share"] for rank in found["ranks"]]
        assert max(shares) <= 1.1 * min(shares), "a rank keeps its part alone"


# On rank 1 no file may grow past 4 KiB once the first checkpoint is complete, as if its disk were full.
RANK_1_FULL = """
import os, pathlib, resource, runpy, sys, time
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import training_worker as worker
evaluate = worker.Task.evaluate
def full(self, *, topology):
    if topology.rank == 1:
        while not pathlib.Path(sys.argv[2], "checkpoints", "step_00000004").is_dir():
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return evaluate(self, topology=topology)
worker.Task.evaluate = full
worker.train(worker.run_config(sys.argv[2], engine__zero_stage=2, evaluation={"every_steps": 5}, schedule={"steps": 40},
                               checkpoint={"every_steps": 4, "keep_best": False, "asynchronous": True}))
print("not reached")
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thread_that_cannot_write_on_one_rank_stops_all_at_the_next_save(tmp_path: Path) -> None:
    script, output = tmp_path / "run.py", tmp_path / "run"
    script.write_text(RANK_1_FULL)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(script), str(HERE / "training_worker.py"), str(output)],
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": "", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "not reached" not in said
    told = r"CheckpointError: .*step_00000008 could not be written \(rank 1: .*File too large"
    assert len(re.findall(told, said)) >= 2, said[-4000:]
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step_00000004"]
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 12, "training went on until the next save"


# In one process, which forks: a training that kills itself at the n-th thing it does to its checkpoints after the
# first one is complete, then one that goes on. Says what they found.
KILLED = """
import json, os, random, signal, sys
sys.path.insert(0, sys.argv[1])
import deepspeed
import training_worker as worker

def forked(train):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.write(writing, json.dumps(train()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), json.loads(said) if said else None

def killing(output, at):
    first = os.path.join(output, "checkpoints", "step_00000004", "COMPLETE.json")
    seen = [0]
    def watch(event, arguments):
        touched = event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")
        if touched and "step_00000008" in str(arguments) and os.path.exists(first):
            seen[0] += 1
            if seen[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    worker.train(worker.run_config(output, **changes))
    return seen[0]

changes = {"optim__average_decay": 0.9, "engine__zero_stage": int(sys.argv[3]), "checkpoint__keep_last": 1}
code, whole = forked(lambda: worker.train(worker.run_config(os.path.join(sys.argv[2], "whole"), **changes)))
assert code == 0
code, count = forked(lambda: killing(os.path.join(sys.argv[2], "count"), 0))
assert code == 0
found = []
for at in sorted(random.Random(0).sample(range(1, count + 1), int(sys.argv[4]))):
    output = os.path.join(sys.argv[2], str(at))
    code, _ = forked(lambda: killing(output, at))
    assert code == -signal.SIGKILL, (at, code)
    code, again = forked(lambda: worker.train(worker.run_config(output, **changes)))
    left = sorted(os.listdir(os.path.join(output, "checkpoints")))
    found.append({"at": at, "code": code, "same": again == whole, "left": left})
print(json.dumps({"count": count, "found": found}))
"""


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("stage", "moments"),
    [
        pytest.param(2, 2, marks=pytest.mark.slow),
        *(pytest.param(stage, 10, marks=[pytest.mark.slow, pytest.mark.exhaustive]) for stage in range(4)),
    ],
)
def test_kill_9_at_any_moment_inside_a_save_costs_nothing_but_time(
    tmp_path: Path, stage: int, moments: int
) -> None:
    """The run goes on from the checkpoint before, or from this one, to the same losses and weights to the last bit."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(HERE), str(tmp_path), str(stage), str(moments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=1700,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["count"] >= 15, "there are that many moments"
    assert len(said["found"]) == moments
    for found in said["found"]:
        assert found["code"] == 0, found
        assert found["same"], found
        assert found["left"] == ["step_00000008"], "nothing half-written stays behind"
