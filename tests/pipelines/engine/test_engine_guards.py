"""What the engine does about bad steps, hangs and preemption; average weights, precise BatchNorm, LAMB, profiles."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from cliplift.configs.training import EngineConfig
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.engine.batchnorm import estimate_statistics, lagging_statistics
from cliplift.pipelines.engine.deepspeed_setup import deepspeed_config
from cliplift.pipelines.engine.faults import VERDICTS, DivergedError, LossGuard
from cliplift.pipelines.engine.optim import Lamb

WORKER = Path(__file__).with_name("training_worker.py")
ONE = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
ROUNDING = 2e-6


def plain_steps(worker: ModuleType, *, steps: int = 8) -> list[dict[str, Tensor]]:
    """Parameters after every step of the same AdamW training written out."""
    from cliplift.pipelines.engine.optim import Schedule

    run = worker.run_config("unused")
    task = worker.Task()
    decay = [p for p in task.module.parameters() if p.ndim > 1]
    rest = [p for p in task.module.parameters() if p.ndim <= 1]
    groups = [
        {"params": decay, "weight_decay": run.optim.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    optim = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.999), eps=1e-8)
    schedule = Schedule(run.schedule, total_steps=steps)
    found = []
    for step in range(steps):
        index = torch.arange(step * 8, (step + 1) * 8) % worker.SAMPLES
        clips = torch.stack([worker.sample(int(i)) for i in index]).permute(0, 4, 1, 2, 3).float() / 255
        for group in optim.param_groups:
            group["lr"] = 0.01 * schedule.factor(step)
        optim.zero_grad()
        task.module({"clips": clips, "labels": index % worker.CLASSES})["loss"].backward()
        optim.step()
        found.append({n: p.detach().clone() for n, p in task.module.named_parameters()})
    return found


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_result_is_the_moving_average_of_the_weights(
    worker: ModuleType, tmp_path: Path, stage: int
) -> None:
    """Against the recursion written out over a plain loop's weights, also after a stop and resume."""
    torch.manual_seed(0)
    average = {n: p.detach().clone() for n, p in worker.Task().module.named_parameters()}
    for n, weights in enumerate(plain_steps(worker), start=1):
        decay = min(0.9, (1 + n) / (10 + n))
        average = {k: decay * average[k] + (1 - decay) * weights[k] for k in average}
    expected = (
        sum(float(v.double().abs().sum()) for v in average.values()) + 8
    )  # and the buffer that counts steps
    run = worker.run_config(str(tmp_path), optim__average_decay=0.9, engine__zero_stage=stage)
    assert worker.train(run)["checksum"] == pytest.approx(expected, abs=2e-4)
    saved = load_file(tmp_path / "checkpoints/step_00000008/average-rank0.safetensors")
    for name, value in average.items():
        assert torch.allclose(saved[name], value.flatten(), atol=ROUNDING), name
    import shutil

    shutil.rmtree(tmp_path / "checkpoints/step_00000008")
    resumed = run.model_copy(update={"engine": run.engine.model_copy(update={"zero_stage": (stage + 1) % 4})})
    assert worker.train(resumed)["checksum"] == pytest.approx(expected, abs=2e-4)


def test_evaluation_sees_the_average_and_training_goes_on_with_its_own_weights(
    worker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def evaluate(self: Any, *, topology: Topology) -> dict[str, float]:
        seen.append(float(sum(p.double().abs().sum() for p in self.module.parameters())))
        return {"accuracy": 0.0}

    monkeypatch.setattr(worker.Task, "evaluate", evaluate)
    plain = worker.train(worker.run_config(str(tmp_path / "plain"), evaluation={"every_steps": 2}))
    own, seen[:] = list(seen), []
    averaged = worker.train(
        worker.run_config(str(tmp_path / "ema"), evaluation={"every_steps": 2}, optim__average_decay=0.9)
    )
    assert averaged["losses"] == plain["losses"], "to the last bit"
    assert all(abs(a - b) > 1e-4 for a, b in zip(own, seen, strict=True))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.norm(self.conv(x)))
        return out


