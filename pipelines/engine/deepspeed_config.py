"""Our typed engine section -> the DeepSpeed dictionary. The only place where one becomes the other.

Every value is written out, none is left to DeepSpeed's defaults: ``gradient_clipping``, for one, changed its default
from off to 1.0 between releases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cliplift.configs.sections import ConfigError
from cliplift.configs.training import TrainingRun

NEVER = 10**9
FP16_LOSS_SCALE = {
    "loss_scale": 0,  # dynamic
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "consecutive_hysteresis": False,
    "min_loss_scale": 1,
}


def deepspeed_config(run: TrainingRun, *, world_size: int) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``, raw ``engine.deepspeed`` keys laid over it.

    Raises:
        ConfigError: the batch cannot be dealt to this many ranks, or a raw key contradicts a derived one.
    """
    engine, optim = run.engine, run.optim
    micro_batch, accumulation = batch_split(run, world_size=world_size)
    derived: dict[str, Any] = {
        "train_batch_size": engine.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        # At stage 0 the training loop clips, from the norm it computes anyway.
        "gradient_clipping": optim.clip_grad_norm if engine.zero_stage else 0.0,
        "zero_allow_untested_optimizer": True,  # SGD is elementwise: ZeRO's flat partitions do not change it
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
        "dump_state": False,
        "bf16": {"enabled": engine.precision == "bf16"},
        "fp16": {"enabled": engine.precision == "fp16"} | FP16_LOSS_SCALE,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "round_robin_gradients": False,
        },
    }
    autocast = engine.precision == "autocast_bf16"
    derived["torch_autocast"] = {"enabled": autocast, "dtype": "bfloat16"}
    if engine.offload != "none":
        derived["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        # Its own CPU Adam needs a compiler on every node; torch's works on host tensors as it is.
        derived["zero_force_ds_cpu_optimizer"] = False
    if engine.offload == "optimizer_and_parameters":
        derived["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": True}
    return _overlaid(derived, engine.deepspeed, key="engine.deepspeed")


def batch_split(run: TrainingRun, *, world_size: int) -> tuple[int, int]:
    """(clips per forward pass and rank, accumulation steps) whose product over ranks is the global batch."""
    engine = run.engine
    per_rank, rest = divmod(engine.global_batch, world_size)
    if rest:
        raise ConfigError(
            f"{engine.global_batch} clips cannot be dealt evenly to {world_size} ranks",
            key="engine.global_batch",
            value=engine.global_batch,
            hint=f"use a multiple of {world_size}",
        )
    micro_batch = min(engine.micro_batch or per_rank, per_rank)
    if per_rank % micro_batch:
        raise ConfigError(
            f"{micro_batch} does not divide the {per_rank} clips of each of {world_size} ranks",
            key="engine.micro_batch",
            value=micro_batch,
            hint=f"use a divisor of {per_rank}",
        )
    return micro_batch, per_rank // micro_batch


def _overlaid(derived: Mapping[str, Any], raw: Mapping[str, Any], *, key: str) -> dict[str, Any]:
    merged = dict(derived)
    for name, value in raw.items():
        here = f"{key}.{name}"
        if here == "engine.deepspeed.zero_optimization.stage" and value != derived.get("stage"):
            raise ConfigError(
                "contradicts engine.zero_stage", key=here, value=value, hint="set engine.zero_stage"
            )
        if isinstance(value, Mapping) and isinstance(merged.get(name), Mapping):
            merged[name] = _overlaid(merged[name], value, key=here)
        else:
            merged[name] = value
    return merged
