"""Samples of one or several shard datasets as clips: read, decode only the frames needed, cut, in uint8.

Whole decoded videos kept in memory, for small datasets that are read many times.
"""

from __future__ import annotations

import bisect
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cliplift.configs.data import DataConfig, WeightedShards
from cliplift.configs.sections import ConfigError
from cliplift.pipelines.data.batch import FLIP, NUM_DRAWS, OUTSIDE_TRAINING, ClipBatch, Costs
from cliplift.pipelines.data.clip_plan import (
    Ints,
    TrainingPlan,
    cut,
    mirrored_labels,
    training_plan,
    view_boxes,
    view_frames,
)
from cliplift.sharding.read.fetch import ReadAhead
from cliplift.sharding.read.generations import generation_url, named_generation, open_dataset
from cliplift.sharding.read.reader import ClipShape, SampleFacts, ShardDataset
from cliplift.sharding.read.subsets import Subset
from cliplift.sharding.video.decode import Frames, decode_frames
from cliplift.sharding.video.flow import decode_flow

VideoKey = tuple[str, int, str]  # dataset's fingerprint, row in its catalog, member


class DecodedVideos:
    """Decoded videos of this process up to a size, the least recently used dropped first."""

    def __init__(self) -> None:
        self.videos: OrderedDict[VideoKey, Frames] = OrderedDict()
        self.bytes, self.limit = 0, 0

    def get(self, key: VideoKey) -> Frames | None:
        video = self.videos.get(key)
        if video is not None:
            self.videos.move_to_end(key)
        return video

    def put(self, key: VideoKey, video: Frames) -> None:
        self.videos[key] = video
        self.bytes += video.nbytes
        while self.bytes > self.limit:
            _, oldest = self.videos.popitem(last=False)
            self.bytes -= oldest.nbytes


_DECODED = DecodedVideos()


def decoded_videos(limit_mib: int) -> DecodedVideos | None:
    """The process's cache, shared by all its loaders, or None where the config keeps nothing."""
    if not limit_mib:
        return None
    _DECODED.limit = max(_DECODED.limit, limit_mib * 2**20)
    return _DECODED


