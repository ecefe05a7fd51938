"""Clips as they leave the decoder: what a loader yields."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import default_collate

HOST_TENSORS = ("draws", "epochs", "positions")  # the host decides by them, without asking the device
DEVICE_TENSORS = ("clips", "labels", "sample_index", "video_index", "views")
TENSORS = (*DEVICE_TENSORS, *HOST_TENSORS)
OUTSIDE_TRAINING = -1  # the epoch of clips that are evaluated
NUM_DRAWS = 24  # uniform numbers of a clip for the augmentation on the device
FLIP = 0  # column of the draws: below 0.5 mirrors the clip, where the config has it


@dataclass(frozen=True)
class Costs:
    """Where the time of the processes that made a batch went, seconds, and the bytes they read."""

    read_seconds: float = 0.0  # waiting for bytes
    decode_seconds: float = 0.0
    cut_seconds: float = 0.0  # crop and resize
    collate_seconds: float = 0.0
    read_bytes: int = 0

    def __add__(self, other: Costs) -> Costs:
        return Costs(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class ClipBatch:
    """Clips as they leave the decoder, and what is known about them."""

    clips: Tensor  # uint8 (B, T, H, W, C), C = 3, or 2 for optical flow
    labels: Tensor  # int64 (B,), -1 where unlabelled
    sample_index: Tensor  # int64 (B,) index into the dataset
    video_index: Tensor  # int64 (B,) equal numbers are clips of the same source video
    views: Tensor  # int64 (B,) view of a test sample, or which of several training clips of a sample
    draws: Tensor  # float32 (B, NUM_DRAWS) in [0, 1), a function of seed, epoch, sample and view; on the host
    epochs: Tensor  # int64 (B,) the pass for which the clip was asked, OUTSIDE_TRAINING in evaluation; on the host
    # int64 (B,) its place in that pass, that of the clip asked for where another replaced it; on the host
    positions: Tensor
    targets: Tensor | None = None  # float32 (B, K) for data with several labels per sample
    costs: Costs = field(default_factory=Costs)
    failed: tuple[str, ...] = ()  # samples that could not be read and were replaced

    def __reduce__(self) -> tuple[object, ...]:
        # Between processes a tensor costs a file in shared memory and a socket; only the clips are worth it.
        small = {name: getattr(self, name).cpu().numpy() for name in TENSORS if name != "clips"}
        targets = None if self.targets is None else self.targets.cpu().numpy()
        return _unpacked, (self.clips, small, targets, self.costs, self.failed)

    def to(self, device: torch.device) -> ClipBatch:
        """The batch on a device; copies from pinned memory do not wait.

        Draws, epochs and positions stay where they are: the host decides by them, without asking the device.
        """
        return self._mapped(lambda t: t.to(device, non_blocking=True), DEVICE_TENSORS)

    def pin_memory(self) -> ClipBatch:
        return self._mapped(Tensor.pin_memory, TENSORS)

    def at(self, clip: int) -> ClipBatch:
        """One clip of the batch, as a batch."""
        return self._mapped(lambda t: t[clip : clip + 1], TENSORS)

    def asked_for(self, *, epoch: int, position: int) -> ClipBatch:
        """The B clips of one sample as those of a place in a pass: the clips of place p are number p*B to p*B + B-1."""
        B = len(self.labels)
        return replace(
            self, epochs=torch.full((B,), epoch), positions=torch.arange(position * B, (position + 1) * B)
        )

    def _mapped(self, change: Callable[[Tensor], Tensor], names: Sequence[str]) -> ClipBatch:
        targets = None if self.targets is None else change(self.targets)
        moved: dict[str, Tensor] = {name: change(getattr(self, name)) for name in names}
        return replace(self, targets=targets, costs=self.costs, failed=self.failed, **moved)


def _unpacked(
    clips: Tensor,
    small: Mapping[str, npt.NDArray[np.generic]],
    targets: npt.NDArray[np.float32] | None,
    costs: Costs,
    failed: tuple[str, ...],
) -> ClipBatch:
    return ClipBatch(
        clips=clips,
        **{name: torch.from_numpy(values) for name, values in small.items()},
        targets=None if targets is None else torch.from_numpy(targets),
        costs=costs,
        failed=failed,
    )


def merge_batches(batches: Sequence[ClipBatch], *, failed: Sequence[str] = ()) -> ClipBatch:
    """Several batches as one. In a worker process the clips are written straight to shared memory."""
    began = time.perf_counter()
    clips: Tensor = default_collate([clip for b in batches for clip in b.clips])
    small = {name: torch.cat([getattr(b, name) for b in batches]) for name in TENSORS if name != "clips"}
    with_targets = [b.targets for b in batches if b.targets is not None]
    costs = sum((b.costs for b in batches), Costs(collate_seconds=time.perf_counter() - began))
    return ClipBatch(
        clips=clips,
        **small,
        targets=torch.cat(with_targets) if with_targets else None,
        costs=costs,
        failed=tuple(failed),
    )
