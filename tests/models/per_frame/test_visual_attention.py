"""Attention: dot products against PyTorch's own, and visual attention against a loop over frames and places."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models import InputSpec, ModelError, create_model
from cliplift.models.layers import PooledClassifier
from cliplift.models.per_frame.attention import AdditiveScore, DotScore, ProductScore, dot_product_attention
from cliplift.models.per_frame.attention_lstm import AttentionLSTM
from cliplift.models.per_frame.visual_attention import VisualAttention, doubly_stochastic
from cliplift.pipelines.evaluation.grad_cam import grad_cam

D, GRID, HIDDEN, K = 4, 2, 6, 3
SCORES = ["location", "additive", "dot"]


class TinyEncoder(PooledClassifier):
    """One strided convolution: (B, 1, 8, 8) -> (B, 4, 2, 2)."""

    input_dims = 4

    def __init__(self) -> None:
        super().__init__(
            feature_dim=D, num_classes=0, input_spec=InputSpec(channels=1, mean=(0.0,), std=(1.0,))
        )
        self.conv = nn.Conv2d(1, D, 4, stride=4)
        self.reset_classifier(0)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def checkpoint_blocks(self) -> list[str]:
        return ["conv"]


def tiny(score: str = "location", **options: object) -> VisualAttention:
    torch.manual_seed(0)
    settings = {"num_classes": K, "in_frames": 4, "grid": GRID, "hidden": HIDDEN, "layers": 2, "head_dim": 5}
    # init="torch": with the small weights of the default the maps would be all but flat
    model = VisualAttention(TinyEncoder(), score=score, **{**settings, "init": "torch", **options})
    with torch.no_grad():
        for parameter in model.score.parameters():
            parameter.mul_(4)
    return model.eval()


def clips(frames: int = 4) -> Tensor:
    return torch.randn(2, 1, frames, 8, 8, generator=torch.Generator().manual_seed(3))


# --- dot-product attention --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_dot_product_attention_is_pytorchs(scaled: bool, masked: bool) -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 7)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]]) if masked else None
    out, weights = dot_product_attention(query, keys, values, scaled=scaled, mask=mask)
    reference = F.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=None if mask is None else mask[:, None, :],
        scale=1 / math.sqrt(8) if scaled else 1.0,
    )
    assert torch.allclose(out, reference, atol=1e-5)
    assert torch.allclose(weights.sum(dim=2), torch.ones(2, 3), atol=1e-6)
    if masked:
        assert not weights[1, :, [2, 4]].any()


def test_a_query_without_keys_answers_zero() -> None:
    query = torch.randn(1, 1, 4, requires_grad=True)
    out, _ = dot_product_attention(query, torch.randn(1, 3, 4), mask=torch.zeros(1, 3, dtype=torch.bool))
    assert not out.any()
    out.sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()


def test_widths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="do not fit"):
        dot_product_attention(torch.zeros(1, 1, 4), torch.zeros(1, 3, 5))


def test_scores_against_loops() -> None:
    torch.manual_seed(0)
    query, keys = torch.randn(2, 3), torch.randn(2, 5, 4)
    additive, product, dot = AdditiveScore(3, 4, 6), ProductScore(3, 4, 6), DotScore(3, 4, scaled=True)
    for b in range(2):
        for n in range(5):
            h, x = query[b], keys[b, n]
            e = additive.keys.weight @ x + additive.keys.bias + additive.query.weight @ h
            wanted = additive.out.weight[0] @ e.tanh() + additive.out.bias[0]
            assert torch.allclose(additive(query, additive.project(keys))[b, n], wanted, atol=1e-6)
            e = (product.query.weight @ h).tanh() * (product.keys.weight @ x).tanh()
            wanted = product.out.weight[0] @ e
            assert torch.allclose(product(query, product.project(keys))[b, n], wanted, atol=1e-6)
            wanted = (dot.query.weight @ h) @ x / 2
            assert torch.allclose(dot(query, dot.project(keys))[b, n], wanted, atol=1e-6)


# --- attention over encoder states ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
def test_the_last_state_asks_all_states(scaled: bool) -> None:
    torch.manual_seed(0)
    model = AttentionLSTM(TinyEncoder(), num_classes=K, in_frames=4, hidden=HIDDEN, scaled=scaled).eval()
    x = clips()
    states, _ = model.lstm(
        torch.stack([model.encoder.conv(x[:, :, t]).mean(dim=(2, 3)) for t in range(4)], dim=1)
    )
    scores = torch.einsum("bd,btd->bt", states[:, -1], states) / (math.sqrt(HIDDEN) if scaled else 1)
    weights = scores.softmax(dim=1)
    both = torch.cat([states[:, -1], torch.einsum("bt,btd->bd", weights, states)], dim=1)
    assert torch.allclose(model(x), both @ model.head.weight.T + model.head.bias, atol=1e-5)
    assert torch.allclose(model.attention_weights(x), weights, atol=1e-6)


def test_padded_states_are_not_asked() -> None:
    torch.manual_seed(0)
    model = AttentionLSTM(TinyEncoder(), num_classes=K, in_frames=4, hidden=HIDDEN).eval()
    x, lengths = clips(), torch.tensor([4, 2])
    assert torch.allclose(model(x, lengths=lengths)[1:], model(x[1:, :, :2]), atol=1e-6)
    assert not model.attention_weights(x, lengths=lengths)[1, 2:].any()


# --- visual attention -------------------------------------------------------------------------------------------------


def test_counts_of_the_paper() -> None:
    with torch.device("meta"):
        encoder = TinyEncoder()
        encoder.feature_dim = 1024
        model = VisualAttention(encoder, num_classes=11, in_frames=30)
    assert sum(p.numel() for p in model.lstm.parameters()) == 7_346_176
    assert sum(p.numel() for p in model.score.parameters()) == 25_088


def by_hand(model: VisualAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, T, K) and attention (B, T, N), clip after clip, frame after frame, place after place."""
    reference = nn.LSTM(D, HIDDEN, 2, batch_first=True)
    with torch.no_grad():
        for layer in range(2):
            weight_x, weight_h, bias = model.lstm.layer_weights(layer)
            getattr(reference, f"weight_ih_l{layer}").copy_(weight_x)
            getattr(reference, f"weight_hh_l{layer}").copy_(weight_h)
            getattr(reference, f"bias_ih_l{layer}").copy_(bias)
            getattr(reference, f"bias_hh_l{layer}").zero_()
    logits, attention = [], []
    for clip in x:
        maps = [model.encoder.conv(clip[None, :, t])[0] for t in range(clip.shape[1])]  # (D, 2, 2) each
        places = [[m[:, i // GRID, i % GRID] for i in range(GRID * GRID)] for m in maps]
        mean = torch.stack([v for frame in places for v in frame]).mean(dim=0)
        h = (model.initial.hidden.weight @ mean + model.initial.hidden.bias).tanh().view(2, 1, HIDDEN)
        c = (model.initial.cell.weight @ mean + model.initial.cell.bias).tanh().view(2, 1, HIDDEN)
        for frame in places:
            top = h[-1, 0]
            weights = torch.stack([_score(model, top, v, i) for i, v in enumerate(frame)]).softmax(dim=0)
            seen = sum(w * v for w, v in zip(weights, frame, strict=True))
            out, (h, c) = reference(seen.view(1, 1, D), (h, c))
            inner = (model.before_head[0].weight @ out[0, 0] + model.before_head[0].bias).tanh()
            logits.append(model.head.weight @ inner + model.head.bias)
            attention.append(weights)
    B, T = x.shape[0], x.shape[2]
    return torch.stack(logits).view(B, T, K), torch.stack(attention).view(B, T, GRID * GRID)


def _score(model: VisualAttention, h: Tensor, x: Tensor, place: int) -> Tensor:
    score = model.score
    if isinstance(score, AdditiveScore):
        inner = (score.keys.weight @ x + score.keys.bias + score.query.weight @ h).tanh()
        return score.out.weight[0] @ inner + score.out.bias[0]
    if isinstance(score, DotScore):
        return (score.query.weight @ h) @ x
    return score.weight[place] @ h


@pytest.mark.parametrize("score", SCORES)
def test_against_a_loop(score: str) -> None:
    model, x = tiny(score, penalty=0.5), clips()
    logits, attention = by_hand(model, x)
    maps = model.attention_maps(x)
    assert maps.shape == (2, 4, GRID, GRID)
    assert torch.allclose(maps.flatten(2), attention, atol=1e-5)
    assert (attention.amax(dim=2) > 0.3).any(), "flat maps would test nothing"
    assert torch.allclose(model(x).softmax(dim=1), logits.softmax(dim=2).mean(dim=1), atol=1e-5)
    labels = torch.tensor([2, 0])
    loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(4))
    for clip in attention:
        for place in range(GRID * GRID):
            loss = loss + 0.5 / 2 * (1 - clip[:, place].sum()) ** 2
    assert torch.allclose(model.loss(x, labels), loss, atol=1e-5)


@pytest.mark.parametrize("score", SCORES)
def test_maps_sum_to_one_and_follow_the_temperature(score: str) -> None:
    model, x = tiny(score), clips()
    maps = model.attention_maps(x)
    assert torch.allclose(maps.sum(dim=(2, 3)), torch.ones(2, 4), atol=1e-6)
    flat = tiny(score, inverse_temperature=0.0).attention_maps(x)
    assert torch.allclose(flat, torch.full_like(flat, 1 / GRID**2))


def test_only_location_attention_is_blind_to_the_frame_it_looks_at() -> None:
    """Mirroring the last map keeps the mean, and so every state before it."""
    for score in SCORES:
        model = tiny(score)
        maps = model.forward_features(clips())
        moved = maps.clone()
        moved[:, :, 3] = maps[:, :, 3].flip(-1)
        difference = (model.look(moved)[1] - model.look(maps)[1])[:, 3].abs().max()
        assert (difference > 1e-4) == (score != "location"), score


def test_the_penalty_by_hand() -> None:
    attention = torch.tensor([[[1.0, 0, 0], [0, 1, 0]], [[0.5, 0.5, 0], [0, 0, 1]]])
    # looked at: (1, 1, 0) -> 1; (0.5, 0.5, 1) -> 0.5
    assert doubly_stochastic(attention, torch.ones(2, 2)) == pytest.approx(0.75)
    # the second frame of the second clip is padding: (0.5, 0.5, 0) -> 1.5
    assert doubly_stochastic(attention, torch.tensor([[1.0, 1], [1, 0]])) == pytest.approx(1.25)


def test_padding_does_not_count() -> None:
    model, x, lengths = tiny("additive", penalty=1.0), clips(), torch.tensor([4, 2])
    other = x.clone()
    other[1, :, 2:] = 9.0
    answer = model(other, lengths=lengths)
    assert torch.allclose(answer[1:], model(x[1:, :, :2]), atol=1e-6)
    assert torch.allclose(answer[:1], model(x[:1]), atol=1e-6)
    labels = torch.tensor([2, 0])
    assert torch.allclose(
        model.loss(other, labels, lengths=lengths), model.loss(x, labels, lengths=lengths), atol=1e-6
    )


def test_the_last_frames_alone_can_decide() -> None:
    model, x = tiny(last_frames=1), clips()
    logits, _ = by_hand(model, x)
    assert torch.allclose(model(x).softmax(dim=1), logits[:, -1].softmax(dim=1), atol=1e-5)


def test_grad_cam_reads_the_same_grid() -> None:
    explanation = grad_cam(tiny("dot"), clips())
    assert explanation.coarse.shape == (2, 4, GRID, GRID)


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ModelError, match="weights for 9 places, the map has 4"):
        tiny(grid=3)(clips())
    with pytest.raises(ModelError, match="score='hard'"):
        create_model("visual_attention", score="hard")
    with pytest.raises(ModelError, match="penalty=-1"):
        tiny(penalty=-1.0)


@pytest.mark.parametrize("score", SCORES)
def test_bfloat16_weights_give_the_same_answer_to_their_precision(score: str) -> None:
    model, x, lengths = tiny(score), clips(), torch.tensor([4, 2])
    exact = model(x, lengths=lengths).softmax(dim=1)
    rounded = model.bfloat16()(x.bfloat16(), lengths=lengths).softmax(dim=1)
    assert (rounded - exact).abs().max() < 0.03  # 8 bits of mantissa through four steps of two layers