def test_precise_statistics_are_those_of_all_the_data() -> None:
    torch.manual_seed(0)
    net = Normed().train()
    batches = [torch.randn(5, 3, 2, 4, 4) * (1 + n) + n for n in range(3)]
    state = torch.get_rng_state()
    estimate_statistics(net, batches, forward=net, topology=ONE)
    together = net.conv(torch.cat(batches)).detach().double()
    assert net.norm.running_mean is not None
    assert net.norm.running_var is not None
    assert torch.allclose(net.norm.running_mean.double(), together.mean((0, 2, 3, 4)), atol=1e-5)
    assert torch.allclose(
        net.norm.running_var.double(), together.var((0, 2, 3, 4), unbiased=False), rtol=1e-5
    )
    assert net.norm.momentum == 0.1
    assert torch.equal(torch.get_rng_state(), state)
    net.eval()
    before = net.norm.running_mean.clone()
    estimate_statistics(net, batches[:1], forward=net, topology=ONE)
    assert torch.equal(before, net.norm.running_mean), "a layer held in eval mode keeps its statistics"


def test_a_run_too_short_for_its_running_statistics_is_told(
    worker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = Normed()
    assert lagging_statistics(net, forward_passes=100) is None
    assert "over 10 forward passes and the run has 99" in str(lagging_statistics(net, forward_passes=99))
    net.norm.momentum = 0.01
    assert "over 100 forward passes" in str(lagging_statistics(net, forward_passes=999))
    assert lagging_statistics(net, forward_passes=1000) is None
    net.norm.momentum = None  # a plain average over all passes
    assert lagging_statistics(net, forward_passes=1) is None
    net.norm.momentum = 0.01
    assert lagging_statistics(net.eval(), forward_passes=1) is None, "held in eval mode: nothing moves"

    class WithBatchNorm(worker.Net):  # type: ignore[misc, name-defined]
        def __init__(self, poison_step: int | None = None) -> None:
            super().__init__(poison_step)
            self.body[1] = nn.BatchNorm3d(8)

    monkeypatch.setattr(worker, "Net", WithBatchNorm)
    worker.train(worker.run_config(str(tmp_path / "a")))
    assert "set evaluation.precise_batchnorm_batches" in capsys.readouterr().out
    worker.train(worker.run_config(str(tmp_path / "b"), evaluation={"precise_batchnorm_batches": 2}))
    assert "precise_batchnorm_batches" not in capsys.readouterr().out


def test_a_run_evaluates_with_precise_statistics(
    worker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WithBatchNorm(worker.Net):  # type: ignore[misc, name-defined]
        def __init__(self, poison_step: int | None = None) -> None:
            super().__init__(poison_step)
            self.body[1] = nn.BatchNorm3d(8)

    seen = []

    def evaluate(self: Any, *, topology: Topology) -> dict[str, float]:
        seen.append((self.module.body[0].weight.clone(), self.module.body[1].running_mean.clone()))
        return {"accuracy": 0.0}

    monkeypatch.setattr(worker, "Net", WithBatchNorm)
    monkeypatch.setattr(worker.Task, "evaluate", evaluate)
    config = worker.run_config(str(tmp_path), evaluation={"precise_batchnorm_batches": 2})
    worker.train(config)
    (weight, mean), *_ = seen
    index = torch.arange(64, 80) % worker.SAMPLES  # the positions after step 8
    clips = torch.stack([worker.sample(int(i)) for i in index]).permute(0, 4, 1, 2, 3).float() / 255
    found = nn.functional.conv3d(clips, weight).mean((0, 2, 3, 4))
    biases = load_file(tmp_path / "checkpoints/step_00000008/parameters-rank0.safetensors")["body.0.bias"]
    assert torch.allclose(mean, found + biases, atol=1e-5)


def test_lamb_equals_the_papers_formula() -> None:
    """Algorithm 2 in numpy, fp64; the bias group has no trust ratio."""
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
    optimizer = Lamb(
        [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}], lr=0.01
    )
    w, b = weight.detach().double().numpy().copy(), bias.detach().double().numpy().copy()
    moments = {"w": (np.zeros_like(w), np.zeros_like(w)), "b": (np.zeros_like(b), np.zeros_like(b))}
    for n in range(1, 6):
        gradients = {"w": torch.randn(4, 3), "b": torch.randn(4)}
        weight.grad, bias.grad = gradients["w"].clone(), gradients["b"].clone()
        optimizer.step()
        for name, values in (("w", w), ("b", b)):
            g = gradients[name].double().numpy()
            m = 0.9 * moments[name][0] + 0.1 * g
            v = 0.999 * moments[name][1] + 0.001 * g * g
            moments[name] = (m, v)
            r = (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.999**n)) + 1e-6)
            if name == "w":
                r = r + 0.1 * values
                r = r * np.linalg.norm(values) / np.linalg.norm(r)
            np.subtract(values, 0.01 * r, out=values)
    assert np.allclose(weight.detach().numpy(), w, atol=1e-6)
    assert np.allclose(bias.detach().numpy(), b, atol=1e-6)


