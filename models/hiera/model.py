"""Hiera: four stages of plain attention, the first two within mask units, with max-pooled queries between them.

Paper: Ryali et al., "Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles", ICML 2023, arXiv
2306.00989. Public code: facebookresearch/hiera.

The net: one Conv3d of overlapping patches -> tokens of 2 frames x 4 x 4 pixels; learned places, one table for rows and
columns and one for time, added; blocks. A mask unit is 8 x 8 tokens of one frame of tokens. At the first block of
stages 2, 3 and 4 the queries are the maximum of 2 x 2 tokens, and width and heads double.

Here tokens stand as (B, P, U, D): P tokens of a unit, U units. Within a unit the order is (y1 x1 y2 x2 y3 x3), y1 and
x1 the lowest bits of row and column: pooling 2 x 2 neighbours is then the maximum over the first 4 parts of P, three
times over, and dropping a unit is an index into U. Units are numbered frame by frame, row by row.

Shape letters: B clips, C channels, T H W frames of tokens, rows and columns of units, D width, A heads, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.hiera.weights import adapt_hiera
from cliplift.models.layers import DropPath, PooledClassifier
from cliplift.models.protocol import InputSpec, ModelError
from cliplift.models.video_vit.positions import TokenGrid

POOLINGS = 3  # levels of 2 x 2 within a unit
UNIT = 2**POOLINGS  # tokens of a unit's side
PATCH_KERNEL, PATCH_STRIDE, PATCH_PADDING = (3, 7, 7), (2, 4, 4), (1, 3, 3)
POOL = 4  # tokens that one query is the maximum of
BIAS = 0.02  # where the classifier's biases start
HEAD_SCALE = 0.001

# "classifier": truncated normal, all biases (LayerNorms' too) at 0.02. "masked": Xavier, biases at 0.
Init = Literal["classifier", "masked"]


class HieraLinear(nn.Linear):
    """Linear that initialises itself in one of the two ways; ``scale`` multiplies the classifier's."""

    def __init__(self, inputs: int, outputs: int, *, init: Init, scale: float = 1.0) -> None:
        self.init, self.scale = init, scale  # read by reset_parameters, which the constructor calls
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        if self.init == "masked":
            nn.init.xavier_uniform_(self.weight)
            nn.init.zeros_(self.bias)
        else:
            nn.init.trunc_normal_(self.weight, std=0.02)
            nn.init.constant_(self.bias, BIAS)
            with torch.no_grad():
                self.weight.mul_(self.scale)
                self.bias.mul_(self.scale)


class HieraNorm(nn.LayerNorm):
    """LayerNorm with eps 1e-6 whose bias starts where the layers' do."""

    def __init__(self, width: int, *, init: Init) -> None:
        self.init = init
        super().__init__(width, eps=1e-6)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.constant_(self.bias, 0.0 if self.init == "masked" else BIAS)


class PatchConv(nn.Conv3d):
    """The patches' kernel; masked pretraining starts it as a Linear of the patch, flat."""

    def __init__(self, channels: int, width: int, *, init: Init) -> None:
        self.init = init  # read by reset_parameters, which the constructor calls
        super().__init__(channels, width, PATCH_KERNEL, stride=PATCH_STRIDE, padding=PATCH_PADDING)

    def reset_parameters(self) -> None:
        super().reset_parameters()  # the bias stays torch's
        if self.init == "masked":
            nn.init.xavier_uniform_(self.weight.view(len(self.weight), -1))
        else:
            nn.init.trunc_normal_(self.weight, std=0.02)


class PatchEmbed(nn.Module):
    """Overlapping patches. Pixels of hidden units are zeroed first: the 7 x 7 kernel reaches over a unit's edge."""

    def __init__(self, channels: int, width: int, *, init: Init) -> None:
        super().__init__()
        self.proj = PatchConv(channels, width, init=init)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """(B, C, frames, height, width) and, where units are hidden, ``seen`` (B, T, H, W), 1 for visible units ->
        (B, D, T, rows of tokens, columns of tokens)."""
        if seen is not None:
            pixels = [UNIT * PATCH_STRIDE[1], UNIT * PATCH_STRIDE[2]]
            mask = seen.repeat_interleave(PATCH_STRIDE[0], 1).repeat_interleave(pixels[0], 2)
            x = x * mask.repeat_interleave(pixels[1], 3)[:, None].to(x.dtype)
        return cast(Tensor, self.proj(x))


