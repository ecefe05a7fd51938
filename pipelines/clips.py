"""Loaders: training batches as a pure function of (seed, epoch, position), test samples exactly once.

The main process computes which samples a micro-batch holds; worker processes only fetch them. So the number of
workers, ranks, or accumulation steps cannot change what an optimizer step sees, and the whole state of the loader is
the step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from cliplift.configs.data import DataConfig
from cliplift.configs.sections import ConfigError
from cliplift.pipelines.clip_source import ClipBatch, ClipSource, clips_of_video, merged
from cliplift.pipelines.order import GlobalOrder, Order, WindowedOrder, mix, rank_positions
from cliplift.sharding.reader import ShardReadError
from cliplift.sharding.video import VideoDecodeError

__all__ = ["ClipBatch", "ClipLoader", "EvalLoader", "TooManyFailuresError", "clips_of_video"]

MAX_SUBSTITUTES = 100


class TooManyFailuresError(ValueError):
    """More samples were unreadable than the config tolerates."""


class Request(NamedTuple):
    """A micro-batch to fetch: where in which epoch."""

    epoch: int
    positions: tuple[int, ...]


class _Training(Dataset[ClipBatch]):
    """Micro-batches by request; lives in the worker processes."""

    def __init__(self, source: ClipSource, order: Order) -> None:
        self.source, self.order = source, order

    def __getitem__(self, request: Request) -> ClipBatch:
        clips, failed = [], []
        for position in request.positions:
            clip, messages = self._clip(request.epoch, position)
            clips.append(clip)
            failed += messages
        return merged(clips, failed=failed)

    def _clip(self, epoch: int, position: int) -> tuple[ClipBatch, list[str]]:
        """The sample at a position, or the first readable one of a fixed series that starts there."""
        failed: list[str] = []
        N = self.order.num_samples
        for attempt in range(MAX_SUBSTITUTES):
            at = (
                position
                if attempt == 0
                else (position + 1 + mix(self.source.seed, epoch, position, attempt) % N) % N
            )
            index = self.order.sample(epoch, at)
            try:
                return self.source.training_clip(index, epoch), failed
            except (ShardReadError, VideoDecodeError) as error:
                failed.append(f"{self.source.url_of(index)} {self.source.facts(index).key}: {error}")
        raise TooManyFailuresError(
            f"{MAX_SUBSTITUTES} samples in a row cannot be read; the last: {failed[-1]}"
        )


class ClipLoader:
    """Training batches of one rank.

    Args:
        data: the data section of a run.
        seed: of the order and of every augmentation draw.
        global_batch: G, clips of an optimizer step over all ranks.
        micro_batch: clips of one forward pass on this rank.
        rank, world_size: this process among the ranks.

    Raises:
        ConfigError: the split has fewer samples than a global batch, or the datasets do not fit together.
    """

    def __init__(
        self, data: DataConfig, *, seed: int, global_batch: int, micro_batch: int, rank: int, world_size: int
    ) -> None:
        self.data, self.global_batch, self.micro_batch = data, global_batch, micro_batch
        self.rank, self.world_size = rank, world_size
        self.dataset = ClipSource(data, split=data.split, seed=seed)
        self.classes, self.fingerprint = self.dataset.classes, self.dataset.fingerprint
        self.num_samples = len(self.dataset)
        self.steps_per_epoch = self.num_samples // global_batch
        if not self.steps_per_epoch:
            raise ConfigError(
                f"{global_batch} clips are more than the {self.num_samples} of split {data.split!r}",
                key="engine.global_batch",
                value=global_batch,
                hint=f"use at most {self.num_samples}",
            )
        self.order: Order
        if data.order == "global":
            self.order = GlobalOrder(self.num_samples, seed)
        else:
            self.order = WindowedOrder(self.dataset.shard_ranges, seed, data.streams, data.window_samples)
        self._read = self._failed = self._failed_in_row = 0

    def requests(self, *, start_step: int, stop_step: int) -> Iterator[Request]:
        """The micro-batches of optimizer steps [start, stop); the tail of an epoch below G samples is left out."""
        for step in range(start_step, stop_step):
            epoch, inside = divmod(step, self.steps_per_epoch)
            mine = rank_positions(
                step=inside, global_batch=self.global_batch, rank=self.rank, world_size=self.world_size
            )
            for start in range(0, len(mine), self.micro_batch):
                yield Request(epoch, tuple(mine[start : start + self.micro_batch]))

    def micro_batches(self, *, start_step: int, stop_step: int) -> Iterator[ClipBatch]:
        """Micro-batches of optimizer steps [start, stop), over as many epochs as that takes.

        Raises:
            TooManyFailuresError: more samples failed, in a row or as a share, than the config tolerates.
        """
        requests = list(self.requests(start_step=start_step, stop_step=stop_step))
        dataset = _Training(self.dataset, self.order)
        batches = (
            (dataset[r] for r in requests)
            if self.data.workers == 0
            else _worker_batches(dataset, requests, self.data)
        )
        for batch in batches:
            self._count(batch)
            yield batch

    def _count(self, batch: ClipBatch) -> None:
        self._read += len(batch.labels)
        self._failed += len(batch.failed)
        self._failed_in_row = self._failed_in_row + len(batch.failed) if batch.failed else 0
        too_many = self._read >= 100 and self._failed > self.data.max_failed_share * self._read
        if self._failed_in_row > self.data.max_failed_in_row or too_many:
            raise TooManyFailuresError(
                f"{self._failed} of {self._read} samples could not be read (the last: {batch.failed[-1]}); "
                f"run `cliplift verify` on {', '.join(self.data.shards)}, or raise data.max_failed_share"
            )

    def close(self) -> None:
        self.dataset.close()


class _TestViews(Dataset[ClipBatch]):
    def __init__(self, source: ClipSource) -> None:
        self.source = source

    def __getitem__(self, samples: tuple[int, ...]) -> ClipBatch:
        return merged([self.source.test_views(index) for index in samples])


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
        chosen = list(range(len(self.dataset)))
        if max_samples is not None and max_samples < len(chosen):
            # Shards may hold classes side by side; a seeded choice shows all of them.
            chosen = sorted(random.Random(0).sample(chosen, max_samples))
        self._mine = chosen[rank::world_size]
        self._first = chosen[:1]
        self._samples_per_batch = max(1, batch // (data.views.clips * data.views.crops))
        largest = math.ceil(len(chosen) / world_size)
        self._missing = math.ceil(largest / self._samples_per_batch) - math.ceil(
            len(self._mine) / self._samples_per_batch
        )

    def __iter__(self) -> Iterator[ClipBatch]:
        step = self._samples_per_batch
        requests = [tuple(self._mine[start : start + step]) for start in range(0, len(self._mine), step)]
        dataset = _TestViews(self.dataset)
        if self.data.workers == 0:
            return (dataset[samples] for samples in requests)
        return _worker_batches(dataset, requests, self.data)

    def fillers(self) -> Iterator[ClipBatch]:
        """Batches to run and forget, so that every rank makes as many forward passes as the busiest one.

        ZeRO stage 3 gathers weights in each forward pass with all ranks; one that makes fewer passes hangs the rest.
        """
        return (_TestViews(self.dataset)[tuple(self._first)] for _ in range(self._missing))

    def close(self) -> None:
        self.dataset.close()


def _worker_batches(
    dataset: Dataset[ClipBatch], requests: Sequence[Any], data: DataConfig
) -> Iterator[ClipBatch]:
    """Batches from worker processes, in the order asked for. A silent worker is an error after the time limit."""
    loader = DataLoader(
        dataset,
        sampler=requests,
        batch_size=None,
        num_workers=min(data.workers, max(1, len(requests))),
        prefetch_factor=data.prefetch_batches,
        timeout=data.worker_timeout_seconds,
        # A fork would copy open remote connections and the threads of the parent; a fork server has neither.
        multiprocessing_context="forkserver",
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_one_thread,
    )
    return iter(loader)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
