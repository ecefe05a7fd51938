"""Beyond Short Snippets: five ways to pool frame features over up to two minutes of video, and an LSTM over them.

Paper: Ng et al., "Beyond Short Snippets: Deep Networks for Video Classification", arXiv 1503.08909, section 3. Up to
120 frames at one frame per second; the frame network is shared over time, so that its weights can be trained on single
frames, then 30 frames, then 120 (section 3.3, network expansion).

Pooling is always the maximum over time. FC is a fully connected layer of 4096 with ReLU and dropout:

    conv pooling    max over all frames of the last map (grid kept) -> FC -> FC -> softmax
    late pooling    each frame: FC -> FC; max over all frames -> softmax
    slow pooling    max over windows of 10 frames every 5 -> FC, shared; max over all windows -> FC -> softmax
    local pooling   max over windows of 10 frames every 5 -> FC -> FC, shared; all windows concatenated -> softmax
    time-domain convolution    256 kernels of 10 x 3 x 3, every 5 frames, on the maps; max over time -> FC -> softmax

The sixth is recurrent (section 3.2): five LSTM layers of 512 cells on the 4096 features of the frame network, a softmax
at every frame. The loss of frame t counts t / T, as later frames have seen more; the predictions of all frames are
combined in one of four ways.

Shape letters: B clips, C channels, T frames, N windows, D encoder width, H' W' its grid, K classes.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.convrnn.fc_lstm import FCLSTM, Peephole
from cliplift.models.image.caffenet import GRID, CaffeNet
from cliplift.models.layers import Conv3d, ReluLinear
from cliplift.models.per_frame.frame_sequence import (
    FrameClassifier,
    FrameSequence,
    averaged_predictions,
    on_encoder,
    real_weights,
    step_losses,
)
from cliplift.models.per_frame.lstm import LSTM
from cliplift.models.protocol import ModelError, VideoNetwork, check_choices
from cliplift.models.registry import variant

PAPER = "Ng et al. 2015"
Pooling = Literal["conv", "late", "slow", "local", "time_convolution"]

WINDOW, WINDOW_STRIDE = 10, 5  # frames
TIME_KERNELS = 256


def windows(frames: int) -> list[tuple[int, int]]:
    """(first, end) of the windows over ``frames``: 10 long, every 5, the last one cut where the clip ends.

    Every frame is in a window, and no window lies inside another. 120 frames have 23.
    """
    starts = range(0, max(1, frames - WINDOW + WINDOW_STRIDE), WINDOW_STRIDE)
    return [(start, min(start + WINDOW, frames)) for start in starts]


class FullyConnected(nn.Sequential):
    """Linear, ReLU, dropout."""

    def __init__(self, inputs: int, outputs: int, *, dropout: float) -> None:
        super().__init__(ReluLinear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout))


class PooledFrames(FrameSequence):
    """A maximum over time somewhere between the last map and the softmax.

    Args:
        encoder: the frame network; its map is brought to ``grid`` x ``grid`` before the first FC.
        pooling: which of the five.
        grid: side of that grid: 6 for CaffeNet, whose FC layers see the positions; 1 averages over space first, as
            networks do that have no FC layers (GoogLeNet and its successors). None is the encoder's own.
        width: of the FC layers.
        dropout: after every FC layer.
    """

    def __init__(
        self,
        encoder: VideoNetwork,
        *,
        pooling: Pooling,
        num_classes: int,
        in_frames: int,
        grid: int | None = None,
        width: int = 4096,
        dropout: float = 0.5,
        train_encoder: bool = True,
    ) -> None:
        super().__init__(encoder, in_frames=in_frames, train_encoder=train_encoder)
        if grid is None:
            grid = GRID if isinstance(encoder, CaffeNet) else 1
        if grid < 1 or width < 1:
            raise ModelError(f"grid={grid} and width={width} must be 1 or more")
        self.refuse_layers_behind_the_map()
        self.pooling, self.grid, self.width = pooling, grid, width
        channels = self.encoder_dim
        # The convolution takes the place of the first pooling, and of the second FC layer
        if pooling == "time_convolution":
            channels = TIME_KERNELS
            self.time_convolution = Conv3d(
                self.encoder_dim, channels, (WINDOW, 3, 3), stride=(WINDOW_STRIDE, 1, 1), padding=(0, 1, 1)
            )
        self.fc1 = FullyConnected(channels * grid * grid, width, dropout=dropout)
        if pooling != "time_convolution":
            self.fc2 = FullyConnected(width, width, dropout=dropout)
        self.feature_dim = width * (len(windows(in_frames)) if pooling == "local" else 1)
        self.reset_classifier(num_classes)

    def clip_features(self, maps: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """(B, D, T, H', W') -> (B, feature_dim), what the softmax layer reads."""
        frames = maps.transpose(1, 2)  # (B, T, D, H', W')
        real = real_weights(lengths, frames) > 0  # (B, T)
        if self.pooling == "conv":
            return cast(Tensor, self.fc2(self.fc1(self.on_grid(max_over(frames, real)))))
        if self.pooling == "late":
            return max_over(self.fc2(self.fc1(self.on_grid(frames))), real)
        if self.pooling == "time_convolution":
            return self._time_convolution(maps, real)
        pooled, used = self._windows(frames, real)
        if self.pooling == "slow":
            return cast(Tensor, self.fc2(max_over(self.fc1(self.on_grid(pooled)), used)))
        return self._concatenated(pooled, used)

    def on_grid(self, maps: Tensor) -> Tensor:
        """(..., D, H', W') -> (..., D grid grid)."""
        if self.grid == 1:
            return maps.mean(dim=(-2, -1))
        if maps.shape[-2:] == (self.grid, self.grid):
            return maps.flatten(-3)
        flat = F.adaptive_avg_pool2d(maps.flatten(0, -4), self.grid)
        return torch.unflatten(flat.flatten(1), 0, maps.shape[:-3])

    def _windows(self, frames: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, ...) -> the maximum of every window (B, N, ...), and which windows hold a real frame (B, N)."""
        parts = windows(frames.shape[1])
        used = torch.stack([real[:, a:b].any(dim=1) for a, b in parts], dim=1)
        return torch.stack([max_over(frames[:, a:b], real[:, a:b]) for a, b in parts], dim=1), used

    def _concatenated(self, pooled: Tensor, used: Tensor) -> Tensor:
        """Local pooling: (B, N, D, H', W') -> (B, N width); windows of padding alone give zeros."""
        N = pooled.shape[1]
        if N * self.width != self.feature_dim:
            raise ModelError(
                f"local pooling was built for {self.feature_dim // self.width} windows (in_frames="
                f"{self.input_spec.frames}), the clip has {N}; build the model with in_frames of the clips"
            )
        each = cast(Tensor, self.fc2(self.fc1(self.on_grid(pooled))))  # (B, N, width)
        return (each * used[..., None]).flatten(1)

    def _time_convolution(self, maps: Tensor, real: Tensor) -> Tensor:
        """(B, D, T, H', W') -> (B, width). Padding enters as zeros; kernels that see nothing else do not count."""
        T = maps.shape[2]
        if T < WINDOW:
            raise ModelError(f"the time-domain convolution spans {WINDOW} frames, the clip has {T}")
        answers = F.relu(self.time_convolution(maps * real[:, None, :, None, None]))  # (B, 256, N, H', W')
        used = real.unfold(1, WINDOW, WINDOW_STRIDE).any(dim=2)  # (B, N)
        return cast(Tensor, self.fc1(self.on_grid(max_over(answers.transpose(1, 2), used))))

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Network expansion: every tensor fits clips of any length, but the softmax of local pooling."""
        state, notes = super().adapt_state_dict(state)
        weight = state.get("head.weight")
        if self.pooling != "local" or weight is None or not self.num_classes:
            return state, notes
        mine, theirs = self.feature_dim // self.width, weight.shape[1] // self.width
        if mine == theirs or weight.shape != (self.num_classes, theirs * self.width):
            return state, notes
        notes.append(f"head.weight: from {theirs} windows to {mine}")
        return {**state, "head.weight": expanded(weight, windows_before=theirs, windows_after=mine)}, notes


def max_over(x: Tensor, real: Tensor) -> Tensor:
    """(B, T, ...) -> (B, ...): the maximum over the real steps of each clip; 0 where it has none."""
    mask = real.view(*real.shape, *[1] * (x.ndim - 2))
    most = x.masked_fill(~mask, -torch.inf).amax(dim=1)
    return torch.where(mask.any(dim=1), most, torch.zeros_like(most))


def expanded(weight: Tensor, *, windows_before: int, windows_after: int) -> Tensor:
    """The softmax of local pooling for another number of windows.

    Window j takes the weights of the window at the same share of the clip, divided by the number of windows that take
    them, so that a clip whose windows look alike gets the same logits as before.

    Args:
        weight: (K, windows_before x width).

    Returns:
        (K, windows_after x width).
    """
    parts = torch.unflatten(weight, 1, (windows_before, -1))
    if windows_after < windows_before:  # neighbours are added up, so that none is lost
        target = torch.arange(windows_before) * windows_after // windows_before
        shorter = parts.new_zeros(len(weight), windows_after, parts.shape[2])
        return shorter.index_add(1, target.to(weight.device), parts).flatten(1)
    source = torch.arange(windows_after) * windows_before // windows_after
    shared_by = torch.bincount(source)[source].to(weight)
    return (parts[:, source.to(weight.device)] / shared_by[:, None]).flatten(1)


def _pooling(name: str, pooling: Pooling, cited_as: str) -> None:
    """Register a pooling on an encoder without FC layers of its own: those of the pooling take their place."""
    variant(
        name,
        on_encoder(PooledFrames, read_at="conv"),
        paper=f"{PAPER}, {cited_as}",
        fixed={"pooling": pooling, "encoder_layer": None},
        num_classes=487,
        in_frames=120,
    )


_pooling("snippets_conv_pooling", "conv", "conv pooling")  # the best of the five in the paper
_pooling("snippets_late_pooling", "late", "late pooling")
_pooling("snippets_slow_pooling", "slow", "slow pooling")
_pooling(
    "snippets_local_pooling", "local", "local pooling"
)  # T is fixed: the softmax reads all windows side by side
_pooling("snippets_time_convolution", "time_convolution", "time convolution")  # at least 10 frames


# --- the recurrent network, section 3.2 -------------------------------------------------------------------------------

Gain = Literal["linear", "uniform", "last"]
Combine = Literal["last", "max", "sum", "weighted_sum"]


class SnippetsLSTM(FrameClassifier):
    """Five LSTM layers over the frames' features, a softmax at every frame.

    Args:
        encoder: the frame network, read at its last layer before the classifier.
        hidden, layers: 512 and 5 in the paper.
        peephole: "none", whose count the accounts of the paper give, or "diagonal" as in Graves (arXiv 1308.0850), to
            whom the paper refers for its cell; :class:`FCLSTM <cliplift.models.convrnn.fc_lstm.FCLSTM>` has no
            fused kernel.
        gain: "linear" weighs the loss of frame t (counted from 1) by t / T; "uniform" by 1; "last" counts the last
            frame alone. The paper found linear to train faster and better.
        combine: how the predictions of all frames become the clip's: "last" frame, "max" over time, "sum", or
            "weighted_sum" by t / T. Within 1 % of each other in the paper; the weighted sum is usually best.
    """

    def __init__(
        self,
        encoder: VideoNetwork,
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
        check_choices(Gain, gain=gain)
        check_choices(Combine, combine=combine)
        self.gain, self.combine = gain, combine
        self.lstm = (
            LSTM(self.encoder_dim, hidden, layers=layers)
            if peephole == "none"
            else FCLSTM(self.encoder_dim, [hidden] * layers, peephole=peephole)
        )
        self.dropout = nn.Dropout(dropout)
        self.feature_dim = hidden
        self.reset_classifier(num_classes)

    def step_features(self, maps: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """(B, D, T, H', W') -> (B, T, hidden)."""
        return cast(Tensor, self.lstm(self.dropout(self.frame_vectors(maps)))[0])

    def predict(self, maps: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """(B, D, T, H', W') -> (B, T, K); the dropout stands before the LSTM here."""
        return cast(Tensor, self.head(self.step_features(maps)))

    def counted(self, steps: Tensor, lengths: Tensor | None) -> Tensor:
        """float (B, T): in the clip's features the steps count as their losses do."""
        return step_gains(steps, lengths, self.gain)

    def clip_logits(self, maps: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        logits = self.predict(maps)
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


# 17,836,032 parameters of the LSTM on the 4096 features of a CaffeNet, read at fc7
snippets_lstm = variant(
    "snippets_lstm", on_encoder(SnippetsLSTM), paper=f"{PAPER}, LSTM", num_classes=487, in_frames=30
)
