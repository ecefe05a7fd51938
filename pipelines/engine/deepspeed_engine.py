"""A DeepSpeed engine over a stage's module, with a checkpoint's state in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from cliplift.configs.sections import ConfigError
from cliplift.configs.training import TrainingRun
from cliplift.models.layers import checkpoint_blocks
from cliplift.pipelines.distributed.collectives import Topology, broadcast_object
from cliplift.pipelines.engine import checkpoint
from cliplift.pipelines.engine.batchnorm import refuse_half_batchnorm
from cliplift.pipelines.engine.deepspeed_config import deepspeed_config
from cliplift.pipelines.engine.optim import build_optimizer, network_with_blocks
from cliplift.pipelines.engine.zero_state import put_masters, restore_optimizer


def build_engine(
    module: nn.Module,
    run: TrainingRun,
    *,
    folder: Path,
    saved: checkpoint.Snapshot | None,
    topology: Topology,
) -> Any:
    """Wrap a module by ``deepspeed.initialize`` with weights, masters and optimizer state of a checkpoint, if any.

    Raises:
        ConfigError: BatchNorm with cast weights, too little disk for a checkpoint, or a checkpoint of another network.
    """
    import deepspeed

    engine_config = run.engine
    module = module.to(topology.device)
    refuse_half_batchnorm(module, run)
    if engine_config.sync_batchnorm:
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    if saved is not None:
        checkpoint.load_module(module, saved)
    if engine_config.checkpoint_blocks_share:
        _, network = network_with_blocks(module, key="engine.checkpoint_blocks_share")
        checkpoint_blocks(network, engine_config.checkpoint_blocks_share)
    optimizer = build_optimizer(
        module, run.optim, global_batch=engine_config.global_batch, device=topology.device
    )
    if topology.is_main:
        _check_space(folder, module, run)
    config = deepspeed_config(run, world_size=topology.world_size)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    if saved is not None:
        put_masters(engine, saved.parameters)
        restore_optimizer(engine, saved.optimizer)
    if engine_config.compile:
        engine.compile()
    return engine


def resumable(
    folder: Path,
    run: TrainingRun,
    *,
    identity: Mapping[str, Any],
    topology: Topology,
    say: Callable[[str], None],
) -> checkpoint.Snapshot | None:
    """The newest usable checkpoint of this very run, or None. With ``resume: never`` old ones are set aside.

    Rank 0 chooses, so that no rank resumes from another checkpoint than the rest.

    Raises:
        ConfigError: the checkpoint was made by a run that differs in ``identity``.
    """
    path = None
    if topology.is_main and run.checkpoint.resume == "never":
        checkpoint.set_aside(folder, say=say)
    elif topology.is_main:
        path = checkpoint.newest_usable(folder, say=say)
    path = broadcast_object(path, topology)
    if path is None:
        return None
    saved = checkpoint.load(path, topology=topology)
    for key, now in identity.items():
        if saved.state["identity"][key] != now:
            raise ConfigError(
                f"the checkpoint {path} was made with {saved.state['identity'][key]!r}, this run has {now!r}",
                key=key,
                value=now,
                hint="use another output, or checkpoint.resume=never",
            )
    return saved


def _check_space(folder: Path, module: nn.Module, run: TrainingRun) -> None:
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    checkpoint.check_space(
        folder,
        parameters=sum(n for n, _ in sizes),
        trainable=sum(n for n, trained in sizes if trained),
        moments=int(run.optim.momentum > 0) if run.optim.name == "sgd" else 2,
        averaged=run.optim.average_decay > 0,
    )
