"""Our typed engine section -> the DeepSpeed dictionary. The only place where one becomes the other.

Every value is written out, none is left to DeepSpeed's defaults: ``gradient_clipping``, for one, changed its default
from off to 1.0 between releases.

A DeepSpeed engine over a stage's module, with a checkpoint's state in it.

Which kernels torch may choose in this process: deterministic or the fastest ones, and how exact they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import nn

from cliplift.configs.sections import ConfigError
from cliplift.configs.training import EngineConfig, TrainingRun
from cliplift.pipelines.checkpoints import folder as checkpoint_folder
from cliplift.pipelines.checkpoints.saved import SavedState, check_fits, load_buffers, open_checkpoint
from cliplift.pipelines.compute.compiled import compile_blocks, compile_module
from cliplift.pipelines.distributed.collectives import Topology, broadcast_object
from cliplift.pipelines.distributed.sequence import KEY, sequence_group, share_clips
from cliplift.pipelines.engine.batchnorm import refuse_half_batchnorm
from cliplift.pipelines.engine.optim import build_optimizer, network_with_blocks, optimizer_moments
from cliplift.pipelines.engine.partitioned_build import hand_over, move_to
from cliplift.pipelines.engine.task import HALF, TrainingEngine, recompute_as_configured
from cliplift.pipelines.engine.zero_state import load_parameters, restore_optimizer

NEVER = 10**9
FP16_LOSS_SCALE = {
    "loss_scale": 0,  # dynamic
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "consecutive_hysteresis": False,
    "min_loss_scale": 1,
}


def deepspeed_config(run: TrainingRun, *, world_size: int) -> dict[str, object]:
    """The dictionary for ``deepspeed.initialize``, raw ``engine.deepspeed`` keys laid over it.

    Raises:
        ConfigError: the batch cannot be dealt to this many ranks, or a raw key contradicts a derived one.
    """
    engine, optim = run.engine, run.optim
    micro_batch, accumulation = batch_split(run, world_size=world_size)
    zero: dict[str, object] = {
        "stage": engine.zero_stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "round_robin_gradients": False,
    }
    derived: dict[str, object] = {
        # DeepSpeed multiplies by all ranks, also those that share their clips.
        "train_batch_size": engine.global_batch * engine.sequence_parallel,
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
        "zero_optimization": zero,
    }
    autocast = engine.precision == "autocast_bf16"
    derived["torch_autocast"] = {"enabled": autocast, "dtype": "bfloat16"}
    if engine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        # Its own CPU Adam needs a compiler on every node; torch's works on host tensors as it is.
        derived["zero_force_ds_cpu_optimizer"] = False
    if engine.offload == "optimizer_and_parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return _overlaid(derived, engine.deepspeed, key="engine.deepspeed")


def data_ranks(engine: EngineConfig, *, world_size: int) -> int:
    """How many ranks, or groups of ranks that share their clips, the clips of a step are dealt to.

    Raises:
        ConfigError: the ranks cannot be put into groups of ``engine.sequence_parallel``.
    """
    groups, rest = divmod(world_size, engine.sequence_parallel)
    if rest:
        possible = [size for size in range(1, world_size + 1) if world_size % size == 0]
        raise ConfigError(
            f"{world_size} ranks are not whole groups of {engine.sequence_parallel}",
            key=KEY,
            value=engine.sequence_parallel,
            hint=f"use one of {possible}, or as many ranks as it needs",
        )
    return groups


def batch_split(run: TrainingRun, *, world_size: int) -> tuple[int, int]:
    """(clips per forward pass and rank, accumulation steps) whose product over ranks is the global batch.

    Ranks that share their clips count as one.
    """
    engine = run.engine
    groups = data_ranks(engine, world_size=world_size)
    who = f"{groups} ranks"
    if engine.sequence_parallel > 1:
        who = f"{groups} groups of {engine.sequence_parallel} ranks"
    per_rank, rest = divmod(engine.global_batch, groups)
    if rest:
        raise ConfigError(
            f"{engine.global_batch} clips cannot be dealt evenly to {who}",
            key="engine.global_batch",
            value=engine.global_batch,
            hint=f"use a multiple of {groups}",
        )
    micro_batch = min(engine.micro_batch or per_rank, per_rank)
    if per_rank % micro_batch:
        raise ConfigError(
            f"{micro_batch} does not divide the {per_rank} clips of each of {who}",
            key="engine.micro_batch",
            value=micro_batch,
            hint=f"use a divisor of {per_rank}",
        )
    return micro_batch, per_rank // micro_batch


def _overlaid(derived: Mapping[str, object], raw: Mapping[str, object], *, key: str) -> dict[str, object]:
    merged = dict(derived)
    for name, value in raw.items():
        here = f"{key}.{name}"
        if here == "engine.deepspeed.zero_optimization.stage" and value != derived.get("stage"):
            raise ConfigError(
                "contradicts engine.zero_stage", key=here, value=value, hint="set engine.zero_stage"
            )
        below = merged.get(name)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[name] = _overlaid(below, value, key=here)
        else:
            merged[name] = value
    return merged


def build_engine(
    module: nn.Module,
    run: TrainingRun,
    *,
    folder: checkpoint_folder.Folder,
    saved: SavedState | None,
    topology: Topology,
) -> TrainingEngine:
    """Wrap a module by ``deepspeed.initialize`` with weights, masters and optimizer state of a checkpoint, if any.

    Raises:
        ConfigError: BatchNorm with cast weights, too little disk for a checkpoint, or a checkpoint of another network.
    """
    import deepspeed

    engine_config = run.engine
    module = move_to(module, topology.device)
    refuse_half_batchnorm(module, run)
    if engine_config.sync_batchnorm:
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    # Everything that can be refused is refused before DeepSpeed allocates masters and buckets.
    if saved is not None:
        check_fits(module, saved)
    recompute_as_configured(module, engine_config)
    if topology.sequence_parallel > 1:
        timeout = engine_config.collective_timeout_seconds
        share_clips(module, sequence_group(topology, timeout_seconds=timeout))
    optimizer = build_optimizer(
        module, run.optim, global_batch=engine_config.global_batch, device=topology.device
    )
    if topology.is_main:
        _check_space(folder, module, run)
    config = deepspeed_config(run, world_size=topology.world_size)
    hand_over(module, config, dtype=HALF.get(engine_config.precision))
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    if saved is not None:
        load_parameters(engine, saved.parameters)
        load_buffers(engine.module, saved.buffers)
        restore_optimizer(engine, saved.optimizer)
    if engine_config.compile != "off":
        deepspeed.utils.nvtx.enable_nvtx = False  # its ranges would break the graph at every hook
    if engine_config.compile == "model":
        compile_module(engine.module)
    elif engine_config.compile == "blocks":
        compile_blocks(network_with_blocks(engine.module, key="engine.compile")[1])
    return cast(TrainingEngine, engine)


def set_numerics(engine: EngineConfig, device: torch.device) -> None:
    """Set torch's switches to what the engine section asks for; each is written, none is left to its default.

    ``fp32`` multiplies in fp32 everywhere (torch's own default rounds convolutions to TF32). At every other precision
    what is left in fp32 may be rounded to TF32. Where kernels need not be deterministic, cuDNN times its algorithms for
    each shape, which are the same in every step. All fused attention kernels are allowed
    (docs/performance.md has their times side by side), cuDNN's only where it may be non-deterministic.
    """
    deterministic = device.type == "cpu" if engine.deterministic == "auto" else engine.deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # Filling every new tensor guards against reading memory nobody wrote; it costs most of a CPU step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type != "cuda":
        return
    rounded = engine.precision != "fp32"
    torch.set_float32_matmul_precision("high" if rounded else "highest")
    torch.backends.cudnn.allow_tf32 = rounded
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp(not deterministic)


def resumable(
    folder: checkpoint_folder.Folder,
    run: TrainingRun,
    *,
    identity: Mapping[str, object],
    topology: Topology,
    say: Callable[[str], None],
) -> SavedState | None:
    """The newest usable checkpoint of this very run, or None. With ``resume: never`` old ones are set aside.

    The ranks choose together, so that none resumes from another checkpoint than the rest.

    Raises:
        ConfigError: the checkpoint was made by a run that differs in ``identity``, or there are checkpoints and every
            one is damaged: to start over in silence would throw away what may still be saved.
    """
    if run.checkpoint.resume == "never":
        checkpoint_folder.start_afresh(folder, topology=topology, say=say)
        return None
    path = checkpoint_folder.newest_usable(folder, topology=topology, say=say)
    # The main rank counts for all: another may see a folder that is a moment older.
    damaged = 0 if path else broadcast_object(checkpoint_folder.count(folder), topology)
    if damaged:
        raise ConfigError(
            f"all checkpoints of {folder} are damaged ({damaged} of {damaged})",
            key="checkpoint.resume",
            value=run.checkpoint.resume,
            hint="restore one from a copy, or start afresh with checkpoint.resume=never",
        )
    if path is None:
        return None
    saved = open_checkpoint(path, topology=topology)
    for key, now in identity.items():
        if saved.state["identity"][key] != now:
            raise ConfigError(
                f"the checkpoint {path} was made with {saved.state['identity'][key]!r}, this run has {now!r}",
                key=key,
                value=now,
                hint="use another output, or checkpoint.resume=never",
            )
    return saved


def _check_space(folder: checkpoint_folder.Folder, module: nn.Module, run: TrainingRun) -> None:
    if not isinstance(folder, Path):
        return  # a file at a time passes through this machine
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    checkpoint_folder.check_space(
        folder,
        parameters=sum(n for n, _ in sizes),
        trainable=sum(n for n, trained in sizes if trained),
        moments=optimizer_moments(run.optim),
        averaged=run.optim.average_decay > 0,
    )
