"""V-JEPA 2's cool-down: encoder, predictor and teacher of a run of latent prediction go on with longer clips."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cliplift.configs.sections import ConfigError
from cliplift.pipelines.checkpoints.saved import open_checkpoint
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.stages.latent import LatentStage
from cliplift.pipelines.stages.run import run_stage

ONE_RANK = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
MODEL = {
    "name": "vjepa2_large_16",
    "options": {"patch": 8, "width": 48, "depth": 2, "heads": 2, "hidden": 96},
}
Read = Callable[..., Any]


@pytest.fixture(scope="module")
def read(load: Read, place: Path) -> Read:
    """``read(output, *words)``: a small run of latent prediction."""
    fixed = [
        "objective=latent", "label_smoothing=0", f"data.shards={place}/shards/unlabelled", "data.sampling.frames=8",
        "data.sampling.stride=1", "data.crop_pixels=32", "data.resize_short_side_pixels=36",
        f"model={json.dumps(MODEL)}", "latent.predictor_width=36", "latent.predictor_depth=1",
        "latent.predictor_heads=3", "engine.global_batch=4", "engine.channels_last=false", "optim.name=adamw",
        "optim.lr=0.001", "evaluation.every_steps=null", "schedule.steps=2", "latent.teacher_momentum=0.5",
    ]  # fmt: skip
    return lambda output, *more: load("pretrain/demo", f"cooldown/{output}", *fixed, *more)


@pytest.fixture(scope="module")
def pretrained(read: Read) -> Path:
    return run_stage(read("first"), command=[]).folder


def stage_of(read: Read, *more: str) -> LatentStage:
    return LatentStage(read("unused", "latent.keep_predictor=true", *more), classes=(), topology=ONE_RANK)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_all_three_nets_go_on(zero_stage: int, pretrained: Path, read: Read) -> None:
    """From the last checkpoint: without a learning rate nothing of it moves."""
    longer = [
        "data.sampling.frames=12", "data.crop_pixels=48", "data.resize_short_side_pixels=48",
        f"engine.zero_stage={zero_stage}", "latent.keep_predictor=true", f"initialise_from={pretrained}",
        "schedule.steps=1", "optim.lr=1e-30", "optim.weight_decay=0", "latent.teacher_momentum=1",
    ]  # fmt: skip
    folder = run_stage(read(f"longer{zero_stage}", *longer), command=[]).folder
    before, after = (
        open_checkpoint(where / f"checkpoints/step_{step:08d}", topology=ONE_RANK).parameters
        for where, step in ((pretrained, 2), (folder, 1))
    )
    assert {name.split(".")[1] for name in before} == {"encoder", "predictor", "teacher"}
    assert sorted(before) == sorted(after)
    for name in before:
        assert torch.equal(before.whole(name), after.whole(name)), name


@pytest.mark.slow
def test_other_nets_and_damaged_checkpoints_are_refused(pretrained: Path, read: Read) -> None:
    with pytest.raises(ConfigError, match=r"first prediction.predictor.blocks.1.attn.proj.bias"):
        stage_of(read, f"initialise_from={pretrained}", "latent.predictor_depth=2").build_module(weights=True)
    step = pretrained / "checkpoints/step_00000002"
    file = next(step.glob("parameters-*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match="cannot be gone on from") as caught:
        stage_of(read, f"initialise_from={step}").build_module(weights=True)
    assert caught.value.key == "initialise_from"
    file.write_bytes(whole)
    stage_of(read, f"initialise_from={step}").build_module(weights=True)


@pytest.mark.parametrize(
    ("more", "key", "said"),
    [
        ([], "latent.keep_predictor", "which initialise_from names"),
        (
            ["initialise_from=/nowhere", "model.pretrained=a.pt"],
            "latent.keep_predictor",
            "model.pretrained does not",
        ),
        (["initialise_from=/nowhere"], "initialise_from", "holds no whole checkpoint"),
    ],
)
def test_a_run_to_go_on_from_is_needed(more: list[str], key: str, said: str, read: Read) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        stage_of(read, *more).build_module(weights=True)
    assert caught.value.key == key
