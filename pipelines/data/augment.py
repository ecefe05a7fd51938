"""What happens to clips on the device: uint8 (B, T, H, W, C) to normalised float (B, C, T, H, W).

The draws come with the batch, a function of (seed, epoch, sample), so that it does not matter where or when they are
used. What they decide for a whole clip is decided on the host, where they lie; nothing here waits for the device.
Columns of ``ClipBatch.draws`` in use are named below; the last three belong to the transfer stage.
"""

from __future__ import annotations

import typing
from dataclasses import replace
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from cliplift.configs.data import AugmentConfig
from cliplift.configs.plugins import MAX_DRAWS, augmentations
from cliplift.configs.sections import ConfigError
from cliplift.models.protocol import InputSpec
from cliplift.models.streams import FLOW_CHANNELS, luma
from cliplift.pipelines.data.batch import FLIP, ClipBatch
from cliplift.pipelines.data.rand_augment import rand_augmented

BRIGHTNESS, CONTRAST, SATURATION, GRAY, ERASE = range(FLIP + 1, FLIP + 6)
ERASE_AREA, ERASE_RATIO, ERASE_TOP, ERASE_LEFT, MIX_KIND, MIX_AMOUNT, RAND_AUGMENT = range(6, 13)
PLUGIN_DRAWS = range(13, 13 + MAX_DRAWS)

TARGET_LUMA = 0.45
LARGEST_LOG_RATIO = float(np.log(np.float32(1 / 0.3)))  # of an erased box's height and width


class ClipAugmentation(Protocol):
    """An augmentation of a plug-in: its config section, called on the device with a batch.

    Attributes:
        num_draws: uniform numbers it needs for each clip.
    """

    num_draws: ClassVar[int]

    def __call__(self, clips: Tensor, draws: Tensor) -> Tensor:
        """Clips (B, C, T, H, W) in [0, 1] and draws (B, num_draws) in [0, 1) -> clips of the same shape.

        All chance must come from the draws, which are a function of (seed, epoch, sample), so that the result does not
        depend on ranks, workers or micro-batches.
        """
        ...


def plugin_augmentations(augment: AugmentConfig) -> tuple[ClipAugmentation, ...]:
    """The plug-ins' augmentations of a config, in its order."""
    return typing.cast(tuple[ClipAugmentation, ...], augmentations(augment.plugins))


