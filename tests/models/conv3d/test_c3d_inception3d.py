"""The comparison rows C3D and Inception3D: published counts, sizes, and the released files' quirks."""

import itertools

import pytest
import torch

from cliplift.models import ModelError, create_model
from cliplift.models.measure import measure_model
from cliplift.models.state_dicts import load_state


def test_c3d_counts_and_sizes() -> None:
    """79,991,015 and 78,409,573: eight convolutions with bias, fc6 of 8192 inputs, fc7, fc8 (arXiv 1412.0767)."""
    widths = [3, 64, 128, 256, 256, 512, 512, 512, 512]
    convolutions = sum(27 * i * o + o for i, o in itertools.pairwise(widths))
    for classes in (101, 487):
        expected = convolutions + 8192 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * classes + classes
        measured = measure_model("c3d", num_classes=classes)
        assert measured.parameters == expected
    assert measured.feature_shape == (512, 1, 4, 4)
    assert measured.gmacs == pytest.approx(38.55, rel=0.01)


def test_c3d_at_the_published_size_uses_fc6_unchanged_and_takes_others() -> None:
    torch.manual_seed(0)
    model = create_model("c3d", num_classes=3, width=32).eval()
    features = torch.randn(2, 512, 1, 4, 4)
    pooled = torch.nn.functional.adaptive_avg_pool3d(features, (1, 4, 4))
    assert torch.equal(pooled, features)
    with torch.no_grad():
        for shape in ((2, 3, 8, 32, 40), (1, 3, 17, 50, 31)):
            assert model(torch.randn(shape)).shape == (shape[0], 3)
        x = torch.randn(1, 3, 16, 32, 32)
        hidden = model.fc6(
            torch.nn.functional.adaptive_avg_pool3d(model.forward_features(x), (1, 4, 4)).flatten(1)
        )
        expected = model.fc8(model.fc7(hidden.relu()).relu())
        torch.testing.assert_close(model(x), expected)
    assert model.feature_dim == 32
    model.reset_classifier(0)
    assert model(x).shape == (1, 32)


def test_inception3d_has_the_released_parameters() -> None:
    for padding in ("aligned", "released"):
        assert measure_model("inception3d", padding=padding).parameters == 14_643_696
    with pytest.raises(ModelError, match="padding='same'"):
        create_model("inception3d", padding="same")


@pytest.mark.parametrize(
    ("padding", "sizes"),
    [
        (
            "aligned",
            {
                "pre_layers": (192, 16, 28, 28),
                "b3": (480, 16, 28, 28),
                "e4": (832, 8, 14, 14),
                "b5": (1024, 4, 7, 7),
            },
        ),
        # as in the released file: 18 frames and 57 pixels after the padded 1x1x1 convolution
        (
            "released",
            {
                "pre_layers": (192, 18, 28, 28),
                "b3": (480, 18, 28, 28),
                "e4": (832, 9, 14, 14),
                "b5": (1024, 5, 8, 8),
            },
        ),
    ],
)
def test_inception3d_sizes(padding: str, sizes: dict[str, tuple[int, ...]]) -> None:
    seen: dict[str, tuple[int, ...]] = {}
    with torch.device("meta"):
        model = create_model("inception3d", padding=padding)
        for name in sizes:
            part = model.get_submodule(name)
            part.register_forward_hook(lambda _, __, y, name=name: seen.__setitem__(name, tuple(y.shape[1:])))
        model(torch.empty(1, 3, 32, 224, 224))
    assert seen == sizes


def test_the_released_classifier_is_read_as_a_linear_layer() -> None:
    torch.manual_seed(0)
    model, other = (
        create_model("inception3d", num_classes=4).eval(),
        create_model("inception3d", num_classes=4),
    )
    public = dict(other.state_dict())
    public["convF.weight"] = public.pop("classifier.weight")[:, :, None, None, None]
    public["convF.bias"] = public.pop("classifier.bias")
    load_state(model, public, source="released")
    x = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        per_position = torch.nn.functional.conv3d(
            model.forward_features(x), public["convF.weight"], public["convF.bias"]
        )
        torch.testing.assert_close(model(x), per_position.mean((2, 3, 4)))
