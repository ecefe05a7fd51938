"""Where TimeSformer's CLS token looks: per-head attention of one block, and attention rollout through all of them.

Rollout: Abnar, Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, arXiv 2005.00928, section 3: with the
attention of a layer averaged over its heads and half of it given to the residual, A' = (A + I) / 2, the output of
CLS is made of the input tokens in the shares CLS' row of A'_L ... A'_2 A'_1. Here every attention step of a block is
a layer of its own. CLS copied to G groups (the space step: one group per frame) is the mean of its copies, so its row
is the mean of theirs; where CLS takes no part in a step, its row is that of I.

The model itself never forms an attention matrix. Here q and k of every step are observed in one more forward pass, and
only CLS' row travels back through the steps, so that no more than a few rows of each head exist at a time.
Attention says which tokens are read, not what is made of them: the values, the Linear after an extra step (zero in a
model fresh from an image ViT) and the MLP do not count.

Shape letters: B clips, C channels, T frames, H W patches down and across, N tokens = 1 + T*H*W, A heads, G groups,
L tokens of a group, S keys.
"""

from __future__ import annotations

from functools import partial

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from cliplift.models.layers import evaluating
from cliplift.models.protocol import ModelError
from cliplift.models.timesformer.attention import Attention, Grid, from_groups, split_cls, to_groups
from cliplift.models.timesformer.model import TimeSformer

ELEMENTS = 2**25  # of attention weights held at a time: 128 MiB

Pair = tuple[Tensor, Tensor]  # q (G, A, L, D/A) and k (G, A, S, D/A) of one call
Seen = list[tuple[Attention, list[Pair]]]  # every attention step in order of the forward pass


def attention_rollout(model: nn.Module, clips: Tensor, *, scaled: bool = True) -> Tensor:
    """Shares of the input patches in the CLS token after the last block.

    Args:
        model: a TimeSformer; it is put into eval mode for the call and left as it was.
        clips: (B, C, T, H*P, W*P), normalised as for training.
        scaled: divide every clip's map by its maximum, for display. Otherwise the shares themselves, which add up
            to 1 with the share of CLS' own embedding.

    Returns:
        (B, T, H, W) float32 in [0, 1].

    Raises:
        ModelError: the model is not a TimeSformer, or the clips do not fit it.
    """
    net, grid, seen = _observe(model, clips)
    own = (1, *grid[1:]) if net.attention == "space" else grid
    sequences = len(clips) * grid[0] // own[0]  # the space scheme makes a sequence of every frame
    tokens = 1 + own[0] * own[1] * own[2]
    row = torch.zeros(sequences, tokens, device=clips.device)
    row[:, 0] = len(clips) / sequences  # the frames' CLS tokens are averaged
    for attention, pairs in reversed(seen):
        row = 0.5 * row + 0.5 * _back_through(row, attention, pairs, own)
    maps = row[:, 1:].reshape(len(clips), *grid)
    return _scale_to_peak(maps, dims=(1, 2, 3)) if scaled else maps


