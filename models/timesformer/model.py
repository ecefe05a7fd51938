"""TimeSformer: a ViT whose blocks attend over time and space, in the paper's five schemes.

Paper: Bertasius, Wang, Torresani, "Is Space-Time Attention All You Need for Video Understanding?", ICML 2021,
arXiv 2102.05095 (sections 3.1-3.3, eq. 1-13). Public code: facebookresearch/TimeSformer
(timesformer/models/vit.py). The blocks and the schemes are in :mod:`cliplift.models.timesformer.attention`, weights
from and to other projects in :mod:`cliplift.models.timesformer.weights`.

The net: patches of every frame -> Linear; CLS before all of them; one position embedding for all frames, one time
embedding for all positions; blocks; LayerNorm; the CLS token is the clip's feature.

The head is one Linear (released code): the paper's "1-hidden-layer MLP" does not fit its own parameter counts.

Shape letters: B clips, C channels, T frames, H W patches down and across, P pixels of a patch's side,
N tokens = 1 + T*H*W, D width, K classes. Token 0 is CLS; the patches follow frame by frame, row by row.
"""

from __future__ import annotations

from typing import cast

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from cliplift.models.layers import PooledClassifier
from cliplift.models.protocol import InputSpec, ModelError, check_choices
from cliplift.models.registry import variant
from cliplift.models.timesformer.attention import Block, ClsRule, Grid, Scheme, check_grid, check_scheme
from cliplift.models.timesformer.weights import (
    PositionResize,
    TimeResize,
    adapt_timesformer,
    resize_positions,
    resize_times,
)

PAPER = "Bertasius et al., ICML 2021"


class PatchEmbed(nn.Module):
    """Eq. 1's E, per frame."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H*P, W*P) -> (B, T, H, W, D)."""
        maps = self.proj(x.transpose(1, 2).flatten(0, 1))
        return cast(Tensor, rearrange(maps, "(b t) d h w -> b t h w d", b=len(x)))


