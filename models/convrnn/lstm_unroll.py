"""The peephole LSTM's loop over a whole sequence with its gradient written out: what FC-LSTM and ConvLSTM run on.

Left to autograd, every step records a dozen operations, keeps a dozen tensors, and asks for a weight gradient of its
own. Here a step's gates are computed in place in the buffer of the input's products, only they and the states are
kept, and the gradients of both weights are one product over all steps. The equations are those of :mod:`fc_lstm`, whose
plain loop remains beside this one.

Gate order i, f, g, o. Shape letters: B clips, C channels, T steps, N state channels; "..." is nothing, or H W of maps.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

aten = torch.ops.aten


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, C, ...) -> (B, G, ...): a matrix product, or on maps the convolution that keeps H and W."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def product_gradients(
    d: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`product` by input, weight and bias, those wanted, from that of its result."""
    if weight.ndim == 2:
        return (
            d @ weight if wanted[0] else None,
            d.T @ x if wanted[1] else None,
            d.sum(dim=0) if wanted[2] else None,
        )
    padding = [weight.shape[-1] // 2] * 2
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None] = aten.convolution_backward(
        d, x, weight, [len(weight)], [1, 1], padding, [1, 1], False, [0, 0], 1, list(wanted)
    )
    return gradients


def flat_steps(x: Tensor) -> Tensor:
    """(T, B, C, ...) -> (T B, C, ...), maps channels last: the CPU would reorder every step's map otherwise."""
    frames = x.flatten(0, 1)
    return frames if frames.ndim == 2 else frames.contiguous(memory_format=torch.channels_last)


