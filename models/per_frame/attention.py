"""Attention over a few states, with the weights given back: dot product, scaled or not, and additive.

Dot product over encoder states, with a decoder's state as query:

    score_j = q . k_j        a = softmax(score)        out = sum_j a_j v_j

``scaled=True`` divides the scores by sqrt(D) (Vaswani et al., arXiv 1706.03762); without it this is
``F.scaled_dot_product_attention(scale=1.0)``, which does not give back the weights that are shown to users.

Shape letters: B clips, Q queries, N keys, D width, A attention width, T frames.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from cliplift.models.protocol import ModelError


def softmax_of_real(scores: Tensor, mask: Tensor | None) -> Tensor:
    """(..., N) -> softmax over N of the places where ``mask`` (broadcast) is True, 0 elsewhere.

    Where no place is real, all weights are 0, so that a query without keys answers zero.
    """
    if mask is None:
        return scores.softmax(dim=-1)
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask, lowest).softmax(dim=-1) * mask


def dot_product_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None = None,
    *,
    scaled: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by dot product.

    Args:
        query: (B, Q, D).
        keys: (B, N, D).
        values: (B, N, V); None takes the keys.
        scaled: divide the scores by sqrt(D).
        mask: bool (B, N), True for real keys; None means all.

    Returns:
        (B, Q, V) and the weights (B, Q, N), whose rows sum to 1 (to 0 where a clip has no real key).

    Raises:
        ModelError: widths or lengths that do not fit.
    """
    values = keys if values is None else values
    if query.shape[-1] != keys.shape[-1] or keys.shape[:2] != values.shape[:2]:
        raise ModelError(
            f"attention: query {tuple(query.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} "
            "do not fit; they must be (B, Q, D), (B, N, D) and (B, N, V)"
        )
    scores = query @ keys.transpose(1, 2)  # (B, Q, N)
    if scaled:
        scores = scores / math.sqrt(keys.shape[-1])
    weights = softmax_of_real(scores, None if mask is None else mask[:, None, :])
    return weights @ values, weights


class AdditiveScore(nn.Module):
    """e_i = w . tanh(W_k k_i + b + W_q q) + c: the score of the released visual-attention code (``actrec.py``).

    ``forward(query, projected)``: (B, D), (B, N, A) -> (B, N); ``projected`` is :meth:`project` of the keys, made once
    for all queries.
    """

    def __init__(self, query_dim: int, key_dim: int, width: int) -> None:
        super().__init__()
        self.keys = nn.Linear(key_dim, width)
        self.query = nn.Linear(query_dim, width, bias=False)
        self.out = nn.Linear(width, 1)

    def project(self, keys: Tensor) -> Tensor:
        """(..., N, D) -> (..., N, A)."""
        return cast(Tensor, self.keys(keys))

    def forward(self, query: Tensor, projected: Tensor) -> Tensor:
        scores: Tensor = self.out((projected + self.query(query)[:, None]).tanh())
        return scores[..., 0]


class ProductScore(nn.Module):
    """e_i = w . (tanh(W_q q) * tanh(W_k k_i)): the score of MultiLSTM (arXiv 1507.05738).

    ``forward(query, projected)``: (B, D), (B, N, A) -> (B, N).
    """

    def __init__(self, query_dim: int, key_dim: int, width: int) -> None:
        super().__init__()
        self.keys = nn.Linear(key_dim, width, bias=False)
        self.query = nn.Linear(query_dim, width, bias=False)
        self.out = nn.Linear(width, 1, bias=False)

    def project(self, keys: Tensor) -> Tensor:
        """(..., N, D) -> (..., N, A)."""
        return cast(Tensor, self.keys(keys).tanh())

    def forward(self, query: Tensor, projected: Tensor) -> Tensor:
        scores: Tensor = self.out(projected * self.query(query).tanh()[:, None])
        return scores[..., 0]


class DotScore(nn.Module):
    """e_i = (W_q q) . k_i, the query brought to the keys' width; ``scaled`` divides by its square root.

    ``forward(query, keys)``: (B, D'), (B, N, D) -> (B, N).
    """

    def __init__(self, query_dim: int, key_dim: int, *, scaled: bool = False) -> None:
        super().__init__()
        self.query = nn.Linear(query_dim, key_dim, bias=False)
        self.factor = 1 / math.sqrt(key_dim) if scaled else 1.0

    def project(self, keys: Tensor) -> Tensor:
        """The keys themselves."""
        return keys

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        return torch.einsum("bd,bnd->bn", self.query(query), keys) * self.factor
