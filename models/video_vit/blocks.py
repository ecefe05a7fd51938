"""The transformer block that encoders, decoders, predictors and probes are built of.

Pre-norm: x + attention(LN(x)), then x + MLP(LN(x)); LayerNorm with eps 1e-6 unless given, GELU, scaled dot-product
attention over all tokens that are given.

Every layer initialises itself in its constructor, so that parameters may be partitioned away right after it.

Ranks may share the tokens of every clip (DeepSpeed-Ulysses, Jacobs et al., arXiv 2309.14509). Each has a run of them,
on which norms, Linears and MLPs are computed as ever. For attention the ranks exchange their tokens' queries, keys and
values, so that each has all tokens of its own heads, and then the outputs back.

Shape letters: B clips, N tokens, D width, A heads; of S ranks that share clips, n tokens on this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.layers import DropPath
from cliplift.models.protocol import ModelError
from cliplift.models.video_vit.positions import Rotation, rotate

QkvBias = Literal["full", "query_value"]
# "xavier": uniform (VideoMAE). "truncated": normal of standard deviation 0.02, and block i's two output layers divided
# by sqrt(2 (i + 1)) (V-JEPA).
Init = Literal["xavier", "truncated"]
Activation = Literal["gelu", "quick_gelu"]  # quick: x * sigmoid(1.702 x), CLIP's
STD = 0.02
QUICK = 1.702

Deal = tuple[int, ...]  # how many of a clip's tokens each rank of a group has, in the order of both


class TokenGroup(Protocol):
    """Ranks that share every clip. Every operation is collective, and has a gradient.

    What all ranks compute alike from the same values (``gather``, ``total``) has the same gradient on each. The mean
    over the ranks of what they minimise is then what one rank alone would minimise, and so are the gradients of the
    parameters, averaged over the ranks.
    """

    rank: int
    size: int

    def exchange(self, rows: Tensor, *, given: Sequence[int], taken: Sequence[int]) -> Tensor:
        """(sum of ``given``, ...), of which rank j gets the j-th ``given`` rows -> (sum of ``taken``, ...), the i-th
        ``taken`` rows from rank i."""
        ...

    def gather(self, rows: Tensor, lengths: Sequence[int]) -> Tensor:
        """(lengths[rank], ...) -> (sum of ``lengths``, ...): the rows of all ranks, used by all of them alike."""
        ...

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks, used by all of them alike."""
        ...


@runtime_checkable
class DealsTokens(Protocol):
    """A module whose training clips may be shared by several ranks."""

    def deal_tokens(self, group: TokenGroup | None) -> None:
        """Share every training clip with the ranks of a group, or with none. Raises ModelError where it cannot."""


def deal(tokens: int, size: int) -> Deal:
    """As evenly as whole tokens can be dealt to ``size`` ranks, the longer runs first."""
    each, more = divmod(tokens, size)
    return tuple(each + (rank < more) for rank in range(size))


def own_run(dealt: Deal, rank: int) -> slice:
    """The numbers of the tokens that a rank has."""
    first = sum(dealt[:rank])
    return slice(first, first + dealt[rank])


def to_heads(x: Tensor, group: TokenGroup, dealt: Deal) -> Tensor:
    """(M, B, A, n, d), all heads of own tokens -> (M, B, A/S, N, d), own heads of all tokens."""
    own, size = dealt[group.rank], group.size
    # tokens first: what comes from the ranks, one after the other, is then all tokens in order
    sent = rearrange(x, "m b (s a) n d -> (s n) m b a d", s=size)
    return rearrange(group.exchange(sent, given=(own,) * size, taken=dealt), "n m b a d -> m b a n d")


def to_tokens(y: Tensor, group: TokenGroup, dealt: Deal) -> Tensor:
    """(B, A/S, N, d), own heads of all tokens -> (B, n, A d), all heads of own tokens."""
    own, size = dealt[group.rank], group.size
    rows = group.exchange(rearrange(y, "b a n d -> n b a d"), given=dealt, taken=(own,) * size)
    return rearrange(rows, "(s n) b a d -> b n (s a d)", s=size)


