"""Training from plain WebDataset tars without an index, through stock ``webdataset``. Not exact.

What is lost against :class:`cliplift.pipelines.data.loader.ClipLoader`: the order depends on ranks, workers and chance,
tars are drawn with replacement (so a sample may come twice before another comes once), a resumed run goes on with other
samples, and what webdataset cannot read behind a damaged place of a tar is left out without being counted. What is
kept: every rank always gets equal batches, the number of steps is the config's, undecodable videos are counted, workers
that hang are an error. ``cliplift index`` makes the same tars readable exactly.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import fsspec
import numpy as np
import torch
import webdataset
from torch.utils.data import Dataset, get_worker_info
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys, tar_file_expander

from cliplift.configs.data import DataConfig, SequentialConfig
from cliplift.configs.sections import ConfigError
from cliplift.pipelines.data.batch import FLIP, ClipBatch, merge_batches
from cliplift.pipelines.data.clip_plan import cut, mirrored_labels, training_plan
from cliplift.pipelines.data.failures import FailureCount, TooManyFailuresError
from cliplift.pipelines.data.loader import MAX_SUBSTITUTES
from cliplift.pipelines.data.workers import batches_from_workers
from cliplift.sharding.manifest import NO_LABEL
from cliplift.sharding.read.reader import ClipShape, ShardDataset
from cliplift.sharding.sources.labels import LabelError, find_class, member_label
from cliplift.sharding.storage import StorageError
from cliplift.sharding.video.decode import VideoDecodeError, decode_frames, probe

# A sample as webdataset makes it: ``__key__`` and ``__url__`` are text, members are bytes.
RawSample = Mapping[str, object]


class SequentialLoader:
    """Training batches of one rank from a stream of tars; stands in for ``ClipLoader``.

    Args:
        data: the data section of a run, with ``sequential``; ``shards`` gives the classes.
        seed, global_batch, micro_batch, rank, world_size: as for ``ClipLoader``.

    Raises:
        ConfigError: an epoch holds fewer samples than a global batch, or clips cannot be dealt evenly.
    """

    def __init__(
        self, data: DataConfig, *, seed: int, global_batch: int, micro_batch: int, rank: int, world_size: int
    ) -> None:
        assert data.sequential is not None
        if micro_batch % data.clips_per_sample:
            raise ConfigError(
                f"{data.clips_per_sample} does not divide the {micro_batch} clips of a micro-batch",
                key="data.clips_per_sample",
                value=data.clips_per_sample,
            )
        self.data, self.world_size = data, world_size
        self.global_batch, self.micro_batch = global_batch, micro_batch
        # Plain tars do not say which classes there are; an indexed dataset does.
        indexed = ShardDataset(data.urls[0], fold=data.fold)
        self.classes, self.splits = indexed.classes, indexed.splits
        self.num_samples = data.sequential.samples_per_epoch
        self.steps_per_epoch = self.num_samples * data.clips_per_sample // global_batch
        if not self.steps_per_epoch:
            raise ConfigError(
                f"{self.num_samples} samples are fewer than a global batch of {global_batch} clips needs",
                key="data.sequential.samples_per_epoch",
                value=self.num_samples,
            )
        tars = "+".join(data.sequential.tars)
        self.fingerprint = f"stream of {tars}, {self.num_samples} samples an epoch, not exact"
        self._stream = _Stream(
            data, self.classes, seed=seed, rank=rank, samples=micro_batch // data.clips_per_sample
        )
        self._failures = FailureCount(data)

    def micro_batches(self, *, start_step: int, stop_step: int, final: bool = False) -> Iterator[ClipBatch]:
        """As many micro-batches as optimizer steps [start, stop) need; which samples they hold is not said."""
        count = (stop_step - start_step) * self.global_batch // (self.micro_batch * self.world_size)
        # A run that goes on at a later step draws other samples than it began with.
        requests = range(start_step, start_step + count)
        batches: Iterator[ClipBatch | TooManyFailuresError]
        if self.data.workers == 0:
            batches = (self._stream[request] for request in requests)
        else:
            batches = batches_from_workers(
                self._stream,
                requests,
                data=self.data,
                workers=self.data.workers,
                describe=lambda number: f"number {number} of the stream {self.fingerprint}",
            )
        micro_batches_per_step = self.global_batch // (self.micro_batch * self.world_size)
        for number, batch in enumerate(batches, start=start_step * micro_batches_per_step + 1):
            if isinstance(batch, TooManyFailuresError):
                raise batch
            step, inside = divmod(number, micro_batches_per_step)
            epoch_ends = not inside and step % self.steps_per_epoch == 0
            run_ends = final and step == stop_step
            self._failures.count(batch, judge=epoch_ends or run_ends)
            yield batch

    def close(self) -> None:
        self._stream.close()


class _Stream(Dataset[ClipBatch | TooManyFailuresError]):
    """The next clips of this process's own stream, whatever the request; lives in the worker processes."""

    def __init__(
        self, data: DataConfig, classes: Sequence[str], *, seed: int, rank: int, samples: int
    ) -> None:
        assert data.sequential is not None
        self.data, self.config, self.classes = data, data.sequential, tuple(classes)
        self.seed, self.rank, self.samples = seed, rank, samples
        self._numbers = {name: number for number, name in enumerate(classes)}
        self._mirrored = mirrored_labels(data.augment, classes)
        self._videos: Iterator[tuple[int, RawSample]] | None = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_videos": None}

    def __getitem__(self, request: int) -> ClipBatch | TooManyFailuresError:
        if self._videos is None:
            worker = get_worker_info()
            # Workers and ranks draw different tars, and a resumed run, which begins with a later request, others again.
            words = (self.seed, self.rank, worker.id if worker else 0, request)
            self._videos = enumerate(raw_samples(self.config, seed=zlib.crc32(repr(words).encode())))
        try:
            return self._batch(self._videos)
        except (TooManyFailuresError, StorageError) as error:
            return TooManyFailuresError(str(error))

    def _batch(self, videos: Iterator[tuple[int, RawSample]]) -> ClipBatch:
        clips: list[ClipBatch] = []
        failed: list[str] = []
        for number, video in videos:
            try:
                clips.append(self._clips(number, video))
            except (VideoDecodeError, SampleError) as error:
                failed.append(f"{video.get('__url__')} {video.get('__key__')}: {error}")
            if len(clips) == self.samples:
                return merge_batches(clips, failed=failed)
            if len(failed) > MAX_SUBSTITUTES:
                break
        last = failed[-1] if failed else "the tars hold no sample"
        raise TooManyFailuresError(
            f"{len(failed)} samples of {', '.join(self.config.tars)} cannot be read; the last: {last}"
        )

    def _clips(self, number: int, video: RawSample) -> ClipBatch:
        """The training clips of one raw sample. Raises SampleError, VideoDecodeError."""
        data = member_of(video, self.config.video_key)
        if data is None:
            raise SampleError(f"has no .{self.config.video_key} member")
        label = label_of(video, self.config.label_key, self._numbers)
        plan = training_plan(self.data, shape_of(data), self.seed, self.rank, number)
        wanted = np.unique(np.concatenate(plan.frames))
        decoded = decode_frames(data, wanted.tolist(), decoder=self.data.decoder)
        cuts = [
            cut(decoded[np.searchsorted(wanted, frames)], box, pixels=self.data.crop_pixels)
            for frames, box in zip(plan.frames, plan.boxes, strict=True)
        ]
        mirrored = (plan.draws[:, FLIP] < 0.5) & self.data.augment.flip
        name = zlib.crc32(f"{video.get('__url__')} {video['__key__']}".encode())
        B = len(cuts)
        return ClipBatch(
            clips=torch.stack(cuts),
            labels=torch.tensor([self._mirrored.get(label, label) if m else label for m in mirrored]),
            sample_index=torch.full((B,), name),
            video_index=torch.full((B,), name),
            views=torch.arange(B),
            draws=torch.from_numpy(plan.draws),
            epochs=torch.full(
                (B,), number
            ),  # a stream has no places: how often something came, and what it is
            positions=torch.arange(name * B, (name + 1) * B),
        )

    def close(self) -> None:
        self._videos = None


