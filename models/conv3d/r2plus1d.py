"""R(2+1)D: residual networks whose 3x3x3 convolution is a 1x3x3 over space followed by a 3x1x1 over time.

Paper: Tran et al., "A Closer Look at Spatiotemporal Convolutions for Action Recognition", arXiv 1711.11248, section
3.5 and Table 1; the IG65M weights are those of Ghadiyaram et al., arXiv 1905.00561. Named as in torchvision's
``VideoResNet``, which is what moabitcoin/ig65m-pytorch publishes the IG65M weights in; the original Caffe2 blobs
(facebookresearch/VMZ) are read as well, from a file that holds them as a mapping of names to tensors.

Between the two convolutions stand BN, ReLU and M channels, chosen so that both have the parameters of one 3x3x3:

    M = floor(27 * in * out / (9 * in + 3 * out))                                          (section 3.5, t = d = 3)

``mid_channels="convolution"`` takes that count from each convolution, as the paper and VMZ do; ``"block"`` takes it
from the block's first convolution for both, as torchvision does, which makes the second one of a downsampling block
narrower (230 for 288). The two differ in three blocks and do not exchange weights. The default is that of the weights
which are in circulation: "block" for 18 layers (torchvision), "convolution" for 34 (VMZ, IG65M).

``bn_momentum`` is PyTorch's weight of the new batch, 0.1. The IG65M port sets 0.9, which is Caffe2's weight of the
*old* average read in PyTorch's sense: its running statistics are almost those of the last batch. At test time both
give the same answer.

M: channels between the factors.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.image.resnet import LAYERS, STAGE_WIDTHS, StagedNet, shortcut
from cliplift.models.layers import Conv3d
from cliplift.models.protocol import InputSpec, ModelError, check_choices
from cliplift.models.registry import variant
from cliplift.models.state_dicts import CAFFE2_BLOB, CAFFE2_TENSORS, rename_numbered_children
from cliplift.models.streams import flow_from_rgb, stream_spec

MidChannels = Literal["block", "convolution"]
Norm = Callable[[int], nn.Module]
PAPER = "Tran et al. 2018"
STEM_MID = 45  # as released; the formula with the stem's 7x7 and 3 would give 83
KINETICS_MEAN = (0.43216, 0.394666, 0.37645)
KINETICS_STD = (0.22803, 0.22145, 0.216989)


def middle_channels(in_channels: int, out_channels: int) -> int:
    """M of the formula above: 144 for 64 -> 64, 230 for 64 -> 128, 288 for 128 -> 128."""
    return 27 * in_channels * out_channels // (9 * in_channels + 3 * out_channels)


class Factored(nn.Sequential):
    """1x3x3, BN, ReLU, 3x1x1: (B, in, T, H, W) -> (B, out, T/stride, H/stride, W/stride)."""

    def __init__(
        self, in_channels: int, out_channels: int, middle: int, *, stride: int = 1, norm: Norm
    ) -> None:
        space = Conv3d(
            in_channels, middle, (1, 3, 3), stride=(1, stride, stride), padding=(0, 1, 1), bias=False
        )
        time = Conv3d(middle, out_channels, (3, 1, 1), stride=(stride, 1, 1), padding=(1, 0, 0), bias=False)
        super().__init__(space, norm(middle), nn.ReLU(inplace=True), time)


class FactoredBlock(nn.Module):
    """Two factored convolutions, each with BN, and the shortcut."""

    def __init__(
        self, in_channels: int, width: int, *, stride: int, mid_channels: MidChannels, norm: Norm
    ) -> None:
        super().__init__()
        first = middle_channels(in_channels, width)
        second = first if mid_channels == "block" else middle_channels(width, width)
        self.conv1 = nn.Sequential(
            Factored(in_channels, width, first, stride=stride, norm=norm), norm(width), nn.ReLU(inplace=True)
        )
        self.conv2 = nn.Sequential(Factored(width, width, second, norm=norm), norm(width))
        self.downsample = shortcut(in_channels, width, stride=stride, rank=3, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, width, T/stride, H/stride, W/stride)."""
        return F.relu(self.conv2(self.conv1(x)) + self.downsample(x), inplace=True)


