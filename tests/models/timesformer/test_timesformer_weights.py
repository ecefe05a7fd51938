"""TimeSformer weights: exchanged with transformers, read from the released files, started from an image ViT."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models import ModelError, create_model
from cliplift.models.factory import load_pretrained
from cliplift.models.state_dicts import load_state
from cliplift.models.timesformer.huggingface import save_huggingface, to_huggingface


def small(scheme: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_classes": 5, "in_frames": 4, "crop": 48, "width": 32, "depth": 2, "heads": 4}
    return create_model("timesformer_base", attention=scheme, **{**sizes, **options}).eval()


def lively(module: nn.Module) -> nn.Module:
    """The module with nothing at zero."""
    torch.manual_seed(1)
    for p in module.parameters():
        nn.init.normal_(p, std=0.1)
    return module.eval()


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


@pytest.mark.parametrize("scheme", ["divided", "local_global", "axial", "joint", "space"])
def test_an_image_vit_fills_every_scheme(scheme: str, tmp_path: Path) -> None:
    """timm's names in a file: extra attention copied from the spatial, its Linear and the times zero, head fresh."""
    image = {k: torch.randn_like(v) for k, v in small("space", num_classes=7, crop=64).state_dict().items()}
    image |= {"pre_logits.fc.weight": torch.zeros(32, 32), "pre_logits.fc.bias": torch.zeros(32)}
    save_file(image, tmp_path / "vit.safetensors")
    model = lively(small(scheme, crop=64))
    report = load_pretrained(model, tmp_path / "vit.safetensors")
    assert report.head_fresh == ("head.weight", "head.bias")
    state = model.state_dict()
    for key, value in state.items():
        if key.startswith("head."):
            continue
        if key == "time_embed" or "_fc." in key:
            assert not value.any(), key
            continue
        twin = key.replace("temporal_", "").replace("local_", "").replace("width_", "")
        assert torch.equal(value, image[twin]), key


def test_the_released_files_names(tmp_path: Path) -> None:
    """facebookresearch/TimeSformer, ``.pyth``: one block and everything outside the blocks, spelled out."""
    linear = ("weight", "bias")
    inner = ("norm1", "attn.qkv", "attn.proj", "temporal_norm1", "temporal_attn.qkv", "temporal_attn.proj")
    inner += ("temporal_fc", "norm2", "mlp.fc1", "mlp.fc2")
    names = ["cls_token", "pos_embed", "time_embed"]
    names += [f"{layer}.{p}" for layer in ("patch_embed.proj", "norm", "head") for p in linear]
    names += [f"blocks.{i}.{layer}.{p}" for i in range(2) for layer in inner for p in linear]
    source = lively(small("divided")).state_dict()
    assert set(source) == set(names)
    content = {"epoch": 15, "model_state": {f"model.{k}": source[k] for k in names}, "cfg": "NUM_GPUS: 8"}
    torch.save(content, tmp_path / "TimeSformer_divST_8x32_224_K400.pyth")
    model = small("divided")
    report = load_pretrained(model, tmp_path / "TimeSformer_divST_8x32_224_K400.pyth")
    assert not report.head_fresh
    for key, value in model.state_dict().items():
        assert torch.equal(value, source[key]), key


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("space", {}, "attention='space'"),
        ("axial", {}, "attention='axial'"),
        ("divided", {"cls": "paper"}, "cls='paper'"),
        ("divided", {"num_classes": 0}, "needs a classifier"),
    ],
)
def test_what_transformers_cannot_load_is_refused(
    scheme: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        to_huggingface(small(scheme, **options))


def test_transformers_loads_an_exported_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = lively(small("divided"))
    folder = save_huggingface(ours, tmp_path / "hf")
    theirs = transformers.TimesformerForVideoClassification.from_pretrained(folder).eval()
    x = torch.randn(2, 3, 4, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2)).logits, atol=1e-5, rtol=0)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["image_std"]) == ([0.45] * 3, [0.225] * 3)
    assert processor["crop_size"] == {"height": 48, "width": 48}
    again = small("divided")  # and back
    load_pretrained(again, folder)
    for key, value in again.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key