def test_lamb_trains_resumes_and_is_refused_with_partitions(worker: ModuleType, tmp_path: Path) -> None:
    import shutil

    run = worker.run_config(str(tmp_path), optim__name="lamb", engine__zero_stage=0)
    whole = worker.train(run)
    shutil.rmtree(tmp_path / "checkpoints/step_00000008")
    assert worker.train(run) == whole
    with pytest.raises(ValidationError, match="whole layers"):
        worker.run_config(str(tmp_path), optim__name="lamb", engine__zero_stage=1)


def test_a_spike_is_a_loss_far_above_the_median_of_a_full_window() -> None:
    guard = LossGuard(EngineConfig(loss_spike_factor=2.0, loss_spike_window_steps=5), ONE)
    assert [verdict(guard, x) for x in (1.0, 9.0, 1.0, 1.2, 0.8)] == ["fine"] * 5, (
        "the window is not full before"
    )
    assert verdict(guard, 1.9) == "fine"
    assert verdict(guard, 2.5) == "spike"
    assert verdict(guard, math.nan) == "not finite"
    assert verdict(guard, 2.45) == "spike", "bad losses do not move the median"
    guard.forget()
    assert verdict(guard, 1e30) == "fine", "a new window is empty"
    assert verdict(LossGuard(EngineConfig(), ONE), 1e30) == "fine"


def verdict(guard: LossGuard, loss: float) -> str:
    number, signalled = guard.judge(torch.tensor(loss, dtype=torch.float64), signalled=False)
    assert not signalled
    return VERDICTS[int(number)]


