"""TimeSformer: published counts, and which tokens of a block see which."""

import pytest
import torch

from cliplift.models import ModelError, create_model
from cliplift.models.measure import measure_model
from cliplift.models.timesformer import Attention, Block

GRID = (4, 4, 4)


@pytest.mark.parametrize(
    ("scheme", "classes", "parameters"),
    [("divided", 400, 121_566_352), ("joint", 400, 86_112_400), ("space", 400, 86_106_256)],
)
def test_parameters_of_the_released_code(scheme: str, classes: int, parameters: int) -> None:
    assert measure_model("timesformer_base", num_classes=classes, attention=scheme).parameters == parameters


@pytest.mark.parametrize(
    ("scheme", "millions"),
    [("space", 85.93), ("joint", 85.94), ("divided", 121.39), ("local_global", 121.39), ("axial", 156.85)],
)
def test_parameters_of_table_1(scheme: str, millions: float) -> None:
    measured = measure_model("timesformer_base", num_classes=174, attention=scheme)
    assert round(measured.parameters / 1e6, 2) == millions


@pytest.mark.parametrize(("scheme", "gmacs"), [("space", 140.5), ("joint", 179.6), ("divided", 195.8)])
def test_macs(scheme: str, gmacs: float) -> None:
    assert measure_model("timesformer_base", attention=scheme).gmacs == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize("step", ["joint", "space", "time", "width", "height", "local", "global"])
def test_one_step_moves_exactly_its_group(step: str) -> None:
    torch.manual_seed(0)
    layer = Attention(16, 2, step=step, cls="none").double()
    x = torch.randn(1, 64, 16, dtype=torch.float64)
    t, h, w = 1, 2, 3
    y = x.clone()
    y[0, (t * 4 + h) * 4 + w] += 1
    moved = (layer(x, GRID) != layer(y, GRID)).any(-1).view(GRID)
    tt, hh, ww = torch.meshgrid(*(torch.arange(4),) * 3, indexing="ij")
    expected = {
        "joint": tt >= 0,
        "space": tt == t,
        "time": (hh == h) & (ww == w),
        "width": (tt == t) & (hh == h),
        "height": (tt == t) & (ww == w),
        "local": (hh // 2 == h // 2) & (ww // 2 == w // 2),
        "global": (tt % 2 == t % 2) & (hh % 2 == h % 2) & (ww % 2 == w % 2),
    }[step]
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("scheme", ["divided", "joint"])
def test_frame_order_does_not_matter_without_times(scheme: str) -> None:
    torch.manual_seed(0)
    model = create_model("timesformer_base", attention=scheme, crop=32, width=32, depth=2, heads=4)
    model = model.eval().double()
    for name, p in model.named_parameters():
        if "_fc." in name:
            torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(1, 3, 8, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(x), model(x[:, :, torch.randperm(8)]), atol=1e-12, rtol=0)


def test_bad_options() -> None:
    with pytest.raises(ModelError, match="even"):
        create_model("timesformer_base", attention="local_global", in_frames=7)
    with pytest.raises(ModelError, match="cls="):
        create_model("timesformer_base", attention="axial", cls="paper")
    with pytest.raises(ModelError, match="drop_path"):
        create_model("timesformer_base", drop_path=1.0)


def test_cls_stays_out_of_the_released_time_step_only() -> None:
    torch.manual_seed(0)
    for rule, moves in (("released", False), ("paper", True)):
        block = Block(16, 2, scheme="divided", cls=rule, drop_path=0.0)
        z = torch.randn(1, 65, 16)
        other = z.clone()
        other[:, 0] += 1
        step = block.temporal_attn
        a, b = (step(v if moves else v[:, 1:], GRID) for v in (z, other))
        assert bool((a[:, -64:] != b[:, -64:]).any()) is moves
