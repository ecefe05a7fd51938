"""I3D: published counts and sizes, TensorFlow's padding, a module against its formula, names, the released head."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models import ModelError, create_model
from cliplift.models.conv3d.i3d import Mixed, SameConvolution, SamePool, same_pads
from cliplift.models.factory import load_pretrained
from cliplift.models.inflate import inflate
from cliplift.models.measure import measure_model

LAYERS = [
    "Conv3d_1a_7x7",
    "MaxPool3d_2a_3x3",
    "Conv3d_2b_1x1",
    "Conv3d_2c_3x3",
    "MaxPool3d_3a_3x3",
    "Mixed_3b",
    "Mixed_3c",
    "MaxPool3d_4a_3x3",
    *(f"Mixed_4{letter}" for letter in "bcdef"),
    "MaxPool3d_5a_2x2",
    "Mixed_5b",
    "Mixed_5c",
]


def test_published_counts_and_sizes() -> None:
    """12,339,539 at 51 classes and 111.2 GMAC at 64x224x224; the I3D paper's Table 1 says 12 M."""
    measured = measure_model("i3d_inception", num_classes=51)
    assert measured.parameters == 12_339_539
    assert measured.gmacs == pytest.approx(111.15, abs=0.05)
    assert measured.input_shape == (3, 64, 224, 224)
    assert measured.feature_shape == (1024, 8, 7, 7)
    flow = measure_model("i3d_inception", num_classes=51, in_channels=2)
    assert flow.parameters == 12_339_539 - 64 * 7**3


