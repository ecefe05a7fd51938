"""2D weights in 3D networks: a clip of identical frames gives the 2D network's output."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cliplift.models import ModelError, create_model
from cliplift.models.conv3d.densenet3d import DenseNet3D
from cliplift.models.conv3d.p3d import P3D
from cliplift.models.image.densenet import DenseNet, DenseShape
from cliplift.models.inflate import inflate, inflate_kernel
from cliplift.models.protocol import InputSpec


def scrambled(model: nn.Module) -> nn.Module:
    """BatchNorm as after training, so that a forgotten statistic shows."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.1)
    return model.eval()


@pytest.mark.parametrize("depth", [1, 3, 4, 7])
def test_mean_inflation_is_the_2d_answer_on_identical_frames(depth: int) -> None:
    torch.manual_seed(0)
    kernel, image = torch.randn(4, 3, 3, 3, dtype=torch.float64), torch.randn(2, 3, 6, 7, dtype=torch.float64)
    clip = image.unsqueeze(2).expand(-1, -1, depth, -1, -1)
    for rule in ("mean", "centre"):
        inflated = inflate_kernel(kernel, depth, kernels=rule)
        answer = F.conv3d(clip, inflated, padding=(0, 1, 1))[:, :, 0]  # no padding in time: one output frame
        torch.testing.assert_close(answer, F.conv2d(image, kernel, padding=1), rtol=1e-12, atol=1e-12)


def test_mean_inflation_is_not_exact_at_the_ends_and_centre_is() -> None:
    """Zero padding in time: the reason for the default."""
    torch.manual_seed(0)
    kernel, image = torch.randn(2, 3, 3, 3), torch.randn(1, 3, 5, 5)
    clip, flat = image.unsqueeze(2).expand(-1, -1, 5, -1, -1), F.conv2d(image, kernel, padding=1)
    mean = F.conv3d(clip, inflate_kernel(kernel, 3, kernels="mean"), padding=1)
    centre = F.conv3d(clip, inflate_kernel(kernel, 3, kernels="centre"), padding=1)
    torch.testing.assert_close(
        mean[:, :, 1:4], flat.unsqueeze(2).expand(-1, -1, 3, -1, -1), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(mean[:, :, 0], flat * 2 / 3, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(centre, flat.unsqueeze(2).expand(-1, -1, 5, -1, -1), rtol=1e-4, atol=1e-5)


SPEC = InputSpec()


def densenets() -> tuple[nn.Module, nn.Module]:
    flat = DenseNet(DenseShape(blocks=(2, 2, 2), stem_channels=16), num_classes=0, input_spec=SPEC)
    shape = DenseShape(
        blocks=(2, 2, 2),
        stem_channels=16,
        stem_kernel=(3, 7, 7),
        stem_stride=(2, 2, 2),
        pool_stride=(1, 2, 2),
    )
    return flat, DenseNet3D(shape, num_classes=0, input_spec=SPEC)


def p3ds(arrangement: str) -> tuple[nn.Module, nn.Module]:
    flat = create_model("resnet_50", num_classes=0, layout="caffe")
    return flat, P3D(layers=(3, 4, 6, 3), num_classes=0, arrangement=arrangement)


PAIRS = {
    "densenet3d": densenets,
    "p3d abc": lambda: p3ds("abc"),
    "p3d c": lambda: p3ds("c"),
    "p3d_resnet": lambda: (
        create_model("resnet_50", num_classes=0),
        create_model("p3d_resnet50", num_classes=0),
    ),
    "resnet3d": lambda: (
        create_model("resnet_50", num_classes=0),
        create_model("resnet3d_50", num_classes=0),
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_identical_frames_give_the_2d_features(pair: str) -> None:
    torch.manual_seed(0)
    flat, deep = PAIRS[pair]()
    flat, deep = scrambled(flat), deep.eval()
    report = inflate(deep, flat.state_dict())
    assert report.fresh == report.unused == ()
    image = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        expected = flat(image)
        answer = deep(image.unsqueeze(2).expand(-1, -1, 16, -1, -1))
    # float32 through up to 50 layers: relative to the largest feature
    assert (answer - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_ports_wiring_starts_as_the_2d_blocks_too() -> None:
    """s + ReLU(t): T starts at zero in B and C. Block by block, since the port's pooling is not Caffe's."""
    torch.manual_seed(0)
    flat = scrambled(create_model("resnet_50", num_classes=0, layout="caffe"))
    deep = P3D(layers=(3, 4, 6, 3), num_classes=0, wiring="port").eval()
    inflate(deep, flat.state_dict())
    x = torch.randn(1, 64, 10, 10).relu()
    with torch.no_grad():
        expected = flat.get_submodule("layer2")(flat.get_submodule("layer1")(x))
        clip = x.unsqueeze(2).expand(-1, -1, 4, -1, -1)
        answer = deep.get_submodule("layer2")(deep.get_submodule("layer1")(clip))
    error = (answer - expected.unsqueeze(2)).abs().max()
    assert error < 1e-4 * expected.abs().max()


def test_what_stays_fresh_is_reported_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    flat, deep = (
        create_model("resnet_50", num_classes=10),
        create_model("resnet3d_50", ttl=True, num_classes=10),
    )
    head = deep.state_dict()["fc.weight"].clone()
    with caplog.at_level(logging.INFO):
        report = inflate(deep, flat.state_dict(), source="resnet.pth")
    assert {"fc.weight", "between1.branches.2.conv.weight", "layer2.0.conv1.weight"} <= set(report.fresh)
    assert torch.equal(deep.state_dict()["fc.weight"], head), "image classes are not clip classes"
    assert "conv1.weight" in report.inflated
    assert "fc.weight" in report.unused
    assert "resnet.pth" in caplog.text
    assert "between1.branches.2.conv.weight" in caplog.text


def test_weights_of_another_family_are_refused() -> None:
    deep = create_model("t3d_tiny", num_classes=2)
    with pytest.raises(ModelError, match="not weights of its 2D counterpart"):
        inflate(deep, create_model("resnet_50", num_classes=2).state_dict())
    with pytest.raises(ModelError, match="kernels='median'"):
        inflate_kernel(torch.zeros(1, 1, 3, 3), 3, kernels="median")
    with pytest.raises(ModelError, match="to depth 0"):
        inflate_kernel(torch.zeros(1, 1, 3, 3), 0)
