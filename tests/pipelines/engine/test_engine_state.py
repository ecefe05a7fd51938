"""What the engine keeps and gives back: resume onto more ranks, best weights, fresh starts, full disks, refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cliplift.configs.sections import ConfigError
from cliplift.configs.training import OptimConfig
from cliplift.models import create_model
from cliplift.pipelines.checkpoints.folder import check_space, complete_checkpoints
from cliplift.pipelines.engine.optim import parameter_groups
from cliplift.pipelines.stages.classification import Classifier
from cliplift.pipelines.stages.starting_weights import batchnorms, freeze_named

WORKER = Path(__file__).with_name("training_worker.py")
# The same sums in another order: a few units in the last place of fp32 per step.
ROUNDING = 2e-6


def saved_sum(folder: Path) -> float:
    """Sum of magnitudes of a checkpoint's parameters and buffers, read straight from its files."""
    files = [*folder.glob("parameters-rank?.safetensors"), folder / "buffers-rank0.safetensors"]
    return sum(float(tensor.double().abs().sum()) for file in files for tensor in load_file(file).values())


@pytest.fixture(scope="module")
def onto_two_ranks(
    worker: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[float], list[dict[str, Any]]]:
    """One process's checkpoint of step 4 continued by two at every ZeRO stage, and two-rank runs with a best."""
    place = tmp_path_factory.mktemp("onto")
    unbroken = worker.train(worker.run_config(str(place / "one")))["losses"]
    cases: list[dict[str, Any]] = []
    for stage in range(4):
        output = place / f"onto{stage}"
        shutil.copytree(place / "one/checkpoints/step_00000004", output / "checkpoints/step_00000004")
        cases.append({"output": str(output), "engine__zero_stage": stage})
    for stage in range(4):
        cases.append({"output": str(place / f"best{stage}"), "engine__zero_stage": stage,
                      "evaluation": {"every_steps": 2}})  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(WORKER), str(place / "results.json"), *map(json.dumps, cases)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return place, unbroken, json.loads((place / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_continue_what_one_began(
    onto_two_ranks: tuple[Path, list[float], list[dict[str, Any]]], stage: int
) -> None:
    """The head's bias has 3 elements, which 2 ranks cannot share evenly."""
    _, unbroken, results = onto_two_ranks
    assert len(results[stage]["losses"]) == 4
    assert results[stage]["losses"] == pytest.approx(unbroken[4:], abs=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_return_the_best_weights(
    onto_two_ranks: tuple[Path, list[float], list[dict[str, Any]]], stage: int
) -> None:
    place, _, results = onto_two_ranks
    folder = place / f"best{stage}/checkpoints"
    assert results[4 + stage]["checksum"] == pytest.approx(saved_sum(folder / "best/step_00000002"), abs=1e-9)
    assert results[4 + stage]["checksum"] != pytest.approx(saved_sum(folder / "step_00000008"), abs=1e-3)


@pytest.mark.parametrize(("stage", "precision"), [(3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_the_best_weights_are_the_masters_too(
    worker: ModuleType, tmp_path: Path, stage: int, precision: str
) -> None:
    """Half precision and stage 3 keep fp32 masters beside the weights; the result is read from those."""
    found = worker.train(
        worker.run_config(
            str(tmp_path),
            engine__zero_stage=stage,
            engine__precision=precision,
            evaluation={"every_steps": 2},
        )
    )
    assert found["checksum"] == pytest.approx(
        saved_sum(tmp_path / "checkpoints/best/step_00000002"), abs=1e-9
    )


def test_a_fresh_start_ignores_the_run_before(worker: ModuleType, tmp_path: Path) -> None:
    """``resume: never`` into a used folder: no old best weights, and its own checkpoints are the ones kept."""
    used, clean = tmp_path / "used", tmp_path / "clean"
    worker.train(worker.run_config(str(used), evaluation={"every_steps": 2}))
    changes = {"optim__lr": 0.02, "schedule": {"steps": 3, "name": "cosine"}, "checkpoint__every_steps": 1}
    found = worker.train(worker.run_config(str(used), checkpoint__resume="never", **changes))
    assert found == worker.train(worker.run_config(str(clean), **changes))
    names = [path.name for path in complete_checkpoints(used / "checkpoints")]
    assert names == ["step_00000002", "step_00000003"]
    assert (used / "checkpoints.before-1" / "step_00000008").is_dir(), "set aside, not deleted"


# No file of the process may grow past 4 KiB, as under a quota: writing more is an OSError. A process of its own,
# because this one's output may be a file too.
UNDER_QUOTA = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_is_said_and_leaves_no_half(tmp_path: Path) -> None:
    case = json.dumps({"output": str(tmp_path)})
    done = subprocess.run(
        [sys.executable, "-c", UNDER_QUOTA, str(WORKER), str(tmp_path / "results.json"), case],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 1
    said = done.stderr[-4000:]
    assert re.search(r"CheckpointError: .*step_00000004 could not be written", said), said
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_run_whose_checkpoint_cannot_fit_is_refused_before_training(tmp_path: Path) -> None:
    check_space(tmp_path / "new" / "checkpoints", parameters=1000, trainable=1000, moments=2)
    with pytest.raises(ConfigError, match="GiB are free") as caught:
        check_space(tmp_path / "checkpoints", parameters=10**16, trainable=0, moments=0)
    assert caught.value.key == "output"


def test_casting_precision_is_refused_for_batchnorm(
    worker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WithBatchNorm(worker.Net):  # type: ignore[misc, name-defined]
        def __init__(self, poison_step: int | None = None) -> None:
            super().__init__(poison_step)
            self.body[1] = nn.BatchNorm3d(8)

    monkeypatch.setattr(worker, "Net", WithBatchNorm)
    with pytest.raises(ConfigError, match="BatchNorm") as caught:
        worker.train(worker.run_config(str(tmp_path), engine__precision="bf16"))
    assert caught.value.key == "engine.precision"


def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(create_model("t3d_tiny", num_classes=3), label_smoothing=0.0, multi_label=False)


def test_layer_decay_falls_from_the_head_to_the_stem() -> None:
    """BEiT's rule over n blocks: head 1, block i decay**(n - i), stem decay**(n + 1)."""
    module = classifier()
    factors = {
        name: group["lr_factor"]
        for group in parameter_groups(module, OptimConfig(layer_decay=0.5))
        for name in group["names"]
    }
    blocks = module.network.checkpoint_blocks()  # type: ignore[operator]
    n = len(blocks)
    assert factors["network.classifier.weight"] == factors["network.classifier.bias"] == 1.0
    assert factors["network.features.conv0.weight"] == 0.5 ** (n + 1)
    for i, block in enumerate(blocks):
        inside = {factor for name, factor in factors.items() if name.startswith(f"network.{block}.")}
        assert inside == {0.5 ** (n - i)}, block
    assert factors.keys() == dict(module.named_parameters()).keys()


def test_layer_decay_needs_blocks(worker: ModuleType) -> None:
    with pytest.raises(ConfigError) as caught:
        parameter_groups(worker.Net(), OptimConfig(layer_decay=0.5))
    assert caught.value.key == "optim.layer_decay"


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_recomputed_blocks_change_no_loss(
    worker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """A stage's module wraps the network that names its blocks; recomputation finds it there."""

    class Real(worker.Task):  # type: ignore[misc, name-defined]
        def __init__(self, poison_step: int | None = None, *, run: Any = None) -> None:
            super().__init__()
            self.module = classifier()

        def inputs(self, batch: Any, *, training: bool, step: int) -> dict[str, torch.Tensor]:
            inputs = super().inputs(batch, training=training, step=step)
            # The tiny network halves its input five times: 8 pixels would not be enough.
            inputs["clips"] = nn.functional.interpolate(inputs["clips"], size=(8, 32, 32))
            return dict(inputs)

    monkeypatch.setattr(worker, "Task", Real)
    losses = [
        worker.train(
            worker.run_config(
                str(tmp_path / str(share)),
                engine__checkpoint_blocks_share=share,
                engine__zero_stage=stage,
                schedule={"steps": 3},
            )
        )["losses"]
        for share in (0.0, 1.0)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=ROUNDING)


def test_named_parameters_and_batchnorm_stay_as_they_are() -> None:
    network = create_model("t3d_tiny", num_classes=3)
    freeze_named(network, ["features.conv0.*", "features.denseblock1.*"])
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    expected = ("features.conv0.", "features.denseblock1.")
    assert frozen == {name for name, _ in network.named_parameters() if name.startswith(expected)}
    with pytest.raises(ConfigError, match="matches no parameter") as caught:
        freeze_named(network, ["backbone.*"])
    assert caught.value.key == "model.frozen"
    module = Classifier(network, label_smoothing=0.0, multi_label=False, frozen_batchnorm=True).train()
    before = {name: value.clone() for name, value in network.named_buffers()}
    module({"clips": torch.randn(2, 3, 8, 64, 64), "labels": torch.tensor([0, 1])})
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())
    assert module.training
    assert not any(part.training for part in batchnorms(module))


def test_a_run_whose_checkpoints_are_all_damaged_stops(worker: ModuleType, tmp_path: Path) -> None:
    """To start over would cost the whole run in silence; afresh only when asked for."""
    first = worker.train(worker.run_config(str(tmp_path)))
    for path in complete_checkpoints(tmp_path / "checkpoints"):
        (path / "COMPLETE.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"all checkpoints of .* are damaged") as caught:
        worker.train(worker.run_config(str(tmp_path)))
    assert caught.value.key == "checkpoint.resume"
    assert "checkpoint.resume=never" in str(caught.value)
    afresh = worker.train(worker.run_config(str(tmp_path), checkpoint__resume="never"))
    assert afresh["losses"] == first["losses"]
