"""Beyond Short Snippets: the five poolings against loops over windows, the gains, and network expansion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models import InputSpec, ModelError, create_model
from cliplift.models.factory import load_pretrained
from cliplift.models.layers import PooledClassifier
from cliplift.models.per_frame.snippets import (
    PooledFrames,
    SnippetsLSTM,
    combined,
    expanded,
    step_gains,
    windows,
)

D, GRID, WIDTH, K = 4, 2, 5, 3


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


def pooled(pooling: str, *, in_frames: int = 12, grid: int = GRID) -> PooledFrames:
    torch.manual_seed(0)
    options = {"num_classes": K, "in_frames": in_frames, "grid": grid, "width": WIDTH, "dropout": 0.0}
    return PooledFrames(TinyEncoder(), pooling=pooling, **options).eval()


def clips(frames: int = 12) -> Tensor:
    return torch.randn(2, 1, frames, 8, 8, generator=torch.Generator().manual_seed(3))


def fc(layer: nn.Sequential, x: Tensor) -> Tensor:
    return F.relu(F.linear(x, layer[0].weight, layer[0].bias))


def frame_maps(model: PooledFrames, x: Tensor) -> list[Tensor]:
    return [model.encoder.conv(x[:, :, t]) for t in range(x.shape[2])]


def highest(tensors: list[Tensor]) -> Tensor:
    out = tensors[0]
    for tensor in tensors[1:]:
        out = torch.maximum(out, tensor)
    return out


def by_hand(model: PooledFrames, x: Tensor) -> Tensor:
    """The definitions of the module's docstring, one frame and one window after the other."""
    maps = frame_maps(model, x)
    T = len(maps)
    if model.pooling == "conv":
        last = fc(model.fc2, fc(model.fc1, highest(maps).flatten(1)))
    elif model.pooling == "late":
        last = highest([fc(model.fc2, fc(model.fc1, m.flatten(1))) for m in maps])
    elif model.pooling == "time_convolution":
        kernel, bias = model.time_convolution.weight, model.time_convolution.bias
        answers = []
        for start in range(0, T - 9, 5):
            total = sum(F.conv2d(maps[start + k], kernel[:, :, k], padding=1) for k in range(10))
            answers.append(F.relu(total + bias[None, :, None, None]))
        last = fc(model.fc1, highest(answers).flatten(1))
    else:
        parts = [highest(maps[a : min(a + 10, T)]).flatten(1) for a in (0, 5, 10, 15) if a == 0 or a < T - 5]
        if model.pooling == "slow":
            last = fc(model.fc2, highest([fc(model.fc1, p) for p in parts]))
        else:
            last = torch.cat([fc(model.fc2, fc(model.fc1, p)) for p in parts], dim=1)
    return last @ model.head.weight.T + model.head.bias


POOLINGS = ["conv", "late", "slow", "local", "time_convolution"]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("frames", [10, 12, 17])
def test_poolings_against_loops(pooling: str, frames: int) -> None:
    model, x = pooled(pooling, in_frames=frames), clips(frames)
    answer = model(x)
    assert torch.allclose(answer, by_hand(model, x), atol=1e-5)
    assert (answer[0] - answer[1]).abs().max() > 1e-4


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_does_not_count(pooling: str) -> None:
    """17 frames of which 11 are real: all that follow, and the window of padding alone, change nothing."""
    model, x = pooled(pooling, in_frames=17), clips(17)
    lengths = torch.tensor([17, 5])
    other = x.clone()
    other[1, :, 5:] = 9.0
    answer = model(x, lengths=lengths)
    assert torch.equal(answer, model(other, lengths=lengths))
    assert (answer[1] - model(other)[1]).abs().max() > 1e-3, "without lengths the padding should have counted"
    assert torch.allclose(answer[:1], model(x[:1]), atol=1e-6)
    if pooling in ("conv", "late", "slow"):
        assert torch.allclose(answer[1:], model(x[1:, :, :5]), atol=1e-6)


def test_windows_cover_every_frame() -> None:
    assert windows(1) == [(0, 1)]
    assert windows(10) == [(0, 10)]
    assert windows(11) == [(0, 10), (5, 11)]
    assert windows(15) == [(0, 10), (5, 15)]
    assert windows(30) == [(0, 10), (5, 15), (10, 20), (15, 25), (20, 30)]
    assert len(windows(120)) == 23
    for frames in range(1, 60):
        spans = [set(range(a, b)) for a, b in windows(frames)]
        assert set().union(*spans) == set(range(frames))
        assert not any(a <= b for i, a in enumerate(spans) for j, b in enumerate(spans) if i != j)


