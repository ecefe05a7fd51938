"""One pass over a split, shared by whatever is computed for every sample of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.data.eval_loader import EvalLoader
from cliplift.pipelines.distributed.collectives import Topology, gather_objects
from cliplift.pipelines.engine.faults import beat

Value = TypeVar("Value")


def over_split(
    loader: EvalLoader, forward: Callable[[ClipBatch], Iterable[Value]], topology: Topology
) -> list[tuple[int, Value]]:
    """``forward`` of every batch of this rank's share; (sample, value) of all ranks, in dataset order.

    The watchdog is told after each batch: a pass may take longer than ``engine.hang_seconds``, a batch may not.

    Args:
        loader: this rank's share of the split.
        forward: takes a batch on the device and returns one value, on the host, for each of its clips.
        topology: the ranks.
    """
    rows: list[tuple[int, Value]] = []
    for batch in loader:
        rows += zip(batch.sample_index.tolist(), forward(batch.to(topology.device)), strict=True)
        beat()
    for batch in loader.fillers():  # the other ranks may need this one in their forward passes
        forward(batch.to(topology.device))
        beat()
    return sorted(gather_objects(rows, topology), key=lambda row: row[0])
