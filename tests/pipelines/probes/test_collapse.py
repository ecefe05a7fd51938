"""The numbers that see a collapse, against formulas written out, and when the alarm speaks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cliplift.pipelines.probes.collapse import (
    CollapseAlarm,
    effective_rank,
    feature_std,
    participation_ratio,
    sampled_tokens,
)


@pytest.mark.parametrize("shape", [(40, 6), (5, 30)])
def test_numbers_are_their_formulas(shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(0).normal(size=shape) * np.geomspace(1, 0.01, shape[1]) + 3
    eigenvalues = np.linalg.eigvalsh(np.cov(rows.T)).clip(0)
    singular = np.sqrt(eigenvalues[eigenvalues > 1e-12])
    shares = singular / singular.sum()
    tensor = torch.from_numpy(rows)
    assert feature_std(tensor).item() == pytest.approx(rows.std(axis=0).mean())
    assert effective_rank(tensor) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert participation_ratio(tensor).item() == pytest.approx(
        eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    )


def test_directions_are_counted() -> None:
    """Rows that vary equally in k directions have rank k by both measures; equal rows have none."""
    axes = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q
    for k in (1, 4):
        rows = torch.cat([axes[:k], -axes[:k]]) + 7
        assert effective_rank(rows) == pytest.approx(k)
        assert participation_ratio(rows).item() == pytest.approx(k)
    same = torch.randn(1, 20).repeat(9, 1)
    assert feature_std(same).item() < 1e-6
    assert effective_rank(same.double()) == 0
    assert participation_ratio(torch.ones(9, 20)).item() == 0


def test_tokens_are_taken_from_the_whole_clip() -> None:
    numbers = torch.arange(2048.0).expand(3, -1)[..., None]
    taken = sampled_tokens(numbers)
    assert taken.shape == (3 * 64, 1)
    assert taken[63].item() > 2000
    assert sampled_tokens(torch.zeros(2, 20, 5)).shape == (40, 5)


def test_the_alarm_speaks_once_and_names_what_to_do() -> None:
    alarm = CollapseAlarm(std=0.05, rank_share=0.5)
    assert (
        alarm.look({"train/loss": 0.5, "train/feature_std": 0.6, "train/participation_ratio": 10.0}) is None
    )
    said = alarm.look({"train/feature_std": 0.01, "train/participation_ratio": 8.0})
    assert said is not None
    assert "train/feature_std is 0.01, below 0.05" in said
    assert "participation_ratio is" not in said
    assert "latent.teacher_momentum" in said
    assert alarm.look({"train/feature_std": 0.01}) is None, "it has been said"
    assert alarm.look({"train/feature_std": 0.4, "eval/effective_rank": None}) is None
    assert alarm.look({"train/feature_std": 0.03}) is not None, "again"


def test_the_alarm_hears_a_fall_of_the_rank_and_what_is_no_number() -> None:
    alarm = CollapseAlarm(std=0.05, rank_share=0.5)
    assert alarm.look({"eval/effective_rank": 3.0}) is None
    assert alarm.look({"eval/effective_rank": 40.0}) is None
    said = alarm.look({"eval/effective_rank": 19.0})
    assert said is not None
    assert "eval/effective_rank is 19, 40 before" in said
    assert alarm.look({"train/feature_std": float("nan")}) is not None
    silent = CollapseAlarm(std=0.0, rank_share=0.0)
    assert silent.look({"eval/effective_rank": 0.0, "train/feature_std": 0.0}) is None
