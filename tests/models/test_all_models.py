"""What every registered model promises, checked over ``list_models()``.

Every model is built, run and asked for its head on the meta device, at its own input. The ones in ``AFFORDABLE`` also
run for real in the fast suite, at a small input, and the others in the slow suite. A new model is covered by the first
and the last without a line here.
"""

import fnmatch
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cliplift.models import ModelError, VideoModel, create_model, list_models
from cliplift.models.factory import from_pretrained, save_pretrained
from cliplift.models.measure import input_shape
from cliplift.models.registry import model_entry
from cliplift.pipelines.compute.recompute import recompute_blocks

# pattern -> (frames, height, width) a CPU core can train on; the first pattern that fits counts
SMALL_INPUTS = {
    "p3d_[0-9]*": (16, 40, 33),
    "p3d_resnet*": (8, 40, 33),
    "densenet3d_*": (8, 40, 33),
    "t3d_*": (8, 40, 33),
    "resnet3d_*": (8, 40, 33),
    "resnext3d_*": (16, 40, 33),
    "r2plus1d_*": (8, 40, 33),
    "i3d_*": (8, 40, 33),
    "late_temporal": (8, 40, 33),
    "slowfast_*": (8, 40, 33),
    "inception3d": (8, 40, 33),
    "c3d": (8, 40, 33),
    "densenet_*": (1, 65, 40),
    "resnet_*": (1, 65, 40),
    "efficientnet_*": (1, 65, 40),
    "timesformer_*": (2, 32, 32),
    "image_vit_large_14": (1, 28, 42),
    "image_vit_*": (1, 32, 48),
    "video_vit_giant_14": (4, 28, 42),
    "video_vit_*": (4, 32, 48),
    "vjepa2*": (4, 32, 48),
    "hiera_*": (4, 64, 32),
    "frame_average": (3, 65, 40),
    "convlstm*": (3, 40, 32),
    "fclstm": (3, 64, 64),
    "gru_rcn": (3, 40, 33),
    "vgg16": (1, 65, 40),
    "caffenet": (1, 99, 67),
    "caffenet_hybrid": (1, 99, 67),
    "single_frame": (3, 65, 40),
    "lrcn": (3, 65, 40),
    "snippets_local_pooling": (120, 65, 40),  # its classifier is as wide as the clip is long
    "snippets_*": (11, 65, 40),
    "attention_lstm": (3, 65, 40),
    "multi_lstm": (16, 65, 40),
    "visual_attention": (2, 224, 224),  # one weight vector for each of 7 x 7 places
}
# Blocks beyond the first few are alike: giants run for real with fewer, since a billion parameters and their gradients
# do not fit a small machine. pattern -> options
SHORTENED: dict[str, dict[str, object]] = {
    "image_vit_large_14": {"depth": 2},
    "video_vit_large_16": {"depth": 2},
    "video_vit_huge_16": {"depth": 2},
    "video_vit_giant_14": {"depth": 2},
    "vjepa21_*": {"depth": 12, "width": 384, "heads": 6, "hidden": 768},
    "vjepa2_*": {"depth": 2},
    "hiera_large": {"stages": (1, 1, 2, 1)},
    "hiera_huge": {"stages": (1, 1, 2, 1)},
}
# parameters that a batch of clips with labels has no use for: V-JEPA 2.1's tubelets of images, and its inner levels
IDLE = {"vjepa21_*": ("image_embed.", "level_norms.0.", "level_norms.1.", "level_norms.2.")}
AFFORDABLE = [
    "lrcn",
    "multi_lstm",
    "t3d_tiny",
    "video_vit_tiny_8",
    "densenet3d_121",
    "p3d_63",
    "p3d_resnet50",
    "resnet3d_18",
    "inception3d",
    "efficientnet_lite0",
]


def shortened(name: str) -> dict[str, object]:
    return next((options for pattern, options in SHORTENED.items() if fnmatch.fnmatchcase(name, pattern)), {})


def idle(name: str) -> tuple[str, ...]:
    return next((keys for pattern, keys in IDLE.items() if fnmatch.fnmatchcase(name, pattern)), ())


def small_shape(name: str, model: nn.Module) -> tuple[int, ...]:
    """(1, C, T, H, W) from the table above, or the model's own input."""
    dims = model_entry(name).dims
    for pattern, (frames, height, width) in SMALL_INPUTS.items():
        if fnmatch.fnmatchcase(name, pattern):
            time = () if dims == "2d" else (frames,)
            return (1, model.input_spec.channels, *time, height, width)
    return input_shape(model, dims=dims)


