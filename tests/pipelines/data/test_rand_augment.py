"""RandAugment's operations against PIL's, and their draws."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from cliplift.configs.data import AugmentConfig
from cliplift.models.protocol import InputSpec
from cliplift.pipelines.data.augment import RAND_AUGMENT, DeviceAugment
from cliplift.pipelines.data.batch import NUM_DRAWS, ClipBatch
from cliplift.pipelines.data.rand_augment import (
    FILL,
    NAMES,
    OPERATIONS,
    argument_of,
    drawn_operations,
    rand_augmented,
)

Image = pytest.importorskip("PIL.Image")
ImageEnhance = pytest.importorskip("PIL.ImageEnhance")
ImageOps = pytest.importorskip("PIL.ImageOps")

T, H, W = 3, 26, 37


def clip(seed: int = 0) -> torch.Tensor:
    """Smooth pictures with noise, so that histograms, edges and interpolation all matter."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:H, 0:W]
    waves = [np.sin(x / 5 + t) + np.cos(y / 7 + c) for t in range(T) for c in range(3)]
    smooth = np.stack(waves).reshape(T, 3, H, W).transpose(0, 2, 3, 1)
    levels = 110 + 45 * smooth + rng.normal(0, 6, smooth.shape)
    return torch.from_numpy(levels.clip(0, 255).astype(np.uint8))


def warp(matrix: tuple[float, ...]) -> Callable[[Image.Image], Image.Image]:
    return lambda i: i.transform(
        i.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL
    )


REFERENCES: dict[str, Callable[[float], Callable[[Image.Image], Image.Image]]] = {
    "autocontrast": lambda _: ImageOps.autocontrast,
    "equalize": lambda _: ImageOps.equalize,
    "invert": lambda _: ImageOps.invert,
    "rotate": lambda a: lambda i: i.rotate(a, Image.Resampling.BILINEAR, fillcolor=FILL),
    "posterize": lambda a: lambda i: ImageOps.posterize(i, int(a)),
    "solarize": lambda a: lambda i: ImageOps.solarize(i, int(a)),
    "solarize_add": lambda a: (
        lambda i: i.point([min(255, v + int(a)) if v < 128 else v for v in range(256)] * 3)
    ),
    "color": lambda a: lambda i: ImageEnhance.Color(i).enhance(a),
    "contrast": lambda a: lambda i: ImageEnhance.Contrast(i).enhance(a),
    "brightness": lambda a: lambda i: ImageEnhance.Brightness(i).enhance(a),
    "sharpness": lambda a: lambda i: ImageEnhance.Sharpness(i).enhance(a),
    "shear_x": lambda a: warp((1, a, 0, 0, 1, 0)),
    "shear_y": lambda a: warp((1, 0, 0, a, 1, 0)),
    "translate_x": lambda a: warp((1, 0, a * W, 0, 1, 0)),
    "translate_y": lambda a: warp((1, 0, 0, 0, 1, a * H)),
}
WHOLE_CLIP = ("autocontrast", "equalize", "contrast")  # statistics of all frames: one tall picture for PIL


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("strength", [0.0, 0.35, 0.7, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_operations_are_those_of_pil(name: str, strength: float, sign: float) -> None:
    frames = clip()
    argument = argument_of(name, strength, sign)
    reference = REFERENCES[name](argument)
    if name in WHOLE_CLIP:
        expected = np.asarray(reference(Image.fromarray(frames.reshape(T * H, W, 3).numpy()))).reshape(
            T, H, W, 3
        )
    else:
        expected = np.stack([np.asarray(reference(Image.fromarray(frame.numpy()))) for frame in frames])
    found = OPERATIONS[name](frames, argument).numpy()
    assert found.dtype == np.uint8
    difference = np.abs(found.astype(int) - expected.astype(int))
    # PIL computes blends and interpolation in other precisions and cuts to whole levels: a value that lies on a level
    # may come out one lower.
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_flat_clips_survive() -> None:
    flat = torch.full((2, 8, 8, 3), 77, dtype=torch.uint8)
    for name in ("autocontrast", "equalize", "sharpness", "contrast"):
        assert torch.equal(OPERATIONS[name](flat, 1.0), flat)


def config(**changes: float) -> AugmentConfig:
    return AugmentConfig.model_validate({"rand_augment_ops": 3, "rand_augment_probability": 1.0, **changes})


def test_every_operation_is_drawn_as_often_and_as_strongly_as_said() -> None:
    drawn = [o for seed in range(1500) for o in drawn_operations(seed, config(rand_augment_magnitude=5.0))]
    counts = np.array([sum(o.name == name for o in drawn) for name in NAMES])
    expected = len(drawn) / len(NAMES)
    assert np.abs(counts - expected).max() < 5 * math.sqrt(expected)
    turns = np.array([o.argument for o in drawn if o.name == "rotate"])
    assert abs(np.abs(turns).mean() - 15.0) < 0.5
    assert abs((turns > 0).mean() - 0.5) < 0.15
    assert abs(np.abs(turns).std() - 1.5) < 0.3  # half a magnitude of thirty degrees over ten
    some = [drawn_operations(seed, config(rand_augment_probability=0.25)) for seed in range(1000)]
    assert abs(sum(map(len, some)) / 3000 - 0.25) < 0.03


def test_all_frames_get_the_same_and_each_clip_its_own() -> None:
    still = clip()[:1].expand(T, H, W, 3)
    clips = torch.stack([still] * 12)
    done = rand_augmented(clips, list(range(12)), config())
    assert all(torch.equal(frame, one[0]) for one in done for frame in one)
    assert len({one.numpy().tobytes() for one in done}) > 8
    again = rand_augmented(clips[5:6], [5], config())
    assert torch.equal(again[0], done[5])


def test_it_runs_on_training_batches_alone() -> None:
    B = 4
    zeros = torch.zeros(B, dtype=torch.int64)
    draws = torch.rand(B, NUM_DRAWS, generator=torch.Generator().manual_seed(0))
    batch = ClipBatch(
        torch.stack([clip(i) for i in range(B)]), zeros, zeros, zeros, zeros, draws, zeros, zeros
    )
    plain = InputSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    augment = config(flip=False)

    def result(training: bool, batch: ClipBatch) -> torch.Tensor:
        return (DeviceAugment(augment, plain, training=training)(batch) * 255).round().to(torch.uint8)

    channels_last = result(True, batch).permute(0, 2, 3, 4, 1)
    seeds = [int(draw * 2**24) for draw in draws[:, RAND_AUGMENT].double().tolist()]
    assert torch.equal(channels_last, rand_augmented(batch.clips, seeds, augment))
    assert not torch.equal(channels_last, batch.clips)
    assert torch.equal(result(False, batch).permute(0, 2, 3, 4, 1), batch.clips)
    other = dataclasses.replace(batch, draws=draws.flip(0))
    assert not torch.equal(result(True, other), result(True, batch))
