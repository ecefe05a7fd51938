"""Inception3D: GoogLeNet with BatchNorm and 3D kernels, the T3D paper's comparison row.

Source: the T3D authors' release (MohsenFayyaz89/T3D, models/inception3d.py), which follows Szegedy et al., arXiv
1409.4842, Table 1, with 5x5 kernels as two 3x3. As released it cannot classify: the last 1x1x1 convolution is padded
and nothing is pooled after it (44,800 numbers for 400 classes and 32x224x224). Here the classifier stands after global
pooling; on an unpadded map this is the released convolution averaged over its positions, so its weights load.

``padding="aligned"`` (default) halves the map to 112, 56, 28, 14, 7; ``padding="released"`` keeps the file's padded
1x1x1 convolution and unpadded pooling in the stem (18 frames and 57 pixels inside, with borders made of biases).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from cliplift.models.layers import Conv3d, PooledClassifier
from cliplift.models.protocol import InputSpec, check_choices
from cliplift.models.registry import variant

Padding = Literal["aligned", "released"]
# 1x1; 3x3 reduce, 3x3; 5x5 reduce, 5x5; pool projection: arXiv 1409.4842, Table 1
MODULES: dict[str, tuple[int, int, int, int, int, int]] = {
    "a3": (64, 96, 128, 16, 32, 32),
    "b3": (128, 128, 192, 32, 96, 64),
    "a4": (192, 96, 208, 16, 48, 64),
    "b4": (160, 112, 224, 24, 64, 64),
    "c4": (128, 128, 256, 24, 64, 64),
    "d4": (112, 144, 288, 32, 64, 64),
    "e4": (256, 160, 320, 32, 128, 128),
    "a5": (256, 160, 320, 32, 128, 128),
    "b5": (384, 192, 384, 48, 128, 128),
}


def _unit(
    in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, padding: int
) -> list[nn.Module]:
    """Convolution (with bias, as released), BN, ReLU."""
    conv = Conv3d(in_channels, out_channels, kernel, stride=stride, padding=padding)
    return [conv, nn.BatchNorm3d(out_channels), nn.ReLU(inplace=True)]


class InceptionModule(nn.Module):
    """Four branches, concatenated: 1; 1-3; 1-3-3; pool-1."""

    def __init__(self, in_channels: int, widths: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pooled = widths
        self.b1 = nn.Sequential(*_unit(in_channels, one, 1, padding=0))
        self.b2 = nn.Sequential(
            *_unit(in_channels, reduce3, 1, padding=0), *_unit(reduce3, three, 3, padding=1)
        )
        self.b3 = nn.Sequential(
            *_unit(in_channels, reduce5, 1, padding=0),
            *_unit(reduce5, five, 3, padding=1),
            *_unit(five, five, 3, padding=1),
        )
        self.b4 = nn.Sequential(
            nn.MaxPool3d(3, stride=1, padding=1), *_unit(in_channels, pooled, 1, padding=0)
        )
        self.out_channels = one + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T, H, W)."""
        return torch.cat([self.b1(x), self.b2(x), self.b3(x), self.b4(x)], dim=1)


class Inception3D(PooledClassifier):
    """(B, C, T, H, W) -> (B, K), any T, H, W.

    Args:
        padding: "aligned", maps of 112, 56, 28, 14, 7, or "released", the authors' file.
        dropout: before the classifier.
    """

    def __init__(
        self,
        *,
        num_classes: int = 400,
        in_frames: int = 32,
        padding: Padding = "aligned",
        dropout: float = 0.0,
    ) -> None:
        check_choices(Padding, padding=padding)
        spec = InputSpec.square(224, frames=in_frames, frame_stride=2)
        super().__init__(feature_dim=1024, num_classes=num_classes, input_spec=spec, dropout=dropout)
        conv_pad, pool_pad = (0, (0, 1, 1)) if padding == "aligned" else (1, 0)
        self.pre_layers = nn.Sequential(
            *_unit(spec.channels, 64, 3, stride=2, padding=1),
            nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=pool_pad),
            *_unit(64, 64, 1, padding=conv_pad),
            *_unit(64, 192, 3, padding=1),
            nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=pool_pad),
        )
        channels = 192
        for name, widths in MODULES.items():
            module = InceptionModule(channels, widths)
            self.add_module(name, module)
            channels = module.out_channels
        self.maxpool3 = nn.MaxPool3d(3, stride=2, padding=1)
        # the released 2x2x2 pooling is padded and would turn 14 into 8
        aligned = padding == "aligned"
        self.maxpool4 = nn.MaxPool3d(2, stride=2, padding=0 if aligned else 1, ceil_mode=aligned)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 1024, T/8, H/32, W/32)."""
        x = self.pre_layers(x)
        for name in MODULES:
            if name == "a4":
                x = self.maxpool3(x)
            elif name == "a5":
                x = self.maxpool4(x)
            x = self.get_submodule(name)(x)
        return x

    def checkpoint_blocks(self) -> list[str]:
        return ["pre_layers", *MODULES]

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """The released classifier is a 1x1x1 convolution called ``convF``; ours is linear."""
        if "convF.weight" not in state:
            return state, []
        renamed = {key.replace("convF.", "classifier."): value for key, value in state.items()}
        renamed["classifier.weight"] = renamed["classifier.weight"].flatten(1)
        return renamed, ["read the convolution convF as the linear classifier"]


# 14,643,696 parameters at 400 classes
inception3d = variant("inception3d", Inception3D, paper="Diba et al. 2017")
