"""The model table's numbers, against counts done by hand."""

import pytest
import torch
from torch import nn

from cliplift.models import ModelError, create_model
from cliplift.models.measure import input_shape, measure_model
from cliplift.models.protocol import InputSpec


def test_a_measurement_is_the_sum_over_layers() -> None:
    """C3D by hand: every convolution's output positions times its kernel, then fc6, fc7, fc8."""
    sizes = [(16, 112), (16, 56), (8, 28), (8, 28), (4, 14), (4, 14), (2, 7), (2, 7)]
    widths = [3, 64, 128, 256, 256, 512, 512, 512, 512]
    macs = sum(27 * i * o * t * s * s for i, o, (t, s) in zip(widths, widths[1:], sizes, strict=False))
    macs += 8192 * 4096 + 4096 * 4096 + 4096 * 101
    row = measure_model("c3d", num_classes=101)
    assert row.gmacs * 1e9 == pytest.approx(macs, rel=1e-9)
    assert (row.input_shape, row.feature_shape, row.feature_dim) == ((3, 16, 112, 112), (512, 1, 4, 4), 4096)
    assert (row.dims, row.num_classes) == ("3d", 101)


def test_frames_crop_and_options_change_the_measurement() -> None:
    small, large = measure_model("t3d_tiny"), measure_model("t3d_tiny", in_frames=16, crop=112)
    assert large.input_shape == (3, 16, 112, 112)
    assert large.gmacs > 4 * small.gmacs
    assert large.parameters == small.parameters
    assert measure_model("t3d_tiny", fusion=True).parameters > small.parameters
    with pytest.raises(ModelError, match="fussion"):
        measure_model("t3d_tiny", fussion=True)


def test_measuring_leaves_no_tensor_behind() -> None:
    """Everything happens on the meta device: the default device is untouched afterwards."""
    measure_model("t3d_tiny")
    assert torch.zeros(1).device.type == "cpu"


def test_image_models_are_measured_on_images() -> None:
    class Spec(nn.Module):
        input_spec = InputSpec(frames=8, crop_height=10, crop_width=12)

    assert input_shape(Spec(), dims="2d") == (1, 3, 10, 12)
    assert input_shape(Spec(), dims="3d", batch=2) == (2, 3, 8, 10, 12)
    assert input_shape(Spec(), dims="3d", crop=5) == (1, 3, 8, 5, 5)


def test_a_head_with_a_learned_query_is_counted() -> None:
    """A view of a parameter goes into a block of its own; torch's counter asked it for a gradient function."""
    options = {"head": "attentive", "final_norm": "tokens", "probe_heads": 3}
    measure = measure_model("video_vit_tiny_8", num_classes=5, in_frames=4, crop=32, **options)
    network = create_model("video_vit_tiny_8", num_classes=5, in_frames=4, **options)
    assert measure.parameters == sum(p.numel() for p in network.parameters())
    assert measure.gmacs > 0


def test_a_crop_is_an_option_where_the_model_has_one() -> None:
    """Learned places are of one crop: a row of D for each patch of 16 x 16 pixels."""
    large, small = measure_model("image_vit_small_16"), measure_model("image_vit_small_16", crop=112)
    assert small.input_shape[-2:] == (112, 112)
    assert large.parameters - small.parameters == (14**2 - 7**2) * small.feature_dim
