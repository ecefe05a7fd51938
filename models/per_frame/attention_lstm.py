"""An LSTM over the frames whose last state asks all of its states: dot-product attention over encoder states.

The encoder reads the clip; its last state q queries all states k_j = v_j = h_j (:func:`dot_product_attention
<cliplift.models.per_frame.attention.dot_product_attention>`); the answer stands beside q before the classifier. The
plainest way to let a classification see more than the last state, and the point where attention over time can be
watched.

Shape letters: B clips, C channels, T frames, D encoder width, W hidden width, K classes.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from cliplift.models.per_frame.attention import dot_product_attention
from cliplift.models.per_frame.frame_sequence import FrameSequence, on_encoder
from cliplift.models.per_frame.lstm import LSTM, real_frames
from cliplift.models.protocol import VideoNetwork
from cliplift.models.registry import variant


class AttentionLSTM(FrameSequence):
    """Encoder, LSTM, dot-product attention over its states, classifier.

    Args:
        hidden: width W of the LSTM.
        layers: LSTM layers.
        scaled: divide the scores by sqrt(W).
        dropout: before the classifier.
    """

    def __init__(
        self,
        encoder: VideoNetwork,
        *,
        num_classes: int,
        in_frames: int,
        hidden: int = 512,
        layers: int = 1,
        scaled: bool = False,
        dropout: float = 0.5,
        train_encoder: bool = True,
    ) -> None:
        super().__init__(encoder, in_frames=in_frames, train_encoder=train_encoder)
        self.scaled = scaled
        self.lstm = LSTM(self.encoder_dim, hidden, layers=layers)
        self.dropout = nn.Dropout(dropout)
        self.feature_dim = 2 * hidden
        self.reset_classifier(num_classes)

    def attend(self, maps: Tensor, *, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, D, T, H', W') -> the last real state beside its answer (B, 2 W), and the weights (B, T) of the states."""
        states, _ = self.lstm(self.frame_vectors(maps))
        B, T, _ = states.shape
        if lengths is None:
            query, mask = states[:, -1:], None
        else:
            mask = real_frames(lengths, clips=B, frames=T)
            query = states[torch.arange(B, device=states.device), lengths - 1][:, None]
        answer, weights = dot_product_attention(query, states, scaled=self.scaled, mask=mask)
        return torch.cat([query[:, 0], answer[:, 0]], dim=1), weights[:, 0]

    def attention_weights(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) -> (B, T): how much each frame's state counted; each row sums to 1."""
        return self.attend(self.forward_features(x), lengths=lengths)[1]

    def clip_features(self, maps: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        return self.attend(maps, lengths=lengths)[0]

    def clip_logits(self, maps: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        return cast(Tensor, self.head(self.dropout(self.clip_features(maps, lengths=lengths))))


# ``attention_weights`` shows how much each frame's state counted
attention_lstm = variant(
    "attention_lstm",
    on_encoder(AttentionLSTM),
    paper="LSTM, dot-product attention",
    num_classes=101,
    in_frames=16,
)
