"""Which elements of which parameter a rank of a DeepSpeed engine keeps, whatever the ZeRO stage; saved and put back.

Stage 0 keeps everything on every rank, as torch does. Stages 1 and 2 keep flat fp32 partitions, each rank its own;
which slice of which partition belongs to which parameter stands in the parameters' fragment mapping. Stage 3 cuts
every parameter into equal parts, whose fp32 masters lie in flat partitions too. So at every stage a rank's state is a
list of flat fp32 tensors (:func:`local_masters`) and a list of :class:`Fragment`, which says what lies where in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cliplift.pipelines.checkpoints.slices import Slice

SEPARATOR = "|"
STEP = "step"


class Slices(Protocol):
    """Tensors by name of which runs of elements can be read (:class:`~.checkpoints.slices.SliceReader`)."""

    def __contains__(self, name: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def read(self, name: str, start: int, length: int) -> Tensor: ...


@dataclass(frozen=True)
class Fragment:
    """Elements ``start`` to ``start + length`` of a flattened trainable parameter, and where this rank keeps them.

    Attributes:
        name: of the parameter in the engine's module.
        shape: of the whole parameter.
        flat: which of :func:`local_masters`.
        offset: where they begin in that.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    flat: int
    offset: int

    def of(self, flats: Sequence[Tensor]) -> Tensor:
        """(length,): the view of these elements in tensors that are laid out like the masters."""
        return flats[self.flat].detach().view(-1).narrow(0, self.offset, self.length)


def local_masters(engine: Any) -> list[Tensor]:
    """The fp32 tensors this rank's optimizer updates: whole parameters at stage 0, flat partitions at the others."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [parameter.data for parameter in engine.module.parameters() if parameter.requires_grad]
    zero = engine.optimizer
    return list(zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups)


def fragments(engine: Any) -> list[Fragment]:
    """What of the trainable parameters this rank keeps; the parts of all ranks together are every element.

    Each element is kept once at stages 1 to 3, and by every rank at stage 0.
    """
    stage = engine.zero_optimization_stage()
    trainable = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    if stage == 0:
        return [Fragment(n, tuple(p.shape), 0, p.numel(), i, 0) for i, (n, p) in enumerate(trainable)]
    if stage == 3:
        # A rank's part of a small parameter may be empty: padding, or all of it lies on the ranks before.
        parts = (_stage3_fragment(engine, n, p) for n, p in trainable)
        return [part for part in parts if part.length]
    # Where there is no mapping, all of the parameter lies in other ranks' partitions.
    return [_flat_fragment(n, p) for n, p in trainable if p._hp_mapping is not None]


def _flat_fragment(name: str, parameter: nn.Parameter) -> Fragment:
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(
        name=name,
        shape=tuple(parameter.shape),
        start=here.start,
        length=here.numel,
        flat=mapping.param_group_index,
        offset=there.start,
    )


def _stage3_fragment(engine: Any, name: str, parameter: nn.Parameter) -> Fragment:
    zero = engine.optimizer
    flat, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
    start, length = _stage3_part(parameter)
    return Fragment(name, tuple(parameter.ds_shape), start, length, flat, offset)  # type: ignore[attr-defined]


def _stage3_part(parameter: nn.Parameter) -> tuple[int, int]:
    """(start, length) of this rank's elements; the last part may be shorter than the others, or empty."""
    size, whole = parameter.ds_tensor.ds_numel, parameter.ds_numel  # type: ignore[attr-defined]
    # Stage 3 cuts a parameter into equal parts and pads the last; what is padded is not the parameter's.
    start = min(dist.get_rank() * size, whole)
    return start, min(size, whole - start)


def slices_to_write(engine: Any, flats: Sequence[Tensor]) -> dict[str, Slice]:
    """This rank's share of trainable tensors laid out like the masters: together the ranks write every element once."""
    mine = fragments(engine)
    if engine.zero_optimization_stage():
        return {part.name: Slice(part.of(flats), part.start, part.shape) for part in mine}
    return _share({part.name: Slice(part.of(flats), 0, part.shape) for part in mine})