class ClipSource:
    """The samples of a split over all shard datasets of a config; picklable, opens files per process.

    With ``keep_numbers`` the samples of removed videos keep their place, and cannot be read.

    Raises:
        ConfigError: the datasets disagree about their classes, or one has no such split.
    """

    def __init__(
        self, data: DataConfig, *, split: str | None, seed: int = 0, keep_numbers: bool = False
    ) -> None:
        self.data, self.seed = data, seed
        self.sets = [
            ShardDataset(
                url,
                split=stored_split(data, split),
                fold=data.fold,
                subset=subset_of(data, split),
                cache_folder=data.cache_folder,
                cache_gib=data.cache_gib,
                keep_numbers=keep_numbers,
                where=data.where if split == data.split else None,
            )
            for url in data.urls
        ]
        self.classes = self.sets[0].classes
        # A split that one of the datasets lacks is no split of the run.
        self.splits = tuple(n for n in self.sets[0].splits if all(n in one.splits for one in self.sets))
        for url, other in zip(data.urls, self.sets, strict=True):
            if other.classes != self.classes:
                raise ConfigError(
                    f"{url} has other classes than {data.urls[0]}", key="data.shards", value=url,
                    hint="build both with the same class list",
                )  # fmt: skip
        _refuse_second_validation(data, self.sets)
        _require_flow(data, self.sets)
        # Samples are numbered through all datasets: the first of dataset i is number starts[i].
        self.starts = np.cumsum([0, *(len(s) for s in self.sets)]).tolist()
        self.fingerprint = "+".join(s.fingerprint for s in self.sets)
        self._first_videos = _first_videos(self.sets)
        self.several_labels = max(one.most_labels for one in self.sets) > 1
        self._mirrored = mirrored_labels(data.augment, self.classes)
        self._cache = decoded_videos(data.cache_decoded_mib)
        self._ahead: ReadAhead | None = None

    @property
    def labels(self) -> Ints:
        """(N,) the label of every sample; looks at all of them."""
        return np.concatenate([one.labels for one in self.sets])

    @property
    def clusters(self) -> Ints:
        """(N,) the cluster of every sample, -1 where it has none; those of two datasets are different clusters.

        Raises:
            ConfigError: a dataset has no column ``cluster``.
        """
        parts: list[Ints] = []
        first = 0
        for one in self.sets:
            found = np.nan_to_num(one.score("cluster"), nan=-1.0).astype(np.int64)
            parts.append(np.where(found >= 0, found + first, found))
            first += int(found.max(initial=-1)) + 1
        return np.concatenate(parts)

    @property
    def video_index(self) -> Ints:
        """(N,) the number of every sample's source video, counted over all datasets; looks at all of them."""
        parts = [one.videos + first for one, first in zip(self.sets, self._first_videos, strict=True)]
        return np.concatenate(parts)

    @property
    def shard_ranges(self) -> tuple[tuple[int, int], ...]:
        """The first sample of every shard, and the one after its last."""
        return tuple(
            (a + start, b + start)
            for start, one in zip(self.starts, self.sets, strict=False)
            for a, b in one.shard_ranges
        )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, object]:
        # Threads and open files do not travel to a worker process; it starts its own when it first needs them.
        return self.__dict__ | {"_ahead": None}

    def _set_of(self, index: int) -> int:
        return bisect.bisect_right(self.starts, index) - 1

    def _place(self, index: int) -> tuple[ShardDataset, int]:
        number = self._set_of(index)
        return self.sets[number], index - int(self.starts[number])

    def video_of(self, index: int) -> int:
        """The number of a sample's source video."""
        one, inside = self._place(index)
        return one.video(inside) + self._first_videos[self._set_of(index)]

    def facts(self, index: int) -> SampleFacts:
        one, inside = self._place(index)
        return one.facts(inside)

    def shape(self, index: int) -> ClipShape:
        one, inside = self._place(index)
        return one.shape(inside)

    @property
    def _member(self) -> str:
        """The member of a sample that is decoded."""
        return "flow" if self.data.modality == "flow" else "mp4"

    def url_of(self, index: int) -> str:
        """The dataset a sample belongs to."""
        return self._place(index)[0].url

    def name_of(self, index: int) -> str:
        """The dataset and key of a sample, for messages."""
        one, inside = self._place(index)
        return f"{one.url} {one.key(inside)}"

    def read(self, index: int) -> bytes:
        """The stored video of a sample, or of its flow. Raises ShardReadError."""
        one, inside = self._place(index)
        return one.read_flow(inside) if self.data.modality == "flow" else one.read(inside)

    def expect(self, indices: Iterable[int]) -> None:
        """Say which samples will be read next, in order, so that their bytes are on the way before they are needed."""
        if not self.data.read_ahead:
            return
        remote = []
        for index in indices:
            one, inside = self._place(index)
            # A local shard is announced to the system, which reads it in the background. Only bytes behind a URL need
            # threads of ours.
            if self._decoded_video(index) is None and not one.announce(inside, self._member):
                remote.append(index)
        if remote and self._ahead is None:
            self._ahead = ReadAhead(self.read, self.data.read_ahead)
        if self._ahead is not None:
            self._ahead.plan(remote)

    def plan(self, index: int, epoch: int) -> TrainingPlan:
        """The draws of a sample's training clips: a function of (seed, epoch, sample, number of the clip) alone."""
        return training_plan(self.data, self.shape(index), self.seed, epoch, index)

    def training_clips(self, index: int, epoch: int) -> ClipBatch:
        """The augmented clips of one sample, ``clips_per_sample`` of them from one decode."""
        plan = self.plan(index, epoch)
        frames, costs = self._frames(index, plan.frames)
        began = time.perf_counter()
        clips = [
            cut(part, box, pixels=self.data.crop_pixels) for part, box in zip(frames, plan.boxes, strict=True)
        ]
        costs += Costs(cut_seconds=time.perf_counter() - began)
        mirrored = plan.draws[:, FLIP] < 0.5 if self.data.augment.flip else np.zeros(len(clips), dtype=bool)
        batch = self._batch(index, clips, plan.draws, costs, mirrored=mirrored.tolist())
        return batch.asked_for(epoch=epoch, position=index)

    def test_views(self, index: int) -> ClipBatch:
        """All views of one sample, clips x crops, crops innermost."""
        shape, views = self.shape(index), self.data.views
        numbers = view_frames(
            self.data.sampling,
            num_frames=shape.num_frames,
            fps=shape.fps,
            clips=views.clips,
            from_start=views.position == "from_start",
            every_frames=views.every_frames,
        )
        frames, costs = self._frames(index, numbers)
        began = time.perf_counter()
        boxes = view_boxes(self.data, height=shape.height, width=shape.width, crops=views.crops)
        cuts = [cut(part, box, pixels=self.data.crop_pixels) for part in frames for box in boxes]
        costs += Costs(cut_seconds=time.perf_counter() - began)
        draws = np.full((len(cuts), NUM_DRAWS), 0.5, dtype=np.float32)
        return self._batch(index, cuts, draws, costs, mirrored=[False] * len(cuts))

    def _frames(self, index: int, clips: Sequence[Ints]) -> tuple[list[Frames], Costs]:
        """The frames (T, H, W, C) of each clip, each decoded once; from memory where the whole video is kept there."""
        video = self._decoded_video(index)
        if video is not None:
            return [video[numbers] for numbers in clips], Costs()
        began = time.perf_counter()
        data = self._ahead.take(index) if self._ahead is not None else self.read(index)
        read = time.perf_counter()
        if self._cache is not None:
            # The next pass will ask for other frames, so what is kept must be the whole video.
            wanted = np.arange(self.shape(index).num_frames)
        else:
            # Clips of a sample overlap, and a short video repeats frames: each frame is decoded once.
            wanted = np.unique(np.concatenate(clips))
        decode = decode_flow if self.data.modality == "flow" else decode_frames
        decoded = decode(data, wanted.tolist(), decoder=self.data.decoder)
        costs = Costs(
            read_seconds=read - began, decode_seconds=time.perf_counter() - read, read_bytes=len(data)
        )
        if self._cache is not None:
            self._cache.put(self._cache_key(index), decoded)
        if len(clips) == 1 and np.array_equal(clips[0], wanted):
            return [decoded], costs
        return [decoded[np.searchsorted(wanted, numbers)] for numbers in clips], costs

    def _decoded_video(self, index: int) -> Frames | None:
        return None if self._cache is None else self._cache.get(self._cache_key(index))

    def _cache_key(self, index: int) -> VideoKey:
        one, inside = self._place(index)
        # A place may hold another dataset, or another generation, than it did when this process last looked.
        return one.dataset_fingerprint, one.row(inside), self._member

    def _batch(
        self,
        index: int,
        clips: Sequence[Tensor],
        draws: npt.NDArray[np.float32],
        costs: Costs,
        *,
        mirrored: Sequence[bool],
    ) -> ClipBatch:
        B = len(clips)
        one, inside = self._place(index)
        label, targets = one.label(inside), None
        if self.several_labels:
            # Mirrored clips may show other classes, so the targets are made clip by clip.
            targets, labels = torch.zeros(B, len(self.classes)), one.label_set(inside)
            for row, swap in enumerate(mirrored):
                targets[row, [self._class_shown(label, swap) for label in labels]] = 1.0
        return ClipBatch(
            clips=clips[0].unsqueeze(0) if B == 1 else torch.stack(list(clips)),
            labels=torch.tensor([self._class_shown(label, swap) for swap in mirrored]),
            sample_index=torch.full((B,), index),
            video_index=torch.full((B,), self.video_of(index)),
            views=torch.arange(B),
            draws=torch.from_numpy(draws),
            epochs=torch.full((B,), OUTSIDE_TRAINING),
            # Outside training there is no place in an order. The sample's number stands for it, so that what is drawn
            # for a test view, such as a mask, does not depend on the batch it comes in.
            positions=torch.arange(index * B, (index + 1) * B),
            targets=targets,
            costs=costs,
        )

    def _class_shown(self, label: int, mirrored: bool) -> int:
        """The class a clip shows: another one where mirroring turns left into right."""
        return self._mirrored.get(label, label) if mirrored else label

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        for one in self.sets:
            one.close()


