"""Where ConvLSTM's options arrive, and with which numbers its weights start."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cliplift.models.convrnn.conv_lstm import ConvLSTM, ConvLSTMLayer, odd_padding
from cliplift.models.convrnn.lstm_unroll import product_of_steps
from cliplift.models.convrnn.recurrence import per_layer
from cliplift.models.protocol import ModelError


@pytest.mark.parametrize("forget_bias", [0.0, 1.0, 2.5])
def test_the_forget_gate_starts_with_its_bias_and_the_others_with_zero(forget_bias: float) -> None:
    """Gates stand in the order i, f, g, o; every layer and direction has the bias."""
    net = ConvLSTM(3, (4, 2), bidirectional=True, forget_bias=forget_bias)
    assert len(net.layers) == 4
    for layer in net.layers:
        N = layer.channels
        assert layer.bias.tolist() == [0.0] * N + [forget_bias] * N + [0.0] * (2 * N)
        assert not layer.peephole.any()


def test_a_new_cell_remembers_unless_told_otherwise() -> None:
    """Jozefowicz et al. (ICML 2015): a forget bias of 1."""
    assert ConvLSTM(3, 4).layers[0].bias[4:8].tolist() == [1.0] * 4
    assert ConvLSTMLayer(3, 4).bias[4:8].tolist() == [1.0] * 4


@pytest.mark.parametrize("input_kernel", [1, 5])
def test_weights_start_uniform_by_their_fan_in(input_kernel: int) -> None:
    torch.manual_seed(0)
    layer = ConvLSTMLayer(16, 32, input_kernel=input_kernel, hidden_kernel=3)
    for weight, fan_in in ((layer.weight_input, 16 * input_kernel**2), (layer.weight_hidden, 32 * 9)):
        bound = 1 / math.sqrt(fan_in)
        assert 0.99 * bound < weight.abs().max().item() <= bound
        assert weight.mean().abs().item() < 0.1 * bound


@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_layer_has_its_own_kernels_and_reads_all_directions_below(bidirectional: bool) -> None:
    net = ConvLSTM(
        3, (4, 6, 5), input_kernel=(1, 3, 5), hidden_kernel=(5, 1, 3), bidirectional=bidirectional
    )  # fmt: skip
    ways = 2 if bidirectional else 1
    shapes = [(tuple(m.weight_input.shape), tuple(m.weight_hidden.shape)) for m in net.layers]
    assert shapes[::ways] == [
        ((16, 3, 1, 1), (16, 4, 5, 5)),
        ((24, 4 * ways, 3, 3), (24, 6, 1, 1)),
        ((20, 6 * ways, 5, 5), (20, 5, 3, 3)),
    ]
    assert len(shapes) == 3 * ways
    assert net(torch.zeros(1, 3, 2, 7, 6))[0].shape == (1, 5 * ways, 2, 7, 6)


def test_kernels_are_of_three_and_peepholes_per_channel_unless_told_otherwise() -> None:
    """Parameters of the papers' layer: 4N (C K^2 + N K^2 + 1) + 3N."""
    for made in (ConvLSTM(3, 4).layers[0], ConvLSTMLayer(3, 4)):
        assert sum(p.numel() for p in made.parameters()) == 16 * (3 * 9 + 4 * 9 + 1) + 12
        assert made.peephole.shape == (3, 4, 1, 1)
        assert made.output_gate_cell == "new"
    net = ConvLSTM(3, 4)
    assert len(net.layers) == 1
    assert (net.training, net(torch.zeros(1, 3, 2, 5, 5))[0].shape) == (True, (1, 4, 2, 5, 5))


@pytest.mark.parametrize(
    ("peephole", "shape"), [("channel", (3, 4, 1, 1)), ("position", (3, 4, 6, 5)), ("none", None)]
)
def test_peepholes_are_three_a_channel_or_position(peephole: Any, shape: tuple[int, ...] | None) -> None:
    layer = ConvLSTMLayer(3, 4, peephole=peephole, map_size=(6, 5))
    assert (None if layer.peephole is None else tuple(layer.peephole.shape)) == shape


@pytest.mark.parametrize(("height", "width"), [(6, 4), (5, 5), (1, 1), (12, 10)])
def test_maps_of_another_size_than_the_peepholes_are_refused(height: int, width: int) -> None:
    net = ConvLSTM(3, 4, peephole="position", map_size=(6, 5))
    with pytest.raises(ModelError, match=f"built for maps of 6x5, got {height}x{width}"):
        net(torch.zeros(1, 3, 2, height, width))
    for peephole in ("channel", "none"):
        assert ConvLSTM(3, 4, peephole=peephole)(torch.zeros(1, 3, 2, height, width))[0].shape[-2:] == (
            height,
            width,
        )


@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 1), (5, 2), (7, 3)])
def test_odd_kernels_are_padded_to_keep_the_map(kernel: int, padding: int) -> None:
    assert odd_padding("k", kernel) == padding


@pytest.mark.parametrize("kernel", [-3, -1, 0, 2, 4])
def test_even_and_negative_kernels_are_refused(kernel: int) -> None:
    with pytest.raises(ModelError, match=f"k={kernel} must be odd"):
        odd_padding("k", kernel)


def test_without_an_input_the_gates_are_the_bias_everywhere() -> None:
    layer = ConvLSTMLayer(0, 2)
    assert layer.weight_input is None
    with torch.no_grad():
        layer.bias.copy_(torch.arange(8.0))
    gates = layer.project(torch.empty(3, 2, 0, 4, 5))
    assert torch.equal(gates, torch.arange(8.0).view(1, 1, 8, 1, 1).expand(3, 2, 8, 4, 5))


def test_all_steps_are_convolved_as_one_batch() -> None:
    """Against one convolution a step, and in the layout that the recurrence goes on with."""
    x = torch.randn(3, 2, 4, 6, 5, dtype=torch.float64)
    weight, bias = torch.randn(8, 4, 3, 3, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    y = product_of_steps(x, weight, bias)
    assert y.shape == (3, 2, 8, 6, 5)
    for step in range(3):
        expected = torch.nn.functional.conv2d(x[step], weight, bias, padding=1)
        torch.testing.assert_close(y[step], expected, rtol=0, atol=1e-12)
        assert y[step].is_contiguous(memory_format=torch.channels_last)


def test_one_number_is_for_all_layers() -> None:
    assert per_layer("k", 3, 2) == (3, 3)
    assert per_layer("k", [3, 5], 2) == (3, 5)
    for value, layers in (([3], 2), ([3, 3, 3], 2), ([], 1)):
        with pytest.raises(ModelError, match=f"is for {len(value)} layers, the network has {layers}"):
            per_layer("k", value, layers)
