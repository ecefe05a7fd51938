"""mmaction2's TimeSformer files: a stand-in with their names, computing with torch.nn.MultiheadAttention."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cliplift.models import ModelError, create_model
from cliplift.models.factory import load_pretrained


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


class MmTime(nn.Module):
    """mmaction2's step over time, by its names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.temporal_fc = nn.Linear(width, width)


class MmSpace(nn.Module):
    def __init__(self, width: int, heads: int, *, own_norm: bool) -> None:
        super().__init__()
        if own_norm:
            self.norm = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)


class MmFfn(nn.Module):
    def __init__(self, width: int, *, own_norm: bool) -> None:
        super().__init__()
        if own_norm:
            self.norm = nn.LayerNorm(width, eps=1e-6)
        inner = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.0))
        self.layers = nn.Sequential(inner, nn.Linear(4 * width, width), nn.Dropout(0.0))


class MmBlock(nn.Module):
    def __init__(self, width: int, heads: int, *, divided: bool) -> None:
        super().__init__()
        space = MmSpace(width, heads, own_norm=divided)
        self.attentions = nn.ModuleList([MmTime(width, heads), space] if divided else [space])
        self.ffns = nn.ModuleList([MmFfn(width, own_norm=divided)])
        norms = [] if divided else [nn.LayerNorm(width, eps=1e-6) for _ in range(2)]
        self.norms = nn.ModuleList(norms)

    def forward(self, z: Tensor, frames: int) -> Tensor:
        """(B, 1 + H*W*T, D), the frames of a patch side by side."""
        if len(self.attentions) == 1:  # joint, or one frame
            x = self.norms[0](z)
            z = z + self.attentions[0].attn(x, x, x)[0]
            return z + self.ffns[0].layers(self.norms[1](z))
        time, space = self.attentions
        B, D = len(z), z.shape[-1]
        cls, x = z[:, :1], z[:, 1:]
        series = time.norm(x.reshape(-1, frames, D))
        x = x + time.temporal_fc(time.attn(series, series, series)[0]).reshape(B, -1, D)
        by_frame = x.reshape(B, -1, frames, D).transpose(1, 2)  # (B, T, H*W, D)
        new, updates = torch.empty_like(by_frame), []
        for t in range(frames):
            y = space.norm(torch.cat([cls, by_frame[:, t]], dim=1))
            y = space.attn(y, y, y)[0]
            updates.append(y[:, :1])
            new[:, t] = by_frame[:, t] + y[:, 1:]
        cls = cls + sum(updates) / frames
        z = torch.cat([cls, new.transpose(1, 2).reshape(B, -1, D)], dim=1)
        return z + self.ffns[0].layers(self.ffns[0].norm(z))


class MmModel(nn.Module):
    """mmaction2's recognizer: the parameter names of its files, the arithmetic of torch.nn.MultiheadAttention."""

    def __init__(
        self, *, scheme: str, width: int, heads: int, depth: int, grid: tuple[int, int, int]
    ) -> None:
        super().__init__()
        frames, rows, columns = grid
        self.scheme, self.frames = scheme, frames
        body = nn.Module()
        body.patch_embed = nn.Module()
        body.patch_embed.projection = nn.Conv2d(3, width, 16, stride=16)
        body.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        body.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows * columns, width))
        if scheme != "space":
            body.time_embed = nn.Parameter(torch.zeros(1, frames, width))
        body.transformer_layers = nn.Module()
        blocks = [MmBlock(width, heads, divided=scheme == "divided") for _ in range(depth)]
        body.transformer_layers.layers = nn.ModuleList(blocks)
        body.norm = nn.LayerNorm(width, eps=1e-6)
        self.backbone = body
        self.cls_head = nn.Module()
        self.cls_head.fc_cls = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, K)."""
        body, B, T = self.backbone, len(x), self.frames
        maps = body.patch_embed.projection(x.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
        z = torch.cat([body.cls_token.expand(B * T, -1, -1), maps], dim=1) + body.pos_embed
        if self.scheme != "space":
            cls, patches = z[::T, :1], z[:, 1:].unflatten(0, (B, T)).transpose(1, 2) + body.time_embed
            z = torch.cat([cls, patches.flatten(1, 2)], dim=1)
        for block in body.transformer_layers.layers:
            z = block(z, T)
        if self.scheme == "space":
            z = z.unflatten(0, (B, T)).mean(1)
        return self.cls_head.fc_cls(body.norm(z)[:, 0])


@pytest.mark.parametrize("scheme", ["divided", "joint", "space"])
def test_mmaction2_files_give_mmaction2_logits(scheme: str, tmp_path: Path) -> None:
    theirs = lively(MmModel(scheme=scheme, width=32, heads=4, depth=2, grid=(4, 3, 3)))
    names = set(theirs.state_dict())
    assert "backbone.transformer_layers.layers.0.attentions.0.attn.in_proj_weight" in names
    assert ("backbone.transformer_layers.layers.1.attentions.0.temporal_fc.bias" in names) == (
        scheme == "divided"
    )
    meta = {"mmaction_version": "1.0.0", "epoch": 15}
    torch.save({"meta": meta, "state_dict": theirs.state_dict()}, tmp_path / "timesformer.pth")
    model = small(scheme)
    report = load_pretrained(model, tmp_path / "timesformer.pth")
    assert "took mmaction2's names" in report.notes
    assert not report.head_fresh
    x = torch.randn(2, 3, 4, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x), atol=1e-5, rtol=0)


def test_an_unknown_mmaction2_key_is_refused_by_name(tmp_path: Path) -> None:
    state = MmModel(scheme="joint", width=32, heads=4, depth=2, grid=(4, 3, 3)).state_dict()
    state["backbone.transformer_layers.layers.0.gate"] = torch.zeros(1)
    torch.save({"state_dict": state}, tmp_path / "odd.pth")
    with pytest.raises(ModelError, match=r"1 unexpected \(blocks.0.gate\)"):
        load_pretrained(small("joint"), tmp_path / "odd.pth")


def test_an_image_vit_by_mmaction2_names_starts_divided_attention(tmp_path: Path) -> None:
    """The files its own training starts from: no prefix, no head, one attention a block."""
    image = lively(MmModel(scheme="space", width=32, heads=4, depth=2, grid=(1, 3, 3))).backbone.state_dict()
    torch.save(image, tmp_path / "vit_base_patch16_224.pth")
    model = small("divided")
    load_pretrained(model, tmp_path / "vit_base_patch16_224.pth")
    state = model.state_dict()
    for i in range(2):
        source = image[f"transformer_layers.layers.{i}.attentions.0.attn.in_proj_weight"]
        assert torch.equal(state[f"blocks.{i}.attn.qkv.weight"], source)
        assert torch.equal(state[f"blocks.{i}.temporal_attn.qkv.weight"], source)
        assert torch.equal(
            state[f"blocks.{i}.temporal_norm1.weight"], image[f"transformer_layers.layers.{i}.norms.0.weight"]
        )
        assert not state[f"blocks.{i}.temporal_fc.weight"].any()