def parameter_slices(engine: Any) -> dict[str, Slice]:
    """This rank's share of the fp32 values of all parameters, frozen ones included."""
    return slices_to_write(engine, local_masters(engine)) | _frozen_slices(engine)


def _frozen_slices(engine: Any) -> dict[str, Slice]:
    frozen = {n: p for n, p in engine.module.named_parameters() if not p.requires_grad}
    if engine.zero_optimization_stage() != 3:
        return _share({n: Slice.whole(p.detach().float()) for n, p in frozen.items()})
    found = {}
    for name, parameter in frozen.items():
        start, length = _stage3_part(parameter)
        if length:
            found[name] = Slice(parameter.ds_tensor[:length].float(), start, tuple(parameter.ds_shape))
    return found


def _share(whole: Mapping[str, Slice]) -> dict[str, Slice]:
    """What this rank writes of tensors that every rank has: an equal run of all their elements, laid end to end."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    total = sum(part.values.numel() for part in whole.values())
    first, stop = total * rank // ranks, total * (rank + 1) // ranks
    found: dict[str, Slice] = {}
    at = 0
    for name, part in whole.items():
        size = part.values.numel()
        start, end = max(first - at, 0), min(stop - at, size)
        if start < end or (size == 0 and rank == 0):
            found[name] = Slice(part.values[start:end], start, part.shape)
        at += size
    return found


def optimizer_slices(engine: Any) -> dict[str, Slice]:
    """This rank's share of the optimizer state as ``name|state``.

    Scalars such as Adam's step are of shape (), and are written with a parameter's first element.
    """
    masters, state = local_masters(engine), _torch_optimizer(engine).state
    own = slices_to_write(engine, masters)
    keys = _state_keys(engine)
    found: dict[str, Slice] = {}
    for part in fragments(engine):
        if part.name not in own:
            continue
        written, values = own[part.name], state.get(_optimized(engine, part, masters), {})
        for key in keys & values.keys():
            name = f"{part.name}{SEPARATOR}{key}"
            if key == STEP:  # equal on all ranks, and written by one of them
                if written.start == 0:
                    found[name] = Slice(values[key].detach().reshape(1), 0, ())
                continue
            flat = values[key].detach().view(-1)
            # At stage 0 every rank keeps the whole state and writes a run of it, which begins inside its fragment.
            at = part.offset + written.start - part.start
            found[name] = Slice(flat[at : at + written.values.numel()], written.start, part.shape)
    return found


def _optimized(engine: Any, part: Fragment, masters: Sequence[Tensor]) -> Tensor:
    """The tensor by which the optimizer files its state of a fragment: the parameter itself, or the partition."""
    if engine.zero_optimization_stage() == 0:
        parameter: Tensor = engine.module.get_parameter(part.name)
        return parameter
    return masters[part.flat]


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer we gave, below DeepSpeed's wrappers."""
    optimizer = engine.optimizer
    while not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _state_keys(engine: Any) -> set[str]:
    """Names of the states that are tensors."""
    states = _torch_optimizer(engine).state.values()
    return {key for values in states for key, value in values.items() if isinstance(value, Tensor)}


def restore_optimizer(engine: Any, saved: Slices) -> None:
    """Put saved optimizer state back: of every tensor the elements that this rank keeps, and no others are read."""
    by_parameter: dict[str, list[str]] = {}
    for name in saved:
        parameter, _, key = name.rpartition(SEPARATOR)
        by_parameter.setdefault(parameter, []).append(key)
    if not by_parameter:
        return
    masters, state = local_masters(engine), _torch_optimizer(engine).state
    if engine.zero_optimization_stage():
        # An optimizer makes its states at its first step, and is filled before that.
        _make_states(engine, masters, saved, by_parameter)
    for part in fragments(engine):
        optimized = _optimized(engine, part, masters)
        for key in by_parameter.get(part.name, ()):
            name = f"{part.name}{SEPARATOR}{key}"
            if engine.zero_optimization_stage() == 0:
                state[optimized][key] = (
                    _step(engine, saved, name, optimized)
                    if key == STEP
                    else saved.read(name, 0, part.length).reshape(part.shape).to(optimized.device, copy=True)
                )
            elif key != STEP:
                flat = state[optimized][key].view(-1)
                flat.narrow(0, part.offset, part.length).copy_(saved.read(name, part.start, part.length))