def head_maps(model: nn.Module, clips: Tensor, *, block: int = -1, scaled: bool = True) -> Tensor:
    """How much each head of one block's last attention step lets CLS read from each patch.

    Args:
        model, clips: as for :func:`attention_rollout`.
        block: index of the block; negative ones count from the last.
        scaled: divide every head's map by its maximum. Otherwise attention weights, averaged over the copies of CLS,
            which add up to 1 with the weight CLS gives itself.

    Returns:
        (B, A, T, H, W) float32 in [0, 1].

    Raises:
        ModelError: as :func:`attention_rollout`, or no such block.
    """
    net, grid, seen = _observe(model, clips)
    depth = len(net.blocks)
    if not -depth <= block < depth:
        raise ModelError(f"block={block} must be in [{-depth}, {depth - 1}]: the model has {depth} blocks")
    attention, pairs = seen[(block % depth + 1) * len(seen) // depth - 1]
    q, k = pairs[0]
    weights = _softmax(q[:, :, :1], k)[:, :, 0, 1:]  # (B*G, A, L)
    groups = len(weights) // len(clips)
    if net.attention in ("joint", "space"):  # the groups are the clips, or their frames in order
        maps = rearrange(weights, "(b g) a l -> b a (g l)", g=groups)
    else:
        maps = from_groups(rearrange(weights, "g a l -> g l a"), attention.step, grid).transpose(1, 2)
    maps = (maps / groups).unflatten(2, grid)  # type: ignore[no-untyped-call]
    return _scale_to_peak(maps, dims=(2, 3, 4)) if scaled else maps


def _observe(model: nn.Module, clips: Tensor) -> tuple[TimeSformer, Grid, Seen]:
    """One forward pass in eval mode, and what every attention step computed its weights from."""
    if not isinstance(model, TimeSformer):
        raise ModelError(f"attention maps need a TimeSformer, not a {type(model).__name__}")
    seen: Seen = []
    for block in model.blocks:
        seen += [(module, []) for module in block.modules() if isinstance(module, Attention)]
    handles = [
        attention.dot.register_forward_pre_hook(partial(_store_pair, pairs)) for attention, pairs in seen
    ]
    try:
        with torch.no_grad(), evaluating(model):
            _, patches = model.forward_tokens(clips)
    finally:
        for handle in handles:
            handle.remove()
    _, frames, rows, columns, _ = patches.shape
    return model, (frames, rows, columns), seen


def _store_pair(pairs: list[Pair], _: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    pairs.append((inputs[0], inputs[1]))


def _back_through(row: Tensor, attention: Attention, pairs: list[Pair], grid: Grid) -> Tensor:
    """``row`` (B, N) times the step's attention matrix (N, N), averaged over its heads."""
    if attention.step == "joint":
        return _weighted(row, *pairs[0])
    first, patches = split_cls(row.unsqueeze(-1))  # (B, 1, 1), (B, N-1, 1)
    grouped = to_groups(patches, attention.step, grid).squeeze(-1)  # (B*G, L)
    if attention.cls == "none":
        moved = from_groups(_weighted(grouped, *pairs[0]).unsqueeze(-1), attention.step, grid)
        return torch.cat([first, moved], dim=1).squeeze(-1)
    groups = len(grouped) // len(row)
    # what the copies of CLS hand back; where CLS attends to all tokens at once, its copies have no say
    share = first / groups if attention.cls == "copied" else torch.zeros_like(first)
    copies = repeat(share, "b one last -> (b g) (one last)", g=groups)
    back = _weighted(torch.cat([copies, grouped], dim=1), *pairs[0])  # (B*G, 1 + L)
    to_first = rearrange(back[:, 0], "(b g) -> b g", g=groups).sum(1)[:, None, None]
    to_patches = from_groups(back[:, 1:, None], attention.step, grid)
    result = torch.cat([to_first, to_patches], dim=1).squeeze(-1)
    return result + _weighted(row[:, :1], *pairs[1]) if attention.cls == "whole" else result


def _weighted(rows: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Sum over queries of ``rows`` (G, L) times their attention weights, averaged over heads: (G, S)."""
    total = torch.zeros(len(k), k.shape[2], device=k.device)
    at_once = max(1, ELEMENTS // (q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], at_once):
        part = slice(start, start + at_once)
        total += torch.einsum("gl,gals->gs", rows[:, part], _softmax(q[:, :, part], k))
    return total / q.shape[1]


def _softmax(q: Tensor, k: Tensor) -> Tensor:
    """(G, A, L, D/A), (G, A, S, D/A) -> (G, A, L, S) float32."""
    with torch.autocast(q.device.type, enabled=False):
        scores = q.float() @ k.float().transpose(-2, -1)
        weights: Tensor = (scores * q.shape[-1] ** -0.5).softmax(dim=-1)
        return weights


def _scale_to_peak(maps: Tensor, *, dims: tuple[int, ...]) -> Tensor:
    peak = maps.amax(dim=dims, keepdim=True)
    return maps / peak.clamp_min(torch.finfo(maps.dtype).tiny)
