"""Hiera's masked autoencoder: whole units are hidden, stages are fused, pixels of the hidden places are given.

Source: facebookresearch/hiera, hiera/hiera_mae.py; arXiv 2306.00989, section 3. Outputs of stages 1 and 2 come to stage
4's grid by convolutions without overlap, stage 4's own is added, and one LN follows. The decoder has 8 blocks of width
512 on all places, visible and hidden, in the order of the picture.

Of a tubelet only the first frame is predicted: 16 x 16 pixels, normalised by mean and unbiased variance over all values
together (1e-6 below the root), ordered row, column, channel. The pixels are the net's input, already normalised.

Shape letters: B clips, u visible units, U all units, N places of the decoder, m hidden ones, D width, V values.
"""

from __future__ import annotations

from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from cliplift.models.hiera.model import PATCH_STRIDE, UNIT, Hiera, HieraBlock, HieraLinear, HieraNorm
from cliplift.models.hiera.weights import adapt_hiera_autoencoder
from cliplift.models.protocol import ModelError
from cliplift.models.video_vit.blocks import gather_tokens
from cliplift.models.video_vit.decoder import Reconstruction, other_tokens
from cliplift.models.video_vit.masks import MaskDraws, exact_mask
from cliplift.models.video_vit.positions import TokenGrid

SIDE = 2  # places of the decoder along a unit's side
PIXELS = PATCH_STRIDE[1] * UNIT // SIDE  # 16, of a place's side


def unit_mask(grid: TokenGrid, draws: MaskDraws, *, ratio: float) -> Tensor:
    """Hide all but int(U * (1 - ratio)) random units (the released code rounds what is kept). (B, U), True = hidden."""
    if not 0 <= ratio < 1:
        raise ModelError(f"ratio={ratio} must be in [0, 1)")
    return exact_mask(grid, draws, hidden=grid.tokens - int(grid.tokens * (1 - ratio)))