def _make_states(
    engine: Any, masters: Sequence[Tensor], saved: Slices, by_parameter: Mapping[str, Sequence[str]]
) -> None:
    """Zero states for every partition, and its own copy of the step: a shared one would count once a group."""
    example, keys = next(iter(by_parameter.items()))
    state = _torch_optimizer(engine).state
    for flat in masters:
        state[flat] = {
            key: _step(engine, saved, f"{example}{SEPARATOR}{key}", flat)
            if key == STEP
            else torch.zeros_like(flat)
            for key in keys
        }


def _step(engine: Any, saved: Slices, name: str, optimized: Tensor) -> Tensor:
    """A saved step, (), where torch's optimizers keep it: beside the values if fused or capturable, else on the CPU."""
    groups = _torch_optimizer(engine).param_groups
    beside = any(group.get("fused") or group.get("capturable") for group in groups)
    return saved.read(name, 0, 1).reshape(()).to(optimized.device if beside else "cpu", copy=True)


@torch.no_grad()
def fill(engine: Any, flats: Sequence[Tensor], *sources: Slices) -> None:
    """Read this rank's elements of every trainable parameter into tensors laid out like the masters.

    Of several sources the first that has a parameter is taken; what no source has stays as it is.
    """
    for part in fragments(engine):
        source = next((candidate for candidate in sources if part.name in candidate), None)
        if source is not None:
            part.of(flats).copy_(source.read(part.name, part.start, part.length))


@torch.no_grad()
def load_parameters(engine: Any, parameters: Slices, *over: Slices) -> None:
    """Replace weights and fp32 masters of a living engine by saved ones. Collective.

    Each rank reads its own masters, and frozen parameters as far as it keeps them; the weights follow from the masters.
    ``over`` holds values that go before those of ``parameters``: an average.
    """
    fill(engine, local_masters(engine), *over, parameters)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        if engine.zero_optimization_stage() == 3:
            start, length = _stage3_part(parameter)
            if length:
                parameter.ds_tensor[:length].copy_(parameters.read(name, start, length))
            forget_gathered(parameter)  # or the old values would be computed with until the next gathering
        else:
            parameter.copy_(parameters.read(name, 0, parameter.numel()).reshape(parameter.shape))
    weights_from_masters(engine)


@torch.no_grad()
def weights_from_masters(engine: Any) -> None:
    """Make the weights what the fp32 masters say, as after an optimizer step. Collective; stage 0 has no others."""
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        engine.optimizer.update_lp_params()
    if stage != 3:
        return
    masters = local_masters(engine)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            part = _stage3_fragment(engine, name, parameter)
            parameter.ds_tensor[: part.length].copy_(part.of(masters))
            forget_gathered(parameter)


def forget_gathered(parameter: nn.Parameter) -> None:
    """Small parameters stay gathered between steps at stage 3; let go, they are gathered anew from the parts."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
        parameter.partition()  # type: ignore[attr-defined]


@torch.no_grad()
def exchange(first: Sequence[Tensor], second: Sequence[Tensor], *, elements: int = 1 << 22) -> None:
    """Exchange the values of two lists of tensors in place, a run of ``elements`` at a time."""
    for a, b in zip(first, second, strict=True):
        runs = (torch.split(tensor.detach().view(-1), elements) for tensor in (a, b))
        for one, other in zip(*runs, strict=True):
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)
