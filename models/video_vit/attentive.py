"""Attentive probe: a few transformer blocks and one learned query on top of frozen tokens, then a Linear.

Source: facebookresearch/vjepa2, src/models/attentive_pooler.py; V-JEPA 2, arXiv 2506.09985, section 5. A probe of n
blocks is n - 1 blocks of self-attention and one of cross-attention, whose single query collects the clip; the
attention inside the last has no output projection. One block (V-JEPA 1) is the query alone.

The probe has no positions of its own: the tokens already carry the encoder's.

Shape letters: B clips, N tokens (those of several clips of a video may stand side by side), D width, A heads,
K classes; of S ranks that share clips, n tokens on this one.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.protocol import ModelError
from cliplift.models.video_vit.blocks import (
    STD,
    BlockSpec,
    Deal,
    InitLinear,
    Mlp,
    TokenGroup,
    blocks,
    to_heads,
)
from cliplift.models.video_vit.weights import adapt_probe

PROBE_EPS = 1e-5  # LayerNorm's default, unlike the encoder's 1e-6 (released code)


class CrossAttention(nn.Module):
    """Queries attend to tokens; no output projection."""

    token_group: TokenGroup | None = None

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.q = InitLinear(spec.width, spec.width, init=spec.init)
        self.kv = InitLinear(spec.width, 2 * spec.width, init=spec.init)

    def forward(self, query: Tensor, x: Tensor, dealt: Deal | None = None) -> Tensor:
        """(B, Q, D) and (B, N, D), with ``dealt`` this rank's tokens (B, n, D), -> (B, Q, D)."""
        q = rearrange(self.q(query), "b q (a d) -> b a q d", a=self.heads)
        kv = rearrange(self.kv(x), "b n (two a d) -> two b a n d", two=2, a=self.heads)
        if dealt is None:
            k, v = kv.unbind()
            return rearrange(F.scaled_dot_product_attention(q, k, v), "b a q d -> b q (a d)")
        group = self.token_group
        assert group is not None
        # The queries are the same on all ranks: each computes those of its own heads.
        own = self.heads // group.size
        q = q[:, group.rank * own : (group.rank + 1) * own]
        k, v = to_heads(kv, group, dealt).unbind()
        y = F.scaled_dot_product_attention(q, k, v)
        rows = group.gather(rearrange(y, "b a q d -> a b q d"), (own,) * group.size)
        return rearrange(rows, "a b q d -> b q (a d)")


class CrossBlock(nn.Module):
    """Cross-attention with a residual around the query, then MLP."""

    def __init__(self, spec: BlockSpec, *, shrink: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.width, eps=spec.eps)
        self.xattn = CrossAttention(spec)
        self.norm2 = nn.LayerNorm(spec.width, eps=spec.eps)
        self.mlp = Mlp(spec, shrink=shrink)

    def forward(self, query: Tensor, x: Tensor, dealt: Deal | None = None) -> Tensor:
        """(B, Q, D) and (B, N, D) -> (B, Q, D)."""
        query = query + self.xattn(query, self.norm1(x), dealt)
        return query + cast(Tensor, self.mlp(self.norm2(query)))


class AttentivePooler(nn.Module):
    """(B, N, D) -> (B, D)."""

    def __init__(self, spec: BlockSpec, depth: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, spec.width), std=STD))
        self.blocks = blocks(spec, depth - 1)
        # the released code numbers this block as the last of the others
        self.cross_attention_block = CrossBlock(spec, shrink=math.sqrt(2 * max(depth - 1, 1)))

    def forward(self, x: Tensor, dealt: Deal | None = None) -> Tensor:
        """(B, N, D) -> (B, D)."""
        for block in self.blocks:
            x = block(x, None, dealt)
        query = self.query_tokens.expand(len(x), -1, -1)
        return cast(Tensor, self.cross_attention_block(query, x, dealt)[:, 0])


class AttentiveProbe(nn.Module):
    """Tokens to logits. 49,514,670 parameters for width 1024, 4 blocks and 174 classes.

    Args:
        width: D of the tokens; with several encoder levels, their tokens stand side by side along N.
        num_classes: K.
        heads: attention heads; 16 in V-JEPA 2.
        depth: blocks, the cross-attention included; 4 in V-JEPA 2, 1 in V-JEPA 1.
        hidden: width of the MLPs' hidden layer; 4 D if None.
    """

    checkpoint_parts = ("classifiers",)  # where V-JEPA's files keep the heads of one grid

    def __init__(
        self, width: int, *, num_classes: int, heads: int = 16, depth: int = 4, hidden: int | None = None
    ) -> None:
        super().__init__()
        if depth < 1 or num_classes < 1:
            raise ModelError(f"depth={depth} and num_classes={num_classes} must be 1 or more")
        spec = BlockSpec(width=width, heads=heads, hidden=hidden or 4 * width, eps=PROBE_EPS)
        self.pooler = AttentivePooler(spec, depth)
        self.linear = InitLinear(width, num_classes, init="truncated")

    def forward(self, x: Tensor, dealt: Deal | None = None) -> Tensor:
        """(B, N, D) -> (B, K); with ``dealt``, of this rank's tokens (B, n, D) and those of the others."""
        return cast(Tensor, self.linear(self.pooler(x, dealt)))

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Public weights under our names; see :mod:`cliplift.models.video_vit.weights`."""
        return adapt_probe(state)

    def checkpoint_blocks(self) -> list[str]:
        """The self-attention blocks."""
        return [f"pooler.blocks.{i}" for i in range(len(self.pooler.blocks))]
