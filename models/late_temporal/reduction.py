"""FRMB and FRAB: one block that brings a backbone's features to the width the temporal head can afford.

Paper: Kalfaoglu et al., arXiv 2008.01232, section 3.2 and Figure 2. A one-layer BERT has 3 million parameters at 512
channels and 50 million at ResNeXt's 2048. So

* FRMB, "modified block": the backbone's last block is replaced by one with fewer outputs; its weights are lost;
* FRAB, "additional block": the backbone stays, and the same block follows it.

The block is of the backbone's own kind: a bottleneck with as many groups as the backbone's (32 in ResNeXt, 1 in
SlowFast), or for I3D an Inception module.

Shape letters: B clips, C channels, T' H' W' the feature map.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.conv3d.i3d import Mixed
from cliplift.models.protocol import ModelError, VideoNetwork

Reduction = Literal["none", "frmb", "frab"]


class FanInConv3d(nn.Conv3d):
    """Kaiming-normal weights by fan-in, as the public code initialises these blocks."""

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ReducingBottleneck(nn.Module):
    """1x1x1 to half, 3x3x3, 1x1x1 to ``out_channels``, each with BN, and a projected shortcut.

    For ResNeXt-101: 2048 -> 256 -> 256 (32 groups) -> 512.
    """

    def __init__(self, in_channels: int, out_channels: int, *, groups: int) -> None:
        super().__init__()
        middle = out_channels // 2
        if out_channels < 2 or out_channels % 2 or middle % groups:
            raise ModelError(
                f"reduced_channels={out_channels} must be a multiple of {2 * groups}: half of it goes into "
                f"{groups} groups"
            )
        self.conv1 = FanInConv3d(in_channels, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(middle)
        self.conv2 = FanInConv3d(middle, middle, 3, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm3d(middle)
        self.conv3 = FanInConv3d(middle, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(out_channels)
        self.downsample = nn.Sequential(
            FanInConv3d(in_channels, out_channels, 1, bias=False), nn.BatchNorm3d(out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T', H', W') -> (B, out_channels, T', H', W')."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x), inplace=True)


def reducing_inception(in_channels: int, out_channels: int) -> Mixed:
    """An Inception module in the published proportions: 192 | 96 -> 192 | 24 -> 64 | pooling -> 64, which is 512."""
    if out_channels % 64 or out_channels < 64:
        raise ModelError(
            f"reduced_channels={out_channels} must be a multiple of 64 after an Inception module"
        )
    unit = out_channels // 64
    return Mixed(in_channels, (24 * unit, 12 * unit, 24 * unit, 3 * unit, 8 * unit, 8 * unit))


def reducing_block(like: nn.Module, in_channels: int, out_channels: int) -> nn.Module:
    """A block from ``in_channels`` to ``out_channels`` of the kind of ``like``, a backbone's last block."""
    if isinstance(like, Mixed):
        return reducing_inception(in_channels, out_channels)
    groups = max(layer.groups for layer in _convolutions(like))
    return ReducingBottleneck(in_channels, out_channels, groups=groups)


def replace_block(backbone: nn.Module, name: str, out_channels: int) -> nn.Module:
    """FRMB: replace the submodule ``name`` by a reducing block, and return that.

    Raises:
        ModelError: that block has a stride, and a reducing block has none.
    """
    old = backbone.get_submodule(name)
    layers = _convolutions(old)
    if any(set(layer.stride) != {1} for layer in layers):
        raise ModelError(
            f"reduction='frmb': the last block of {type(backbone).__name__} ({name}) has a stride, and the block in "
            "its place would not; use reduction='frab'"
        )
    new = reducing_block(old, layers[0].in_channels, out_channels)
    parent, _, leaf = name.rpartition(".")
    setattr(backbone.get_submodule(parent), leaf, new)
    return new


def last_block(backbone: VideoNetwork) -> str:
    """Name of the backbone's last block: the last that activation checkpointing may wrap."""
    return backbone.checkpoint_blocks()[-1]


def _convolutions(block: nn.Module) -> list[nn.Conv3d]:
    layers = [layer for layer in block.modules() if isinstance(layer, nn.Conv3d)]
    if not layers:
        raise ModelError(f"feature reduction needs a 3D convolutional backbone, not {type(block).__name__}")
    return layers
