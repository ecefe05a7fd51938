"""The published sizes of Hiera for clips, by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from cliplift.models.hiera.model import Hiera
from cliplift.models.protocol import InputSpec
from cliplift.models.registry import register_model

PAPER = "Ryali et al., ICML 2023"


def _hiera(*, in_frames: int, crop: int, **options: Any) -> Hiera:
    """16 frames of 224 pixels, 4 apart; the released demonstration's normalisation (SlowFast's)."""
    spec = InputSpec(
        frames=in_frames,
        frame_stride=4,
        crop_height=crop,
        crop_width=crop,
        mean=(0.45, 0.45, 0.45),
        std=(0.225, 0.225, 0.225),
        test_clips=5,
        test_crops=3,
    )
    return Hiera(input_spec=spec, **options)


@register_model(paper=PAPER)
def hiera_base(
    *,
    num_classes: int = 400,
    in_frames: int = 16,
    crop: int = 224,
    width: int = 96,
    heads: int = 1,
    stages: tuple[int, ...] = (2, 3, 16, 3),
    pretraining: bool = False,
    drop_path: float = 0.1,
    dropout: float = 0.0,
) -> nn.Module:
    """Hiera-B, 16 frames of 224 pixels. 51,092,560 parameters at 400 classes.

    Args:
        crop: H = W in pixels, a multiple of 32; other sizes at run time resize the learned places.
        width, heads: of the first stage.
        stages: blocks of each stage.
        pretraining: an encoder for the masked autoencoder: stage 4 keeps 2 x 2 places a unit (num_classes=0).
        drop_path: rate of the last block; it rises linearly from 0 in the first.
        dropout: before the classifier."""
    return _hiera(**locals())


@register_model(paper=PAPER)
def hiera_base_plus(
    *,
    num_classes: int = 400,
    in_frames: int = 16,
    crop: int = 224,
    width: int = 112,
    heads: int = 2,
    stages: tuple[int, ...] = (2, 3, 16, 3),
    pretraining: bool = False,
    drop_path: float = 0.1,
    dropout: float = 0.0,
) -> nn.Module:
    """Hiera-B+; options as :func:`hiera_base`."""
    return _hiera(**locals())


@register_model(paper=PAPER)
def hiera_large(
    *,
    num_classes: int = 400,
    in_frames: int = 16,
    crop: int = 224,
    width: int = 144,
    heads: int = 2,
    stages: tuple[int, ...] = (2, 6, 36, 4),
    pretraining: bool = False,
    drop_path: float = 0.2,
    dropout: float = 0.0,
) -> nn.Module:
    """Hiera-L; options as :func:`hiera_base`."""
    return _hiera(**locals())


@register_model(paper=PAPER)
def hiera_huge(
    *,
    num_classes: int = 400,
    in_frames: int = 16,
    crop: int = 224,
    width: int = 256,
    heads: int = 4,
    stages: tuple[int, ...] = (2, 6, 36, 4),
    pretraining: bool = False,
    drop_path: float = 0.3,
    dropout: float = 0.0,
) -> nn.Module:
    """Hiera-H; options as :func:`hiera_base`."""
    return _hiera(**locals())
