"""DenseNet-BC, in 2D and as the parts of the 3D families.

Paper: Huang et al., "Densely Connected Convolutional Networks", arXiv 1608.06993, Table 1 (121 and 169: growth 32,
bottleneck 4 x growth, 64 stem filters, compression 0.5). The weights are named as in torchvision and timm.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.layers import BATCH_NORMS, CONVOLUTIONS, MAX_POOLS, PooledClassifier, halve
from cliplift.models.protocol import InputSpec, ModelError
from cliplift.models.registry import variant

PAPER = "Huang et al. 2017"
BLOCKS = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32)}  # Table 1
TransitionBuilder = Callable[[int, int], nn.Module]


@dataclass(frozen=True, kw_only=True)
class DenseShape:
    """The sizes of a DenseNet. The stem's tuples have one number per axis: (H, W), or (T, H, W) in 3D."""

    blocks: tuple[int, ...] = BLOCKS[121]
    growth: int = 32
    bottleneck: int = 4
    stem_channels: int = 64
    stem_kernel: tuple[int, ...] = (7, 7)
    stem_stride: tuple[int, ...] = (2, 2)
    pool_stride: tuple[int, ...] = (2, 2)

    def __post_init__(self) -> None:
        positive = (*self.blocks, self.growth, self.bottleneck, self.stem_channels, *self.stem_stride)
        if not self.blocks or min(positive) < 1:
            raise ModelError(f"blocks, growth, bottleneck and stem sizes must be positive, got {self}")
        if any(k % 2 == 0 for k in self.stem_kernel):
            raise ModelError(f"stem_kernel={self.stem_kernel} must be odd along every axis")


class DenseLayer(nn.Module):
    """BN-ReLU-1x1x1 (bottleneck) - BN-ReLU-3x3x3 (growth), on the concatenation of all maps before it.

    In 2D the kernels are 1x1 and 3x3, and the shapes below lose their T.
    """

    def __init__(
        self, in_channels: int, *, growth: int, bottleneck: int, drop_rate: float, rank: int
    ) -> None:
        super().__init__()
        middle = bottleneck * growth
        self.norm1 = BATCH_NORMS[rank](in_channels)
        self.conv1 = CONVOLUTIONS[rank](in_channels, middle, 1, bias=False)
        self.norm2 = BATCH_NORMS[rank](middle)
        self.conv2 = CONVOLUTIONS[rank](middle, growth, 3, padding=1, bias=False)
        self.drop_rate = drop_rate

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Maps of (B, C_i, T, H, W) -> (B, growth, T, H, W).

        The concatenation is made in here, so that checkpointing a layer also drops it: DenseNet's memory then
        grows linearly with depth instead of quadratically.
        """
        x = maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)
        x = self.conv1(F.relu(self.norm1(x), inplace=True))
        x = self.conv2(F.relu(self.norm2(x), inplace=True))
        return F.dropout(x, self.drop_rate, self.training) if self.drop_rate else x


class DenseBlock(nn.Module):
    """``layers`` dense layers: C -> C + layers * growth channels."""

    def __init__(
        self, in_channels: int, *, layers: int, growth: int, bottleneck: int, drop_rate: float, rank: int
    ) -> None:
        super().__init__()
        for i in range(layers):
            layer = DenseLayer(
                in_channels + i * growth, growth=growth, bottleneck=bottleneck, drop_rate=drop_rate, rank=rank
            )
            self.add_module(f"denselayer{i + 1}", layer)
        self.out_channels = in_channels + layers * growth

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C + layers * growth, T, H, W)."""
        maps: tuple[Tensor, ...] = (x,)  # a list would change under a checkpointed layer's hands
        for layer in self.children():
            maps = (*maps, layer(maps))
        return torch.cat(maps, dim=1)


