"""P3D-ResNet, the P3D author's later network: pseudo-3D in all four stages, T reduced in the stem only.

Source: ZhaofanQiu/Optimization-Planning-for-3D-ConvNets (Qiu et al., ICML 2021), model/p3d_resnet.py, after P3D,
arXiv 1711.10305. Not the 2017 network of :mod:`cliplift.models.conv3d.p3d`: strides are on the 1x3x3
(torchvision's layout), and with S = 1x3x3, T = 3x1x1 the middle of the bottleneck is

    A   ReLU(BN(T(S(x))))                   one BN after both
    B   ReLU(BN(S(x) + T(x)))               one BN on the sum
    C   ReLU(s + T(s)), s = ReLU(BN(S(x)))  no BN on T, no 0.5

in the order A, B, C, A, ... over all blocks. The stem is ``early_stride`` x 7 x 7 with that stride in time and no
padding there. The weights are named as in torchvision's ResNet, with ``conv2_t`` for T.
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.conv3d.p3d import Arrangement
from cliplift.models.image.resnet import LAYERS, STAGE_WIDTHS, StagedNet, shortcut
from cliplift.models.layers import Conv3d
from cliplift.models.protocol import InputSpec, ModelError, check_choices
from cliplift.models.registry import variant

PAPER = "Qiu et al. 2021"
EXPANSION = 4


class PseudoBottleneck(nn.Module):
    """1x1x1 - {S, T} - 1x1x1 in arrangement "a", "b" or "c"."""

    def __init__(self, in_channels: int, width: int, *, arrangement: str, stride: int) -> None:
        super().__init__()
        space, out = (1, stride, stride), width * EXPANSION
        self.conv1 = Conv3d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = Conv3d(width, width, (1, 3, 3), stride=space, padding=(0, 1, 1), bias=False)
        # in B, T sees the input of S and so needs its stride
        t_stride = space if arrangement == "b" else (1, 1, 1)
        self.conv2_t = Conv3d(width, width, (3, 1, 1), stride=t_stride, padding=(1, 0, 0), bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = Conv3d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(out)
        self.downsample = shortcut(in_channels, out, stride=space, rank=3)
        self.arrangement = arrangement

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 4 * width, T, H/stride, W/stride)."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn3(self.conv3(self._space_time(y)))
        return F.relu(y + self.downsample(x), inplace=True)

    def _space_time(self, x: Tensor) -> Tensor:
        """(B, width, T, H, W) -> (B, width, T, H/stride, W/stride)."""
        if self.arrangement == "a":
            y = self.bn2(self.conv2_t(self.conv2(x)))
        elif self.arrangement == "b":
            y = self.bn2(self.conv2(x) + self.conv2_t(x))
        else:
            s = F.relu(self.bn2(self.conv2(x)), inplace=True)
            y = s + self.conv2_t(s)
        return F.relu(y, inplace=True)


class P3DResNet(StagedNet):
    """(B, C, T, H, W) -> (B, K) for T a multiple of ``early_stride``. Map: (B, 2048, T/early_stride, H/32, W/32).

    Args:
        layers: blocks of each stage.
        arrangement: "abc" alternates; "a", "b" and "c" are the pure networks.
        early_stride: kernel and stride of the stem in time.
        dropout: before the classifier.
    """

    def __init__(
        self,
        *,
        layers: tuple[int, ...],
        num_classes: int = 400,
        in_frames: int = 16,
        arrangement: Arrangement = "abc",
        early_stride: int = 4,
        dropout: float = 0.5,
    ) -> None:
        check_choices(Arrangement, arrangement=arrangement)
        if early_stride < 1:
            raise ModelError(f"early_stride={early_stride} must be at least 1")
        spec = InputSpec.square(224, frames=in_frames, frame_stride=1, test_clips=20, test_crops=3)
        width = STAGE_WIDTHS[-1] * EXPANSION
        super().__init__(feature_dim=width, num_classes=num_classes, input_spec=spec, dropout=dropout)
        self.early_stride = early_stride
        self._check_frames(in_frames)
        self.conv1 = Conv3d(
            3, 64, (early_stride, 7, 7), stride=(early_stride, 2, 2), padding=(0, 3, 3), bias=False
        )
        self.bn1 = nn.BatchNorm3d(64)
        self.maxpool = nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
        letters = itertools.cycle(arrangement)  # not restarted at a new stage

        def block(in_channels: int, width: int, *, stride: int) -> nn.Module:
            return PseudoBottleneck(in_channels, width, arrangement=next(letters), stride=stride)

        self.add_stages(layers, block, channels=64, expansion=EXPANSION)
        self.reset_classifier(num_classes)

    def check_input(self, x: Tensor) -> None:
        super().check_input(x)
        self._check_frames(x.shape[2])

    def _check_frames(self, frames: int) -> None:
        if frames < self.early_stride or frames % self.early_stride:
            raise ModelError(
                f"in_frames={frames} must be a multiple of early_stride={self.early_stride}: the stem does not "
                f"pad in time and would drop {frames % self.early_stride} frames"
            )

    def adapt_2d_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A torchvision ResNet's weights, plus T: the identity in A, zero in B and C (the author's initialisation).

        The network then computes what the 2D one does.
        """
        new = dict(state)
        for name, block in self.named_modules():
            if isinstance(block, PseudoBottleneck):
                kernel = block.conv2_t.weight.detach().new_zeros(block.conv2_t.weight.shape)
                new[f"{name}.conv2_t.weight"] = nn.init.dirac_(kernel) if block.arrangement == "a" else kernel
        return new


# Parameters at 400 classes of the first and the last: 28,128,272; 68,858,896
p3d_resnet50 = variant("p3d_resnet50", P3DResNet, paper=PAPER, fixed={"layers": LAYERS[50]})
p3d_resnet101 = variant("p3d_resnet101", P3DResNet, paper=PAPER, fixed={"layers": LAYERS[101]})
p3d_resnet152 = variant("p3d_resnet152", P3DResNet, paper=PAPER, fixed={"layers": LAYERS[152]})
