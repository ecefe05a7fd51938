"""Beyond Short Snippets, the recurrent network: five LSTM layers over the frames, a softmax at every one.

Paper: Ng et al., "Beyond Short Snippets: Deep Networks for Video Classification", arXiv 1503.08909, section 3.2. Five
layers of 512 cells on the 4096 features of the frame network; the loss of frame t counts t / T, as later frames have
seen more; the predictions of all frames are combined in one of four ways.

The poolings of the same paper are in :mod:`cliplift.models.per_frame.snippets`.

Shape letters: B clips, C channels, T frames, D encoder width, H' W' its grid, K classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from cliplift.models.convrnn.fc_lstm import FCLSTM, Peephole
from cliplift.models.per_frame.frame_sequence import (
    FrameSequence,
    averaged_predictions,
    frame_encoder,
    real_weights,
    step_losses,
)
from cliplift.models.per_frame.lstm import LSTM
from cliplift.models.registry import ModelError, register_model

Gain = Literal["linear", "uniform", "last"]
Combine = Literal["last", "max", "sum", "weighted_sum"]


class SnippetsLSTM(FrameSequence):
    """Five LSTM layers over the frames' features, a softmax at every frame.

    Args:
        encoder: the frame network, read at its last layer before the classifier.
        hidden, layers: 512 and 5 in the paper.
        peephole: "none", whose count the accounts of the paper give, or "diagonal" as in Graves (arXiv 1308.0850), to
            whom the paper refers for its cell; :class:`FCLSTM <cliplift.models.convrnn.fc_lstm.FCLSTM>` has no fused kernel.
        gain: "linear" weighs the loss of frame t (counted from 1) by t / T; "uniform" by 1; "last" counts the last
            frame alone. The paper found linear to train faster and better.
        combine: how the predictions of all frames become the clip's: "last" frame, "max" over time, "sum", or
            "weighted_sum" by t / T. Within 1 % of each other in the paper; the weighted sum is usually best.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        num_classes: int,
        in_frames: int,
        hidden: int = 512,
        layers: int = 5,
        peephole: Peephole = "none",
        gain: Gain = "linear",
        combine: Combine = "weighted_sum",
        dropout: float = 0.0,
        train_encoder: bool = True,
        multi_label: bool = False,
    ) -> None:
        super().__init__(encoder, in_frames=in_frames, train_encoder=train_encoder, multi_label=multi_label)
        if gain not in ("linear", "uniform", "last"):
            raise ModelError(f"gain={gain!r} must be 'linear', 'uniform' or 'last'")
        if combine not in ("last", "max", "sum", "weighted_sum"):
            raise ModelError(f"combine={combine!r} must be 'last', 'max', 'sum' or 'weighted_sum'")
        self.gain, self.combine = gain, combine
        self.lstm = (
            LSTM(self.encoder_dim, hidden, layers=layers)
            if peephole == "none"
            else FCLSTM(self.encoder_dim, [hidden] * layers, peephole=peephole)
        )
        self.dropout = nn.Dropout(dropout)
        self.feature_dim = hidden
        self.reset_classifier(num_classes)

    def step_features(self, maps: Tensor) -> Tensor:
        """(B, D, T, H', W') -> (B, T, hidden)."""
        outputs: Tensor = self.lstm(self.dropout(self.frame_vectors(maps)))[0]
        return outputs

    def step_logits(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, T, K)."""
        logits: Tensor = self.head(self.step_features(self.forward_features(x)))
        return logits

    def clip_features(self, maps: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """(B, D, T, H', W') -> (B, hidden): the steps' outputs weighted as their losses are."""
        features = self.step_features(maps)
        weights = step_gains(features, lengths, self.gain)[..., None]
        return (features * weights).sum(dim=1) / weights.sum(dim=1)

    def clip_logits(self, maps: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        logits = self.head(self.step_features(maps))
        return combined(logits, lengths, self.combine, multi_label=self.multi_label)

    def loss(self, x: Tensor, labels: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Mean over the real frames of gain x loss; labels as in :func:`step_losses`."""
        logits = self.step_logits(x)
        losses = step_losses(logits, labels, multi_label=self.multi_label)
        weighted = losses * step_gains(logits, lengths, self.gain)
        return weighted.sum() / real_weights(lengths, logits).sum()


def step_gains(steps: Tensor, lengths: Tensor | None, gain: Gain) -> Tensor:
    """float (B, T) for steps (B, T, ...): the gain of every frame, 0 for padding.

    Linear: t / T with frames counted from 1 and T the real frames of the clip, so that the last one counts 1.
    """
    real = real_weights(lengths, steps)
    count = torch.arange(1, real.shape[1] + 1, device=real.device)[None, :]
    total = real.sum(dim=1, keepdim=True)
    if gain == "uniform":
        return real
    if gain == "last":
        return real * (count == total)
    return real * count / total


def combined(logits: Tensor, lengths: Tensor | None, combine: Combine, *, multi_label: bool) -> Tensor:
    """(B, T, K) -> (B, K): logits whose softmax (sigmoid) is the combined prediction.

    The maximum over time of softmax outputs sums to more than 1; the softmax of its logarithm scales it back.
    """
    if combine == "max":
        scores = logits.float() if multi_label else logits.float().log_softmax(dim=-1)
        return scores.masked_fill(real_weights(lengths, logits)[..., None] == 0, -torch.inf).amax(dim=1)
    gains: dict[Combine, Gain] = {"last": "last", "sum": "uniform", "weighted_sum": "linear"}
    return averaged_predictions(logits, step_gains(logits, lengths, gains[combine]), multi_label=multi_label)


@register_model(paper="Ng et al. 2015, LSTM", default_classes=487)
def snippets_lstm(
    *,
    num_classes: int = 487,
    in_frames: int = 30,
    encoder: str = "efficientnet_lite0",
    encoder_layer: str | None = None,
    hidden: int = 512,
    layers: int = 5,
    peephole: Peephole = "none",
    gain: Gain = "linear",
    combine: Combine = "weighted_sum",
    dropout: float = 0.0,
    train_encoder: bool = True,
    multi_label: bool = False,
) -> SnippetsLSTM:
    """The LSTM has 17,836,032 parameters on the 4096 features of a CaffeNet (read at fc7)."""
    return SnippetsLSTM(
        frame_encoder(encoder, layer=encoder_layer),
        num_classes=num_classes,
        in_frames=in_frames,
        hidden=hidden,
        layers=layers,
        peephole=peephole,
        gain=gain,
        combine=combine,
        dropout=dropout,
        train_encoder=train_encoder,
        multi_label=multi_label,
    )
