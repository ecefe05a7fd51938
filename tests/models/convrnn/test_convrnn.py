"""FC-LSTM, ConvLSTM and ConvGRU against torch.nn.LSTM, ONNX's LSTM and plain loops over the papers' equations.

Every reference is written from the papers' equations or belongs to another library; double precision where it can, so
that 1e-12 tells a wrong term from rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.convrnn.conv_gru import ConvGRU
from cliplift.models.convrnn.conv_lstm import ConvLSTM, ConvLSTMLayer
from cliplift.models.convrnn.fc_lstm import FCLSTM, FCLSTMLayer

EXACT = 1e-12  # double precision: a few hundred additions of numbers around 1

Randomise = Callable[..., Any]


def vectors(B: int, T: int, D: int = 5) -> Tensor:
    return torch.randn(B, T, D, dtype=torch.float64)


def maps(B: int, T: int, C: int = 3) -> Tensor:
    return torch.randn(B, C, T, 6, 5, dtype=torch.float64)


# FC-LSTM


@pytest.mark.parametrize("bidirectional", [False, True])
def test_fc_lstm_without_peepholes_is_torch_lstm(bidirectional: bool, randomised: Randomise) -> None:
    ours = randomised(FCLSTM(5, (7, 7), peephole="none", bidirectional=bidirectional))
    theirs = nn.LSTM(5, 7, 2, batch_first=True, bidirectional=bidirectional).double()
    suffixes = ("", "_reverse") if bidirectional else ("",)
    with torch.no_grad():
        for i, layer in enumerate(ours.layers):
            name = f"l{i // len(suffixes)}{suffixes[i % len(suffixes)]}"
            theirs.get_parameter(f"weight_ih_{name}").copy_(layer.weight_input)
            theirs.get_parameter(f"weight_hh_{name}").copy_(layer.weight_hidden)
            theirs.get_parameter(f"bias_ih_{name}").copy_(layer.bias)
            theirs.get_parameter(f"bias_hh_{name}").zero_()
    x = vectors(3, 9).requires_grad_()
    y = x.detach().clone().requires_grad_()
    outputs, state = ours(x)
    expected, (h, c) = theirs(y)
    assert (outputs - expected).abs().max() < EXACT
    assert (torch.stack([s[0] for s in state]) - h).abs().max() < EXACT
    assert (torch.stack([s[1] for s in state]) - c).abs().max() < EXACT
    outputs.square().sum().backward()
    expected.square().sum().backward()
    assert (x.grad - y.grad).abs().max() < EXACT  # type: ignore[operator]
    hidden = theirs.get_parameter("weight_hh_l0").grad
    assert hidden is not None
    assert (ours.layers[0].weight_hidden.grad - hidden).abs().max() < 1e-11


def onnx_lstm(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """ONNX's LSTM with P: gates in order i, o, f, c, peepholes i, o, f. (B, T, D) -> (B, T, N), last cell."""
    N = layer.channels
    order = torch.cat([torch.arange(N) + N * gate for gate in (0, 3, 1, 2)])
    peepholes = [layer.peephole[gate] for gate in (0, 2, 1)]
    inputs = {
        "X": x.transpose(0, 1),
        "W": layer.weight_input[order][None],
        "R": layer.weight_hidden[order][None],
        "B": torch.cat([layer.bias[order], torch.zeros(4 * N)])[None],
        "P": torch.cat(peepholes)[None],
    }
    arrays = {name: tensor.detach().float().numpy() for name, tensor in inputs.items()}
    names = ["X", "W", "R", "B", "", "", "", "P"]
    node = onnx.helper.make_node("LSTM", names, ["Y", "Y_h", "Y_c"], hidden_size=N)
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "lstm",
        [onnx.helper.make_tensor_value_info(name, float32, array.shape) for name, array in arrays.items()],
        [onnx.helper.make_tensor_value_info(name, float32, None) for name in ("Y", "Y_h", "Y_c")],
    )
    hidden, _, cell = ReferenceEvaluator(onnx.helper.make_model(graph)).run(None, arrays)
    return torch.from_numpy(np.asarray(hidden))[:, 0].transpose(0, 1), torch.from_numpy(np.asarray(cell))[0]