def product_of_steps(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(T, B, C, ...) -> (T, B, G, ...): :func:`product` of all steps as one batch."""
    y = product(flat_steps(x), weight, bias)
    return y.view(*x.shape[:2], *y.shape[1:])


class Context(Protocol):
    """What :class:`LSTMUnroll` keeps for its backward pass, on the object that autograd hands it."""

    reverse: bool
    new_cell: bool
    input_shape: torch.Size
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


class LSTMUnroll(torch.autograd.Function):
    """``apply(x, weight_input, bias, weight_hidden, peephole, h, c, real, reverse, new_cell)``.

    x (T, B, C, ...); weight_input None leaves the input out; peephole (3, N, ...) or None; h and c (B, N, ...) or both
    None for zeros; real bool (T, B, 1, ...) or None; new_cell: what the output gate sees. Returns the hidden states
    (T, B, N, ...), carried on over padded steps, and the last h and c.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes them by position
        ctx: Context,
        x: Tensor,
        weight_input: Tensor | None,
        bias: Tensor,
        weight_hidden: Tensor,
        peephole: Tensor | None,
        h: Tensor | None,
        c: Tensor | None,
        real: Tensor | None,
        reverse: bool,
        new_cell: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        T, B, N = x.shape[0], x.shape[1], len(bias) // 4
        frames = flat_steps(x)
        if weight_input is None:
            shares = bias.view(-1, *[1] * (x.ndim - 3)).expand(T * B, -1, *x.shape[3:])
            gates = flat_steps(shares.clone().view(T, B, 4 * N, *x.shape[3:]))
        else:
            gates = product(frames, weight_input, bias)
        hidden = torch.empty_like(gates[:, :N])
        cells = torch.empty_like(hidden)
        gates, hidden, cells = (y.view(T, B, *y.shape[1:]) for y in (gates, hidden, cells))
        # A step's h and c are written straight into its rows of the results, and its gates over the products: the loop
        # allocates nothing, and what backward needs is these buffers.
        start = (h, c)
        for t in reversed(range(T)) if reverse else range(T):
            before_h, before_c = h, c
            h, c = hidden[t], cells[t]
            if before_h is not None:
                gates[t] += product(before_h, weight_hidden)
            _step_in_place(gates[t], before_c, h, c, peephole=peephole, new_cell=new_cell)
            if real is not None:
                assert before_h is not None and before_c is not None  # noqa: PT018
                h.copy_(torch.where(real[t], h, before_h))
                c.copy_(torch.where(real[t], c, before_c))
        assert h is not None and c is not None  # noqa: PT018
        ctx.save_for_backward(
            frames, weight_input, weight_hidden, peephole, *start, real, gates, hidden, cells
        )
        ctx.reverse, ctx.new_cell, ctx.input_shape = reverse, new_cell, x.shape
        ctx.set_materialize_grads(False)
        return hidden, h.clone(), c.clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Context, d_hidden: Tensor | None, d_h: Tensor | None, d_c: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        frames, weight_input, weight_hidden, peephole, h0, c0, real, gates, hidden, cells = ctx.saved_tensors
        T = len(hidden)
        order = list(reversed(range(T))) if ctx.reverse else list(range(T))
        d_gates = torch.empty_like(gates)
        d_peephole = None if peephole is None else torch.zeros_like(peephole)
        for at in reversed(range(T)):
            t = order[at]
            before = (hidden[order[at - 1]], cells[order[at - 1]]) if at else (h0, c0)
            if d_hidden is not None:
                d_h = d_hidden[t] if d_h is None else d_h + d_hidden[t]
            if d_h is None:
                d_h = torch.zeros_like(hidden[t])
            kept_h = kept_c = None
            if real is not None:  # a padded step hands its gradient on and takes no part
                kept_h = d_h.masked_fill(real[t], 0.0)
                d_h = d_h.masked_fill(~real[t], 0.0)
                if d_c is not None:
                    kept_c, d_c = d_c.masked_fill(real[t], 0.0), d_c.masked_fill(~real[t], 0.0)
            d_c = _step_gradient(
                (d_gates[t], d_h, d_c),
                (gates[t], cells[t], before[1]),
                peephole=peephole,
                d_peephole=d_peephole,
                new_cell=ctx.new_cell,
            )
            if before[0] is None:
                break
            d_h = product_gradients(d_gates[t], before[0], weight_hidden, (True, False, False))[0]
            assert d_h is not None
            d_h = d_h if kept_h is None else d_h + kept_h
            d_c = d_c if kept_c is None else d_c + kept_c
        wanted = ctx.needs_input_grad
        d_input = _input_gradients(d_gates, frames, weight_input, wanted)
        if d_input[0] is not None:
            d_input = (d_input[0].view(ctx.input_shape), *d_input[1:])
        d_weight = None
        if wanted[3]:
            d_weight = _hidden_weight_gradient(d_gates, hidden, h0, weight_hidden, reverse=ctx.reverse)
        states = (None, None) if h0 is None else (d_h, d_c)
        return (*d_input, d_weight, d_peephole, *states, None, None, None)


def _step_in_place(
    gates: Tensor, c_old: Tensor | None, h: Tensor, c: Tensor, *, peephole: Tensor | None, new_cell: bool
) -> None:
    """Turn the products (B, 4N, ...) into the gates, and write the new h and c."""
    N = h.shape[1]
    i, f, g, o = (gates[:, at : at + N] for at in range(0, 4 * N, N))
    if peephole is not None and c_old is not None:
        i.addcmul_(c_old, peephole[0])
        f.addcmul_(c_old, peephole[1])
    gates[:, : 2 * N].sigmoid_()
    torch.mul(i, g.tanh_(), out=c)
    if c_old is not None:
        c.addcmul_(f, c_old)
    seen = c if new_cell else c_old
    if peephole is not None and seen is not None:
        o.addcmul_(seen, peephole[2])
    torch.mul(o.sigmoid_(), c.tanh(), out=h)


def _step_gradient(
    gradients: tuple[Tensor, Tensor, Tensor | None],
    values: tuple[Tensor, Tensor, Tensor | None],
    *,
    peephole: Tensor | None,
    d_peephole: Tensor | None,
    new_cell: bool,
) -> Tensor:
    """Write the gradient of a step's gates before their nonlinearity, add the peepholes', return the old cell's.

    ``gradients`` are the buffer of the first, and the new h's and c's; ``values`` the gates, c and the old c.
    """
    (d_gates, d_h, d_c), (gates, c, c_old) = gradients, values
    N = c.shape[1]
    i, f, g, o = (gates[:, at : at + N] for at in range(0, 4 * N, N))
    d_i, d_f, d_g, d_o = (d_gates[:, at : at + N] for at in range(0, 4 * N, N))
    # h = o tanh(c): the gradient of o before its sigmoid, and what reaches c through h
    tanh_c = c.tanh()
    _through_sigmoid(torch.mul(d_h, tanh_c, out=d_o), o)
    through_h: Tensor = aten.tanh_backward(d_h * o, tanh_c)
    d_c = through_h if d_c is None else through_h.add_(d_c)
    if peephole is not None and new_cell:  # o has looked at c, which therefore gets a share from it
        d_c.addcmul_(d_o, peephole[2])
    # c = f c_old + i g
    _through_sigmoid(torch.mul(d_c, g, out=d_i), i)
    aten.tanh_backward.grad_input(torch.mul(d_c, i, out=d_g), g, grad_input=d_g)
    if c_old is None:
        d_f.zero_()
    else:
        _through_sigmoid(torch.mul(d_c, c_old, out=d_f), f)
    d_c.mul_(f)  # from here on the old cell's
    if peephole is not None:
        assert d_peephole is not None
        for gate, d, seen in ((0, d_i, c_old), (1, d_f, c_old), (2, d_o, c if new_cell else c_old)):
            if seen is not None:
                # one weight per channel on maps: summed over clips and positions
                d_peephole[gate] += (d * seen).sum_to_size(peephole[gate].shape)
        d_c.addcmul_(d_i, peephole[0]).addcmul_(d_f, peephole[1])
        if not new_cell:
            d_c.addcmul_(d_o, peephole[2])
    return d_c


def _through_sigmoid(d: Tensor, y: Tensor) -> None:
    """The gradient of a sigmoid's result y, in place, to that of its argument."""
    aten.sigmoid_backward.grad_input(d, y, grad_input=d)


def _input_gradients(
    d_gates: Tensor, frames: Tensor, weight_input: Tensor | None, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of the input, its weight and the bias, over all steps at once."""
    d = d_gates.flatten(0, 1)
    if weight_input is None:
        return None, None, d.sum(dim=[0, *range(2, d.ndim)]) if wanted[2] else None
    return product_gradients(d, frames, weight_input, (wanted[0], wanted[1], wanted[2]))


def _hidden_weight_gradient(
    d_gates: Tensor, hidden: Tensor, h0: Tensor | None, weight_hidden: Tensor, *, reverse: bool
) -> Tensor:
    """Of the state's weight: one product of all steps with the states before them, and the first with h0."""
    total = None
    if len(hidden) > 1:
        d, before = (d_gates[:-1], hidden[1:]) if reverse else (d_gates[1:], hidden[:-1])
        flat = (d.flatten(0, 1), before.flatten(0, 1))
        total = product_gradients(*flat, weight_hidden, (False, True, False))[1]
    if h0 is not None:
        first = d_gates[-1] if reverse else d_gates[0]
        of_start = product_gradients(first, h0, weight_hidden, (False, True, False))[1]
        total = of_start if total is None or of_start is None else total + of_start
    assert total is not None
    return total
