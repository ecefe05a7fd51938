"""What every recurrent stack promises: state over chunks, padding, both directions, one input product, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cliplift.models.convrnn.conv_gru import ConvGRU
from cliplift.models.convrnn.conv_lstm import ConvLSTM
from cliplift.models.convrnn.fc_lstm import FCLSTM
from cliplift.models.convrnn.recurrence import RecurrentStack, StackState
from cliplift.models.protocol import ModelError
from cliplift.pipelines.compute.recompute import recompute_blocks

EXACT = 1e-12  # double precision: a few hundred additions of numbers around 1

Randomise = Callable[..., Any]
Sample = Callable[[int, int], Tensor]


def vectors(B: int, T: int, D: int = 5) -> Tensor:
    return torch.randn(B, T, D, dtype=torch.float64)


def maps(B: int, T: int, C: int = 3) -> Tensor:
    return torch.randn(B, C, T, 6, 5, dtype=torch.float64)


STACKS: dict[str, tuple[Callable[[], RecurrentStack], Sample]] = {
    "fc diagonal": (lambda: FCLSTM(5, (4, 3)), vectors),
    "fc full old": (lambda: FCLSTM(5, (4, 3), peephole="full", output_gate_cell="old"), vectors),
    "fc both ways": (lambda: FCLSTM(5, (4, 3), bidirectional=True), vectors),
    "convlstm channel": (lambda: ConvLSTM(3, (4, 2)), maps),
    "convlstm position": (lambda: ConvLSTM(3, 4, peephole="position", map_size=(6, 5)), maps),
    "convlstm none both ways": (lambda: ConvLSTM(3, (4, 2), peephole="none", bidirectional=True), maps),
    "convgru": (lambda: ConvGRU(3, (4, 2)), maps),
    "convgru paper's stack": (lambda: ConvGRU(3, (4, 2), lower_hidden="gates", bias=False), maps),
    "convgru both ways": (lambda: ConvGRU(3, (4, 2), lower_hidden="gates", bidirectional=True), maps),
}


def time_axis(x: Tensor) -> int:
    return 1 if x.ndim == 3 else 2


def flat(state: StackState) -> list[Tensor]:
    return [tensor for layer in state for tensor in layer]


@pytest.mark.parametrize("name", [name for name in STACKS if "both ways" not in name])
def test_state_carried_over_chunks_equals_one_pass(name: str, randomised: Randomise) -> None:
    build, sample = STACKS[name]
    net = randomised(build())
    x = sample(2, 7)
    whole, after = net(x)
    axis = time_axis(x)
    state = None
    parts = []
    for chunk in x.split([3, 1, 3], dim=axis):
        part, state = net(chunk, state)
        parts.append(part)
    assert (torch.cat(parts, dim=axis) - whole).abs().max() < EXACT
    assert all((a - b).abs().max() < EXACT for a, b in zip(flat(state), flat(after), strict=True))


@pytest.mark.parametrize("name", STACKS)
def test_padding_never_reaches_a_real_frame(name: str, randomised: Randomise) -> None:
    """Clips of 3 and 7 steps, padded with NaN: outputs, states and gradients are those of the clips alone."""
    build, sample = STACKS[name]
    net = randomised(build())
    x = sample(2, 7)
    axis = time_axis(x)
    alone = []
    for row, length in enumerate((3, 7)):
        outputs, state = net(x[row : row + 1].narrow(axis, 0, length))
        outputs.square().sum().backward()
        alone.append((outputs, flat(state)))
    wanted = {key: p.grad.clone() for key, p in net.named_parameters()}
    net.zero_grad()
    padded = x.clone()
    padded[0].narrow(axis - 1, 3, 4).fill_(torch.nan)
    outputs, state = net(padded, lengths=torch.tensor([3, 7]))
    outputs.square().sum().backward()
    for row, length in enumerate((3, 7)):
        assert (outputs[row : row + 1].narrow(axis, 0, length) - alone[row][0]).abs().max() < EXACT
        for together, single in zip(flat(state), alone[row][1], strict=True):
            assert (together[row] - single[0]).abs().max() < EXACT
    assert (outputs[0].narrow(axis - 1, 3, 4) == 0).all()
    for key, p in net.named_parameters():
        assert (p.grad - wanted[key]).abs().max() < 1e-10, key
    mask = torch.arange(7) < torch.tensor([[3], [7]])
    assert torch.equal(net(padded, mask=mask)[0], outputs)


@pytest.mark.parametrize("name", STACKS)
def test_padding_in_front_and_holes_are_skipped(name: str, randomised: Randomise) -> None:
    build, sample = STACKS[name]
    net = randomised(build())
    x = sample(1, 6)
    axis = time_axis(x)
    real = torch.tensor([False, True, True, False, True, False])
    outputs, state = net(x, mask=real[None])
    packed, wanted = net(x.index_select(axis, real.nonzero()[:, 0]))
    assert (outputs.index_select(axis, real.nonzero()[:, 0]) - packed).abs().max() < EXACT
    assert all((a - b).abs().max() < EXACT for a, b in zip(flat(state), flat(wanted), strict=True))


def test_both_directions_are_two_stacks_of_one_layer(randomised: Randomise) -> None:
    both = randomised(ConvGRU(3, 4, bidirectional=True))
    x = maps(2, 5)
    outputs, _ = both(x)
    for direction in range(2):
        one = ConvGRU(3, 4).double()
        one.layers[0].load_state_dict(both.layers[direction].state_dict())
        seen = x.flip(2) if direction else x
        alone = one(seen)[0]
        alone = alone.flip(2) if direction else alone
        assert (outputs[:, 4 * direction : 4 * direction + 4] - alone).abs().max() < EXACT


def test_the_input_product_of_all_steps_is_one_call() -> None:
    class Calls(TorchDispatchMode):
        batches: list[int]

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.convolution.default:
                self.batches.append(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    net = ConvLSTM(3, 4)
    with torch.no_grad(), Calls() as calls, FlopCounterMode(display=False) as flops:
        calls.batches = []
        net(torch.randn(2, 3, 6, 8, 8))
    assert calls.batches == [12] + [2] * 5, "one call for 6 steps of 2 clips, none for the zero state"
    products = 9 * 16 * 64 * 2 * (6 * 3 + 5 * 4)
    assert flops.get_total_flops() == 2 * products


def test_checkpointed_layers_give_the_same_gradients(randomised: Randomise) -> None:
    net: Any = randomised(ConvLSTM(3, (4, 2), bidirectional=True))
    net.checkpoint_blocks = lambda: [f"layers.{i}" for i in range(4)]
    x = maps(2, 5)
    gradients = []
    for fraction in (0.0, 1.0):
        recompute_blocks(net, fraction)
        net.zero_grad()
        net(x, lengths=torch.tensor([5, 3]))[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_weights_run(precision: torch.dtype) -> None:
    for build in (lambda: ConvLSTM(3, 4), lambda: ConvGRU(3, 4)):
        torch.manual_seed(0)
        net = build()
        x = torch.rand(1, 3, 4, 8, 8)
        expected = net(x)[0]
        outputs = net.to(precision)(x.to(precision))[0]
        assert outputs.dtype == precision
        assert (outputs.float() - expected).abs().max() < 0.02  # 8 mantissa bits, states below 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ConvLSTM(3, 4, hidden_kernel=4), "hidden_kernel=4 must be odd"),
        (lambda: ConvLSTM(3, 4, input_kernel=2), "input_kernel=2 must be odd"),
        (lambda: ConvLSTM(3, (4, 4), hidden_kernel=(3, 3, 3)), "is for 3 layers, the network has 2"),
        (lambda: ConvLSTM(3, 4, peephole="position"), r"map_size=\(H, W\)"),
        (lambda: ConvLSTM(3, 4, peephole="diagonal"), "'diagonal' must be 'none', 'channel' or 'position'"),  # type: ignore[arg-type]
        (lambda: ConvLSTM(3, ()), "no layers"),
        (lambda: ConvLSTM(3, 0), "channels=0 must be 1 or more"),
        (lambda: FCLSTM(3, 4, peephole="channel"), "'channel' must be 'none', 'diagonal' or 'full'"),  # type: ignore[arg-type]
        (lambda: FCLSTM(3, 4, output_gate_cell="next"), "'next' must be 'new' or 'old'"),  # type: ignore[arg-type]
        (lambda: FCLSTM(3, 4, dropout=1.0), "dropout=1.0"),
        (lambda: ConvGRU(3, 4, hidden_kernel=2), "must be odd"),
        (lambda: ConvGRU(3, 4, lower_hidden="candidate"), "lower_hidden='candidate'"),  # type: ignore[arg-type]
    ],
)
def test_impossible_networks_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        make()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda net, x: net(x[0]), r"takes \(B, C, T, H, W\), got"),
        (lambda net, x: net(x, lengths=torch.tensor([1, 2, 3])), r"lengths must be \(2,\)"),
        (lambda net, x: net(x, lengths=torch.tensor([0, 4])), r"must lie in \[1, 4\]"),
        (lambda net, x: net(x, mask=torch.ones(2, 4)), "mask must be bool"),
        (lambda net, x: net(x, lengths=torch.tensor([4, 4]), mask=torch.ones(2, 4).bool()), "not both"),
        (lambda net, x: net(x[:, :, :0]), "no steps"),
        (lambda net, x: net(x, net(x)[1] * 2), "the state is of 2 layers, the module has 1"),
        (lambda net, x: net(x[..., :4]), "built for maps of 6x5, got 6x4"),
    ],
)
def test_wrong_calls_are_refused(call: Callable[[Any, Tensor], object], said: str) -> None:
    net = ConvLSTM(3, 4, peephole="position", map_size=(6, 5)).double()
    with pytest.raises(ModelError, match=said):
        call(net, maps(2, 4))