def test_fc_lstm_with_diagonal_peepholes_is_onnx_lstm(randomised: Randomise) -> None:
    lstm = randomised(FCLSTM(5, 6)).float()
    x = vectors(2, 8).float()
    hidden, cell = onnx_lstm(lstm.layers[0], x)
    outputs, ((_, c),) = lstm(x)
    assert (outputs - hidden).abs().max() <= 1e-6
    assert (c - cell).abs().max() <= 1e-6
    old = randomised(FCLSTM(5, 6, output_gate_cell="old")).float()
    assert (old(x)[0] - hidden).abs().max() > 1e-3, "the old cell in the output gate is another network"


@pytest.mark.parametrize("cell", ["new", "old"])
def test_fc_lstm_with_matrices_as_peepholes_follows_the_equations(cell: Any, randomised: Randomise) -> None:
    lstm = randomised(FCLSTM(4, 3, peephole="full", output_gate_cell=cell))
    layer = lstm.layers[0]
    x = vectors(2, 6, 4)
    W, U, b, V = layer.weight_input, layer.weight_hidden, layer.bias, layer.peephole
    h = c = torch.zeros(2, 3, dtype=torch.float64)
    for t in range(6):
        i, f, g, o = (
            torch.einsum("gd,bd->gb", W, x[:, t]) + torch.einsum("gn,bn->gb", U, h) + b[:, None]
        ).chunk(4)
        old = c
        i = torch.sigmoid(i + torch.einsum("mn,bn->mb", V[0], old)).T
        f = torch.sigmoid(f + torch.einsum("mn,bn->mb", V[1], old)).T
        c = f * old + i * torch.tanh(g).T
        seen = c if cell == "new" else old
        o = torch.sigmoid(o + torch.einsum("mn,bn->mb", V[2], seen)).T
        h = o * torch.tanh(c)
        assert (lstm(x)[0][:, t] - h).abs().max() < EXACT


# ConvLSTM


def test_a_1x1_conv_lstm_on_a_1x1_map_is_fc_lstm(randomised: Randomise) -> None:
    conv = randomised(ConvLSTM(5, (4, 3), input_kernel=1, hidden_kernel=1))
    full = randomised(FCLSTM(5, (4, 3)))
    state = {key: value.reshape(full.state_dict()[key].shape) for key, value in conv.state_dict().items()}
    full.load_state_dict(state)
    x = vectors(3, 7)
    outputs, _ = conv(x.transpose(1, 2)[..., None, None])
    assert (outputs[..., 0, 0].transpose(1, 2) - full(x)[0]).abs().max() < EXACT


