"""ResNet for images, and the residual blocks of ResNet3D.

Paper: He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, Table 1. The weights are named as
in torchvision and timm. Two layouts are in circulation:

* ``layout="torchvision"`` (default): a bottleneck's stride is on its 3x3 convolution, the stem's pooling is padded;
* ``layout="caffe"``: the authors' release, stride on the first 1x1 and an unpadded pooling that rounds up. It is the
  network P3D (2017) was initialised from.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, Protocol, cast

from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.layers import BATCH_NORMS, CONVOLUTIONS, Conv2d, PooledClassifier
from cliplift.models.protocol import InputSpec, check_choices
from cliplift.models.registry import variant

PAPER = "He et al. 2016"
Layout = Literal["torchvision", "caffe"]
LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
STAGE_WIDTHS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """3x3 - 3x3, each with BN, and the shortcut (18 and 34 layers). ``rank`` 3 makes them 3x3x3."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, *, stride: int, rank: int, layout: Layout) -> None:
        super().__init__()
        conv, norm = CONVOLUTIONS[rank], BATCH_NORMS[rank]
        self.conv1 = conv(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, padding=1, bias=False)
        self.bn2 = norm(width)
        self.downsample = shortcut(in_channels, width, stride=stride, rank=rank)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, width, T/stride, H/stride, W/stride); without the T in 2D."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1 - 3x3 - 1x1, each with BN, and the shortcut (50 layers and more). ResNeXt's 3x3 is in ``groups``."""

    expansion = 4

    def __init__(
        self, in_channels: int, width: int, *, stride: int, rank: int, layout: Layout, groups: int = 1
    ) -> None:
        super().__init__()
        conv, norm = CONVOLUTIONS[rank], BATCH_NORMS[rank]
        first, second = (stride, 1) if layout == "caffe" else (1, stride)
        self.conv1 = conv(in_channels, width, 1, stride=first, bias=False)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, stride=second, padding=1, groups=groups, bias=False)
        self.bn2 = norm(width)
        self.conv3 = conv(width, width * self.expansion, 1, bias=False)
        self.bn3 = norm(width * self.expansion)
        self.downsample = shortcut(in_channels, width * self.expansion, stride=stride, rank=rank)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, expansion * width, T/stride, H/stride, W/stride); without the T in 2D."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x), inplace=True)


def shortcut(
    in_channels: int,
    out_channels: int,
    *,
    stride: int | tuple[int, int, int],
    rank: int,
    norm: Callable[[int], nn.Module] | None = None,
) -> nn.Module:
    """The identity where shapes agree, else a strided 1x1 convolution with BN (option B of the paper)."""
    if stride in (1, (1, 1, 1)) and in_channels == out_channels:
        return nn.Identity()
    projection = CONVOLUTIONS[rank](in_channels, out_channels, 1, stride=stride, bias=False)
    return nn.Sequential(projection, (norm or BATCH_NORMS[rank])(out_channels))


class BlockBuilder(Protocol):
    """Builds one residual block."""

    def __call__(self, in_channels: int, width: int, *, stride: int) -> nn.Module: ...


class StagedNet(PooledClassifier):
    """Four stages of residual blocks, ``layer1`` to ``layer4``; the first block of all but the first has stride 2."""

    head_name = "fc"
    conv1: nn.Module
    bn1: nn.Module
    maxpool: nn.Module

    def add_stages(
        self,
        counts: tuple[int, ...],
        block: BlockBuilder,
        *,
        channels: int,
        widths: tuple[int, ...] = STAGE_WIDTHS,
        expansion: int = 1,
        between: Callable[[int, int], nn.Module] | None = None,
    ) -> None:
        """Build the stages of blocks that give ``width * expansion`` channels.

        ``between(channels, index)`` builds a layer after stage ``index`` (0, 1, 2) with an ``out_channels`` attribute.
        """
        for stage, (count, width) in enumerate(zip(counts, widths, strict=True), start=1):
            blocks = []
            for i in range(count):
                blocks.append(block(channels, width, stride=2 if stage > 1 and i == 0 else 1))
                channels = width * expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            if between is not None and stage < len(counts):
                layer = between(channels, stage - 1)
                self.add_module(f"between{stage}", layer)
                channels = cast(int, layer.out_channels)

    def run_stages(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> the last stage's map."""
        for name, stage in self.named_children():
            if name.startswith(("layer", "between")):
                x = stage(x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D, T', H', W'); without the T in 2D. For nets with ResNet's stem."""
        return self.run_stages(self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True)))

    def checkpoint_blocks(self) -> list[str]:
        names: list[str] = []
        for name, stage in self.named_children():
            if name.startswith("layer"):
                names += [f"{name}.{i}" for i, _ in enumerate(stage.children())]
            elif name.startswith("between"):
                names.append(name)
        return names


class ResNet(StagedNet):
    """ResNet of any rank.

    Args:
        depth: 18, 34, 50, 101 or 152.
        stem: the first convolution; its BN, ReLU and the pooling follow.
        pool: the pooling after the stem.
        between: layers between the stages, see :meth:`StagedNet.add_stages`; None for the plain network.
    """

    def __init__(
        self,
        depth: int,
        *,
        stem: nn.Conv2d | nn.Conv3d,
        pool: nn.Module,
        num_classes: int,
        input_spec: InputSpec,
        layout: Layout = "torchvision",
        between: Callable[[int, int], nn.Module] | None = None,
        dropout: float = 0.0,
    ) -> None:
        check_choices(Layout, layout=layout)
        block = BasicBlock if depth < 50 else Bottleneck
        width = STAGE_WIDTHS[-1] * block.expansion
        super().__init__(feature_dim=width, num_classes=num_classes, input_spec=input_spec, dropout=dropout)
        rank = len(stem.kernel_size)
        self.input_dims = rank + 2
        self.conv1, self.bn1, self.maxpool = stem, BATCH_NORMS[rank](stem.out_channels), pool
        self.add_stages(
            LAYERS[depth],
            partial(block, rank=rank, layout=layout),
            channels=stem.out_channels,
            expansion=block.expansion,
            between=between,
        )
        self.reset_classifier(num_classes)


def resnet(
    *,
    depth: int,
    num_classes: int = 1000,
    in_frames: int = 1,
    layout: Layout = "torchvision",
    dropout: float = 0.0,
) -> ResNet:
    """ResNet for images of 224x224, features of 2048.

    Args:
        layout: "torchvision" or "caffe"; see the module's docstring.
        dropout: before the classifier.
    """
    pool = (
        nn.MaxPool2d(3, stride=2, ceil_mode=True)
        if layout == "caffe"
        else nn.MaxPool2d(3, stride=2, padding=1)
    )
    return ResNet(
        depth,
        stem=Conv2d(3, STAGE_WIDTHS[0], 7, stride=2, padding=3, bias=False),
        pool=pool,
        num_classes=num_classes,
        input_spec=InputSpec.square(224, frames=in_frames, frame_stride=1),
        layout=layout,
        dropout=dropout,
    )


# Parameters at 1000 classes: 25,557,032; 44,549,160; 60,192,808
resnet_50 = variant("resnet_50", resnet, dims="2d", paper=PAPER, fixed={"depth": 50})
resnet_101 = variant("resnet_101", resnet, dims="2d", paper=PAPER, fixed={"depth": 101})
resnet_152 = variant("resnet_152", resnet, dims="2d", paper=PAPER, fixed={"depth": 152})
