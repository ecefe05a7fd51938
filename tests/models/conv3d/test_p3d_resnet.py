"""P3D-ResNet (2021): counts, the three blocks against their formulae, and the 2D start."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models import ModelError, create_model
from cliplift.models.conv3d.p3d_resnet import P3DResNet, PseudoBottleneck
from cliplift.models.measure import measure_model

# Counted on the author's code, 400 classes: name, early_stride, parameters, GMAC at 16x160x160
PUBLISHED = [
    ("p3d_resnet50", 4, 28_128_272, 10.32),
    ("p3d_resnet152", 4, 68_858_896, 28.15),
    ("p3d_resnet50", 1, 28_100_048, None),
    ("p3d_resnet152", 1, 68_830_672, None),
]


@pytest.mark.parametrize(("name", "early_stride", "parameters", "gmacs"), PUBLISHED)
def test_parameters_and_cost(name: str, early_stride: int, parameters: int, gmacs: float | None) -> None:
    measured = measure_model(name, crop=160, early_stride=early_stride)
    assert measured.parameters == parameters
    assert measured.feature_shape == (2048, 16 // early_stride, 5, 5)
    if gmacs is not None:
        assert measured.gmacs == pytest.approx(gmacs, rel=0.01)


def norm(x: Tensor, bn: nn.BatchNorm3d) -> Tensor:
    shape = (1, -1, 1, 1, 1)
    scale = bn.weight / torch.sqrt(bn.running_var + 1e-5)
    return x * scale.view(shape) + (bn.bias - bn.running_mean * scale).view(shape)


def pointwise(x: Tensor, kernel: Tensor) -> Tensor:
    return torch.einsum("bcthw,oc->bothw", x, kernel[:, :, 0, 0, 0])


def spatial(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    windows = F.pad(x, (1, 1, 1, 1)).unfold(3, 3, stride).unfold(4, 3, stride)
    return torch.einsum("bcthwjk,ocjk->bothw", windows, kernel[:, :, 0])


def temporal(x: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    windows = F.pad(x[..., ::stride, ::stride], (0, 0, 0, 0, 1, 1)).unfold(2, 3, 1)
    return torch.einsum("bcthwi,oci->bothw", windows, kernel[:, :, :, 0, 0])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("arrangement", ["a", "b", "c"])
def test_a_block_is_its_formula(arrangement: str, stride: int) -> None:
    torch.manual_seed(0)
    block = PseudoBottleneck(6, 4, arrangement=arrangement, stride=stride).double().eval()
    for part in block.modules():
        if isinstance(part, nn.BatchNorm3d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.2)
    x = torch.randn(2, 6, 5, 7, 8, dtype=torch.float64)
    y = norm(pointwise(x, block.conv1.weight), block.bn1).relu()
    s = spatial(y, block.conv2.weight, stride)
    if arrangement == "a":
        middle = norm(temporal(s, block.conv2_t.weight), block.bn2).relu()
    elif arrangement == "b":
        middle = norm(s + temporal(y, block.conv2_t.weight, stride), block.bn2).relu()
    else:
        s = norm(s, block.bn2).relu()
        middle = (s + temporal(s, block.conv2_t.weight)).relu()
    y = norm(pointwise(middle, block.conv3.weight), block.bn3)
    shortcut = norm(pointwise(x[..., ::stride, ::stride], block.downsample[0].weight), block.downsample[1])
    torch.testing.assert_close(block(x), (y + shortcut).relu(), rtol=1e-10, atol=1e-10)


def test_the_arrangement_counts_over_all_four_stages() -> None:
    with torch.device("meta"):
        blocks = [m for m in create_model("p3d_resnet50").modules() if isinstance(m, PseudoBottleneck)]
    assert "".join(b.arrangement for b in blocks) == ("abc" * 6)[:16]


def test_weights_are_named_as_in_torchvision_plus_time() -> None:
    with torch.device("meta"):
        flat, deep = create_model("resnet_50").state_dict(), create_model("p3d_resnet50").state_dict()
    extra = set(deep) - set(flat)
    assert set(flat) <= set(deep)
    assert extra == {f"layer{s}.{i}.conv2_t.weight" for s, n in enumerate((3, 4, 6, 3), 1) for i in range(n)}


def test_frames_the_stem_would_drop_are_refused() -> None:
    with pytest.raises(ModelError, match="in_frames=18 must be a multiple of early_stride=4"):
        create_model("p3d_resnet50", in_frames=18)
    model = P3DResNet(layers=(1, 1, 1, 1), num_classes=2, in_frames=8, dropout=0.0)
    with pytest.raises(ModelError, match="would drop 2 frames"):
        model(torch.randn(1, 3, 10, 32, 32))
    assert model(torch.randn(2, 3, 12, 32, 40)).shape == (2, 2)
    with pytest.raises(ModelError, match="early_stride=0"):
        create_model("p3d_resnet50", early_stride=0)
    with pytest.raises(ModelError, match="arrangement='ac'"):
        create_model("p3d_resnet50", arrangement="ac")
