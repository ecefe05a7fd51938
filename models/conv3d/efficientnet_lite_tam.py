"""EfficientNet-Lite0 over clips: the image network on every frame, temporal aggregation between its blocks.

Source of the temporal part: Fan et al., "More Is Less", NeurIPS 2019, arXiv 1912.00869 (the temporal aggregation
module, TAM): every channel of a frame becomes a weighted sum of it in the frame before, the frame itself and the next.

Two deviations, so that the clip network starts as the image network of its weights (``pretrained: 2d:imagenet``):

* the weights start at (0, 1, 0), where the public code draws them at random; those of ``difference_share`` of the
  channels at (-1/2, 1, -1/2), for from (0, 1, 0) alone the features' mean over time hardly learns what changes;
* no ReLU after the sum: EfficientNet's blocks end in a linear bottleneck, the paper's ResNet blocks behind a ReLU.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.image.efficientnet_lite import EfficientNetLite, InvertedResidual
from cliplift.models.protocol import check_choices
from cliplift.models.registry import variant

Pooling = Literal["mean", "mean_deviation"]


class TemporalAggregation(nn.Module):
    """y[t] = w0 x[t-1] + w1 x[t] + w2 x[t+1], one weight per channel; zeros outside the clip. The first ``differences``
    channels start as what changes from frame to frame, the others as the frame itself."""

    def __init__(self, channels: int, *, differences: int = 0) -> None:
        super().__init__()
        start = torch.tensor([0.0, 1.0, 0.0])[:, None].repeat(1, channels)
        start[:, :differences] = torch.tensor([-0.5, 1.0, -0.5])[:, None]
        self.weight = nn.Parameter(start)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C, H, W) -> the same shape. Sums of shifted frames: faster than a grouped 3D convolution."""
        before, here, behind = self.weight[:, None, None, :, None, None]
        T = x.shape[1]
        padded = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 1))
        return cast(Tensor, before * padded[:, :T] + here * x + behind * padded[:, 2:])


class TemporalInvertedResidual(nn.Module):
    """An image block on every frame, its branch behind a :class:`TemporalAggregation`; the shortcut stays as it is."""

    def __init__(self, block: InvertedResidual, difference_share: float) -> None:
        super().__init__()
        channels = cast(nn.Conv2d, block.layers[0]).in_channels
        self.temporal = TemporalAggregation(channels, differences=round(difference_share * channels))
        self.layers = block.layers
        self.residual = block.residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C, H, W) -> (B, T, C', H/stride, W/stride)."""
        y: Tensor = self.layers(self.temporal(x).flatten(0, 1))
        y = y.reshape(*x.shape[:2], *y.shape[1:])
        return x + y if self.residual else y


class EfficientNetLiteTAM(EfficientNetLite):
    """(B, 3, T, H, W) -> (B, K). Its tensors bear the image network's names, and ``blocks.N.temporal.weight``.

    ``pooling``: its features are the frames' mean (1280), or with ``mean_deviation`` also how much they vary (2560).
    """

    input_dims = 5

    def __init__(
        self,
        *,
        num_classes: int = 400,
        in_frames: int = 8,
        dropout: float = 0.0,
        difference_share: float = 0.0,
        pooling: Pooling = "mean",
    ) -> None:
        check_choices(Pooling, pooling=pooling)
        super().__init__(lite=0, num_classes=num_classes, in_frames=in_frames, dropout=dropout)
        self.pooling = pooling
        if pooling == "mean_deviation":
            self.feature_dim *= 2
            self.reset_classifier(num_classes)
        self.input_spec = dataclasses.replace(self.input_spec, frame_stride=8)
        inner = [block for block in self.blocks if isinstance(block, InvertedResidual)]
        self.blocks = nn.ModuleList(TemporalInvertedResidual(block, difference_share) for block in inner)

    def forward_pooled(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D); with ``mean_deviation`` D is 2 x 1280: mean and deviation over the T frames of
        each frame's mean over its places. The deviation is divided by T, not T - 1; its gradient is 0 where it is."""
        if self.pooling == "mean":
            return super().forward_pooled(x)
        self.check_input(x)
        frames = self.forward_features(x).flatten(3).mean(dim=3)  # (B, 1280, T)
        return torch.cat([frames.mean(dim=2), frames.std(dim=2, correction=0)], dim=1)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, 1280, T, H/32, W/32)."""
        B, T = x.shape[0], x.shape[2]
        y: Tensor = self.stem(x.transpose(1, 2).flatten(0, 1))
        y = y.reshape(B, T, *y.shape[1:])
        for block in self.blocks:
            y = block(y)
        y = self.head(y.flatten(0, 1))
        return y.reshape(B, T, *y.shape[1:]).transpose(1, 2)


# 3,887,968 parameters at 400 classes, features of 1280; its ImageNet weights come with the extra ``teachers``
efficientnet_lite0_tam = variant(
    "efficientnet_lite0_tam", EfficientNetLiteTAM, paper="Fan et al. 2019, TAM on Lite0"
)
