"""Every recipe of the frame-sequence models loads, builds its network, and fits the one it starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS, ClassificationRun, EvaluateRun
from cliplift.models import create_model
from cliplift.models.per_frame.frame_sequence import FrameSequence
from cliplift.models.per_frame.snippets import PooledFrames
from cliplift.models.state_dicts import load_state

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PATTERNS = (
    "finetune/*single_frame*",
    "finetune/*lrcn*",
    "finetune/*snippets*",
    "finetune/*attention*",
    "finetune/multi_lstm*",
    "pretrain/snippets*",
)
RECIPES = sorted({path for pattern in PATTERNS for path in CONFIGS.glob(f"{pattern}.yaml")})


def recipe(path: Path) -> ClassificationRun:
    run = load_run(path, RUNS).run
    assert isinstance(run, ClassificationRun)
    return run


def network(run: ClassificationRun, classes: int) -> nn.Module:
    model = run.model
    with torch.device("meta"):
        return create_model(
            model.name, num_classes=classes, in_frames=run.data.sampling.frames, **model.options
        )


def test_the_recipes_are_found() -> None:
    assert {run.model.name for run in map(recipe, RECIPES)} >= {
        "single_frame",
        "lrcn",
        "snippets_conv_pooling",
        "snippets_lstm",
        "attention_lstm",
        "multi_lstm",
        "visual_attention",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_recipe_builds_a_network_that_takes_its_clips(path: Path) -> None:
    run = recipe(path)
    model = network(run, classes=11)
    assert isinstance(model, FrameSequence)
    spec = model.input_spec
    assert (spec.crop_height, spec.crop_width) == (run.data.crop_pixels,) * 2
    side = run.data.crop_pixels
    assert model(torch.empty(1, 3, run.data.sampling.frames, side, side, device="meta")).shape == (1, 11)
    if not isinstance(model, PooledFrames):  # whose logits serve both
        assert model.multi_label == (run.task == "multi_label")
    if run.model.pretrained is not None:
        assert run.model.pretrained in model.published_weights
        assert run.initialise_from is None


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_recipe_starts_from_another_ones_run(path: Path) -> None:
    run = recipe(path)
    if run.initialise_from is None:
        assert run.model.pretrained == "imagenet" or "caffenet" in path.stem
        return
    (before,) = (other for other in map(recipe, RECIPES) if other.output == run.initialise_from)
    report = load_state(network(run, 11), network(before, 11).state_dict(), source=before.name)
    assert report.loaded > 0


def test_the_evaluation_recipe(repository: Path) -> None:
    run = load_run(repository / "configs/evaluate/lrcn_ucf101.yaml", RUNS).run
    assert isinstance(run, EvaluateRun)
    assert run.run in {r.output for r in map(recipe, RECIPES)}
    assert run.views is not None
    assert run.batch == run.views.clips * run.views.crops, "the views of a video share a batch"
