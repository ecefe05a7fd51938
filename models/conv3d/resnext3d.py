"""ResNeXt3D: bottlenecks whose 3x3x3 convolution is split into 32 groups.

Paper: Hara et al., "Can Spatiotemporal 3D CNNs Retrace the History of 2D CNNs and ImageNet?", arXiv 1711.09577, Fig. 3
and Table 1; the split is that of Xie et al., arXiv 1611.05431. Weights named as in kenshohara/3D-ResNets-PyTorch
(``resnext-101-kinetics.pth``, ``resnext-101-64f-kinetics.pth`` and their fine-tuned versions), whose keys carry the
prefix ``module.``. Shortcuts are projections where shapes change (option B), as in those files.

The input is what those weights were trained on: values of 0 to 255 minus the mean of ActivityNet, not divided by a
standard deviation. Written for pixels scaled to [0, 1], that is a standard deviation of 1/255.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from cliplift.models.image.resnet import LAYERS, Bottleneck, StagedNet
from cliplift.models.layers import Conv3d
from cliplift.models.protocol import InputSpec, ModelError
from cliplift.models.registry import variant
from cliplift.models.state_dicts import rename_numbered_children
from cliplift.models.streams import flow_from_rgb, stream_spec

PAPER = "Hara et al. 2018"
CARDINALITY = 32
STAGE_WIDTHS = (128, 256, 512, 1024)  # of the grouped convolution: 32 groups of 4, 8, 16, 32
ACTIVITYNET_MEAN = (114.7748 / 255, 107.7354 / 255, 99.4750 / 255)
UNDIVIDED = 1 / 255


class GroupedBottleneck(Bottleneck):
    """1x1x1 - 3x3x3 in groups - 1x1x1, each with BN, and the shortcut."""

    expansion = 2

    def __init__(
        self, in_channels: int, width: int, *, stride: int = 1, cardinality: int = CARDINALITY
    ) -> None:
        if width % cardinality:
            raise ModelError(f"cardinality={cardinality} must divide every stage's width, here {width}")
        super().__init__(in_channels, width, stride=stride, rank=3, layout="torchvision", groups=cardinality)


class ResNeXt3D(StagedNet):
    """(B, C, T, H, W) -> (B, K), any T, H, W. The last map is (B, 2048, T/16, H/32, W/32), sizes rounded up.

    ``pretrained="2d:PATH"`` takes an image ResNeXt-101 32x4d under torchvision's names: the widths are the same.

    Args:
        depth: 50 layers or more.
        in_frames: the public weights exist for 64 frames and for 16.
        in_channels: 3, or 2 for the flow stream.
        cardinality: groups of the 3x3x3 convolutions; 32 is the paper's.
        dropout: before the classifier.
    """

    def __init__(
        self,
        *,
        depth: int,
        num_classes: int = 400,
        in_frames: int = 64,
        in_channels: int = 3,
        cardinality: int = CARDINALITY,
        dropout: float = 0.0,
    ) -> None:
        if cardinality < 1:
            raise ModelError(f"cardinality={cardinality} must be at least 1")
        rgb = InputSpec.square(
            112, frames=in_frames, frame_stride=1, mean=ACTIVITYNET_MEAN, std=(UNDIVIDED,) * 3
        )
        spec = stream_spec(rgb, in_channels, flow_std=UNDIVIDED)
        expansion = GroupedBottleneck.expansion
        width = STAGE_WIDTHS[-1] * expansion
        super().__init__(feature_dim=width, num_classes=num_classes, input_spec=spec, dropout=dropout)
        self.conv1 = Conv3d(spec.channels, 64, 7, stride=(1, 2, 2), padding=3, bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        self.maxpool = nn.MaxPool3d(3, stride=2, padding=1)
        block = partial(GroupedBottleneck, cardinality=cardinality)
        self.add_stages(LAYERS[depth], block, channels=64, widths=STAGE_WIDTHS, expansion=expansion)
        self.reset_classifier(num_classes)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """The public files' names are ours once ``module.`` is off, which loading does; LTM's are translated."""
        notes = []
        if "features.0.weight" in state:
            # the children of the public network, relu and maxpool included
            children = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
            state = rename_numbered_children(state, children, head="fc")
            notes = ["took LateTemporalModeling3DCNN's names"]
        state, more = flow_from_rgb(state, ("conv1.weight",), in_channels=self.input_spec.channels)
        return state, notes + more


# 48,340,816 parameters at 400 classes
resnext3d_101 = variant("resnext3d_101", ResNeXt3D, paper=PAPER, fixed={"depth": 101})
