"""Probes of frozen features against formulas written out, and hard negatives of the pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cliplift.configs.sections import ConfigError
from cliplift.pipelines.probes.pooled import fit_linear, knn_accuracy
from cliplift.pipelines.stages.matching import draw_pairs


def test_knn_votes_as_written_out() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(40, 6)), rng.normal(size=(15, 6))
    labels, truth = rng.integers(0, 4, 40), rng.integers(0, 4, 15)
    right = 0
    for row, label in zip(test, truth, strict=True):
        cosine = [float(row @ t / np.linalg.norm(row) / np.linalg.norm(t)) for t in train]
        votes = [0.0] * 4
        for i in sorted(range(40), key=lambda i: -cosine[i])[:7]:
            votes[labels[i]] += math.exp(cosine[i] / 0.1)
        right += int(np.argmax(votes)) == label
    found = knn_accuracy(*(torch.from_numpy(x) for x in (train, labels, test, truth)), k=7, temperature=0.1)
    assert found == pytest.approx(right / 15)


def test_linear_probe_is_at_the_minimum() -> None:
    """The gradient of the objective, written out in numpy, vanishes, whatever shift and scale the features have."""
    rng = np.random.default_rng(1)
    features, labels = rng.normal(size=(60, 5)) * [1, 10, 0.1, 3, 1] + 4, rng.integers(0, 3, 60)
    weights, bias = (
        x.numpy()
        for x in fit_linear(
            torch.from_numpy(features), torch.from_numpy(labels), classes=3, l2=0.01, steps=300
        )
    )
    mean, spread = features.mean(0), features.std(0)
    scaled, own = (features - mean) / spread, weights * spread
    scores = features @ weights.T + bias
    shares = np.exp(scores - scores.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    gradient = (shares - np.eye(3)[labels]).T @ scaled / 60 + 0.01 * own
    assert np.abs(gradient).max() < 1e-5
    assert np.abs((shares - np.eye(3)[labels]).mean(0)).max() < 1e-5


def test_hard_negatives_are_other_clips_of_the_same_video() -> None:
    videos = torch.arange(6).repeat_interleave(3)  # three clips of each of six videos
    rows = torch.arange(len(videos))
    pairs = draw_pairs(videos=videos, rows=rows, negatives=2, same_video=2, seed=0, step=4)
    assert pairs.frames.shape == (18, 5)
    assert pairs.targets.sum(dim=1).tolist() == [1] * 18
    for i, (own, *negatives) in enumerate(pairs.frames.tolist()):
        assert own == i
        assert all(videos[n] != videos[i] for n in negatives[:2])
        assert all(videos[n] == videos[i] and n != i for n in negatives[2:])
        assert len(set(negatives)) == 4
    part = draw_pairs(videos=videos, rows=rows[6:9], negatives=2, same_video=2, seed=0, step=4)
    assert part.frames.tolist() == pairs.frames[6:9].tolist(), "the same on every rank"


def test_hard_negatives_need_several_clips_of_a_video() -> None:
    with pytest.raises(ConfigError, match="clips_per_sample") as caught:
        draw_pairs(videos=torch.arange(8), rows=torch.arange(8), negatives=1, same_video=1, seed=0, step=0)
    assert caught.value.key == "correspondence.same_video_negatives"
