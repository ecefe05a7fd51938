"""Sine/cosine vectors and rotary embedding against their formulas, number by number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cliplift.models.video_vit.positions import TokenGrid, resized_table, rotary, rotate, sincos_table

GRID = TokenGrid(3, 4, 5)


def test_sincos_is_the_formula_over_the_flat_number() -> None:
    table = sincos_table(2048, 10)
    for number in (0, 1, 7, 1567, 2047):
        for channel in range(10):
            angle = number / 10000 ** (2 * (channel // 2) / 10)
            expected = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
            assert table[number, channel].item() == pytest.approx(expected, abs=1e-7)


def test_a_resized_table_keeps_its_corners_and_its_own_grid() -> None:
    table = sincos_table(GRID.tokens, 8)
    torch.testing.assert_close(resized_table(table, GRID, GRID), table, atol=1e-6, rtol=0)
    larger = TokenGrid(3, 8, 10)
    moved = resized_table(table, GRID, larger)
    assert moved.shape == (larger.tokens, 8)
    # bilinear without aligned corners copies the corner cells
    torch.testing.assert_close(moved[0], table[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(moved[-1], table[-1], atol=1e-6, rtol=0)


def place(number: int) -> tuple[int, int, int]:
    frame, inside = divmod(number, GRID.rows * GRID.columns)
    return (frame, *divmod(inside, GRID.columns))


def by_formula(x: list[float], number: int, *, layout: str, native: tuple[int, int] | None) -> list[float]:
    """One token of one head: a part of 2 * ((D // 3) // 2) channels for time, row and column each."""
    width = len(x)
    part = 2 * ((width // 3) // 2)
    t, h, w = (float(p) for p in place(number))
    if native is not None:
        h, w = h * (native[0] - 1) / (GRID.rows - 1), w * (native[1] - 1) / (GRID.columns - 1)
    result = list(x)
    for axis, position in enumerate((t, h, w)):
        for channel in range(part):
            pair = channel % (part // 2) if layout == "concatenated" else channel // 2
            angle = position * 10000 ** (-pair / (part / 2))
            at = axis * part + channel
            other = -x[at + 1] if channel % 2 == 0 else x[at - 1]
            result[at] = x[at] * math.cos(angle) + other * math.sin(angle)
    return result


@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
@pytest.mark.parametrize("native", [None, (16, 16)])
@pytest.mark.parametrize("width", [32, 64, 80])  # parts of 10, 20 and 26; 2, 4 and 2 channels are left over
def test_rotary_is_the_formula(layout: str, native: tuple[int, int] | None, width: int) -> None:
    torch.manual_seed(0)
    numbers = torch.tensor([[0, 59, 23, 7], [31, 2, 40, 58]])
    x = torch.randn(2, 3, 4, width)
    turned = rotate(x, rotary(numbers, GRID, width, layout=layout, native=native))
    for clip in range(2):
        for head in range(3):
            for i, number in enumerate(numbers[clip].tolist()):
                expected = by_formula(x[clip, head, i].tolist(), number, layout=layout, native=native)
                torch.testing.assert_close(turned[clip, head, i], torch.tensor(expected), atol=1e-5, rtol=0)


def scores(layout: str, numbers: Tensor) -> Tensor:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 36).expand(-1, -1, -1, 2, -1)
    table = rotary(numbers, TokenGrid(64, 64, 64), 36, layout=layout)
    return rotate(q, table)[..., 0, :] @ rotate(k, table)[..., 1, :].mT


@pytest.mark.parametrize(("layout", "relative"), [("interleaved", True), ("concatenated", False)])
def test_only_proper_pairs_make_scores_relative(layout: str, relative: bool) -> None:
    """Two tokens moved together: the score stays when pairs turn as one; the released layout mixes two angles."""
    start = torch.tensor([5 * 4096 + 9 * 64 + 3, 8 * 4096 + 2 * 64 + 30])
    moved = start + 11 * 4096 + 20 * 64 + 7
    assert torch.allclose(scores(layout, start), scores(layout, moved), atol=1e-4) is relative


def test_rotary_works_in_half_precision_and_keeps_the_type() -> None:
    x = torch.randn(1, 2, 4, 64)
    table = rotary(torch.arange(4), GRID, 64, layout="interleaved")
    turned = rotate(x.bfloat16(), table)
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned.float(), rotate(x, table), atol=0.05, rtol=0.02)
