"""ResNeXt3D-101: published counts and sizes, a grouped block against its formula, names, inflation, the flow stream."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models import ModelError, create_model
from cliplift.models.conv3d.resnext3d import GroupedBottleneck
from cliplift.models.factory import load_pretrained
from cliplift.models.inflate import inflate
from cliplift.models.measure import measure_model

BLOCKS = (3, 4, 23, 3)
WIDTHS = (128, 256, 512, 1024)


def test_published_counts_and_sizes() -> None:
    """47,625,715 at 51 classes, 38.27 GMAC (arXiv 2008.01232, Table 1: 47.63 M; its flops count BN as well)."""
    measured = measure_model("resnext3d_101", num_classes=51)
    assert measured.parameters == 47_625_715
    assert measured.gmacs == pytest.approx(38.27, abs=0.01)
    assert measured.input_shape == (3, 64, 112, 112)
    assert measured.feature_shape == (2048, 4, 4, 4)
    assert measured.feature_dim == 2048


def test_the_maps_shrink_as_published() -> None:
    seen: dict[str, tuple[int, ...]] = {}
    with torch.device("meta"):
        model = create_model("resnext3d_101", num_classes=51)
        for name in ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            part = model.get_submodule(name)
            part.register_forward_hook(lambda _, __, y, name=name: seen.__setitem__(name, tuple(y.shape[1:])))
        model(torch.empty(1, 3, 64, 112, 112))
    assert seen == {
        "conv1": (64, 64, 56, 56),
        "maxpool": (64, 32, 28, 28),
        "layer1": (256, 32, 28, 28),
        "layer2": (512, 16, 14, 14),
        "layer3": (1024, 8, 7, 7),
        "layer4": (2048, 4, 4, 4),
    }


def published_shapes(classes: int) -> dict[str, tuple[int, ...]]:
    """resnext-101-64f-kinetics.pth as its network's definition gives it, behind DataParallel's prefix."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7, 7)}

    def norm(name: str, channels: int) -> None:
        shapes.update({f"{name}.{t}": (channels,) for t in ("weight", "bias", "running_mean", "running_var")})

    norm("bn1", 64)
    inside = 64
    for stage, (count, width) in enumerate(zip(BLOCKS, WIDTHS, strict=True), start=1):
        for i in range(count):
            block, outside = f"layer{stage}.{i}", 2 * width
            shapes[f"{block}.conv1.weight"] = (width, inside, 1, 1, 1)
            shapes[f"{block}.conv2.weight"] = (width, width // 32, 3, 3, 3)
            shapes[f"{block}.conv3.weight"] = (outside, width, 1, 1, 1)
            for n, channels in ((1, width), (2, width), (3, outside)):
                norm(f"{block}.bn{n}", channels)
            if i == 0:  # option B: always projected, the first stage too, since 64 != 256
                shapes[f"{block}.downsample.0.weight"] = (outside, inside, 1, 1, 1)
                norm(f"{block}.downsample.1", outside)
            inside = outside
    return {
        f"module.{k}": v for k, v in (shapes | {"fc.weight": (classes, 2048), "fc.bias": (classes,)}).items()
    }


def uninitialised(**options: int) -> nn.Module:
    """The net with memory but without initial values, which takes a second."""
    with torch.device("meta"):
        model = create_model("resnext3d_101", **options)
    return model.to_empty(device="cpu")


def test_the_public_file_loads(tmp_path: Path) -> None:
    """A file of its names, shapes and wrapping. Written before num_batches_tracked existed, so without it."""
    shapes = published_shapes(400)
    # one number stands for each tensor, so that the file stays small
    tensors = {
        n: torch.tensor(float(i)).expand(shape) for i, (n, shape) in enumerate(shapes.items(), start=1)
    }
    path = tmp_path / "resnext-101-64f-kinetics.pth"
    torch.save({"epoch": 100, "arch": "resnext-101", "state_dict": tensors, "optimizer": {}}, path)
    model = uninitialised()
    report = load_pretrained(model, path)
    assert report.loaded == len(shapes)
    loaded = model.state_dict()
    for name, value in tensors.items():
        ours = loaded[name.removeprefix("module.")]
        assert torch.equal(ours, value), name
    missing = {k for k in loaded if f"module.{k}" not in tensors}
    assert all(k.endswith("num_batches_tracked") for k in missing)


def test_late_temporals_names_are_read() -> None:
    """``features`` is a Sequential of the children, relu (2) and maxpool (3) counted; ``fc_action`` the classifier."""
    with torch.device("meta"):
        model = create_model("resnext3d_101", num_classes=51)
        state = model.state_dict()
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    numbered = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        numbered[f"features.{numbers[part]}.{rest}" if part in numbers else f"fc_action.{rest}"] = value
    renamed, notes = model.adapt_state_dict(numbered)
    assert renamed.keys() == state.keys()
    assert all(renamed[key] is state[key] for key in state)
    assert notes


def normalised(x: Tensor, bn: nn.Module) -> Tensor:
    view = (1, -1, 1, 1, 1)
    centred = (x - bn.running_mean.view(view)) / (bn.running_var.view(view) + bn.eps).sqrt()
    return centred * bn.weight.view(view) + bn.bias.view(view)


@pytest.mark.parametrize(("in_channels", "stride"), [(16, 1), (6, 2)])
def test_a_block_is_its_formula(in_channels: int, stride: int) -> None:
    """The grouped convolution is four convolutions side by side on two channels each."""
    torch.manual_seed(0)
    block = GroupedBottleneck(in_channels, 8, stride=stride, cardinality=4)
    for part in block.modules():
        if isinstance(part, nn.BatchNorm3d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.5, 2)
            nn.init.normal_(part.bias, 0, 0.2)
    block = block.double().eval()
    x = torch.randn(2, in_channels, 4, 5, 6, dtype=torch.float64)
    y = torch.einsum("bcthw,oc->bothw", x, block.conv1.weight.flatten(1))
    y = normalised(y, block.bn1).relu()
    parts = [
        F.conv3d(group, kernel, stride=stride, padding=1)
        for group, kernel in zip(y.split(2, dim=1), block.conv2.weight.split(2), strict=True)
    ]
    y = normalised(torch.cat(parts, dim=1), block.bn2).relu()
    y = normalised(torch.einsum("bcthw,oc->bothw", y, block.conv3.weight.flatten(1)), block.bn3)
    kept = x
    if stride == 2:
        taken = x[:, :, ::2, ::2, ::2]
        kept = torch.einsum("bcthw,oc->bothw", taken, block.downsample[0].weight.flatten(1))
        kept = normalised(kept, block.downsample[1])
    torch.testing.assert_close(block(x), (y + kept).relu(), rtol=1e-10, atol=1e-10)


def test_an_image_resnext_of_the_same_widths_is_inflated() -> None:
    """torchvision's and timm's ResNeXt-101 32x4d has these names and widths; every kernel finds its place."""
    model = uninitialised(num_classes=0)
    flat = {}
    for key, value in model.state_dict().items():
        kernel = value.ndim == 5
        flat[key] = torch.tensor(2.0).expand(*value.shape[:2], *value.shape[3:]) if kernel else value.clone()
    report = inflate(model, flat)
    assert report.fresh == report.unused == ()
    stem = model.state_dict()["conv1.weight"]
    assert stem[:, :, 3].eq(2).all()
    assert stem.sum() == stem[:, :, 3].sum()


def test_the_flow_stream() -> None:
    """Two planes, of 8 bits, minus 127.5 and not divided: what the public flow weights were trained on."""
    measured = measure_model("resnext3d_101", num_classes=51, in_channels=2)
    assert measured.parameters == 47_625_715 - 64 * 7**3
    with torch.device("meta"):
        spec = create_model("resnext3d_101", in_channels=2).input_spec
    low, high = ((v - spec.mean[0]) / spec.std[0] for v in (0.0, 1.0))
    assert (low, high) == pytest.approx((-127.5, 127.5))


def test_bad_input_is_refused() -> None:
    with torch.device("meta"):
        with pytest.raises(ModelError, match="cardinality=48 must divide every stage's width, here 128"):
            create_model("resnext3d_101", cardinality=48)
        with pytest.raises(ModelError, match="cardinality=0"):
            create_model("resnext3d_101", cardinality=0)
        with pytest.raises(ModelError, match="in_channels=1"):
            create_model("resnext3d_101", in_channels=1)
        with pytest.raises(ModelError, match="C=3"):
            create_model("resnext3d_101")(torch.empty(1, 2, 16, 32, 32))
