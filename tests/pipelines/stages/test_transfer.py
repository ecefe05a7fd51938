"""Supervision transfer: how pairs are drawn, what the loss is, how matching is measured."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cliplift.configs.sections import ConfigError
from cliplift.configs.supervision import CorrespondenceConfig
from cliplift.models.correspondence import CorrespondenceHead
from cliplift.pipelines.data.augment import recrop
from cliplift.pipelines.stages.matching import (
    SupervisionTransfer,
    draw_pairs,
    matching_metrics,
)


@settings(max_examples=60)
@given(
    videos=st.lists(st.integers(0, 5), min_size=4, max_size=24).filter(lambda v: len(set(v)) > 1),
    seed=st.integers(0, 1000),
    step=st.integers(0, 10_000),
)
def test_a_negative_is_never_of_the_same_video(videos: list[int], seed: int, step: int) -> None:
    v = torch.tensor(videos)
    available = min(sum(other != own for other in videos) for own in videos)
    k = min(3, available)
    pairs = draw_pairs(videos=v, rows=torch.arange(len(v)), negatives=k, seed=seed, step=step)
    assert torch.equal(pairs.frames[:, 0], torch.arange(len(v)))
    assert (v[pairs.frames[:, 1:]] != v[:, None]).all()
    assert all(len(set(row)) == k + 1 for row in pairs.frames.tolist())
    assert pairs.targets.sum(dim=1).tolist() == [1] * len(v)


@pytest.mark.parametrize("ranks", [2, 4])
def test_pairs_do_not_depend_on_the_number_of_ranks(ranks: int) -> None:
    videos = torch.arange(16) // 2
    whole = draw_pairs(videos=videos, rows=torch.arange(16), negatives=3, seed=1, step=5).frames
    per_rank = 16 // ranks
    parts = [
        draw_pairs(
            videos=videos, rows=torch.arange(per_rank) + r * per_rank, negatives=3, seed=1, step=5
        ).frames
        for r in range(ranks)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_negatives_change_with_the_step() -> None:
    videos = torch.arange(32)
    rows = torch.arange(32)
    first, second = (draw_pairs(videos=videos, rows=rows, negatives=1, seed=0, step=s).frames for s in (0, 1))
    assert not torch.equal(first, second)


def test_a_batch_of_one_video_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="global_batch") as caught:
        draw_pairs(
            videos=torch.zeros(8, dtype=torch.int64), rows=torch.arange(8), negatives=1, seed=0, step=0
        )
    assert caught.value.key == "correspondence.negatives_per_clip"


class Echo(nn.Module):
    """A student that returns its input's first D numbers, so that the loss can be computed by hand."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return clips.flatten(1)


def transfer_module(objective: str = "binary", **options: float) -> SupervisionTransfer:
    torch.manual_seed(0)
    config = CorrespondenceConfig.model_validate(
        {"feature_dim": 8, "hidden": (16, 8), "objective": objective, **options}
    )
    head = CorrespondenceHead(8, 8, embed_dim=8, hidden=config.hidden)
    return SupervisionTransfer(Echo(), head, config)


