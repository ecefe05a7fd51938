"""The encoder-forecaster and the classifiers on recurrent nets: published counts, wiring, and that they learn.

Moving digits are made here: two seven-segment digits of random size and speed that bounce off the walls, as
Moving-MNIST has them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cliplift.models import create_model
from cliplift.models.convrnn.conv_lstm import ConvLSTMLayer
from cliplift.models.convrnn.forecaster import forecast_error, from_patches, to_patches
from cliplift.models.factory import load_pretrained, save_pretrained
from cliplift.models.protocol import ModelError

# arXiv 1506.04214, Table 1
PUBLISHED = {
    "fclstm": 142_667_776,
    "convlstm_5x5_256": 13_524_496,
    "convlstm_5x5_128_128": 10_042_896,
    "convlstm_5x5_128_64_64": 7_585_296,
    "convlstm_1x1_128_128": 11_550_224,
    "convlstm_1x1_128_64_64": 8_830_480,
}


def small(**options: Any) -> Any:
    torch.manual_seed(0)
    return create_model("convlstm", **{"hidden": (6, 4), "num_classes": 0, "side": 16, **options})


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_published_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=0, forecaster=True)
        assert sum(p.numel() for p in model.parameters()) == parameters
        frames = model.forecast(torch.empty(2, 1, 10, 64, 64), 10)  # type: ignore[operator]
        assert frames.shape == (2, 1, 10, 64, 64)


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 19_353_600),
        ({"stacked": True}, 19_353_600 + 2_179_072),
        ({"bidirectional": True}, 2 * 19_353_600),
    ],
)
def test_gru_rcn_counts_and_shapes(options: dict[str, bool], parameters: int) -> None:
    with torch.device("meta"):
        model: Any = create_model("gru_rcn", **options)
        # the paper counts the GRUs, without image network and classifiers
        assert sum(p.numel() for p in model.levels.parameters()) == parameters
        maps = model.level_states(torch.empty(1, 3, 10, 224, 224))
    width = 2 if "bidirectional" in options else 1
    assert [tuple(m.shape) for m in maps] == [
        (10, 1, width * n, side, side) for n, side in ((64, 56), (128, 28), (256, 14), (256, 7), (512, 1))
    ]


@pytest.fixture(scope="module")
def both_ways() -> Any:
    torch.manual_seed(0)
    return create_model("gru_rcn", num_classes=4, stacked=True, bidirectional=True).eval()


def test_gru_rcn_averages_the_levels_probabilities(both_ways: Any) -> None:
    """Of the state after each direction's last frame: the clip's last, and its first."""
    x = torch.randn(2, 3, 3, 40, 33)
    with torch.no_grad():
        each = []
        for head, states in zip(both_ways.classifier, both_ways.level_states(x), strict=True):
            forward, backward = states.mean(dim=(3, 4)).chunk(2, dim=2)
            each.append(head(torch.cat([forward[-1], backward[0]], dim=1)).softmax(1))
        wanted = torch.stack(each).mean(0)
        assert (both_ways(x).softmax(1) - wanted).abs().max() < 1e-6
        assert (both_ways(x).exp() - wanted).abs().max() < 1e-6, "they are log-probabilities already"


def test_gru_rcn_stack_reads_the_pooled_level_below(both_ways: Any) -> None:
    """The paper's wiring, level by level, with the layers called by hand, on each frame's percepts."""
    x = torch.randn(1, 3, 2, 64, 64)
    with torch.no_grad():
        got = both_ways.level_states(x)
        frames = zip(*(both_ways.encoder.percepts(x[:, :, t]) for t in range(2)), strict=True)
        percepts = [torch.stack(frame) for frame in frames]
        lower = both_ways.levels[0](percepts[0])[0]
        for level, N in enumerate((64, 128, 256, 256, 512)):
            if level:
                pooled = [F.max_pool2d(m, 2) if level < 4 else m.amax((2, 3), keepdim=True) for m in lower]
                lower = both_ways.levels[level](percepts[level], None, None, False, torch.stack(pooled))[0]
            assert (got[level][:, :, :N] - lower).abs().max() < 1e-5


def test_a_backward_gru_rcn_is_the_forward_one_on_the_reversed_clip(both_ways: Any) -> None:
    model = copy.copy(both_ways)
    model._modules = {**both_ways._modules, "levels": copy.deepcopy(both_ways.levels)}
    for i in range(5):
        model.levels[5 + i].load_state_dict(model.levels[i].state_dict())
    x = torch.randn(1, 3, 3, 32, 32)
    with torch.no_grad():
        features = model.forward_pooled(x)
        turned = model.forward_pooled(x.flip(2))
    at = 0
    for n in (64, 128, 256, 256, 512):
        assert (features[:, at : at + n] - turned[:, at + n : at + 2 * n]).abs().max() < 1e-6
        at += 2 * n


def test_patches_are_cut_and_put_back() -> None:
    x = torch.randn(2, 3, 4, 8, 12)
    patches = to_patches(x, 4)
    assert patches.shape == (2, 48, 4, 2, 3)
    assert torch.equal(patches[0, :, 1, 1, 2], x[0, :, 1, 4:8, 8:12].flatten())
    assert torch.equal(from_patches(patches, 4), x)


def test_the_forecaster_is_the_papers_by_hand() -> None:
    """States handed over top to bottom, no input to the first layer, a 1x1 convolution of all hidden states."""
    model = small(forecaster=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    x = torch.rand(2, 1, 4, 16, 16)
    below, above = model.forecaster.layers
    assert below.weight_input is None
    with torch.no_grad():
        _, ((h1, c1), (h2, c2)) = model.encoder(to_patches(x, 4))
        logits = model.forecast_logits(x, 3)
        for k in range(3):
            h2, c2 = _step(below, None, h2, c2)
            h1, c1 = _step(above, h2, h1, c1)
            weight, bias = model.output.weight[:, :, 0, 0], model.output.bias
            patches = torch.einsum("dc,bchw->bdhw", weight, torch.cat([h2, h1], 1)) + bias[:, None, None]
            frame = from_patches(patches[:, :, None], 4)[:, :, 0]
            assert (logits[:, :, k] - frame).abs().max() < 1e-5
        assert torch.equal(model.forecast(x, 3), logits.sigmoid())


def _step(layer: ConvLSTMLayer, x: Tensor | None, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    gates = F.conv2d(h, layer.weight_hidden, layer.bias, padding=1)
    if x is not None:
        assert layer.weight_input is not None
        gates = gates + F.conv2d(x, layer.weight_input, padding=1)
    i, f, g, o = gates.chunk(4, dim=1)
    assert layer.peephole is not None
    new = torch.sigmoid(f + layer.peephole[1] * c) * c + torch.sigmoid(i + layer.peephole[0] * c) * g.tanh()
    return torch.sigmoid(o + layer.peephole[2] * new) * new.tanh(), new


@pytest.mark.parametrize("name", ["convlstm", "fclstm"])
def test_losses_are_those_of_torch_on_the_future_alone(name: str) -> None:
    torch.manual_seed(0)
    model: Any = create_model(name, hidden=(6, 4), side=16, num_classes=0, forecaster=True)
    clips = torch.rand(2, 3, 6, 16, 16)
    gray = torch.einsum("c,bcthw->bthw", torch.tensor([0.299, 0.587, 0.114]), clips)[:, None]
    assert torch.allclose(model.pixels(clips), gray, atol=1e-6)
    logits = model.forecast_logits(clips[:, :, :4], 2)
    bce = F.binary_cross_entropy(logits.sigmoid(), gray[:, :, 4:])
    assert abs(model.forecast_loss(clips, input_frames=4) - bce) < 1e-6
    mse = F.mse_loss(logits.sigmoid(), gray[:, :, 4:])
    assert abs(model.forecast_loss(clips, input_frames=4, loss="mse") - mse) < 1e-6
    assert forecast_error(logits, gray[:, :, 4:], loss="mse").shape == (2,)
    other = clips.clone()
    other[:, :, 4:] = torch.rand(2, 3, 2, 16, 16)
    assert torch.equal(model.forecast_logits(other[:, :, :4], 2), logits), "the future is not read"
    model.forecast_loss(clips, input_frames=4).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())


def test_a_classifier_takes_a_trained_forecasters_encoder(tmp_path: Path) -> None:
    forecaster = small(forecaster=True, gray=False)
    options = {"hidden": [6, 4], "side": 16, "gray": False, "forecaster": True}
    folder = save_pretrained(forecaster, tmp_path, name="convlstm", options=options)
    classifier = small(num_classes=3, gray=False)
    report = load_pretrained(classifier, folder)
    assert "left out the forecaster's 9 tensors" in report.notes
    x = torch.rand(2, 3, 5, 16, 16)
    assert torch.equal(classifier.forward_pooled(x), forecaster(x))
    assert classifier(x).shape == (2, 3)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: small().forecast(torch.rand(1, 1, 3, 16, 16), 2), "forecaster=True"),
        (lambda: small(forecaster=True).forecast(torch.rand(1, 1, 3, 16, 16), 0), "frames=0"),
        (lambda: small(forecaster=True).forecast(torch.rand(1, 1, 3, 16, 18), 2), "16x18 pixels"),
        (lambda: small(gray=False)(torch.rand(1, 1, 3, 16, 16)), "C=3"),
        (
            lambda: small(forecaster=True).forecast_loss(torch.rand(1, 3, 4, 16, 16), input_frames=4),
            "input_frames=4",
        ),
        (
            lambda: small(forecaster=True).forecast_loss(
                torch.rand(1, 3, 4, 16, 16), input_frames=2, loss="l1"
            ),
            "'l1'",
        ),
        (lambda: small(side=18), "side=18"),
        (lambda: small(hidden_kernel=(3, 3, 3)), "is for 3 layers"),
        (
            lambda: create_model("fclstm", hidden=(4,), side=16, num_classes=0)(torch.rand(1, 3, 3, 32, 32)),
            "built for frames of 16x16",
        ),
        (lambda: create_model("gru_rcn", lower_in_candidate=True), "needs stacked=True"),
    ],
)
def test_what_cannot_be_is_refused(call: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        call()


# Learning

SEGMENTS = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")
BARS = {
    "a": (slice(0, 2), slice(1, 7)),
    "g": (slice(5, 7), slice(1, 7)),
    "d": (slice(10, 12), slice(1, 7)),
    "f": (slice(0, 6), slice(0, 2)),
    "b": (slice(0, 6), slice(6, 8)),
    "e": (slice(6, 12), slice(0, 2)),
    "c": (slice(6, 12), slice(6, 8)),
}


def moving_digits(clips: int, *, frames: int, side: int, seed: int, sideways: bool = False) -> Tensor:
    """(B, 1, T, side, side) in [0, 1]: a seven-segment digit of 12x8 pixels that bounces off the walls.

    It moves 2 to 3 pixels a frame anywhere, or 2 pixels left or right.
    """
    generator = torch.Generator().manual_seed(seed)
    room = torch.tensor([side - 12, side - 8], dtype=torch.float32)
    out = torch.zeros(clips, 1, frames, side, side)
    for clip in out[:, 0]:
        glyph = torch.zeros(12, 8)
        for bar in SEGMENTS[int(torch.randint(10, (1,), generator=generator))]:
            glyph[BARS[bar]] = 1.0
        place = torch.rand(2, generator=generator) * room
        angle, speed = torch.rand(2, generator=generator) * torch.tensor([2 * torch.pi, 1.0])
        velocity = (2 + speed) * torch.stack([angle.sin(), angle.cos()])
        if sideways:
            velocity = torch.tensor([0.0, 2.0]) * angle.cos().sign()
        for frame in clip:
            y, x = place.round().long().tolist()
            frame[y : y + 12, x : x + 8] = glyph
            place = place + velocity
            velocity = torch.where((place < 0) | (place > room), -velocity, velocity)
            place = torch.where(place > room, 2 * room - place, place.abs())
    return out


def trained_forecaster(clips: Tensor, *, read: int, steps: int, batch: int, lr: float, **options: Any) -> Any:
    torch.manual_seed(0)
    model: Any = create_model("convlstm", num_classes=0, forecaster=True, side=clips.shape[-1], **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        chosen = clips[torch.randint(len(clips), (batch,))]
        loss = model.forecast_loss(chosen, input_frames=read)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def test_a_forecaster_beats_the_last_frame_on_moving_digits() -> None:
    """And the best constant, which a network that learned nothing about motion could reach."""
    train, test = (moving_digits(n, frames=6, side=24, seed=s) for n, s in ((512, 1), (64, 2)))
    model = trained_forecaster(train, read=4, steps=130, batch=8, lr=1e-2, hidden=(32,))
    with torch.no_grad():
        error = (model.forecast(test[:, :, :4], 2) - test[:, :, 4:]).square().mean()
    future = test[:, :, 4:]
    copy = (test[:, :, 3:4] - future).square().mean()
    constant = (future - future.mean()).square().mean()
    assert error < 0.7 * copy
    assert error < 0.92 * constant


@pytest.mark.slow
def test_state_kernels_above_1x1_forecast_better() -> None:
    """The paper's finding (Table 1): states that cannot pass motion on to their neighbours forecast worse.

    A digit moves one patch a frame, for 6 frames after 3; a patch sees one patch around it. So with a 1x1 state kernel
    no patch can know of the digit that will arrive four frames later.
    """
    train, test = (moving_digits(n, frames=9, side=24, seed=s, sideways=True) for n, s in ((512, 1), (64, 2)))
    found = {}
    for kernel in (3, 1):
        options = {"hidden": (24,), "patch": 2, "input_kernel": 3, "hidden_kernel": kernel}
        model = trained_forecaster(train, read=3, steps=600, batch=8, lr=2e-2, **options)
        with torch.no_grad():
            found[kernel] = float(model.forecast_loss(test, input_frames=3))
    print(f"binary cross-entropy per pixel: 3x3 {found[3]:.4f}, 1x1 {found[1]:.4f}")
    assert found[3] < 0.9 * found[1]