class R2Plus1D(StagedNet):
    """(B, C, T, H, W) -> (B, K), any T, H, W; features of 512.

    Args:
        depth: 18 or 34 layers.
        frame_stride: in the video, of the frames the weights were trained on.
        in_channels: 3, or 2 for the flow stream.
        mid_channels: the channels between the factors, counted per "block" (torchvision's weights) or "convolution".
        bn_eps: of every BN; VMZ's weights need 1e-3.
        bn_momentum: weight of the new batch in the running statistics.
        dropout: before the classifier.
    """

    def __init__(
        self,
        *,
        depth: int,
        frame_stride: int,
        num_classes: int = 400,
        in_frames: int = 16,
        in_channels: int = 3,
        mid_channels: MidChannels = "block",
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        dropout: float = 0.0,
    ) -> None:
        check_choices(MidChannels, mid_channels=mid_channels)
        if bn_eps <= 0 or not 0 < bn_momentum <= 1:
            raise ModelError(f"bn_eps={bn_eps} must be positive and bn_momentum={bn_momentum} in (0, 1]")
        rgb = InputSpec.square(
            112, frames=in_frames, frame_stride=frame_stride, mean=KINETICS_MEAN, std=KINETICS_STD
        )
        spec = stream_spec(rgb, in_channels)
        super().__init__(
            feature_dim=STAGE_WIDTHS[-1], num_classes=num_classes, input_spec=spec, dropout=dropout
        )
        self.depth = depth
        norm = partial(nn.BatchNorm3d, eps=bn_eps, momentum=bn_momentum)
        width = STAGE_WIDTHS[0]
        self.stem = nn.Sequential(
            Conv3d(spec.channels, STEM_MID, (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), bias=False),
            norm(STEM_MID),
            nn.ReLU(inplace=True),
            Conv3d(STEM_MID, width, (3, 1, 1), padding=(1, 0, 0), bias=False),
            norm(width),
            nn.ReLU(inplace=True),
        )
        block = partial(FactoredBlock, mid_channels=mid_channels, norm=norm)
        self.add_stages(LAYERS[depth], block, channels=width)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 512, T/8, H/16, W/16), sizes rounded up; 512x4x7x7 for 32x112x112."""
        return self.run_stages(self.stem(x))

    def checkpoint_blocks(self) -> list[str]:
        return ["stem", *super().checkpoint_blocks()]

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Torchvision's and the IG65M port's names are ours; VMZ's and LateTemporalModeling3DCNN's are read."""
        notes = []
        if "conv1_middle_w" in state:
            state, notes = _from_caffe2(state, LAYERS[self.depth]), ["took the names of VMZ's Caffe2 blobs"]
        elif "features.0.0.weight" in state:
            parts = ("stem", "layer1", "layer2", "layer3", "layer4")
            state = rename_numbered_children(state, parts, head="fc")
            notes = ["took LateTemporalModeling3DCNN's names"]
        state, more = flow_from_rgb(state, ("stem.0.weight",), in_channels=self.input_spec.channels)
        return state, notes + more

    def adapt_2d_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Raises ModelError: M is chosen for 3D, so no image network has these shapes."""
        raise ModelError(
            "R(2+1)D has no 2D counterpart: its 1x3x3 kernels have their own widths (144, 230, ...). "
            "Load video weights with pretrained=PATH, or start from scratch."
        )


_CAFFE2_STEM = {"conv1_middle": "0", "conv1_middle_spatbn_relu": "1", "conv1": "3", "conv1_spatbn_relu": "4"}
_CAFFE2_PART = re.compile(r"comp_(\d+)_(conv|spatbn)_([12])(_middle)?")
_CAFFE2_SHORTCUT = re.compile(r"shortcut_projection_(\d+)(_spatbn)?")


def _from_caffe2(state: dict[str, Tensor], counts: tuple[int, ...]) -> dict[str, Tensor]:
    """VMZ's blob names, whose blocks are numbered through all stages; unknown names stay and are refused later."""
    blocks = [f"layer{stage}.{i}" for stage, count in enumerate(counts, start=1) for i in range(count)]
    renamed = {}
    for key, value in state.items():
        match = CAFFE2_BLOB.fullmatch(key)
        module = _caffe2_module(match[1], blocks) if match else None
        is_linear = match is not None and match[1].startswith("last_out_L")
        if match is None or (module is None and not is_linear):
            renamed[key] = value
        elif is_linear:
            renamed["fc.weight" if match[2] == "w" else "fc.bias"] = value
        else:
            renamed[f"{module}.{CAFFE2_TENSORS[match[2]]}"] = value
    return renamed


def _caffe2_module(name: str, blocks: list[str]) -> str | None:
    if name in _CAFFE2_STEM:
        return f"stem.{_CAFFE2_STEM[name]}"
    part, shortcut = _CAFFE2_PART.fullmatch(name), _CAFFE2_SHORTCUT.fullmatch(name)
    found = part or shortcut
    if found is None or int(found[1]) >= len(blocks):
        return None
    block = blocks[int(found[1])]
    if part is None:
        return f"{block}.downsample.{'1' if found[2] else '0'}"
    inner = {"conv": ("0.0", "0.3"), "spatbn": ("0.1", "1")}[part[2]]
    return f"{block}.conv{part[3]}.{inner[0] if part[4] else inner[1]}"


# 31,505,325 parameters at 400 classes
r2plus1d_18 = variant("r2plus1d_18", R2Plus1D, paper=PAPER, fixed={"depth": 18, "frame_stride": 2})
# 63,676,142 parameters at the 359 classes of IG65M. Published are weights for 32 frames (359 and, fine-tuned, Kinetics'
# 400 classes) and for 8 (487 and 400); the defaults are those of these weights
r2plus1d_34 = variant(
    "r2plus1d_34",
    R2Plus1D,
    paper=PAPER,
    fixed={"depth": 34, "frame_stride": 1},
    num_classes=359,
    in_frames=32,
    mid_channels="convolution",
    bn_eps=1e-3,
)
