"""Where a token stands: the grid of a clip, fixed sine/cosine vectors, and rotary embedding in three dimensions.

Tokens are numbered flat and time first: number = (t * H + h) * W + w. Everything here is computed from those numbers,
so any subset of a clip's tokens, in any order, keeps its places.

Sine/cosine (VideoMAE): one axis, the flat number n. Channel j has the angle n / 10000^(2 floor(j/2) / D); its sine on
even, its cosine on odd channels. Never trained, and in no state dict.

Rotary (V-JEPA 2): a head's channels are cut into three parts of 2 * ((D // 3) // 2) for time, row and column; what is
left over is not rotated. Pair i of a part of P channels turns by position * 10000^(-i / (P/2)). Both channels of a pair
must turn by the same angle; the released V-JEPA 2 gives channel c the angle of pair c mod P/2, so that its pairs
(2i, 2i+1) mix two angles. The published weights were trained so (layout "concatenated"). V-JEPA 2.1 turns pairs
properly ("interleaved").

Shape letters: B clips, N tokens, T frames, H W rows and columns of tokens, D width of a token or of a head.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BASE = 10_000.0

RopeLayout = Literal["concatenated", "interleaved"]
Rotation = tuple[Tensor, Tensor]  # cosines and sines, each (B or 1, 1, N, D)


class TokenGrid(NamedTuple):
    """Tokens of a clip along time, rows and columns."""

    frames: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.frames * self.rows * self.columns

    @property
    def tokens_of_a_frame(self) -> int:
        return self.rows * self.columns


def sincos_table(tokens: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """The fixed position vectors of a clip's tokens: (N, D), float32, computed in float64."""
    number = torch.arange(tokens, dtype=torch.float64, device=device)[:, None]
    channel = torch.arange(width, device=device)
    angle = number / BASE ** ((2 * (channel // 2)).double() / width)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def resized_table(table: Tensor, old: TokenGrid, new: TokenGrid) -> Tensor:
    """A table (N, D) of one grid for another, trilinearly; every token then keeps its place in the picture."""
    volume = table.T.reshape(1, -1, *old)
    return F.interpolate(volume, size=tuple(new), mode="trilinear", align_corners=False).flatten(2)[0].T


def rotary(
    numbers: Tensor,
    grid: TokenGrid,
    head_width: int,
    *,
    layout: RopeLayout,
    native: tuple[int, int] | None = None,
) -> Rotation:
    """Cosines and sines for tokens of a clip.

    Args:
        numbers: flat token numbers (B, N), or (N,) for all clips alike.
        grid: the clip's grid, by which the numbers are read.
        head_width: D of one attention head.
        layout: see the module's docstring.
        native: rows and columns whose range of positions a grid of any size shall span (V-JEPA 2.1's
            ``interpolate_rope``: 16 x 16, that is 256 pixels); None leaves positions whole numbers.

    Returns:
        Two float32 tensors (B, 1, N, D), or (1, 1, N, D); channels that are not rotated have cosine 1 and sine 0.
    """
    numbers = numbers if numbers.ndim == 2 else numbers[None]
    in_frame = numbers % grid.tokens_of_a_frame
    places = [
        (numbers // grid.tokens_of_a_frame).float(),
        (in_frame // grid.columns).float(),
        (in_frame % grid.columns).float(),
    ]
    if native is not None:
        for axis, (wanted, given) in enumerate(zip(native, grid[1:], strict=True), start=1):
            places[axis] = places[axis] * ((wanted - 1) / max(given - 1, 1))
    part = 2 * ((head_width // 3) // 2)
    turns = BASE ** -(torch.arange(part // 2, dtype=torch.float32, device=numbers.device) / (part / 2))
    angles = []
    for place in places:
        angle = place[..., None] * turns  # (B, N, part / 2)
        if layout == "interleaved":
            angles.append(angle.repeat_interleave(2, dim=-1))
        else:
            angles.append(torch.cat([angle, angle], dim=-1))
    rest = head_width - 3 * part
    turned = F.pad(torch.cat(angles, dim=-1), (0, rest))  # angle 0: not rotated
    return turned.cos()[:, None], turned.sin()[:, None]


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys (B, A, N, D) with each pair of channels (2i, 2i+1) turned. Computed in float32."""
    cosine, sine = rotation
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # type: ignore[no-untyped-call]
    crossed = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (x * cosine + crossed * sine).to(x.dtype)
