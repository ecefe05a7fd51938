"""Latent prediction: its loss against transformers and against loops, and its teacher, which nothing but a moving
average may touch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliplift.models import ModelError, create_model
from cliplift.models.state_dicts import load_state
from cliplift.models.video_vit.latent import LatentPrediction, LatentPredictor, distance_to_hidden
from cliplift.models.video_vit.masks import LONG_RANGE, SHORT_RANGE, MaskDraws, block_numbers
from cliplift.models.video_vit.model import VideoViT
from cliplift.models.video_vit.positions import TokenGrid

SMALL = {"crop": 32, "patch": 8, "in_frames": 8, "width": 48, "depth": 3, "heads": 4, "hidden": 96}
PREDICTOR = {"width": 36, "depth": 2, "heads": 3}
GRID = TokenGrid(4, 4, 4)


def small_encoder(name: str = "vjepa2_large_16", **options: Any) -> VideoViT:
    model = create_model(name, num_classes=0, **(SMALL | options))
    assert isinstance(model, VideoViT)
    return model


def dense_prediction(**options: Any) -> LatentPrediction:
    encoder = small_encoder("vjepa21_base_16", depth=12, heads=2)
    predictor = LatentPredictor.of(encoder, predict_context=True, **PREDICTOR)
    return LatentPrediction(encoder, predictor, dense=True, **options)


def randomised(net: nn.Module) -> nn.Module:
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net.eval()


def lists(clips: int) -> list[tuple[Tensor, Tensor]]:
    draws = MaskDraws.of(0, epoch=1, positions=range(clips))
    return [
        block_numbers(GRID, draws.of_mask(i, 2), blocks) for i, blocks in enumerate((SHORT_RANGE, LONG_RANGE))
    ]


@pytest.fixture
def clips() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 3, 8, 32, 32)


def their_loss(theirs: Any, teacher: Any, clips: Tensor, masks: list[tuple[Tensor, Tensor]]) -> Tensor:
    """V-JEPA 2's loss by the layers of transformers, whose own encoder has no way to leave tokens out."""
    with torch.no_grad():
        target = F.layer_norm(teacher.get_vision_features(clips.transpose(1, 2)), (48,))
    losses = []
    for context, hidden in masks:
        tokens = theirs.encoder.embeddings(clips.transpose(1, 2))
        seen = tokens.gather(1, context[..., None].expand(-1, -1, 48))
        for layer in theirs.encoder.layer:
            seen = layer(seen, position_mask=context)[0]
        seen = theirs.encoder.layernorm(seen)
        everywhere = torch.zeros_like(tokens).scatter(1, context[..., None].expand(-1, -1, 48), seen)
        found = theirs.predictor(everywhere, context_mask=[context], target_mask=[hidden]).last_hidden_state
        losses.append((found - target.gather(1, hidden[..., None].expand(-1, -1, 48))).abs().mean())
    return torch.stack(losses).mean()


