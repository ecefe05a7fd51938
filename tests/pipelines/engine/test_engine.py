"""The training loop against a plain PyTorch loop, over ZeRO stages, ranks, accumulation, stops and faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cliplift.configs.sections import ConfigError
from cliplift.pipelines.engine.loop import DivergedError
from cliplift.pipelines.engine.optim import Schedule, peak_lr

WORKER = Path(__file__).with_name("training_worker.py")
# Sums over ranks and micro-batches are added in another order: a few units in the last place of fp32 per step.
ROUNDING = 2e-6


def torchrun(results: Path, *cases: dict[str, Any], ranks: int = 2) -> list[dict[str, Any]]:
    """Many cases in one launch: starting the processes costs more than training."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    words = [*launch, str(WORKER), str(results), *(json.dumps(case) for case in cases)]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(results.read_text())
    return found


def plain_losses(
    worker: ModuleType, *, optimizer: str = "adamw", clip: float = 0.0, steps: int = 8
) -> list[float]:
    """The same training written out: no engine of ours, no DeepSpeed."""
    run = worker.run_config("unused", optim__name=optimizer, optim__clip_grad_norm=clip)
    task = worker.Task()
    decay = [p for p in task.module.parameters() if p.ndim > 1]
    rest = [p for p in task.module.parameters() if p.ndim <= 1]
    groups = [
        {"params": decay, "weight_decay": run.optim.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    if optimizer == "adamw":
        optim: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.999), eps=1e-8)
    else:
        optim = torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)
    schedule = Schedule(run.schedule, total_steps=steps)
    losses = []
    for step in range(steps):
        index = torch.arange(step * 8, (step + 1) * 8) % worker.SAMPLES
        clips = torch.stack([worker.sample(int(i)) for i in index]).permute(0, 4, 1, 2, 3).float() / 255
        for group in optim.param_groups:
            group["lr"] = 0.01 * schedule.factor(step)
        loss = task.module({"clips": clips, "labels": index % worker.CLASSES})["loss"]
        optim.zero_grad()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(task.module.parameters(), clip)
        optim.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_one_process_equals_a_plain_loop(
    worker: ModuleType, tmp_path: Path, stage: int, optimizer: str
) -> None:
    run = worker.run_config(
        str(tmp_path), engine__zero_stage=stage, optim__name=optimizer, optim__clip_grad_norm=0.5
    )
    found = worker.train(run)["losses"]
    assert found == pytest.approx(plain_losses(worker, optimizer=optimizer, clip=0.5), abs=ROUNDING)
    assert found[-1] < found[0]


def test_accumulation_equals_one_large_batch(worker: ModuleType, tmp_path: Path) -> None:
    found = worker.train(worker.run_config(str(tmp_path), engine__micro_batch=2))["losses"]
    assert found == pytest.approx(plain_losses(worker), abs=ROUNDING)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Every ZeRO stage on two gloo processes, in one launch; stage 1 also saves for another world size."""
    place = tmp_path_factory.mktemp("ranks")
    cases: list[dict[str, Any]] = [
        {"output": str(place / f"zero{s}"), "engine__zero_stage": s} for s in range(4)
    ]
    cases.append({"output": str(place / "autocast"), "engine__precision": "autocast_bf16"})
    cases.append({"output": str(place / "bf16"), "engine__precision": "bf16"})
    cases.append({"output": str(place / "sgd"), "optim__name": "sgd", "engine__zero_stage": 2})
    return place, torchrun(place / "results.json", *cases)


def test_two_ranks_equal_a_plain_loop_at_every_stage(
    worker: ModuleType, two_ranks: tuple[Path, list[dict[str, Any]]]
) -> None:
    expected = plain_losses(worker)
    for stage, found in enumerate(two_ranks[1][:4]):
        assert found["losses"] == pytest.approx(expected, abs=ROUNDING), f"stage {stage}"
    assert two_ranks[1][6]["losses"] == pytest.approx(plain_losses(worker, optimizer="sgd"), abs=ROUNDING)


def test_half_precision_follows_fp32(
    worker: ModuleType, two_ranks: tuple[Path, list[dict[str, Any]]]
) -> None:
    """bf16 keeps 8 bits: losses of order 1 agree to about 1/100, and are not equal."""
    for found in two_ranks[1][4:6]:
        assert found["losses"] == pytest.approx(plain_losses(worker), abs=0.03)
        assert found["losses"] != plain_losses(worker)


@pytest.mark.parametrize(
    ("before", "after"), [("zero1", 0), ("zero0", 1), ("zero2", 3), ("zero3", 1), ("sgd", 0)]
)
def test_resume_on_another_world_size_and_stage(
    worker: ModuleType, two_ranks: tuple[Path, list[dict[str, Any]]], tmp_path: Path, before: str, after: int
) -> None:
    """Two ranks' checkpoint of step 4, continued by one process at another stage, equals the unbroken run."""
    import shutil

    shutil.copytree(
        two_ranks[0] / before / "checkpoints" / "step_00000004", tmp_path / "checkpoints" / "step_00000004"
    )
    optimizer = "sgd" if before == "sgd" else "adamw"
    run = worker.run_config(str(tmp_path), engine__zero_stage=after, optim__name=optimizer)
    found = worker.train(run)
    assert len(found["losses"]) == 4
    assert found["losses"] == pytest.approx(plain_losses(worker, optimizer=optimizer)[4:], abs=ROUNDING)


