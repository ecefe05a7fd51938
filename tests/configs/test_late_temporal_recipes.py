"""The late-temporal recipes say what was published, and name nets that exist."""

from pathlib import Path

import pytest
import torch

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS, FinetuneRun
from cliplift.models import create_model

RECIPES = Path(__file__).parents[2] / "configs" / "finetune"


def recipe(name: str) -> FinetuneRun:
    run = load_run(RECIPES / f"{name}.yaml", schemas=RUNS).run
    assert isinstance(run, FinetuneRun)
    return run


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("late_temporal_hmdb51", 47_377_907),
        ("late_temporal_ucf101", 47_377_907),
        ("late_temporal_hmdb51_tgap_adamw", 47_625_715),
        ("late_temporal_hmdb51_tgap_sgd", 47_625_715),
    ],
)
def test_the_net_of_each_recipe_at_51_classes(name: str, parameters: int) -> None:
    run = recipe(name)
    with torch.device("meta"):
        model = create_model(
            run.model.name, num_classes=51, in_frames=run.data.sampling.frames, **run.model.options
        )
    assert sum(p.numel() for p in model.parameters()) == parameters
    spec = model.input_spec
    assert (spec.frames, spec.crop_height) == (run.data.sampling.frames, run.data.crop_pixels) == (64, 112)  # type: ignore[union-attr]


def test_published_settings_and_no_look_at_the_test_split() -> None:
    run = recipe("late_temporal_hmdb51")
    assert (run.optim.name, run.optim.lr, run.optim.weight_decay) == ("adamw", 1e-5, 1e-3)
    assert run.optim.decay_norm_and_bias
    assert (run.engine.global_batch, run.engine.micro_batch) == (128, 8)
    assert (run.schedule.name, run.schedule.factor, run.schedule.epochs) == ("plateau", 0.1, 200)
    assert (run.data.sampling.stride, run.data.sampling.short_clips) == (1, "loop")
    assert run.data.val_split != run.test_split
    assert run.data.val_share > 0


def test_the_ablation_differs_in_the_optimizer_alone() -> None:
    adamw, sgd = (recipe(f"late_temporal_hmdb51_tgap_{name}").model_dump() for name in ("adamw", "sgd"))
    assert {key for key in adamw if adamw[key] != sgd[key]} == {"name", "output", "optim"}


def test_dampened_momentum_is_a_tenth_of_the_rate_after_the_first_step() -> None:
    """Published: lr 1e-2, momentum 0.9, dampening 0.9. The recipe: lr 1e-3, no dampening."""
    run = recipe("late_temporal_hmdb51_tgap_sgd")
    assert not run.optim.nesterov
    paths = []
    for lr, dampening in ((1e-2, 0.9), (run.optim.lr, 0.0)):
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        decay, momentum = run.optim.weight_decay, run.optim.momentum
        step = torch.optim.SGD([p], lr=lr, momentum=momentum, dampening=dampening, weight_decay=decay)
        step.state[p]["momentum_buffer"] = torch.zeros_like(p)  # else the first step alone is not dampened
        for i in range(20):
            p.grad = p.detach() * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + i
            step.step()
        paths.append(p.detach())
    torch.testing.assert_close(paths[0], paths[1])
