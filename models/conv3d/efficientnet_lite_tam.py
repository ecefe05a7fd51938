"""EfficientNet-Lite0 over clips: the image network on every frame, temporal aggregation between its blocks.

Source of the temporal part: Fan, Chen, Kuehne, Pistoia and Cox, "More Is Less", NeurIPS 2019, arXiv 1912.00869 (the
temporal aggregation module, TAM), and IBM/action-recognition-pytorch: every channel of a frame becomes a weighted sum
of that channel in the frame before, the frame itself and the next, one weight per channel and place.

Two deviations, both so that the clip network starts as the image network it takes its weights from:

* the weights start at (0, 1, 0), where the public code draws them at random;
* no ReLU after the sum. The blocks of EfficientNet end in a linear bottleneck, whose negative half carries as much as
  the positive one; the paper's ResNet blocks begin behind a ReLU and lose nothing by another.

It is the 3D network of this registry whose ImageNet weights install from the package index
(``pretrained: 2d:imagenet``), and so the row "inflated from 2D" of a comparison made without a network.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.image.efficientnet_lite import EfficientNetLite, InvertedResidual
from cliplift.models.registry import variant


class TemporalAggregation(nn.Module):
    """y[t] = w0 x[t-1] + w1 x[t] + w2 x[t+1], one weight per channel; zeros outside the clip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.0, 1.0, 0.0])[:, None].repeat(1, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C, H, W) -> the same shape. Sums of shifted frames: faster than a grouped 3D convolution."""
        before, here, behind = self.weight[:, None, None, :, None, None]
        T = x.shape[1]
        padded = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 1))
        return cast(Tensor, before * padded[:, :T] + here * x + behind * padded[:, 2:])


class TemporalInvertedResidual(nn.Module):
    """An image block on every frame, its branch behind a :class:`TemporalAggregation`; the shortcut stays as it is."""

    def __init__(self, block: InvertedResidual, *, in_channels: int) -> None:
        super().__init__()
        self.temporal = TemporalAggregation(in_channels)
        self.layers = block.layers
        self.residual = block.residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C, H, W) -> (B, T, C', H/stride, W/stride)."""
        y: Tensor = self.layers(self.temporal(x).flatten(0, 1))
        y = y.reshape(*x.shape[:2], *y.shape[1:])
        return x + y if self.residual else y


class EfficientNetLiteTAM(EfficientNetLite):
    """(B, 3, T, H, W) -> (B, K). Its tensors bear the image network's names, and ``blocks.N.temporal.weight``."""

    input_dims = 5

    def __init__(self, *, num_classes: int = 400, in_frames: int = 8, dropout: float = 0.0) -> None:
        super().__init__(lite=0, num_classes=num_classes, in_frames=in_frames, dropout=dropout)
        self.input_spec = dataclasses.replace(self.input_spec, frame_stride=8)
        inner = [block for block in self.blocks if isinstance(block, InvertedResidual)]
        self.blocks = nn.ModuleList(
            TemporalInvertedResidual(block, in_channels=block.layers[0].in_channels)  # type: ignore[arg-type]
            for block in inner
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, 1280, T, H/32, W/32)."""
        B, T = x.shape[0], x.shape[2]
        y: Tensor = self.stem(x.transpose(1, 2).flatten(0, 1))
        y = y.reshape(B, T, *y.shape[1:])
        for block in self.blocks:
            y = block(y)
        features: Tensor = self.head(y.flatten(0, 1))
        return features.reshape(B, T, *features.shape[1:]).transpose(1, 2)


# 3,887,968 parameters at 400 classes, features of 1280. ``pretrained="2d:imagenet"`` starts as the ImageNet network on
# every frame, averaged over time, and needs no download: the extra ``teachers`` ships the weights
efficientnet_lite0_tam = variant(
    "efficientnet_lite0_tam", EfficientNetLiteTAM, paper="Fan et al. 2019, TAM on Lite0"
)
