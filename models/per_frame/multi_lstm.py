"""MultiLSTM: an LSTM with several inputs and several outputs per step, for dense multi-label recognition.

Paper: Yeung et al., "Every Moment Counts: Dense Detailed Labeling of Actions in Complex Videos", arXiv 1507.05738. Step
i reads a sum over the N latest frames, weighted by attention from the state before it, and predicts all of them again:

    e_i,t = w . (tanh(W_q h_{i-1}) * tanh(W_k x_t))         t = i-N+1 .. i
    a_i,t = softmax_t(e_i,t)            x~_i = sum_t a_i,t x_t            h_i = LSTM(x~_i, h_{i-1})
    p_i,t = sigmoid(W_{i-t} h_i)        y_t = sum_i b_{i-t} p_i,t         i = t .. t+N-1

with b uniform or falling linearly with i - t, scaled to sum 1 over the steps that exist. A frame is thus judged by up
to N steps, the last of which have seen N - 1 frames more. The loss is BCE of y_t over frames and classes.

The paper's sizes, as recounted since its code was not released: 4096 features (fc7), 512 units, attention of width 50,
N = 15 at 10 frames per second. Labels of shards are those of whole clips: training from YAML repeats them for every
frame. :meth:`MultiLSTM.loss` also takes labels per frame, (B, T, K), where a caller has them.

Shape letters: B clips, C channels, T frames, N window, D encoder width, W hidden width, K classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.per_frame.attention import DotScore, ProductScore
from cliplift.models.per_frame.frame_sequence import (
    FrameClassifier,
    averaged_predictions,
    on_encoder,
    real_weights,
)
from cliplift.models.per_frame.lstm import LSTM
from cliplift.models.protocol import ModelError, VideoNetwork, check_choices
from cliplift.models.registry import variant

Score = Literal["product", "dot", "scaled_dot"]
OutputWeights = Literal["uniform", "linear"]


class MultiLSTM(FrameClassifier):
    """Encoder, attention over the latest frames, LSTM, N predictions per step, combined for every frame.

    Args:
        window: N. 1 is an LSTM with one input and one output.
        hidden: width W of the LSTM.
        attention_dim: width of the "product" score.
        score: "product" is the paper's; "dot" and "scaled_dot" project the state to D and multiply.
        output_weights: b: "uniform", or "linear", which falls as (N - distance) / N.
        dropout: on the LSTM's outputs.
    """

    def __init__(
        self,
        encoder: VideoNetwork,
        *,
        num_classes: int,
        in_frames: int,
        window: int = 15,
        hidden: int = 512,
        attention_dim: int = 50,
        score: Score = "product",
        output_weights: OutputWeights = "uniform",
        dropout: float = 0.5,
        train_encoder: bool = True,
        multi_label: bool = True,
    ) -> None:
        super().__init__(encoder, in_frames=in_frames, train_encoder=train_encoder, multi_label=multi_label)
        if window < 1:
            raise ModelError(f"window={window} must be 1 or more frames")
        check_choices(OutputWeights, output_weights=output_weights)
        self.window, self.output_weights = window, output_weights
        self.score = _score(score, hidden, self.encoder_dim, attention_dim)
        self.lstm = LSTM(self.encoder_dim, hidden)
        self.dropout = nn.Dropout(dropout)
        self.feature_dim = hidden
        self.reset_classifier(num_classes)

    def head_size(self, num_classes: int) -> tuple[int, int]:
        """W inputs; N x K outputs, the newest frame's first."""
        return self.feature_dim, self.window * num_classes

    def read(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> the LSTM's outputs (B, T, W) and the attention (B, T, N).

        Column d of the attention is the weight of the frame d steps back; 0 for frames before the clip.
        """
        # unbind and stack: the gradient of a slice is as long as the clip, for every step
        keys = self.score.project(vectors).unbind(1)
        frames = vectors.unbind(1)
        state = self.lstm.zero_state(vectors)
        outputs, attention = [], []
        for i in range(len(frames)):
            latest = slice(max(0, i - self.window + 1), i + 1)
            weights = self.score(state[0][-1], torch.stack(keys[latest], dim=1)).softmax(dim=1)
            seen = torch.einsum("bn,bnd->bd", weights, torch.stack(frames[latest], dim=1))
            output, state = self.lstm(seen[:, None], state)
            outputs.append(output[:, 0])
            attention.append(F.pad(weights.flip(1), (0, self.window - weights.shape[1])))
        return torch.stack(outputs, dim=1), torch.stack(attention, dim=1)

    def step_features(self, maps: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """(B, D, T, H', W') -> the LSTM's outputs (B, T, W)."""
        return self.read(self.frame_vectors(maps))[0]

    def window_logits(self, maps: Tensor) -> Tensor:
        """(B, D, T, H', W') -> (B, T, N, K): step i's prediction of the frame d steps back."""
        return torch.unflatten(super().predict(maps), 2, (self.window, self.num_classes))

    def frame_logits(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) -> (B, T, K): the combined prediction of every frame, as logits."""
        return self.predict(self.forward_features(x), lengths=lengths)

    def predict(self, maps: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """(B, D, T, H', W') -> (B, T, K): a frame's prediction is the weighted mean of the steps' that saw it."""
        logits = self.window_logits(maps)
        real = real_weights(lengths, logits)
        return combined_frames(logits, real, output_weights=self.output_weights, multi_label=self.multi_label)

    def attention_weights(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, T, N): how much each step took from the frame d steps back; rows sum to 1."""
        return self.read(self.frame_vectors(self.forward_features(x)))[1]


def combined_frames(
    logits: Tensor, real: Tensor, *, output_weights: OutputWeights, multi_label: bool
) -> Tensor:
    """Put the predictions of overlapping windows together.

    Args:
        logits: (B, T, N, K); [:, i, d] is what step i says of frame i - d.
        real: (B, T), 1 for real frames: steps behind the clip say nothing.
        output_weights: b, before it is scaled to sum 1 over the real steps that saw the frame.
        multi_label: probabilities are sigmoids, else softmax.

    Returns:
        (B, T, K) logits of the weighted mean of the probabilities. Padded frames hold what their own step says.
    """
    B, T, N, _ = logits.shape
    falling = torch.arange(N, 0, -1, device=logits.device) / N
    b = falling if output_weights == "linear" else torch.ones_like(falling)
    step = torch.arange(T, device=logits.device)[:, None] + torch.arange(N, device=logits.device)  # t + d
    inside = (step < T).to(real.dtype)
    step = step.clamp(max=T - 1)  # (T, N)
    # opinions[:, t, d] is what step t + d says of frame t
    opinions = logits[:, step, torch.arange(N, device=logits.device)]
    weights = b * inside * real[:, step]  # (B, T, N)
    # A padded frame would have no weight at all; its result is not used, but must not be NaN in the backward pass.
    weights[..., 0].masked_fill_(real <= 0, 1.0)
    flat = averaged_predictions(opinions.flatten(0, 1), weights.flatten(0, 1), multi_label=multi_label)
    return torch.unflatten(flat, 0, (B, T))


def _score(name: Score, hidden: int, vector_dim: int, attention_dim: int) -> ProductScore | DotScore:
    check_choices(Score, score=name)
    if name == "product":
        return ProductScore(hidden, vector_dim, attention_dim)
    return DotScore(hidden, vector_dim, scaled=name == "scaled_dot")


# 65 classes as in MultiTHUMOS; the LSTM has 9,439,232 parameters on 4096 features
multi_lstm = variant(
    "multi_lstm", on_encoder(MultiLSTM), paper="Yeung et al. 2015, MultiLSTM", num_classes=65, in_frames=30
)
