"""Action recognition with visual attention: where an LSTM looks in each frame depends on what it has seen so far.

Paper: Sharma, Kiros and Salakhutdinov, "Action Recognition using Visual Attention", arXiv 1511.04119. A frame's map is
N = H' W' slices X_t,i of width D (7 x 7 x 1024 there); an LSTM of three layers reads a weighted sum of them per frame:

    l_t,i = softmax_i(score(h_{t-1}, X_t,i))      x_t = sum_i l_t,i X_t,i      h_t = LSTM(x_t, h_{t-1})
    h_0, c_0 = tanh(linear(mean of X over frames and slices)), for every layer
    y_t = softmax(linear(dropout(tanh(linear(h_t)))))

The score is one of three. ``location`` is the paper's: one weight vector W_i per slice, W_i . h_{t-1}, blind to X_t.
``additive`` is the released code's (kracwarlock/action-recognition-visual-attention, src/actrec.py), a small network on
X_t,i and h_{t-1}. ``dot`` projects h_{t-1} to D and multiplies. h is the top layer's.

    loss = mean over frames of cross-entropy + penalty sum_i (1 - sum_t l_t,i)^2

The second term asks that every place be looked at once in a clip (doubly stochastic attention); the best published
penalty is 0. The paper's weight decay is the optimizer's. Prediction: the class probabilities of all frames averaged
(the released code takes the last ``last_frames``).

Shape letters: B clips, C channels, T frames, H' W' the encoder's grid, N = H' W' slices, D slice width, W hidden
width, K classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from cliplift.models.per_frame.attention import AdditiveScore, DotScore
from cliplift.models.per_frame.frame_sequence import (
    FrameClassifier,
    mean_of_real,
    on_encoder,
    real_weights,
    step_losses,
)
from cliplift.models.per_frame.lstm import LSTM, Init, State
from cliplift.models.protocol import ModelError, VideoNetwork, check_choices
from cliplift.models.registry import variant

Score = Literal["location", "additive", "dot"]


class LocationScore(nn.Linear):
    """e_i = W_i . h: (B, W) -> (B, N). What a frame shows does not enter."""

    def __init__(self, query_dim: int, slices: int) -> None:
        super().__init__(query_dim, slices, bias=False)

    def project(self, keys: Tensor) -> Tensor:
        """The slices, of which only the number matters."""
        if keys.shape[-2] != self.out_features:
            raise ModelError(
                f"score='location' has weights for {self.out_features} places, the map has {keys.shape[-2]}; "
                "set grid to the side of the map, or use score='additive' or 'dot', which take any map"
            )
        return keys

    def forward(self, query: Tensor, keys: Tensor | None = None) -> Tensor:
        return super().forward(query)


class InitialState(nn.Module):
    """h_0 and c_0 of every layer from the mean slice: (B, D) -> two (L, B, W)."""

    def __init__(self, inputs: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, layers * hidden)
        self.cell = nn.Linear(inputs, layers * hidden)
        self.layers = layers

    def forward(self, mean: Tensor) -> State:
        h, c = (linear(mean).tanh().unflatten(1, (self.layers, -1)) for linear in (self.hidden, self.cell))
        return h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()


class VisualAttention(FrameClassifier):
    """Encoder, soft attention over its map, LSTM, a classifier at every frame.

    Args:
        score: "location", "additive" or "dot".
        grid: side of the encoder's map, for "location".
        hidden, layers: of the LSTM.
        head_dim: width of the tanh layer before the classifier.
        penalty: weight of the doubly stochastic term.
        inverse_temperature: multiplies the scores before the softmax.
        dropout: before the classifier.
        last_frames: frames whose predictions are averaged, from the end; None is all.
    """

    def __init__(
        self,
        encoder: VideoNetwork,
        *,
        num_classes: int,
        in_frames: int,
        score: Score = "location",
        grid: int = 7,
        hidden: int = 512,
        layers: int = 3,
        head_dim: int = 512,
        penalty: float = 0.0,
        inverse_temperature: float = 1.0,
        dropout: float = 0.5,
        last_frames: int | None = None,
        init: Init = "orthogonal",
        train_encoder: bool = True,
        multi_label: bool = False,
    ) -> None:
        super().__init__(encoder, in_frames=in_frames, train_encoder=train_encoder, multi_label=multi_label)
        if penalty < 0 or (last_frames is not None and last_frames < 1):
            raise ModelError(f"penalty={penalty} must be 0 or more, last_frames={last_frames} 1 or more")
        self.refuse_layers_behind_the_map()
        self.penalty, self.inverse_temperature, self.last_frames = penalty, inverse_temperature, last_frames
        # h_{t-1} of the top layer asks; so the first step needs a state, which is made from the mean slice
        self.score = _score(score, hidden, self.encoder_dim, grid)
        self.initial = InitialState(self.encoder_dim, hidden, layers)
        self.lstm = LSTM(self.encoder_dim, hidden, layers=layers, init=init)
        self.before_head = nn.Sequential(nn.Linear(hidden, head_dim), nn.Tanh())
        self.dropout = nn.Dropout(dropout)
        self.feature_dim = head_dim
        self.reset_classifier(num_classes)

    def look(self, maps: Tensor, *, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, D, T, H', W') -> the steps' features (B, T, head_dim) and the attention (B, T, N)."""
        slices = maps.permute(0, 2, 3, 4, 1).flatten(2, 3)  # (B, T, N, D)
        real = real_weights(lengths, slices).to(slices.dtype)[..., None]
        state: State = self.initial((slices.mean(dim=2) * real).sum(dim=1) / real.sum(dim=1))
        keys = self.score.project(slices).unbind(1)  # of all frames in one call
        outputs, attention = [], []
        for key, frame in zip(keys, slices.unbind(1), strict=True):
            weights = (self.score(state[0][-1], key) * self.inverse_temperature).softmax(dim=1)  # (B, N)
            seen = torch.einsum("bn,bnd->bd", weights, frame)
            output, state = self.lstm(seen[:, None], state)
            outputs.append(output[:, 0])
            attention.append(weights)
        return self.before_head(torch.stack(outputs, dim=1)), torch.stack(attention, dim=1)

    def attention_maps(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, T, H', W'): where each frame was looked at; each map sums to 1."""
        maps = self.forward_features(x)
        return torch.unflatten(self.look(maps)[1], 2, maps.shape[-2:])

    def step_features(self, maps: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """(B, D, T, H', W') -> (B, T, head_dim)."""
        return self.look(maps, lengths=lengths)[0]

    def counted(self, steps: Tensor, lengths: Tensor | None) -> Tensor:
        """float (B, T): 1 for the frames whose predictions are averaged, the ``last_frames`` real ones."""
        real = real_weights(lengths, steps)
        if self.last_frames is None:
            return real
        number = torch.arange(1, real.shape[1] + 1, device=real.device)
        return real * (number > real.sum(dim=1, keepdim=True) - self.last_frames)

    def loss(self, x: Tensor, labels: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Mean of the losses of all real frames, and the penalty; labels as in :func:`step_losses`."""
        features, attention = self.look(self.forward_features(x), lengths=lengths)
        logits = self.head(self.dropout(features))
        real = real_weights(lengths, logits)
        loss = mean_of_real(step_losses(logits, labels, multi_label=self.multi_label), real)
        return loss + self.penalty * doubly_stochastic(attention, real)


def doubly_stochastic(attention: Tensor, weights: Tensor) -> Tensor:
    """Mean over clips of sum_i (1 - sum_t l_t,i)^2, over real frames.

    Args:
        attention: (B, T, N).
        weights: (B, T), 1 for real frames, 0 for padding.
    """
    looked = (attention.float() * weights[..., None]).sum(dim=1)  # (B, N)
    return (1 - looked).square().sum(dim=1).mean()


def _score(name: Score, hidden: int, slice_dim: int, grid: int) -> LocationScore | AdditiveScore | DotScore:
    check_choices(Score, score=name)
    if name == "location":
        return LocationScore(hidden, grid * grid)
    if name == "additive":
        return AdditiveScore(hidden, slice_dim, slice_dim)  # the released code's width is the slices'
    return DotScore(hidden, slice_dim)


# The LSTM has 7,346,176 parameters on 1024 channels. The released code is ``layers=1, score="additive"``; the paper
# trains on fixed features, ``train_encoder=False``
visual_attention = variant(
    "visual_attention",
    on_encoder(VisualAttention, read_at="conv"),
    paper="Sharma et al. 2015",
    fixed={"encoder_layer": None},  # it reads the map
    num_classes=11,
    in_frames=30,
)
