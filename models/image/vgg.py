"""VGG-16 (Simonyan and Zisserman, ICLR 2015, arXiv 1409.1556, column D): images to classes, and its five percepts.

Torchvision's weights load by ``pretrained=FILE``: their ``classifier.0``, ``.3`` and ``.6`` are fc6, fc7 and the
classifier here. Images of another size than 224 are averaged to fc6's 7 x 7 grid, as in torchvision.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.layers import Conv2d, PooledClassifier, ReluLinear
from cliplift.models.protocol import InputSpec
from cliplift.models.registry import variant
from cliplift.models.state_dicts import rename_prefixes

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # Table 1, column D
GRID = 7  # side of the last map for 224 pixels
FC_WIDTH = 4096
TORCHVISION = {"classifier.0.": "fc6.", "classifier.3.": "fc7.", "classifier.6.": "classifier."}


class VGG16(PooledClassifier):
    """``forward(x)``: (B, 3, H, W) -> (B, K); features are fc7's 4096."""

    input_dims = 4

    def __init__(self, *, num_classes: int = 1000, in_frames: int = 1, dropout: float = 0.5) -> None:
        spec = InputSpec.square(224, frames=in_frames, frame_stride=1)
        super().__init__(feature_dim=FC_WIDTH, num_classes=num_classes, input_spec=spec, dropout=dropout)
        layers: list[nn.Module] = []
        channels = 3
        for widths in STAGES:
            for width in widths:
                layers += [Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.map_dim = channels  # of pool5; the features are as wide as fc7
        self.fc6 = ReluLinear(channels * GRID * GRID, FC_WIDTH)
        self.fc7 = ReluLinear(FC_WIDTH, FC_WIDTH)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> pool5 (B, 512, H/32, W/32)."""
        return cast(Tensor, self.features(x))

    def percepts(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> pool2, pool3, pool4, pool5 (B, D, H', W') and fc7 (B, 4096, 1, 1)."""
        self.check_input(x)
        pools = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                pools.append(x)
        return [*pools[1:], self.pool_map(x)[..., None, None]]

    def pool_map(self, maps: Tensor) -> Tensor:
        """pool5 (N, 512, H', W') -> fc7 (N, 4096)."""
        x = F.adaptive_avg_pool2d(maps, GRID).flatten(1)
        x = self.head_dropout(F.relu(self.fc6(x)))
        return F.relu(self.fc7(x))

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Torchvision's names to these."""
        if "classifier.0.weight" not in state:
            return state, []
        return rename_prefixes(state, TORCHVISION), [
            "renamed torchvision's classifier.0, .3 and .6 to fc6, fc7 and classifier"
        ]

    def checkpoint_blocks(self) -> list[str]:
        """The convolutions; a ReLU in place may not be recomputed on its own."""
        return [f"features.{i}" for i, layer in enumerate(self.features) if isinstance(layer, Conv2d)]


# 138,357,544 parameters at 1000 classes
vgg16 = variant("vgg16", VGG16, dims="2d", paper="arXiv 1409.1556")
