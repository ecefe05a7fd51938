"""One pass over a split, for whatever is computed for each of its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from cliplift.configs.data import DataConfig, ViewsConfig
from cliplift.configs.training import TrainingRun
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.data.eval_loader import EvalLoader
from cliplift.pipelines.distributed.collectives import Topology, gather_objects
from cliplift.pipelines.engine.faults import beat, stop_together

Value = TypeVar("Value")


def validation_loader(run: TrainingRun, data: DataConfig, topology: Topology) -> EvalLoader:
    """This rank's share of a run's validation split, one view a clip."""
    return EvalLoader(
        data.model_copy(update={"views": ViewsConfig()}),
        split=data.val_split,
        batch=run.evaluation.batch,
        rank=topology.rank,
        world_size=topology.world_size,
        max_samples=run.evaluation.max_samples,
    )


def over_split(
    loader: EvalLoader,
    forward: Callable[[ClipBatch], Iterable[Value]],
    topology: Topology,
    *,
    merge: Callable[[Value, Value], Value] | None = None,
) -> list[tuple[int, Value]]:
    """``forward`` of every batch of this rank's share; (sample, value) of all ranks, in dataset order.

    The watchdog is told after each batch: a pass may take longer than ``engine.hang_seconds``, a batch may not. A
    signal is noticed after each batch too, on all ranks together.

    Args:
        loader: this rank's share of the split.
        forward: takes a batch on the device and returns one value, on the host, for each of its clips.
        topology: the ranks.
        merge: makes one value of two views of a sample; without it every view has a row of its own.

    Raises:
        StoppedBySignalError: a signal has asked the command to stop; raised on every rank after the same batch.
    """
    rows: list[tuple[int, Value]] = []
    for batch in loader:
        for sample, value in zip(
            batch.sample_index.tolist(), forward(batch.to(topology.device)), strict=True
        ):
            if merge is not None and rows and rows[-1][0] == sample:  # a sample's views lie side by side
                rows[-1] = sample, merge(rows[-1][1], value)
            else:
                rows.append((sample, value))
        beat()
        stop_together(topology)
    # With the fillers all ranks make the same number of forward passes, which ZeRO stage 3 and the exchange about
    # signals both need.
    for batch in loader.fillers():
        forward(batch.to(topology.device))
        beat()
        stop_together(topology)
    return sorted(gather_objects(rows, topology), key=lambda row: row[0])
