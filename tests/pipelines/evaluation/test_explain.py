"""Grad-CAM on networks whose maps are known in closed form, and against plain autograd on a network of the zoo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliplift.models import create_model
from cliplift.pipelines.evaluation.grad_cam import (
    ExplainError,
    grad_cam,
    overlay,
    share_inside,
    write_overlay,
)
from cliplift.sharding.video.decode import decode_frames


class Pooled(nn.Module):
    """Feature map: the input in 2 x 4 x 4 cells, negated channels after it. Head: mean over the map, then W."""

    def __init__(self, weight: list[list[float]]) -> None:
        super().__init__()
        self.head = nn.Linear(len(weight[0]), len(weight), bias=False)
        self.norm = nn.BatchNorm3d(len(weight[0]), affine=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor(weight))
        self.requires_grad_(False)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T / 2, H / 4, W / 4)."""
        return F.avg_pool3d(x, (2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.norm(self.forward_features(x)).relu_()  # in place, as real heads do
        return self.head(features.mean(dim=(2, 3, 4)))


def spot(channel: int, *, frame: int, row: int, column: int) -> Tensor:
    """A clip (1, 2, 8, 16, 16) of one lit cell of 2 x 4 x 4 in one channel."""
    clip = torch.zeros(1, 2, 8, 16, 16)
    clip[:, channel, frame : frame + 2, row : row + 4, column : column + 4] = 1
    return clip


def test_map_is_the_closed_form() -> None:
    model = Pooled([[2.0, 0.5], [-1.0, 3.0]]).eval()
    clips = torch.rand(3, 2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 1, 1])
    result = grad_cam(model, clips, classes=classes)
    # d logit_c / d A_k = W[c, k] / cells wherever A_k > 0 (always, here); BatchNorm divides by sqrt(1 + eps).
    cells, scale = 4 * 4 * 4, (1 + model.norm.eps) ** -0.5
    features = F.avg_pool3d(clips, (2, 4, 4))
    expected = torch.einsum("bk,bkthw->bthw", model.head.weight[classes] * scale / cells, features).relu()
    torch.testing.assert_close(result.coarse, expected)
    assert result.heat.shape == (3, 8, 16, 16)
    assert result.heat.amax(dim=(1, 2, 3)).tolist() == [1.0, 1.0, 1.0]


def test_each_class_is_explained_by_its_own_place_and_time() -> None:
    model = Pooled([[1.0, 0.0], [0.0, 1.0]]).eval()
    clip = spot(0, frame=0, row=0, column=0) + spot(1, frame=4, row=12, column=8)
    result = grad_cam(model, clip.repeat(2, 1, 1, 1, 1), classes=torch.tensor([0, 1]))
    at = [np.unravel_index(int(heat.argmax()), heat.shape) for heat in result.heat]
    (t0, y0, x0), (t1, y1, x1) = at
    assert (t0 < 2, y0 < 4, x0 < 4) == (True, True, True)
    assert (4 <= t1 < 6, y1 >= 12, 8 <= x1 < 12) == (True, True, True)
    assert result.coarse[0, 2, 3, 2] == 0


def test_evidence_against_a_class_is_no_heat() -> None:
    model = Pooled([[-1.0, 0.0], [0.0, 0.0]]).eval()
    result = grad_cam(model, spot(0, frame=2, row=4, column=4), classes=torch.tensor([0]))
    assert result.heat.sum() == 0
    assert torch.isfinite(result.heat).all()


def test_the_predicted_class_is_taken_when_none_is_given() -> None:
    model = Pooled([[1.0, 0.0], [0.0, 5.0]]).eval()
    clip = spot(0, frame=0, row=0, column=0) + spot(1, frame=0, row=8, column=8)
    result = grad_cam(model, clip)
    assert result.classes.tolist() == [1]
    assert result.probabilities.item() == pytest.approx(model(clip).softmax(dim=1)[0, 1].item())


def test_the_model_is_left_as_it_was() -> None:
    model = Pooled([[1.0, 0.0], [0.0, 1.0]])
    model.norm.eval()  # frozen BatchNorm inside a model in training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        grad_cam(model, spot(0, frame=0, row=0, column=0))
    assert (model.training, model.norm.training) == (True, False)
    assert "forward_features" not in vars(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_network_of_the_zoo_agrees_with_plain_autograd() -> None:
    torch.manual_seed(0)
    model = create_model("t3d_tiny", num_classes=5, in_frames=8).eval()
    clips = torch.randn(2, 3, 8, 64, 64)
    result = grad_cam(model, clips, classes=torch.tensor([1, 4]))

    kept: list[Tensor] = []
    original = model.forward_features

    def keep(x: Tensor) -> Tensor:
        kept.append(original(x))
        kept[0].retain_grad()
        return kept[0]

    model.forward_features = keep  # the whole network in the graph, gradients by backward()
    logits = model(clips)
    (logits[0, 1] + logits[1, 4]).backward()
    features, gradient = kept[0], kept[0].grad
    assert gradient is not None
    expected = torch.einsum("bk,bkthw->bthw", gradient.mean(dim=(2, 3, 4)), features).relu()
    torch.testing.assert_close(result.coarse, expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_an_earlier_layer_agrees_with_plain_autograd(frozen: bool) -> None:
    torch.manual_seed(0)
    model = create_model("t3d_tiny", num_classes=5, in_frames=8).eval()
    clips = torch.randn(2, 3, 8, 64, 64)
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    handle = model.get_submodule("features.transition1").register_forward_hook(keep)
    logits = model(clips)
    (logits[0, 1] + logits[1, 4]).backward()
    handle.remove()
    (features,) = kept
    assert features.grad is not None
    expected = torch.einsum("bk,bkthw->bthw", features.grad.mean(dim=(2, 3, 4)), features).relu()
    model.requires_grad_(not frozen)
    result = grad_cam(model, clips, classes=torch.tensor([1, 4]), layer="features.transition1")
    assert result.coarse.shape == (2, 2, 8, 8)
    torch.testing.assert_close(result.coarse, expected.detach())
    assert not model.get_submodule("features.transition1")._forward_hooks


def test_a_layer_that_will_not_do_is_said() -> None:
    model = create_model("t3d_tiny", num_classes=5, in_frames=8).eval()
    clips = torch.randn(1, 3, 8, 64, 64)
    with pytest.raises(
        ExplainError, match=r"no layer 'features\.transition9'; near it: features\.transition"
    ):
        grad_cam(model, clips, layer="features.transition9")
    with pytest.raises(ExplainError, match=r"classifier has features \(1, 5\)"):
        grad_cam(model, clips, layer="classifier")
    video = create_model("efficientnet_lite0_tam", num_classes=5).eval()  # (B, T, C, H, W) between its blocks
    with pytest.raises(ExplainError, match=r"blocks.3 has features \(1, 8, 40"):
        grad_cam(video, clips, layer="blocks.3")


class Small(nn.Module):
    """Two 3D convolutions on gray clips: enough to tell a direction of motion."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 12, (3, 5, 5), stride=(1, 2, 2), padding=(1, 2, 2))
        self.second = nn.Conv3d(12, 24, (3, 3, 3), stride=(1, 2, 2), padding=1)
        self.head = nn.Linear(24, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 1, T, H, W) -> (B, 24, T, H / 4, W / 4)."""
        return self.second(self.first(x).relu()).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x).mean(dim=(2, 3, 4)))


def moving_squares(count: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clips (B, 1, 6, 32, 32) of a square going left (0) or right (1) over still noise; labels; boxes per frame."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    clips = 0.3 * torch.randn(count, 1, 1, 32, 32, generator=generator).repeat(1, 1, 6, 1, 1)
    rows = torch.randint(0, 25, (count,), generator=generator)
    starts = torch.randint(0, 13, (count,), generator=generator)
    boxes = torch.zeros(count, 6, 4, dtype=torch.int64)
    for i, (label, y, start) in enumerate(zip(labels, rows, starts, strict=True)):
        for t in range(6):
            x = int(start) + 2 * (t if label else 5 - t)
            clips[i, 0, t, y : y + 7, x : x + 7] = 1.5
            boxes[i, t] = torch.tensor([int(y), x, int(y) + 7, x + 7])
    return clips, labels, boxes


@pytest.mark.slow
def test_the_map_of_a_trained_network_follows_the_moving_shape() -> None:
    torch.manual_seed(0)
    model = Small()
    clips, labels, _ = moving_squares(64, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(clips), labels).backward()
        optimizer.step()
    clips, labels, boxes = moving_squares(24, seed=2)
    result = grad_cam(model, clips)
    assert (result.classes == labels).float().mean() > 0.9  # it has learned what is explained here
    # Boxes one cell of the feature map (4 pixels) wider, as the map is no finer; evenly spread heat scores the area.
    wide = torch.cat([boxes[..., :2] - 4, boxes[..., 2:] + 4], dim=-1)
    by_chance = share_inside(torch.ones_like(result.heat), wide).mean()
    assert share_inside(result.heat, wide).mean() > 2.5 * by_chance


def test_share_inside_by_hand() -> None:
    heat = torch.zeros(2, 1, 4, 4)
    heat[0, 0, 1, 1], heat[0, 0, 3, 3] = 3.0, 1.0
    heat[1] = 1.0
    boxes = torch.tensor([[[0, 0, 2, 2]], [[0, 0, 2, 2]]])
    assert share_inside(heat, boxes).tolist() == [0.75, 0.25]


def test_overlay_colours_hot_places_and_grays_cold_ones() -> None:
    frames = np.full((2, 4, 4, 3), (200, 40, 90), dtype=np.uint8)
    heat = np.zeros((2, 4, 4), dtype=np.float32)
    heat[1, 0, 0] = 1.0
    seen = overlay(frames, heat)
    luma = 0.299 * 200 + 0.587 * 40 + 0.114 * 90
    assert (seen[0] == round(0.6 * luma)).all()
    expected = 0.35 * 0.6 * luma + 0.65 * np.array([252, 255, 164])
    assert np.abs(seen[1, 0, 0] - expected).max() <= 0.5
    assert seen[1, 0, 1].tolist() == seen[0, 0, 1].tolist()


def test_overlay_video_holds_clip_and_map_side_by_side(tmp_path: Path) -> None:
    frames = np.full((6, 32, 48, 3), 120, dtype=np.uint8)
    heat = np.zeros((6, 32, 48), dtype=np.float32)
    heat[:, 8:24, 16:32] = 1.0
    path = tmp_path / "maps" / "clip.mp4"
    write_overlay(path, frames, heat, fps=12.5)
    shown = decode_frames(path.read_bytes(), range(6), decoder="pyav")
    assert shown.shape == (6, 32, 96, 3)
    # H.264 with subsampled chroma: the middles of flat areas are exact to a few levels.
    assert np.abs(shown[3, 4, 8].astype(int) - 120).max() <= 6
    hot = overlay(frames, heat)[3, 16, 24].astype(int)
    assert np.abs(shown[3, 16, 48 + 24].astype(int) - hot).max() <= 12


class _NoFeatures(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3, 4))


class _Tokens(Pooled):
    def forward_features(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)  # (B, N, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x).mean(dim=1)


class _Twice(Pooled):
    def forward(self, x: Tensor) -> Tensor:
        return (self.forward_features(x) + self.forward_features(x)).mean(dim=(2, 3, 4))


class _Deaf(Pooled):
    def forward(self, x: Tensor) -> Tensor:
        self.forward_features(x)
        return x.mean(dim=(2, 3, 4)).requires_grad_(True)


WEIGHT = [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("model", "classes", "said"),
    [
        (_NoFeatures(), None, "has no forward_features"),
        (_Tokens(WEIGHT), None, "_Tokens has features"),
        (_Twice(WEIGHT), None, "2 times"),
        (_Deaf(WEIGHT), None, "do not depend"),
        (Pooled(WEIGHT), torch.tensor([2]), "between 0 and 1"),
        (Pooled(WEIGHT), torch.tensor([0, 1]), "int64 of shape"),
    ],
)
def test_what_cannot_be_explained_is_said(model: nn.Module, classes: Tensor | None, said: str) -> None:
    with pytest.raises(ExplainError, match=said):
        grad_cam(model, spot(0, frame=0, row=0, column=0), classes=classes)
    assert "forward_features" not in vars(model)


def test_shapes_are_checked() -> None:
    with pytest.raises(ExplainError, match="clips"):
        grad_cam(Pooled(WEIGHT), torch.zeros(2, 8, 16, 16))
    with pytest.raises(ExplainError, match="boxes"):
        share_inside(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, dtype=torch.int64))
    with pytest.raises(ExplainError, match="do not belong together"):
        overlay(np.zeros((2, 4, 4, 3), dtype=np.uint8), np.zeros((2, 4, 5), dtype=np.float32))
