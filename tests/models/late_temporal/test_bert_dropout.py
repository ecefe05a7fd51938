"""Where the temporal BERT drops: with a rate of 1 a branch is nothing, and what is left can be written down."""

from __future__ import annotations

import torch

from cliplift.models.late_temporal.bert import Attention, FeedForward


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
