"""The clips of shards as a dataset of PyTorch, for a training loop of one's own.

Shape letters: B clips, C channels, T frames, H W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cliplift.configs.data import DataConfig
from cliplift.configs.load import validate
from cliplift.configs.sections import ConfigError
from cliplift.models.protocol import InputSpec
from cliplift.models.streams import FLOW_CHANNELS, stream_spec
from cliplift.pipelines.api.model import Model
from cliplift.pipelines.data.augment import DeviceAugment
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.data.loader import ClipLoader
from cliplift.pipelines.data.source import ClipSource
from cliplift.sharding.read.reader import SampleFacts

PLACE = "cliplift.clips"  # as errors name it


class Sample(NamedTuple):
    """One clip; a DataLoader makes (clips, labels) of several."""

    clip: Tensor  # float32 (C, T, H, W), normalised
    label: Tensor  # int64 (), -1 where unlabelled; float32 (K,) of 0 and 1 where clips have several labels


def clips(
    shards: str | list[str],
    *,
    split: str = "train",
    like: Model | None = None,
    frames: int | None = None,
    stride: int | None = None,
    fps: float | None = None,
    crop: int | None = None,
    training: bool = False,
    seed: int = 0,
    **data: object,
) -> ClipDataset:
    """The clips of a split of shards.

    Args:
        shards: folder or URL of a shard dataset, or several read as one.
        split: its split, or the one that ``val_share`` holds out, by the name ``val_split``.
        like: a model whose sampling, crop and normalisation are taken where the arguments below do not say otherwise.
        frames: T, 16 by default.
        stride: step between sampled frames, 2 by default.
        fps: rate to resample to before striding, frames/s.
        crop: side of the clip, pixels, 112 by default.
        training: cut and change clips at random, as ``augment`` says, by (seed, epoch, sample); else the middle clip
            and the centre crop, as in evaluation.
        seed: of those draws.
        data: further keys of the ``data`` section of a config, such as ``augment={"flip": False}``, ``fold=2`` or
            ``sampling={"mode": "segments"}``.

    Raises:
        ConfigError: a key is unknown or has an impossible value, or there are no such shards or split.
    """
    tree: dict[str, object] = {"shards": shards}
    spec = InputSpec()
    sampling: dict[str, object] = {}
    if like is not None:
        known = like.processor.data
        spec, sampling = like.input_spec, known.sampling.model_dump()
        tree |= {
            "modality": known.modality,
            "crop_pixels": known.crop_pixels,
            "resize_short_side_pixels": known.resize_short_side_pixels if crop is None else None,
            "augment": {"normalize_brightness": known.augment.normalize_brightness},
        }
    given = data.pop("sampling", {})
    if not isinstance(given, dict):
        raise ConfigError(
            "is a mapping, such as {'mode': 'segments'}", key="sampling", value=given, file=PLACE
        )
    named = {"frames": frames, "stride": stride, "fps": fps}
    sampling |= given | {key: value for key, value in named.items() if value is not None}
    tree |= {"sampling": sampling} | ({} if crop is None else {"crop_pixels": crop}) | data
    config = validate(tree, DataConfig, {}, PLACE)
    if config.modality == "flow" and like is None:
        spec = stream_spec(spec, FLOW_CHANNELS)
    return ClipDataset(config, split=split, input_spec=spec, training=training, seed=seed)


class ClipDataset(Dataset[Sample]):
    """Map-style, one :class:`Sample` for each clip of a split; made by :func:`clips`.

    A clip is read and decoded when it is asked for. The dataset may be sent to worker processes: they share what is
    known of the clips, and open the files themselves.

    Attributes:
        classes: the K class names.
        data: the resolved ``data`` section.
    """

    def __init__(
        self, data: DataConfig, *, split: str, input_spec: InputSpec, training: bool = False, seed: int = 0
    ) -> None:
        if data.sequential is not None:
            raise ConfigError("is a stream, which has no samples by number", key="sequential", file=PLACE)
        self.data, self.split, self.input_spec = data, split, input_spec
        self.training, self.seed = training, seed
        self._source = ClipSource(data, split=split, seed=seed)
        self.classes: tuple[str, ...] = self._source.classes
        self._augment = DeviceAugment(data.augment, input_spec, training=training)
        # In shared memory, so that workers that live for several epochs see it change.
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        sampling = self.data.sampling
        return (
            f"ClipDataset({', '.join(self.data.urls)}, split={self.split!r}, {len(self):,} clips of "
            f"{sampling.frames} frames, {len(self.classes)} classes)"
        )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        """Raises IndexError past the end, ShardReadError or VideoDecodeError where the clip cannot be read."""
        batch = self._batch(index)
        label = batch.labels[0] if batch.targets is None else batch.targets[0]
        return Sample(self._augment(batch)[0], label)

    def pixels(self, index: int) -> npt.NDArray[np.uint8]:
        """The cut clip of a sample, before colours are changed and normalised: uint8 (T, H, W, C), to be looked at."""
        found: npt.NDArray[np.uint8] = self._batch(index).clips[0].numpy()
        return found

    def facts(self, index: int) -> SampleFacts:
        """What the shards say of a sample: its key, video, group, length, rate and size."""
        return self._source.facts(self._number(index))

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """(N,) the label of every sample, -1 where unlabelled; nothing is decoded."""
        return self._source.labels

    def set_epoch(self, epoch: int) -> None:
        """Draw the random crops and colours of another pass, here and in workers that run already."""
        self._epoch.fill_(epoch)

    def batches(
        self, *, batch: int, epoch: int = 0, rank: int = 0, world_size: int = 1, workers: int = 0
    ) -> Iterator[Sample]:
        """One pass in the order of training, exact: (clips, labels) of ``batch`` clips over all ranks together.

        Which clips make which step, and how they are cut, is a function of (seed, epoch, step); ranks and workers only
        divide the work. The last clips of a pass, fewer than a batch, are left out.

        Args:
            batch: G, clips of a step over all ranks; this rank gets G / world_size of them.
            epoch: which pass.
            rank, world_size: this process among the ranks.
            workers: decoding processes.

        Raises:
            ConfigError: the ranks do not divide the batch, or the split has fewer clips than that.
            TooManyFailuresError: too many clips cannot be read.
        """
        if not self.training:
            raise ConfigError("are those of training", key="batches", hint="give training=True", file=PLACE)
        if batch < 1 or batch % world_size or not 0 <= rank < world_size:
            raise ConfigError(
                f"a batch of {batch} cannot be dealt to rank {rank} of {world_size}", key="batch", file=PLACE
            )
        data = self.data.model_copy(update={"split": self.split, "workers": workers})
        loader = ClipLoader(
            data,
            seed=self.seed,
            global_batch=batch,
            micro_batch=batch // world_size,
            rank=rank,
            world_size=world_size,
        )
        steps = loader.steps_per_epoch
        try:
            for found in loader.micro_batches(start_step=epoch * steps, stop_step=(epoch + 1) * steps):
                yield Sample(self._augment(found), found.labels if found.targets is None else found.targets)
        finally:
            loader.close()

    def _number(self, index: int) -> int:
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return number

    def _batch(self, index: int) -> ClipBatch:
        number = self._number(index)
        if self.training:
            return self._source.training_clips(number, int(self._epoch)).at(0)
        return self._source.test_views(number).at(0)
