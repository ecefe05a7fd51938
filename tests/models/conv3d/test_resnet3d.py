"""ResNet and ResNet3D: published counts and names, one block against its formula, temporal transitions inside."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cliplift.models import ModelError, create_model
from cliplift.models.conv3d.t3d import TemporalTransition
from cliplift.models.image.resnet import BasicBlock, Bottleneck
from cliplift.models.measure import measure_model

# torchvision's published parameters and GFLOPS (its "GFLOPS" are multiply-accumulates)
TORCHVISION = [
    ("resnet_50", 25_557_032, 4.09),
    ("resnet_101", 44_549_160, 7.80),
    ("resnet_152", 60_192_808, 11.51),
]


@pytest.mark.parametrize(("name", "parameters", "gmacs"), TORCHVISION)
def test_resnet_is_torchvisions(name: str, parameters: int, gmacs: float) -> None:
    measured = measure_model(name)
    assert measured.parameters == parameters
    assert measured.gmacs == pytest.approx(gmacs, rel=0.01)
    assert measured.feature_shape == (2048, 7, 7)


def test_resnet3d_18_has_the_parameters_of_r3d_18() -> None:
    """torchvision's r3d_18: 33,371,472 at 400 classes, with a stem of depth 3."""
    assert measure_model("resnet3d_18", stem_depth=3).parameters == 33_371_472


def test_caffes_layout_moves_the_stride_and_rounds_the_pooling_up() -> None:
    with torch.device("meta"):
        ours = create_model("resnet_50", layout="caffe")
    block = ours.get_submodule("layer2.0")
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))
    assert (ours.maxpool.padding, ours.maxpool.ceil_mode) == (0, True)
    with pytest.raises(ModelError, match="layout='keras'"):
        create_model("resnet_50", layout="keras")


def scrambled(block: nn.Module) -> nn.Module:
    for part in block.modules():
        if isinstance(part, nn.BatchNorm2d | nn.BatchNorm3d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.2)
    return block.double().eval()


def folded(x: torch.Tensor, conv: nn.Module, bn: nn.Module, *, stride: int, padding: int) -> torch.Tensor:
    """Convolution with BatchNorm folded into its weights."""
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    kernel = conv.weight * scale.view(-1, *[1] * (conv.weight.ndim - 1))
    function = F.conv2d if x.ndim == 4 else F.conv3d
    return function(x, kernel, bn.bias - bn.running_mean * scale, stride=stride, padding=padding)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("layout", ["torchvision", "caffe"])
def test_a_bottleneck_is_its_formula(layout: str, rank: int) -> None:
    torch.manual_seed(0)
    block = scrambled(Bottleneck(6, 4, stride=2, rank=rank, layout=layout))
    x = torch.randn(2, 6, *(6, 7, 8)[:rank], dtype=torch.float64)
    first, second = (2, 1) if layout == "caffe" else (1, 2)
    y = folded(x, block.conv1, block.bn1, stride=first, padding=0).relu()
    y = folded(y, block.conv2, block.bn2, stride=second, padding=1).relu()
    y = folded(y, block.conv3, block.bn3, stride=1, padding=0)
    y = y + folded(x, block.downsample[0], block.downsample[1], stride=2, padding=0)
    torch.testing.assert_close(block(x), y.relu(), rtol=1e-10, atol=1e-10)


def test_a_basic_block_is_its_formula() -> None:
    torch.manual_seed(0)
    block = scrambled(BasicBlock(4, 4, stride=1, rank=3, layout="torchvision"))
    x = torch.randn(2, 4, 3, 5, 6, dtype=torch.float64)
    y = folded(x, block.conv1, block.bn1, stride=1, padding=1).relu()
    y = folded(y, block.conv2, block.bn2, stride=1, padding=1) + x
    torch.testing.assert_close(block(x), y.relu(), rtol=1e-10, atol=1e-10)


def test_temporal_transitions_work_outside_densenet() -> None:
    """The T3D paper's claim: the layer goes between the stages of another 3D network."""
    seen: dict[str, tuple[int, ...]] = {}
    with torch.device("meta"):
        model = create_model("resnet3d_18", ttl=True, num_classes=5)
        ttls = [n for n, m in model.named_modules() if isinstance(m, TemporalTransition)]
        for name in (*ttls, "layer1", "layer2", "layer3", "layer4"):
            part = model.get_submodule(name)
            part.register_forward_hook(lambda _, __, y, name=name: seen.__setitem__(name, tuple(y.shape[1:])))
        assert model(torch.empty(2, 3, 16, 112, 112)).shape == (2, 5)
    assert ttls == ["between1", "between2", "between3"]
    assert seen == {
        "layer1": (64, 8, 28, 28),
        "between1": (384, 8, 28, 28),
        "layer2": (128, 4, 14, 14),
        "between2": (384, 4, 14, 14),
        "layer3": (256, 2, 7, 7),
        "between3": (384, 2, 7, 7),
        "layer4": (512, 1, 4, 4),
    }
    kernels = [[tuple(b.conv.kernel_size) for b in model.get_submodule(n).branches] for n in ttls]
    assert kernels == [[(1, 1, 1), (3, 3, 3), (d, 3, 3)] for d in (6, 4, 4)]
    assert set(ttls) <= set(model.checkpoint_blocks())


def test_a_resnet3d_with_temporal_transitions_trains() -> None:
    torch.manual_seed(0)
    model = create_model("resnet3d_18", ttl=True, ttl_width=8, num_classes=2)
    loss = F.cross_entropy(model(torch.randn(2, 3, 8, 32, 32)), torch.tensor([0, 1]))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n.endswith("conv.weight"))


def test_stem_options_are_checked() -> None:
    with pytest.raises(ModelError, match="stem_depth=4 must be odd"):
        create_model("resnet3d_18", stem_depth=4)