class Places(nn.Module):
    """Learned vectors of rows and columns, and of times; tables of another size are resized on the way."""

    def __init__(self, grid: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.grid = grid
        self.spatial = _table(grid[1] * grid[2], width)
        self.temporal = _table(grid[0], width)

    def forward(self, units: TokenGrid) -> Tensor:
        """The places of a clip's tokens: (1, D, T, rows of tokens, columns of tokens)."""
        frames, *plane = self.grid
        space: Tensor = torch.unflatten(self.spatial.transpose(1, 2), 2, tuple(plane))
        time: Tensor = self.temporal.transpose(1, 2)
        wanted = [units.rows * UNIT, units.columns * UNIT]
        if wanted != plane:
            space = F.interpolate(space, size=wanted, mode="bicubic", align_corners=False)
        if units.frames != frames:
            time = F.interpolate(time, size=units.frames, mode="linear", align_corners=False)
        return space[:, :, None] + time[:, :, :, None, None]


class UnitAttention(nn.Module):
    """Attention within every unit, or over all tokens; ``pools``: queries are maxima of 2 x 2 tokens."""

    def __init__(
        self, width: int, outputs: int, heads: int, *, within_units: bool, pools: bool, init: Init
    ) -> None:
        super().__init__()
        self.heads, self.within_units, self.pools = heads, within_units, pools
        self.qkv = HieraLinear(width, 3 * outputs, init=init)
        self.proj = HieraLinear(outputs, outputs, init=init)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, U, D) -> (B, P or P/4, U, D')."""
        q, k, v = rearrange(
            self.qkv(x), "b p u (three a d) -> three b a p u d", three=3, a=self.heads
        ).unbind()
        if self.pools:
            q = torch.unflatten(q, 2, (POOL, -1)).amax(dim=2)
        units = x.shape[2]
        if self.within_units:
            q, k, v = (part.transpose(2, 3) for part in (q, k, v))  # (B, A, U, P, d)
            y = rearrange(F.scaled_dot_product_attention(q, k, v), "b a u p d -> b p u (a d)")
        else:
            q, k, v = (part.flatten(2, 3) for part in (q, k, v))
            y = rearrange(F.scaled_dot_product_attention(q, k, v), "b a (p u) d -> b p u (a d)", u=units)
        return cast(Tensor, self.proj(y))


class HieraMlp(nn.Module):
    def __init__(self, width: int, *, init: Init) -> None:
        super().__init__()
        self.fc1 = HieraLinear(width, 4 * width, init=init)
        self.fc2 = HieraLinear(4 * width, width, init=init)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x))))


