"""Which loader a run trains from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from cliplift.configs.data import DataConfig
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.data.clips import ClipLoader


class TrainingLoader(Protocol):
    """What training needs of a loader: steps of equal batches on every rank, and what they are drawn from."""

    data: DataConfig
    classes: tuple[str, ...]
    splits: tuple[str, ...]  # of the shards, whichever is trained on
    fingerprint: str
    num_samples: int
    steps_per_epoch: int

    def micro_batches(self, *, start_step: int, stop_step: int) -> Iterator[ClipBatch]: ...
    def close(self) -> None: ...


def training_loader(
    data: DataConfig, *, seed: int, global_batch: int, micro_batch: int, rank: int, world_size: int
) -> TrainingLoader:
    """The loader that the config asks for: exact over indexed shards, or a stream of tars."""
    options = {
        "seed": seed,
        "global_batch": global_batch,
        "micro_batch": micro_batch,
        "rank": rank,
        "world_size": world_size,
    }
    if data.sequential is None:
        return ClipLoader(data, **options)
    from cliplift.pipelines.data.sequential import SequentialLoader

    return SequentialLoader(data, **options)
