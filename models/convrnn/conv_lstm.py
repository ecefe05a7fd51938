"""ConvLSTM: the peephole LSTM whose state is a map and whose products are convolutions.

Paper: Shi et al., NeurIPS 2015, arXiv 1506.04214, equation 3: FC-LSTM's equations (:mod:`fc_lstm`) with zero-padded
convolutions of odd kernels for W_x and W_h. The state's zero padding stands for "nothing is known outside".

The paper writes Hadamard peepholes, which reads as one weight per channel and position; its published parameter counts
fit one weight per channel only (3N per layer), and those work at every resolution. So "channel" is the default,
"position" (as in most public code) needs the map's size, "none" is what the popular implementations do.

Shape letters: B clips, C channels, T steps, H W positions, N state channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cliplift.models.convrnn.fc_lstm import GateCell, LSTMLayer
from cliplift.models.convrnn.recurrence import RecurrentStack, layer_places, layer_widths, per_layer
from cliplift.models.protocol import ModelError, check_choices

MapPeephole = Literal["none", "channel", "position"]


def odd_padding(name: str, kernel: int) -> int:
    """Zeros on each side that keep H and W. Raises ModelError for an even kernel, which would shift the state."""
    if kernel < 1 or kernel % 2 == 0:
        raise ModelError(
            f"{name}={kernel} must be odd: an even kernel moves the state by half a pixel each step"
        )
    return kernel // 2


class ConvLSTMLayer(LSTMLayer):
    """One layer, one direction. ``in_channels`` 0: no input and no W_x at all (the forecaster's first layer)."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        input_kernel: int = 3,
        hidden_kernel: int = 3,
        peephole: MapPeephole = "channel",
        map_size: tuple[int, int] | None = None,
        output_gate_cell: GateCell = "new",
        forget_bias: float = 1.0,
    ) -> None:
        odd_padding("input_kernel", input_kernel)
        odd_padding("hidden_kernel", hidden_kernel)
        super().__init__(
            inputs=(in_channels, input_kernel, input_kernel),
            channels=channels,
            hidden_kernel=(hidden_kernel, hidden_kernel),
            peephole=_peephole_weights(peephole, channels, map_size),
            output_gate_cell=output_gate_cell,
            forget_bias=forget_bias,
        )
        self.in_channels = in_channels
        self.input_kernel, self.hidden_kernel = input_kernel, hidden_kernel
        self.hidden_padding = hidden_kernel // 2

    def check_input(self, x: Tensor) -> None:
        size = None if self.peephole is None else tuple(self.peephole.shape[-2:])
        if size not in (None, (1, 1), tuple(x.shape[-2:])):
            raise ModelError(
                f"peephole='position' was built for maps of {size[0]}x{size[1]}, got "
                f"{x.shape[-2]}x{x.shape[-1]}; peephole='channel' takes any size"
            )

    def recurrent(self, gates: Tensor, h: Tensor) -> Tensor:
        return gates + F.conv2d(h, self.weight_hidden, padding=self.hidden_padding)


def _peephole_weights(
    peephole: MapPeephole, channels: int, map_size: tuple[int, int] | None
) -> Tensor | None:
    check_choices(MapPeephole, peephole=peephole)
    if peephole == "none":
        return None
    if peephole == "channel":
        return torch.empty(3, channels, 1, 1)
    if map_size is None:
        raise ModelError("peephole='position' has one weight per position: give map_size=(H, W)")
    return torch.empty(3, channels, *map_size)


class ConvLSTM(RecurrentStack):
    """Stacked ConvLSTM: (B, C, T, H, W) -> (B, N, T, H, W), and the state.

    Args:
        in_channels: C of the input.
        hidden: N of each layer.
        input_kernel: side of W_x, of all layers or one each; odd.
        hidden_kernel: side of W_h, likewise. With 1, positions never exchange information.
        peephole: "channel", "position" (needs ``map_size``) or "none".
        map_size: (H, W) of the maps, for "position".
        output_gate_cell: which cell the output gate's peephole sees, "new" (the paper's) or "old".
        bidirectional, dropout: see :class:`RecurrentStack`, also for ``forward``.
        forget_bias: initial bias of the forget gate.

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
        peephole: MapPeephole = "channel",
        map_size: tuple[int, int] | None = None,
        output_gate_cell: GateCell = "new",
        bidirectional: bool = False,
        dropout: float = 0.0,
        forget_bias: float = 1.0,
    ) -> None:
        widths = layer_widths(hidden)
        input_kernels = per_layer("input_kernel", input_kernel, len(widths))
        hidden_kernels = per_layer("hidden_kernel", hidden_kernel, len(widths))
        layers = (
            ConvLSTMLayer(
                inputs,
                width,
                input_kernel=input_kernels[level],
                hidden_kernel=hidden_kernels[level],
                peephole=peephole,
                map_size=map_size,
                output_gate_cell=output_gate_cell,
                forget_bias=forget_bias,
            )
            for level, inputs, width in layer_places(in_channels, widths, bidirectional=bidirectional)
        )
        super().__init__(layers, bidirectional=bidirectional, dropout=dropout)
