"""The published sizes of Hiera for clips, by name."""

from __future__ import annotations

from cliplift.models.hiera.model import Hiera
from cliplift.models.protocol import InputSpec
from cliplift.models.registry import variant

PAPER = "Ryali et al., ICML 2023"


def hiera(
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
) -> Hiera:
    """Hiera on 16 frames of 224 pixels, 4 apart; the released demonstration's normalisation (SlowFast's).

    Args:
        crop: H = W in pixels, a multiple of 32; other sizes at run time resize the learned places.
        width, heads: of the first stage.
        stages: blocks of each stage.
        pretraining: an encoder for the masked autoencoder: stage 4 keeps 2 x 2 places a unit (num_classes=0).
        drop_path: rate of the last block; it rises linearly from 0 in the first.
        dropout: before the classifier.
    """
    spec = InputSpec.square(
        crop,
        frames=in_frames,
        frame_stride=4,
        mean=(0.45, 0.45, 0.45),
        std=(0.225, 0.225, 0.225),
        test_clips=5,
        test_crops=3,
    )
    return Hiera(
        width=width,
        heads=heads,
        stages=stages,
        num_classes=num_classes,
        input_spec=spec,
        pretraining=pretraining,
        drop_path=drop_path,
        dropout=dropout,
    )


DEEP = (2, 6, 36, 4)  # blocks of the stages of L and H
hiera_base = variant("hiera_base", hiera, paper=PAPER)  # 51,092,560 parameters at 400 classes
hiera_base_plus = variant("hiera_base_plus", hiera, paper=PAPER, width=112, heads=2)
hiera_large = variant("hiera_large", hiera, paper=PAPER, width=144, heads=2, stages=DEEP, drop_path=0.2)
hiera_huge = variant("hiera_huge", hiera, paper=PAPER, width=256, heads=4, stages=DEEP, drop_path=0.3)
