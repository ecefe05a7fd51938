"""T3D: Table 1 as data, counts of both reconstructions, the temporal transition layer against its formula."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models import ModelError, create_model
from cliplift.models.conv3d.t3d import T3D, TemporalTransition
from cliplift.models.measure import measure_model

PARAMETERS = [
    ("t3d_121", {}, 400, 29_876_880),
    ("t3d_169", {}, 400, 38_519_184),
    ("t3d_121", {"fusion": True}, 400, 30_321_552),
    ("t3d_121", {"fusion": True}, 101, 30_053_349),
    ("t3d_121", {"fusion": True}, 51, 30_008_499),
    ("t3d_169", {"fusion": True}, 400, 38_963_856),
    ("t3d_169", {"fusion": True}, 101, 38_542_565),
]
# name, options, frames, crop, 1e9 multiply-accumulates
GMACS = [
    ("t3d_121", {}, 32, 224, 244.1),
    ("t3d_169", {}, 32, 224, 247.9),
    ("t3d_121", {"fusion": True}, 32, 224, 252.5),
    ("t3d_169", {"fusion": True}, 32, 224, 256.3),
    ("t3d_121", {"fusion": True}, 16, 112, 31.6),
    ("t3d_169", {"fusion": True}, 16, 112, 32.0),
    ("t3d_121", {"fusion": True, "pool": "official"}, 32, 224, 129.1),
    ("t3d_169", {"fusion": True, "pool": "official"}, 32, 224, 131.0),
]
# arXiv 1711.08200, Table 1, H x W x T turned to (T, H, W); the channels follow from growth 32 and 3 x 128 branches
TABLE_1 = {
    "paper": {
        "conv0": (64, 16, 112, 112),
        "pool0": (64, 16, 56, 56),
        "denseblock1": (256, 16, 56, 56),
        "transition1": (384, 8, 28, 28),
        "denseblock2": (768, 8, 28, 28),
        "transition2": (384, 4, 14, 14),
        "denseblock3": (1152, 4, 14, 14),
        "transition3": (384, 2, 7, 7),
        "denseblock4": (896, 2, 7, 7),
    },
    "official": {
        "conv0": (64, 16, 112, 112),
        "pool0": (64, 8, 56, 56),
        "denseblock1": (256, 8, 56, 56),
        "transition1": (384, 4, 28, 28),
        "denseblock2": (768, 4, 28, 28),
        "transition2": (384, 2, 14, 14),
        "denseblock3": (1152, 2, 14, 14),
        "transition3": (384, 1, 7, 7),
        "denseblock4": (896, 1, 7, 7),
    },
}
KERNELS = {  # Table 1's {1x1x1, 3x3x3, 3x3x6}, {.., 3x3x4}, {.., 3x3x4} as (T, H, W)
    "transition1": [(1, 1, 1), (3, 3, 3), (6, 3, 3)],
    "transition2": [(1, 1, 1), (3, 3, 3), (4, 3, 3)],
    "transition3": [(1, 1, 1), (3, 3, 3), (4, 3, 3)],
}


@pytest.mark.parametrize(("name", "options", "classes", "parameters"), PARAMETERS)
def test_parameter_counts(name: str, options: dict[str, bool], classes: int, parameters: int) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=classes, **options)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(("name", "options", "frames", "crop", "gmacs"), GMACS)
def test_cost(name: str, options: dict[str, object], frames: int, crop: int, gmacs: float) -> None:
    assert measure_model(name, in_frames=frames, crop=crop, **options).gmacs == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize("pool", ["paper", "official"])
def test_sizes_and_kernels_of_table_1(pool: str) -> None:
    seen: dict[str, tuple[int, ...]] = {}
    with torch.device("meta"):
        model = create_model("t3d_121", pool=pool)
        for name, part in model.features.named_children():
            part.register_forward_hook(lambda _, __, y, name=name: seen.__setitem__(name, tuple(y.shape[1:])))
        assert model(torch.empty(1, 3, 32, 224, 224)).shape == (1, 400)
    assert {name: seen[name] for name in TABLE_1[pool]} == TABLE_1[pool]
    for name, kernels in KERNELS.items():
        branches = model.get_submodule(f"features.{name}").branches
        assert [tuple(b.conv.kernel_size) for b in branches] == kernels


@pytest.mark.parametrize(("frames", "crop"), [(16, 112), (32, 112), (64, 224), (5, 33)])
def test_any_clip_gives_one_row(frames: int, crop: int) -> None:
    with torch.device("meta"):
        model = create_model("t3d_121", num_classes=7)
        assert model(torch.empty(2, 3, frames, crop, crop + 1)).shape == (2, 7)


def reference_branch(x: Tensor, branch: nn.Module, *, train: bool) -> Tensor:
    """BN, ReLU, zero padding with floor((k-1)/2) in front and the rest behind, windows, einsum."""
    shape = (1, -1, 1, 1, 1)
    norm, kernel = branch.norm, branch.conv.weight
    mean = x.mean((0, 2, 3, 4)) if train else norm.running_mean
    var = x.var((0, 2, 3, 4), unbiased=False) if train else norm.running_var
    y = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + 1e-5)
    y = (y * norm.weight.view(shape) + norm.bias.view(shape)).clamp(min=0)
    pads = [n for k in reversed(kernel.shape[2:]) for n in ((k - 1) // 2, k - 1 - (k - 1) // 2)]
    windows = F.pad(y, pads)
    for axis, k in enumerate(kernel.shape[2:], start=2):
        windows = windows.unfold(axis, k, 1)
    return torch.einsum("bcthwijk,ocijk->bothw", windows, kernel)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("fusion", [False, True])
@pytest.mark.parametrize("depths", [(1, 3, 6), (1, 3, 4)])
def test_a_temporal_transition_is_its_formula(depths: tuple[int, ...], fusion: bool, train: bool) -> None:
    torch.manual_seed(0)
    ttl = TemporalTransition(5, depths=depths, width=4, fusion=fusion).double().train(train)
    for part in ttl.modules():
        if isinstance(part, nn.BatchNorm3d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.2)
    x = torch.randn(2, 5, 4, 6, 4, dtype=torch.float64)
    y = torch.cat([reference_branch(x, branch, train=train) for branch in ttl.branches], 1)
    if fusion:
        assert ttl.fusion is not None
        y = reference_branch(y, ttl.fusion, train=train)
    expected = y.reshape(2, 12, 2, 2, 3, 2, 2, 2).mean((3, 5, 7))
    torch.testing.assert_close(ttl(x), expected, rtol=1e-10, atol=1e-10)


def test_an_even_depth_looks_one_frame_further_ahead() -> None:
    """Depth 4 at frame t reads t-1 .. t+2, depth 6 reads t-2 .. t+3."""
    for depth, ahead, back in ((4, 2, 1), (6, 3, 2)):
        ttl = TemporalTransition(1, depths=(depth,), width=1, pooling=False).eval()
        nn.init.ones_(ttl.branches[0].conv.weight)
        x = torch.zeros(1, 1, 12, 3, 3)
        x[:, :, 6] = 1.0
        touched = ttl(x)[0, 0, :, 1, 1].nonzero().flatten().tolist()
        assert touched == list(range(6 - ahead, 6 + back + 1))


def test_the_tiny_one_is_the_same_network_at_laptop_size() -> None:
    tiny = measure_model("t3d_tiny", num_classes=400)
    assert tiny.parameters < 1_000_000
    assert tiny.gmacs < 0.07
    with torch.device("meta"):
        model = create_model("t3d_tiny")
    assert isinstance(model, T3D)
    for name, kernels in KERNELS.items():
        assert [
            tuple(b.conv.kernel_size) for b in model.get_submodule(f"features.{name}").branches
        ] == kernels


def test_the_tiny_one_learns_to_tell_motion_apart() -> None:
    """Eight clips that differ only in the order of their frames: no single frame decides."""
    torch.manual_seed(0)
    frames = torch.randn(4, 3, 8, 32, 32).cumsum(2)
    clips = torch.cat([frames, frames.flip(2)])
    labels = torch.tensor([0] * 4 + [1] * 4)
    model = create_model("t3d_tiny", num_classes=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(clips), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(0.693, abs=0.1)
    assert losses[-1] < 0.1


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="2 dense blocks have 1 temporal transitions"):
        T3D(blocks=(1, 1), num_classes=2)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="must be positive"):
        TemporalTransition(4, depths=(1, 0))
    with pytest.raises(ModelError, match="must be positive"):
        create_model("t3d_121", ttl_width=0)
    with pytest.raises(ModelError, match="dropout=1"):
        create_model("t3d_tiny", dropout=1)