class DeviceAugment:
    """RandAugment, flip, colour, erasing and normalisation of a batch; the same draw for all frames of a clip.

    Args:
        augment: the config section. In evaluation only ``normalize_brightness`` is applied of it.
        input_spec: mean and standard deviation the model expects.
        training: whether to augment.
    """

    def __init__(self, augment: AugmentConfig, input_spec: InputSpec, *, training: bool) -> None:
        self.augment, self.training = augment, training
        self._plugins = plugin_augmentations(augment) if training else ()
        self._mean = torch.tensor(input_spec.mean).view(1, -1, 1, 1, 1)
        self._std = torch.tensor(input_spec.std).view(1, -1, 1, 1, 1)

    def _on(self, device: torch.device) -> None:
        """Mean and deviation on the device, once."""
        if self._mean.device != device:
            self._mean, self._std = self._mean.to(device), self._std.to(device)

    def __call__(self, batch: ClipBatch) -> Tensor:
        """(B, T, H, W, C) uint8 -> (B, C, T, H, W) float32."""
        clips = batch.clips
        if self.training and self.augment.rand_augment_ops:
            seeds = [int(draw * 2**24) for draw in _column(batch.draws, RAND_AUGMENT)]
            clips = rand_augmented(clips, seeds, self.augment)
        self._on(clips.device)
        draws = batch.draws.to(clips.device, non_blocking=True) if self.training else batch.draws
        mirrors = self.training and self.augment.flip
        if mirrors and clips.shape[-1] != FLOW_CHANNELS:  # of whole levels: a quarter of the bytes
            clips = torch.where((draws[:, FLIP] < 0.5).view(-1, 1, 1, 1, 1), clips.flip(3), clips)
        x = clips.permute(0, 4, 1, 2, 3).float().div_(255.0)
        if self.augment.normalize_brightness:
            x = normalized_brightness(x)
        if self.training:
            x = self._augmented(x, draws)
        x = x.sub_(self._mean).div_(self._std)
        return self._erased(x, draws) if self.training and self.augment.erase_probability else x

    def _augmented(self, x: Tensor, draws: Tensor) -> Tensor:
        config = self.augment
        if config.flip and x.shape[1] == FLOW_CHANNELS:
            mirrored = draws[:, FLIP] < 0.5
            x = torch.where(mirrored.view(-1, 1, 1, 1, 1), mirror(x), x)
        if config.brightness:
            x = x * _factor(draws[:, BRIGHTNESS], config.brightness)
        if config.contrast:
            mean = luma(x).mean(dim=(1, 2, 3, 4), keepdim=True)
            x = mean + (x - mean) * _factor(draws[:, CONTRAST], config.contrast)
        if config.saturation:
            gray = luma(x)
            x = gray + (x - gray) * _factor(draws[:, SATURATION], config.saturation)
        if config.grayscale_probability:
            chosen = (draws[:, GRAY] < config.grayscale_probability).view(-1, 1, 1, 1, 1)
            x = torch.where(chosen, luma(x).expand_as(x), x)
        if config.brightness or config.contrast or config.saturation:
            x = x.clamp(0.0, 1.0)
        return self._by_plugins(x, draws)

    def _by_plugins(self, x: Tensor, draws: Tensor) -> Tensor:
        """Each plug-in gets columns of the draws of its own, so that one more does not change the others' draws."""
        first = PLUGIN_DRAWS.start
        for augmentation in self._plugins:
            shape, last = x.shape, first + augmentation.num_draws
            x = augmentation(x, draws[:, first:last])
            if x.shape != shape:
                raise ConfigError(
                    f"returned clips of shape {tuple(x.shape)} for {tuple(shape)}",
                    key=f"data.augment.plugins ({type(augmentation).__name__})",
                    hint="the shape must stay",
                )
            first = last
        return x

    def _erased(self, x: Tensor, draws: Tensor) -> Tensor:
        """One box of a clip set to the mean colour (zero after normalisation), the same in all frames."""
        B, _, _, H, W = x.shape
        area = 0.02 + (1 / 3 - 0.02) * draws[:, ERASE_AREA]
        ratio = torch.exp((2 * draws[:, ERASE_RATIO] - 1) * LARGEST_LOG_RATIO)
        h = (torch.sqrt(area * ratio) * H).clamp(1, H - 1)
        w = (torch.sqrt(area / ratio) * W).clamp(1, W - 1)
        top, left = draws[:, ERASE_TOP] * (H - h), draws[:, ERASE_LEFT] * (W - w)
        rows = torch.arange(H, device=x.device).view(1, H, 1)
        columns = torch.arange(W, device=x.device).view(1, 1, W)

        def between(at: Tensor, low: Tensor, size: Tensor) -> Tensor:
            return (at >= low.view(B, 1, 1)) & (at < (low + size).view(B, 1, 1))

        inside = between(rows, top, h) & between(columns, left, w)
        chosen = (draws[:, ERASE] < self.augment.erase_probability).view(B, 1, 1)
        return x.masked_fill((inside & chosen).view(B, 1, 1, H, W), 0.0)


def mirror(x: Tensor) -> Tensor:
    """(B, C, T, H, W) in [0, 1] with left and right exchanged; in flow (C = 2), motion along x is turned round too."""
    mirrored = x.flip(-1)
    if x.shape[1] == FLOW_CHANNELS:
        mirrored[:, 0] = 1.0 - mirrored[:, 0]
    return mirrored


def normalized_brightness(x: Tensor) -> Tensor:
    """Scale each clip to mean luma 0.45, for footage shot in the dark; black clips stay black."""
    mean = luma(x).mean(dim=(1, 2, 3, 4), keepdim=True)
    return (x * (TARGET_LUMA / mean.clamp_min(1e-3))).clamp(0.0, 1.0)


def _factor(draw: Tensor, strength: float) -> Tensor:
    """Uniform in [1 - strength, 1 + strength], shaped to multiply clips."""
    return (1.0 + strength * (2.0 * draw - 1.0)).view(-1, 1, 1, 1, 1)