class InitLinear(nn.Linear):
    """Linear with zero bias and one of the two initialisations; ``shrink`` divides the truncated normal one."""

    def __init__(
        self, inputs: int, outputs: int, *, init: Init, bias: bool = True, shrink: float = 1.0
    ) -> None:
        self.init, self.shrink = init, shrink  # read by reset_parameters, which the constructor calls
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        if self.init == "xavier":
            nn.init.xavier_uniform_(self.weight)
        else:
            nn.init.trunc_normal_(self.weight, std=STD)
            with torch.no_grad():
                self.weight.div_(self.shrink)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class QueryValueLinear(InitLinear):
    """Queries, keys and values in one product. Keys have no bias: it would add the same number to every score of a
    query, which the softmax takes away again (VideoMAE, after BEiT)."""

    def __init__(self, width: int, *, init: Init) -> None:
        super().__init__(width, 3 * width, init=init, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, 3D)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        return F.linear(x, self.weight, bias)


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """What all blocks of one transformer have in common. ``hidden``: width of the MLP's hidden layer."""

    width: int
    heads: int
    hidden: int
    qkv_bias: QkvBias = "full"
    init: Init = "truncated"
    eps: float = 1e-6
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        if min(self.width, self.heads, self.hidden) < 1 or self.width % self.heads:
            raise ModelError(
                f"width={self.width} must be a multiple of heads={self.heads}, and both positive"
            )
        if self.qkv_bias not in ("full", "query_value") or self.init not in ("xavier", "truncated"):
            raise ModelError(f"qkv_bias={self.qkv_bias!r}, init={self.init!r}: no such rule")

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class Attention(nn.Module):
    """Multi-head attention of all tokens over all tokens."""

    token_group: TokenGroup | None = None

    def __init__(self, spec: BlockSpec, *, shrink: float) -> None:
        super().__init__()
        self.heads = spec.heads
        self.qkv = (
            QueryValueLinear(spec.width, init=spec.init)
            if spec.qkv_bias == "query_value"
            else InitLinear(spec.width, 3 * spec.width, init=spec.init)
        )
        self.proj = InitLinear(spec.width, spec.width, init=spec.init, shrink=shrink)

    def forward(self, x: Tensor, rotation: Rotation | None = None, dealt: Deal | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); ``rotation`` turns queries and keys by their tokens' places.

        With ``dealt``, x and the result are the tokens of this rank, (B, n, D), and attend to those of all ranks.
        """
        q, k, v = rearrange(self.qkv(x), "b n (three a d) -> three b a n d", three=3, a=self.heads).unbind()
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if dealt is None:
            y = rearrange(F.scaled_dot_product_attention(q, k, v), "b a n d -> b n (a d)")
        else:
            assert self.token_group is not None
            q, k, v = to_heads(torch.stack([q, k, v]), self.token_group, dealt).unbind()
            y = to_tokens(F.scaled_dot_product_attention(q, k, v), self.token_group, dealt)
        return cast(Tensor, self.proj(y))


class Mlp(nn.Module):
    def __init__(self, spec: BlockSpec, *, shrink: float) -> None:
        super().__init__()
        self.activation = spec.activation
        self.fc1 = InitLinear(spec.width, spec.hidden, init=spec.init)
        self.fc2 = InitLinear(spec.hidden, spec.width, init=spec.init, shrink=shrink)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = self.fc1(x)
        x = F.gelu(x) if self.activation == "gelu" else x * torch.sigmoid(QUICK * x)
        return cast(Tensor, self.fc2(x))


class Block(nn.Module):
    """Attention, then MLP. ``index`` counts the blocks of its transformer from 0, for the initialisation."""

    def __init__(self, spec: BlockSpec, *, index: int = 0, drop_path: float = 0.0) -> None:
        super().__init__()
        shrink = math.sqrt(2 * (index + 1))
        self.norm1 = nn.LayerNorm(spec.width, eps=spec.eps)
        self.attn = Attention(spec, shrink=shrink)
        self.norm2 = nn.LayerNorm(spec.width, eps=spec.eps)
        self.mlp = Mlp(spec, shrink=shrink)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rotation: Rotation | None = None, dealt: Deal | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); with ``dealt``, of this rank's tokens (B, n, D)."""
        x = x + self.drop_path(self.attn(self.norm1(x), rotation, dealt))
        return x + cast(Tensor, self.drop_path(self.mlp(self.norm2(x))))


def blocks(spec: BlockSpec, depth: int, *, drop_path: float = 0.0) -> nn.ModuleList:
    """``depth`` blocks whose drop-path rates rise linearly from 0 to ``drop_path``."""
    if not 0 <= drop_path < 1:
        raise ModelError(f"drop_path={drop_path} must be in [0, 1)")
    rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
    return nn.ModuleList(Block(spec, index=i, drop_path=rate) for i, rate in enumerate(rates))


def gather_tokens(x: Tensor, numbers: Tensor) -> Tensor:
    """Tokens (B, N, D) or a table (N, D), at ``numbers`` (B, n) -> (B, n, D)."""
    if x.ndim == 2:
        return x[numbers]
    return x.gather(1, numbers[..., None].expand(-1, -1, x.shape[-1]))
