"""Hiera and its masked autoencoder: published sizes and costs, numbers of the released code, and the mask units."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cliplift.models import InputSpec, ModelError, create_model
from cliplift.models.factory import load_pretrained
from cliplift.models.hiera.decoder import (
    HieraMaskedAutoencoder,
    first_frame_targets,
    place_numbers,
    unit_mask,
)
from cliplift.models.hiera.model import Hiera
from cliplift.models.state_dicts import load_state
from cliplift.models.video_vit.masks import MaskDraws, token_numbers
from cliplift.models.video_vit.positions import TokenGrid
from cliplift.pipelines.compute.recompute import recompute_blocks

SPEC = InputSpec(frames=4, crop_height=64, crop_width=96)
VISIBLE = torch.tensor([[0, 3, 4, 7, 10], [1, 2, 5, 8, 11]])


@pytest.fixture(scope="module")
def formula(load_module: Callable[[Path], ModuleType], repository: Path) -> ModuleType:
    return load_module(repository / "tests/models/numbers_by_formula.py")


def small(num_classes: int = 0, *, pretraining: bool = False) -> Hiera:
    torch.manual_seed(0)
    options = {"width": 16, "heads": 1, "stages": (1, 2, 2, 2), "pretraining": pretraining}
    return Hiera(num_classes=num_classes, input_spec=SPEC, **options).eval()


def autoencoder() -> HieraMaskedAutoencoder:
    return HieraMaskedAutoencoder(small(pretraining=True), width=32, depth=2, heads=4).eval()


def released(net: nn.Module) -> dict[str, Tensor]:
    """The state dict under the released names."""
    state = {}
    for key, value in net.state_dict().items():
        name = (
            key.removeprefix("encoder.").replace("head.", "head.projection.").replace("places.", "pos_embed_")
        )
        state[name.replace("fusion.", "multi_scale_fusion_heads.").replace(".conv.", ".")] = value
    return state


@pytest.mark.parametrize(
    ("name", "classifier", "masked"),
    [
        ("hiera_base", 51_092_560, 79_367_104),
        ("hiera_base_plus", 69_392_240, 98_320_352),
        ("hiera_large", 213_091_600, 243_621_760),
        ("hiera_huge", 671_627_664, 710_861_568),
    ],
)
def test_published_sizes(name: str, classifier: int, masked: int) -> None:
    with torch.device("meta"):
        nets = create_model(name), HieraMaskedAutoencoder(create_model(name, num_classes=0, pretraining=True))
    assert tuple(sum(p.numel() for p in net.parameters()) for net in nets) == (classifier, masked)


@pytest.mark.parametrize(
    ("name", "view", "masked"), [("hiera_base", 101.7, 71.3), ("hiera_large", 412.1, 101.5)]
)
def test_published_costs(name: str, view: float, masked: float) -> None:
    with torch.device("meta"), torch.no_grad():
        clips = torch.empty(1, 3, 16, 224, 224)
        with FlopCounterMode(display=False) as whole:
            create_model(name).eval()(clips)
        net = HieraMaskedAutoencoder(create_model(name, num_classes=0, pretraining=True)).eval()
        with FlopCounterMode(display=False) as part:
            net(clips, torch.empty(1, 39, dtype=torch.long))
    assert whole.get_total_flops() / 2e9 == pytest.approx(view, rel=0.01)
    assert part.get_total_flops() / 2e9 == pytest.approx(masked, rel=0.01)


def test_logits_of_the_released_code(formula: ModuleType) -> None:
    model = small(5)
    load_state(model, formula.weights(released(model)), source="released")
    expected = torch.tensor([[-2.059437, -0.417973, -0.022988, -0.27106, -0.152643]])
    torch.testing.assert_close(model(formula.clip(1, 3, 4, 64, 96)), expected, atol=1e-5, rtol=0)


def test_loss_prediction_and_target_of_the_released_code(formula: ModuleType) -> None:
    net = autoencoder()
    load_state(net, formula.weights(released(net)), source="released")
    found = net(formula.clip(2, 3, 4, 64, 96), VISIBLE)
    assert found.loss.item() == pytest.approx(1.0770025253295898, abs=1e-5)
    for tensor, expected in (
        (found.prediction, [-0.528249, -0.062975, -0.593407, -0.54465, -0.106829, -0.513808]),
        (found.target, [0.62397, 0.505845, 0.679146, 0.740009, 1.2731, -1.55394]),
    ):
        picked = tensor.flatten()[:: tensor.numel() // 6]
        torch.testing.assert_close(picked, torch.tensor(expected), atol=1e-5, rtol=0)


def test_39_of_392_units_are_kept() -> None:
    draws = MaskDraws.of(1, epoch=0, positions=range(1000))
    visible, hidden = token_numbers(unit_mask(TokenGrid(8, 7, 7), draws, ratio=0.9))
    assert visible.shape == (1000, 39)
    assert hidden.shape == (1000, 353)


def test_hidden_units_change_nothing() -> None:
    """Their pixels are zeroed before the 7 x 7 patches, which reach over the edges of units."""
    net = autoencoder()
    clips = torch.randn(2, 3, 4, 64, 96)
    before = net(clips, VISIBLE).prediction
    for unit in set(range(12)) - set(VISIBLE[0].tolist()):
        t, inside = divmod(unit, 6)
        h, w = divmod(inside, 3)
        clips[0, :, 2 * t : 2 * t + 2, 32 * h : 32 * h + 32, 32 * w : 32 * w + 32] += 5
    assert torch.equal(net(clips, VISIBLE).prediction, before)
    clips[0, :, :2, :32, :32] += 5  # unit 0 is visible
    assert not torch.equal(net(clips, VISIBLE).prediction[0], before[0])


def test_places_of_units() -> None:
    """2 frames of 2 x 3 units, 4 x 6 places a frame: unit 7 is frame 1, row 0, column 1."""
    found = place_numbers(torch.tensor([[7, 5]]), TokenGrid(2, 2, 3))
    assert sorted(found[0, ::2].tolist()) == [24 + 2, 24 + 3, 24 + 8, 24 + 9]
    assert sorted(found[0, 1::2].tolist()) == [16, 17, 22, 23]


def test_the_target_is_the_first_frame_of_a_tubelet() -> None:
    clips = torch.randn(1, 3, 4, 32, 48)
    target = first_frame_targets(clips)
    values = clips[0, :, 2, 16:32, 32:48].permute(1, 2, 0).flatten().double()  # row, column, channel
    expected = (values - values.mean()) / (values.var(unbiased=True) + 1e-6).sqrt()
    torch.testing.assert_close(target[0, 6 + 3 + 2].double(), expected, atol=1e-5, rtol=0)


def test_features_stand_at_their_places() -> None:
    """A bright unit moves the feature of its own place most, in a net that attends within units only at first."""
    model = small()
    clips = torch.zeros(1, 3, 4, 64, 96)
    dark = model.forward_features(clips)
    assert dark.shape == (1, 128, 2, 2, 3)
    clips[:, :, 2:, 32:, 64:] = 3.0
    moved = (model.forward_features(clips) - dark).norm(dim=1)[0]
    assert moved.argmax() == 11


@pytest.mark.parametrize("shape", [(8, 64, 96), (2, 32, 32), (4, 96, 64)])
def test_other_clips_resize_the_places(shape: tuple[int, int, int]) -> None:
    model = small(5)
    assert model(torch.randn(2, 3, *shape)).shape == (2, 5)


def test_mistakes_are_told() -> None:
    with pytest.raises(ModelError, match="whole mask units"):
        small(5)(torch.randn(1, 3, 4, 48, 96))
    with pytest.raises(ModelError, match="num_classes=0"):
        small(5, pretraining=True)
    with pytest.raises(ModelError, match="pretraining=True"):
        HieraMaskedAutoencoder(small())
    with pytest.raises(ModelError, match="learned places"):
        autoencoder()(torch.randn(1, 3, 8, 64, 96), VISIBLE[:1])


def test_a_pretraining_file_starts_a_classifier(tmp_path: Path) -> None:
    net = autoencoder()
    torch.save({"model_state": released(net)}, tmp_path / "mae.pth")
    model = small(5)
    report = load_pretrained(model, tmp_path / "mae.pth")
    assert set(report.head_fresh) == {"head.weight", "head.bias"}
    assert torch.equal(model.blocks[3].attn.qkv.weight, net.encoder.blocks[3].attn.qkv.weight)
    again = autoencoder()
    load_pretrained(again, tmp_path / "mae.pth")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())


def test_weights_of_another_crop_are_resized() -> None:
    def square(crop: int) -> Hiera:
        spec = InputSpec(frames=4, crop_height=crop, crop_width=crop)
        return Hiera(width=16, heads=1, stages=(1, 1, 1, 1), num_classes=0, input_spec=spec)

    small_crop, large_crop = square(64), square(96)
    report = load_state(large_crop, small_crop.state_dict(), source="smaller")
    assert any("16x16 to 24x24" in note for note in report.notes)
    x = torch.randn(1, 3, 4, 96, 96)
    torch.testing.assert_close(large_crop.eval()(x), small_crop.eval()(x))  # as the smaller does at run time


def test_recomputed_blocks_give_the_same_gradients() -> None:
    net, clips = autoencoder(), torch.randn(2, 3, 4, 64, 96)
    gradients = []
    for fraction in (0.0, 1.0):
        recompute_blocks(net, fraction)
        net.zero_grad()
        net(clips, VISIBLE).loss.backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)