def _first_videos(sets: Sequence[ShardDataset]) -> list[int]:
    """What is added to the video numbers of each dataset, so that equal numbers are the same video."""
    # Two datasets may both have a video "0001", and those are different videos; one named twice has its own twice.
    firsts: dict[str, int] = {}
    total = 0
    for one in sets:
        if one.url not in firsts:
            firsts[one.url] = total
            total += one.num_videos
    return [firsts[one.url] for one in sets]


def on_its_generations(data: DataConfig, earlier: Sequence[str] | None) -> DataConfig:
    """The data of a run with the generations that it reads in the names of its datasets, where they have several.

    Args:
        data: what the config says; a generation that it names stays.
        earlier: the datasets as the run named them when it began; None begins it.

    Raises:
        ConfigError: there is no dataset at one of the places.
        ManifestError: a manifest is damaged.
    """
    began = (
        {}
        if earlier is None
        else {named_generation(url)[0]: named_generation(url)[1] or 1 for url in earlier}
    )
    shards = []
    for entry in data.shards:
        url = entry if isinstance(entry, str) else entry.url
        pinned = _pinned(url, began.get(url))
        shards.append(
            entry.model_copy(update={"url": pinned}) if isinstance(entry, WeightedShards) else pinned
        )
    return data.model_copy(update={"shards": tuple(shards)})


def _pinned(url: str, began: int | None) -> str:
    if named_generation(url)[1] is not None:
        return url
    _, latest = open_dataset(url)
    return url if latest.generation == 1 else generation_url(url, began or latest.generation)


def stored_split(data: DataConfig, split: str | None) -> str | None:
    """The shards' split that a split of the run is read from: training's, where validation is carved from it."""
    return data.split if data.val_share and split == data.val_split else split


def _refuse_second_validation(data: DataConfig, sets: Sequence[ShardDataset]) -> None:
    for one in sets:
        if data.val_share and data.val_split in one.splits:
            raise ConfigError(
                f"{one.url} has a split {data.val_split!r} of its own",
                key="data.val_share",
                value=data.val_share,
                hint="use 0, or another name as data.val_split",
            )


def _require_flow(data: DataConfig, sets: Sequence[ShardDataset]) -> None:
    for url, one in zip(data.urls, sets, strict=True):
        if data.modality == "flow" and not one.has_flow:
            raise ConfigError(
                f"{url} holds no optical flow",
                key="data.modality",
                value=data.modality,
                hint="build the shards with `flow: {}`, or use rgb",
            )


def subset_of(data: DataConfig, split: str | None) -> Subset | None:
    """The part of the stored split a split of the run is; None for all of it."""
    if split == data.val_split and data.val_share:
        return Subset(held_out_share=data.val_share, held_out=True, seed=data.subset_seed)
    if split == data.split and (data.val_share or data.label_share < 1):
        return Subset(held_out_share=data.val_share, label_share=data.label_share, seed=data.subset_seed)
    return None