class TimeSformer(PooledClassifier):
    """``forward_features`` gives the patches after the last LayerNorm, without CLS.

    Args:
        stride: of the ``in_frames`` frames in the video.
        crop: H = W in pixels; other sizes at run time resize the position embedding.
        patch: pixels of a patch's side.
        attention, cls: see :mod:`cliplift.models.timesformer.attention`.
        drop_path: rate of the last block; it rises linearly from 0 in the first.
        dropout: before the classifier.
        position_resize: "bicubic" or "nearest" over the two axes; or "flat_nearest", the released code's rule, kept to
            reproduce it: it scrambles the rows at load time
            (:func:`~cliplift.models.timesformer.weights.resize_positions`) and is "nearest" at run time.
        time_resize: "linear" or "nearest" (released code).
    """

    head_name = "head"

    def __init__(
        self,
        *,
        stride: int,
        num_classes: int = 400,
        in_frames: int = 8,
        crop: int = 224,
        patch: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        attention: Scheme = "divided",
        cls: ClsRule = "released",
        drop_path: float = 0.1,
        dropout: float = 0.0,
        position_resize: PositionResize = "bicubic",
        time_resize: TimeResize = "linear",
    ) -> None:
        input_spec = InputSpec.square(
            crop,
            frames=in_frames,
            frame_stride=stride,
            mean=(0.45,) * 3,  # the released code's
            std=(0.225,) * 3,
            test_crops=3,  # and one clip (section 4)
        )
        super().__init__(feature_dim=width, num_classes=num_classes, input_spec=input_spec, dropout=dropout)
        check_scheme(attention, cls=cls, width=width, heads=heads, drop_path=drop_path)
        check_choices(PositionResize, position_resize=position_resize)
        check_choices(TimeResize, time_resize=time_resize)
        self.attention, self.patch, self.heads = attention, patch, heads
        self.cls_rule: ClsRule = cls
        self.position_resize: PositionResize = position_resize
        self.time_resize: TimeResize = time_resize
        self.grid = self._grid(input_spec.frames, input_spec.crop_height, input_spec.crop_width)
        self.patch_embed = PatchEmbed(input_spec.channels, width, patch)
        self.cls_token = _embedding(1, width)
        self.pos_embed = _embedding(1 + self.grid[1] * self.grid[2], width)
        self.time_embed = (
            None if attention == "space" else nn.Parameter(torch.zeros(1, input_spec.frames, width))
        )
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(width, heads, scheme=attention, cls=cls, drop_path=rate) for rate in rates
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.reset_classifier(num_classes)

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, T, H*P, W*P) -> CLS (B, D) and patches (B, T, H, W, D), after the last LayerNorm."""
        z, grid = self._tokens(x, cls_only=False)
        patches = z[:, 1:]
        if self.attention == "space":
            patches = rearrange(patches, "(b t) n d -> b (t n) d", t=grid[0])
        return self._clip_token(z, grid), self.norm(patches).unflatten(1, grid)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, T, H*P, W*P) -> (B, D, T, H, W)."""
        return rearrange(self.forward_tokens(x)[1], "b t h w d -> b d t h w")

    def forward_pooled(self, x: Tensor) -> Tensor:
        """(B, C, T, H*P, W*P) -> (B, D): the CLS token (eq. 12).

        In training the last block computes no more than CLS needs: 4 % fewer products, 1/12 less of the MLPs' memory.
        Evaluation does all of the paper's arithmetic, whose cost is what `cliplift models` reports."""
        return self._clip_token(*self._tokens(x, cls_only=self.training))

    def _tokens(self, x: Tensor, *, cls_only: bool) -> tuple[Tensor, Grid]:
        """All blocks: (B, N, D) and T, H, W; (B*T, 1+H*W, D) when every frame is its own sequence."""
        self.check_input(x)
        grid = self._grid(*x.shape[2:])
        z = self._embed(x, grid)
        own_grid = (1, *grid[1:]) if self.attention == "space" else grid
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            z = block(z, own_grid, cls_only and i == last)
        return z, grid

    def _clip_token(self, z: Tensor, grid: Grid) -> Tensor:
        """(B, N, D) -> (B, D)."""
        cls = z[:, 0]
        if self.attention == "space":  # frames are averaged before the LayerNorm
            cls = reduce(cls, "(b t) d -> b d", "mean", t=grid[0])
        return cast(Tensor, self.norm(cls))

    def checkpoint_blocks(self) -> list[str]:
        """Every transformer block; all hold equally much."""
        return [f"blocks.{i}" for i in range(len(self.blocks))]

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Public weights under our names, embeddings resized; see :mod:`cliplift.models.timesformer.weights`."""
        return adapt_timesformer(
            state,
            own=self.state_dict(),
            grid=self.grid,
            position_resize=self.position_resize,
            time_resize=self.time_resize,
        )

    def _embed(self, x: Tensor, grid: Grid) -> Tensor:
        """Eq. 1: (B, N, D), or (B*T, 1+H*W, D) when every frame is its own sequence."""
        # the released code flattens at load time only
        how: PositionResize = "nearest" if self.position_resize == "flat_nearest" else self.position_resize
        pos = resize_positions(self.pos_embed, self.grid[1:], grid[1:], how=how)
        places = pos[:, 1:].unflatten(1, grid[1:]).unsqueeze(1)  # type: ignore[no-untyped-call]
        patches = self.patch_embed(x) + places
        first = self.cls_token + pos[:, :1]  # CLS gets a position and no time
        if self.time_embed is None:
            flat = patches.flatten(0, 1).flatten(1, 2)
        else:
            times = resize_times(self.time_embed, grid[0], how=self.time_resize)
            flat = (patches + times[:, :, None, None]).flatten(1, 3)
        return torch.cat([first.expand(len(flat), -1, -1), flat], dim=1)

    def _grid(self, frames: int, height: int, width: int) -> Grid:
        patch = self.patch
        if min(patch, frames, height, width) < 1 or height % patch or width % patch:
            raise ModelError(f"crop {height}x{width} must be positive multiples of patch={patch}")
        grid = (frames, height // patch, width // patch)
        check_grid(self.attention, grid)
        return grid


def _embedding(tokens: int, width: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, tokens, width), std=0.02))


# ViT-B/16: 121,566,352 parameters at 400 classes. HR: 16 frames of 448 pixels. L: 96 frames
timesformer_base = variant("timesformer_base", TimeSformer, paper=PAPER, fixed={"stride": 32})
timesformer_hr = variant(
    "timesformer_hr", TimeSformer, paper=PAPER, fixed={"stride": 16}, in_frames=16, crop=448
)
timesformer_large = variant("timesformer_large", TimeSformer, paper=PAPER, fixed={"stride": 4}, in_frames=96)
# Other widths on 8 frames, not in the paper: ViT-S/16 and ViT-L/16
timesformer_small = variant(
    "timesformer_small", TimeSformer, paper=PAPER, fixed={"stride": 32}, width=384, heads=6
)
timesformer_vitl = variant(
    "timesformer_vitl", TimeSformer, paper=PAPER, fixed={"stride": 32}, width=1024, depth=24, heads=16
)