class SampleError(ValueError):
    """A sample of a tar lacks something."""


def raw_samples(config: SequentialConfig, *, seed: int) -> Iterator[RawSample]:
    """Samples as webdataset makes them, without end: key, address of the tar, and the bytes of each member.

    Raises:
        StorageError: a tar cannot be opened.
        TooManyFailuresError: no tar holds a sample that can be read.
    """
    tars = [tar for pattern in config.tars for tar in expand_urls(pattern)]
    # Tars are drawn again and again without end. So a stream that is empty, or damaged throughout, has to be noticed:
    # after three tries of each tar on average.
    opened = _OpenedTars(limit=max(100, 3 * len(tars)))
    skip = webdataset.warn_and_continue
    stream = webdataset.DataPipeline(
        webdataset.ResampledShards(tars, seed=seed),
        opened,
        partial(tar_file_expander, handler=skip),
        partial(group_by_keys, handler=skip),
        opened.count_samples,
        webdataset.shuffle(config.shuffle_samples, initial=config.shuffle_samples, seed=seed),
    )
    yield from stream


class _OpenedTars:
    """Opens tars through fsspec: no shell commands, which webdataset's own addresses may contain."""

    def __init__(self, limit: int) -> None:
        self.limit, self.fruitless = limit, 0

    def count_samples(self, samples: Iterable[RawSample]) -> Iterator[RawSample]:
        """Samples as they come out of the tars."""
        for sample in samples:
            self.fruitless = 0
            yield sample

    def __call__(self, tars: Iterable[Mapping[str, str]]) -> Iterator[dict[str, object]]:
        for tar in tars:
            self.fruitless += 1
            if self.fruitless > self.limit:
                raise TooManyFailuresError(f"no sample in {self.limit} tars; the last: {tar['url']}")
            try:
                with fsspec.open(tar["url"], "rb") as stream:
                    yield {"url": tar["url"], "stream": stream}
            except OSError as error:
                raise StorageError(f"{tar['url']}: cannot be opened: {error}") from error


def member_of(video: RawSample, key: str) -> bytes | None:
    """The bytes of a member of a raw sample, or None where it has no such member."""
    member = video.get(key)
    return member if isinstance(member, bytes) else None


def label_of(video: RawSample, key: str, numbers: Mapping[str, int]) -> int:
    """The label of a raw sample: what ``cliplift index`` makes of the same members; -1 has none.

    Raises:
        SampleError: its label cannot be read or is none of the classes.
    """
    try:
        name = member_label(member_of(video, "cls"), member_of(video, "json"), key)
    except LabelError as error:
        raise SampleError(str(error)) from error
    if name is None:
        return NO_LABEL
    label = find_class(name, numbers)
    if label is None:
        raise SampleError(f"its label {name!r} is not one of the {len(numbers)} classes of data.shards")
    return label


def shape_of(data: bytes) -> ClipShape:
    """Size and length of a video, from its container. Raises VideoDecodeError."""
    facts = probe(data)
    frames = facts.frames
    if frames is None and facts.duration_seconds and facts.fps:
        frames = int(facts.duration_seconds * facts.fps)
    if not frames or facts.fps is None:
        raise VideoDecodeError("its container states no length")
    return ClipShape(num_frames=frames, fps=float(facts.fps), height=facts.height, width=facts.width)
