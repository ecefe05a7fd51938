"""CaffeNet, and LRCN's hybrid of it with the Zeiler-Fergus network: the image networks of the 2014-15 video papers.

* ``caffenet``: the single-column AlexNet of Caffe (Krizhevsky et al. 2012; BVLC reference network, pooling before
  normalisation), the frame network of Beyond Short Snippets and others.
* ``caffenet_hybrid``: the frame network of LRCN (Donahue et al., arXiv 1411.4389; layers as in
  LisaAnne/lisa-caffe-public, examples/LRCN_activity_recognition): a 7x7/2 first layer as in Zeiler and Fergus, and
  grouped convolutions as in CaffeNet. 13 x 13 maps, 6 x 6 after the last pooling.

ImageNet weights of neither ship with a package; a state dict in these names loads with ``pretrained=FILE``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.layers import Conv2d, PooledClassifier, ReluLinear
from cliplift.models.protocol import InputSpec, ModelError
from cliplift.models.registry import variant

FC_WIDTH = 4096
GRID = 6  # side of the last map for 227 pixels


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One convolution with ReLU; ``pool`` adds Caffe's 3x3/2 maximum (rounding up), ``norm`` local response."""

    width: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    pool: bool = False
    norm: bool = False


CAFFENET = (
    Layer(width=96, kernel=11, stride=4, pool=True, norm=True),
    Layer(width=256, kernel=5, padding=2, groups=2, pool=True, norm=True),
    Layer(width=384, kernel=3, padding=1),
    Layer(width=384, kernel=3, padding=1, groups=2),
    Layer(width=256, kernel=3, padding=1, groups=2, pool=True),
)
HYBRID = (
    Layer(width=96, kernel=7, stride=2, pool=True, norm=True),
    Layer(width=384, kernel=5, stride=2, groups=2, pool=True, norm=True),
    Layer(width=512, kernel=3, padding=1),
    Layer(width=512, kernel=3, padding=1, groups=2),
    Layer(width=384, kernel=3, padding=1, groups=2, pool=True),
)


def convolution(in_channels: int, layer: Layer) -> nn.Sequential:
    """Convolution, ReLU, then pooling and normalisation where the layer has them."""
    stages: list[nn.Module] = [
        Conv2d(
            in_channels,
            layer.width,
            layer.kernel,
            stride=layer.stride,
            padding=layer.padding,
            groups=layer.groups,
        ),
        nn.ReLU(inplace=True),
    ]
    if layer.pool:
        stages.append(nn.MaxPool2d(3, stride=2, ceil_mode=True))
    if layer.norm:
        # Caffe divides alpha by the window as PyTorch does
        stages.append(nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0))
    return nn.Sequential(*stages)


class CaffeNet(PooledClassifier):
    """(B, 3, H, W) -> (B, K).

    Args:
        layers: the convolutions.
        fully_connected: layers of 4096 before the classifier, which say where the features are read: 2 for fc6 and
            fc7, 1 for fc6 alone (LRCN), 0 for the convolutions alone, whose map is then averaged.
        dropout: after each fully connected layer.

    Inputs of another size than 227 are brought to the 6 x 6 grid by averaging, as torchvision's AlexNet does; at 227
    pixels that changes nothing.
    """

    input_dims = 4

    def __init__(
        self,
        *,
        layers: tuple[Layer, ...],
        num_classes: int = 1000,
        in_frames: int = 1,
        fully_connected: Literal[0, 1, 2] = 2,
        dropout: float = 0.5,
    ) -> None:
        if fully_connected not in (0, 1, 2):
            raise ModelError(f"fully_connected={fully_connected!r} must be 0, 1 or 2")
        spec, width = InputSpec.square(227, frames=in_frames, frame_stride=1), layers[-1].width
        features = FC_WIDTH if fully_connected else width
        super().__init__(feature_dim=features, num_classes=num_classes, input_spec=spec, dropout=dropout)
        self.map_dim = width
        widths = [3, *(layer.width for layer in layers)]
        self.conv = nn.ModuleList(convolution(c, layer) for c, layer in zip(widths, layers, strict=False))
        sizes = [width * GRID * GRID, *[FC_WIDTH] * fully_connected]
        self.fc = nn.ModuleList(ReluLinear(a, b) for a, b in pairwise(sizes))
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H', W'), the last map after its pooling; 6 x 6 for 227 pixels."""
        for block in self.conv:
            x = block(x)
        return x

    def pool_map(self, maps: Tensor) -> Tensor:
        """(B, C, H', W') -> (B, D): through the fully connected layers, dropout between them."""
        if not len(self.fc):
            return maps.mean(dim=(2, 3))
        if maps.shape[2:] != (GRID, GRID):
            maps = F.adaptive_avg_pool2d(maps, GRID)
        x = maps.flatten(1)
        for i, layer in enumerate(self.fc):
            x = F.relu(layer(x if i == 0 else self.head_dropout(x)))
        return x

    def checkpoint_blocks(self) -> list[str]:
        return [f"conv.{i}" for i in range(len(self.conv))]


# 60,965,224 parameters at 1000 classes, features of 4096 (fc7; fc6 with ``fully_connected=1``)
caffenet = variant(
    "caffenet", CaffeNet, dims="2d", paper="Krizhevsky et al. 2012, BVLC", fixed={"layers": CAFFENET}
)
# The frame network of LRCN, features of 4096; dropout 0.9 as released
caffenet_hybrid = variant(
    "caffenet_hybrid",
    CaffeNet,
    dims="2d",
    paper="Donahue et al. 2015, LRCN",
    fixed={"layers": HYBRID},
    dropout=0.9,
)
