"""DenseNet, DenseNet3D: published counts, sizes and key names; one dense layer against its formula."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models import ModelError, create_model
from cliplift.models.image.densenet import DenseBlock, DenseLayer, DenseNet, DenseShape, Transition
from cliplift.models.measure import measure_model
from cliplift.models.state_dicts import load_state

# Counted on the authors' released code (with its dotted submodule names repaired), by number of classes.
OFFICIAL_PARAMETERS = [
    ("densenet3d_121", 400, 11_658_896),
    ("densenet3d_121", 101, 11_352_421),
    ("densenet3d_121", 51, 11_301_171),
    ("densenet3d_169", 400, 19_214_992),
    ("densenet3d_169", 101, 18_717_157),
    ("densenet3d_169", 51, 18_633_907),
    # torchvision's published counts
    ("densenet_121", 1000, 7_978_856),
    ("densenet_169", 1000, 14_149_480),
]
# (model, pool, frames, crop): 1e9 multiply-accumulates
GMACS = [
    ("densenet3d_121", "official", 32, 224, 34.11),
    ("densenet3d_121", "paper", 32, 224, 62.55),
    ("densenet3d_121", "paper", 16, 112, 7.81),
    ("densenet3d_169", "official", 32, 224, 35.26),
    ("densenet3d_169", "paper", 32, 224, 64.86),
    ("densenet3d_169", "paper", 16, 112, 8.08),
]
# pool, frames, crop -> (C, T, H, W) after each part; the first block is Table 1 of arXiv 1711.08200
SIZES = {
    ("paper", 32, 224): {
        "conv0": (64, 16, 112, 112),
        "pool0": (64, 16, 56, 56),
        "denseblock1": (256, 16, 56, 56),
        "transition1": (128, 8, 28, 28),
        "denseblock2": (512, 8, 28, 28),
        "transition2": (256, 4, 14, 14),
        "denseblock3": (1024, 4, 14, 14),
        "transition3": (512, 2, 7, 7),
        "denseblock4": (1024, 2, 7, 7),
    },
    ("official", 32, 224): {
        "conv0": (64, 16, 112, 112),
        "pool0": (64, 8, 56, 56),
        "denseblock1": (256, 8, 56, 56),
        "transition1": (128, 4, 28, 28),
        "denseblock2": (512, 4, 28, 28),
        "transition2": (256, 2, 14, 14),
        "denseblock3": (1024, 2, 14, 14),
        "transition3": (512, 1, 7, 7),
        "denseblock4": (1024, 1, 7, 7),
    },
    ("paper", 16, 112): {
        "conv0": (64, 8, 56, 56),
        "pool0": (64, 8, 28, 28),
        "denseblock1": (256, 8, 28, 28),
        "denseblock2": (512, 4, 14, 14),
        "denseblock3": (1024, 2, 7, 7),
        "denseblock4": (1024, 1, 3, 3),
    },
    ("paper", 64, 224): {"denseblock1": (256, 32, 56, 56), "denseblock4": (1024, 4, 7, 7)},
    ("official", 16, 112): {"denseblock3": (1024, 1, 7, 7), "denseblock4": (1024, 1, 3, 3)},
}


@pytest.mark.parametrize(("name", "classes", "parameters"), OFFICIAL_PARAMETERS)
def test_parameter_counts(name: str, classes: int, parameters: int) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(("name", "pool", "frames", "crop", "gmacs"), GMACS)
def test_cost(name: str, pool: str, frames: int, crop: int, gmacs: float) -> None:
    assert measure_model(name, in_frames=frames, crop=crop, pool=pool).gmacs == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize("case", SIZES, ids=str)
def test_sizes_of_table_1(case: tuple[str, int, int]) -> None:
    pool, frames, crop = case
    seen: dict[str, tuple[int, ...]] = {}
    with torch.device("meta"):
        model = create_model("densenet3d_121", pool=pool)
        for name, part in model.features.named_children():
            part.register_forward_hook(lambda _, __, y, name=name: seen.__setitem__(name, tuple(y.shape[1:])))
        assert model(torch.empty(2, 3, frames, crop, crop)).shape == (2, 400)
    assert {name: seen[name] for name in SIZES[case]} == SIZES[case]


def reference_conv(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolution by windows and einsum, zero padding of k // 2 for odd kernels."""
    kt, kh, kw = kernel.shape[2:]
    x = F.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2, kt // 2, kt // 2))
    windows = x.unfold(2, kt, 1).unfold(3, kh, 1).unfold(4, kw, 1)
    return torch.einsum("bcthwijk,ocijk->bothw", windows, kernel)


def reference_norm_relu(x: Tensor, norm: nn.Module, *, train: bool) -> Tensor:
    shape = (1, -1, 1, 1, 1)
    if train:
        mean, var = x.mean((0, 2, 3, 4)), x.var((0, 2, 3, 4), unbiased=False)
    else:
        mean, var = norm.running_mean, norm.running_var
    y = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + 1e-5)
    return (y * norm.weight.view(shape) + norm.bias.view(shape)).clamp(min=0)


