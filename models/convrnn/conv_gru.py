"""ConvGRU: the gated recurrent unit on maps, with the reset before the convolution.

Paper: Ballas et al., ICLR 2016, arXiv 1511.06432, equations 3 to 6 (GRU-RCN), and 7 to 10 for the lower layer's state:
    z = s(W_z * x + U_z * h')                         h': the previous step's
    r = s(W_r * x + U_r * h')
    n = tanh(W * x + U * (r o h'))
    h = (1 - z) o h' + z o n
``torch.nn.GRU`` differs twice: it resets after the product, and its z keeps the old state.

In the paper's stack every layer has an input map of its own and the gates z and r see the lower layer's new state too;
the candidate n does not. The usual stack feeds each layer the states below it alone. Both are here, and the switch
for the candidate.

Shape letters: B clips, C channels, T steps, H W positions, N state channels, M channels of the layer below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.convrnn.conv_lstm import odd_padding
from cliplift.models.convrnn.lstm_unroll import product_of_steps
from cliplift.models.convrnn.recurrence import (
    LayerState,
    RecurrentLayer,
    RecurrentStack,
    fan_in_uniform,
    layer_places,
    layer_widths,
    per_layer,
)
from cliplift.models.protocol import check_choices

LowerHidden = Literal["input", "gates", "gates_and_candidate"]


class ConvGRULayer(RecurrentLayer):
    """One layer, one direction. Gate order z, r, n.

    Args:
        in_channels: C of the input.
        channels: N of the state.
        input_kernel, hidden_kernel: sides of W and of U; odd.
        lower_channels: M of the lower layer's state where :meth:`forward` is given one; 0 is none.
        lower_in_candidate: whether the lower state enters n as well.
        bias: the published parameter counts have none.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        input_kernel: int = 3,
        hidden_kernel: int = 3,
        lower_channels: int = 0,
        lower_in_candidate: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__(channels=channels, state_tensors=1)
        odd_padding("input_kernel", input_kernel)
        self.hidden_padding = odd_padding("hidden_kernel", hidden_kernel)
        N = channels
        side = (hidden_kernel, hidden_kernel)
        self.lower_gates = 3 if lower_in_candidate else 2
        self.weight_input = nn.Parameter(torch.empty(3 * N, in_channels, input_kernel, input_kernel))
        self.weight_lower = (
            nn.Parameter(torch.empty(self.lower_gates * N, lower_channels, *side)) if lower_channels else None
        )
        self.weight_gates = nn.Parameter(torch.empty(2 * N, N, *side))  # U_z, U_r
        self.weight_candidate = nn.Parameter(torch.empty(N, N, *side))  # U
        self.bias = nn.Parameter(torch.empty(3 * N)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(fan-in), zero bias; the paper names no initialiser."""
        fan_in_uniform(self.weight_input, self.weight_lower, self.weight_gates, self.weight_candidate)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        real: Tensor | None = None,
        reverse: bool = False,
        lower: Tensor | None = None,
    ) -> tuple[Tensor, LayerState]:
        """(T, B, C, H, W) -> (T, B, N, H, W); ``lower`` (T, B, M, H, W) are the states of the layer below."""
        gates = self.project(x)
        if self.weight_lower is not None:
            assert lower is not None, "a layer with lower_channels needs the lower layer's states"
            share = product_of_steps(lower, self.weight_lower, None)
            if self.lower_gates == 2:
                share = F.pad(share, (0, 0, 0, 0, 0, self.channels))  # nothing for the candidate
            gates = gates + share
        return self.unroll(gates, state, real=real, reverse=reverse)

    def project(self, x: Tensor) -> Tensor:
        """(T, B, C, H, W) -> (T, B, 3N, H, W)."""
        return product_of_steps(x, self.weight_input, self.bias)

    def step(self, gates: Tensor, state: LayerState | None) -> LayerState:
        """(B, 3N, H, W) and (h,) -> (h,)."""
        N = self.channels
        update_reset, n = torch.split(gates, [2 * N, N], dim=1)
        if state is None:
            return (update_reset[:, :N].sigmoid() * n.tanh(),)
        (h_old,) = state
        update_reset = update_reset + F.conv2d(h_old, self.weight_gates, padding=self.hidden_padding)
        z, r = update_reset.sigmoid().chunk(2, dim=1)
        n = (n + F.conv2d(r * h_old, self.weight_candidate, padding=self.hidden_padding)).tanh()
        return (torch.lerp(h_old, n, z),)


class ConvGRU(RecurrentStack):
    """Stacked ConvGRU: (B, C, T, H, W) -> (B, N, T, H, W), and the state.

    Args:
        in_channels: C of the input.
        hidden: N of each layer.
        input_kernel, hidden_kernel: sides of W and U, of all layers or one each; odd.
        lower_hidden: what a layer gets from the one below. "input": its states are the input (the usual stack);
            "gates": every layer sees the stack's own input, and the lower states enter z and r (the paper's);
            "gates_and_candidate": they enter n as well.
        bias: of W; the paper's counts have none.
        bidirectional, dropout: see :class:`RecurrentStack`, also for ``forward``.

    Raises:
        ModelError: an even kernel, a number of kernels other than the number of layers, or another impossible value.
    """

    position_axes = 2

    def __init__(
        self,
        in_channels: int,
        hidden: int | Sequence[int],
        *,
        input_kernel: int | Sequence[int] = 3,
        hidden_kernel: int | Sequence[int] = 3,
        lower_hidden: LowerHidden = "input",
        bias: bool = True,
        bidirectional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        check_choices(LowerHidden, lower_hidden=lower_hidden)
        widths = layer_widths(hidden)
        input_kernels = per_layer("input_kernel", input_kernel, len(widths))
        hidden_kernels = per_layer("hidden_kernel", hidden_kernel, len(widths))
        chained = lower_hidden == "input"
        layers = (
            ConvGRULayer(
                below if chained else in_channels,
                width,
                input_kernel=input_kernels[level],
                hidden_kernel=hidden_kernels[level],
                lower_channels=0 if chained or level == 0 else below,
                lower_in_candidate=lower_hidden == "gates_and_candidate",
                bias=bias,
            )
            for level, below, width in layer_places(in_channels, widths, bidirectional=bidirectional)
        )
        super().__init__(layers, bidirectional=bidirectional, dropout=dropout)
        self.chained = chained

    def layer_inputs(self, index: int, sequence: Tensor, below: Tensor) -> tuple[Tensor, ...]:
        # in the paper's stack every layer reads the stack's own input, and the states below enter its gates
        first = index < self.directions
        return (below,) if self.chained or first else (sequence, below)
