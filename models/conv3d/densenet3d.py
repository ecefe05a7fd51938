"""DenseNet3D: DenseNet-BC with 3D convolutions.

Paper: Diba et al., "Temporal 3D ConvNets: New Architecture and Transfer Learning for Video Classification",
arXiv 1711.08200, Table 1, column DenseNet3D-121. Table 1 prints no channel counts; they are those of the authors'
released code (MohsenFayyaz89/T3D, models/DenseNet3D.py), which are DenseNet-BC's: growth 32, bottleneck 4 x
growth, 64 stem filters, transitions that halve the channels.

Where paper and code disagree there is an option:

* ``pool``: the stem's max pooling keeps T ("paper": Table 1 prints 16 frames before and after it; the printed
  "stride 1" cannot also halve H and W, so it is read as (1, 2, 2)) or halves it ("official": the released code).
* The released code pools 1x7x7 at the end and so takes 32x224x224 only; here the pool is global.

The weights are named as in torchvision's 2D DenseNet, which is also the authors' naming once the dots inside their
submodule names ("norm.1") are taken out; see :meth:`DenseNet3D.adapt_state_dict`.
"""

from __future__ import annotations

import re
from typing import Literal

from torch import Tensor

from cliplift.models.image.densenet import BLOCKS, DenseNet, DenseShape
from cliplift.models.protocol import InputSpec, check_choices
from cliplift.models.registry import variant

StemPool = Literal["paper", "official"]
PAPER = "Diba et al. 2017"


def stem_pool_stride(pool: StemPool) -> tuple[int, int, int]:
    """The stem's pooling keeps T ("paper") or halves it ("official")."""
    check_choices(StemPool, pool=pool)
    return (1 if pool == "paper" else 2, 2, 2)


class DenseNet3D(DenseNet):
    """3D DenseNet: (B, C, T, H, W) -> (B, K)."""

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Public DenseNet3D weights under our names.

        kenshohara/3D-ResNets-PyTorch calls the stem ``conv1``/``norm1`` and is otherwise the same network when
        built with ``conv1_t_size=3, conv1_t_stride=2``; the authors' own dots are the 2D net's business.
        """
        state, notes = super().adapt_state_dict(state)
        stem = re.compile(r"^features\.(conv|norm)1\.")
        renamed = {stem.sub(r"features.\g<1>0.", key): value for key, value in state.items()}
        if renamed.keys() != state.keys():
            notes = [*notes, "renamed the stem's conv1/norm1 to conv0/norm0"]
        return renamed, notes


def densenet3d(
    *,
    depth: int,
    num_classes: int = 400,
    in_frames: int = 32,
    pool: StemPool = "official",
    drop_rate: float = 0.0,
    dropout: float = 0.0,
) -> DenseNet3D:
    """DenseNet3D for any T, H, W.

    Args:
        pool: "official", the released code, or "paper", Table 1 (twice the frames inside, 1.8 times the cost).
        drop_rate: dropout on every dense layer's new maps (0.2 in the authors' "DropOut" variants).
        dropout: before the classifier.
    """
    spec = InputSpec.square(224, frames=in_frames, frame_stride=2)
    shape = DenseShape(
        blocks=BLOCKS[depth],
        stem_kernel=(3, 7, 7),
        stem_stride=(2, 2, 2),
        pool_stride=stem_pool_stride(pool),
    )
    return DenseNet3D(shape, num_classes=num_classes, input_spec=spec, drop_rate=drop_rate, dropout=dropout)


# Parameters at 400 classes: 11,658,896; 19,214,992
densenet3d_121 = variant("densenet3d_121", densenet3d, paper=PAPER, fixed={"depth": 121})
densenet3d_169 = variant("densenet3d_169", densenet3d, paper=PAPER, fixed={"depth": 169})
