"""P3D: the authors' Caffe network as data, and its blocks against their formulae in both wirings."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models import ModelError, create_model
from cliplift.models.conv3d.p3d import P3D, PseudoBlock
from cliplift.models.measure import measure_model
from cliplift.models.state_dicts import load_state

PARAMETERS = [
    ("p3d_63", 101, 25_132_581),
    ("p3d_63", 400, 25_745_232),
    ("p3d_131", 400, 48_088_400),
    ("p3d_199", 400, 66_492_240),  # the sum over the released prototxt
    ("p3d_199", 487, 66_670_503),
]
# name, crop, 1e9 multiply-accumulates for 16 frames
GMACS = [
    ("p3d_63", 112, 4.19),
    ("p3d_63", 160, 8.44),
    ("p3d_63", 224, 16.55),
    ("p3d_131", 112, 6.38),
    ("p3d_131", 160, 12.90),
    ("p3d_199", 112, 9.07),
    ("p3d_199", 160, 18.40),
    ("p3d_199", 224, 36.07),
]
# The prototxt's blobs for P3D-199: (C, T, H, W); res5's T of 1 is dropped there
SIZES = {
    160: {
        "conv1_custom": (64, 16, 80, 80),
        "maxpool": (64, 8, 40, 40),
        "layer1": (256, 8, 40, 40),
        "layer2": (512, 4, 20, 20),
        "layer3": (1024, 2, 10, 10),
        "layer4": (2048, 1, 5, 5),
    },
    112: {
        "conv1_custom": (64, 16, 56, 56),
        "maxpool": (64, 8, 28, 28),
        "layer1": (256, 8, 28, 28),
        "layer2": (512, 4, 14, 14),
        "layer3": (1024, 2, 7, 7),
        "layer4": (2048, 1, 4, 4),
    },
}


@pytest.mark.parametrize(("name", "classes", "parameters"), PARAMETERS)
def test_parameter_counts(name: str, classes: int, parameters: int) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(("name", "crop", "gmacs"), GMACS)
def test_cost(name: str, crop: int, gmacs: float) -> None:
    assert measure_model(name, crop=crop).gmacs == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize("wiring", ["official", "port"])
@pytest.mark.parametrize("crop", SIZES)
def test_sizes_of_the_released_network(crop: int, wiring: str) -> None:
    seen: dict[str, tuple[int, ...]] = {}
    with torch.device("meta"):
        model = create_model("p3d_199", wiring=wiring)
        for name in SIZES[crop]:
            part = model.get_submodule(name)
            part.register_forward_hook(lambda _, __, y, name=name: seen.__setitem__(name, tuple(y.shape[1:])))
        model(torch.empty(1, 3, 16, crop, crop))
    assert seen == SIZES[crop]


def test_the_arrangement_runs_on_across_stages() -> None:
    with torch.device("meta"):
        blocks = [m for m in create_model("p3d_199").modules() if isinstance(m, PseudoBlock)]
    letters = "".join(block.arrangement for block in blocks)
    assert letters == ("abc" * 16)[:47]
    assert (letters.count("a"), letters.count("b"), letters.count("c"), letters[-1]) == (16, 16, 15, "b")


@pytest.mark.parametrize("arrangement", ["a", "b", "c"])
def test_pure_networks_have_the_same_parameters(arrangement: str) -> None:
    with torch.device("meta"):
        model = create_model("p3d_63", arrangement=arrangement, num_classes=101)
    assert sum(p.numel() for p in model.parameters()) == 25_132_581
    assert {m.arrangement for m in model.modules() if isinstance(m, PseudoBlock)} == {arrangement}


def norm(x: Tensor, bn: nn.BatchNorm3d) -> Tensor:
    shape = (1, -1, 1, 1, 1)
    scale = bn.weight / torch.sqrt(bn.running_var + 1e-5)
    return x * scale.view(shape) + (bn.bias - bn.running_mean * scale).view(shape)


def pointwise(x: Tensor, kernel: Tensor) -> Tensor:
    return torch.einsum("bcthw,oc->bothw", x, kernel[:, :, 0, 0, 0])


def spatial(x: Tensor, kernel: Tensor) -> Tensor:
    windows = F.pad(x, (1, 1, 1, 1)).unfold(3, 3, 1).unfold(4, 3, 1)
    return torch.einsum("bcthwjk,ocjk->bothw", windows, kernel[:, :, 0])


def temporal(x: Tensor, kernel: Tensor) -> Tensor:
    windows = F.pad(x, (0, 0, 0, 0, 1, 1)).unfold(2, 3, 1)
    return torch.einsum("bcthwi,oci->bothw", windows, kernel[:, :, :, 0, 0])


def reference_block(x: Tensor, block: PseudoBlock, arrangement: str, wiring: str, stride: int) -> Tensor:
    """The released prototxt ("official") and the popular port, as equations."""
    strided = x[..., ::stride, ::stride]
    y = norm(pointwise(strided, block.conv1.weight), block.bn1).relu()
    s = norm(spatial(y, block.conv2.weight), block.bn2).relu()
    t = norm(temporal(y if arrangement == "b" else s, block.conv3.weight), block.bn3)
    middle = {
        ("a", "official"): t.relu(),
        ("b", "official"): (s + t).relu(),
        ("c", "official"): (0.5 * s + 0.5 * t).relu(),
        ("a", "port"): t.relu(),
        ("b", "port"): s + t.relu(),
        ("c", "port"): s + t.relu(),
    }[arrangement, wiring]
    y = norm(pointwise(middle, block.conv4.weight), block.bn4)
    return (y + norm(pointwise(strided, block.downsample[0].weight), block.downsample[1])).relu()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("wiring", ["official", "port"])
@pytest.mark.parametrize("arrangement", ["a", "b", "c"])
def test_a_block_is_its_formula(arrangement: str, wiring: str, stride: int) -> None:
    torch.manual_seed(0)
    block = PseudoBlock(6, 4, arrangement=arrangement, wiring=wiring, stride=stride)
    block = block.double().eval()
    for part in block.modules():
        if isinstance(part, nn.BatchNorm3d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.2)
    x = torch.randn(2, 6, 5, 7, 8, dtype=torch.float64)
    expected = reference_block(x, block, arrangement, wiring, stride)
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)
    other = reference_block(x, block, arrangement, "port" if wiring == "official" else "official", stride)
    assert (arrangement == "a") == torch.allclose(expected, other), "the wirings differ in B and C only"


def caffe_pool(x: Tensor) -> Tensor:
    """Caffe's max pooling 2x3x3, stride 2, pad 0: ceil((size - kernel) / 2) + 1 windows, the last ones cut off."""
    sizes = [math.ceil((n - k) / 2) + 1 for n, k in zip(x.shape[2:], (2, 3, 3), strict=True)]
    out = x.new_empty(*x.shape[:2], *sizes)
    for t in range(sizes[0]):
        for h in range(sizes[1]):
            for w in range(sizes[2]):
                window = x[:, :, 2 * t : 2 * t + 2, 2 * h : 2 * h + 3, 2 * w : 2 * w + 3]
                out[:, :, t, h, w] = window.amax((2, 3, 4))
    return out


