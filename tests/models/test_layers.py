"""Shared layers: temporal padding, pooling, activation checkpointing, memory formats and half precision."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cliplift.models import ModelError, create_model
from cliplift.models.layers import (
    DropPath,
    LinearHead,
    PooledClassifier,
    ReluLinear,
    SameConv3d,
    halve,
    same_pads,
)
from cliplift.models.protocol import InputSpec
from cliplift.pipelines.compute.recompute import recompute_blocks


@pytest.mark.parametrize(
    ("kernel", "pads"), [(1, (0, 0)), (2, (0, 1)), (3, (1, 1)), (4, (1, 2)), (6, (2, 3))]
)
def test_the_odd_zero_goes_behind(kernel: int, pads: tuple[int, int]) -> None:
    assert same_pads(9, kernel) == pads


@pytest.mark.parametrize("kernel", [(1, 1, 1), (4, 3, 3), (6, 3, 3), (2, 4, 1)])
def test_a_same_convolution_keeps_every_axis(kernel: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    conv = SameConv3d(2, 3, kernel).double()
    x = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64)
    pads = [n for k in reversed(kernel) for n in ((k - 1) // 2, k // 2)]
    expected = F.conv3d(F.pad(x, pads), conv.weight)
    assert conv(x).shape == (2, 3, 3, 5, 4)
    torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)


def test_halve_stops_at_one() -> None:
    assert halve(torch.ones(1, 1, 1, 3, 2)).shape == (1, 1, 1, 1, 1)
    assert halve(torch.ones(1, 1, 1, 7)).shape == (1, 1, 1, 3)
    x = torch.arange(8.0).view(1, 1, 2, 2, 2)
    assert halve(x).item() == 3.5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 6, 8), (2, 3, 5, 7, 9), (1, 2, 2, 3, 1), (2, 3, 1, 4, 5), (2, 2, 3, 1, 1)]
)
def test_halving_is_torchs_average_pooling(layout: torch.memory_format, shape: tuple[int, ...]) -> None:
    """``avg_pool3d`` with a window of 2, and of 1 where an axis has shrunk to 1; an odd last row falls away in both."""
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout)
    window = [min(2, size) for size in shape[2:]]
    y = halve(x)
    torch.testing.assert_close(y, F.avg_pool3d(x, window, stride=window), rtol=0, atol=1e-14)
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(halve(x[:, :, 0]), F.avg_pool2d(x[:, :, 0], window[1:], stride=window[1:]))


@pytest.mark.parametrize("parts", [1, 3])
def test_a_layer_before_a_relu_is_kaiming_uniform_over_all_its_parts(parts: int) -> None:
    """He et al. (2015): variance 2 / fan-in, so uniform in +-sqrt(6 / fan-in). 2000 draws reach 99 % of the bound."""
    torch.manual_seed(0)
    layer = ReluLinear(100, 20, parts=parts)
    bound = math.sqrt(6 / (100 * parts))
    assert 0.99 * bound < layer.weight.max().item() <= bound
    assert -bound <= layer.weight.min().item() < -0.99 * bound
    assert not layer.bias.any()
    assert ReluLinear(4, 3, bias=False).bias is None
    assert ReluLinear(6, 500).weight.abs().max().item() > 0.99, "one part unless more are named: sqrt(6 / 6)"


def test_drop_path_drops_whole_clips_and_keeps_the_mean() -> None:
    """A share ``rate`` of 4000 clips is zero (4 standard errors: 0.03), the others are divided by 1 - rate."""
    torch.manual_seed(0)
    x = torch.rand(4000, 3, 2) + 1
    layer = DropPath(0.2)
    y = layer(x)
    dropped = (y == 0).flatten(1)
    assert torch.equal(dropped.any(dim=1), dropped.all(dim=1))
    kept = ~dropped.any(dim=1)
    assert kept.float().mean().item() == pytest.approx(0.8, abs=0.03)
    torch.testing.assert_close(y[kept], x[kept] / 0.8)
    assert layer.eval()(x) is x
    assert DropPath(0.0)(x) is x


class Tripled(PooledClassifier):
    """A trunk whose maps can be written down: three times the input."""

    def __init__(self, **options: float) -> None:
        spec = InputSpec(frames=4, frame_stride=1, crop_height=6, crop_width=6, channels=2)
        super().__init__(feature_dim=2, num_classes=5, input_spec=spec, **options)
        self.reset_classifier(5)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * x


def test_the_classifier_is_linear_on_the_mean_over_all_positions() -> None:
    model = Tripled().double()
    x = torch.randn(3, 2, 4, 5, 6, dtype=torch.float64)
    pooled = 3 * x.sum(dim=(2, 3, 4)) / (4 * 5 * 6)
    torch.testing.assert_close(model.forward_pooled(x), pooled)
    head = model.classifier
    torch.testing.assert_close(model(x), pooled @ head.weight.T + head.bias)
    model.reset_classifier(7)
    assert (model.num_classes, model.classifier.weight.shape, model.classifier.weight.dtype) == (
        7,
        (7, 2),
        torch.float64,
    )
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    with pytest.raises(ModelError, match="num_classes=-1 must be 0"):
        model.reset_classifier(-1)


def test_the_classifier_drops_features_in_training_alone() -> None:
    """Half of 2000 features, the others doubled (4 standard errors of the share: 0.045)."""
    torch.manual_seed(0)
    model = Tripled(dropout=0.5)
    model.reset_classifier(0)
    x = torch.ones(1000, 2, 1, 1, 1)
    y = model(x)
    assert y.unique().tolist() == [0.0, 6.0]
    assert (y == 0).float().mean().item() == pytest.approx(0.5, abs=0.045)
    assert torch.equal(model.eval()(x), 3 * x.flatten(1))
    assert torch.equal(Tripled().head_dropout(x), x), "no dropout unless asked for"


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5])
def test_dropout_that_is_no_share_is_refused(dropout: float) -> None:
    with pytest.raises(ModelError, match=rf"dropout={dropout} must be in \[0, 1\)"):
        Tripled(dropout=dropout)


@pytest.mark.parametrize("shape", [(2, 4, 6, 6), (1, 3, 4, 6, 6), (2, 2, 4), (1, 2, 4, 6, 6, 1)])
def test_clips_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError) as caught:
        Tripled()(torch.zeros(shape))
    assert str(caught.value) == f"Tripled takes (B, C, T, H, W) with C=2, got {shape}"
    image = Tripled()
    image.input_dims = 4
    with pytest.raises(ModelError, match=r"takes \(B, C, H, W\) with C=2"):
        image(torch.zeros(1, 2, 3, 4, 5))


def test_a_head_starts_with_every_class_equal() -> None:
    torch.manual_seed(0)
    head = LinearHead(400, 100)
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.03)  # of 40,000 draws: 8 standard errors
    assert head.weight.mean().item() == pytest.approx(0, abs=0.0003)
    assert not head.bias.any()


@pytest.mark.parametrize("name", ["t3d_tiny", "p3d_resnet50", "resnet_50", "c3d"])
def test_weights_start_kaiming_normal_and_heads_small(name: str) -> None:
    """Variance 2 / fan-out for convolutions (of 1000 weights or more, so the estimate is good to 15 %)."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=50)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    for conv in convolutions:
        fan_out = conv.out_channels * conv.weight[0, 0].numel()
        if conv.weight.numel() >= 1000:
            assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.15)
        assert conv.bias is None or not conv.bias.any()
    assert len(convolutions) > 5
    head = model.get_submodule(model.head_name)
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not head.bias.any()


