"""MultiLSTM against its equations in loops, and its training on per-frame and per-clip labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models import InputSpec, ModelError, create_model
from cliplift.models.layers import PooledClassifier
from cliplift.models.per_frame.multi_lstm import MultiLSTM, combined_frames
from cliplift.pipelines.evaluation.metrics import mean_average_precision

D, HIDDEN, K, N, T = 4, 6, 3, 3, 5


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


def tiny(**options: object) -> MultiLSTM:
    torch.manual_seed(0)
    settings = {
        "num_classes": K,
        "in_frames": T,
        "window": N,
        "hidden": HIDDEN,
        "attention_dim": 5,
        "dropout": 0.0,
    }
    model = MultiLSTM(TinyEncoder(), **{**settings, **options})
    with torch.no_grad():
        for parameter in [*model.score.parameters(), *model.lstm.parameters()]:
            parameter.mul_(3)  # so that attention is far from flat
    return model.eval()


def clips() -> Tensor:
    return torch.randn(2, 1, T, 8, 8, generator=torch.Generator().manual_seed(3))


def torch_lstm(model: MultiLSTM) -> nn.LSTM:
    reference = nn.LSTM(D, HIDDEN, batch_first=True)
    with torch.no_grad():
        reference.weight_ih_l0.copy_(model.lstm.weight_x0)
        reference.weight_hh_l0.copy_(model.lstm.weight_h0)
        reference.bias_ih_l0.copy_(model.lstm.bias0)
        reference.bias_hh_l0.zero_()
    return reference


def by_hand(model: MultiLSTM, clip: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (T, K) of every frame and the attention (T, N) of one clip (1, T, H, W), equation by equation."""
    x = [model.encoder.conv(clip[None, :, t]).mean(dim=(2, 3))[0] for t in range(T)]
    h, c = torch.zeros(1, 1, HIDDEN), torch.zeros(1, 1, HIDDEN)
    lstm, attention, opinions = torch_lstm(model), torch.zeros(T, N), {}
    for i in range(T):
        window = range(max(0, i - N + 1), i + 1)
        e = torch.stack([_score(model, h[0, 0], x[t]) for t in window])
        a = e.exp() / e.exp().sum()
        out, (h, c) = lstm(sum(w * x[t] for w, t in zip(a, window, strict=True)).view(1, 1, D), (h, c))
        logits = (model.head.weight @ out[0, 0] + model.head.bias).view(N, K)
        for w, t in zip(a, window, strict=True):
            attention[i, i - t] = w
            opinions[i, t] = logits[i - t].sigmoid() if model.multi_label else logits[i - t].softmax(dim=0)
    y = []
    for t in range(T):
        steps = range(t, min(T, t + N))
        b = [1 - (i - t) / N if model.output_weights == "linear" else 1.0 for i in steps]
        y.append(sum(w / sum(b) * opinions[i, t] for w, i in zip(b, steps, strict=True)))
    return torch.stack(y), attention


def _score(model: MultiLSTM, h: Tensor, x: Tensor) -> Tensor:
    score = model.score
    if hasattr(score, "out"):
        return score.out.weight[0] @ ((score.query.weight @ h).tanh() * (score.keys.weight @ x).tanh())
    return (score.query.weight @ h) @ x * score.factor


@pytest.mark.parametrize("score", ["product", "dot", "scaled_dot"])
@pytest.mark.parametrize("output_weights", ["uniform", "linear"])
@pytest.mark.parametrize("multi_label", [True, False])
def test_against_the_equations(score: str, output_weights: str, multi_label: bool) -> None:
    model, x = tiny(score=score, output_weights=output_weights, multi_label=multi_label), clips()
    logits, weights = model.frame_logits(x), model.attention_weights(x)
    answer = logits.sigmoid() if multi_label else logits.softmax(dim=2)
    for b in range(2):
        y, attention = by_hand(model, x[b])
        assert torch.allclose(answer[b], y, atol=1e-5)
        assert torch.allclose(weights[b], attention, atol=1e-5)
    assert torch.allclose(weights.sum(dim=2), torch.ones(2, T), atol=1e-6)
    assert weights[:, 2:].amax() > 0.4, "flat attention would test nothing"
    clip = model(x)
    averaged = clip.sigmoid() if multi_label else clip.softmax(dim=1)
    assert torch.allclose(averaged, answer.mean(dim=1), atol=1e-5)


