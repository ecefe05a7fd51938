"""Position and time embeddings at other sizes, against interpolation written down."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cliplift.models import ModelError, create_model
from cliplift.models.state_dicts import load_state
from cliplift.models.timesformer.weights import resize_positions, resize_times


def small(scheme: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_classes": 5, "in_frames": 4, "crop": 48, "width": 32, "depth": 2, "heads": 4}
    return create_model("timesformer_base", attention=scheme, **{**sizes, **options}).eval()


def lively(module: nn.Module) -> nn.Module:
    """The module with nothing at zero."""
    torch.manual_seed(1)
    for p in module.parameters():
        nn.init.normal_(p, std=0.1)
    return module.eval()


def ramp(rows: int, columns: int) -> Tensor:
    """(1, 1 + rows*columns, 2): CLS is -1; a patch holds its own row and column."""
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()
    return torch.cat([torch.full((1, 2), -1.0, dtype=torch.float64), places])[None]


def centres(old: int, new: int) -> np.ndarray:
    """Where the middles of ``new`` cells lie among ``old`` ones."""
    return (np.arange(new) + 0.5) * old / new - 0.5


def cubic(old: int, new: int) -> np.ndarray:
    """(new, old): Keys' cubic convolution with a = -0.75, the edge repeated."""
    a, weights = -0.75, np.zeros((new, old))
    for i, at in enumerate(centres(old, new)):
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            x = abs(at - j)
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[i, min(max(j, 0), old - 1)] += near if x <= 1 else far
    return weights


def test_bicubic_positions_over_both_axes() -> None:
    torch.manual_seed(0)
    pos = torch.randn(1, 1 + 6 * 8, 3, dtype=torch.float64)
    moved = resize_positions(pos, (6, 8), (12, 4), how="bicubic")
    assert torch.equal(moved[:, 0], pos[:, 0])
    plane = pos[0, 1:].unflatten(0, (6, 8)).numpy()
    expected = np.einsum("hi,wj,ijd->hwd", cubic(6, 12), cubic(8, 4), plane)
    np.testing.assert_allclose(moved[0, 1:].unflatten(0, (12, 4)).numpy(), expected, atol=1e-12)


def test_nearest_and_flat_nearest_positions() -> None:
    old, new = (14, 14), (28, 28)
    correct = resize_positions(ramp(*old), old, new, how="nearest")[0, 1:]
    expected = torch.cartesian_prod(torch.arange(28) // 2, torch.arange(28) // 2).double()
    assert torch.equal(correct, expected)
    flat = resize_positions(ramp(*old), old, new, how="flat_nearest")[0, 1:]
    assert torch.equal(flat, ramp(*old)[0, 1:][torch.arange(28 * 28) // 4])
    # how much of the released code's rule is right (models_seq 1.7: 7 %)
    assert round(100 * (flat == correct).all(-1).double().mean().item()) == 7


@pytest.mark.parametrize(("old", "new"), [(8, 12), (8, 3)])
def test_times_are_interpolated(old: int, new: int) -> None:
    times = torch.randn(1, old, 3, dtype=torch.float64)
    linear = resize_times(times, new, how="linear")[0].numpy()
    for d in range(3):
        np.testing.assert_allclose(
            linear[:, d], np.interp(centres(old, new), np.arange(old), times[0, :, d]), atol=1e-12
        )
    nearest = resize_times(times, new, how="nearest")
    assert torch.equal(nearest, times[:, torch.arange(new) * old // new])


@pytest.mark.parametrize("how", ["bicubic", "nearest", "flat_nearest"])
def test_other_sizes_at_load_and_at_run_time(how: str) -> None:
    """Loading into a larger model equals running the small one on large clips, except for flat_nearest."""
    source = lively(small("divided", time_resize="nearest", position_resize=how)).double()
    nn.init.normal_(source.pos_embed, std=3.0)
    options = {"in_frames": 8, "crop": 96, "time_resize": "nearest", "position_resize": how}
    larger = small("divided", **options).double()
    report = load_state(larger, source.state_dict(), source="small")
    assert any("pos_embed from 3x3 to 6x6" in note for note in report.notes)
    assert any("time_embed from 4 to 8" in note for note in report.notes)
    x = torch.randn(1, 3, 8, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        difference = (larger.forward_features(x) - source.forward_features(x)).abs().max()
    assert (difference > 1e-3) if how == "flat_nearest" else (difference < 1e-12)


def test_positions_that_are_no_square_are_refused() -> None:
    state = small("joint").state_dict()
    state["pos_embed"] = torch.zeros(1, 12, 32)
    with pytest.raises(ModelError, match="not CLS and a square"):
        load_state(small("joint"), state, source="odd")
