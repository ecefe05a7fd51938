"""T3D: DenseNet3D whose transitions look at several temporal depths at once (temporal transition layer, TTL).

Paper: Diba et al., "Temporal 3D ConvNets: New Architecture and Transfer Learning for Video Classification",
arXiv 1711.08200, Table 1 and Fig. 1. The authors' models/T3D.py (MohsenFayyaz89/T3D, withdrawn in 2018) never ran:
its convolutions have no padding, so the branches of a TTL cannot be concatenated. This file follows the paper:

* depths T1, T2, T3 of {1, 3, 6} in TTL 1 and {1, 3, 4} in TTL 2 and 3 (Table 1; the withdrawn file has 1, 3, 4
  everywhere);
* "same" padding, an even depth's extra frame behind (neither source says);
* 128 channels per branch (the withdrawn file; the paper prints none);
* ``fusion=False``: concatenation, then pooling (Table 1, Fig. 1). ``fusion=True`` adds the withdrawn file's
  BN-ReLU-1x1x1 convolution, 384 -> 384, in between;
* ``pool="paper"``: the stem's pooling keeps T, as Table 1 prints. "official" is the DenseNet3D code's.

The initialisation is not published; convolutions are Kaiming-normal as in torchvision's DenseNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.conv3d.densenet3d import PAPER, DenseNet3D, StemPool, stem_pool_stride
from cliplift.models.image.densenet import BLOCKS, DenseShape
from cliplift.models.layers import SameConv3d, halve
from cliplift.models.protocol import InputSpec, ModelError
from cliplift.models.registry import variant

TABLE_1_DEPTHS = ((1, 3, 6), (1, 3, 4), (1, 3, 4))


class TemporalBranch(nn.Module):
    """BN-ReLU-convolution of one temporal depth; depth 1 is 1x1x1, the others are depth x 3 x 3 (Table 1)."""

    def __init__(self, in_channels: int, out_channels: int, depth: int) -> None:
        super().__init__()
        space = 1 if depth == 1 else 3
        self.norm = nn.BatchNorm3d(in_channels)
        self.conv = SameConv3d(in_channels, out_channels, (depth, space, space))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T, H, W)."""
        return cast(Tensor, self.conv(F.relu(self.norm(x), inplace=True)))


class TemporalTransition(nn.Module):
    """The temporal transition layer: parallel branches of several depths, concatenated, then 2x2x2 pooling.

    Usable after any stage of a 3D network. ``pooling=False`` leaves T, H and W alone, for backbones whose next
    stage has its own stride.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        depths: Sequence[int] = (1, 3, 6),
        width: int = 128,
        fusion: bool = False,
        pooling: bool = True,
    ) -> None:
        super().__init__()
        if not depths or min(depths) < 1 or width < 1:
            raise ModelError(
                f"temporal transition: depths={tuple(depths)} and width={width} must be positive"
            )
        self.branches = nn.ModuleList(TemporalBranch(in_channels, width, depth) for depth in depths)
        self.out_channels = width * len(depths)
        self.fusion: nn.Module | None = (
            TemporalBranch(self.out_channels, self.out_channels, 1) if fusion else None
        )
        self.pooling = pooling

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, len(depths) * width, T/2, H/2, W/2)."""
        x = torch.cat([branch(x) for branch in self.branches], dim=1)
        if self.fusion is not None:
            x = self.fusion(x)
        return halve(x) if self.pooling else x


class T3D(DenseNet3D):
    """DenseNet3D with temporal transition layers, for any T, H, W.

    Args:
        blocks, growth, bottleneck, stem_channels, stem_kernel: see :class:`~cliplift.models.image.densenet.DenseShape`.
        stem_stride: temporal stride of the first convolution; 1 for clips of 8 or 16 frames.
        ttl_widths: channels of a branch, for each temporal transition.
        fusion: the withdrawn code's 1x1x1 convolution after the concatenation.
        pool: "paper", Table 1 (the stem's pooling keeps T), or "official", the DenseNet3D code (halves it).
        drop_rate: dropout on every dense layer's new maps.
        dropout: before the classifier.
    """

    def __init__(
        self,
        *,
        num_classes: int = 400,
        in_frames: int = 32,
        crop: int = 224,
        blocks: tuple[int, int, int, int] = BLOCKS[121],
        growth: int = 32,
        bottleneck: int = 4,
        stem_channels: int = 64,
        stem_kernel: tuple[int, int, int] = (3, 7, 7),
        stem_stride: int = 2,
        ttl_widths: tuple[int, int, int] = (128, 128, 128),
        fusion: bool = False,
        pool: StemPool = "paper",
        drop_rate: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        shape = DenseShape(
            blocks=blocks,
            growth=growth,
            bottleneck=bottleneck,
            stem_channels=stem_channels,
            stem_kernel=stem_kernel,
            stem_stride=(stem_stride, 2, 2),
            pool_stride=stem_pool_stride(pool),
        )
        if len(blocks) - 1 != len(TABLE_1_DEPTHS) or len(ttl_widths) != len(TABLE_1_DEPTHS):
            raise ModelError(
                f"{len(blocks)} dense blocks have {len(blocks) - 1} temporal transitions between them, "
                f"got depths={TABLE_1_DEPTHS} and widths={tuple(ttl_widths)}"
            )

        def transition(channels: int, index: int) -> nn.Module:
            return TemporalTransition(
                channels, depths=TABLE_1_DEPTHS[index], width=ttl_widths[index], fusion=fusion
            )

        super().__init__(
            shape,
            num_classes=num_classes,
            input_spec=InputSpec.square(crop, frames=in_frames, frame_stride=2),
            drop_rate=drop_rate,
            dropout=dropout,
            transition=transition,
        )


def t3d(
    *,
    depth: int,
    num_classes: int = 400,
    in_frames: int = 32,
    pool: StemPool = "paper",
    stem_stride: int = 2,
    ttl_width: int = 128,
    fusion: bool = False,
    drop_rate: float = 0.0,
    dropout: float = 0.0,
) -> T3D:
    """The paper's T3D of ``depth`` layers; ``ttl_width`` is the branch width of every temporal transition."""
    return T3D(
        num_classes=num_classes,
        in_frames=in_frames,
        blocks=BLOCKS[depth],
        stem_stride=stem_stride,
        ttl_widths=(ttl_width, ttl_width, ttl_width),
        fusion=fusion,
        pool=pool,
        drop_rate=drop_rate,
        dropout=dropout,
    )


# Parameters at 400 classes: 29,876,880 (30,321,552 with ``fusion``); 38,519,184 (38,963,856)
t3d_121 = variant("t3d_121", t3d, paper=PAPER, fixed={"depth": 121})
t3d_169 = variant("t3d_169", t3d, paper=PAPER, fixed={"depth": 169})
# The same network at laptop size, not a model of the paper: clips of 8 to 16 frames at 64 to 112 pixels. Narrow where
# the maps are large (the first temporal transition sees 16 times the positions of the second) and wide where they are
# small, so that a CPU trains it
t3d_tiny = variant(
    "t3d_tiny",
    T3D,
    paper=f"{PAPER}, reduced",
    in_frames=8,
    crop=64,
    blocks=(1, 2, 2, 2),
    growth=16,
    bottleneck=2,
    stem_channels=16,
    stem_kernel=(3, 3, 3),
    ttl_widths=(8, 24, 64),
)