def spiking(worker: ModuleType, at: int) -> type[Any]:
    """A net whose loss is multiplied by 100 on the samples of one data position."""

    class Spiking(worker.Net):  # type: ignore[misc, name-defined]
        def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            found = super().forward(inputs)
            first = torch.stack([worker.sample(at * 8 % worker.SAMPLES)]).permute(0, 4, 1, 2, 3).float() / 255
            if torch.equal(inputs["clips"][:1], first):
                found["loss"] = found["loss"] * 100
            return found

    return Spiking


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_spike_is_skipped(
    worker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """The weights and moments of the step before stay: the next checkpoint but for the spike equals the one before."""
    monkeypatch.setattr(worker, "Net", spiking(worker, 5))
    found = worker.train(
        worker.run_config(
            str(tmp_path),
            engine__loss_spike_factor=10.0,
            engine__loss_spike_window_steps=5,
            engine__zero_stage=stage,
            checkpoint={"every_steps": 1, "keep_last": 8},
        )
    )
    assert found["skipped"] == 1
    saved = [
        load_file(tmp_path / f"checkpoints/step_0000000{n}/parameters-rank0.safetensors") for n in (5, 6, 7)
    ]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert any(not torch.equal(saved[1][name], saved[2][name]) for name in saved[0])


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_rewind_goes_back_and_passes_over_the_data(
    worker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """Position 5 spikes after the checkpoint of step 4: steps 4, 5 ... then train on positions 6, 7 ..."""
    monkeypatch.setattr(worker, "Net", spiking(worker, 5))
    config = {
        "engine": {
            "device": "cpu",
            "global_batch": 8,
            "zero_stage": stage,
            "loss_spike_factor": 10.0,
            "loss_spike_window_steps": 5,
            "on_bad_step": "rewind",
        },
        "optim": {"lr": 0.01},
        "checkpoint": {"every_steps": 2, "keep_last": 9},
    }
    found = worker.train(worker.run_config(str(tmp_path / "run"), **config))
    assert len(found["losses"]) == 8
    expected = expected_after_rewind(worker)
    assert found["losses"] == pytest.approx(expected, abs=ROUNDING)
    # A stop after the rewind goes on with the same data.
    import shutil

    shutil.rmtree(tmp_path / "run/checkpoints/step_00000008")
    again = worker.train(worker.run_config(str(tmp_path / "run"), **config))
    assert again["losses"] == found["losses"], "to the last bit"


def expected_after_rewind(worker: ModuleType) -> list[float]:
    """A plain loop over positions 0 to 3, then 6 to 9."""
    from cliplift.pipelines.engine.optim import Schedule

    run = worker.run_config("unused")
    task = worker.Task()
    decay = [p for p in task.module.parameters() if p.ndim > 1]
    rest = [p for p in task.module.parameters() if p.ndim <= 1]
    optim = torch.optim.AdamW(
        [{"params": decay, "weight_decay": run.optim.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=0.01,
    )
    schedule = Schedule(run.schedule, total_steps=8)
    losses = []
    for step, position in enumerate([0, 1, 2, 3, 6, 7, 8, 9]):
        index = torch.arange(position * 8, (position + 1) * 8) % worker.SAMPLES
        clips = torch.stack([worker.sample(int(i)) for i in index]).permute(0, 4, 1, 2, 3).float() / 255
        for group in optim.param_groups:
            group["lr"] = 0.01 * schedule.factor(step)
        loss = task.module({"clips": clips, "labels": index % worker.CLASSES})["loss"]
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(loss.item())
    return losses


def test_a_run_told_to_stop_stops(worker: ModuleType, tmp_path: Path) -> None:
    run = worker.run_config(str(tmp_path), engine__on_bad_step="stop")
    with pytest.raises(DivergedError, match="step 3"):
        worker.train(run, poison_step=3)


def test_bf16_leaves_a_bad_update_out_too(worker: ModuleType, tmp_path: Path) -> None:
    run = worker.run_config(str(tmp_path), engine__precision="bf16", engine__zero_stage=2)
    found = worker.train(run, poison_step=3)
    assert found["skipped"] == 1
    assert all(loss is not None and loss < 3 for loss in found["losses"][4:])


HANGING = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import training_worker as worker
calm = worker.Net.forward
def hang(self, inputs):
    if int(self.calls) == 3:
        time.sleep(600)
    return calm(self, inputs)
worker.Net.forward = hang
worker.train(worker.run_config(**json.loads(sys.argv[2])))
"""


@pytest.mark.slow
def test_a_hang_is_ended_with_the_stacks(tmp_path: Path) -> None:
    case = json.dumps({"output": str(tmp_path), "engine__hang_seconds": 5.0})
    done = subprocess.run(
        [sys.executable, "-c", HANGING, str(WORKER.parent), case],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    stacks = (tmp_path / "stacks/rank0.txt").read_text()
    assert "hang" in stacks
    assert "_train_step" in stacks


def test_an_earlier_hang_is_said(
    worker: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks/rank0.txt").write_text("Timeout!\n")
    worker.train(worker.run_config(str(tmp_path), engine__hang_seconds=60.0))
    assert "stacks/rank0.txt" in capfd.readouterr().out


@pytest.mark.parametrize("form", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_checkpoints_of_earlier_formats_are_continued(
    worker: ModuleType, tmp_path: Path, form: int, stage: int
) -> None:
    """Step 4 of this case, saved by earlier versions: format 1 by one process, format 2 by two, with an average.

    The unbroken run is the reference.
    """
    import shutil

    changes = {"optim__average_decay": 0.9 if form == 2 else 0.0}
    whole = worker.train(worker.run_config(str(tmp_path / "whole"), **changes))
    fixture = Path(__file__).with_name(f"checkpoint_format{form}") / "step_00000004"
    shutil.copytree(fixture, tmp_path / "old/checkpoints/step_00000004")
    found = worker.train(worker.run_config(str(tmp_path / "old"), engine__zero_stage=stage, **changes))
    assert found["losses"] == pytest.approx(whole["losses"][4:], abs=ROUNDING)
    assert found["checksum"] == pytest.approx(whole["checksum"], abs=2e-4)


def test_asynchronous_checkpoints_are_the_same_and_complete(worker: ModuleType, tmp_path: Path) -> None:
    for name, asynchronous in (("now", False), ("later", True)):
        worker.train(
            worker.run_config(
                str(tmp_path / name),
                checkpoint={"every_steps": 2, "keep_last": 9, "asynchronous": asynchronous},
            )
        )
    for step in (2, 4, 6, 8):
        now, later = (tmp_path / n / f"checkpoints/step_0000000{step}" for n in ("now", "later"))
        for file in (
            "parameters-rank0.safetensors",
            "optimizer-rank0.safetensors",
            "state.json",
            "COMPLETE.json",
        ):
            assert (now / file).read_bytes() == (later / file).read_bytes()


def test_steps_are_profiled(worker: ModuleType, tmp_path: Path) -> None:
    import gzip

    worker.train(
        worker.run_config(
            str(tmp_path), track={"wandb": "disabled", "every_steps": 1, "profile_steps": [3, 4]}
        )
    )
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "steps_00000003-00000004_rank0.json.gz"
    events = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert "aten::conv3d" in events


def test_derived_config_writes_everything_out(worker: ModuleType, tmp_path: Path) -> None:
    run = worker.run_config(str(tmp_path), engine__device="auto", engine__zero_stage=3)
    offloaded = run.engine.model_copy(update={"offload": "optimizer_and_parameters"})
    found = deepspeed_config(run.model_copy(update={"engine": offloaded}), world_size=1)
    assert found["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert found["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert found["fp16"]["initial_scale_power"] == 16
    for stage, offload in ((0, "optimizer"), (1, "optimizer_and_parameters")):
        with pytest.raises(ValidationError, match="needs ZeRO stage"):
            EngineConfig(zero_stage=stage, offload=offload)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="GPU"):
        EngineConfig(device="cpu", zero_stage=1, offload="optimizer")
    with pytest.raises(ValidationError, match="contradicts"):
        EngineConfig(deepspeed={"torch_autocast": {"enabled": True}})


@pytest.mark.slow
def test_sigterm_to_one_of_two_ranks_stops_both_at_the_same_step(tmp_path: Path) -> None:
    case = {"output": str(tmp_path / "run"), "checkpoint__every_steps": 20, "schedule": {"steps": 4000}}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*launch, str(WORKER), str(tmp_path / "r.json"), json.dumps(case)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 200
    while not (tmp_path / "run/checkpoints/step_00000020").is_dir():
        assert time.monotonic() < deadline, "no checkpoint in minutes"
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGTERM)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said[-4000:]
    (found,) = json.loads((tmp_path / "r.json").read_text())
    assert found["interrupted"]
    assert (tmp_path / f"run/checkpoints/step_{found['steps']:08d}/COMPLETE.json").is_file()