def correlate(x: Tensor, weight: Tensor) -> Tensor:
    """A zero-padded convolution from its definition: one product for every shift of the map. (B, C, H, W)."""
    K = weight.shape[-1]
    padded = F.pad(x, (K // 2,) * 4)
    H, W = x.shape[-2:]
    shifts = [
        torch.einsum("oc,bchw->bohw", weight[:, :, dy, dx], padded[:, :, dy : dy + H, dx : dx + W])
        for dy in range(K)
        for dx in range(K)
    ]
    return torch.stack(shifts).sum(0)


@pytest.mark.parametrize("peephole", ["none", "channel", "position"])
@pytest.mark.parametrize("cell", ["new", "old"])
def test_conv_lstm_follows_the_equations(peephole: Any, cell: Any, randomised: Randomise) -> None:
    net = randomised(
        ConvLSTM(
            3, 4, input_kernel=5, hidden_kernel=3, peephole=peephole, map_size=(6, 5), output_gate_cell=cell
        )
    )
    layer = net.layers[0]
    x = maps(2, 4)
    peep = torch.zeros(3, 4, 1, 1, dtype=torch.float64) if layer.peephole is None else layer.peephole
    h = c = torch.zeros(2, 4, 6, 5, dtype=torch.float64)
    outputs, ((last, memory),) = net(x)
    for t in range(4):
        gates = correlate(x[:, :, t], layer.weight_input) + correlate(h, layer.weight_hidden)
        i, f, g, o = (gates + layer.bias[:, None, None]).chunk(4, dim=1)
        old = c
        c = torch.sigmoid(f + peep[1] * old) * old + torch.sigmoid(i + peep[0] * old) * torch.tanh(g)
        h = torch.sigmoid(o + peep[2] * (c if cell == "new" else old)) * torch.tanh(c)
        assert (outputs[:, :, t] - h).abs().max() < EXACT
    assert (last - h).abs().max() < EXACT
    assert (memory - c).abs().max() < EXACT


def test_conv_lstm_gradients_are_those_of_the_equations(randomised: Randomise) -> None:
    """Numerical derivatives of every input, weight and state, masks and both directions included."""
    net = randomised(ConvLSTM(2, 2, hidden_kernel=3, input_kernel=1, bidirectional=True))
    x = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    h = [torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    names = [name for name, _ in net.named_parameters()]
    values = [p.detach().requires_grad_() for p in net.parameters()]

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        state = ((rest[0], rest[1]), (rest[2], rest[3]))
        weights = dict(zip(names, rest[4:], strict=True))
        options = {"lengths": torch.tensor([2, 3])}
        outputs, after = torch.func.functional_call(net, weights, (x, state), options)
        return (outputs, *(tensor for layer in after for tensor in layer))

    assert torch.autograd.gradcheck(run, (x, *h, *values))


@pytest.mark.parametrize("start", ["zeros", "given"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", ["new", "old"])
@pytest.mark.parametrize("peephole", ["none", "channel", "position", "diagonal", "no input"])
def test_the_written_out_gradient_is_autograds(
    peephole: Any, cell: Any, reverse: bool, padded: bool, start: str, *, randomised: Randomise
) -> None:
    """Outputs, states and every gradient, against the same layer's plain loop, for 1 and for 4 steps."""
    if peephole in ("diagonal", "no input"):
        layer: Any = FCLSTMLayer(0 if peephole == "no input" else 3, 4, output_gate_cell=cell)
    else:
        layer = ConvLSTMLayer(3, 4, peephole=peephole, map_size=(3, 2), output_gate_cell=cell)
    randomised(layer)
    grid = () if isinstance(layer, FCLSTMLayer) else (3, 2)
    for T in (1, 4):
        x, h, c = (torch.randn(*s, *grid, dtype=torch.float64) for s in ((T, 2, 3), (2, 4), (2, 4)))
        real = (torch.rand(T, 2, 1) < 0.6).view(T, 2, 1, *(1 for _ in grid)) if padded else None
        weights = [
            torch.randn(T, 2, 4, *grid, dtype=torch.float64),
            torch.randn(2, 2, 4, *grid, dtype=torch.float64),
        ]
        found = []
        for written_out in (True, False):
            layer.written_out = written_out
            inputs = [t.clone().requires_grad_() for t in (x, h, c)]
            state = (inputs[1], inputs[2]) if start == "given" else None
            hidden, (last_h, last_c) = layer(inputs[0], state, real, reverse)
            loss = (hidden * weights[0]).sum() + (torch.stack([last_h, last_c]) * weights[1]).sum()
            used = [*layer.parameters(), *(inputs if start == "given" else inputs[:1])]
            gradients = torch.autograd.grad(loss, used, materialize_grads=True, allow_unused=True)
            found.append([hidden, last_h, last_c, *gradients])
        for ours, autograds in zip(*found, strict=True):
            assert (ours - autograds).abs().max() < EXACT


@pytest.mark.gpu
def test_the_written_out_gradient_is_autograds_on_a_gpu(randomised: Randomise) -> None:
    net = randomised(ConvLSTM(3, (4, 2), bidirectional=True)).cuda()
    x = maps(2, 5).cuda()
    lengths = torch.tensor([5, 3], device="cuda")
    found = []
    for written_out in (True, False):
        for layer in net.layers:
            layer.written_out = written_out
        net.zero_grad()
        outputs, _ = net(x, lengths=lengths)
        outputs.square().sum().backward()
        found.append([outputs.detach(), *(p.grad.clone() for p in net.parameters())])
    assert all((a - b).abs().max() < 1e-11 for a, b in zip(*found, strict=True))


def test_a_second_derivative_needs_the_plain_loop(randomised: Randomise) -> None:
    layer = randomised(ConvLSTMLayer(2, 2))
    x = torch.randn(3, 1, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def slope(x: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        return gradient.square().sum()

    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope(x).backward()
    layer.written_out = False
    assert torch.autograd.gradcheck(slope, x)


def test_autocast_runs_the_products_in_bfloat16() -> None:
    layer = ConvLSTMLayer(3, 4)
    x = torch.rand(3, 2, 3, 5, 5)
    expected = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        hidden = layer(x)[0]
    hidden.float().square().sum().backward()
    assert 0 < (hidden.float() - expected).abs().max() < 0.02
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


# ConvGRU


def gru_step(x: Tensor, h: Tensor, layer: Any, lower: Tensor | None = None) -> Tensor:
    """Equations 3 to 6 of GRU-RCN, and 7 to 10 with the lower layer's state."""
    N = layer.channels
    wz, wr, w = layer.weight_input.split(N)
    uz, ur = layer.weight_gates.split(N)
    bz, br, b = (0, 0, 0) if layer.bias is None else layer.bias[:, None, None].split(N)
    z, r = correlate(x, wz) + correlate(h, uz) + bz, correlate(x, wr) + correlate(h, ur) + br
    shares = [0.0, 0.0, 0.0]
    if lower is not None:
        for gate, part in enumerate(layer.weight_lower.split(N)):
            shares[gate] = correlate(lower, part)  # type: ignore[call-overload]
    z, r = torch.sigmoid(z + shares[0]), torch.sigmoid(r + shares[1])
    candidate = torch.tanh(correlate(x, w) + correlate(r * h, layer.weight_candidate) + b + shares[2])
    return (1 - z) * h + z * candidate


@pytest.mark.parametrize("lower_hidden", ["input", "gates", "gates_and_candidate"])
@pytest.mark.parametrize("bias", [True, False])
def test_conv_gru_follows_the_equations(lower_hidden: Any, bias: bool, randomised: Randomise) -> None:
    net = randomised(ConvGRU(3, (4, 2), lower_hidden=lower_hidden, bias=bias, input_kernel=(3, 5)))
    first, second = net.layers
    x = maps(2, 5)
    a, b = (torch.zeros(2, n, 6, 5, dtype=torch.float64) for n in (4, 2))
    outputs, _ = net(x)
    for t in range(5):
        a = gru_step(x[:, :, t], a, first)
        b = gru_step(a, b, second) if lower_hidden == "input" else gru_step(x[:, :, t], b, second, a)
        assert (outputs[:, :, t] - b).abs().max() < EXACT


def test_conv_gru_is_not_torch_gru(randomised: Randomise) -> None:
    """torch resets after the product and lets z keep the old state; with z negated and no reset they would agree."""
    net = randomised(ConvGRU(3, 4, input_kernel=1, hidden_kernel=1))
    layer = net.layers[0]
    theirs = nn.GRU(3, 4, batch_first=True).double()
    order = torch.cat([torch.arange(4) + 4, torch.arange(4), torch.arange(4) + 8])  # torch: r, z, n
    sign = torch.ones(12, 1, dtype=torch.float64)
    sign[4:8] = -1
    x = vectors(2, 1, 3)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(layer.weight_input[order, :, 0, 0] * sign)
        hidden = torch.cat([layer.weight_gates, layer.weight_candidate])[order, :, 0, 0]
        theirs.weight_hh_l0.copy_(hidden * sign)
        theirs.bias_ih_l0.copy_(layer.bias[order] * sign[:, 0])
        theirs.bias_hh_l0.zero_()

    def ours(x: Tensor) -> Tensor:
        hidden: Tensor = net(x.transpose(1, 2)[..., None, None])[0][..., 0, 0].transpose(1, 2)
        return hidden

    assert (ours(x) - theirs(x)[0]).abs().max() < EXACT, "the first step has no state to reset"
    x = vectors(2, 4, 3)
    assert (ours(x) - theirs(x)[0]).abs().max() > 1e-3
