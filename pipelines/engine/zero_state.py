"""Parameters and optimizer state of a DeepSpeed engine by parameter name, whatever the ZeRO stage.

Stage 0 keeps them as torch does. Stages 1 and 2 keep flat fp32 partitions; which slice of which partition belongs to
which parameter stands in the parameters' fragment mapping. Stage 3 partitions the parameters too and offers
gathering functions. All functions are collective: every rank calls them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

SEPARATOR = "|"
STEP = "step"


def gathered_parameters(engine: Any, *, from_masters: bool = False) -> dict[str, Tensor]:
    """fp32 value of every parameter (frozen ones included), whole, on every rank.

    ``from_masters`` reads the fp32 masters even where the weights themselves are fp32 and should equal them.
    """
    return {
        name: _full_parameter(engine, parameter, from_masters=from_masters)
        for name, parameter in engine.module.named_parameters()
    }


def _full_parameter(engine: Any, parameter: nn.Parameter, *, from_masters: bool) -> Tensor:
    stage = engine.zero_optimization_stage()
    if stage == 3:
        from deepspeed.runtime.zero import GatheredParameters

        if parameter.requires_grad:
            from deepspeed.utils import safe_get_full_fp32_param

            value: Tensor = safe_get_full_fp32_param(parameter)
            return value.detach().float().cpu()
        with GatheredParameters([parameter]):
            return parameter.detach().float().cpu().clone()
    if stage in (1, 2) and parameter.requires_grad and (from_masters or parameter.dtype != torch.float32):
        return _assembled(engine, parameter, lambda flat: flat).cpu()
    return parameter.detach().float().cpu().clone()


def gathered_optimizer(engine: Any) -> dict[str, Tensor]:
    """Optimizer state as ``name|state`` -> fp32 tensor of the parameter's shape, and scalars such as Adam's step."""
    found: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        for key, value in _states(engine, parameter):
            found[f"{name}{SEPARATOR}{key}"] = value.detach().cpu().clone()
    return found


def _states(engine: Any, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    stage = engine.zero_optimization_stage()
    if stage == 0:
        yield from (
            (k, v) for k, v in _torch_optimizer(engine).state[parameter].items() if isinstance(v, Tensor)
        )
        return
    for key in _state_keys(engine):
        if key == STEP:
            yield key, _any_step(engine)
        elif stage == 3:
            from deepspeed.utils import safe_get_full_optimizer_state

            yield key, safe_get_full_optimizer_state(parameter, key)
        else:
            yield (
                key,
                _assembled(
                    engine, parameter, lambda flat, key=key: _torch_optimizer(engine).state[flat][key]
                ),
            )


def _assembled(engine: Any, parameter: nn.Parameter, partition: Any) -> Tensor:
    """A parameter-shaped fp32 tensor from every rank's slice of its flat partition."""
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is not None:
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        flat = _flat_of(engine, parameter)
        whole.narrow(0, here.start, here.numel).copy_(partition(flat).narrow(0, there.start, there.numel))
    if dist.get_world_size() > 1:
        dist.all_reduce(whole)
    return whole.reshape(parameter.shape)


def _flat_of(engine: Any, parameter: nn.Parameter) -> Tensor:
    group = parameter._hp_mapping.param_group_index  # type: ignore[attr-defined]
    flat: Tensor = engine.optimizer.single_partition_of_fp32_groups[group]
    return flat


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer we gave, below DeepSpeed's wrappers."""
    optimizer = engine.optimizer
    while not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _partitions(engine: Any) -> list[Tensor]:
    """This rank's flat fp32 partitions at stages 1 to 3."""
    zero = engine.optimizer
    flats = (
        zero.fp32_partitioned_groups_flat
        if engine.zero_optimization_stage() == 3
        else zero.single_partition_of_fp32_groups
    )
    return list(flats)


def local_masters(engine: Any) -> list[Tensor]:
    """The fp32 tensors this rank's optimizer updates: whole parameters at stage 0, flat partitions at the others."""
    if engine.zero_optimization_stage() == 0:
        return [parameter.data for parameter in engine.module.parameters() if parameter.requires_grad]
    return _partitions(engine)


