"""One BERT layer over the frames' features: attention instead of averaging as the last temporal step.

Paper: Kalfaoglu et al., "Late Temporal Modeling in 3D CNN Architectures with BERT for Action Recognition", arXiv
2008.01232, section 3. The weights' layout is that of artest08/LateTemporalModeling3DCNN, whose layer is a pre-norm
encoder block with residuals that the paper's formula for y_cls leaves out:

    x = [CLS, tokens] + positions
    x = x + drop(attention(norm(x))),  x = x + drop(feed_forward(norm(x))),  x = drop(x)        once per layer
    y = x[CLS]                                                              no normalisation after the last layer

Shape letters: B clips, N tokens (T' of the feature map), S = N + 1 with the CLS token, D width, h heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.protocol import ModelError, check_choices

Positions = Literal["learned", "sinusoidal", "none"]
Norm = Literal["original", "torch"]
Init = Literal["bert5", "bert2"]

FEED_FORWARD_RATIO = 4
SINUSOID_BASE = 64.0  # of the public code; 10000 in "Attention is all you need", for far longer sequences


@dataclass(frozen=True, kw_only=True)
class BertOptions:
    """Options of :class:`TemporalBert`.

    Attributes:
        layers, heads: encoder layers and attention heads (paper's Table 2: 1 and 8 are best).
        cls_token: a learned token collects the answer; without it the output tokens are averaged.
        positions: "learned", "sinusoidal" (not trained), or "none" (then the order of the frames is unknowable).
        keep_probability: in training every key token is kept with this probability, drawn once per clip for all
            layers, heads and queries; CLS is always kept. Nothing is masked in eval mode.
        dropout: on embeddings, attention weights, both branches, inside the feed-forward and on the block's output.
        norm: "original" (see :class:`OriginalLayerNorm`; needed for the published weights) or "torch".
        init: "bert5" (ResNeXt, R(2+1)D, SlowFast: CLS and positions N(0, 0.02)) or "bert2" (I3D: CLS and positions
            N(0, 1/sqrt(D)), linear layers N(0, 0.02)).
        normalise_tokens: divide every token by its L2 norm before BERT (I3D; the others feed raw averages).
    """

    layers: int = 1
    heads: int = 8
    cls_token: bool = True
    positions: Positions = "learned"
    keep_probability: float = 0.8
    dropout: float = 0.1
    norm: Norm = "original"
    init: Init = "bert5"
    normalise_tokens: bool = False

    def check(self, dim: int) -> None:
        """Raises ModelError for options that tokens of width ``dim`` cannot have."""
        if self.layers < 1 or self.heads < 1 or dim % self.heads:
            raise ModelError(
                f"BERT head: layers={self.layers} and heads={self.heads} must be at least 1, heads a divisor of {dim}"
            )
        if not 0 < self.keep_probability <= 1 or not 0 <= self.dropout < 1:
            raise ModelError(
                f"BERT head: keep_probability={self.keep_probability} must be in (0, 1] and dropout={self.dropout} "
                "in [0, 1)"
            )
        check_choices(Positions, positions=self.positions)
        check_choices(Norm, norm=self.norm)
        check_choices(Init, init=self.init)


class BertOutput(NamedTuple):
    """``summary`` (B, D): the CLS token, or the mean over tokens without one. ``tokens`` (B, N, D): the others.

    ``attention``: one (B, h, S, S) per layer, rows are queries, each sums to 1; empty unless asked for.
    """

    summary: Tensor
    tokens: Tensor
    attention: tuple[Tensor, ...]


class OriginalLayerNorm(nn.Module):
    """weight * (x - mean) / (std + eps) + bias, with the unbiased std and eps added to it, as in the public code.

    ``nn.LayerNorm`` divides by sqrt(biased variance + eps) instead: for D = 512 its output is larger by 0.1 %.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D); D must be at least 2."""
        std, mean = torch.std_mean(x, dim=-1, keepdim=True, correction=1)
        return self.weight * (x - mean) / (std + self.eps) + self.bias


class BertLinear(nn.Linear):
    """Linear with PyTorch's own initialisation ("bert5"), or N(0, 0.02) and zero bias ("bert2")."""

    def __init__(self, in_features: int, out_features: int, *, init: Init) -> None:
        self.init = init  # read by reset_parameters, which the constructor calls
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        if self.init == "bert5":
            super().reset_parameters()
        else:
            nn.init.normal_(self.weight, std=0.02)
            nn.init.zeros_(self.bias)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(D/h)) v with h heads; masked keys get no weight from any query."""

    def __init__(self, dim: int, *, heads: int, dropout: float, init: Init) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (BertLinear(dim, dim, init=init) for _ in range(4))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, S, D), keep (B, S) bool or None -> (B, S, D) and the weights (B, h, S, S) before dropout."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, h, S, D/h)
            for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if keep is not None:
            # The lowest finite number, not -inf: a row without any key left becomes uniform instead of NaN.
            scores = scores.masked_fill(~keep[:, None, None, :], torch.finfo(scores.dtype).min)
        weights = F.softmax(scores, dim=-1)
        mixed: Tensor = self.out((self.dropout(weights) @ v).transpose(1, 2).flatten(2))
        return mixed, weights


class FeedForward(nn.Sequential):
    """(B, S, D) -> (B, S, D) through 4 D, GELU in its tanh form."""

    def __init__(self, dim: int, *, dropout: float, init: Init) -> None:
        super().__init__()
        self.expand = BertLinear(dim, FEED_FORWARD_RATIO * dim, init=init)
        self.gelu = nn.GELU(approximate="tanh")
        self.dropout = nn.Dropout(dropout)
        self.contract = BertLinear(FEED_FORWARD_RATIO * dim, dim, init=init)


class BertBlock(nn.Module):
    """Pre-norm attention and feed-forward, each with dropout on its branch, and dropout on the block's output."""

    def __init__(self, dim: int, options: BertOptions) -> None:
        super().__init__()
        dropout, init = options.dropout, options.init
        self.attention_norm = _norm(dim, options.norm)
        self.attention = Attention(dim, heads=options.heads, dropout=dropout, init=init)
        self.feed_forward_norm = _norm(dim, options.norm)
        self.feed_forward = FeedForward(dim, dropout=dropout, init=init)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> (B, S, D) and the attention weights (B, h, S, S)."""
        mixed, weights = self.attention(self.attention_norm(x), keep)
        x = x + self.dropout(mixed)
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return self.dropout(x), weights


class TemporalBert(nn.Module):
    """``forward(tokens)``: (B, N, D) -> :class:`BertOutput`, for any N up to ``max_tokens``.

    Args:
        dim: width D of the tokens.
        max_tokens: N of a whole clip; a position is learned for each, and one for CLS.

    Raises:
        ModelError: an impossible option; and in ``forward`` more than ``max_tokens`` tokens.
    """

    def __init__(self, dim: int, *, max_tokens: int, options: BertOptions) -> None:
        super().__init__()
        options.check(dim)
        self.dim, self.max_tokens, self.keep_probability = dim, max_tokens, options.keep_probability
        std = 0.02 if options.init == "bert5" else dim**-0.5
        length = max_tokens + int(options.cls_token)
        self.cls_token = _normal(1, 1, dim, std=std) if options.cls_token else None
        if options.positions == "learned":
            self.positions: Tensor | None = _normal(1, length, dim, std=std)
        else:
            table = sinusoids(length, dim)[None] if options.positions == "sinusoidal" else None
            self.register_buffer("positions", table, persistent=False)
        self.dropout = nn.Dropout(options.dropout)
        self.blocks = nn.ModuleList(BertBlock(dim, options) for _ in range(options.layers))

    def forward(self, tokens: Tensor, *, return_attention: bool = False) -> BertOutput:
        """(B, N, D) -> :class:`BertOutput`."""
        if tokens.ndim != 3 or tokens.shape[2] != self.dim or not 1 <= tokens.shape[1] <= self.max_tokens:
            raise ModelError(
                f"TemporalBert takes (B, N, {self.dim}) with N up to {self.max_tokens}, got {tuple(tokens.shape)}: "
                "build the model with the in_frames of these clips"
            )
        x = tokens
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x), dim=1)
        if self.positions is not None:
            x = x + self.positions[:, : x.shape[1]]
        x = self.dropout(x)
        keep = self._draw_mask(x) if self.training and self.keep_probability < 1 else None
        attention = []
        for block in self.blocks:
            x, weights = block(x, keep)
            attention.append(weights)
        summary = x.mean(dim=1) if self.cls_token is None else x[:, 0]
        rest = x if self.cls_token is None else x[:, 1:]
        return BertOutput(summary, rest, tuple(attention) if return_attention else ())

    def _draw_mask(self, x: Tensor) -> Tensor:
        keep = torch.rand(x.shape[:2], device=x.device) < self.keep_probability  # (B, S)
        if self.cls_token is not None:
            keep[:, 0] = True
        return keep


def sinusoids(length: int, dim: int) -> Tensor:
    """(length, dim): sine in even columns, cosine in odd ones, of position / 64^(column / dim)."""
    position = torch.arange(length, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32) * (-math.log(SINUSOID_BASE) / dim))
    table = torch.zeros(length, dim)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate[: dim // 2])
    return table


def _normal(*shape: int, std: float) -> nn.Parameter:
    return nn.Parameter(nn.init.normal_(torch.empty(*shape), std=std))


def _norm(dim: int, kind: Norm) -> nn.Module:
    return OriginalLayerNorm(dim) if kind == "original" else nn.LayerNorm(dim, eps=1e-6)