class UnitFusion(nn.Module):
    """A stage's tokens, unit by unit, to 2 x 2 places of the last stage's width."""

    def __init__(self, width: int, outputs: int, side: int) -> None:
        super().__init__()
        self.levels = side.bit_length() - 1  # side = 2 ** levels
        size = (1, side // SIDE, side // SIDE)
        self.conv = nn.Conv3d(width, outputs, size, stride=size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, u, D) -> (B, 4, u, D')."""
        # lowest bits first, see the encoder's module
        bits = {f"{axis}{i}": 2 for axis in "yx" for i in range(self.levels)}
        flat = " ".join(f"y{i} x{i}" for i in range(self.levels))
        rows, columns = (" ".join(f"{axis}{i}" for i in reversed(range(self.levels))) for axis in "yx")
        planes = rearrange(x, f"b ({flat}) u d -> (b u) d 1 ({rows}) ({columns})", **bits)
        return cast(Tensor, rearrange(self.conv(planes), "(b u) d 1 y x -> b (y x) u d", b=len(x)))


class HieraMaskedAutoencoder(nn.Module):
    """An encoder with Hiera's decoder. The encoder's parameters are below "encoder.".

    Args:
        encoder: a :class:`Hiera` built with ``pretraining=True``.
        width, depth, heads: of the decoder; 512, 8, 16 in all published nets.
    """

    def __init__(self, encoder: Hiera, *, width: int = 512, depth: int = 8, heads: int = 16) -> None:
        super().__init__()
        if not encoder.pretraining:
            raise ModelError("masked pretraining needs a Hiera built with pretraining=True")
        if width % heads:
            raise ModelError(f"the decoder's width={width} must be a multiple of heads={heads}")
        last = encoder.feature_dim
        self.encoder = encoder
        widths = (last // 8, last // 4)  # of stages 1 and 2
        self.fusion = nn.ModuleList(UnitFusion(w, last, UNIT // 2**i) for i, w in enumerate(widths))
        self.encoder_norm = HieraNorm(last, init="masked")
        self.decoder_embed = HieraLinear(last, width, init="masked")
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))
        frames, rows, columns = encoder.table_grid
        self.table_grid = (frames, rows * SIDE // UNIT, columns * SIDE // UNIT)
        places = self.table_grid[0] * self.table_grid[1] * self.table_grid[2]
        self.decoder_pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, places, width), std=0.02))
        self.decoder_blocks = nn.ModuleList(
            HieraBlock(width, width, heads, within_units=False, pools=False, init="masked")
            for _ in range(depth)
        )
        self.decoder_norm = HieraNorm(width, init="masked")
        self.decoder_pred = HieraLinear(width, PIXELS * PIXELS * encoder.input_spec.channels, init="masked")

    def forward(self, clips: Tensor, visible: Tensor) -> Reconstruction:
        """
        Args:
            clips: (B, C, frames, height, width), normalised.
            visible: numbers (B, u) of the units the encoder sees.

        Returns:
            Predictions at the m = 4 (U - u) hidden places, numbered frame by frame, row by row, and the loss there.
        """
        grid = self.encoder.unit_grid(*clips.shape[2:])
        if (grid.frames, grid.rows * SIDE, grid.columns * SIDE) != self.table_grid:
            raise ModelError(
                f"this decoder has learned places for {self.table_grid}, not for a clip of {tuple(clips.shape[2:])}: "
                f"build the encoder with that in_frames and crop"
            )
        stages = self.encoder.forward_stages(clips, visible)
        fused = stages[-1] + sum(fuse(stage) for fuse, stage in zip(self.fusion, stages, strict=False))
        x = self.decoder_embed(self.encoder_norm(fused))
        numbers = place_numbers(visible, grid)
        hidden = other_tokens(numbers, SIDE * SIDE * grid.tokens)
        z = self.mask_token.to(x.dtype).expand(len(x), SIDE * SIDE * grid.tokens, -1)
        z = z.scatter(1, numbers[..., None].expand(-1, -1, x.shape[-1]), x.flatten(1, 2))
        z = (z + self.decoder_pos_embed)[:, None]  # one "unit" of all places
        for block in self.decoder_blocks:
            z = block(z)
        prediction = self.decoder_pred(self.decoder_norm(gather_tokens(z[:, 0], hidden)))
        with torch.no_grad():
            target = gather_tokens(first_frame_targets(clips), hidden)
        of_clip = (prediction.float() - target).square().mean(dim=(1, 2))
        counted = torch.ones_like(hidden, dtype=torch.float32)
        return Reconstruction(of_clip.mean(), of_clip, prediction, target, hidden, counted)

    def checkpoint_blocks(self) -> list[str]:
        """The encoder's blocks, then the decoder's."""
        inner = [f"encoder.{name}" for name in self.encoder.checkpoint_blocks()]
        return inner + [f"decoder_blocks.{i}" for i in range(len(self.decoder_blocks))]

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Public weights under our names; see :mod:`cliplift.models.hiera.weights`."""
        return adapt_hiera_autoencoder(state)


def place_numbers(units: Tensor, grid: TokenGrid) -> Tensor:
    """Flat numbers (B, 4 u) of the places of units (B, u), in the order of (place in the unit, unit)."""
    frame, inside = units // grid.tokens_of_a_frame, units % grid.tokens_of_a_frame
    row, column = inside // grid.columns, inside % grid.columns
    columns = grid.columns * SIDE
    found = [
        (frame * grid.rows * SIDE + row * SIDE + y) * columns + column * SIDE + x
        for y in range(SIDE)
        for x in range(SIDE)
    ]
    return torch.cat(found, dim=1)


def first_frame_targets(clips: Tensor) -> Tensor:
    """Normalised pixels of the first frame of every tubelet: (B, C, frames, height, width) -> (B, N, V), float32."""
    frames = clips[:, :, :: PATCH_STRIDE[0]].float()
    values = rearrange(frames, "b c t (h y) (w x) -> b (t h w) (y x c)", y=PIXELS, x=PIXELS)
    mean = values.mean(dim=-1, keepdim=True)
    return (values - mean) / (values.var(dim=-1, unbiased=True, keepdim=True) + 1e-6).sqrt()