def test_order_within_a_window_cannot_matter_but_for_the_convolution() -> None:
    x = clips(10)
    for pooling in POOLINGS:
        model = pooled(pooling, in_frames=10)
        difference = (model(x) - model(x.flip(2))).abs().max()
        assert (difference > 1e-3) == (pooling == "time_convolution"), pooling


def test_clips_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match=r"built for 2 windows \(in_frames=12\), the clip has 3"):
        pooled("local", in_frames=12)(clips(17))
    with pytest.raises(ModelError, match="spans 10 frames, the clip has 9"):
        pooled("time_convolution")(clips(9))


def test_an_encoder_with_layers_behind_its_map_is_refused() -> None:
    with torch.device("meta"), pytest.raises(ModelError, match="last map of 256 channels"):
        PooledFrames(create_model("caffenet", num_classes=0), pooling="conv", num_classes=K, in_frames=2)


def test_a_grid_of_one_averages_over_space() -> None:
    model, x = pooled("conv", grid=1), clips()
    mean = highest(frame_maps(model, x)).mean(dim=(2, 3))
    assert torch.allclose(
        model.clip_features(model.forward_features(x)), fc(model.fc2, fc(model.fc1, mean)), atol=1e-5
    )


def test_the_published_convolution_pooling_has_alexnets_layers() -> None:
    """CaffeNet's own FC layers are replaced by the pooled ones, of the same size: the count is CaffeNet's."""
    with torch.device("meta"):
        model = create_model("snippets_conv_pooling", encoder="caffenet", num_classes=1000)
        assert model(torch.empty(1, 3, 4, 227, 227)).shape == (1, 1000)
    assert sum(p.numel() for p in model.parameters()) == 60_965_224


# --- expansion: single frame -> 30 -> 120 -----------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["conv", "late", "slow", "local"])
def test_a_longer_network_repeats_a_still_clip(pooling: str, tmp_path: Path) -> None:
    """Trained on single frames, expanded to 30 and then 120: a clip of equal frames keeps its logits."""
    x = clips(1)
    short = pooled(pooling, in_frames=1)
    for frames in (30, 120):
        save_file(short.state_dict(), tmp_path / f"{frames}.safetensors")
        torch.manual_seed(frames)
        long = PooledFrames(
            TinyEncoder(),
            pooling=pooling,
            num_classes=K,
            in_frames=frames,
            grid=GRID,
            width=WIDTH,
            dropout=0.0,
        ).eval()
        still = x[:, :, :1].expand(-1, -1, frames, -1, -1)
        assert (long(still) - short(x)).abs().max() > 1e-3
        report = load_pretrained(long, tmp_path / f"{frames}.safetensors")
        assert not report.head_fresh
        assert torch.allclose(long(still), short(x), atol=1e-5)
        short, x = long, still


@pytest.mark.parametrize(("before", "after"), [(1, 5), (5, 23), (2, 3), (23, 5), (5, 1), (3, 2)])
def test_expanded_heads_use_every_weight(before: int, after: int) -> None:
    weight = torch.randn(K, before * WIDTH, generator=torch.Generator().manual_seed(0))
    out = expanded(weight, windows_before=before, windows_after=after).view(K, after, WIDTH)
    assert torch.allclose(out.sum(dim=1), weight.view(K, before, WIDTH).sum(dim=1), atol=1e-5)


def test_the_lstm_takes_the_pooling_networks_encoder(tmp_path: Path) -> None:
    source = pooled("conv")
    save_file(source.state_dict(), tmp_path / "conv.safetensors")
    torch.manual_seed(9)
    model = SnippetsLSTM(TinyEncoder(), num_classes=K, in_frames=4, hidden=6, layers=2)
    report = load_pretrained(model, tmp_path / "conv.safetensors")
    assert torch.equal(model.encoder.conv.weight, source.encoder.conv.weight)
    assert any("fc1.0.weight" in note for note in report.notes), "what was left out is said"


# --- the LSTM ---------------------------------------------------------------------------------------------------------


