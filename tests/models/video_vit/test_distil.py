"""Distillation nets against plain arithmetic on small numbers, and what each of them sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cliplift.models import create_model
from cliplift.models.protocol import ModelError
from cliplift.models.video_vit.distil import HiddenPrediction, VisibleAlignment, compared
from cliplift.models.video_vit.model import VideoViT
from cliplift.models.video_vit.positions import sincos_table

TINY: dict[str, Any] = {"patch": 8, "width": 48, "depth": 3, "heads": 4, "hidden": 96, "crop": 32}
WIDTHS = (10, 6)


def encoder(**options: Any) -> VideoViT:
    torch.manual_seed(0)
    net = create_model(
        "video_vit_tiny_8", num_classes=0, in_frames=4, **({"final_norm": "tokens"} | TINY | options)
    )
    assert isinstance(net, VideoViT)
    return net


def example(clips: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    order = torch.rand(clips, 32, generator=generator).argsort(dim=1)
    return torch.randn(clips, 3, 4, 32, 32, generator=generator), order[:, :8].sort(dim=1).values


def by_hand(
    guess: np.ndarray[Any, Any], right: np.ndarray[Any, Any], distance: str, normalise: bool
) -> float:
    """Of one clip: (K, n, F) and (K, n, F)."""
    per_teacher = []
    for start, stop in ((0, 10), (10, 16)):
        a, b = guess[..., start:stop], right[..., start:stop]
        if distance == "cosine":
            cos = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
            per_teacher.append((2 - 2 * cos).mean())
            continue
        if normalise:
            b = (b - b.mean(-1, keepdims=True)) / np.sqrt(b.var(-1, keepdims=True) + 1e-6)
        off = np.abs(a - b)
        each = np.where(off < 1, 0.5 * off**2, off - 0.5) if distance == "smooth_l1" else off**2
        per_teacher.append(each.mean())
    return float(np.mean(per_teacher))


@pytest.mark.parametrize("distance", ["cosine", "smooth_l1", "l2"])
@pytest.mark.parametrize("normalise", [True, False])
def test_distances_by_plain_arithmetic(distance: Any, normalise: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    guess, right = (3 * torch.randn(4, 2, 5, 16, generator=generator) for _ in range(2))
    found = compared(guess, right, widths=WIDTHS, distance=distance, normalise=normalise)
    expected = [
        by_hand(a, b, distance, normalise)
        for a, b in zip(guess.double().numpy(), right.double().numpy(), strict=True)
    ]
    assert found.loss_of_clip.tolist() == pytest.approx(expected, rel=1e-5)
    assert found.loss.item() == pytest.approx(np.mean(expected), rel=1e-5)
    if distance == "cosine":
        assert (2 - 2 * found.cosine_of_clip).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_last_blocks_visible_tokens_are_aligned() -> None:
    """Layer by layer: the encoder's normed tokens with their places, Linear, LN; other tokens are never seen."""
    net = VisibleAlignment(encoder(), WIDTHS, layers=2).eval()
    clips, visible = example()
    targets = torch.randn(3, 2, 8, 16)
    with torch.no_grad():
        levels = net.encoder.forward_levels(clips, visible, layers=(1, 2))
        places = sincos_table(32, 48)[visible]
        guesses = []
        for level, aligners in zip(levels, net.aligners, strict=True):
            parts = []
            for aligner in aligners:  # type: ignore[union-attr]
                y = (level + places) @ aligner.linear.weight.T + aligner.linear.bias
                y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
                parts.append(y * aligner.norm.weight + aligner.norm.bias)
            guesses.append(torch.cat(parts, dim=-1))
        expected = compared(
            torch.stack(guesses, dim=1), targets, widths=WIDTHS, distance="cosine", normalise=True
        )
        found = net(clips, visible, targets)
        torch.testing.assert_close(found.loss_of_clip, expected.loss_of_clip, atol=1e-5, rtol=1e-5)
        cubes = clips.reshape(3, 3, 2, 2, 4, 8, 4, 8)
        hidden = torch.ones(3, 32).scatter_(1, visible, 0.0).reshape(3, 1, 2, 1, 4, 1, 4, 1)
        changed = (cubes + hidden * torch.randn_like(cubes)).reshape(clips.shape)
        assert torch.equal(net(changed, visible, targets).loss_of_clip, found.loss_of_clip)


def test_hidden_places_are_predicted_from_visible_tokens() -> None:
    """A decoder for each teacher; the gradient reaches all of it, and the encoder sees nothing that is hidden."""
    net = HiddenPrediction(encoder(), WIDTHS, width=24, depth=1, heads=2)
    clips, visible = example()
    clips.requires_grad_(True)
    found = net(clips, visible, torch.randn(3, 1, 24, 16))
    found.loss.backward()
    assert all(p.grad is not None for p in net.parameters())
    seen = clips.grad.abs().reshape(3, 3, 2, 2, 4, 8, 4, 8).sum(dim=(1, 3, 5, 7)).flatten(1) > 0  # type: ignore[union-attr]
    assert torch.equal(seen, torch.zeros(3, 32).scatter_(1, visible, 1.0).bool())
    assert net.checkpoint_blocks()[-2:] == ["decoders.0.decoder.blocks.0", "decoders.1.decoder.blocks.0"]


def test_a_decoder_that_is_right_has_no_loss() -> None:
    """Targets made of the net's own guesses, at the hidden places in ascending order."""
    net = HiddenPrediction(
        encoder(), (16,), width=24, depth=1, heads=2, distance="l2", normalise=False
    ).eval()
    clips, visible = example()
    hidden = torch.tensor([[n for n in range(32) if n not in row] for row in visible.tolist()])
    with torch.no_grad():
        tokens = net.encoder.forward_tokens(clips, visible)
        guess = net.decoders[0](tokens, visible, hidden, net.encoder.grid(4, 32))
        assert net(clips, visible, guess[:, None]).loss.item() == 0.0
        assert net(clips, visible, guess.flip(1)[:, None]).loss.item() > 0.0


def test_what_cannot_be_distilled_is_refused() -> None:
    with pytest.raises(ModelError, match="one LN of every token"):
        VisibleAlignment(encoder(final_norm="pooled"), WIDTHS)
    with pytest.raises(ModelError, match="layers=4 of an encoder of 3 blocks"):
        VisibleAlignment(encoder(), WIDTHS, layers=4)
    with pytest.raises(ModelError, match="multiple of heads"):
        HiddenPrediction(encoder(), WIDTHS, width=24, depth=1, heads=5)
