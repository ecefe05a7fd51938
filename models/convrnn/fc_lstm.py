"""FC-LSTM: the LSTM with peepholes on vectors.

Papers: Graves, arXiv 1308.0850, section 2; Shi et al., arXiv 1506.04214, equation 2. At every step
    i = s(W_xi x + W_hi h' + w_ci o c' + b_i)          h', c': the previous step's
    f = s(W_xf x + W_hf h' + w_cf o c' + b_f)
    c = f o c' + i o tanh(W_xc x + W_hc h' + b_c)
    o = s(W_xo x + W_ho h' + w_co o c + b_o)           the new c
    h = o o tanh(c)
Without peepholes it is ``torch.nn.LSTM`` (which has one bias more), with diagonal ones the LSTM of ONNX with P.
Some write a matrix V for the peephole, and the old cell for the output gate too: both are options.

The papers name no initialiser. Here weights are uniform in +-1/sqrt(fan-in), peepholes zero, biases zero but for the
forget gate's (1: a new cell remembers; Jozefowicz et al., ICML 2015).

Shape letters: B clips, T steps, D width of the input, N state channels, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.convrnn.lstm_unroll import LSTMUnroll, product_of_steps
from cliplift.models.convrnn.recurrence import (
    LayerState,
    RecurrentLayer,
    RecurrentStack,
    fan_in_uniform,
    layer_places,
    layer_widths,
)
from cliplift.models.protocol import check_choices

Peephole = Literal["none", "diagonal", "full"]
GateCell = Literal["new", "old"]


class LSTMLayer(RecurrentLayer):
    """The cell's equations; subclasses give the products with input and state. Gate order i, f, g, o.

    ``inputs`` are the input's channels, 0 for none, and the sides of W_x' kernel; ``hidden_kernel`` those of W_h's.
    ``peephole`` (3, N, ...) holds w_ci, w_cf, w_co, broadcast over the state, or (3, N, N) matrices V of them.
    """

    # False leaves the loop to autograd, slower and larger: for second derivatives and torch.func, which the gradient
    # written out does not offer.
    written_out = True

    def __init__(
        self,
        *,
        inputs: tuple[int, ...],
        channels: int,
        hidden_kernel: tuple[int, ...] = (),
        peephole: Tensor | None,
        output_gate_cell: GateCell,
        forget_bias: float,
    ) -> None:
        super().__init__(channels=channels, state_tensors=2)
        check_choices(GateCell, output_gate_cell=output_gate_cell)
        self.output_gate_cell = output_gate_cell
        self.forget_bias = forget_bias
        self.peephole = None if peephole is None else nn.Parameter(peephole)
        # a layer without input (the forecaster's first) has no W_x at all
        self.weight_input = nn.Parameter(torch.empty(4 * channels, *inputs)) if inputs[0] else None
        self.weight_hidden = nn.Parameter(torch.empty(4 * channels, channels, *hidden_kernel))
        self.bias = nn.Parameter(torch.empty(4 * channels))
        self.reset_parameters()

    def forward(
        self, x: Tensor, state: LayerState | None = None, real: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, LayerState]:
        """See :class:`RecurrentLayer`."""
        self.check_input(x)
        # Autocast and torch.compile have to see every operation.
        kind = x.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if autocast or torch.compiler.is_compiling() or not (self.written_out and self.peephole_is_diagonal):
            return super().forward(x, state, real, reverse)
        state = self.start(state, x, real=real)
        hidden, h, c = LSTMUnroll.apply(  # type: ignore[no-untyped-call]
            x,
            self.weight_input,
            self.bias,
            self.weight_hidden,
            self.peephole,
            *((None, None) if state is None else state),
            real,
            reverse,
            self.output_gate_cell == "new",
        )
        return (hidden if real is None else hidden * real), (h, c)

    @property
    def peephole_is_diagonal(self) -> bool:
        return True

    def check_input(self, x: Tensor) -> None:
        """Raises ModelError for a sequence (T, B, C, ...) this layer was not built for."""

    def project(self, x: Tensor) -> Tensor:
        """(T, B, C, ...) -> (T, B, 4N, ...); without W_x, of the input only T, B, H and W count."""
        if self.weight_input is None:
            return self.bias.view(-1, *[1] * (x.ndim - 3)).expand(*x.shape[:2], -1, *x.shape[3:])
        return product_of_steps(x, self.weight_input, self.bias)

    def recurrent(self, gates: Tensor, h: Tensor) -> Tensor:
        """The input's share of the gates (B, 4N, ...) plus W_h h."""
        raise NotImplementedError

    def peep(self, c: Tensor, first: int, last: int) -> Tensor:
        """Peephole terms ``first`` to ``last`` (exclusive; i, f, o) of the cell (B, N, ...): (B, k N, ...)."""
        assert self.peephole is not None
        return (c.unsqueeze(1) * self.peephole[first:last]).flatten(1, 2)

    def step(self, gates: Tensor, state: LayerState | None) -> LayerState:
        """(B, 4N, ...) and (h, c) -> (h, c)."""
        N = self.channels
        h_old, c_old = self.zero_state(gates) if state is None else state
        if state is not None:
            gates = self.recurrent(gates, h_old)
        input_forget, g, o = torch.split(gates, [2 * N, N, N], dim=1)
        if self.peephole is not None and state is not None:
            input_forget = input_forget + self.peep(c_old, 0, 2)
        i, f = input_forget.sigmoid().chunk(2, dim=1)
        c = i * g.tanh() if state is None else f * c_old + i * g.tanh()
        if self.peephole is not None:
            o = o + self.peep(c if self.output_gate_cell == "new" else c_old, 2, 3)
        return o.sigmoid() * c.tanh(), c

    def reset_parameters(self) -> None:
        """Weights uniform in +-1/sqrt(fan-in); zero peepholes and bias, but for the forget gate's."""
        N = self.channels
        fan_in_uniform(self.weight_input, self.weight_hidden)
        with torch.no_grad():
            self.bias.zero_()
            self.bias[N : 2 * N] = self.forget_bias
            if self.peephole is not None:
                self.peephole.zero_()


