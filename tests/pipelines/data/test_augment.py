"""Every augmentation against its formula written out in numpy; one draw for all frames of a clip."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cliplift.configs.data import AugmentConfig
from cliplift.models.protocol import InputSpec
from cliplift.pipelines.data.augment import (
    BRIGHTNESS,
    CONTRAST,
    ERASE,
    FLIP,
    GRAY,
    SATURATION,
    DeviceAugment,
    mix_clips,
    normalized_brightness,
)
from cliplift.pipelines.data.batch import NUM_DRAWS, ClipBatch

PLAIN = InputSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
B, T, SIDE = 6, 3, 10


def batch(seed: int = 0, draws: np.ndarray | None = None) -> ClipBatch:
    generator = torch.Generator().manual_seed(seed)
    found = (
        torch.rand(B, NUM_DRAWS, generator=generator) if draws is None else torch.from_numpy(draws).float()
    )
    zeros = torch.zeros(B, dtype=torch.int64)
    return ClipBatch(
        clips=torch.randint(0, 256, (B, T, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator),
        labels=torch.arange(B) % 4,
        sample_index=zeros,
        video_index=zeros,
        views=zeros,
        draws=found,
        epochs=zeros,
        positions=zeros,
    )


def apply(batch: ClipBatch, *, training: bool = True, spec: InputSpec = PLAIN, **changes: Any) -> np.ndarray:
    """(B, T, H, W, C) as float64, so that it can be compared with the clips as they came."""
    config = AugmentConfig.model_validate({"flip": False, **changes})
    out = DeviceAugment(config, spec, training=training)(batch)
    assert out.shape == (B, 3, T, SIDE, SIDE)
    assert out.dtype == torch.float32
    result: np.ndarray = out.permute(0, 2, 3, 4, 1).double().numpy()
    return result


def pixels(batch: ClipBatch) -> np.ndarray:
    return batch.clips.numpy().astype(np.float64) / 255


def gray(x: np.ndarray) -> np.ndarray:
    return (x @ np.array([0.299, 0.587, 0.114]))[..., None]


def factor(batch: ClipBatch, column: int, strength: float) -> np.ndarray:
    draw = batch.draws[:, column].double().numpy()
    return (1 - strength + 2 * strength * draw)[:, None, None, None, None]


def test_normalisation() -> None:
    data = batch()
    spec = InputSpec(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    expected = (pixels(data) - [0.1, 0.2, 0.3]) / [0.5, 0.25, 2.0]
    assert np.allclose(apply(data, spec=spec), expected, atol=1e-5)


def test_flip_mirrors_the_chosen_clips_in_every_frame() -> None:
    data = batch()
    chosen = data.draws[:, FLIP].numpy() < 0.5
    assert chosen.any()
    assert not chosen.all()
    expected = np.where(chosen[:, None, None, None, None], pixels(data)[:, :, :, ::-1], pixels(data))
    assert np.allclose(apply(data, flip=True), expected, atol=1e-6)


def test_brightness_contrast_saturation() -> None:
    data = batch()
    x = pixels(data)
    assert np.allclose(
        apply(data, brightness=0.4), np.clip(x * factor(data, BRIGHTNESS, 0.4), 0, 1), atol=1e-5
    )
    mean = gray(x).mean(axis=(1, 2, 3, 4), keepdims=True)
    expected = np.clip(mean + (x - mean) * factor(data, CONTRAST, 0.6), 0, 1)
    assert np.allclose(apply(data, contrast=0.6), expected, atol=1e-5)
    expected = np.clip(gray(x) + (x - gray(x)) * factor(data, SATURATION, 0.9), 0, 1)
    assert np.allclose(apply(data, saturation=0.9), expected, atol=1e-5)


def test_grayscale() -> None:
    data = batch()
    chosen = data.draws[:, GRAY].numpy() < 0.5
    assert chosen.any()
    found = apply(data, grayscale_probability=0.5)
    assert np.allclose(found[chosen], np.repeat(gray(pixels(data)[chosen]), 3, axis=-1), atol=1e-5)
    assert np.allclose(found[~chosen], pixels(data)[~chosen], atol=1e-6)


def test_erasing_blanks_one_box_of_all_frames() -> None:
    data = batch()
    found = apply(data, erase_probability=0.7)
    for clip, before, draw in zip(found, pixels(data), data.draws[:, ERASE].tolist(), strict=True):
        erased = (clip == 0).all(axis=-1) & (before != 0).any(axis=-1)
        assert (erased == erased[:1]).all(), "the same box in every frame"
        assert erased.any() == (draw < 0.7)
        if erased.any():
            rows, columns = np.flatnonzero(erased[0].any(axis=1)), np.flatnonzero(erased[0].any(axis=0))
            assert len(rows) == rows[-1] - rows[0] + 1
            assert len(columns) == columns[-1] - columns[0] + 1
        assert np.allclose(clip[~erased], before[~erased], atol=1e-6)


def test_evaluation_only_normalises() -> None:
    everything = {"flip": True, "brightness": 0.5, "contrast": 0.5, "saturation": 0.5,
                  "grayscale_probability": 1.0, "erase_probability": 1.0}  # fmt: skip
    data = batch()
    assert np.allclose(apply(data, training=False, **everything), pixels(data), atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_dark_footage_is_brought_to_one_brightness(training: bool) -> None:
    data = batch()
    dark = ClipBatch(**{**data.__dict__, "clips": data.clips // 8})
    found = apply(dark, training=training, normalize_brightness=True)
    assert np.allclose(gray(found).mean(axis=(1, 2, 3, 4)), 0.45, atol=0.01)
    black = normalized_brightness(torch.zeros(1, 3, 2, 4, 4))
    assert (black == 0).all()


@pytest.mark.parametrize("seed", range(6))
def test_mixup_and_cutmix_keep_their_shares(seed: int) -> None:
    data = batch(seed)
    clips = torch.arange(B, dtype=torch.float32).view(B, 1, 1, 1, 1).expand(B, 3, T, SIDE, SIDE).contiguous()
    for changes in ({"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}):
        config = AugmentConfig.model_validate(changes)
        mixed, targets = mix_clips(clips, data.labels, num_classes=4, augment=config, draws=data.draws)
        assert torch.allclose(targets.sum(dim=1), torch.ones(B))
        again, _ = mix_clips(clips, data.labels, num_classes=4, augment=config, draws=data.draws)
        assert torch.equal(mixed, again)
        # Clip i holds the number i, its partner B - 1 - i: the mean of the pixels tells the share of each.
        own, other = torch.arange(B).float(), torch.arange(B).flip(0).float()
        share = (mixed.mean(dim=(1, 2, 3, 4)) - other) / (own - other)
        partner = data.labels.flip(0)
        for i in range(B):
            if data.labels[i] != partner[i]:
                assert targets[i, data.labels[i]] == pytest.approx(share[i].item(), abs=1e-4)
                assert targets[i, partner[i]] == pytest.approx(1 - share[i].item(), abs=1e-4)
