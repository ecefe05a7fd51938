"""C3D: eight 3x3x3 convolutions and two fully connected layers.

Paper: Tran et al., "Learning Spatiotemporal Features with 3D Convolutional Networks", arXiv 1412.0767, Fig. 3. The
last pooling is padded by one in space, as in the authors' Caffe release, so that 112x112 gives 4x4 before fc6. A
comparison row of the T3D and P3D papers. No BatchNorm.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.layers import Conv3d, PooledClassifier, ReluLinear
from cliplift.models.protocol import InputSpec
from cliplift.models.registry import variant

FC6_MAP = (1, 4, 4)  # (T, H, W) that fc6 was built for
# Fig. 3: the widths of each stage's convolutions; a max pooling of stride 2 follows each
STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))


def _pool(stage: int) -> nn.MaxPool3d:
    """The pooling after stage 1 leaves T alone; Caffe's pooling rounds up."""
    window = (1, 2, 2) if stage == 1 else (2, 2, 2)
    padding = (0, 1, 1) if stage == len(STAGES) else (0, 0, 0)
    return nn.MaxPool3d(window, stride=window, padding=padding, ceil_mode=True)


class C3D(PooledClassifier):
    """(B, C, T, H, W) -> (B, K); the features are fc7's 4096.

    Other sizes than 16x112x112 are averaged to fc6's 1x4x4 map, which leaves the published size untouched.

    Args:
        width: of fc6 and fc7.
        dropout: after fc6 and fc7.
    """

    head_name = "fc8"

    def __init__(
        self, *, num_classes: int = 487, in_frames: int = 16, width: int = 4096, dropout: float = 0.5
    ) -> None:
        spec = InputSpec.square(112, frames=in_frames, frame_stride=1)
        super().__init__(feature_dim=width, num_classes=num_classes, input_spec=spec, dropout=dropout)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels = spec.channels
        for i, widths in enumerate(STAGES, start=1):
            for letter, out in zip("ab", widths, strict=False):
                layer = f"{i}{letter if len(widths) > 1 else ''}"
                layers[f"conv{layer}"] = Conv3d(channels, out, 3, padding=1)
                layers[f"relu{layer}"] = nn.ReLU(inplace=True)
                channels = out
            layers[f"pool{i}"] = _pool(i)
        self.features = nn.Sequential(layers)
        positions = FC6_MAP[0] * FC6_MAP[1] * FC6_MAP[2]
        self.fc6 = ReluLinear(channels * positions, width)
        self.fc6_dropout = nn.Dropout(dropout)
        self.fc7 = ReluLinear(width, width)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 512, T/16, H', W'), pool5."""
        return cast(Tensor, self.features(x))

    def forward_pooled(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 4096), fc7 after its ReLU."""
        self.check_input(x)
        x = F.adaptive_avg_pool3d(self.forward_features(x), FC6_MAP).flatten(1)
        x = self.fc6_dropout(F.relu(self.fc6(x), inplace=True))
        return F.relu(self.fc7(x), inplace=True)

    def checkpoint_blocks(self) -> list[str]:
        return [f"features.{name}" for name, _ in self.features.named_children() if name.startswith("conv")]


# 79,991,015 parameters at 487 classes (Sports-1M), 78,409,573 at 101
c3d = variant("c3d", C3D, paper="Tran et al. 2015")