class HieraBlock(nn.Module):
    """Attention, then MLP, both residual. Where the width changes, the residual path is a Linear of the normed tokens,
    pooled as the queries are."""

    def __init__(
        self,
        width: int,
        outputs: int,
        heads: int,
        *,
        within_units: bool,
        pools: bool,
        init: Init,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.pools = pools
        self.norm1 = HieraNorm(width, init=init)
        self.attn = UnitAttention(width, outputs, heads, within_units=within_units, pools=pools, init=init)
        self.norm2 = HieraNorm(outputs, init=init)
        self.mlp = HieraMlp(outputs, init=init)
        self.drop_path = _ClipDropPath(drop_path)
        self.proj = HieraLinear(width, outputs, init=init) if width != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, U, D) -> (B, P or P/4, U, D')."""
        normed = self.norm1(x)
        if self.proj is not None:
            x = self.proj(normed)
            if self.pools:
                x = torch.unflatten(x, 1, (POOL, -1)).amax(dim=1)
        x = x + self.drop_path(self.attn(normed))
        return x + cast(Tensor, self.drop_path(self.mlp(self.norm2(x))))


class _ClipDropPath(DropPath):
    """Drop path of tokens that stand in units."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, U, D) -> (B, P, U, D)."""
        return super().forward(x.flatten(1, 2)).view_as(x)


class Hiera(PooledClassifier):
    """See the module's docstring.

    Args:
        width, heads: of the first stage; both double with every stage.
        stages: blocks of the four stages.
        pretraining: the encoder of :class:`~cliplift.models.hiera.decoder.HieraMaskedAutoencoder`: stage 4 does not
            pool, there is no LN after the mean, and layers start as masked pretraining starts them.
        num_classes, input_spec, drop_path, dropout: as for every model; ``drop_path`` is the last block's rate.
    """

    head_name = "head"

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        stages: Sequence[int],
        num_classes: int,
        input_spec: InputSpec,
        pretraining: bool = False,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        last = width * 2 ** (len(stages) - 1)
        super().__init__(feature_dim=last, num_classes=num_classes, input_spec=input_spec, dropout=dropout)
        _check(
            stages,
            width=width,
            heads=heads,
            drop_path=drop_path,
            pretraining=pretraining,
            classes=num_classes,
        )
        init: Init = "masked" if pretraining else "classifier"
        self.pretraining, self.stages = pretraining, tuple(stages)
        units = self.unit_grid(input_spec.frames, input_spec.crop_height, input_spec.crop_width)
        self.table_grid = (units.frames, units.rows * UNIT, units.columns * UNIT)
        self.patch_embed = PatchEmbed(input_spec.channels, width, init=init)
        self.places = Places(self.table_grid, width)
        self.blocks = nn.ModuleList(
            _blocks(width, heads, stages, pretraining=pretraining, drop_path=drop_path, init=init)
        )
        self.stage_ends = tuple(sum(stages[: i + 1]) - 1 for i in range(len(stages)))
        self.norm = nn.Identity() if pretraining else HieraNorm(last, init=init)
        self.reset_classifier(num_classes)

    def unit_grid(self, frames: int, height: int, width: int | None = None) -> TokenGrid:
        """Mask units of a clip along time, rows and columns (square if ``width`` is None).

        Raises:
            ModelError: sizes that are not made of whole units of 2 frames x 32 x 32 pixels.
        """
        width = height if width is None else width
        sizes = [PATCH_STRIDE[0], PATCH_STRIDE[1] * UNIT, PATCH_STRIDE[2] * UNIT]
        if any(
            given < size or given % size for given, size in zip((frames, height, width), sizes, strict=True)
        ):
            raise ModelError(
                f"a clip of {frames} frames of {height}x{width} pixels is not made of whole mask units of "
                f"{sizes[0]} frames of {sizes[1]}x{sizes[2]}: change in_frames or the crop"
            )
        return TokenGrid(frames // sizes[0], height // sizes[1], width // sizes[2])

    def forward_stages(self, x: Tensor, visible: Tensor | None = None) -> list[Tensor]:
        """The tokens after each stage.

        Args:
            x: (B, C, frames, height, width).
            visible: numbers (B, u) of the mask units to compute; None for all U.

        Returns:
            Four tensors (B, P, u, D): P is 64, 16, 4 and 1, or 4 when ``pretraining``.
        """
        z = self._embed(x, visible)
        found = []
        for i, block in enumerate(self.blocks):
            z = block(z)
            if i in self.stage_ends:
                found.append(z)
        return found

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, frames, height, width) -> (B, D, T, rows, columns): one place a unit, 2 x 2 if ``pretraining``."""
        grid = self.unit_grid(*x.shape[2:])
        z = self.forward_stages(x)[-1]
        side = 1 if z.shape[1] == 1 else 2
        units = {"t": grid.frames, "h": grid.rows, "w": grid.columns}
        return rearrange(z, "b (y x) (t h w) d -> b d t (h y) (w x)", y=side, **units)

    def forward_pooled(self, x: Tensor) -> Tensor:
        """(B, C, frames, height, width) -> (B, D): LN of the mean token."""
        return cast(Tensor, self.norm(self.forward_stages(x)[-1].flatten(1, 2).mean(dim=1)))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a freshly initialised one; 0 removes it."""
        super().reset_classifier(num_classes)
        if num_classes:
            reference = self.places.spatial
            head = HieraLinear(self.feature_dim, num_classes, init="classifier", scale=HEAD_SCALE)
            self.head = head.to(device=reference.device, dtype=reference.dtype)

    def checkpoint_blocks(self) -> list[str]:
        """Every block; the first ones, of most tokens, hold most."""
        return [f"blocks.{i}" for i in range(len(self.blocks))]

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Public weights under our names; see :mod:`cliplift.models.hiera.weights`."""
        return adapt_hiera(state, own=self.state_dict(), grid=self.table_grid)

    def _embed(self, x: Tensor, visible: Tensor | None) -> Tensor:
        self.check_input(x)
        grid = self.unit_grid(*x.shape[2:])
        units = {"t": grid.frames, "h": grid.rows, "w": grid.columns}
        seen = None
        if visible is not None:
            flat = torch.zeros(len(x), grid.tokens, device=x.device).scatter_(1, visible, 1.0)
            seen = torch.unflatten(flat, 1, tuple(grid))
        z = self.patch_embed(x, seen) + self.places(grid)
        bits = dict.fromkeys(("y1", "x1", "y2", "x2", "y3", "x3"), 2)
        z = rearrange(
            z, "b d t (h y3 y2 y1) (w x3 x2 x1) -> b (y1 x1 y2 x2 y3 x3) (t h w) d", **bits, **units
        )
        if visible is not None:
            z = z.gather(2, visible[:, None, :, None].expand(-1, z.shape[1], -1, z.shape[3]))
        return cast(Tensor, z)


def _blocks(
    width: int, heads: int, stages: Sequence[int], *, pretraining: bool, drop_path: float, init: Init
) -> list[HieraBlock]:
    depth = sum(stages)
    starts = [sum(stages[:i]) for i in range(1, len(stages))]
    pooling = starts[:-1] if pretraining else starts
    made = []
    for i in range(depth):
        # attention within units lags one block: the block that pools still attends within them
        within_units = i <= starts[1]
        outputs = width * 2 if i in starts else width
        heads = heads * 2 if i in starts else heads
        rate = drop_path * i / max(depth - 1, 1)
        made.append(
            HieraBlock(
                width,
                outputs,
                heads,
                within_units=within_units,
                pools=i in pooling,
                init=init,
                drop_path=rate,
            )
        )
        width = outputs
    return made


def _table(places: int, width: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, places, width), std=0.02))


def _check(
    stages: Sequence[int], *, width: int, heads: int, drop_path: float, pretraining: bool, classes: int
) -> None:
    if len(stages) != 4 or min(stages) < 1:
        raise ModelError(f"stages={tuple(stages)} must be four positive numbers of blocks")
    if min(width, heads) < 1 or width % heads:
        raise ModelError(f"width={width} must be a multiple of heads={heads}, and both positive")
    if not 0 <= drop_path < 1:
        raise ModelError(f"drop_path={drop_path} must be in [0, 1)")
    if pretraining and classes:
        raise ModelError("an encoder to pretrain has no classifier: num_classes=0, or pretraining=False")
