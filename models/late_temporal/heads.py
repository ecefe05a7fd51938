"""What stands between a 3D network's last feature map and the classifier: six ways to put time together.

Paper: Kalfaoglu et al., arXiv 2008.01232, Table 1 and Table 2; sizes and order of layers as in
artest08/LateTemporalModeling3DCNN, where they were compared on 4 tokens of 512 from ResNeXt-101 with FRMB.

Every head maps (B, C, T', H', W') to the classifier's input (B, ``out_dim``) and holds the dropout before it (0.8 as
published). Space is averaged first, so that T' tokens of C remain; only the non-local block works on all positions.

Shape letters: B clips, C channels, T' frames of the feature map (tokens), H' W' its positions, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.late_temporal.bert import BertOptions, BertOutput, TemporalBert
from cliplift.models.protocol import ModelError, check_choices

HeadKind = Literal["tgap", "concat", "concat_fc", "lstm", "nonlocal_concat_fc", "bert"]
HEAD_KINDS: tuple[HeadKind, ...] = get_args(HeadKind)
PUBLISHED_WIDTHS = {"concat_fc": 1550, "lstm": 450, "nonlocal_concat_fc": 1000}
LSTM_LAYERS = 2


def tokens_of(maps: Tensor) -> Tensor:
    """(B, C, T', H', W') -> (B, T', C): the average over space."""
    return maps.flatten(3).mean(dim=3).transpose(1, 2)


class TemporalHead(nn.Module):
    """``forward(maps)``: (B, C, T', H', W') -> (B, out_dim), the classifier's input."""

    def __init__(self, *, dim: int, out_dim: int, dropout: float) -> None:
        super().__init__()
        self.dim, self.out_dim = dim, out_dim
        self.dropout = nn.Dropout(dropout)


class AveragePooling(TemporalHead):
    """Temporal global average pooling, what the paper replaces. Blind to order."""

    def __init__(self, *, dim: int, dropout: float) -> None:
        super().__init__(dim=dim, out_dim=dim, dropout=dropout)

    def forward(self, maps: Tensor) -> Tensor:
        return cast(Tensor, self.dropout(maps.flatten(2).mean(dim=2)))


class Concatenation(TemporalHead):
    """The tokens side by side: D = C T', channel-major; with ``width`` a linear layer after the dropout.

    There is no activation between that layer and the classifier in the public code, so none here.
    """

    def __init__(self, *, dim: int, tokens: int, dropout: float, width: int | None = None) -> None:
        super().__init__(dim=dim, out_dim=width or dim * tokens, dropout=dropout)
        self.tokens = tokens
        self.linear = nn.Identity() if width is None else nn.Linear(dim * tokens, width)

    def forward(self, maps: Tensor) -> Tensor:
        if maps.shape[2] != self.tokens:
            raise ModelError(
                f"a concatenating head built for {self.tokens} time steps got a feature map {tuple(maps.shape)}: "
                "build the model with the in_frames of these clips"
            )
        return cast(Tensor, self.linear(self.dropout(maps.flatten(3).mean(dim=3).flatten(1))))


class NonLocalBlock(nn.Module):
    """x + BN(W softmax(theta(x)^T phi(x) / sqrt(N)) g(x)) over all N = T' H' W' positions, identity at the start.

    Wang et al., "Non-local Neural Networks", arXiv 1711.07971, embedded Gaussian with as many inner channels as outer.
    The division by sqrt(N) is the late temporal code's; the paper has none.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g, self.theta, self.phi, self.out = (nn.Conv3d(channels, channels, 1) for _ in range(4))
        self.norm = nn.BatchNorm3d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T', H', W') -> the same."""
        theta, phi, g = (layer(x).flatten(2) for layer in (self.theta, self.phi, self.g))  # (B, C, N)
        weights = F.softmax(theta.transpose(1, 2) @ phi / math.sqrt(phi.shape[2]), dim=-1)  # (B, N, N)
        mixed = (weights @ g.transpose(1, 2)).transpose(1, 2).reshape(x.shape)
        return cast(Tensor, x + self.norm(self.out(mixed)))


class NonLocalConcatenation(Concatenation):
    """A non-local block on the feature map, then concatenation and a linear layer."""

    def __init__(self, *, dim: int, tokens: int, dropout: float, width: int) -> None:
        super().__init__(dim=dim, tokens=tokens, dropout=dropout, width=width)
        self.block = NonLocalBlock(dim)

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(self.block(maps))


class Lstm(TemporalHead):
    """Two LSTM layers over the tokens; the last output is the answer."""

    def __init__(self, *, dim: int, dropout: float, width: int) -> None:
        super().__init__(dim=dim, out_dim=width, dropout=dropout)
        self.lstm = nn.LSTM(dim, width, num_layers=LSTM_LAYERS, batch_first=True)

    def forward(self, maps: Tensor) -> Tensor:
        outputs, _ = self.lstm(tokens_of(maps).contiguous())
        return cast(Tensor, self.dropout(outputs[:, -1]))


class Bert(TemporalHead):
    """:class:`TemporalBert` over the tokens; the CLS output is the answer."""

    def __init__(self, *, dim: int, tokens: int, dropout: float, options: BertOptions) -> None:
        super().__init__(dim=dim, out_dim=dim, dropout=dropout)
        self.normalise_tokens = options.normalise_tokens
        self.bert = TemporalBert(dim, max_tokens=tokens, options=options)

    def forward(self, maps: Tensor) -> Tensor:
        return cast(Tensor, self.dropout(self.attend(maps).summary))

    def attend(self, maps: Tensor, *, return_attention: bool = False) -> BertOutput:
        """(B, C, T', H', W') -> the transformer's output before the classifier's dropout, attention on request."""
        tokens = tokens_of(maps)
        if self.normalise_tokens:
            tokens = tokens / torch.linalg.vector_norm(tokens, dim=-1, keepdim=True).clamp_min(1e-12)
        output: BertOutput = self.bert(tokens, return_attention=return_attention)
        return output


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """A temporal head by name, and what it takes beside the feature map's size.

    Attributes:
        kind: one of ``HEAD_KINDS``.
        dropout: before the classifier (before the linear layer where the head has one).
        width: outputs of ``concat_fc`` (1550), ``lstm`` (450) and ``nonlocal_concat_fc`` (1000); None is the published.
        bert: options of the ``bert`` head.
    """

    kind: HeadKind = "bert"
    dropout: float = 0.8
    width: int | None = None
    bert: BertOptions = field(default_factory=BertOptions)

    def build(self, *, dim: int, tokens: int) -> TemporalHead:
        """The head for ``dim`` channels and T' = ``tokens``; the concatenations need exactly that T', BERT at most it.

        Raises:
            ModelError: an unknown kind, a dropout outside [0, 1), or a width for a head that has none.
        """
        kind, dropout, width = self.kind, self.dropout, self.width
        check_choices(HeadKind, head=kind)
        if not 0 <= dropout < 1:
            raise ModelError(f"dropout={dropout} must be in [0, 1)")
        if width is not None and (kind not in PUBLISHED_WIDTHS or width < 1):
            raise ModelError(
                f"head {kind!r} with width={width}: {sorted(PUBLISHED_WIDTHS)} take one, at least 1"
            )
        inner = width or PUBLISHED_WIDTHS.get(kind, 0)
        if kind == "tgap":
            return AveragePooling(dim=dim, dropout=dropout)
        if kind == "nonlocal_concat_fc":
            return NonLocalConcatenation(dim=dim, tokens=tokens, dropout=dropout, width=inner)
        if kind == "lstm":
            return Lstm(dim=dim, dropout=dropout, width=inner)
        if kind == "bert":
            return Bert(dim=dim, tokens=tokens, dropout=dropout, options=self.bert)
        return Concatenation(dim=dim, tokens=tokens, dropout=dropout, width=inner or None)