class FCLSTMLayer(LSTMLayer):
    """One layer, one direction. ``in_features`` 0: no input and no W_x at all (the forecaster's first layer)."""

    def __init__(
        self,
        in_features: int,
        channels: int,
        *,
        peephole: Peephole = "diagonal",
        output_gate_cell: GateCell = "new",
        forget_bias: float = 1.0,
    ) -> None:
        check_choices(Peephole, peephole=peephole)
        shapes = {"diagonal": (3, channels), "full": (3, channels, channels)}
        super().__init__(
            inputs=(in_features,),
            channels=channels,
            peephole=None if peephole == "none" else torch.empty(shapes[peephole]),
            output_gate_cell=output_gate_cell,
            forget_bias=forget_bias,
        )
        self.in_features = in_features

    @property
    def peephole_is_diagonal(self) -> bool:
        return self.peephole is None or self.peephole.ndim == 2

    def recurrent(self, gates: Tensor, h: Tensor) -> Tensor:
        return torch.addmm(gates, h, self.weight_hidden.T)

    def peep(self, c: Tensor, first: int, last: int) -> Tensor:
        assert self.peephole is not None
        if self.peephole_is_diagonal:
            return super().peep(c, first, last)
        return F.linear(c, self.peephole[first:last].flatten(0, 1))


class FCLSTM(RecurrentStack):
    """Stacked peephole LSTM: (B, T, D) -> (B, T, N), and the state.

    Args:
        in_features: D of the input.
        hidden: N of each layer.
        peephole: "diagonal" (the papers': 3N numbers per layer), "full" (3N x N), or "none".
        output_gate_cell: which cell the output gate's peephole sees, "new" (the papers') or "old".
        bidirectional: as in ``torch.nn.LSTM``.
        dropout: between layers.
        forget_bias: initial bias of the forget gate.

    Raises:
        ModelError: an impossible value.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int | Sequence[int],
        *,
        peephole: Peephole = "diagonal",
        output_gate_cell: GateCell = "new",
        bidirectional: bool = False,
        dropout: float = 0.0,
        forget_bias: float = 1.0,
    ) -> None:
        places = layer_places(in_features, layer_widths(hidden), bidirectional=bidirectional)
        layers = (
            FCLSTMLayer(
                inputs,
                width,
                peephole=peephole,
                output_gate_cell=output_gate_cell,
                forget_bias=forget_bias,
            )
            for _, inputs, width in places
        )
        super().__init__(layers, bidirectional=bidirectional, dropout=dropout)