def mix_clips(
    clips: Tensor, labels: Tensor, *, num_classes: int, augment: AugmentConfig, draws: Tensor
) -> tuple[Tensor, Tensor]:
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899) of a batch with itself reversed.

    Args:
        clips: (B, C, T, H, W).
        labels: (B,).
        num_classes: K.
        augment: which of the two, and their Beta parameters; with both, each is used for half of the batches.
        draws: the batch's draws, on the host; the first clip's decide, as one amount is drawn per batch.

    Returns:
        Mixed clips and soft targets (B, K).
    """
    # Not F.one_hot, which looks at the labels' largest value and so waits for the device.
    targets = (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()
    cut = augment.cutmix_alpha > 0 and (augment.mixup_alpha == 0 or _column(draws, MIX_KIND)[0] < 0.5)
    alpha = augment.cutmix_alpha if cut else augment.mixup_alpha
    seed = int(_column(draws, MIX_AMOUNT)[0] * 2**24)
    share = _beta(alpha, seed)
    other = clips.flip(0)
    if not cut:
        return share * clips + (1 - share) * other, share * targets + (1 - share) * targets.flip(0)
    H, W = clips.shape[-2:]
    top, left, h, w = _cutmix_box(H, W, share, seed)
    mixed = clips.clone()
    mixed[..., top : top + h, left : left + w] = other[..., top : top + h, left : left + w]
    kept = 1 - h * w / (H * W)
    return mixed, kept * targets + (1 - kept) * targets.flip(0)


def _column(draws: Tensor, column: int) -> npt.NDArray[np.float64]:
    """One of the draws of every clip; they lie on the host, so nothing is waited for."""
    return draws[:, column].numpy().astype(np.float64)


def _beta(alpha: float, seed: int) -> float:
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def _cutmix_box(H: int, W: int, share: float, seed: int) -> tuple[int, int, int, int]:
    """A box of area 1 - share around a random centre, clipped to the picture."""
    rng = np.random.default_rng([seed, 1])
    side = (1 - share) ** 0.5
    h, w = int(H * side), int(W * side)
    y, x = int(rng.integers(H)), int(rng.integers(W))
    top, bottom = max(0, y - h // 2), min(H, y + (h + 1) // 2)
    left, right = max(0, x - w // 2), min(W, x + (w + 1) // 2)
    return top, left, bottom - top, right - left


def subsample_frames(batch: ClipBatch, frames: int | None) -> ClipBatch:
    """The batch with X frames of each clip, spread evenly over it (the middle one for X = 1)."""
    T = batch.clips.shape[1]
    if frames is None or frames == T:
        return batch
    at = ((torch.arange(frames, dtype=torch.float64) + 0.5) * T / frames).long().to(batch.clips.device)
    return replace(batch, clips=batch.clips[:, at])


def redraw(batch: ClipBatch) -> ClipBatch:
    """The same clips with other augmentation draws, still a function of the old ones (so of seed, epoch, sample)."""
    return replace(batch, draws=(batch.draws.double() * 1009.0 + 0.6180339887).frac().to(batch.draws.dtype))


def recrop(clips: Tensor, draws: Tensor, *, smallest: float = 0.7) -> Tensor:
    """Cut another box out of each clip, side ``smallest`` to 1 of the frame, and resize it back: (B, C, X, H, W).

    The crop of the worker is shared by frames and clip; this one decorrelates their geometry.
    """
    B, C, X, H, W = clips.shape
    draws = draws.to(clips.device, non_blocking=True)
    a, b, c = (draws[:, -1 - i].float() for i in range(3))
    side = smallest + (1 - smallest) * a
    theta = clips.new_zeros(B, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, 0, 2] = (1 - side) * (2 * b - 1)
    theta[:, 1, 2] = (1 - side) * (2 * c - 1)
    grid = F.affine_grid(theta, [B, C, H, W], align_corners=False)
    flat = F.grid_sample(
        clips.reshape(B, C * X, H, W), grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return flat.reshape(B, C, X, H, W)
