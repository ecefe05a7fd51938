"""Clips decoded in worker processes and given to a frozen network one by one.

In a batch the last bits of a clip's features would depend on its neighbours; a clip's vector is a function of the clip,
the network and the kind of device alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cliplift.configs.data import DataConfig
from cliplift.pipelines.data.augment import DeviceAugment
from cliplift.pipelines.data.batch import NUM_DRAWS, OUTSIDE_TRAINING, ClipBatch
from cliplift.pipelines.data.clip_plan import cut, view_boxes, view_frames
from cliplift.pipelines.data.workers import batches_from_workers
from cliplift.pipelines.embeddings.networks import FrozenNetwork
from cliplift.sharding.scores.vectors import SKETCH_FRAMES
from cliplift.sharding.scoring.embed import ClipPlace, EmbeddedClip, read_clip
from cliplift.sharding.scoring.run import ScoreError
from cliplift.sharding.similar.sketches import picture, sketch_frames
from cliplift.sharding.video.decode import VideoDecodeError, decode_frames


@dataclass(frozen=True)
class SeenClip:
    """A decoded clip: the network's frames (T, H, W, C) in uint8, and its sketch."""

    frames: Tensor
    spacing: float
    sketch: npt.NDArray[np.float32]


class _Clips(Dataset[SeenClip | str | ScoreError]):
    """Clips by their place; lives in the worker processes."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data

    def __getitem__(self, place: ClipPlace) -> SeenClip | str | ScoreError:
        """The clip; why it does not decode; or why it cannot be read, which the main process raises."""
        try:
            return seen_clip(read_clip(place), place, self.data)
        except ScoreError as error:
            return error
        except VideoDecodeError as error:
            return str(error)


def seen_clip(data: bytes, place: ClipPlace, seen: DataConfig) -> SeenClip:
    """What network and sketch see of a clip, from one decode.

    Raises:
        VideoDecodeError: a frame that is needed cannot be decoded.
    """
    (numbers,) = view_frames(seen.sampling, num_frames=place.num_frames, fps=place.fps, clips=1)
    sketched, spacing = sketch_frames(place.num_frames, place.fps)
    wanted = np.unique(np.concatenate([numbers, sketched]))
    frames = decode_frames(data, wanted.tolist(), decoder=seen.decoder)
    (box,) = view_boxes(seen, height=frames.shape[1], width=frames.shape[2], crops=1)
    sketch = np.stack([picture(frames[i]) for i in np.searchsorted(wanted, sketched)])
    assert len(sketch) <= SKETCH_FRAMES
    clip = cut(frames[np.searchsorted(wanted, numbers)], box, pixels=seen.crop_pixels)
    return SeenClip(clip, spacing, sketch)


class NetworkEmbedder:
    """Embeds clips with a frozen network.

    Args:
        frozen: the network.
        device: where it computes, "cpu" or "cuda".
        workers: decoding processes; 0 decodes in this one.
    """

    def __init__(self, frozen: FrozenNetwork, *, device: torch.device, workers: int) -> None:
        self.facts, self._frozen, self._device, self._workers = frozen.facts, frozen, device, workers
        frozen.network.to(device)
        self._normalise = DeviceAugment(frozen.data.augment, frozen.network.input_spec, training=False)

    def embed(self, clips: Iterable[ClipPlace]) -> Iterator[EmbeddedClip]:
        """What each of these clips gives, in their order.

        Raises:
            ScoreError: a clip cannot be read.
            WorkerError: a decoding process died or is silent.
        """
        dataset = _Clips(self._frozen.data)
        decoded: Iterator[SeenClip | str | ScoreError]
        if self._workers:
            decoded = batches_from_workers(
                dataset,
                clips,
                data=self._frozen.data,
                workers=self._workers,
                describe=lambda place: f"{place.file}, byte {place.offset}",
            )
        else:
            decoded = (dataset[place] for place in clips)
        for found in decoded:
            if isinstance(found, ScoreError):
                raise found
            yield EmbeddedClip(None, reason=found) if isinstance(found, str) else self._embedded(found)

    def _embedded(self, found: SeenClip) -> EmbeddedClip:
        clips = found.frames.unsqueeze(0)
        normalised = self._normalise(_batch(clips.to(self._device)))
        values = self._frozen.features(normalised).numpy()
        if not np.isfinite(values).all() or not values.any():
            return EmbeddedClip(None, reason=f"{self.facts.model} gives no finite features")
        return EmbeddedClip(values, found.spacing, found.sketch)


def _batch(clips: Tensor) -> ClipBatch:
    B = len(clips)
    none = torch.zeros(B, dtype=torch.int64)
    return ClipBatch(
        clips=clips,
        labels=none,
        sample_index=none,
        video_index=none,
        views=none,
        draws=torch.full((B, NUM_DRAWS), 0.5),
        epochs=torch.full((B,), OUTSIDE_TRAINING),
        positions=none,
    )
