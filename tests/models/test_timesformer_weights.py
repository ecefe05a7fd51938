"""TimeSformer weights: exchanged with transformers, and started from an image ViT."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models import create_model
from cliplift.models.hub import load_state
from cliplift.models.timesformer_weights import to_huggingface


def small(scheme: str) -> nn.Module:
    torch.manual_seed(0)
    return create_model(
        "timesformer_base", num_classes=5, in_frames=4, crop=48, width=32, depth=2, heads=4, attention=scheme
    ).eval()


@pytest.mark.parametrize("scheme", ["divided", "joint"])
def test_same_logits_as_transformers_both_ways(scheme: str) -> None:
    transformers = pytest.importorskip("transformers")
    ours = small(scheme)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.1)
    state, config = to_huggingface(ours)
    theirs = transformers.TimesformerForVideoClassification(transformers.TimesformerConfig(**config)).eval()
    theirs.load_state_dict(state)
    x = torch.randn(2, 3, 4, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2)).logits, atol=1e-5, rtol=0)
        for p in theirs.parameters():
            nn.init.normal_(p, std=0.1)
        load_state(ours, theirs.state_dict(), source="transformers")
        torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2)).logits, atol=1e-5, rtol=0)


def image_vit(state: dict[str, Tensor], image: Tensor, *, heads: int, depth: int) -> Tensor:
    """The CLS features of a plain ViT, (B, C, H, W) -> (B, D), written with torch.nn.functional."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    weight = state["patch_embed.proj.weight"]
    z = F.conv2d(image, weight, state["patch_embed.proj.bias"], stride=weight.shape[-1])
    z = z.flatten(2).transpose(1, 2)
    z = torch.cat([state["cls_token"].expand(len(z), -1, -1), z], dim=1) + state["pos_embed"]
    for i in range(depth):
        q, k, v = linear(norm(z, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, dim=-1)
        q, k, v = (m.unflatten(-1, (heads, -1)) for m in (q, k, v))
        scores = torch.einsum("blad,bsad->bals", q, k) / q.shape[-1] ** 0.5
        mixed = torch.einsum("bals,bsad->blad", scores.softmax(-1), v).flatten(2)
        z = z + linear(mixed, f"blocks.{i}.attn.proj")
        hidden = F.gelu(linear(norm(z, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        z = z + linear(hidden, f"blocks.{i}.mlp.fc2")
    return norm(z, "norm")[:, 0]


@pytest.mark.parametrize("scheme", ["divided", "space"])
def test_identical_frames_are_the_image_vit(scheme: str) -> None:
    model = small(scheme).double()
    extra = ("time_embed", "temporal", "head")
    image_state = {
        k: torch.randn_like(v) * 0.1 for k, v in model.state_dict().items() if not any(e in k for e in extra)
    }
    load_state(model, image_state, source="vit")
    image = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    clip = image.unsqueeze(2).expand(-1, -1, 4, -1, -1)
    expected = image_vit(image_state, image, heads=4, depth=2)
    torch.testing.assert_close(model.forward_pooled(clip), expected, atol=1e-10, rtol=0)
