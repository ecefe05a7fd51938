"""What FC-LSTM, ConvLSTM and ConvGRU share: stacking, two directions, padding masks, states carried in and out.

A layer sees its whole input sequence at once: the input-to-state product of all steps is one call (:meth:`project`),
and only what depends on the previous step is in the loop (:meth:`step`). Inside a stack sequences are time-major,
(T, B, C, ...), so that a step is a contiguous slice; callers see the clip layout.

Shape letters: B clips, C channels, T steps, H W positions, N state channels, D width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from cliplift.models.protocol import ModelError

# Of one layer in one direction: (h,) or (h, c), each (B, N) or (B, N, H, W)
LayerState = tuple[Tensor, ...]
# Layer after layer; with two directions the forward one's, then the backward one's, of each layer
StackState = tuple[LayerState, ...]


def layer_widths(hidden: int | Sequence[int]) -> tuple[int, ...]:
    """N of each layer; one number is one layer."""
    return (hidden,) if isinstance(hidden, int) else tuple(hidden)


def per_layer(name: str, value: int | Sequence[int], layers: int) -> tuple[int, ...]:
    """One number for all layers, or one for each. Raises ModelError for another count."""
    values = (value,) * layers if isinstance(value, int) else tuple(value)
    if len(values) != layers:
        raise ModelError(f"{name}={list(values)} is for {len(values)} layers, the network has {layers}")
    return values


def layer_places(
    inputs: int, widths: Sequence[int], *, bidirectional: bool
) -> Iterator[tuple[int, int, int]]:
    """Level, input channels and N of every layer of a stack; with two directions each level comes twice.

    A level reads the states of both directions below it, side by side.
    """
    directions = 2 if bidirectional else 1
    below = [inputs, *(width * directions for width in widths)]
    for level, width in enumerate(widths):
        yield from [(level, below[level], width)] * directions


def fan_in_uniform(*weights: Tensor | None) -> None:
    """Initialise the weights there are, uniform in +-1/sqrt(fan-in)."""
    for weight in weights:
        if weight is not None:
            nn.init.uniform_(weight, -(bound := 1 / math.sqrt(weight[0].numel())), bound)


class RecurrentLayer(nn.Module):
    """One layer in one direction. Subclasses say what is computed before the loop and what in it."""

    def __init__(self, *, channels: int, state_tensors: int) -> None:
        super().__init__()
        if channels < 1:
            raise ModelError(f"{type(self).__name__}: channels={channels} must be 1 or more")
        self.channels = channels
        self.state_tensors = state_tensors

    def project(self, x: Tensor) -> Tensor:
        """(T, B, C, ...) -> (T, B, G, ...): everything the gates take from the input, of all steps in one call."""
        raise NotImplementedError

    def step(self, gates: Tensor, state: LayerState | None) -> LayerState:
        """One step: the input's share of the gates (B, G, ...) and the previous state (None is zeros) -> new state."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, state: LayerState | None = None, real: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, LayerState]:
        """(T, B, C, ...) -> hidden states (T, B, N, ...) and the state after the last step.

        Positional, because activation checkpointing calls it again with the same positions.

        Args:
            x: the input sequence.
            state: to start from; None is zeros.
            real: bool (T, B, 1, ...), False at padded steps. A padded step keeps the state and outputs zeros.
            reverse: read from the last step to the first.
        """
        return self.unroll(self.project(x), state, real=real, reverse=reverse)

    def unroll(
        self, gates: Tensor, state: LayerState | None, *, real: Tensor | None, reverse: bool
    ) -> tuple[Tensor, LayerState]:
        """The loop of :meth:`forward` over projected inputs (T, B, G, ...)."""
        # unbind, not indexing: the gradient of T slices would be T whole sequences, added up
        steps = gates.unbind(0)
        state = self.start(state, gates, real=real)
        hidden: list[Tensor] = []
        for t in reversed(range(len(steps))) if reverse else range(len(steps)):
            new = self.step(steps[t], state)
            if real is not None:
                # where a clip is padded, its last real state is carried on to the end (or, read backwards, the start
                # state to its last real frame), so that what forward returns belongs to real frames
                assert state is not None
                new = tuple(torch.where(real[t], n, o) for n, o in zip(new, state, strict=True))
            state = new
            hidden.append(state[0])
        assert state is not None
        outputs = torch.stack(hidden[::-1] if reverse else hidden)
        return (outputs if real is None else outputs * real), state

    def start(self, state: LayerState | None, sequence: Tensor, *, real: Tensor | None) -> LayerState | None:
        """The state before the first step of (T, B, anything, ...).

        None means zeros, whose recurrent product can be skipped. It is not skipped for a sequence of a single step, so
        that every weight gets a gradient (ZeRO waits for all of them), nor for a masked sequence, whose padded steps
        have to carry the zeros on.
        """
        needed = state is None and (real is not None or len(sequence) == 1)
        return self.zero_state(sequence[0]) if needed else state

    def zero_state(self, like: Tensor) -> LayerState:
        """Zeros for the batch and map of a tensor (B, anything, ...)."""
        zeros = like.new_zeros(like.shape[0], self.channels, *like.shape[2:])
        return (zeros,) * self.state_tensors


