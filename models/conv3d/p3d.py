"""P3D: residual networks whose 3x3x3 convolution is a 1x3x3 (S) and a 3x1x1 (T), in three arrangements.

Paper: Qiu et al., "Learning Spatio-Temporal Representation with Pseudo-3D Residual Networks", arXiv 1711.10305,
Figs. 2 and 3; the network as in the authors' Caffe files (ZhaofanQiu/pseudo-3d-residual-networks). A 1x1x1 convolution
reduces, S and T work at the reduced width, a 1x1x1 expands. With s = ReLU(BN(S(x))) and t(y) = BN(T(y)):

    block   ``wiring="official"`` (default)        ``wiring="port"``
    A       ReLU(t(s))                             the same
    B       ReLU(s + t(x))                         s + ReLU(t(x))
    C       ReLU(0.5 s + 0.5 t(s))                 s + ReLU(t(s))
    pool1   2x3x3, unpadded, rounding up           2x3x3, padded by 1 in space

"official" is what the authors' files compute (the paper's Fig. 3 has the same ReLU after the sum; only the files have
the 0.5). "port" is qijiezhao/pseudo-3d-pytorch, whose weights circulate: it has the right parameter count and computes
another function, so its weights need its wiring. The weights are named as in that port.

The blocks alternate A, B, C through res2 to res4 without a break between stages. T is halved four times, at pool1 and
after res2, res3 and res4; res5 is a plain 2D stage on what is left (one map for 16 frames). Here res5 has 1xkxk
kernels, so that 32 frames give two maps, averaged with everything else, where the port reads them as two clips.

The input is normalised as the port does it. The Caffe weights themselves were trained on BGR values of 0 to 255 minus
(104, 117, 123), without division.
"""

from __future__ import annotations

import itertools
import re
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.image.resnet import LAYERS, STAGE_WIDTHS, StagedNet, shortcut
from cliplift.models.layers import Conv3d
from cliplift.models.protocol import InputSpec, ModelError, check_choices
from cliplift.models.registry import variant

Wiring = Literal["official", "port"]
Arrangement = Literal["abc", "a", "b", "c"]
PAPER = "Qiu et al. 2017"
EXPANSION = 4
T_DIVISOR = 16  # pool1, 3a_pool, 4a_pool, res5a_pool


class PseudoBlock(nn.Module):
    """A P3D bottleneck of arrangement "a", "b" or "c". All of them have the same parameters."""

    def __init__(
        self, in_channels: int, width: int, *, arrangement: str, wiring: Wiring, stride: int
    ) -> None:
        super().__init__()
        # Caffe's ResNet: the stride is on the 1x1x1 reduction
        self.conv1 = Conv3d(in_channels, width, 1, stride=(1, stride, stride), bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.bn3 = nn.BatchNorm3d(width)
        self.conv4 = Conv3d(width, width * EXPANSION, 1, bias=False)
        self.bn4 = nn.BatchNorm3d(width * EXPANSION)
        self.downsample = shortcut(in_channels, width * EXPANSION, stride=(1, stride, stride), rank=3)
        self.arrangement = arrangement
        self.wiring = wiring

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 4 * width, T, H/stride, W/stride)."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn4(self.conv4(self._space_time(y)))
        return F.relu(y + self.downsample(x), inplace=True)

    def _space_time(self, x: Tensor) -> Tensor:
        """(B, width, T, H, W) -> the same shape; the table in the module's docstring."""
        s = F.relu(self.bn2(self.conv2(x)), inplace=True)
        t: Tensor = self.bn3(self.conv3(x if self.arrangement == "b" else s))
        if self.arrangement == "a":
            return F.relu(t, inplace=True)
        if self.wiring == "port":
            return s + F.relu(t, inplace=True)
        return F.relu(s + t if self.arrangement == "b" else 0.5 * (s + t), inplace=True)


