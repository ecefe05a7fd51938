"""Learning rate and weight decay over a run: the released pretraining scripts' formulas, and in a real engine."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cliplift.configs.sections import ConfigError
from cliplift.configs.training import OptimConfig, ScheduleConfig
from cliplift.models import create_model
from cliplift.pipelines.engine.optim import Schedule, parameter_groups
from cliplift.pipelines.stages.classification import Classifier


def schedule(total: int, *, weight_decay: float = 0.0, **options: Any) -> Schedule:
    return Schedule(ScheduleConfig(steps=total, **options), total_steps=total, weight_decay=weight_decay)


def test_warm_up_from_a_first_lr() -> None:
    """V-JEPA 2: lr(s) = start + s / warm-up * (peak - start) for the s-th step, counted from 1, then constant."""
    found = schedule(30, name="constant", warmup_share=0.4, first_lr_share=1e-4 / 5.25e-4)
    for step in range(12):
        assert 5.25e-4 * found.factor(step) == pytest.approx(1e-4 + (step + 1) / 12 * 4.25e-4)
    assert [found.factor(step) for step in (12, 29)] == [1.0, 1.0]


def test_a_stretched_cosine_and_its_weight_decay_end_at_four_fifths() -> None:
    """V-JEPA 1: 300 steps and 40 of warm-up, laid out for 1.25 times as many; decay 0.04 -> 0.4."""
    options = {"final_lr_share": 1e-6 / 6.25e-4, "warmup_share": 40 / 300, "stretch": 1.25}
    found = schedule(300, name="cosine", final_weight_decay=0.4, weight_decay=0.04, **options)
    for step in (40, 41, 170, 299):
        progress = (step - 40) / (1.25 * 300 - 40)
        expected = 1e-6 + (6.25e-4 - 1e-6) * 0.5 * (1 + math.cos(math.pi * progress))
        assert 6.25e-4 * found.factor(step) == pytest.approx(expected)
        decay = 0.4 + (0.04 - 0.4) * 0.5 * (1 + math.cos(math.pi * step / (1.25 * 300)))
        assert found.weight_decay(step) == pytest.approx(decay)


def test_the_published_cool_down_stops_above_its_final_lr() -> None:
    """V-JEPA 2: 5.25e-4 -> 1e-6 over 12,000 steps, laid out for 15,000: the last one is 1.06e-4."""
    options = {"cooldown_share": 0.99999, "warmup_share": 0.0, "stretch": 1.25}
    found = schedule(12_000, name="warmup_constant_cooldown", final_lr_share=1e-6 / 5.25e-4, **options)
    assert 5.25e-4 * found.factor(0) == pytest.approx(5.25e-4)
    assert 5.25e-4 * found.factor(11_999) == pytest.approx(1.06e-4, rel=0.002)


def test_layer_decay_of_videomae() -> None:
    """Its ids: patch embedding 0, block i is i + 1, the rest last; factor 0.75 ** (blocks + 1 - id)."""
    network = create_model("video_vit_tiny_8", num_classes=3, depth=4)
    module = Classifier(network, label_smoothing=0.0, multi_label=False)
    groups = parameter_groups(module, OptimConfig(layer_decay=0.75))
    factors = {name: group["lr_factor"] for group in groups for name in group["names"]}
    for name, factor in factors.items():
        _, part, *rest = name.split(".")
        layer = {"patch_embed": 0, "blocks": int(rest[0]) + 1 if part == "blocks" else 0}.get(part, 5)
        assert factor == pytest.approx(0.75 ** (5 - layer)), name
    undecayed = [name for group in groups if not group["weight_decay"] for name in group["names"]]
    assert all(dict(module.named_parameters())[name].ndim == 1 for name in undecayed)
    assert "network.blocks.0.attn.qkv.q_bias" in undecayed


@pytest.mark.parametrize("stage", [0, 1])
def test_the_engine_decays_by_the_schedule(stage: int, worker: ModuleType, tmp_path: Path) -> None:
    """Against the same training written out; what has no weight decay keeps none."""
    steps = 8
    more = {"schedule__final_weight_decay": 5.0, "optim__weight_decay": 0.5, "engine__zero_stage": stage}
    run = worker.run_config(str(tmp_path), **more)
    found = worker.train(run)["losses"]
    task = worker.Task()
    parts = [[p for p in task.module.parameters() if (p.ndim > 1) == wide] for wide in (True, False)]
    groups = [{"params": parts[0], "weight_decay": 0.5}, {"params": parts[1], "weight_decay": 0.0}]
    optim = torch.optim.AdamW(groups, lr=0.01)
    plan = Schedule(run.schedule, total_steps=steps)
    losses = []
    for step in range(steps):
        index = torch.arange(step * 8, (step + 1) * 8) % worker.SAMPLES
        clips = torch.stack([worker.sample(int(i)) for i in index]).permute(0, 4, 1, 2, 3).float() / 255
        optim.param_groups[0]["weight_decay"] = 5.0 - 4.5 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optim.param_groups:
            group["lr"] = 0.01 * plan.factor(step)
        loss = task.module({"clips": clips, "labels": index % worker.CLASSES})["loss"]
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(loss.item())
    assert found == pytest.approx(losses, rel=1e-5)


def test_a_decay_that_cannot_move_is_refused(worker: ModuleType) -> None:
    with pytest.raises((ConfigError, ValidationError), match=r"has no effect with optim\.weight_decay=0"):
        worker.run_config("unused", optim__weight_decay=0.0, schedule__final_weight_decay=0.4)