@pytest.mark.parametrize("size", [8, 9])
def test_the_first_pooling_is_caffes(size: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, size, size)
    official = P3D(layers=(1, 1, 1, 1), num_classes=2)
    port = P3D(layers=(1, 1, 1, 1), num_classes=2, wiring="port")
    assert torch.equal(official.maxpool(x), caffe_pool(x))
    assert not torch.equal(port.maxpool(x)[..., :4, :4], caffe_pool(x)[..., :4, :4])


def small(**options: object) -> P3D:
    torch.manual_seed(0)
    return P3D(layers=(3, 1, 1, 1), num_classes=4, **options).eval()


@pytest.mark.parametrize(("frames", "crop"), [(16, 32), (32, 32), (16, 47), (48, 33)])
def test_one_row_per_clip_whatever_the_size(frames: int, crop: int) -> None:
    """The popular port turns 32 frames into two rows and 224 pixels into nine."""
    model = small()
    x = torch.randn(2, 3, frames, crop, crop)
    with torch.no_grad():
        y = model(x)
        assert y.shape == (2, 4)
        torch.testing.assert_close(y[1:], model(x[1:]), rtol=1e-4, atol=1e-5)


def test_frames_that_cannot_be_halved_four_times_are_refused() -> None:
    with pytest.raises(ModelError, match="in_frames=24 must be a multiple of 16"):
        create_model("p3d_63", in_frames=24)
    with pytest.raises(ModelError, match="in_frames=8 must be a multiple of 16"):
        small()(torch.randn(1, 3, 8, 32, 32))
    with pytest.raises(ModelError, match="wiring='caffe'"):
        small(wiring="caffe")
    with pytest.raises(ModelError, match="arrangement='ab'"):
        small(arrangement="ab")


def port_shapes(layers: tuple[int, ...], classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the popular port's state dict, from its structure: res5 is made of 2D layers."""
    shapes: dict[str, tuple[int, ...]] = {"conv1_custom.weight": (64, 3, 1, 7, 7)}

    def batch_norm(at: str, width: int) -> None:
        shapes.update({f"{at}.{t}": (width,) for t in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{at}.num_batches_tracked"] = ()

    batch_norm("bn1", 64)
    channels = 64
    for stage, (count, width) in enumerate(zip(layers, (64, 128, 256, 512), strict=True), start=1):
        last = stage == 4
        one = (1, 1) if last else (1, 1, 1)
        for i in range(count):
            at = f"layer{stage}.{i}"
            shapes[f"{at}.conv1.weight"] = (width, channels, *one)
            shapes[f"{at}.conv4.weight"] = (4 * width, width, *one)
            middle = {"_normal": (3, 3)} if last else {"2": (1, 3, 3), "3": (3, 1, 1)}
            for suffix, kernel in middle.items():
                shapes[f"{at}.conv{suffix}.weight"] = (width, width, *kernel)
            for suffix in ("1", *middle):
                batch_norm(f"{at}.bn{suffix}", width)
            batch_norm(f"{at}.bn4", 4 * width)
            if i == 0:
                shapes[f"{at}.downsample.0.weight"] = (4 * width, channels, *one)
                batch_norm(f"{at}.downsample.1", 4 * width)
            channels = 4 * width
    shapes |= {"fc.weight": (classes, 2048), "fc.bias": (classes,)}
    return shapes


def test_the_ports_weights_load() -> None:
    shapes = port_shapes((3, 4, 6, 3), 5)
    generator = torch.Generator().manual_seed(0)
    public = {
        k: torch.rand(s, generator=generator) if s else torch.tensor(3, dtype=torch.long)
        for k, s in shapes.items()
    }
    model = create_model("p3d_63", num_classes=5, wiring="port")
    report = load_state(model, public, source="port")
    assert report.notes == ("read 10 2D kernels of res5 as 1xkxk",)
    assert report.loaded == len(public)
    own = model.state_dict()
    assert own.keys() == public.keys()
    for key, value in public.items():
        stored = own[key]
        assert torch.equal(stored.squeeze(2) if stored.ndim > value.ndim else stored, value), key
