"""A stacked LSTM with one bias per gate, as the papers count it, whose state the caller can carry, freeze and reset.

Equations (Donahue et al., LRCN, arXiv 1411.4389, section 2; s is the logistic function):

    i, f, o = s(W x_t + U h_{t-1} + b)      g = tanh(W x_t + U h_{t-1} + b)
    c_t = f * c_{t-1} + i * g               h_t = o * tanh(c_t)

``torch.nn.LSTM`` is the same function with two bias vectors per gate that only ever appear as their sum; the published
parameter counts have one. Its fused kernel is used here with zeros for the second. Peepholes are in
:mod:`cliplift.models.convrnn.fc_lstm`, which has no fused kernel.

Shape letters: B clips, T frames, D input width, H hidden width, L layers.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.protocol import ModelError, check_choices

State = tuple[Tensor, Tensor]  # h and c, each (L, B, H)
Init = Literal["torch", "lrcn", "orthogonal"]

LRCN_BOUND = 0.01  # U(-0.01, 0.01) and zero bias: lisa-caffe-public, LRCN_activity_recognition


class LSTM(nn.Module):
    """``forward(x)``: (B, T, D) -> (B, T, H) of the top layer, and the state after the last real frame.

    Args:
        input_size: D.
        hidden_size: H of every layer.
        layers: L.
        init: "torch" is U(-1/sqrt(H), 1/sqrt(H)) for everything; "lrcn" is U(-0.01, 0.01) with zero bias; "orthogonal"
            has an orthogonal U for every gate, W from N(0, 0.01) and zero bias (kracwarlock/action-recognition).

    Gates stand in the order i, f, g, o, as in ``torch.nn.LSTM``.
    """

    def __init__(self, input_size: int, hidden_size: int, *, layers: int = 1, init: Init = "torch") -> None:
        super().__init__()
        if hidden_size < 1 or layers < 1:
            raise ModelError(f"an LSTM of layers={layers} and hidden={hidden_size}: both must be 1 or more")
        check_choices(Init, init=init)
        self.input_size, self.hidden_size, self.layers, self.init = input_size, hidden_size, layers, init
        for layer in range(layers):
            width = input_size if layer == 0 else hidden_size
            setattr(self, f"weight_x{layer}", nn.Parameter(torch.empty(4 * hidden_size, width)))
            setattr(self, f"weight_h{layer}", nn.Parameter(torch.empty(4 * hidden_size, hidden_size)))
            setattr(self, f"bias{layer}", nn.Parameter(torch.empty(4 * hidden_size)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch_bound = 1 / math.sqrt(self.hidden_size)
        for layer in range(self.layers):
            weight_x, weight_h, bias = self.layer_weights(layer)
            if self.init == "orthogonal":
                nn.init.normal_(weight_x, std=0.01)
                for gate in torch.split(weight_h.data, self.hidden_size):
                    nn.init.orthogonal_(gate)
                nn.init.zeros_(bias)
            else:
                bound = LRCN_BOUND if self.init == "lrcn" else torch_bound
                nn.init.uniform_(weight_x, -bound, bound)
                nn.init.uniform_(weight_h, -bound, bound)
                if self.init == "lrcn":
                    nn.init.zeros_(bias)
                else:
                    nn.init.uniform_(bias, -bound, bound)

    def layer_weights(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """W (4H, D or H), U (4H, H) and b (4H,) of one layer."""
        weight_x, weight_h, bias = (
            getattr(self, f"{name}{layer}") for name in ("weight_x", "weight_h", "bias")
        )
        return weight_x, weight_h, bias

    def zero_state(self, x: Tensor) -> State:
        """h = c = 0 for the clips of ``x`` (B, T, D)."""
        zeros = x.new_zeros(self.layers, x.shape[0], self.hidden_size)
        return zeros, zeros

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        starts: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """(B, T, D) -> (B, T, H) and the state (h, c), each (L, B, H).

        Args:
            x: inputs of every step.
            state: where the recurrence continues; None starts at zero.
            starts: bool (B, T), True at the first frame of a clip: the state is zero before it. It is the opposite of
                the ``clip_markers`` of the LRCN release, which are 0 there. None resets nothing.
            lengths: int64 (B,), real frames of each row; the rest is padding behind them, for which the state stands
                still. None means that all T are real.

        Raises:
            ModelError: shapes that do not fit.
        """
        if x.ndim != 3 or x.shape[2] != self.input_size:
            raise ModelError(f"the LSTM takes (B, T, {self.input_size}), got {tuple(x.shape)}")
        B, T = x.shape[:2]
        if starts is not None and (starts.shape != (B, T) or starts.dtype != torch.bool):
            raise ModelError(f"starts must be bool {(B, T)}, got {starts.dtype} {tuple(starts.shape)}")
        if state is None:
            state = self.zero_state(x)
        # the fused kernel packs the weights at every call, which a single step does not repay
        if T == 1 or starts is not None or lengths is not None:
            real = None if lengths is None else real_frames(lengths, clips=B, frames=T)
            return self._stepwise(x, state, starts, real)
        weights = [self.layer_weights(layer) for layer in range(self.layers)]
        # zeros for the kernel's second bias
        flat = [tensor for x_h_bias in weights for tensor in (*x_h_bias, torch.zeros_like(x_h_bias[2]))]
        outputs, h, c = torch.lstm(x, state, flat, True, self.layers, 0.0, self.training, False, True)
        return outputs, (h, c)

    def _stepwise(
        self, x: Tensor, state: State, starts: Tensor | None, real: Tensor | None
    ) -> tuple[Tensor, State]:
        """The same recurrence written out, for states that change between steps."""
        last: list[State] = []
        for layer in range(self.layers):
            weight_x, weight_h, bias = self.layer_weights(layer)
            from_input = F.linear(x, weight_x, bias).unbind(1)  # all steps in one product
            h, c = state[0][layer], state[1][layer]
            outputs = []
            for t, gates in enumerate(from_input):
                if starts is not None:
                    first = starts[:, t, None]
                    h, c = h.masked_fill(first, 0), c.masked_fill(first, 0)
                i, f, g, o = (gates + F.linear(h, weight_h)).chunk(4, dim=1)
                new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                new_h = o.sigmoid() * new_c.tanh()
                if real is None:
                    h, c = new_h, new_c
                else:
                    h, c = torch.where(real[:, t, None], new_h, h), torch.where(real[:, t, None], new_c, c)
                outputs.append(h)
            x = torch.stack(outputs, dim=1)
            last.append((h, c))
        return x, (torch.stack([h for h, _ in last]), torch.stack([c for _, c in last]))


def real_frames(lengths: Tensor, *, clips: int, frames: int) -> Tensor:
    """Real frames of each clip, int64 (B,), to bool (B, T): False for the padding behind them.

    Raises:
        ModelError: another shape or type. Each clip needs at least one real frame; that is the caller's to see to, as
            looking at the values would stall the device.
    """
    if lengths.shape != (clips,) or lengths.dtype != torch.int64:
        raise ModelError(f"lengths must be int64 ({clips},), got {lengths.dtype} {tuple(lengths.shape)}")
    return torch.arange(frames, device=lengths.device)[None, :] < lengths[:, None]
