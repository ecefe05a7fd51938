"""The evaluation loader: every sample of a split exactly once over all ranks."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch.utils.data import Dataset

from cliplift.configs.data import DataConfig
from cliplift.pipelines.data.batch import ClipBatch, merge_batches
from cliplift.pipelines.data.source import ClipSource
from cliplift.pipelines.data.workers import batches_from_workers


class ViewsRequest(NamedTuple):
    """Samples whose views make a batch, and what the same process will be asked for next."""

    samples: tuple[int, ...]
    following: tuple[int, ...] = ()


class _TestViews(Dataset[ClipBatch]):
    def __init__(self, source: ClipSource) -> None:
        self.source = source

    def __getitem__(self, request: ViewsRequest) -> ClipBatch:
        self.source.expect((*request.samples, *request.following))
        return merge_batches([self.source.test_views(index) for index in request.samples])


class EvalLoader:
    """Every sample of a split once over all ranks, with all its views; a sample's views stay in one batch.

    Ranks get samples rank, rank + ranks, ...; some may get one fewer. Nothing is padded. A test sample that cannot be
    read is an error: an evaluation that leaves samples out would not be one.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        split: str,
        batch: int,
        rank: int,
        world_size: int,
        max_samples: int | None = None,
    ) -> None:
        self.data = data
        self.dataset = ClipSource(data, split=split)
        self.classes = self.dataset.classes
        self.num_samples = len(self.dataset) if max_samples is None else min(max_samples, len(self.dataset))
        chosen: Sequence[int] = range(len(self.dataset))
        if max_samples is not None and max_samples < len(chosen):
            # Shards may hold classes side by side; a seeded choice shows all of them.
            chosen = sorted(random.Random(0).sample(chosen, max_samples))
        self._mine = chosen[rank::world_size]
        self._first = chosen[:1]
        # With every_frames the number of views grows with a video's length; videos then come one by one.
        several = data.views.every_frames is None
        self._samples_per_batch = max(1, batch // (data.views.clips * data.views.crops)) if several else 1
        largest = math.ceil(len(chosen) / world_size)
        self._missing = math.ceil(largest / self._samples_per_batch) - math.ceil(
            len(self._mine) / self._samples_per_batch
        )

    def __iter__(self) -> Iterator[ClipBatch]:
        step = self._samples_per_batch
        starts = range(0, len(self._mine), step)
        workers = min(self.data.workers, len(starts))
        ahead = step * max(1, workers)
        requests = (
            ViewsRequest(self._batch(start), self._batch(start + ahead)[: self.data.read_ahead])
            for start in starts
        )
        dataset = _TestViews(self.dataset)
        if not workers:
            return (dataset[request] for request in requests)
        return batches_from_workers(
            dataset,
            requests,
            data=self.data,
            workers=workers,
            describe=lambda request: ", ".join(map(self.dataset.name_of, request.samples[:3])),
        )

    def _batch(self, start: int) -> tuple[int, ...]:
        return tuple(self._mine[start : start + self._samples_per_batch])

    def fillers(self) -> Iterator[ClipBatch]:
        """Batches to run and forget, so that every rank makes as many forward passes as the busiest one.

        ZeRO stage 3 gathers weights in each forward pass with all ranks; one that makes fewer passes hangs the rest.
        """
        return (_TestViews(self.dataset)[ViewsRequest(tuple(self._first))] for _ in range(self._missing))

    def close(self) -> None:
        self.dataset.close()