def test_a_stop_and_resume_is_bit_identical(worker: ModuleType, tmp_path: Path) -> None:
    whole = worker.train(worker.run_config(str(tmp_path / "whole")))
    first = worker.train(worker.run_config(str(tmp_path / "parts"), checkpoint__every_steps=3))
    assert first == whole
    for late in (tmp_path / "parts" / "checkpoints").glob("step_0000000[678]"):
        for file in late.iterdir():
            file.unlink()
        late.rmdir()
    again = worker.train(worker.run_config(str(tmp_path / "parts"), checkpoint__every_steps=3))
    assert again == whole, "the continued losses and weights, to the last bit"


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    worker: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = worker.train(worker.run_config(str(tmp_path), checkpoint__every_steps=3, checkpoint__keep_last=3))
    folder = tmp_path / "checkpoints"
    newest, before = sorted(folder.glob("step_*"))[-1], sorted(folder.glob("step_*"))[-2]
    file = newest / "parameters-rank0.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    (folder / "step_00000099.partial").mkdir()
    again = worker.train(worker.run_config(str(tmp_path), checkpoint__every_steps=3, checkpoint__keep_last=3))
    said = capfd.readouterr().out
    assert f"{newest.name} is damaged" in said
    assert f"continues from step {int(before.name[5:])}" in said
    assert again == whole


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 3}, "seed"),
        ({"engine__global_batch": 4}, "engine.global_batch"),
        ({"optim__name": "sgd"}, "optim.name"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    worker: ModuleType, tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    worker.train(worker.run_config(str(tmp_path)))
    with pytest.raises(ConfigError, match="checkpoint") as caught:
        worker.train(worker.run_config(str(tmp_path), **change))
    assert caught.value.key == key


def test_only_the_last_checkpoints_are_kept(worker: ModuleType, tmp_path: Path) -> None:
    worker.train(worker.run_config(str(tmp_path), checkpoint__every_steps=1, checkpoint__keep_last=2))
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step_00000007",
        "step_00000008",
    ]


def test_the_best_evaluation_is_kept_and_its_weights_are_the_result(
    worker: ModuleType, tmp_path: Path
) -> None:
    """The task's metric falls from one evaluation to the next, so the first one, at step 2, is the best."""
    found = worker.train(worker.run_config(str(tmp_path / "run"), evaluation={"every_steps": 2}))
    short = worker.train(
        worker.run_config(str(tmp_path / "last"), evaluation={"every_steps": 2}, checkpoint__keep_best=False)
    )
    assert found["losses"] == short["losses"]
    assert found["checksum"] != short["checksum"]
    assert [p.name for p in (tmp_path / "run" / "checkpoints" / "best").iterdir()] == ["step_00000002"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_without_a_finite_loss_changes_nothing_and_is_counted(
    worker: ModuleType, tmp_path: Path, stage: int
) -> None:
    found = worker.train(worker.run_config(str(tmp_path), engine__zero_stage=stage), poison_step=3)
    assert found["skipped"] == 1
    assert found["steps"] == 8
    assert found["losses"][3] is None, "the step's loss is logged as not a number"
    assert all(loss is not None and loss < 3 for loss in found["losses"][4:])


def test_a_diverged_run_stops_with_advice(worker: ModuleType, tmp_path: Path) -> None:
    run = worker.run_config(str(tmp_path), optim__lr=1e30, optim__name="sgd", engine__max_bad_steps_in_row=2)
    with pytest.raises(DivergedError, match="clip_grad_norm"):
        worker.train(run)


def test_a_signal_saves_and_leaves_cleanly(
    worker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the middle: a checkpoint, and the rest later equals an unbroken run.

    The host reads of a step while the next one runs: a signal in step 3 stops the run after step 4.
    """
    whole = worker.train(worker.run_config(str(tmp_path / "whole")))
    forward, count = worker.Net.forward, 0

    def with_signal(self: Any, inputs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, inputs)

    monkeypatch.setattr(worker.Net, "forward", with_signal)
    run = worker.run_config(str(tmp_path / "parts"), checkpoint__every_steps=1000)
    stopped = worker.train(run)
    assert stopped["interrupted"]
    assert stopped["steps"] == 4
    monkeypatch.setattr(worker.Net, "forward", forward)
    rest = worker.train(run)
    assert (rest["losses"], rest["checksum"]) == (whole["losses"], whole["checksum"])


@pytest.mark.slow
def test_a_killed_rank_is_restarted_by_torchrun_and_training_continues(
    worker: ModuleType, tmp_path: Path
) -> None:
    """kill -9 of one of two workers; torchrun restarts both and they resume from the last checkpoint."""
    case = {"output": str(tmp_path / "run"), "checkpoint__every_steps": 10, "schedule": {"steps": 60},
            "slow_seconds": 0.05}  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [
        *launch,
        "--max-restarts",
        "2",
        "--monitor-interval",
        "0.2",
        str(WORKER),
        str(tmp_path / "r.json"),
    ]
    process = subprocess.Popen(
        [*words, json.dumps(case)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Without it the restarted gloo group is handed the dead processes' addresses.
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )
    deadline = time.monotonic() + 200
    while not (tmp_path / "run" / "checkpoints" / "step_00000020").is_dir():
        assert time.monotonic() < deadline, "no checkpoint in minutes"
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said[-4000:]
    assert "continues from step" in said
    (found,) = json.loads((tmp_path / "r.json").read_text())
    assert found["steps"] == 60
    assert len(found["losses"]) == 60, (
        "every step once: what the killed run wrote after its checkpoint is dropped"
    )


def test_learning_rates_scale_with_the_batch() -> None:
    from cliplift.configs.training import OptimConfig

    assert peak_lr(OptimConfig(lr=0.1, lr_reference_batch=256), global_batch=64) == pytest.approx(0.025)
    assert peak_lr(OptimConfig(lr=0.1), global_batch=64) == 0.1
