"""V-JEPA 2.1's encoder and predictor against numbers of the released code (app/vjepa_2_1 of facebookresearch/vjepa2),
run with weights and clips computed by formula under the released names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from cliplift.models import create_model
from cliplift.models.state_dicts import load_state
from cliplift.models.video_vit.latent import LatentPredictor
from cliplift.models.video_vit.model import VideoViT

RELEASED_ENCODER = (
    ("image_embed.proj.", "patch_embed_img.proj."),
    ("image_embed.modality", "img_mod_embed"),
    ("patch_embed.modality", "video_mod_embed"),
    ("level_norms.", "norms_block."),
)
RELEASED_PREDICTOR = (
    ("embed.hidden.", "predictor_embed.0."),
    ("embed.out.", "predictor_embed.2."),
    ("blocks.", "predictor_blocks."),
    ("norm.", "predictor_norm."),
    ("proj.", "predictor_proj."),
    ("proj_context.", "predictor_proj_context."),
    ("image_modality", "img_mod_embed"),
    ("video_modality", "video_mod_embed"),
)
KEEP = torch.tensor([[0, 5, 7, 9, 20, 23], [1, 2, 3, 11, 17, 19]])


@pytest.fixture(scope="module")
def formula(load_module: Callable[[Path], ModuleType], repository: Path) -> ModuleType:
    return load_module(repository / "tests/models/numbers_by_formula.py")


def released(net: nn.Module, table: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for key, value in net.state_dict().items():
        if key == "mask_tokens":
            state |= {f"mask_tokens.{i}": row[None, None] for i, row in enumerate(value)}
            continue
        name = next((theirs + key.removeprefix(ours) for ours, theirs in table if key.startswith(ours)), key)
        state[name] = value
    return state


def encoder(formula: ModuleType) -> VideoViT:
    model = create_model("vjepa21_base_16", num_classes=0, width=48, heads=2, hidden=96, crop=48, in_frames=4)
    load_state(model, formula.weights(released(model, RELEASED_ENCODER)), source="released")
    return cast(VideoViT, model.eval())


def test_levels_of_visible_tokens(formula: ModuleType) -> None:
    levels = torch.cat(encoder(formula).forward_levels(formula.clip(2, 3, 4, 48, 64), KEEP), dim=-1)
    found = levels.flatten()[:: levels.numel() // 5][:5]
    expected = torch.tensor([0.278403, -0.14555, -0.326696, 0.177364, -0.123793])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_an_image(formula: ModuleType) -> None:
    tokens = encoder(formula).forward_tokens(formula.clip(2, 3, 1, 48, 64))
    found = tokens.flatten()[:: tokens.numel() // 5][:5]
    expected = torch.tensor([-0.095418, 0.087673, -0.287135, -0.060728, 0.103773])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_predictions_of_targets_and_context(formula: ModuleType) -> None:
    model = encoder(formula)
    predictor = LatentPredictor.of(
        model, width=36, heads=3, mask_tokens=3, predict_context=True, native=None
    ).eval()
    load_state(predictor, formula.weights(released(predictor, RELEASED_PREDICTOR)), source="released")
    context = torch.tensor([[0, 5, 7, 9, 16, 17], [1, 2, 3, 11, 13, 15]])
    targets = torch.tensor([[1, 2, 3], [0, 4, 12]])
    levels = torch.cat(model.forward_levels(formula.clip(2, 3, 4, 48, 48), context), dim=-1)
    found = predictor(levels, context, targets, model.grid(4, 48), mask_token=1)
    for tensor, expected in zip(
        found,
        (
            [-0.322313, -0.353091, -0.100819, -0.173791, -0.270797],
            [0.940079, -0.184815, 0.055583, 0.106687, -0.005026],
        ),
        strict=True,
    ):
        picked = tensor.flatten()[:: tensor.numel() // 5][:5]
        torch.testing.assert_close(picked, torch.tensor(expected), atol=1e-5, rtol=0)