class RecurrentStack(nn.Module):
    """Layers on top of each other, in one or two directions.

    Args:
        layers: layer after layer; with two directions the forward and the backward one of each, side by side.
        bidirectional: whether that is so. As in ``torch.nn.LSTM``, both directions' states are concatenated and go
            up together.
        dropout: on the states that go up to the next layer, not on the last one's.
    """

    position_axes = 0  # 2 for maps

    def __init__(
        self, layers: Iterable[RecurrentLayer], *, bidirectional: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        layers = list(layers)
        if not layers:
            raise ModelError(f"{type(self).__name__} has no layers; give the state channels of at least one")
        if not 0 <= dropout < 1:
            raise ModelError(f"{type(self).__name__}: dropout={dropout} must be in [0, 1)")
        self.layers = nn.ModuleList(layers)
        self.bidirectional = bidirectional
        self.directions = 2 if bidirectional else 1
        self.out_channels = layers[-1].channels * self.directions
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        state: StackState | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, StackState]:
        """The last layer's hidden state at every step, and the state of every layer after its last step.

        Args:
            x: (B, T, C), or (B, C, T, H, W) for maps.
            state: what an earlier call returned, to go on from there; None is zeros. Detach it to cut the gradient.
            lengths: int (B,), real steps of each clip; the rest is padding behind them.
            mask: bool (B, T), True at real steps, where padding is elsewhere too.

        Returns:
            (B, T, N) or (B, N, T, H, W), zero at padded steps (N doubles with two directions), and the state.

        Raises:
            ModelError: a wrong rank, both of lengths and mask, or either of another size than the clips.
        """
        sequence, real = self.time_major(x, lengths=lengths, mask=mask)
        outputs, new_state = self.run(sequence, state, real=real)
        return self.clip_layout(outputs[-1]), new_state

    def time_major(
        self, x: Tensor, *, lengths: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The sequence (T, B, C, ...), zero where padded, and its mask (T, B, 1, ...) or None."""
        if x.ndim != 3 + self.position_axes:
            wanted = "(B, C, T, H, W)" if self.position_axes else "(B, T, C)"
            raise ModelError(f"{type(self).__name__} takes {wanted}, got {tuple(x.shape)}")
        sequence = x.permute(2, 0, 1, 3, 4) if self.position_axes else x.transpose(0, 1)
        T, B = sequence.shape[:2]
        if T == 0:
            raise ModelError(f"{type(self).__name__}: the clips {tuple(x.shape)} have no steps")
        real = _real_steps(lengths, mask, batch=B, steps=T)
        if real is None:
            return sequence, None
        real = real.to(x.device).T.reshape(T, B, 1, *[1] * self.position_axes)
        # masked_fill, not a product: whatever stands in the padding, NaN included, reaches no weight's gradient
        return sequence.masked_fill(~real, 0.0), real

    def clip_layout(self, sequence: Tensor) -> Tensor:
        """(T, B, C, ...) -> (B, T, C) or (B, C, T, H, W)."""
        return sequence.permute(1, 2, 0, 3, 4) if self.position_axes else sequence.transpose(0, 1)

    def run(
        self, sequence: Tensor, state: StackState | None, *, real: Tensor | None
    ) -> tuple[list[Tensor], StackState]:
        """Every layer's hidden states, time-major (T, B, N, ...), and every layer's last state."""
        states = self._layer_states(state)
        outputs: list[Tensor] = []
        last: list[LayerState] = []
        for level in range(0, len(self.layers), self.directions):
            # both directions of a level read the states of both directions below, and each starts at its own end
            below = self.dropout(outputs[-1]) if outputs else sequence
            both = []
            for direction in range(self.directions):
                at = level + direction
                x, *lower = self.layer_inputs(at, sequence, below)
                hidden, after = self.layers[at](x, states[at], real, direction == 1, *lower)
                both.append(hidden)
                last.append(after)
            outputs.append(both[0] if len(both) == 1 else torch.cat(both, dim=2))
        return outputs, tuple(last)

    def layer_inputs(self, index: int, sequence: Tensor, below: Tensor) -> tuple[Tensor, ...]:
        """What a layer reads: the states below it, or whatever else of these and the stack's own input."""
        return (below,)

    def _layer_states(self, state: StackState | None) -> Sequence[LayerState | None]:
        if state is None:
            return [None] * len(self.layers)
        if len(state) != len(self.layers):
            raise ModelError(
                f"{type(self).__name__}: the state is of {len(state)} layers, the module has {len(self.layers)}; "
                "pass what an earlier call of this module returned"
            )
        return state


def _real_steps(lengths: Tensor | None, mask: Tensor | None, *, batch: int, steps: int) -> Tensor | None:
    """bool (B, T), or None where nothing is padded."""
    if lengths is not None and mask is not None:
        raise ModelError(
            "give lengths or mask, not both: lengths=[2, 3] is a mask of the first 2 and 3 steps"
        )
    if lengths is not None:
        if lengths.shape != (batch,):
            raise ModelError(f"lengths must be ({batch},), one per clip, got {tuple(lengths.shape)}")
        # tensors on the meta device, as in measuring, have no values to check
        if lengths.device.type != "meta" and (int(lengths.min()) < 1 or int(lengths.max()) > steps):
            raise ModelError(f"lengths={lengths.tolist()} must lie in [1, {steps}], the steps given")
        return torch.arange(steps, device=lengths.device) < lengths.unsqueeze(1)
    if mask is not None and (mask.shape != (batch, steps) or mask.dtype != torch.bool):
        raise ModelError(f"mask must be bool ({batch}, {steps}), got {mask.dtype} {tuple(mask.shape)}")
    return mask