def scramble_norms(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm3d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.2)


@pytest.mark.parametrize("train", [False, True])
def test_a_dense_layer_is_its_formula(train: bool) -> None:
    torch.manual_seed(0)
    layer = DenseLayer(6, growth=4, bottleneck=3, drop_rate=0.0, rank=3).double().train(train)
    scramble_norms(layer)
    maps = tuple(torch.randn(2, c, 3, 5, 4, dtype=torch.float64) for c in (2, 4))
    x = reference_norm_relu(torch.cat(maps, 1), layer.norm1, train=train)
    x = torch.einsum("bcthw,oc->bothw", x, layer.conv1.weight[:, :, 0, 0, 0])
    x = reference_norm_relu(x, layer.norm2, train=train)
    expected = reference_conv(x, layer.conv2.weight)
    torch.testing.assert_close(layer(maps), expected, rtol=1e-10, atol=1e-10)


def test_a_dense_block_keeps_its_input_first() -> None:
    torch.manual_seed(0)
    block = DenseBlock(3, layers=2, growth=4, bottleneck=2, drop_rate=0.0, rank=3).double().eval()
    x = torch.randn(1, 3, 2, 4, 4, dtype=torch.float64)
    first = block.denselayer1((x,))
    second = block.denselayer2((x, first))
    torch.testing.assert_close(block(x), torch.cat([x, first, second], 1), rtol=0, atol=0)


def test_a_transition_halves_channels_and_axes_down_to_one() -> None:
    transition = Transition(8, rank=3).double().eval()
    x = torch.randn(2, 8, 1, 5, 4, dtype=torch.float64)
    y = transition(x)
    z = torch.einsum(
        "bcthw,oc->bothw",
        reference_norm_relu(x, transition.norm, train=False),
        transition.conv.weight[:, :, 0, 0, 0],
    )
    expected = z[:, :, :, :4].reshape(2, 4, 1, 2, 2, 2, 2).mean((4, 6))  # 5 rows: the last one is dropped
    assert y.shape == (2, 4, 1, 2, 2)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_drop_rate_acts_in_training_only() -> None:
    torch.manual_seed(0)
    layer = DenseLayer(4, growth=64, bottleneck=2, drop_rate=0.5, rank=3)
    x = (torch.randn(2, 4, 4, 8, 8),)
    zeros = (layer.train()(x) == 0).float().mean().item()
    assert 0.45 < zeros < 0.55
    assert (layer.eval()(x) == 0).float().mean().item() < 0.01


def public_names(blocks: tuple[int, ...]) -> set[str]:
    """torchvision's DenseNet names, written down from its naming scheme."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {"features.conv0.weight", "classifier.weight", "classifier.bias"}
    names |= {f"features.{n}.{t}" for n in ("norm0", "norm5") for t in norm}
    for b, layers in enumerate(blocks, start=1):
        for i in range(1, layers + 1):
            at = f"features.denseblock{b}.denselayer{i}"
            names |= {f"{at}.norm{j}.{t}" for j in (1, 2) for t in norm}
            names |= {f"{at}.conv{j}.weight" for j in (1, 2)}
    for b in range(1, len(blocks)):
        names |= {f"features.transition{b}.norm.{t}" for t in norm} | {f"features.transition{b}.conv.weight"}
    return names


@pytest.mark.parametrize("name", ["densenet_121", "densenet3d_121"])
def test_weights_carry_torchvisions_names(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert set(model.state_dict()) == public_names((6, 12, 24, 16))


@pytest.mark.parametrize("source", ["authors", "kenshohara"])
def test_public_weights_load_after_renaming(source: str) -> None:
    model, other = (
        create_model("densenet3d_121", num_classes=5),
        create_model("densenet3d_121", num_classes=5),
    )
    if source == "authors":  # submodules called "norm.1"
        public = {
            re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", k): v
            for k, v in other.state_dict().items()
        }
        assert "features.denseblock4.denselayer16.conv.2.weight" in public
    else:
        public = {re.sub(r"(conv|norm)0", r"\g<1>1", k): v for k, v in other.state_dict().items()}
        assert "features.conv1.weight" in public
    report = load_state(model, public, source="public weights")
    assert report.notes
    for key, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ModelError, match="pool='both'"):
        create_model("densenet3d_121", pool="both")
    with pytest.raises(ModelError, match="must be odd"):
        DenseShape(stem_kernel=(2, 7, 7))
    with pytest.raises(ModelError, match="must be positive"):
        DenseShape(growth=0)
    with torch.device("meta"):
        model = create_model("densenet3d_121")
        assert isinstance(model, DenseNet)
        with pytest.raises(ModelError, match=r"takes \(B, C, T, H, W\) with C=3, got \(1, 3, 64, 64\)"):
            model(torch.empty(1, 3, 64, 64))
        with pytest.raises(ModelError, match="C=3"):
            model(torch.empty(1, 1, 8, 64, 64))