class PlainBlock(nn.Module):
    """A 2D bottleneck of res5, with 1x1x1 and 1x3x3 kernels."""

    def __init__(self, in_channels: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = Conv3d(in_channels, width, 1, stride=(1, stride, stride), bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv_normal = Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.bn_normal = nn.BatchNorm3d(width)
        self.conv4 = Conv3d(width, width * EXPANSION, 1, bias=False)
        self.bn4 = nn.BatchNorm3d(width * EXPANSION)
        self.downsample = shortcut(in_channels, width * EXPANSION, stride=(1, stride, stride), rank=3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 4 * width, T, H/stride, W/stride)."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn_normal(self.conv_normal(y)), inplace=True)
        y = self.bn4(self.conv4(y))
        return F.relu(y + self.downsample(x), inplace=True)


class P3D(StagedNet):
    """(B, C, T, H, W) -> (B, K) for T a multiple of 16 and any H, W.

    Args:
        layers: blocks of res2 to res5, as in a ResNet.
        arrangement: "abc" alternates; "a", "b" and "c" are the paper's pure networks.
        wiring: "official", or "port" for the weights of the popular PyTorch port.
        dropout: before the classifier; 0.5 is the authors' for Kinetics RGB, 0.1 for Sports-1M.
    """

    def __init__(
        self,
        *,
        layers: tuple[int, ...],
        num_classes: int = 400,
        in_frames: int = 16,
        arrangement: Arrangement = "abc",
        wiring: Wiring = "official",
        dropout: float = 0.5,
    ) -> None:
        check_choices(Wiring, wiring=wiring)
        check_choices(Arrangement, arrangement=arrangement)
        check_frames(in_frames)
        spec, width = InputSpec.square(160, frames=in_frames, frame_stride=1), STAGE_WIDTHS[-1] * EXPANSION
        super().__init__(feature_dim=width, num_classes=num_classes, input_spec=spec, dropout=dropout)
        self.conv1_custom = Conv3d(3, 64, (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        self.maxpool = (
            nn.MaxPool3d((2, 3, 3), stride=2, ceil_mode=True)
            if wiring == "official"
            else nn.MaxPool3d((2, 3, 3), stride=2, padding=(0, 1, 1))
        )
        self.maxpool_2 = nn.MaxPool3d((2, 1, 1), stride=(2, 1, 1))
        letters = itertools.cycle(arrangement)  # not restarted at a new stage

        def block(in_channels: int, width: int, *, stride: int) -> nn.Module:
            if width == STAGE_WIDTHS[-1]:  # res5
                return PlainBlock(in_channels, width, stride=stride)
            return PseudoBlock(in_channels, width, arrangement=next(letters), wiring=wiring, stride=stride)

        self.add_stages(layers, block, channels=64, expansion=EXPANSION)
        self.reset_classifier(num_classes)

    def check_input(self, x: Tensor) -> None:
        super().check_input(x)
        check_frames(x.shape[2])

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 2048, T/16, H', W')."""
        x = self.maxpool(F.relu(self.bn1(self.conv1_custom(x)), inplace=True))
        x = self.maxpool_2(self.get_submodule("layer1")(x))  # 3a_pool
        x = self.maxpool_2(self.get_submodule("layer2")(x))  # 4a_pool
        x = self.maxpool_2(self.get_submodule("layer3")(x))  # res5a_pool
        return cast(Tensor, self.get_submodule("layer4")(x))

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """The port's res5 is made of 2D layers: its (O, I, k, k) kernels get a T of 1."""
        flat = [key for key, value in state.items() if key.startswith("layer4.") and value.ndim == 4]
        if not flat:
            return state, []
        full = {key: value.unsqueeze(2) if key in flat else value for key, value in state.items()}
        return full, [f"read {len(flat)} 2D kernels of res5 as 1xkxk"]

    def adapt_2d_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A ResNet's weights for this network; the exact counterpart is ``resnet_*(layout="caffe")``.

        S takes the 3x3 kernel. T starts as the identity in A and C, and as zero in B, so that the blocks compute
        what the 2D blocks do: C is 0.5 s + 0.5 t(s), and in the port's wiring, s + ReLU(t(s)), zero.
        """
        inside = re.compile(r"^layer[1-4]\.\d+\.(conv|bn)([23])\.")
        new: dict[str, Tensor] = {}
        for key, value in state.items():
            match = inside.match(key)
            new_key = key.replace("conv1.", "conv1_custom.") if key.startswith("conv1.") else key
            if match and match[2] == "3":
                new_key = key.replace(f".{match[1]}3.", f".{match[1]}4.")
            elif match and key.startswith("layer4."):
                new_key = key.replace(f".{match[1]}2.", f".{match[1]}_normal.")
            new[new_key] = value
        for name, block in self.named_modules():
            if isinstance(block, PseudoBlock):
                new.update({f"{name}.{key}": value for key, value in _neutral_time(block).items()})
        return new


def _neutral_time(block: PseudoBlock) -> dict[str, Tensor]:
    """conv3 and bn3 such that the block computes what the 2D bottleneck computes."""
    kernel = block.conv3.weight.detach().new_zeros(block.conv3.weight.shape)
    identity = block.arrangement == "a" or (block.arrangement == "c" and block.wiring == "official")
    if identity:
        nn.init.dirac_(kernel)
    scale = block.bn3.weight.detach().new_full(block.bn3.weight.shape, (1 + block.bn3.eps) ** 0.5)
    zeros = scale.new_zeros(scale.shape)
    return {
        "conv3.weight": kernel,
        "bn3.weight": scale,  # undoes eps: BN is the identity at mean 0, variance 1
        "bn3.bias": zeros,
        "bn3.running_mean": zeros.clone(),
        "bn3.running_var": zeros + 1,
        "bn3.num_batches_tracked": zeros.new_zeros((), dtype=torch.long),
    }


def check_frames(frames: int) -> None:
    """Raises ModelError unless T can be halved four times."""
    if frames < T_DIVISOR or frames % T_DIVISOR:
        raise ModelError(
            f"P3D halves T four times: in_frames={frames} must be a multiple of {T_DIVISOR} "
            f"(16 is the paper's; p3d_resnet50 takes other lengths)"
        )


# Parameters at 400 classes: 25,745,232; 48,088,400; 66,492,240
p3d_63 = variant("p3d_63", P3D, paper=PAPER, fixed={"layers": LAYERS[50]})
p3d_131 = variant("p3d_131", P3D, paper=PAPER, fixed={"layers": LAYERS[101]})
p3d_199 = variant("p3d_199", P3D, paper=PAPER, fixed={"layers": LAYERS[152]})