def test_every_map_has_the_size_of_tensorflows_same() -> None:
    """ceil(size / stride) at every layer, also for sizes that no stride divides."""
    seen: dict[str, tuple[int, ...]] = {}
    with torch.device("meta"):
        model = create_model("i3d_inception", num_classes=3)
        for name in LAYERS:
            part = model.get_submodule(name)
            part.register_forward_hook(lambda _, __, y, name=name: seen.__setitem__(name, tuple(y.shape[2:])))
        model.forward_features(torch.empty(1, 3, 31, 225, 97))
    assert model.checkpoint_blocks() == LAYERS
    halved = {"Conv3d_1a_7x7": (2, 2, 2), "MaxPool3d_2a_3x3": (1, 2, 2), "MaxPool3d_3a_3x3": (1, 2, 2)}
    halved |= {"MaxPool3d_4a_3x3": (2, 2, 2), "MaxPool3d_5a_2x2": (2, 2, 2)}
    size = (31, 225, 97)
    for name in LAYERS:
        size = tuple(-(-s // d) for s, d in zip(size, halved.get(name, (1, 1, 1)), strict=True))
        assert seen[name] == size, name


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pads"),
    [
        (224, 7, 2, (2, 3)),  # the stem: PyTorch's padding=3 would be (3, 3)
        (225, 7, 2, (3, 3)),
        (112, 3, 2, (0, 1)),
        (113, 3, 2, (1, 1)),
        (7, 3, 1, (1, 1)),
        (7, 2, 2, (0, 1)),
        (8, 2, 2, (0, 0)),
        (1, 7, 2, (3, 3)),
        (5, 1, 2, (0, 0)),
    ],
)
def test_the_padding_is_tensorflows(size: int, kernel: int, stride: int, pads: tuple[int, int]) -> None:
    """Worked by hand: max((ceil(size / stride) - 1) * stride + kernel - size, 0), the odd one behind."""
    assert same_pads(size, kernel, stride) == pads


def windows(size: int, kernel: int, stride: int) -> list[list[tuple[int, int]]]:
    """For every output position, the (offset in the kernel, position in the input) pairs that lie inside."""
    count = -(-size // stride)
    first = -(max((count - 1) * stride + kernel - size, 0) // 2)
    starts = [first + stride * i for i in range(count)]
    return [[(k, start + k) for k in range(kernel) if 0 <= start + k < size] for start in starts]


@pytest.mark.parametrize("size", [(4, 6, 8), (5, 7, 9), (1, 6, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_and_pooling_see_the_windows_of_same(size: tuple[int, int, int], stride: int) -> None:
    """Against sums and maxima written out position by position. Inputs are negative, so a padded zero would win."""
    torch.manual_seed(0)
    kernel = (3, 2, 3)
    x = -torch.rand(2, 2, *size, dtype=torch.float64) - 0.1
    conv = SameConvolution(2, 3, kernel, (stride,) * 3).double()
    pooled, convolved = SamePool(kernel, (stride,) * 3)(x), conv(x)
    t_windows, h_windows, w_windows = (windows(s, k, stride) for s, k in zip(size, kernel, strict=True))
    assert pooled.shape[2:] == convolved.shape[2:] == tuple(-(-s // stride) for s in size)
    for t, rows in enumerate(t_windows):
        for h, columns in enumerate(h_windows):
            for w, others in enumerate(w_windows):
                inside = [(a, b, c) for a in rows for b in columns for c in others]
                total = sum(
                    conv.weight[:, :, a[0], b[0], c[0]] @ x[:, :, a[1], b[1], c[1]].T for a, b, c in inside
                )
                torch.testing.assert_close(convolved[:, :, t, h, w], total.T, rtol=1e-10, atol=1e-10)
                values = torch.stack([x[:, :, a[1], b[1], c[1]] for a, b, c in inside])
                assert torch.equal(pooled[:, :, t, h, w], values.amax(dim=0))


def scrambled(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm3d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.5, 2)
            nn.init.normal_(part.bias, 0, 0.2)
    return module.double().eval()


def unit(x: Tensor, part: nn.Module) -> Tensor:
    """Convolution at stride 1 as a sum over shifted copies, BN by its definition with eps 1e-3, ReLU."""
    kernel, size = part.conv3d.weight, x.shape[2:]
    reach = kernel.shape[-1] // 2
    padded = F.pad(x, (reach,) * 6)
    out = torch.zeros((), dtype=x.dtype)
    for t in range(kernel.shape[2]):
        for h in range(kernel.shape[3]):
            for w in range(kernel.shape[4]):
                moved = padded[:, :, t : t + size[0], h : h + size[1], w : w + size[2]]
                out = out + torch.einsum("bcthw,oc->bothw", moved, kernel[:, :, t, h, w])
    view, bn = (1, -1, 1, 1, 1), part.bn
    scale = bn.weight / (bn.running_var + 1e-3).sqrt()
    return ((out - bn.running_mean.view(view)) * scale.view(view) + bn.bias.view(view)).relu()


def test_a_module_is_its_formula() -> None:
    torch.manual_seed(0)
    module = scrambled(Mixed(5, (2, 3, 4, 2, 3, 2)))
    x = torch.randn(2, 5, 3, 4, 5, dtype=torch.float64)
    wide = F.pad(x, (1,) * 6, value=float("-inf"))
    around = wide.unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1).amax(dim=(-1, -2, -3))
    expected = [
        unit(x, module.b0),
        unit(unit(x, module.b1a), module.b1b),
        unit(unit(x, module.b2a), module.b2b),
        unit(around, module.b3b),
    ]
    torch.testing.assert_close(module(x), torch.cat(expected, dim=1), rtol=1e-10, atol=1e-10)


def uninitialised(**options: int) -> nn.Module:
    with torch.device("meta"):
        model = create_model("i3d_inception", **options)
    return model.to_empty(device="cpu")


# arXiv 1409.4842, Table 1: 1x1; 3x3 reduce, 3x3; 5x5 reduce, 5x5; pool projection
TABLE_1 = {
    "3b": (192, 64, 96, 128, 16, 32, 32),
    "3c": (256, 128, 128, 192, 32, 96, 64),
    "4b": (480, 192, 96, 208, 16, 48, 64),
    "4c": (512, 160, 112, 224, 24, 64, 64),
    "4d": (512, 128, 128, 256, 24, 64, 64),
    "4e": (512, 112, 144, 288, 32, 64, 64),
    "4f": (528, 256, 160, 320, 32, 128, 128),
    "5b": (832, 256, 160, 320, 32, 128, 128),
    "5c": (832, 384, 192, 384, 48, 128, 128),
}


def published_units(stem_channels: int) -> dict[str, tuple[int, int, int]]:
    """Every convolution of the released network: its name, inputs, outputs and kernel size."""
    units = {
        "Conv3d_1a_7x7": (stem_channels, 64, 7),
        "Conv3d_2b_1x1": (64, 64, 1),
        "Conv3d_2c_3x3": (64, 192, 3),
    }
    for stage, (inside, one, reduce1, wide1, reduce2, wide2, pooled) in TABLE_1.items():
        units[f"Mixed_{stage}.b0"] = (inside, one, 1)
        units[f"Mixed_{stage}.b1a"] = (inside, reduce1, 1)
        units[f"Mixed_{stage}.b1b"] = (reduce1, wide1, 3)
        units[f"Mixed_{stage}.b2a"] = (inside, reduce2, 1)
        units[f"Mixed_{stage}.b2b"] = (reduce2, wide2, 3)
        units[f"Mixed_{stage}.b3b"] = (inside, pooled, 1)
    return units


NORM = ("weight", "bias", "running_mean", "running_var")


def published_shapes(stem_channels: int) -> dict[str, tuple[int, ...]]:
    """rgb_imagenet.pt and flow_imagenet.pt: 400 classes by a 1x1x1 convolution with bias."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (inside, outside, size) in published_units(stem_channels).items():
        shapes[f"{name}.conv3d.weight"] = (outside, inside, size, size, size)
        shapes.update({f"{name}.bn.{tensor}": (outside,) for tensor in NORM})
    return shapes | {"logits.conv3d.weight": (400, 1024, 1, 1, 1), "logits.conv3d.bias": (400,)}


@pytest.mark.parametrize(("file", "channels"), [("rgb_imagenet.pt", 3), ("flow_imagenet.pt", 2)])
def test_the_public_files_load(file: str, channels: int, tmp_path: Path) -> None:
    shapes = published_shapes(channels)
    # one number stands for each tensor, so that the file stays small
    tensors = {
        n: torch.tensor(float(i)).expand(shape) for i, (n, shape) in enumerate(shapes.items(), start=1)
    }
    torch.save(tensors, tmp_path / file)
    model = uninitialised(in_channels=channels)
    assert load_pretrained(model, tmp_path / file).loaded == len(shapes) == 57 * 5 + 2
    loaded = model.state_dict()
    for name, value in tensors.items():
        ours = loaded[name.replace("logits.conv3d", "logits")]
        assert torch.equal(ours, value.reshape(ours.shape)), name
    rest = set(loaded) - {name.replace("logits.conv3d", "logits") for name in shapes}
    assert all(name.endswith("num_batches_tracked") for name in rest)


def test_late_temporals_numbers_are_read() -> None:
    """``features.N`` counts the layers, poolings included: Mixed_5c is 15."""
    with torch.device("meta"):
        model = create_model("i3d_inception", num_classes=51)
        state = model.state_dict()
    numbered = {}
    for key, value in state.items():
        layer, _, rest = key.partition(".")
        numbered[f"features.{LAYERS.index(layer)}.{rest}" if layer in LAYERS else f"fc_action.{rest}"] = value
    assert "features.15.b3b.bn.running_var" in numbered
    renamed, notes = model.adapt_state_dict(numbered)
    assert renamed.keys() == state.keys()
    assert all(renamed[key] is state[key] for key in state)
    assert notes


def googlenet() -> dict[str, Tensor]:
    """torchvision's GoogLeNet: conv1 to conv3, inception3a to 5b of four branches, an auxiliary classifier, fc."""
    names = {"Conv3d_1a_7x7": "conv1", "Conv3d_2b_1x1": "conv2", "Conv3d_2c_3x3": "conv3"}
    branches = {"b0": "1", "b1a": "2.0", "b1b": "2.1", "b2a": "3.0", "b2b": "3.1", "b3b": "4.1"}
    letters = {stage: stage[0] + "abcde"["bcdef".index(stage[1])] for stage in TABLE_1}
    state: dict[str, Tensor] = {}
    for n, (ours, (inside, outside, size)) in enumerate(published_units(3).items(), start=1):
        layer, _, branch = ours.partition(".")
        theirs = names.get(layer) or f"inception{letters[layer[6:]]}.branch{branches[branch]}"
        state[f"{theirs}.conv.weight"] = torch.tensor(float(n)).expand(outside, inside, size, size)
        state.update({f"{theirs}.bn.{tensor}": torch.full((outside,), float(n)) for tensor in NORM})
        state[f"{theirs}.bn.num_batches_tracked"] = torch.tensor(n)
    extra = {"aux1.conv.conv.weight": (128, 512, 1, 1), "fc.weight": (1000, 1024), "fc.bias": (1000,)}
    return state | {name: torch.zeros(shape) for name, shape in extra.items()}


def test_googlenet_is_inflated() -> None:
    model = uninitialised(num_classes=0)
    report = inflate(model, googlenet())
    assert report.fresh == ()
    assert set(report.unused) == {"fc.weight", "fc.bias"}
    assert len(report.inflated) == 57
    state = model.state_dict()
    for n, (name, (_, _, size)) in enumerate(published_units(3).items(), start=1):
        kernel = state[f"{name}.conv3d.weight"]
        assert kernel[:, :, size // 2].eq(n).all(), name
        assert kernel.count_nonzero() == kernel[:, :, 0].numel(), "only the middle frame"
        assert state[f"{name}.bn.running_var"].eq(n).all()


def test_the_released_head_averages_windows_of_two_frames() -> None:
    """AvgPool (2, 7, 7) at stride 1, logits of every window, their mean: the end frames count half."""
    torch.manual_seed(0)
    features = torch.randn(2, 1024, 5, 3, 3)
    x = torch.empty(2, 3, 4, 4, 4)
    for pool in ("windows", "global"):
        with torch.device("meta"):
            model = create_model("i3d_inception", num_classes=4, temporal_pool=pool)
        model = model.to_empty(device="cpu").eval()
        nn.init.normal_(model.logits.weight)
        nn.init.normal_(model.logits.bias)
        model.forward_features = lambda _: features
        kernel = (2, 3, 3) if pool == "windows" else (5, 3, 3)
        steps = F.avg_pool3d(features, kernel, stride=1).flatten(2).transpose(1, 2)
        expected = F.linear(steps, model.logits.weight, model.logits.bias).mean(dim=1)
        # 1024 products in float32, summed in another order
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        model.forward_features = lambda _: features[:, :, :1]
        assert torch.allclose(model.forward_pooled(x), features[:, :, 0].mean(dim=(2, 3)), atol=1e-6)


def test_bad_input_is_refused() -> None:
    with torch.device("meta"):
        with pytest.raises(ModelError, match="temporal_pool='max' must be 'windows' or 'global'"):
            create_model("i3d_inception", temporal_pool="max")
        with pytest.raises(ModelError, match="in_channels=5"):
            create_model("i3d_inception", in_channels=5)
        model = create_model("i3d_inception", in_channels=2)
        with pytest.raises(ModelError, match="C=2"):
            model(torch.empty(1, 3, 8, 32, 32))
        with pytest.raises(ModelError, match="not weights of its 2D counterpart"):
            inflate(model, {"layer1.0.conv1.weight": torch.empty(64, 64, 1, 1)})