class Transition(nn.Module):
    """BN-ReLU-1x1x1 convolution to half the channels, then average pooling of 2 along every axis."""

    def __init__(self, in_channels: int, *, rank: int) -> None:
        super().__init__()
        self.out_channels = in_channels // 2
        self.norm = BATCH_NORMS[rank](in_channels)
        self.conv = CONVOLUTIONS[rank](in_channels, self.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T/2, H/2, W/2)."""
        return halve(self.conv(F.relu(self.norm(x), inplace=True)))


class DenseNet(PooledClassifier):
    """DenseNet of any rank. ``transition(channels, index)`` builds the layer after dense block ``index`` (from 0)."""

    def __init__(
        self,
        shape: DenseShape,
        *,
        num_classes: int,
        input_spec: InputSpec,
        drop_rate: float = 0.0,
        dropout: float = 0.0,
        transition: TransitionBuilder | None = None,
    ) -> None:
        rank = len(shape.stem_kernel)
        build = transition or (lambda channels, index: Transition(channels, rank=rank))
        trunk, feature_dim = _trunk(shape, input_spec.channels, drop_rate, build)
        super().__init__(
            feature_dim=feature_dim, num_classes=num_classes, input_spec=input_spec, dropout=dropout
        )
        self.input_dims = rank + 2
        self.features = trunk
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D, T', H', W'); without the T in 2D."""
        return F.relu(self.features(x), inplace=True)

    def checkpoint_blocks(self) -> list[str]:
        names: list[str] = []
        for name, part in self.features.named_children():
            if isinstance(part, DenseBlock):
                names += [f"features.{name}.{layer}" for layer, _ in part.named_children()]
            elif name.startswith("transition"):
                names.append(f"features.{name}")
        return names

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Old torchvision and the T3D authors write ``denselayer1.norm.1.weight`` for ``denselayer1.norm1.weight``."""
        dotted = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
        renamed = {dotted.sub(r"\1\2.", key): value for key, value in state.items()}
        changed = len(renamed.keys() - state.keys())
        return renamed, [f"renamed {changed} dotted DenseNet keys"] if changed else []


def _trunk(
    shape: DenseShape, in_channels: int, drop_rate: float, transition: TransitionBuilder
) -> tuple[nn.Sequential, int]:
    """The layers up to the last BatchNorm, and their number of channels."""
    rank, channels = len(shape.stem_kernel), shape.stem_channels
    stem = CONVOLUTIONS[rank](
        in_channels,
        channels,
        shape.stem_kernel,
        stride=shape.stem_stride,
        padding=tuple(k // 2 for k in shape.stem_kernel),
        bias=False,
    )
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv0=stem,
        norm0=BATCH_NORMS[rank](channels),
        relu0=nn.ReLU(inplace=True),
        pool0=MAX_POOLS[rank](3, stride=shape.pool_stride, padding=1),
    )
    for i, layers in enumerate(shape.blocks):
        parts[f"denseblock{i + 1}"] = block = DenseBlock(
            channels,
            layers=layers,
            growth=shape.growth,
            bottleneck=shape.bottleneck,
            drop_rate=drop_rate,
            rank=rank,
        )
        channels = block.out_channels
        if i + 1 < len(shape.blocks):  # a transition of T3D gives other widths than half, so each is asked
            parts[f"transition{i + 1}"] = gap = transition(channels, i)
            channels = cast(int, gap.out_channels)
    parts["norm5"] = BATCH_NORMS[rank](channels)
    return nn.Sequential(parts), channels


def densenet(
    *, depth: int, num_classes: int = 1000, in_frames: int = 1, drop_rate: float = 0.0, dropout: float = 0.0
) -> DenseNet:
    """DenseNet for images of 224x224.

    Args:
        drop_rate: dropout on every dense layer's new maps.
        dropout: before the classifier.
    """
    spec = InputSpec.square(224, frames=in_frames, frame_stride=1)
    shape = DenseShape(blocks=BLOCKS[depth])
    return DenseNet(shape, num_classes=num_classes, input_spec=spec, drop_rate=drop_rate, dropout=dropout)


# 7,978,856 parameters at 1000 classes, features of 1024: the teacher of the T3D paper
densenet_121 = variant("densenet_121", densenet, dims="2d", paper=PAPER, fixed={"depth": 121})
# 14,149,480 parameters, features of 1664
densenet_169 = variant("densenet_169", densenet, dims="2d", paper=PAPER, fixed={"depth": 169})
