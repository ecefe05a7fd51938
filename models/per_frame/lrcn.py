"""LRCN: an image network on every frame, an LSTM over the frames, a prediction and a loss at every step.

Paper: Donahue et al., "Long-term Recurrent Convolutional Networks for Visual Recognition and Description", arXiv
1411.4389, section 4. Code: LisaAnne/lisa-caffe-public, examples/LRCN_activity_recognition. One LSTM without
peepholes, 256 units for RGB and 1024 for flow, on fc6 of :mod:`caffenet_hybrid <cliplift.models.image.caffenet>`;
dropout 0.9 on fc6 and 0.5 on the outputs of the LSTM; cross-entropy averaged over all steps; class probabilities
averaged over all steps at test time. The state is zero at the first frame of every clip.

``single_frame`` is the paper's baseline: the same without the LSTM. The paper trains it first and starts LRCN from it,
which here is ``initialise_from`` the finished run.

Shape letters: B clips, C channels, T frames, D encoder width, W hidden width, K classes.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from cliplift.models.per_frame.frame_sequence import FrameClassifier, on_encoder
from cliplift.models.per_frame.lstm import LSTM, Init, State
from cliplift.models.protocol import VideoNetwork
from cliplift.models.registry import variant


class SingleFrame(FrameClassifier):
    """A classifier on every frame by itself; probabilities, not features, are averaged over the clip.

    Args:
        dropout: before the classifier.
    """

    def __init__(
        self,
        encoder: VideoNetwork,
        *,
        num_classes: int,
        in_frames: int,
        dropout: float = 0.5,
        train_encoder: bool = True,
        multi_label: bool = False,
    ) -> None:
        super().__init__(encoder, in_frames=in_frames, train_encoder=train_encoder, multi_label=multi_label)
        self.feature_dim = self.encoder_dim
        self.dropout = nn.Dropout(dropout)
        self.reset_classifier(num_classes)

    def step_features(self, maps: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """(B, D, T, H', W') -> (B, T, D)."""
        return self.frame_vectors(maps)


class LRCN(SingleFrame):
    """:class:`SingleFrame` with an LSTM between encoder and classifier.

    Args:
        hidden: width W of the LSTM: 256 for RGB, 1024 for flow.
        layers: LSTM layers; 1 in the paper.
        feature_dropout: on the encoder's features (0.9 on fc6).
        dropout: on the LSTM's outputs.
    """

    def __init__(
        self,
        encoder: VideoNetwork,
        *,
        num_classes: int,
        in_frames: int,
        hidden: int = 256,
        layers: int = 1,
        feature_dropout: float = 0.9,
        dropout: float = 0.5,
        init: Init = "lrcn",
        train_encoder: bool = True,
        multi_label: bool = False,
    ) -> None:
        super().__init__(
            encoder,
            num_classes=0,
            in_frames=in_frames,
            dropout=dropout,
            train_encoder=train_encoder,
            multi_label=multi_label,
        )
        self.feature_dim = hidden
        self.feature_dropout = nn.Dropout(feature_dropout)
        self.lstm = LSTM(self.encoder_dim, hidden, layers=layers, init=init)
        self.reset_classifier(num_classes)

    def step_features(self, maps: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """(B, D, T, H', W') -> (B, T, W): the LSTM's outputs, from a zero state."""
        # padding stands behind the real frames, so that what the LSTM makes of it reaches none of them
        return cast(Tensor, self.lstm(self.feature_dropout(self.frame_vectors(maps)))[0])

    def stream(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        starts: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """A stretch of a longer video, continued from where the last one ended.

        Args:
            x: (B, C, T, H, W).
            state: what the last call returned; None at the beginning.
            starts: bool (B, T), True where a new clip begins, which resets the state. The opposite of the released
                code's ``clip_markers``.
            lengths: int64 (B,), real frames of each row.

        Returns:
            logits (B, T, K) of every frame, and the state after the last real one.
        """
        vectors = self.feature_dropout(self.frame_vectors(self.forward_features(x)))
        outputs, state = self.lstm(vectors, state, starts=starts, lengths=lengths)
        return self.head(self.dropout(outputs)), state


# The image baseline of the LRCN paper: a loss at every frame, probabilities averaged. ``frame_average`` averages
# features instead, and has one loss per clip
single_frame = variant(
    "single_frame",
    on_encoder(SingleFrame),
    paper="Donahue et al. 2015, single frame",
    num_classes=101,
    in_frames=16,
)
# LRCN-fc6. The paper's network is ``encoder="caffenet_hybrid"``, with ``hidden=1024`` for flow; the part after the
# encoder has 4,483,429 parameters (256 units) or 21,079,141 (1024) on 4096 features
lrcn = variant(
    "lrcn", on_encoder(LRCN, read_at="fc6"), paper="Donahue et al. 2015, LRCN", num_classes=101, in_frames=16
)
