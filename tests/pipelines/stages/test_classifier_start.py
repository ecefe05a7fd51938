"""Finetuning from the linear classifier of the features as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.configs.sections import ConfigError
from cliplift.pipelines.data.augment import DeviceAugment
from cliplift.pipelines.data.eval_loader import EvalLoader
from cliplift.pipelines.data.source import ClipSource
from cliplift.pipelines.stages.run import run_stage, stage_of

SMALL = (
    "model={name: video_vit_tiny_8}", "initialise_from=null", "data.crop_pixels=32", "data.resize_short_side_pixels=36",
    "data.sampling={frames: 8, mode: segments}", "engine={channels_last: false, global_batch: 8}", "schedule.steps=2",
    "classifier_start=linear",
)  # fmt: skip


@pytest.mark.slow
def test_the_classifier_starts_where_its_loss_is_least(load: Callable[..., Any], place: Path) -> None:
    """At the start the gradient of the penalised loss is zero, of the training clips and of no others."""
    run = load("finetune/demo", "linear-start", *SMALL)
    source = ClipSource(run.data, split="train")
    network = stage_of(run, classes=source.classes).module.network
    head = network.get_submodule(network.head_name)
    kept = Path(run.output) / "classifier_start.safetensors"
    assert torch.equal(load_file(kept)["weight"], head.weight)
    (batch,) = EvalLoader(run.data, split="train", batch=100, rank=0, world_size=1)
    setattr(network, network.head_name, nn.Identity())
    with torch.no_grad():
        features = network.eval()(DeviceAugment(run.data.augment, network.input_spec, training=False)(batch))
    assert len(features) == len(source) == 40
    features = features.half().double()
    deviation = features.std(dim=0, correction=0)
    weight = (head.weight.detach().double() * deviation).requires_grad_()
    bias = (
        head.bias.detach().double() + head.weight.detach().double() @ features.mean(dim=0)
    ).requires_grad_()
    logits = (features - features.mean(dim=0)) / deviation @ weight.T + bias
    (F.cross_entropy(logits, batch.labels) + 0.5e-3 * weight.square().sum()).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert weight.detach().abs().max() > 0.05
    assert weight.grad.abs().max() < 1e-3
    assert bias.grad.abs().max() < 1e-3
    written = kept.stat().st_mtime_ns
    assert run_stage(run, command=[]).finished
    assert kept.stat().st_mtime_ns == written, "fitted once"


@pytest.mark.parametrize(
    "words",
    [("engine.zero_stage=3",), ("task=multi_label",), ("data.sequential={tars: x, samples_per_epoch: 9}",)],
)
def test_what_has_no_such_start_is_refused_when_the_config_is_read(
    words: tuple[str, ...], repository: Path, tmp_path: Path
) -> None:
    more = [f"data.shards={tmp_path}/none", f"output={tmp_path}/run", "classifier_start=linear", *words]
    with pytest.raises(ConfigError) as caught:
        load_run(repository / "configs/finetune/demo.yaml", RUNS, more)
    assert caught.value.key == "classifier_start", str(caught.value)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("model.name=t3d_tiny",), "BatchNorm is held"),
        (("model={name: single_frame, options: {encoder: efficientnet_lite0}}",), "one linear layer"),
    ],
)
def test_a_model_without_such_a_classifier_is_refused(
    words: tuple[str, ...], why: str, repository: Path, tmp_path: Path
) -> None:
    more = [
        f"data.shards={tmp_path}/none",
        f"output={tmp_path}/run",
        "initialise_from=null",
        "classifier_start=linear",
    ]
    run = load_run(repository / "configs/finetune/demo.yaml", RUNS, [*more, *words]).run
    with pytest.raises(ConfigError, match=why) as caught:
        stage_of(run, classes=("a", "b")).module  # noqa: B018
    assert caught.value.key == "classifier_start"
