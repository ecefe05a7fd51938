"""Samples of one or several shard datasets as clips: read, decode only the frames needed, cut, in uint8."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cliplift.configs.data import DataConfig
from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import TranscodeConfig
from cliplift.pipelines.crops import cut, training_box, view_boxes
from cliplift.pipelines.order import generator
from cliplift.pipelines.sampling import Ints, training_frames, view_frames
from cliplift.sharding.reader import SampleFacts, ShardDataset
from cliplift.sharding.transcode import transcode_span
from cliplift.sharding.video import Frames, decode_frames

FOREIGN = TranscodeConfig(min_frames=1, max_seconds=3600.0)
TENSORS = ("clips", "labels", "sample_index", "video_index", "views", "draws")
NUM_DRAWS = 24  # uniform numbers of a sample for the augmentation on the device


@dataclass(frozen=True)
class ClipBatch:
    """Clips as they leave the decoder, and what is known about them."""

    clips: Tensor  # uint8 (B, T, H, W, 3)
    labels: Tensor  # int64 (B,), -1 where unlabelled
    sample_index: Tensor  # int64 (B,) index into the dataset
    video_index: Tensor  # int64 (B,) equal numbers are clips of the same source video
    views: Tensor  # int64 (B,) view of a test sample; 0 in training
    draws: Tensor  # float32 (B, NUM_DRAWS) in [0, 1), a function of seed, epoch and sample
    targets: Tensor | None = None  # float32 (B, K) for data with several labels a sample
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    failed: tuple[str, ...] = ()  # samples that could not be read and were replaced

    def to(self, device: torch.device) -> ClipBatch:
        """The batch on a device; copies from pinned memory do not wait."""
        return self._mapped(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> ClipBatch:
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> ClipBatch:
        targets = None if self.targets is None else change(self.targets)
        moved: dict[str, Any] = {name: change(getattr(self, name)) for name in TENSORS}
        return replace(self, targets=targets, **moved)


class ClipSource:
    """The samples of a split over all shard datasets of a config; picklable, opens files per process.

    Raises:
        ConfigError: the datasets disagree about their classes, or one has no such split.
    """

    def __init__(self, data: DataConfig, *, split: str | None, seed: int = 0) -> None:
        self.data, self.seed = data, seed
        self.sets = [
            ShardDataset(
                url, split=split, fold=data.fold, cache_folder=data.cache_folder, cache_gib=data.cache_gib
            )
            for url in data.shards
        ]
        self.classes = self.sets[0].classes
        for url, other in zip(data.shards, self.sets, strict=True):
            if other.classes != self.classes:
                raise ConfigError(
                    f"{url} has other classes than {data.shards[0]}", key="data.shards", value=url,
                    hint="build both with the same class list",
                )  # fmt: skip
        self.starts = np.cumsum([0, *(len(s) for s in self.sets)]).tolist()
        self.fingerprint = "+".join(s.fingerprint for s in self.sets)
        self.labels = np.concatenate([s.labels for s in self.sets]).astype(np.int64)
        self.video_index = self._video_numbers()
        self.shard_ranges = tuple(
            (a + start, b + start)
            for start, one in zip(self.starts, self.sets, strict=False)
            for a, b in one.shard_ranges
        )
        self.label_sets = self._label_sets()
        self._cache = _cache_of(data.cache_decoded_mib)

    def _video_numbers(self) -> Ints:
        numbers: dict[tuple[str, str], int] = {}
        found = [
            numbers.setdefault((one.url, video), len(numbers))
            for one in self.sets
            for video in one.column("video_id")
        ]
        return np.array(found, dtype=np.int64)

    def _label_sets(self) -> list[tuple[int, ...]] | None:
        """Label numbers of every sample where any sample has several; None for single-label data."""
        found = [tuple(labels) for one in self.sets for labels in one.column("labels")]
        return found if any(len(labels) > 1 for labels in found) else None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _place(self, index: int) -> tuple[ShardDataset, int]:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.sets[number], index - int(self.starts[number])

    def facts(self, index: int) -> SampleFacts:
        one, inside = self._place(index)
        return one.facts(inside)

    def url_of(self, index: int) -> str:
        return self._place(index)[0].url

    def training_clip(self, index: int, epoch: int) -> ClipBatch:
        """One augmented clip as a batch of one; every draw is a function of (seed, epoch, sample)."""
        facts, rng = self.facts(index), generator(self.seed, epoch, index)
        temporal = rng.random(self.data.sampling.frames + 1)
        numbers = training_frames(
            self.data.sampling, num_frames=facts.num_frames, fps=facts.fps, draw=temporal
        )
        box = training_box(self.data.augment, self.data, height=facts.height, width=facts.width, rng=rng)
        draws = rng.random(NUM_DRAWS, dtype=np.float32)
        frames, read_seconds, decode_seconds = self._frames(index, facts, numbers)
        clip = cut(frames, box, pixels=self.data.crop_pixels)
        return self._batch(index, [clip], draws[None], read_seconds, decode_seconds)

    def test_views(self, index: int) -> ClipBatch:
        """All views of one sample, clips x crops, crops innermost."""
        facts, views = self.facts(index), self.data.views
        clips = view_frames(self.data.sampling, num_frames=facts.num_frames, fps=facts.fps, clips=views.clips)
        frames, read_seconds, decode_seconds = self._frames(index, facts, np.concatenate(clips))
        boxes = view_boxes(self.data, height=facts.height, width=facts.width, crops=views.crops)
        T = self.data.sampling.frames
        cuts = [
            cut(frames[n * T : (n + 1) * T], box, pixels=self.data.crop_pixels)
            for n in range(len(clips))
            for box in boxes
        ]
        draws = np.full((len(cuts), NUM_DRAWS), 0.5, dtype=np.float32)
        return self._batch(index, cuts, draws, read_seconds, decode_seconds)

    def _frames(self, index: int, facts: SampleFacts, numbers: Ints) -> tuple[Frames, float, float]:
        """Frames by number, from memory where the whole video is kept there."""
        if self._cache is None:
            began = time.perf_counter()
            data = self._read(index)
            read = time.perf_counter()
            frames = decode_frames(data, list(map(int, numbers)), decoder=self.data.decoder)
            return frames, read - began, time.perf_counter() - read
        key = (self.url_of(index), facts.key)
        video = self._cache.get(key)
        began = read = time.perf_counter()
        if video is None:
            data = self._read(index)
            read = time.perf_counter()
            video = decode_frames(data, list(range(facts.num_frames)), decoder=self.data.decoder)
            self._cache.put(key, video)
        return video[np.asarray(numbers)], read - began, time.perf_counter() - read

    def _read(self, index: int) -> bytes:
        one, inside = self._place(index)
        return one.read(inside)

    def _batch(
        self,
        index: int,
        clips: Sequence[Tensor],
        draws: npt.NDArray[np.float32],
        read_seconds: float,
        decode_seconds: float,
    ) -> ClipBatch:
        B = len(clips)
        targets = None
        if self.label_sets is not None:
            targets = torch.zeros(B, len(self.classes))
            targets[:, list(self.label_sets[index])] = 1.0
        return ClipBatch(
            clips=torch.stack(list(clips)),
            labels=torch.full((B,), int(self.labels[index])),
            sample_index=torch.full((B,), index),
            video_index=torch.full((B,), int(self.video_index[index])),
            views=torch.arange(B),
            draws=torch.from_numpy(draws),
            targets=targets,
            read_seconds=read_seconds,
            decode_seconds=decode_seconds,
        )

    def close(self) -> None:
        for one in self.sets:
            one.close()


def merged(batches: Sequence[ClipBatch], *, failed: Sequence[str] = ()) -> ClipBatch:
    """Several batches as one."""
    parts = {name: torch.cat([getattr(b, name) for b in batches]) for name in TENSORS}
    with_targets = [b.targets for b in batches if b.targets is not None]
    return ClipBatch(
        **parts,
        targets=torch.cat(with_targets) if with_targets else None,
        read_seconds=sum(b.read_seconds for b in batches),
        decode_seconds=sum(b.decode_seconds for b in batches),
        failed=tuple(failed),
    )


def clips_of_video(path: Path, data: DataConfig) -> ClipBatch:
    """All test views of a local video file that is in no shard.

    The file is first brought to the form shards have (upright, square pixels, constant rate), so that the network
    sees what it was trained on. Raises VideoDecodeError.
    """
    stored = transcode_span(path, start_seconds=0.0, end_seconds=None, config=FOREIGN)
    frames = decode_frames(stored.data, range(stored.checked.frames), decoder=data.decoder)
    fps = float(stored.checked.fps)
    clips = view_frames(data.sampling, num_frames=len(frames), fps=fps, clips=data.views.clips)
    boxes = view_boxes(data, height=frames.shape[1], width=frames.shape[2], crops=data.views.crops)
    cuts = [cut(frames[numbers], box, pixels=data.crop_pixels) for numbers in clips for box in boxes]
    B = len(cuts)
    return ClipBatch(
        clips=torch.stack(cuts),
        labels=torch.full((B,), -1),
        sample_index=torch.zeros(B, dtype=torch.int64),
        video_index=torch.zeros(B, dtype=torch.int64),
        views=torch.arange(B),
        draws=torch.full((B, NUM_DRAWS), 0.5),
    )


class _DecodedVideos:
    """Decoded videos of this process, the least recently used dropped first."""

    def __init__(self) -> None:
        self.videos: OrderedDict[tuple[str, str], Frames] = OrderedDict()
        self.bytes, self.limit = 0, 0

    def get(self, key: tuple[str, str]) -> Frames | None:
        video = self.videos.get(key)
        if video is not None:
            self.videos.move_to_end(key)
        return video

    def put(self, key: tuple[str, str], video: Frames) -> None:
        self.videos[key] = video
        self.bytes += video.nbytes
        while self.bytes > self.limit:
            _, oldest = self.videos.popitem(last=False)
            self.bytes -= oldest.nbytes


_DECODED = _DecodedVideos()


def _cache_of(limit_mib: int) -> _DecodedVideos | None:
    """The process's cache, shared by all its loaders, or None where the config keeps nothing."""
    if not limit_mib:
        return None
    _DECODED.limit = max(_DECODED.limit, limit_mib * 2**20)
    return _DECODED