def test_the_lstm_of_the_paper() -> None:
    with torch.device("meta"):
        model = create_model("snippets_lstm", encoder="caffenet")
        assert model.step_logits(torch.empty(1, 3, 3, 227, 227)).shape == (1, 3, 487)
        peephole = create_model("snippets_lstm", encoder="caffenet", peephole="diagonal")
    assert sum(p.numel() for p in model.lstm.parameters()) == 17_836_032
    assert sum(p.numel() for p in model.head.parameters()) == 249_831
    assert sum(p.numel() for p in peephole.lstm.parameters()) == 17_836_032 + 5 * 3 * 512


def test_gains_rise_linearly_to_the_last_real_frame() -> None:
    steps = torch.zeros(2, 4, 1)
    lengths = torch.tensor([4, 2])
    linear = [[0.25, 0.5, 0.75, 1.0], [0.5, 1.0, 0.0, 0.0]]
    assert step_gains(steps, lengths, "linear").tolist() == linear
    assert step_gains(steps, lengths, "uniform").tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert step_gains(steps, lengths, "last").tolist() == [[0, 0, 0, 1], [0, 1, 0, 0]]


@pytest.mark.parametrize("gain", ["linear", "uniform", "last"])
def test_the_loss_and_its_gradient_are_multiplied_by_the_gain(gain: str) -> None:
    torch.manual_seed(0)
    model = SnippetsLSTM(TinyEncoder(), num_classes=K, in_frames=4, hidden=6, layers=2, gain=gain)
    x, labels = clips(4), torch.tensor([2, 0])
    logits = model.step_logits(x).detach()
    factor = {"linear": [0.25, 0.5, 0.75, 1.0], "uniform": [1.0] * 4, "last": [0.0, 0.0, 0.0, 1.0]}[gain]
    total, gradient = torch.zeros(()), torch.zeros(K)
    for b in range(2):
        for t in range(4):
            total -= factor[t] * logits[b, t].log_softmax(dim=0)[labels[b]] / 8
            gradient += factor[t] * (logits[b, t].softmax(dim=0) - F.one_hot(labels[b], K)) / 8
    loss = model.loss(x, labels)
    loss.backward()
    assert torch.allclose(loss, total, atol=1e-6)
    assert torch.allclose(model.head.bias.grad, gradient, atol=1e-6)


def test_four_ways_to_combine() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, K)
    p = logits.softmax(dim=2)
    gain = torch.tensor([0.25, 0.5, 0.75, 1.0])
    wanted = {
        "last": p[:, 3],
        "sum": p.sum(dim=1) / 4,
        "weighted_sum": torch.einsum("t,btk->bk", gain, p) / gain.sum(),
        "max": p.amax(dim=1) / p.amax(dim=1).sum(dim=1, keepdim=True),
    }
    for combine, probabilities in wanted.items():
        answer = combined(logits, None, combine, multi_label=False)  # type: ignore[arg-type]
        assert torch.allclose(answer.softmax(dim=1), probabilities, atol=1e-6), combine
    q = logits.sigmoid()
    assert torch.allclose(combined(logits, None, "max", multi_label=True).sigmoid(), q.amax(dim=1), atol=1e-6)


@pytest.mark.parametrize("combine", ["last", "max", "sum", "weighted_sum"])
@pytest.mark.parametrize("peephole", ["none", "diagonal"])
def test_the_lstm_ignores_padding(combine: str, peephole: str) -> None:
    torch.manual_seed(0)
    options = {"hidden": 6, "layers": 2, "combine": combine, "peephole": peephole}
    model = SnippetsLSTM(TinyEncoder(), num_classes=K, in_frames=4, **options).eval()
    x, lengths = clips(4), torch.tensor([4, 2])
    other = x.clone()
    other[1, :, 2:] = 9.0
    answer = model(other, lengths=lengths)
    assert torch.allclose(answer[1:], model(x[1:, :, :2]), atol=1e-6)
    assert torch.allclose(answer[:1], model(x[:1]), atol=1e-6)
    assert (answer[1:] - model(other[1:])).abs().max() > 1e-4


def test_impossible_options_are_refused() -> None:
    for option in ({"gain": "square"}, {"combine": "median"}, {"peephole": "half"}):
        with pytest.raises(ModelError, match=next(iter(option.values()))):
            SnippetsLSTM(TinyEncoder(), num_classes=K, in_frames=4, **option)