def test_loss_and_gradients_of_transformers(clips: Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.VJEPA2Config(
        crop_size=32, patch_size=8, frames_per_clip=8, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
        mlp_ratio=2.0, pred_hidden_size=36, pred_num_hidden_layers=2, pred_num_attention_heads=3,
        pred_num_mask_tokens=2,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs, teacher = (randomised(transformers.VJEPA2Model(config)) for _ in range(2))
    encoder = small_encoder()
    predictor = LatentPredictor.of(encoder, mask_tokens=2, **PREDICTOR)
    ours = LatentPrediction(encoder, predictor).eval()
    for part, state in ((ours.encoder, theirs), (ours.predictor, theirs), (ours.teacher, teacher)):
        load_state(part, state.state_dict(), source="transformers")
    with torch.no_grad():  # transformers takes the second of its mask tokens
        ours.predictor.mask_tokens.copy_(ours.predictor.mask_tokens.flip(0))
    masks = lists(3)
    wanted, found = their_loss(theirs, teacher, clips, masks), ours(clips, masks)
    assert found.loss.item() == pytest.approx(wanted.item(), abs=1e-5)
    assert found.loss_of_clip.mean().item() == pytest.approx(wanted.item(), abs=1e-5)
    wanted.backward()
    found.loss.backward()
    for mine, other in (
        (encoder.patch_embed.proj.weight, theirs.encoder.embeddings.patch_embeddings.proj.weight),
        (encoder.norm.bias, theirs.encoder.layernorm.bias),
        (encoder.blocks[1].mlp.fc1.weight, theirs.encoder.layer[1].mlp.fc1.weight),
        (predictor.proj.weight, theirs.predictor.proj.weight),
    ):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-5)


def test_the_dense_loss_by_loops(clips: Tensor) -> None:
    """Every level layer-normed, hidden tokens plainly, context tokens over the root of the distance to a hidden one."""
    torch.manual_seed(0)
    net = dense_prediction()
    randomised(net)
    masks = lists(3)
    found = net(clips, masks, torch.tensor(0.3))
    with torch.no_grad():
        levels = [level.numpy() for level in net.teacher.forward_levels(clips)]
    target = np.concatenate(
        [(x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) for x in levels], axis=-1
    )
    assert target.shape == (3, 64, 4 * 48)
    losses = np.zeros(3)
    for context, hidden in masks:
        with torch.no_grad():
            seen = torch.cat(net.encoder.forward_levels(clips, context), dim=-1)
            predicted, of_context = (x.numpy() for x in net.predictor(seen, context, hidden, GRID))
        for b in range(3):
            places = [np.array(np.unravel_index(int(k), GRID)) for k in hidden[b]]
            losses[b] += np.mean(
                [np.abs(predicted[b, i] - target[b, k]).mean() for i, k in enumerate(hidden[b])]
            )
            weighted = []
            for i, k in enumerate(context[b]):
                own = np.array(np.unravel_index(int(k), GRID))
                nearest = min(math.dist(own, place) for place in places)
                weighted.append(np.abs(of_context[b, i] - target[b, k]).mean() / math.sqrt(nearest))
            losses[b] += 0.3 * np.mean(weighted)
    assert found.loss_of_clip.tolist() == pytest.approx((losses / 2).tolist(), rel=1e-5)
    assert found.loss.item() == pytest.approx(losses.mean() / 2, rel=1e-5)
    net.near_first = False
    assert net(clips, masks, 0.3).loss > found.loss, "no token is nearer than 1, and some are farther"


def test_distances_are_of_tokens_in_time_and_space() -> None:
    grid = TokenGrid(3, 4, 5)
    context = torch.tensor([[0, 59, 22]])  # (0, 0, 0), (2, 3, 4), (1, 0, 2)
    hidden = torch.tensor([[1, 43]])  # (0, 0, 1), (2, 0, 3)
    expected = [1.0, math.sqrt(9 + 1), math.sqrt(2)]
    assert distance_to_hidden(context, hidden, grid)[0].tolist() == pytest.approx(expected)


def test_the_teacher_starts_as_the_encoder_and_is_never_trained(clips: Tensor) -> None:
    net = LatentPrediction(small_encoder(drop_path=0.5), LatentPredictor(48, **PREDICTOR)).train()
    before = {name: value.clone() for name, value in net.teacher.state_dict().items()}
    assert before.keys() == net.encoder.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in net.encoder.state_dict().items())
    assert net.encoder.training
    assert not net.teacher.training, "or it would drop paths"
    assert not any(parameter.requires_grad for parameter in net.teacher.parameters())
    net(clips, lists(3)).loss.backward()
    assert all(parameter.grad is None for parameter in net.teacher.parameters())
    assert all(parameter.grad is not None for parameter in net.encoder.parameters())
    assert torch.equal(net.targets(clips), net.targets(clips))
    names = net.checkpoint_blocks()
    assert "predictor.blocks.1" in names
    assert "encoder.blocks.2" in names
    assert not any(name.startswith("teacher") for name in names)


def test_masks_of_one_clip_are_unrelated() -> None:
    """Of one mask's uniform numbers nothing is seen in the other's."""
    draws = MaskDraws.of(5, epoch=0, positions=range(4000))
    one, other = (draws.of_mask(i, 2).uniform(4, 1)[:, 0] for i in range(2))
    correlation = np.corrcoef(one.numpy(), other.numpy())[0, 1]
    assert abs(correlation) < 5 / math.sqrt(4000)


def test_what_cannot_be_predicted_is_told() -> None:
    encoder = small_encoder()
    with pytest.raises(ModelError, match="levels"):
        LatentPrediction(encoder, LatentPredictor(48, predict_context=True, **PREDICTOR), dense=True)
    pooled = small_encoder("video_vit_base_16")
    with pytest.raises(ModelError, match="final_norm"):
        LatentPrediction(pooled, LatentPredictor(48, **PREDICTOR))
