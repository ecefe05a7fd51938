"""TimeSformer: published counts and costs, options, other clip sizes, precision."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cliplift.models import ModelError, create_model
from cliplift.models.measure import measure_model
from cliplift.pipelines.compute.recompute import recompute_blocks

SCHEMES = ["divided", "joint", "space", "local_global", "axial"]


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("timesformer_base", {}, 121_566_352),
        ("timesformer_base", {"attention": "joint"}, 86_112_400),
        ("timesformer_base", {"attention": "space"}, 86_106_256),
        ("timesformer_hr", {}, 122_024_080),
        ("timesformer_large", {}, 121_633_936),
        ("timesformer_large", {"in_frames": 64}, 121_609_360),  # SSv2-L
        ("timesformer_base", {"num_classes": 0}, 121_258_752),
    ],
)
def test_parameters_of_the_released_code(name: str, options: dict[str, object], parameters: int) -> None:
    with torch.device("meta"):
        model = create_model(name, **{"num_classes": 400, **options})
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("scheme", "millions"),
    [("space", 85.93), ("joint", 85.94), ("divided", 121.39), ("local_global", 121.39), ("axial", 156.85)],
)
def test_parameters_of_table_1(scheme: str, millions: float) -> None:
    with torch.device("meta"):
        model = create_model("timesformer_base", num_classes=174, attention=scheme)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


def gmacs(name: str, **options: object) -> float:
    with torch.device("meta"):
        model = create_model(name, **options).eval()
        spec = model.input_spec
        x = torch.empty(1, 3, spec.frames, spec.crop_height, spec.crop_width)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("timesformer_base", {"attention": "space"}, 140.5),
        ("timesformer_base", {"attention": "joint"}, 179.6),
        ("timesformer_base", {}, 195.8),
        ("timesformer_hr", {}, 5108 / 3),  # the paper's 5.11 and 7.14 TFLOPs are three crops
        ("timesformer_large", {}, 7140 / 3),
        ("timesformer_base", {"attention": "joint", "crop": 448}, 1260),
        ("timesformer_base", {"crop": 448}, 850),
        ("timesformer_large", {"attention": "joint"}, 8140),
    ],
)
def test_macs_as_published(name: str, options: dict[str, object], expected: float) -> None:
    assert gmacs(name, **options) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("scheme", "extra", "keys"),
    [("local_global", 1, 392 + 196), ("axial", 2, 8 + 14 + 14), ("divided", 1, 8 + 196)],
)
def test_macs_of_unreleased_schemes_follow_from_their_keys(scheme: str, extra: int, keys: int) -> None:
    """Patches x (12 D^2 of a ViT block + 5 D^2 an extra step + 2 D a key); CLS is below the tolerance."""
    D, patches = 768, 8 * 196
    expected = 12 * patches * ((12 + 5 * extra) * D**2 + 2 * D * keys) + patches * 3 * 16**2 * D
    assert gmacs("timesformer_base", attention=scheme) == pytest.approx(expected / 1e9, rel=0.01)


def test_the_model_table_measures_the_same() -> None:
    assert measure_model("timesformer_base").gmacs == pytest.approx(195.8, rel=0.01)


def tiny(scheme: str = "divided", **options: object) -> nn.Module:
    """Two blocks of width 32 with nothing at zero."""
    torch.manual_seed(0)
    defaults = {"crop": 32, "width": 32, "depth": 2, "heads": 4, "num_classes": 5}
    model = create_model("timesformer_base", attention=scheme, **{**defaults, **options})
    for name, p in model.named_parameters():
        if "_fc." in name:
            nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.mark.parametrize("scheme", ["divided", "joint", "space"])
def test_frame_order_does_not_matter_without_times(scheme: str) -> None:
    model = tiny(scheme).double()
    x = torch.randn(1, 3, 8, 32, 32, dtype=torch.float64)
    order = torch.tensor([3, 0, 7, 5, 1, 2, 6, 4])
    torch.testing.assert_close(model(x), model(x[:, :, order]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("scheme", ["divided", "joint", "axial"])
def test_frame_order_matters_with_times(scheme: str) -> None:
    model = tiny(scheme).double()
    nn.init.normal_(model.time_embed)
    x = torch.randn(1, 3, 8, 32, 32, dtype=torch.float64)
    assert (model(x) - model(x.flip(2))).abs().max() > 1e-4


def test_space_averages_the_tokens_of_independent_frames_before_the_last_norm() -> None:
    model = tiny("space", in_frames=3).double()
    seen: list[Tensor] = []
    model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)
    model(x)
    together = seen[0]  # CLS
    seen.clear()
    for t in range(3):
        model(x[:, :, t : t + 1])
    torch.testing.assert_close(together, torch.stack(seen).mean(0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_features_lie_where_their_patches_are(scheme: str) -> None:
    model = tiny(scheme, in_frames=4)
    features = model.forward_features(torch.randn(2, 3, 4, 32, 64))
    assert features.shape == (2, 32, 4, 2, 4)
    _, patches = model.forward_tokens(torch.zeros(1, 3, 4, 32, 64))
    assert patches.shape == (1, 4, 2, 4, 32)


def test_a_patch_is_embedded_at_its_own_place() -> None:
    """No blocks at all: the features are the normalised patch, position and time embeddings."""
    model = tiny("divided", in_frames=2, depth=0).double()
    nn.init.normal_(model.time_embed)
    nn.init.normal_(model.pos_embed)
    x = torch.randn(1, 3, 2, 32, 32, dtype=torch.float64)
    features = model.forward_features(x)
    t, h, w = 1, 0, 1
    pixels = x[0, :, t, 16 * h : 16 * h + 16, 16 * w : 16 * w + 16]
    patch = torch.einsum("dchw,chw->d", model.patch_embed.proj.weight, pixels) + model.patch_embed.proj.bias
    expected = patch + model.pos_embed[0, 1 + h * 2 + w] + model.time_embed[0, t]
    expected = (expected - expected.mean()) / (expected.var(unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(features[0, :, t, h, w], expected, atol=1e-12, rtol=0)


def test_drop_path_is_a_float_that_rises_linearly() -> None:
    model = tiny(depth=3, drop_path=0.25)
    assert [block.drop_path.rate for block in model.blocks] == [0.0, 0.125, 0.25]
    assert [block.drop_path.rate for block in tiny(depth=1, drop_path=0.25).blocks] == [0.0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bfloat16_weights_and_autocast(scheme: str) -> None:
    """Two blocks round a few dozen times at 2^-9 relative each: 5 % of the logits' size is far above that, and far
    below what a mixed-up token costs."""
    model = tiny(scheme)
    x = torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(x)
        cast = model.bfloat16()(x.bfloat16())
    assert cast.dtype == torch.bfloat16
    for low in (mixed, cast):
        assert (low.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(("scheme", "cls"), [*((s, "released") for s in SCHEMES), ("divided", "paper")])
def test_training_leaves_out_only_what_does_not_count(scheme: str, cls: str) -> None:
    """In training the last block computes CLS alone: same logits and gradients as with all tokens."""
    model = tiny(scheme, cls=cls, drop_path=0.0).double()
    x = torch.randn(2, 3, 8, 32, 64, dtype=torch.float64)
    results = []
    for training in (True, False):
        model.train(training).zero_grad()
        with FlopCounterMode(display=False) as counter:
            logits = model(x)
            logits.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        results.append((counter.get_total_flops(), logits.detach(), gradients))
    (fewer, lean, lean_gradients), (more, full, gradients) = results
    assert fewer < 0.9 * more  # one of two blocks
    torch.testing.assert_close(lean, full, atol=1e-12, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(lean_gradients[name], gradient, atol=1e-9, rtol=1e-9)


def test_checkpointing_the_first_blocks_gives_the_same_gradients() -> None:
    x = torch.randn(2, 3, 8, 32, 32)
    gradients = []
    for share, wrapped in ((0.0, []), (0.5, ["blocks.0"])):
        model = tiny().train()
        assert recompute_blocks(model, share) == wrapped
        torch.manual_seed(1)  # drop path
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "local_global", "in_frames": 7}, "must be even"),
        ({"attention": "local_global", "crop": 48}, "must be even"),
        ({"attention": "axial", "cls": "paper"}, "cls='paper'"),
        ({"attention": "sliding"}, "attention='sliding' must be 'divided', 'joint'"),
        ({"cls": "mean"}, "cls='mean' must be 'released' or 'paper'"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"heads": 5}, "width=768 must be a multiple of heads=5"),
        ({"heads": 0}, "width=768 must be a multiple of heads=0"),
        ({"crop": 100}, "multiples of patch=16"),
        ({"patch": 0}, "multiples of patch=0"),
        ({"position_resize": "bilinear"}, "position_resize='bilinear'"),
        ({"time_resize": "cubic"}, "time_resize='cubic'"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with torch.device("meta"), pytest.raises(ModelError, match=message):
        create_model("timesformer_base", **options)


def test_a_clip_no_patches_fit_is_refused() -> None:
    with pytest.raises(ModelError, match="crop 32x40"):
        tiny()(torch.zeros(1, 3, 8, 32, 40))
    with pytest.raises(ModelError, match="must be even"):
        tiny("local_global")(torch.zeros(1, 3, 7, 64, 64))