def batch(k: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    videos = torch.arange(6)
    pairs = draw_pairs(videos=videos, rows=torch.arange(6), negatives=k, seed=0, step=0)
    return {
        "clips": torch.randn(6, 8, 1, 1, 1, generator=generator),
        "frame_features": torch.randn(6, 8, generator=generator),
        "pairs": pairs.frames,
        "targets": pairs.targets,
        "clip_videos": videos,
        "frame_videos": videos,
    }


@pytest.mark.parametrize("k", [1, 3])
def test_positives_and_negatives_count_the_same(k: int) -> None:
    """The loss is the mean of the mean positive and the mean negative cross-entropy, written out by hand."""
    module, inputs = transfer_module(), batch(k)
    loss = module(inputs)["loss"].item()
    positive, negative = [], []
    for i, row in enumerate(inputs["pairs"].tolist()):
        for column, frame in enumerate(row):
            logits = module.head(
                inputs["clips"][i : i + 1].flatten(1), inputs["frame_features"][frame : frame + 1]
            )[0]
            a, b = logits.tolist()
            norm = math.log(math.exp(a) + math.exp(b))
            (positive if column == 0 else negative).append(norm - (b if column == 0 else a))
    by_hand = (sum(positive) / len(positive) + sum(negative) / len(negative)) / 2
    assert loss == pytest.approx(by_hand, abs=1e-6)


def test_infonce_by_hand_and_same_video_frames_are_no_negatives() -> None:
    module, inputs = transfer_module("infonce", temperature=0.5), batch(1)
    inputs["clip_videos"] = inputs["frame_videos"] = torch.tensor([0, 0, 1, 2, 3, 4])
    loss = module(inputs)["loss"].item()
    clips = torch.nn.functional.normalize(module.head.student_projection(inputs["clips"].flatten(1)), dim=1)
    frames = torch.nn.functional.normalize(module.head.teacher_projection(inputs["frame_features"]), dim=1)
    scores = (clips @ frames.T / 0.5).tolist()
    videos = inputs["clip_videos"].tolist()
    losses = []
    for i in range(6):
        kept = [math.exp(scores[i][j]) for j in range(6) if j == i or videos[j] != videos[i]]
        losses.append(math.log(sum(kept)) - scores[i][i])
    assert loss == pytest.approx(sum(losses) / 6, abs=1e-5)


class Oracle(nn.Module):
    """A head that knows the answer: frames and clips carry their identity in the first feature."""

    def score_matrix(self, clips: torch.Tensor, frames: torch.Tensor, *, chunk: int) -> torch.Tensor:
        same = (clips[:, None, 0] - frames[None, :, 0]).abs() < 0.5
        return 2.0 * same.float() - 1.0


def test_matching_metrics_at_both_ends() -> None:
    identity = torch.arange(40, dtype=torch.float32)[:, None].repeat(1, 8)
    module = transfer_module()
    module.head = Oracle()  # type: ignore[assignment]
    perfect = matching_metrics(module.scores(identity, identity), videos=torch.arange(40), seed=0)
    assert perfect["matching_accuracy"] == 1.0
    assert perfect["auc"] == 1.0
    assert perfect["recall_at_1"] == 1.0
    assert perfect["above_chance_sigmas"] == pytest.approx(math.sqrt(80))
    shifted = matching_metrics(module.scores(identity, identity + 100), videos=torch.arange(40), seed=0)
    assert shifted["matching_accuracy"] == 0.5
    assert shifted["matching_prior"] == 0.5


class Zero(nn.Module):
    """A head that cannot tell: every score is 0."""

    def score_matrix(self, clips: torch.Tensor, frames: torch.Tensor, *, chunk: int) -> torch.Tensor:
        return torch.zeros(len(clips), len(frames))


def test_a_score_of_zero_says_that_a_frame_does_not_belong() -> None:
    """Right for every negative, wrong for every positive; all ranks are ties, so recall is k of the 20 clips."""
    module = transfer_module()
    module.head = Zero()  # type: ignore[assignment]
    x = torch.zeros(20, 8)
    found = matching_metrics(module.scores(x, x), videos=torch.arange(20), seed=0)
    assert found == {
        "matching_accuracy": 0.5, "matching_prior": 0.5, "above_chance_sigmas": 0.0, "auc": 0.5,
        "recall_at_1": pytest.approx(1 / 20), "recall_at_5": pytest.approx(5 / 20), "held_out_clips": 20.0,
    }  # fmt: skip


def cosines(module: SupervisionTransfer, clips: torch.Tensor, frames: torch.Tensor) -> list[list[float]]:
    """Cosine of every clip's and every frame's embedding, one pair at a time."""
    left, right = (
        module.head.student_projection(clips).tolist(),
        module.head.teacher_projection(frames).tolist(),
    )

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    return [[cosine(a, b) for b in right] for a in left]


def test_contrastive_scores_are_cosines_around_their_mean() -> None:
    module = transfer_module("infonce")
    generator = torch.Generator().manual_seed(5)
    clips, frames = torch.randn(3, 8, generator=generator), torch.randn(4, 8, generator=generator)
    expected = torch.tensor(cosines(module, clips, frames))
    torch.testing.assert_close(
        module.scores(clips, frames), expected - expected.sum() / 12, rtol=0, atol=1e-6
    )


def test_contrastive_accuracy_is_the_share_of_clips_nearest_to_their_own_frames() -> None:
    module, inputs = transfer_module("infonce", temperature=0.5), batch(1)
    table = cosines(module, inputs["clips"].flatten(1), inputs["frame_features"])
    right = sum(max(range(6), key=lambda j, i=i: table[i][j]) == i for i in range(6))
    assert 0 < right < 6, "the seed must give both"
    assert module(inputs)["matching_accuracy"].item() == pytest.approx(right / 6)


def test_binary_accuracy_is_the_share_of_pairs_told_right() -> None:
    module, inputs = transfer_module(), batch(3)
    logits = module.head.pair_logits(inputs["clips"].flatten(1), inputs["frame_features"], inputs["pairs"])
    right = [
        (pair[1] > pair[0]) == (column == 0) for row in logits.tolist() for column, pair in enumerate(row)
    ]
    accuracy = module(inputs)["matching_accuracy"]
    assert accuracy.item() == pytest.approx(sum(right) / 24)
    assert not accuracy.requires_grad


def test_an_untrained_head_is_at_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    clips, frames = torch.randn(400, 8, generator=generator), torch.randn(400, 8, generator=generator)
    scores = transfer_module().scores(clips, frames)
    metrics = matching_metrics(scores, videos=torch.arange(400), seed=0)
    assert abs(metrics["above_chance_sigmas"]) < 4
    assert metrics["recall_at_5"] < 0.06


def test_recropping_cuts_boxes_inside_the_frame() -> None:
    """A horizontal ramp stays a ramp of smaller range, the same in every frame of a clip."""
    ramp = torch.linspace(0, 1, 32).expand(3, 3, 4, 32, 32).contiguous()
    out = recrop(ramp, torch.tensor([[0.0, 0.5, 0.0], [0.3, 0.9, 0.5], [0.999, 0.2, 0.9]]), smallest=0.7)
    assert out.shape == ramp.shape
    assert (out[:, :, 1:] == out[:, :, :1]).all()
    spans = out[:, 0, 0, 0].amax(dim=1) - out[:, 0, 0, 0].amin(dim=1)
    assert ((spans > 0.6) & (spans < 1.0)).all()
    assert torch.unique((spans * 1000).round()).numel() == 3
