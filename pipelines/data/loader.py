"""Loaders: training batches as a pure function of (seed, epoch, position), test samples exactly once.

The main process computes which samples a micro-batch holds; worker processes only fetch them. So the number of
workers, ranks, or accumulation steps cannot change what an optimizer step sees, and the whole state of the loader is
the step. :func:`training_loader` makes the loader a config asks for.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from torch.utils.data import Dataset

from cliplift.configs.data import DataConfig
from cliplift.configs.sections import ConfigError
from cliplift.pipelines.data.batch import ClipBatch, merge_batches
from cliplift.pipelines.data.failures import FailureCount, TooManyFailuresError
from cliplift.pipelines.data.order import (
    CLUSTER_KEY,
    BalancedOrder,
    Draw,
    GlobalOrder,
    Mixture,
    Order,
    WindowedOrder,
    mix,
    rank_positions,
)
from cliplift.pipelines.data.source import ClipSource
from cliplift.pipelines.data.workers import batches_from_workers
from cliplift.sharding.manifest import ManifestError
from cliplift.sharding.read.reader import RemovedError, ShardReadError
from cliplift.sharding.video.decode import VideoDecodeError

MAX_SUBSTITUTES = 100


class Request(NamedTuple):
    """A micro-batch to fetch: where in which epoch, and what the same process will be asked for next."""

    epoch: int
    positions: tuple[int, ...]
    next_epoch: int = 0
    next_positions: tuple[int, ...] = ()


Stopped = TooManyFailuresError | ManifestError  # why a worker makes no batch; the main process raises it


class _Training(Dataset[ClipBatch | Stopped]):
    """Micro-batches by request; lives in the worker processes."""

    def __init__(self, source: ClipSource, order: Order | BalancedOrder) -> None:
        self.source, self.order = source, order

    def __getitem__(self, request: Request) -> ClipBatch | Stopped:
        draws = [self.order.draw(request.epoch, position) for position in request.positions]
        ahead = [self.order.draw(request.next_epoch, position) for position in request.next_positions]
        clips, failed = [], []
        try:
            self.source.expect(draw.sample for draw in (*draws, *ahead))
            for position, draw in zip(request.positions, draws, strict=True):
                clip, messages = self._clip(request.epoch, position, draw)
                clips.append(clip)
                failed += messages
        except (TooManyFailuresError, ManifestError) as error:
            return error  # raised by the main process, whose traceback is the one that helps
        return merge_batches(clips, failed=failed)

    def _clip(self, epoch: int, position: int, draw: Draw) -> tuple[ClipBatch, list[str]]:
        """The sample drawn, or the first readable one of a fixed series of its neighbours."""
        failed: list[str] = []
        last = ""
        near = self.order.substitutes(position)
        for attempt in range(1, MAX_SUBSTITUTES + 1):
            try:
                clips = self.source.training_clips(*draw)
                return clips.asked_for(epoch=epoch, position=position), failed
            except RemovedError as error:
                last = str(error)  # no failure: nobody is to read it any more
            except (ShardReadError, VideoDecodeError) as error:
                last = f"{self.source.name_of(draw.sample)}: {error}"
                failed.append(last)
            at = near[mix(self.source.seed, epoch, position, attempt) % len(near)]
            draw = self.order.draw(epoch, at)
        raise TooManyFailuresError(f"{MAX_SUBSTITUTES} samples in a row cannot be read; the last: {last}")


class ClipLoader:
    """Training batches of one rank.

    Args:
        data: the data section of a run.
        seed: of the order and of every augmentation draw.
        global_batch: G, clips of an optimizer step over all ranks.
        micro_batch: clips of one forward pass on this rank.
        rank, world_size: this process among the ranks.

    With ``data.clips_per_sample`` R above 1, a step reads G / R positions, and each gives R clips side by side.

    Raises:
        ConfigError: the split has fewer samples than a global batch, R does not divide the micro-batch, or the
            datasets do not fit together.
    """

    def __init__(
        self, data: DataConfig, *, seed: int, global_batch: int, micro_batch: int, rank: int, world_size: int
    ) -> None:
        self.data, self.global_batch, self.micro_batch = data, global_batch, micro_batch
        self.rank, self.world_size = rank, world_size
        if data.sequential is not None:
            raise ConfigError("is not read by this stage", key="data.sequential", hint="remove it")
        if micro_batch % data.clips_per_sample:
            raise ConfigError(
                f"{data.clips_per_sample} does not divide the {micro_batch} clips of a micro-batch",
                key="data.clips_per_sample",
                value=data.clips_per_sample,
                hint="change it, engine.micro_batch or engine.global_batch",
            )
        # Positions of the order count samples, of which each gives R clips.
        self.samples_per_step = global_batch // data.clips_per_sample
        self.dataset = ClipSource(data, split=data.split, seed=seed, keep_numbers=True)
        self.classes, self.splits = self.dataset.classes, self.dataset.splits
        self.num_samples = len(self.dataset)
        self.steps_per_epoch = self.num_samples // self.samples_per_step
        if not self.steps_per_epoch:
            most = self.num_samples * data.clips_per_sample
            raise ConfigError(
                f"{global_batch} clips are more than the {most} of split {data.split!r}",
                key="engine.global_batch",
                value=global_batch,
                hint=f"use at most {most}",
            )
        self.order = order_of(self.dataset)
        self.fingerprint = sequence_identity(self.dataset)
        self._failures = FailureCount(data)

    def requests(self, *, start_step: int, stop_step: int) -> Iterator[Request]:
        """The micro-batches of optimizer steps [start, stop); the tail of an epoch below G samples is left out."""
        samples = self.micro_batch // self.data.clips_per_sample
        for step in range(start_step, stop_step):
            epoch, inside = divmod(step, self.steps_per_epoch)
            mine = rank_positions(
                step=inside, global_batch=self.samples_per_step, rank=self.rank, world_size=self.world_size
            )
            for start in range(0, len(mine), samples):
                yield Request(epoch, tuple(mine[start : start + samples]))

    def micro_batches(self, *, start_step: int, stop_step: int, final: bool = False) -> Iterator[ClipBatch]:
        """Micro-batches of optimizer steps [start, stop), over as many epochs as that takes.

        The share of unreadable samples is judged once there are a hundred, where an epoch ends, and at the last step
        of a run (``final``).

        Raises:
            TooManyFailuresError: more samples failed, in a row or as a share, than the config tolerates.
            ManifestError: the catalog is damaged where it is read.
            WorkerError: the worker processes died or were silent for ``data.worker_timeout_seconds``.
        """
        dataset = _Training(self.dataset, self.order)
        workers = self.data.workers
        # A worker's next turn comes as many requests later as there are workers; its bytes are fetched meanwhile.
        requests = with_next(
            self.requests(start_step=start_step, stop_step=stop_step),
            distance=max(1, workers),
            most=self.data.read_ahead,
        )
        batches: Iterator[ClipBatch | Stopped]
        if workers == 0:
            batches = (dataset[request] for request in requests)
        else:
            batches = batches_from_workers(
                dataset, requests, data=self.data, workers=workers, describe=self._describe
            )
        micro_batches_per_step = self.global_batch // (self.micro_batch * self.world_size)
        # Counted from the run's first batch, not this call's: a resumed run judges failures at the same steps.
        for number, batch in enumerate(batches, start=start_step * micro_batches_per_step + 1):
            if isinstance(batch, (TooManyFailuresError, ManifestError)):
                raise batch
            step, inside = divmod(number, micro_batches_per_step)
            epoch_ends = not inside and step % self.steps_per_epoch == 0
            run_ends = final and step == stop_step
            self._failures.count(batch, judge=epoch_ends or run_ends)
            yield batch

    def _describe(self, request: Request) -> str:
        names = [
            self.dataset.name_of(self.order.draw(request.epoch, at).sample) for at in request.positions[:3]
        ]
        more = len(request.positions) - len(names)
        return ", ".join(names) + (f" and {more} more" if more else "")

    def close(self) -> None:
        self.dataset.close()


def order_of(source: ClipSource) -> Order | BalancedOrder:
    """The order of a source's samples that its config asks for."""
    data, seed = source.data, source.seed
    if data.class_balanced:
        return BalancedOrder(source.labels, seed)
    if data.cluster_balanced:
        return BalancedOrder(source.clusters, seed, key=CLUSTER_KEY)
    if data.weights is None:
        return _plain_order(data, source.shard_ranges, len(source), seed)
    parts = [
        _plain_order(data, one.shard_ranges, len(one), mix(seed, number))
        for number, one in enumerate(source.sets)
    ]
    return Mixture(parts, data.weights, seed)


