"""A DeepSpeed engine's parameters and moments by name, against torch's own AdamW on the same gradients.

One process; what two ranks share is in test_engine_state.py, and here the arithmetic of their parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor, nn

from cliplift.configs.training import EngineConfig
from cliplift.pipelines.checkpoints.slices import Slice
from cliplift.pipelines.distributed.collectives import start
from cliplift.pipelines.engine import zero_state

LR, STEPS = 0.1, 3
ROUNDING = 1e-6


def net() -> nn.Sequential:
    """Two groups of parameters, odd sizes, and one frozen parameter."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    module[0].bias.requires_grad_(False)
    return module


def groups(module: nn.Module) -> list[dict[str, Any]]:
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]


def make_engine(stage: int, precision: str = "fp32") -> Any:
    start(EngineConfig(device="cpu"))
    module = net()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "train_batch_size": 4,
        # The buckets' defaults are of 5 * 10^8 numbers.
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16"},
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(groups(module), lr=LR)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)[0]


def batch(step: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))


def take_steps(engine: Any, first: int, last: int) -> None:
    for step in range(first, last):
        engine.backward(
            engine(batch(step).to(next(engine.module.parameters()).dtype)).float().square().mean()
        )
        engine.step()


def plain(steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and optimizer state of the same training without DeepSpeed."""
    module = net()
    optimizer = torch.optim.AdamW(groups(module), lr=LR)
    for step in range(steps):
        optimizer.zero_grad()
        module(batch(step)).square().mean().backward()
        optimizer.step()
    parameters = dict(module.named_parameters())
    state = {
        f"{name}|{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return {name: p.detach() for name, p in parameters.items()}, state


class Held(dict[str, Tensor]):
    """Whole tensors of which runs of elements can be read."""

    def read(self, name: str, start: int, length: int) -> Tensor:
        return self[name].flatten()[start : start + length]


def whole(slices: Mapping[str, Slice]) -> Held:
    """What one process writes is all of every tensor."""
    assert all(part.start == 0 for part in slices.values())
    return Held({name: part.values.reshape(part.shape).clone() for name, part in slices.items()})


def parameters_of(engine: Any) -> Held:
    return whole(zero_state.parameter_slices(engine))


def optimizer_of(engine: Any) -> Held:
    return whole(zero_state.optimizer_slices(engine))


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], atol=ROUNDING, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def trained() -> dict[int, Any]:
    """An engine of each stage after three steps; read it, never change it."""
    engines = {stage: make_engine(stage) for stage in range(4)}
    for engine in engines.values():
        take_steps(engine, 0, STEPS)
    return engines


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_parameters_are_those_of_plain_training(trained: dict[int, Any], stage: int) -> None:
    found = parameters_of(trained[stage])
    assert_near(found, plain(STEPS)[0])
    # They are copies: changing them changes nothing in the engine.
    for value in found.values():
        value.zero_()
    assert_near(parameters_of(trained[stage]), plain(STEPS)[0])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_moments_and_steps_are_those_of_plain_training(trained: dict[int, Any], stage: int) -> None:
    found, expected = optimizer_of(trained[stage]), plain(STEPS)[1]
    assert_near(found, expected)
    assert set(found) == {
        f"{name}|{key}"
        for name in ("0.weight", "2.weight", "2.bias")
        for key in ("step", "exp_avg", "exp_avg_sq")
    }, "a frozen parameter has no state"
    assert float(found["2.bias|step"]) == STEPS
    for value in found.values():
        value.zero_()
    assert_near(optimizer_of(trained[stage]), expected)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_engine_that_took_no_step_has_no_moments(stage: int) -> None:
    assert optimizer_of(make_engine(stage)) == {}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_masters_are_what_the_optimizer_updates(trained: dict[int, Any], stage: int) -> None:
    """Together as many numbers as are trained (30 with the frozen 5 left out, but for the padding of partitions)."""
    masters = zero_state.local_masters(trained[stage])
    expected = torch.cat([p.flatten() for n, p in plain(STEPS)[0].items() if n != "0.bias"]).sort().values
    found = torch.cat([m.detach().flatten().float() for m in masters])
    assert len(found) >= len(expected) == 3 * 5 + 5 * 2 + 2
    torch.testing.assert_close(found[found != 0].sort().values, expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("saved_by", [0, 3])
def test_restored_training_goes_on_as_if_unbroken(trained: dict[int, Any], stage: int, saved_by: int) -> None:
    """Weights, moments and step: two further steps equal five plain ones."""
    parameters = parameters_of(trained[saved_by])
    optimizer = optimizer_of(trained[saved_by])
    engine = make_engine(stage)
    zero_state.load_parameters(engine, parameters)
    zero_state.restore_optimizer(engine, optimizer)
    assert_near(parameters_of(engine), parameters)
    assert_near(optimizer_of(engine), optimizer)
    take_steps(engine, STEPS, STEPS + 2)
    assert_near(parameters_of(engine), plain(STEPS + 2)[0])
    assert_near(optimizer_of(engine), plain(STEPS + 2)[1])
    # The saved values were copied, not taken over: training has not changed them.
    assert_near(optimizer, plain(STEPS)[1])
    assert_near(parameters, plain(STEPS)[0])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_saved_state_leaves_the_optimizer_alone(trained: dict[int, Any], stage: int) -> None:
    before = optimizer_of(trained[stage])
    zero_state.restore_optimizer(trained[stage], Held())
    assert_near(optimizer_of(trained[stage]), before)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_half_precision_weights_keep_whole_masters(stage: int) -> None:
    """A value that bfloat16 cannot hold: the masters keep it, the weights their nearest number."""
    engine = make_engine(stage, "bf16")
    value = 1 + 2**-12  # bfloat16 has 8 bits
    saved = {name: torch.full_like(p, value) for name, p in plain(0)[0].items()}
    zero_state.load_parameters(engine, Held(saved))
    found = parameters_of(engine)
    trained_names = {"0.weight", "2.weight", "2.bias"}
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert tensor.unique().tolist() == [value if name in trained_names else 1.0], name
    from deepspeed.runtime.zero import GatheredParameters

    weight = engine.module[0].weight
    with GatheredParameters([weight], enabled=stage == 3):
        assert weight.detach().float().unique().tolist() == [1.0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_engine_that_has_trained_computes_with_what_it_loads(stage: int) -> None:
    """At stage 3 small parameters stay gathered after a step; they must not be used again."""
    engine = make_engine(stage)
    take_steps(engine, 0, 2)
    if stage == 3:  # what is gathered on one rank is the part itself, and a copy where there are several
        for parameter in engine.module.parameters():
            parameter.data = parameter.data.clone()
    other = {name: tensor * 3 + 1 for name, tensor in plain(0)[0].items()}
    zero_state.load_parameters(engine, Held(other))
    expected = net()
    expected.load_state_dict(other)
    with torch.no_grad():
        found = engine(batch(9))
    torch.testing.assert_close(found, expected(batch(9)).detach(), atol=ROUNDING, rtol=0)


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int) -> None:
    """Let the arithmetic believe that it is one of several ranks."""
    group = SimpleNamespace(get_rank=lambda: rank, get_world_size=lambda: ranks)
    monkeypatch.setattr(zero_state, "dist", group)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 40])
def test_ranks_write_an_equal_share_and_every_element_once(
    monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    sizes = {"a": 7, "none": 0, "b": 1, "c": 12, "d": 4}
    tensors = {name: torch.randn(size) for name, size in sizes.items()}
    slices = {name: Slice.whole(tensor) for name, tensor in tensors.items()}
    written: dict[str, list[Slice]] = {name: [] for name in sizes}
    counts = []
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        share = zero_state._share(slices)
        counts.append(sum(part.values.numel() for part in share.values()))
        for name, part in share.items():
            assert part.shape == (sizes[name],)
            assert part.start == sum(before.values.numel() for before in written[name])
            written[name].append(part)
    assert sum(counts) == 24
    assert max(counts) - min(counts) <= 1
    for name, parts in written.items():
        assert torch.equal(torch.cat([part.values for part in parts]), tensors[name])
    assert len(written["none"]) == 1, "a tensor of no elements is written too"


@pytest.mark.parametrize(
    ("ranks", "parts"),
    [(1, [(0, 10)]), (3, [(0, 4), (4, 4), (8, 2)]), (6, [(0, 2), (2, 2), (4, 2), (6, 2), (8, 2), (10, 0)])],
)
def test_parts_of_stage_3_are_equal_but_for_the_last(
    monkeypatch: pytest.MonkeyPatch, ranks: int, parts: list[tuple[int, int]]
) -> None:
    """Ten elements cut as DeepSpeed does: each part of the smallest size that suffices, the rest is padding."""
    size = -(-10 // ranks)
    parameter: Any = SimpleNamespace(ds_tensor=SimpleNamespace(ds_numel=size), ds_numel=10)
    for rank, expected in enumerate(parts):
        as_rank(monkeypatch, rank, ranks)
        assert zero_state._stage3_part(parameter) == expected


@pytest.mark.parametrize("elements", [1, 4, 1 << 22])
def test_tensors_are_exchanged_in_place(elements: int) -> None:
    shapes = ((2, 5), (), (3,))
    first, second = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    first[0].requires_grad_()
    before = [[tensor.detach().clone() for tensor in tensors] for tensors in (first, second)]
    places = [tensor.data_ptr() for tensor in (*first, *second)]
    zero_state.exchange(first, second, elements=elements)
    for found, expected in zip((first, second), reversed(before), strict=True):
        for tensor, wanted in zip(found, expected, strict=True):
            assert torch.equal(tensor.detach(), wanted)
    assert [tensor.data_ptr() for tensor in (*first, *second)] == places