class Counting(nn.Module):
    """A block that counts its forward passes, with BatchNorm and dropout inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm3d(3)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return F.dropout(self.norm(self.conv(x)).relu(), 0.5, self.training)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Counting() for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)

    def checkpoint_blocks(self) -> list[str]:
        return [f"blocks.{i}" for i in range(4)]


@pytest.mark.parametrize(("fraction", "wrapped"), [(0.0, 0), (0.1, 1), (0.5, 2), (1.0, 4)])
def test_checkpointed_blocks_run_twice_and_compute_the_same(fraction: float, wrapped: int) -> None:
    torch.manual_seed(0)
    plain = Stack()
    checkpointed = copy.deepcopy(plain)
    names = recompute_blocks(checkpointed, fraction)
    assert names == [f"blocks.{i}" for i in range(wrapped)]
    assert list(checkpointed.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 3, 4, 6, 6)
    for model in (plain, checkpointed):
        torch.manual_seed(1)  # the dropout masks
        model(x).square().sum().backward()
    assert [b.calls for b in checkpointed.blocks] == [2] * wrapped + [1] * (4 - wrapped)
    for (key, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), key
    for key, value in plain.state_dict().items():
        assert torch.equal(value, checkpointed.state_dict()[key]), f"{key}: statistics were counted twice"
    assert all(norm.momentum == 0.1 for norm in checkpointed.modules() if isinstance(norm, nn.BatchNorm3d))


def test_checkpointing_can_be_undone_and_is_off_without_gradients() -> None:
    model = Stack()
    recompute_blocks(model, 1.0)
    with torch.no_grad():
        model(torch.randn(2, 3, 2, 4, 4))
    assert recompute_blocks(model, 0.0) == []
    model(torch.randn(2, 3, 2, 4, 4)).sum().backward()
    assert [b.calls for b in model.blocks] == [2] * 4, "one pass without gradients, one without recomputation"
    for fraction in (1.5, -0.1):
        with pytest.raises(ModelError, match=rf"share={fraction}"):
            recompute_blocks(model, fraction)
    assert recompute_blocks(model) == model.checkpoint_blocks(), "all blocks unless a fraction is named"


def test_checkpointing_saves_activations() -> None:
    """Bytes that autograd keeps between forward and backward, counted by its own hooks."""

    def kept(fraction: float) -> int:
        torch.manual_seed(0)
        model = create_model("t3d_tiny", num_classes=3)
        weights = {p.data_ptr() for p in model.parameters()}
        recompute_blocks(model, fraction)
        sizes: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            if t.data_ptr() not in weights:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x = torch.randn(2, 3, 8, 64, 64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model(x)
        assert out.requires_grad
        return sum(sizes.values())

    assert kept(1.0) < 0.6 * kept(0.0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """With one thread torch gives 1x1x1 convolutions to a kernel that knows the plain layout only."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_channels_last_gives_the_same_result() -> None:
    torch.manual_seed(0)
    model = create_model("t3d_tiny", num_classes=5).eval()
    x = torch.randn(2, 3, 8, 64, 64)
    with torch.no_grad():
        expected = model(x)
        last = copy.deepcopy(model).to(memory_format=torch.channels_last_3d)
        features = last.forward_features(x.to(memory_format=torch.channels_last_3d))
        assert features.is_contiguous(memory_format=torch.channels_last_3d), "the layout survives to the end"
        # float32 sums in another order
        torch.testing.assert_close(
            last(x.to(memory_format=torch.channels_last_3d)), expected, rtol=1e-4, atol=1e-5
        )


def test_bfloat16_is_safe() -> None:
    """Weights and activations in bf16: finite, and near float32 (bf16 keeps 8 bits: 2**-8 per operation)."""
    torch.manual_seed(0)
    model = create_model("t3d_tiny", num_classes=5)
    x = torch.randn(4, 3, 8, 32, 32)
    half = copy.deepcopy(model).bfloat16()
    y = half(x.bfloat16())
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in half.parameters())
    expected = model(x)
    assert (y.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t3d_tiny", "p3d_resnet50", "resnet3d_18"])
def test_compiled_models_have_one_graph_and_the_same_result(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=5).eval()
    x = torch.randn(2, 3, 8, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