def test_the_lstm_of_the_paper() -> None:
    with torch.device("meta"):
        model = create_model("multi_lstm", encoder="caffenet")
        assert model.window_logits(model.forward_features(torch.empty(1, 3, 16, 227, 227))).shape == (
            1,
            16,
            15,
            65,
        )
    assert sum(p.numel() for p in model.lstm.parameters()) == 9_439_232


def test_a_window_of_one_is_a_plain_lstm() -> None:
    model, x = tiny(window=1), clips()
    vectors = torch.stack([model.encoder.conv(x[:, :, t]).mean(dim=(2, 3)) for t in range(T)], dim=1)
    outputs, _ = torch_lstm(model)(vectors)
    assert torch.allclose(model.frame_logits(x), outputs @ model.head.weight.T + model.head.bias, atol=1e-5)


def test_a_frame_is_judged_by_the_steps_that_saw_it_and_no_later_ones() -> None:
    model, x = tiny(), clips()
    other = x.clone()
    other[:, :, 4] = 3.0
    moved = (model.frame_logits(other) - model.frame_logits(x)).abs().amax(dim=(0, 2))
    assert (moved[:2] == 0).all()
    assert (moved[2:] > 1e-4).all()


@pytest.mark.parametrize("output_weights", ["uniform", "linear"])
def test_padding_does_not_count(output_weights: str) -> None:
    model, x, lengths = tiny(output_weights=output_weights), clips(), torch.tensor([5, 3])
    other = x.clone()
    other[1, :, 3:] = 9.0
    assert torch.allclose(model(other, lengths=lengths)[1:], model(x[1:, :, :3]), atol=1e-6)
    padded = model.frame_logits(other, lengths=lengths)
    assert torch.allclose(padded[1:, :3], model.frame_logits(x[1:, :, :3]), atol=1e-6)
    targets = torch.tensor([[1, 0, 1], [0, 1, 1]])
    loss = model.loss(other, targets, lengths=lengths)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    parts = 5 * model.loss(x[:1], targets[:1]) + 3 * model.loss(x[1:, :, :3], targets[1:])
    assert torch.allclose(loss, parts / 8, atol=1e-6)


def test_the_loss_is_bce_of_the_combined_probabilities() -> None:
    model, x = tiny(), clips()
    targets = torch.randint(0, 2, (2, T, K), generator=torch.Generator().manual_seed(1))
    y = torch.stack([by_hand(model, clip)[0] for clip in x])
    assert torch.allclose(model.loss(x, targets), F.binary_cross_entropy(y, targets.float()), atol=1e-5)
    of_clip = targets[:, 0]
    repeated = of_clip[:, None].expand(2, T, K)
    assert torch.equal(model.loss(x, of_clip), model.loss(x, repeated))


def test_certain_predictions_stay_finite() -> None:
    logits = torch.tensor([300.0, -300.0]).repeat(1, T, N, 1).requires_grad_(True)
    out = combined_frames(logits, torch.ones(1, T), output_weights="uniform", multi_label=True)
    assert out.isfinite().all()
    F.binary_cross_entropy_with_logits(out, torch.ones_like(out)).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def events(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips whose frames light up left, right, both or neither half; labels (B, T, 2) say which."""
    targets = (torch.rand(number, T, 2, generator=generator) < 0.4).float()
    x = 0.1 * torch.randn(number, 1, T, 8, 8, generator=generator)
    x[..., :4] += targets[:, None, :, 0, None, None]
    x[..., 4:] += 2 * targets[:, None, :, 1, None, None]
    return x, targets


def test_training_on_labels_of_frames_ranks_frames() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = MultiLSTM(TinyEncoder(), num_classes=2, in_frames=T, window=2, hidden=16, dropout=0.0)
    held_out, targets = events(100, generator)

    def precision() -> float:
        with torch.no_grad():
            scores = model.frame_logits(held_out).sigmoid().flatten(0, 1)
        return mean_average_precision(scores.numpy(), targets.flatten(0, 1).numpy())

    before = precision()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        x, y = events(16, generator)
        optimizer.zero_grad()
        model.loss(x, y).backward()
        optimizer.step()
    assert before < 0.7
    assert precision() > 0.9


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ModelError, match="window=0"):
        tiny(window=0)
    with pytest.raises(ModelError, match="score='cosine'"):
        tiny(score="cosine")
    with pytest.raises(ModelError, match="output_weights='square'"):
        tiny(output_weights="square")
    with pytest.raises(ModelError, match=r"labels must be \(2, 3\) or \(2, 5, 3\)"):
        tiny().loss(clips(), torch.zeros(2, dtype=torch.int64))
