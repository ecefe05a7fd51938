"""Where the temporal BERT drops: with a rate of 1 a branch is nothing, and what is left can be written down."""

from __future__ import annotations

import pytest
import torch

from cliplift.models.late_temporal.bert import Attention, BertBlock, BertOptions, FeedForward, TemporalBert


def test_attention_drops_its_weights() -> None:
    """No weight left: the output is the bias of its last layer alone, in training only."""
    layer = Attention(8, heads=2, dropout=1.0, init="bert5")
    x = torch.randn(2, 3, 8)
    assert torch.equal(layer(x, None)[0], layer.out.bias.expand(2, 3, 8))
    assert not torch.allclose(layer.eval()(x, None)[0], layer.out.bias.expand(2, 3, 8))


def test_the_feed_forward_drops_its_hidden_units() -> None:
    layer = FeedForward(8, dropout=1.0, init="bert5")
    x = torch.randn(2, 3, 8)
    assert torch.equal(layer(x), layer.contract.bias.expand(2, 3, 8))
    assert not torch.allclose(layer.eval()(x), layer.contract.bias.expand(2, 3, 8))


class Mask(torch.nn.Module):
    """In the place of one dropout: the n-th call multiplies by the n-th factor."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.factors = list(factors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factors.pop(0)


@pytest.mark.parametrize("factors", [(1, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0), (2, 3, 5)])
def test_a_block_drops_both_branches_and_its_output(factors: tuple[int, int, int]) -> None:
    """x + drop(attention), x + drop(feed-forward), drop(x): each draw is one of its own, in this order."""
    block = BertBlock(8, BertOptions(heads=2, dropout=0.0, norm="torch", init="bert5")).double()
    block.dropout = Mask(*factors)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    first = x + factors[0] * block.attention(block.attention_norm(x), None)[0]
    second = first + factors[1] * block.feed_forward(block.feed_forward_norm(first))
    torch.testing.assert_close(block(x, None)[0], factors[2] * second, rtol=0, atol=1e-12)
    assert block.dropout.factors == []


@pytest.mark.parametrize("dropout", [0.1, 0.4])
def test_the_rate_reaches_all_its_places(dropout: float) -> None:
    """Embeddings; and in each block the attention's weights, the feed-forward's hidden units and the block's own."""
    bert = TemporalBert(8, max_tokens=3, options=BertOptions(layers=2, heads=2, dropout=dropout))
    rates = {name: m.p for name, m in bert.named_modules() if isinstance(m, torch.nn.Dropout)}
    places = [
        f"blocks.{n}.{place}"
        for n in (0, 1)
        for place in ("attention.dropout", "feed_forward.dropout", "dropout")
    ]
    assert rates == dict.fromkeys(["dropout", *places], dropout)
    default = TemporalBert(8, max_tokens=3, options=BertOptions())
    assert {m.p for m in default.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}, (
        "the published code's"
    )


def test_embeddings_are_dropped_before_the_first_block() -> None:
    bert = TemporalBert(8, max_tokens=3, options=BertOptions(dropout=0.0, keep_probability=1.0))
    bert.dropout = Mask(0)
    with_zeros = bert.blocks[0](torch.zeros(2, 4, 8), None)[0]
    assert torch.equal(bert(torch.randn(2, 3, 8)).summary, with_zeros[:, 0])