def _plain_order(
    data: DataConfig, shard_ranges: Iterable[tuple[int, int]], num_samples: int, seed: int
) -> GlobalOrder | WindowedOrder:
    if data.order == "global":
        return GlobalOrder(num_samples, seed)
    return WindowedOrder(list(shard_ranges), seed, data.streams, data.window_samples)


def sequence_identity(source: ClipSource) -> str:
    """Everything but seed and batch that decides which sample comes when: what a resumed run must not change."""
    data = source.data
    order = (
        f"windowed, {data.streams} streams of {data.window_samples}" if data.order == "windowed" else "global"
    )
    order = "class-balanced" if data.class_balanced else order
    if data.cluster_balanced:  # the same clips in other clusters come in another order
        clusters = hashlib.sha256(source.clusters.astype("<i8").tobytes()).hexdigest()
        order = f"cluster-balanced, {clusters}"
    weights = "" if data.weights is None else f", weights {':'.join(f'{w:g}' for w in data.weights)}"
    repeated = f", {data.clips_per_sample} clips a sample" if data.clips_per_sample > 1 else ""
    return f"{source.fingerprint} ({order}{weights}{repeated})"


def with_next(requests: Iterator[Request], *, distance: int, most: int) -> Iterator[Request]:
    """Each request with the first positions of the one ``distance`` later, which the same process will get.

    PyTorch deals requests to workers in turn. Were it to deal them otherwise, reading would be slower, not different.
    """
    waiting: deque[Request] = deque()
    for request in requests:
        waiting.append(request)
        if len(waiting) > distance:
            yield waiting.popleft()._replace(
                next_epoch=request.epoch, next_positions=request.positions[:most]
            )
    yield from waiting


class TrainingLoader(Protocol):
    """What training needs of a loader: steps of equal batches on every rank, and what they are drawn from."""

    data: DataConfig
    classes: tuple[str, ...]
    splits: tuple[str, ...]  # of the shards, whichever is trained on
    fingerprint: str
    num_samples: int
    steps_per_epoch: int

    def micro_batches(
        self, *, start_step: int, stop_step: int, final: bool = False
    ) -> Iterator[ClipBatch]: ...
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