def _state_keys(engine: Any) -> list[str]:
    state = _torch_optimizer(engine).state
    for flat in _partitions(engine):
        if state.get(flat):
            return sorted(k for k, v in state[flat].items() if isinstance(v, Tensor))
    return []


def _any_step(engine: Any) -> Tensor:
    state = _torch_optimizer(engine).state
    step: Tensor = next(state[flat][STEP] for flat in _partitions(engine) if state.get(flat))
    return step


def restore_optimizer(engine: Any, saved: Mapping[str, Tensor]) -> None:
    """Put saved optimizer state back, for this engine's stage and partitions."""
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for name, value in saved.items():
        parameter, _, key = name.rpartition(SEPARATOR)
        by_parameter.setdefault(parameter, {})[key] = value
    if not by_parameter:
        return
    stage = engine.zero_optimization_stage()
    if stage == 0:
        _restore_whole(engine, by_parameter)
        return
    _make_states(engine, by_parameter)
    for name, parameter in engine.module.named_parameters():
        for key, value in by_parameter.get(name, {}).items():
            if key == STEP:
                continue
            if stage == 3:
                from deepspeed.utils import safe_set_local_optimizer_state

                safe_set_local_optimizer_state(parameter, _own_part(parameter, value), key)
            else:
                _put_slice(engine, parameter, key, value)


def _restore_whole(engine: Any, by_parameter: Mapping[str, Mapping[str, Tensor]]) -> None:
    state = _torch_optimizer(engine).state
    for name, parameter in engine.module.named_parameters():
        if name in by_parameter:
            state[parameter] = {
                key: value.clone() if key == STEP else value.to(parameter.device, copy=True)
                for key, value in by_parameter[name].items()
            }


def _make_states(engine: Any, by_parameter: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Zero states for every partition, and its own copy of the step: a shared one would count once a group."""
    example = next(iter(by_parameter.values()))
    state = _torch_optimizer(engine).state
    for flat in _partitions(engine):
        state[flat] = {
            key: value.clone() if key == STEP else torch.zeros_like(flat) for key, value in example.items()
        }


def _put_slice(engine: Any, parameter: nn.Parameter, key: str, value: Tensor) -> None:
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    part = value.flatten().narrow(0, here.start, here.numel)
    _torch_optimizer(engine).state[_flat_of(engine, parameter)][key].narrow(
        0, there.start, there.numel
    ).copy_(part)


def _own_part(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """This rank's flat part of a whole value at stage 3, zero-padded where the size does not divide by the ranks.

    DeepSpeed's setters for whole values slice without that padding and fail on, say, a bias of 3 on 2 ranks.
    """
    size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
    start = dist.get_rank() * size
    part = torch.zeros(size, dtype=torch.float32, device=parameter.device)
    held = value.flatten()[start : start + size]
    part[: len(held)] = held.to(part)
    return part


def put_parameters(engine: Any, saved: Mapping[str, Tensor]) -> None:
    """Replace every parameter of a living engine by its saved value: the weights and their fp32 masters."""
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            if engine.zero_optimization_stage() == 3:
                from deepspeed.runtime.zero import GatheredParameters

                with GatheredParameters([parameter], modifier_rank=0):
                    if dist.get_rank() == 0:
                        parameter.copy_(saved[name])
                if parameter.requires_grad:
                    _put_stage3_master(parameter, saved[name])
            else:
                parameter.copy_(saved[name])
    if engine.zero_optimization_stage() != 3:
        put_masters(engine, saved)


def _put_stage3_master(parameter: nn.Parameter, value: Tensor) -> None:
    from deepspeed.utils import safe_set_local_fp32_param

    safe_set_local_fp32_param(parameter, _own_part(parameter, value))


def put_masters(engine: Any, saved: Mapping[str, Tensor]) -> None:
    """Put fp32 values into the optimizer's fp32 masters, leaving the weights alone. Stage 0 has no others."""
    from deepspeed.utils import safe_set_full_fp32_param

    stage = engine.zero_optimization_stage()
    for name, parameter in engine.module.named_parameters():
        if stage == 0 or not parameter.requires_grad:
            continue
        if stage == 3:
            _put_stage3_master(parameter, saved[name])
        else:
            safe_set_full_fp32_param(parameter, saved[name].to(parameter.device))
