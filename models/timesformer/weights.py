"""TimeSformer weights from other projects' formats, and the resizing of embeddings.

Our names are the released code's (facebookresearch/TimeSformer). Read besides:

* its ``.pyth`` files: names behind ``model.``;
* Hugging Face transformers;
* mmaction2 (mmaction/models/backbones/timesformer.py, heads/timesformer_head.py), whose time step is
  ``attentions.0`` and whose space step is ``attentions.1`` of a divided block, or ``attentions.0`` of any other;
* timm's image ViTs, whose blocks also start the extra attention steps (released code, ``load_pretrained``; the paper:
  "initialized with the same weights").

Shape letters: T frames, H W patches, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cliplift.models.protocol import ModelError
from cliplift.models.state_dicts import rename_key

PositionResize = Literal["bicubic", "nearest", "flat_nearest"]
TimeResize = Literal["linear", "nearest"]
Renames = Mapping[str, str]  # start of their name -> start of ours

HF_TOP: Renames = {
    "timesformer.embeddings.cls_token": "cls_token",
    "timesformer.embeddings.position_embeddings": "pos_embed",
    "timesformer.embeddings.time_embeddings": "time_embed",
    "timesformer.embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "timesformer.layernorm.": "norm.",
    "classifier.": "head.",
}
HF_BLOCK: Renames = {
    "temporal_attention.attention.qkv.": "temporal_attn.qkv.",
    "temporal_attention.output.dense.": "temporal_attn.proj.",
    "temporal_layernorm.": "temporal_norm1.",
    "temporal_dense.": "temporal_fc.",
    "attention.attention.qkv.": "attn.qkv.",
    "attention.output.dense.": "attn.proj.",
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
}
_MM_BLOCKS = "transformer_layers.layers."
_MM_TOP: Renames = {"cls_head.fc_cls.": "head.", "patch_embed.projection.": "patch_embed.proj."}
_MM_MLP: Renames = {"ffns.0.layers.0.0.": "mlp.fc1.", "ffns.0.layers.1.": "mlp.fc2."}
_MM_DIVIDED: Renames = {
    "attentions.0.norm.": "temporal_norm1.",
    "attentions.0.attn.in_proj_": "temporal_attn.qkv.",
    "attentions.0.attn.out_proj.": "temporal_attn.proj.",
    "attentions.0.temporal_fc.": "temporal_fc.",
    "attentions.1.norm.": "norm1.",
    "attentions.1.attn.in_proj_": "attn.qkv.",
    "attentions.1.attn.out_proj.": "attn.proj.",
    "ffns.0.norm.": "norm2.",
    **_MM_MLP,
}
_MM_PLAIN: Renames = {
    "norms.0.": "norm1.",
    "attentions.0.attn.in_proj_": "attn.qkv.",
    "attentions.0.attn.out_proj.": "attn.proj.",
    "norms.1.": "norm2.",
    **_MM_MLP,
}
_EXTRA = re.compile(r"(blocks\.\d+\.)(temporal|local|width)_(norm1|attn)(\..+)")
_ADDED = re.compile(r"time_embed|blocks\.\d+\.(temporal|local|width)_fc\.(weight|bias)")


def adapt_timesformer(
    state: Mapping[str, Tensor],
    *,
    own: Mapping[str, Tensor],
    grid: tuple[int, int, int],
    position_resize: PositionResize,
    time_resize: TimeResize,
) -> tuple[dict[str, Tensor], list[str]]:
    """Foreign weights under our names, completed and resized for a model.

    Args:
        state: tensors of any of the sources above, or ours.
        own: the model's state dict, for its names and shapes.
        grid: T, H, W of the model in patches.
        position_resize, time_resize: see :func:`resize_positions` and :func:`resize_times`.

    Returns:
        The tensors, and a note for every change.

    Raises:
        ModelError: position embeddings that are not of a square image.
    """
    given, notes = _rename_keys(state)
    # No extra steps and no time embedding: an image ViT, whose own attention the extra steps start from.
    if not any(_EXTRA.fullmatch(key) or key == "time_embed" for key in given):
        given = _complete_from_image(given, own, notes)
    source = given.get("pos_embed")
    if source is not None and source.shape[1] != own["pos_embed"].shape[1]:
        side = round((source.shape[1] - 1) ** 0.5)
        if side * side + 1 != source.shape[1]:
            raise ModelError(f"pos_embed {tuple(source.shape)} is not CLS and a square of patches")
        given["pos_embed"] = resize_positions(source, (side, side), grid[1:], how=position_resize)
        notes.append(
            f"resized pos_embed from {side}x{side} to {grid[1]}x{grid[2]} patches ({position_resize})"
        )
    times = given.get("time_embed")
    if times is not None and "time_embed" in own and times.shape[1] != grid[0]:
        given["time_embed"] = resize_times(times, grid[0], how=time_resize)
        notes.append(f"resized time_embed from {times.shape[1]} to {grid[0]} frames ({time_resize})")
    return given, notes


def resize_positions(
    pos: Tensor, old: tuple[int, int], new: tuple[int, int], *, how: PositionResize
) -> Tensor:
    """(1, 1 + H*W, D) for another grid of patches; CLS, the first, stays.

    ``flat_nearest`` is what the released code does at load time: nearest over the flattened sequence, as if it were a
    line. Rows of another length then start in the middle of old rows: going from 14x14 to 28x28, 7 % of the patches
    get the embedding that a nearest resize of the two axes gives them. It is there to start training from bit-equal
    weights, and for nothing else. ``nearest``, over the two axes, is what that code does at run time.
    """
    if tuple(old) == tuple(new):
        return pos
    first, rest = pos[:, :1], pos[:, 1:]
    if how == "flat_nearest":
        moved = F.interpolate(rest.transpose(1, 2), size=new[0] * new[1], mode="nearest").transpose(1, 2)
    else:
        plane = rest.transpose(1, 2).unflatten(2, old)  # type: ignore[no-untyped-call]
        aligned = {"align_corners": False} if how == "bicubic" else {}
        moved = F.interpolate(plane, size=new, mode=how, **aligned).flatten(2).transpose(1, 2)
    return torch.cat([first, moved], dim=1)


def resize_times(times: Tensor, frames: int, *, how: TimeResize) -> Tensor:
    """(1, T, D) for another number of frames."""
    if times.shape[1] == frames:
        return times
    return F.interpolate(times.transpose(1, 2), size=frames, mode=how).transpose(1, 2)


def _rename_keys(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    if any(key.startswith("timesformer.") for key in state):
        renamed = _rename_by_tables(state, "timesformer.encoder.layer.", HF_TOP, HF_BLOCK)
        return renamed, ["took Hugging Face's names"]
    if any(_MM_BLOCKS in key for key in state):
        bare = {key.removeprefix("backbone."): value for key, value in state.items()}
        block = _MM_DIVIDED if any(".attentions.1." in key for key in bare) else _MM_PLAIN
        return _rename_by_tables(bare, _MM_BLOCKS, _MM_TOP, block), ["took mmaction2's names"]
    if state and all(key.startswith("model.") for key in state):
        bare = {key.removeprefix("model."): value for key, value in state.items()}
        return bare, ["took the prefix 'model.' off the keys"]
    kept = {key: value for key, value in state.items() if not key.startswith("pre_logits.")}
    left = [
        key for key in state if key not in kept
    ]  # the layer before the ImageNet-21k head, as the head itself
    return kept, [f"left out {', '.join(left)}: part of the image classifier"] if left else []


def _rename_by_tables(
    state: Mapping[str, Tensor], blocks: str, top: Renames, block: Renames
) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        index, dot, inner = key.removeprefix(blocks).partition(".")
        inside = key.startswith(blocks) and bool(dot)
        renamed[f"blocks.{index}.{rename_key(inner, block)}" if inside else rename_key(key, top)] = value
    return renamed


def _complete_from_image(
    given: dict[str, Tensor], own: Mapping[str, Tensor], notes: list[str]
) -> dict[str, Tensor]:
    """Complete an image ViT: extra steps copy the spatial ones, their Linear and the time embedding are zero."""
    copied = zeroed = 0
    for key, value in own.items():
        match = _EXTRA.fullmatch(key)
        twin = f"{match[1]}{match[3]}{match[4]}" if match else ""
        if twin in given:
            given[key], copied = given[twin].clone(), copied + 1
        elif _ADDED.fullmatch(key):
            given[key], zeroed = torch.zeros_like(value), zeroed + 1
    if copied or zeroed:
        notes.append(
            f"image weights: {copied} tensors of extra attention copied from the spatial, {zeroed} zero"
        )
    return given
