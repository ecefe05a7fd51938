"""``cliplift bench train CONFIG``: where a training step's time goes, on the run's own data or a synthetic batch."""

from __future__ import annotations

from pathlib import Path

from cliplift.configs.load import LoadedRun
from cliplift.configs.runs import ClassificationRun, TransferRun


def bench_train(
    loaded: LoadedRun[TransferRun | ClassificationRun],
    *,
    steps: int,
    warm_up: int,
    synthetic: bool,
    output: str | None,
) -> int:
    """Time a run's steps, print a table, and write ``output`` as JSON where given."""
    from cliplift.configs.sections import ConfigError
    from cliplift.pipelines.cost.step_timing import time_steps
    from cliplift.pipelines.distributed.collectives import leave

    try:
        timing, topology = time_steps(loaded.run, steps=steps, warm_up=warm_up, synthetic=synthetic)
    except ConfigError as error:
        raise loaded.locate(error) from None
    if topology.is_main:
        data = "a synthetic batch" if synthetic else "the run's data"
        engine = loaded.run.engine
        print(
            f"{loaded.run.name}: {loaded.run.model.name}, {topology.world_size} x {topology.device.type}, "
            f"ZeRO {engine.zero_stage}, {engine.precision}, {engine.global_batch} clips a step, {data}"
        )
        print(timing.table())
        if output is not None:
            Path(output).write_text(timing.json() + "\n", encoding="utf-8")
    leave(0)
    return 0
