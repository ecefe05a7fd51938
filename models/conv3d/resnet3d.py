"""ResNet3D: the residual network with 3x3x3 kernels, optionally with T3D's temporal transition layers.

Paper: Hara et al., "Can Spatiotemporal 3D CNNs Retrace the History of 2D CNNs and ImageNet?", arXiv 1711.09577,
Table 1; weights named as in kenshohara/3D-ResNets-PyTorch. A comparison row of the T3D paper.

``ttl=True`` puts a temporal transition layer after each of the first three stages, which is the T3D paper's claim that
the layer is not tied to DenseNet (arXiv 1711.08200, section 3.1). It does not pool: ResNet's stages have strides.
"""

from __future__ import annotations

from torch import nn

from cliplift.models.conv3d.t3d import TABLE_1_DEPTHS, TemporalTransition
from cliplift.models.image.resnet import STAGE_WIDTHS, ResNet
from cliplift.models.layers import Conv3d
from cliplift.models.protocol import InputSpec, ModelError
from cliplift.models.registry import variant

PAPER = "Hara et al. 2018"


def resnet3d(
    *,
    depth: int,
    num_classes: int = 400,
    in_frames: int = 16,
    stem_depth: int = 7,
    stem_stride: int = 1,
    stem_pool: bool = True,
    ttl: bool = False,
    ttl_width: int = 128,
    dropout: float = 0.0,
) -> ResNet:
    """ResNet3D for any T, H, W.

    Args:
        stem_depth: frames under the first kernel (7; torchvision's r3d_18 has 3 and no pooling).
        stem_stride: its stride in time.
        stem_pool: the max pooling 3x3x3, stride 2, after it.
        ttl: temporal transition layers after the first three stages, ``ttl_width`` channels per branch.
        dropout: before the classifier.
    """
    if stem_depth < 1 or stem_depth % 2 == 0 or stem_stride < 1:
        raise ModelError(f"stem_depth={stem_depth} must be odd and stem_stride={stem_stride} at least 1")

    def transition(channels: int, index: int) -> nn.Module:
        return TemporalTransition(channels, depths=TABLE_1_DEPTHS[index], width=ttl_width, pooling=False)

    return ResNet(
        depth,
        stem=Conv3d(
            3,
            STAGE_WIDTHS[0],
            (stem_depth, 7, 7),
            stride=(stem_stride, 2, 2),
            padding=(stem_depth // 2, 3, 3),
            bias=False,
        ),
        pool=nn.MaxPool3d(3, stride=2, padding=1) if stem_pool else nn.Identity(),
        num_classes=num_classes,
        input_spec=InputSpec.square(112, frames=in_frames, frame_stride=2),
        between=transition if ttl else None,
        dropout=dropout,
    )


# 33,371,472 parameters at 400 classes with ``stem_depth=3``
resnet3d_18 = variant("resnet3d_18", resnet3d, paper=PAPER, fixed={"depth": 18})
resnet3d_34 = variant("resnet3d_34", resnet3d, paper=PAPER, fixed={"depth": 34})
resnet3d_50 = variant("resnet3d_50", resnet3d, paper=PAPER, fixed={"depth": 50})