# Larger ones of families of which a smaller one is tested at once.
LARGER = (
    "*_101", "*_121", "*_131", "*_152", "*_169", "*_199", "*_201", "*resnet101", "*resnet152", "*_large*", "*_huge*",
    "*_giant*", "*_gigantic*", "*_late", "*_vitl", "*_hr",
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * any(fnmatch.fnmatchcase(name, one) for one in LARGER))
        for name in list_models()
    ],
)
def test_protocol_sizes_and_heads(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=7).eval()
        assert isinstance(model, VideoModel)
        x = torch.empty(input_shape(model, dims=model_entry(name).dims))
        made = {k: v.shape for k, v in model.state_dict().items()}
        with torch.no_grad():
            assert model.num_classes == 7
            model.reset_classifier(0)
            assert model.num_classes == 0
            assert model(x).shape == (1, model.feature_dim)
            body = {k: v.shape for k, v in model.state_dict().items()}
            bare = create_model(name, num_classes=0)
            assert {k: v.shape for k, v in bare.state_dict().items()} == body, "num_classes=0 from the start"
            model.reset_classifier(7)
            assert {k: v.shape for k, v in model.state_dict().items()} == made, "the head it was built with"
            assert model(x).shape == (1, 7)
    head = set(model.state_dict()) - set(body)
    assert head, "no tensor belongs to the head"
    assert sum(p.numel() for n, p in model.named_parameters() if n in head) >= 7 * model.feature_dim
    names = model.checkpoint_blocks()
    assert names, "nothing can be checkpointed"
    assert len(set(names)) == len(names)
    for block in names:
        assert isinstance(model.get_submodule(block), nn.Module)
    assert recompute_blocks(model, 1.0) == names
    assert set(model.state_dict()) == set(body) | head, "checkpointing renamed tensors"


def check_for_real(name: str, folder: Path, *, repeat: bool) -> None:
    """Forward and backward with gradients everywhere, determinism in eval mode, batch independence, save and load."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, **shortened(name))
    assert isinstance(model, VideoModel)
    shape = small_shape(name, model)
    x = torch.randn(2, *shape[1:])
    out = model.train()(x)
    assert out.shape == (2, 3)
    out.square().sum().backward()
    for key, p in model.named_parameters():
        if p.requires_grad and not key.startswith(idle(name)):
            assert p.grad is not None, f"{key} got no gradient"
            assert p.grad.isfinite().all(), key
    model.eval()
    with torch.no_grad():
        answer: Tensor = model(x)
        assert answer.isfinite().all()
        alone = model(x[:1])
        # the same clip alone and beside another: float32 kernels may add in another order
        assert (alone - answer[:1]).abs().max() < 1e-3 * max(1.0, answer.abs().max().item())
        assert torch.equal(model(x[:1]), alone), "eval mode is not deterministic"
        if repeat:
            saved = save_pretrained(model, folder, name=name, options=shortened(name), extra={"k": 1})
            again = from_pretrained(saved)
            assert torch.equal(again(x[:1]), alone), "save and load changed the answer"


@pytest.mark.parametrize("name", AFFORDABLE)
def test_an_affordable_model_for_real(name: str, tmp_path: Path) -> None:
    check_for_real(name, tmp_path, repeat=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in list_models() if name not in AFFORDABLE])
def test_every_other_model_for_real(name: str, tmp_path: Path) -> None:
    check_for_real(name, tmp_path, repeat=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in AFFORDABLE else pytest.mark.exhaustive) for n in list_models()],
)
def test_every_model_checkpointed_computes_the_same_gradients(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, **shortened(name)).train()
    x = torch.randn(2, *small_shape(name, model)[1:])
    gradients = []
    for fraction in (0.0, 1.0):
        recompute_blocks(model, fraction)
        model.zero_grad()
        torch.manual_seed(1)
        model(x).square().sum().backward()
        gradients.append({k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, value in gradients[0].items():
        assert (value - gradients[1][key]).abs().max() <= 1e-4 * max(1.0, value.abs().max().item()), key


def test_an_impossible_head_is_refused() -> None:
    model = create_model("t3d_tiny", num_classes=2)
    with pytest.raises(ModelError, match="num_classes=-3"):
        model.reset_classifier(-3)
