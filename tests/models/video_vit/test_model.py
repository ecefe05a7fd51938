"""VideoViT as an encoder of some of a clip's tokens, at other sizes, and as a classifier."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models import ModelError, create_model
from cliplift.models.video_vit import blocks as blocks_module
from cliplift.models.video_vit.model import VideoViT
from cliplift.models.video_vit.positions import TokenGrid
from cliplift.pipelines.compute.recompute import recompute_blocks

SMALL: dict[str, Any] = {"crop": 32, "in_frames": 4, "width": 48, "heads": 4, "hidden": 96}
NAMES = ["video_vit_tiny_8", "vjepa2_large_16", "vjepa21_base_16"]


def small(name: str, **options: Any) -> VideoViT:
    """Random weights everywhere, so that no path is hidden by a zero."""
    torch.manual_seed(0)
    own = {"patch": 8, "depth": 12 if "21" in name else 3}
    own |= {"final_norm": "tokens"} if name == "video_vit_tiny_8" else {}
    model = create_model(name, **(SMALL | own | {"num_classes": 0} | options))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return cast(VideoViT, model.eval())


@pytest.fixture
def clips() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 4, 32, 32)


@pytest.mark.parametrize("name", NAMES)
def test_visible_tokens_are_the_full_encoder_under_an_attention_mask(
    name: str, clips: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(name)
    keep = torch.stack([torch.randperm(32)[:9] for _ in clips])
    alone = model.forward_tokens(clips, keep)
    allowed = torch.zeros(2, 1, 1, 32, dtype=torch.bool).scatter(3, keep[:, None, None], True)
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(
        blocks_module.F,
        "scaled_dot_product_attention",
        lambda q, k, v: attention(q, k, v, attn_mask=allowed.expand(-1, q.shape[1], 32, -1)),
    )
    full = model.forward_tokens(clips).gather(1, keep[..., None].expand(-1, -1, 48))
    torch.testing.assert_close(alone, full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_come_in_the_order_asked_for(name: str, clips: Tensor) -> None:
    model = small(name)
    keep = torch.stack([torch.randperm(32)[:9] for _ in clips])
    order = torch.randperm(9)
    torch.testing.assert_close(
        model.forward_tokens(clips, keep)[:, order],
        model.forward_tokens(clips, keep[:, order]),
        atol=1e-5,
        rtol=1e-5,
    )


def test_features_are_the_tokens_at_their_places(clips: Tensor) -> None:
    model = small("vjepa2_large_16")
    tokens, features = model.forward_tokens(clips), model.forward_features(clips)
    assert features.shape == (2, 48, 2, 4, 4)
    assert torch.equal(features[:, :, 1, 2, 3], tokens[:, 16 + 2 * 4 + 3])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(4, 32, 32), (8, 32, 48), (2, 16, 64)])
def test_any_clip_of_whole_tubelets(name: str, shape: tuple[int, int, int]) -> None:
    model = small(name)
    frames, height, width = shape
    assert model.grid(frames, height, width) == TokenGrid(frames // 2, height // 8, width // 8)
    features = model.forward_features(torch.randn(1, 3, *shape))
    assert features.shape == (1, 48, frames // 2, height // 8, width // 8)
    assert features.isfinite().all()


def test_a_token_keeps_its_place_in_a_larger_crop_when_asked() -> None:
    """Flat counting gives the token below the first another number in another crop; resizing does not."""
    x = torch.randn(1, 3, 4, 64, 64)
    flat, kept = (small("video_vit_tiny_8", position_resize=how, depth=1) for how in ("flat", "trilinear"))
    native = small("video_vit_tiny_8", depth=1, crop=64)
    torch.testing.assert_close(flat.forward_tokens(x), native.forward_tokens(x))
    assert (kept.forward_tokens(x) - native.forward_tokens(x)).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(5, 32, 32), (4, 36, 32), (1, 32, 32)])
def test_broken_tubelets_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ModelError, match="whole tubelets"):
        small("vjepa2_large_16").forward_tokens(torch.randn(1, 3, *shape))


def test_levels_are_the_blocks_outputs(clips: Tensor) -> None:
    model = small("vjepa21_base_16")
    levels = model.forward_levels(clips)
    assert len(levels) == 4
    torch.testing.assert_close(levels[-1], model.forward_tokens(clips))
    model.blocks = model.blocks[:6]  # what stands after block 5, by a net that ends there
    torch.testing.assert_close(levels[1], model.forward_levels(clips, layers=(5,))[0])


def test_layers_of_a_net_with_one_norm(clips: Tensor) -> None:
    model = small("vjepa2_large_16")
    first, last = model.forward_levels(clips, layers=(0, 2))
    torch.testing.assert_close(last, model.forward_tokens(clips))
    model.blocks = model.blocks[:1]
    torch.testing.assert_close(first, model.forward_tokens(clips))


def test_an_image_has_its_own_tubelets() -> None:
    model = small("vjepa21_base_16")
    image = torch.randn(1, 3, 1, 32, 32)
    assert model.grid(1, 32) == TokenGrid(1, 4, 4)
    before = model.forward_tokens(image)
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
    assert torch.equal(model.forward_tokens(image), before)


def test_pooled_models_normalise_the_mean_and_others_the_tokens(clips: Tensor) -> None:
    pooled = small("video_vit_tiny_8", final_norm="pooled")
    mean = pooled.forward_tokens(clips).mean(dim=1)
    torch.testing.assert_close(
        pooled(clips), F.layer_norm(mean, (48,), pooled.fc_norm.weight, pooled.fc_norm.bias, 1e-6)
    )
    tokens = small("video_vit_tiny_8")
    torch.testing.assert_close(tokens(clips), tokens.forward_tokens(clips).mean(dim=1))


def test_the_first_classifier_is_a_thousandth_of_the_usual() -> None:
    model = create_model("video_vit_small_16", num_classes=400, depth=1)
    head = cast(nn.Linear, model.head)
    assert head.weight.std().item() == pytest.approx(0.02 * 0.001, rel=0.05)
    assert not head.bias.any()


def test_v_jepas_output_layers_start_smaller_with_depth() -> None:
    model = create_model("vjepa21_base_16", num_classes=0)
    for i in (0, 11):
        block = model.blocks[i]
        for layer in (block.attn.proj, block.mlp.fc2):
            assert layer.weight.std().item() == pytest.approx(0.02 / (2 * (i + 1)) ** 0.5, rel=0.02)
        assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_blocks_give_the_same_gradients(name: str, clips: Tensor) -> None:
    model = small(name, num_classes=3)
    keep = torch.stack([torch.randperm(32)[:9] for _ in clips])
    gradients = []
    for fraction in (0.0, 1.0):
        recompute_blocks(model, fraction)
        model.zero_grad()
        model.forward_tokens(clips, keep).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.blocks.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"heads": 5}, "multiple of heads"),
        ({"positions": "learned"}, "positions='learned'"),
        ({"final_norm": "pooled", "head": "attentive", "num_classes": 3}, "needs final_norm='tokens'"),
        ({"drop_path": 1.0}, r"\[0, 1\)"),
        ({"depth": 0}, "depth=0"),
    ],
)
def test_mistakes_are_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        small("video_vit_tiny_8", **options)
