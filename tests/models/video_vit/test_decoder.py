"""Masked autoencoding: target, loss, dual masking, and independence of the batch."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor

from cliplift.models import ModelError, create_model
from cliplift.models.video_vit.decoder import MaskedAutoencoder, other_tokens, tubelet_targets
from cliplift.models.video_vit.masks import MaskDraws, running_cell_mask, token_numbers, tube_mask
from cliplift.models.video_vit.model import VideoViT

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def autoencoder(**options: object) -> MaskedAutoencoder:
    torch.manual_seed(0)
    small: dict[str, object] = {"crop": 32, "in_frames": 8, "width": 48, "depth": 2, "heads": 4, "hidden": 96}
    encoder = create_model("video_vit_tiny_8", num_classes=0, **(small | {"final_norm": "tokens"} | options))
    return MaskedAutoencoder(cast(VideoViT, encoder), width=24, depth=2, heads=3).eval()


@pytest.fixture
def clips() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 3, 8, 32, 32)


def lists(positions: range = range(4)) -> tuple[Tensor, Tensor]:
    """Visible tokens under a tube of 0.75, and those a running cell of 0.5 decodes."""
    grid, draws = autoencoder().encoder.native_grid, MaskDraws.of(5, epoch=2, positions=positions)
    return token_numbers(tube_mask(grid, draws, ratio=0.75))[0], token_numbers(
        running_cell_mask(grid, draws, ratio=0.5)
    )[0]


def test_the_target_pixel_by_pixel(clips: Tensor) -> None:
    target = tubelet_targets(clips, mean=MEAN, std=STD, tubelet=2, patch=8, normalise=True)
    assert target.shape == (4, 4 * 4 * 4, 2 * 8 * 8 * 3)
    t, h, w = 3, 1, 2
    for channel in range(3):
        cube = clips[2, channel, 2 * t : 2 * t + 2, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8].double()
        pixels = (cube * STD[channel] + MEAN[channel]).flatten()
        spread = ((pixels - pixels.mean()).square().sum() / (len(pixels) - 1)).sqrt()
        expected = (pixels - pixels.mean()) / (spread + 1e-6)  # frame, row, column
        found = target[2, (t * 4 + h) * 4 + w].unflatten(0, (-1, 3))[:, channel]
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_pixels_without_normalisation_are_in_0_to_1() -> None:
    black = (torch.zeros(3) - torch.tensor(MEAN)) / torch.tensor(STD)
    clip = black[None, :, None, None, None].expand(1, 3, 2, 8, 8)
    target = tubelet_targets(clip, mean=MEAN, std=STD, tubelet=2, patch=8, normalise=False)
    torch.testing.assert_close(target, torch.zeros(1, 1, 384), atol=1e-6, rtol=0)


def test_the_other_tokens() -> None:
    numbers = torch.tensor([[4, 0, 2], [1, 5, 3]])
    assert other_tokens(numbers, 6).tolist() == [[1, 3, 5], [0, 2, 4]]


def test_the_loss_is_the_mean_square_over_hidden_tokens(clips: Tensor) -> None:
    net, (visible, _) = autoencoder(), lists()
    found = net(clips, visible)
    assert torch.equal(found.decoded, other_tokens(visible, 64))
    assert found.counted.all()
    torch.testing.assert_close(found.loss, (found.prediction - found.target).square().mean())


def test_dual_masking_decodes_some_and_counts_the_hidden(clips: Tensor) -> None:
    net, (visible, decoded) = autoencoder(), lists()
    found = net(clips, visible, decoded)
    assert found.prediction.shape == (4, 32, 384)
    error = (found.prediction - found.target).square().mean(dim=2)
    for clip in range(4):
        seen = set(visible[clip].tolist())
        hidden = [i for i, number in enumerate(decoded[clip].tolist()) if number not in seen]
        assert len(hidden) < 32  # some decoded tokens are visible
        torch.testing.assert_close(found.loss_of_clip[clip], error[clip, hidden].mean())
    torch.testing.assert_close(found.loss, found.loss_of_clip.mean())


def test_a_decoded_token_depends_on_context_and_other_decoded_tokens_alone(clips: Tensor) -> None:
    """The decoder has no more input than it is told: pixels of tokens that are hidden everywhere change nothing."""
    net, (visible, decoded) = autoencoder(), lists()
    before = net(clips, visible, decoded).prediction
    number = next(n for n in other_tokens(visible, 64)[0].tolist())
    t, inside = divmod(number, 16)
    h, w = divmod(inside, 4)
    clips[0, :, 2 * t : 2 * t + 2, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8] += 3
    assert torch.equal(net(clips, visible, decoded).prediction, before)


def test_losses_do_not_depend_on_the_micro_batch(clips: Tensor) -> None:
    net, (visible, decoded) = autoencoder(), lists()
    whole = net(clips, visible, decoded).loss_of_clip
    for size in (1, 2):
        parts = []
        for start in range(0, 4, size):
            own = lists(range(start, start + size))
            parts.append(net(clips[start : start + size], *own).loss_of_clip)
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=1e-6)


def test_rotary_encoders_can_be_pretrained_too(clips: Tensor) -> None:
    net, (visible, decoded) = autoencoder(positions="rope"), lists()
    net(clips, visible, decoded).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_a_classifiers_encoder_is_refused() -> None:
    with pytest.raises(ModelError, match="final_norm='tokens'"):
        autoencoder(final_norm="pooled")
