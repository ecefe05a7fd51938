"""What an image teacher says of tokens: grids by plain arithmetic, the ViT against transformers and published sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cliplift.models import create_model
from cliplift.models.protocol import ModelError
from cliplift.models.state_dicts import load_state
from cliplift.models.video_vit.distil import image_targets, on_grid
from cliplift.models.video_vit.image_teachers import ImageViT

SMALL: dict[str, Any] = {"patch": 8, "width": 48, "depth": 3, "heads": 4, "crop": 32}


# of transformers 4, under those of 5
OLDER_NAMES = (
    ("encoder.layer.", "layers."), ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"), ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"), ("intermediate.dense", "mlp.fc1"), (".output.dense", ".mlp.fc2"),
)  # fmt: skip


def teacher(**options: Any) -> ImageViT:
    torch.manual_seed(0)
    net = create_model("image_vit_base_16", num_classes=0, **(SMALL | options)).eval()
    assert isinstance(net, ImageViT)
    return net


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [  # as their authors publish them
        ("image_vit_small_16", {}, 22_050_664),
        ("image_vit_base_16", {}, 86_567_656),
        ("image_vit_base_16", {"num_classes": 0, "style": "clip", "projection": 512}, 86_192_640),
        ("image_vit_large_14", {"num_classes": 0, "style": "clip", "projection": 768}, 303_966_208),
    ],
)
def test_published_sizes(name: str, options: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        net = create_model(name, **options)
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_clip_of_transformers() -> None:
    """Features, patches and the class token's attention, weights copied through its own names."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.CLIPVisionConfig(
        **sizes, image_size=32, patch_size=8, projection_dim=20, attn_implementation="eager"
    )
    torch.manual_seed(1)
    theirs = transformers.CLIPVisionModelWithProjection(config).eval()
    ours = teacher(style="clip", projection=20)
    load_state(ours, theirs.state_dict(), source="transformers")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = theirs(x, output_attentions=True, output_hidden_states=True)
        (last,), attention = ours.teach_tokens(x, layers=1)
        tower = theirs.vision_model
        patches = theirs.visual_projection(tower.post_layernorm(wanted.last_hidden_state))[:, 1:]
        torch.testing.assert_close(ours(x), wanted.image_embeds, atol=1e-5, rtol=1e-5)
        before = theirs.visual_projection(tower.post_layernorm(wanted.hidden_states[-2]))[:, 1:]
        earlier, same = ours.teach_tokens(x, layers=2)[0]
    torch.testing.assert_close(last.flatten(2).transpose(1, 2), patches, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(same, last)
    torch.testing.assert_close(earlier.flatten(2).transpose(1, 2), before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        attention.flatten(1), wanted.attentions[-1].mean(dim=1)[:, 0, 1:], atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(ours.forward_features(x), last)


def test_a_plain_vit_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, layer_norm_eps=1e-6)
    torch.manual_seed(1)
    theirs = transformers.ViTModel(config, add_pooling_layer=False).eval()
    ours = teacher()
    state = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    given = {}
    for key, value in theirs.state_dict().items():
        name = key
        for before, now in OLDER_NAMES:
            name = name.replace(before, now)
        given[name] = value
    copied = {name: given[key] for name, key in state.items()}
    for name in ("weight", "bias"):
        copied[f"patch_embed.proj.{name}"] = given[f"embeddings.patch_embeddings.projection.{name}"]
        copied[f"norm.{name}"] = given[f"layernorm.{name}"]
        for i in range(3):
            at = f"layers.{i}."
            parts = [given[f"{at}attention.{one}_proj.{name}"] for one in "qkv"]
            copied[f"blocks.{i}.attn.qkv.{name}"] = torch.cat(parts)
            for own, key in (
                ("attn.proj", "attention.o_proj"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"),
                ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
            ):  # fmt: skip
                copied[f"blocks.{i}.{own}.{name}"] = given[f"{at}{key}.{name}"]
    load_state(ours, copied, source="transformers")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = theirs(x).last_hidden_state
        torch.testing.assert_close(ours(x), wanted[:, 0], atol=1e-5, rtol=1e-5)
        found = ours.forward_features(x).flatten(2).transpose(1, 2)
        torch.testing.assert_close(found, wanted[:, 1:], atol=1e-5, rtol=1e-5)


def test_places_are_resized_at_load_and_at_run_time() -> None:
    small, large = teacher(), teacher(crop=64)
    load_state(large, small.state_dict(), source="small")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(large(x), small(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match="whole patches"):
        small(torch.randn(1, 3, 36, 32))


def test_a_finer_map_is_averaged_and_a_coarser_one_interpolated() -> None:
    fine = torch.randn(2, 5, 8, 8)
    expected = fine.reshape(2, 5, 4, 2, 4, 2).mean(dim=(3, 5))
    torch.testing.assert_close(on_grid(fine, 4, 4), expected)
    assert on_grid(fine, 8, 8) is fine
    # bilinear between the centres of two cells: 1/4 and 3/4, held at the edges
    coarse = torch.tensor([[[[0.0, 4.0], [0.0, 4.0]]]])
    assert on_grid(coarse, 4, 4)[0, 0].tolist() == [[0.0, 1.0, 3.0, 4.0]] * 4
    with pytest.raises(ModelError, match="2x2 places says too little of 5x5 tokens"):
        on_grid(coarse, 5, 5)


class Maps(nn.Module):
    """Gives back what it sees."""

    def forward_features(self, x: Tensor) -> Tensor:
        return x


def test_a_network_without_attention_counts_by_energy() -> None:
    x = torch.randn(2, 3, 4, 4)
    (maps,), attention = image_targets(Maps(), x, layers=1)  # type: ignore[arg-type]
    assert maps is x
    torch.testing.assert_close(attention, (x**2).sum(dim=1))
    with pytest.raises(ModelError, match="after its last layer alone, not after 3"):
        image_targets(Maps(), x, layers=3)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no feature map"):
        image_targets(Maps(), x.flatten(2), layers=1)  # type: ignore[arg-type]
