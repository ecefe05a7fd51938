"""TimeSformer: a ViT whose blocks attend over time and space, in the paper's five schemes.

Paper: Bertasius, Wang, Torresani, "Is Space-Time Attention All You Need for Video Understanding?", ICML 2021,
arXiv 2102.05095 (sections 3.1-3.3, Fig. 1, eq. 1-13). Public code: facebookresearch/TimeSformer
(timesformer/models/vit.py), which has space, joint and divided only.

One block is: [extra attention steps, each LN -> MHA -> Linear] -> LN -> MHA -> LN -> MLP, every part a residual.

    space         MHA within a frame; every frame is its own ViT, averaged after the last block
    joint         MHA over all T*H*W patches and CLS (eq. 5)
    divided       extra: time (eq. 13); MHA: space (eq. 6)
    local_global  extra: local 2x2 blocks of the frame over all T; MHA: patches of one parity class (t, h, w mod 2)
    axial         extra: time, width; MHA: height

Where the sources disagree or are silent:

* CLS in the time step. ``cls="released"`` (default: the published weights were trained so): CLS takes no part.
  ``cls="paper"`` (eq. 13): patches also see CLS, and CLS attends to every patch.
* CLS in the last step is copied to each group; the updates of the copies are averaged (released code, for frames).
  The same rule serves local_global and axial, for which nothing was released: CLS takes part in that step only.
* "Local" may also mean a sliding window, "global" one shared stride-2 subset of keys; both have the same key count.
  Ours are the ones a rearrangement of the tokens gives, as the first author describes it (issues 4 and 25).
* The Linear after each extra step is not in the paper's text, but only with it do Table 1's parameter counts come out.
  It starts at zero, so a model started from an image ViT starts as that ViT (joint apart).
* The head is one Linear; the paper's "1-hidden-layer MLP" does not fit its own counts.
* Drop path acts per clip; the released code drops the space step per frame.

Shape letters: B clips, C channels, T frames, H W patches down and across, N tokens = 1 + T*H*W, D width, A heads,
G groups, L tokens of a group, K classes. Token 0 is CLS; the patches follow frame by frame, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast, get_args

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.layers import PooledClassifier
from cliplift.models.registry import InputSpec, ModelError, register_model
from cliplift.models.timesformer_weights import (
    PositionResize,
    TimeResize,
    adapt_timesformer,
    resize_positions,
    resize_times,
)

PAPER = "Bertasius et al., ICML 2021"
Scheme = Literal["divided", "joint", "space", "local_global", "axial"]
ClsRule = Literal["released", "paper"]
Grid = tuple[int, int, int]  # T, H, W in patches

# step -> how the patches (flat: t h w) fall into groups: "groups", "tokens of a group"
GROUPS: Mapping[str, tuple[str, str, str]] = {
    "joint": ("t h w", "", "t h w"),
    "space": ("t h w", "t", "h w"),
    "time": ("t h w", "h w", "t"),
    "width": ("t h w", "t h", "w"),
    "height": ("t h w", "t w", "h"),
    "local": ("t hb h wb w", "hb wb", "t h w"),
    "global": ("t tp h hp w wp", "tp hp wp", "t h w"),
}
# scheme -> (module prefix, step) of the extra steps, and the last step, which holds the ViT's own weights
STEPS: Mapping[str, tuple[tuple[tuple[str, str], ...], str]] = {
    "space": ((), "joint"),  # of one frame at a time
    "joint": ((), "joint"),
    "divided": ((("temporal", "time"),), "space"),
    "local_global": ((("local", "local"),), "global"),
    "axial": ((("temporal", "time"), ("width", "width")), "height"),
}


def _lengths(step: str, grid: Grid) -> dict[str, int]:
    t, h, w = grid
    if step == "local":
        return {"t": t, "hb": 2, "h": h // 2, "wb": 2, "w": w // 2}
    if step == "global":
        return {"t": t // 2, "tp": 2, "h": h // 2, "hp": 2, "w": w // 2, "wp": 2}
    return {"t": t, "h": h, "w": w}


def to_groups(x: Tensor, step: str, grid: Grid) -> Tensor:
    """Patches (B, T*H*W, D) -> (B*G, L, D), the tokens that attend to each other in ``step``."""
    flat, groups, tokens = GROUPS[step]
    return rearrange(x, f"b ({flat}) d -> (b {groups}) ({tokens}) d", **_lengths(step, grid))


def from_groups(x: Tensor, step: str, grid: Grid) -> Tensor:
    """The inverse of :func:`to_groups`."""
    flat, groups, tokens = GROUPS[step]
    lengths = _lengths(step, grid)
    # the number of clips is what is left over; einops needs the rest spelled out
    return rearrange(x, f"(b {groups}) ({tokens}) d -> b ({flat}) d", **lengths)


class VitLinear(nn.Linear):
    """Truncated normal weights of standard deviation 0.02, zero bias (released code)."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


class ZeroLinear(nn.Linear):
    """Zero weights and bias: a new attention step starts by changing nothing."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class DropPath(nn.Module):
    """Drop a residual for whole clips with probability ``rate``; the others are scaled by 1 / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        if not self.training or self.rate == 0:
            return x
        keep = torch.empty(x.shape[0], 1, 1, dtype=x.dtype, device=x.device).bernoulli_(1 - self.rate)
        return x * keep.div_(1 - self.rate)


class DotProduct(nn.Module):
    """softmax(q k^T / sqrt(D/A)) v without the matrix in memory; a module so that q and k can be observed."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(G, A, L, D/A) and keys, values (G, A, S, D/A) -> (G, A, L, D/A)."""
        return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head attention within the groups of one step (eq. 2-8)."""

    def __init__(self, width: int, heads: int, *, step: str, cls: Literal["none", "copied", "whole"]) -> None:
        super().__init__()
        self.heads, self.step, self.cls = heads, step, cls
        self.qkv = VitLinear(width, 3 * width)
        self.dot = DotProduct()
        self.proj = VitLinear(width, width)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, D) -> (B, N, D); without CLS in and out, (B, N-1, D), when ``cls="none"``."""
        qkv = self.qkv(x)  # once per token: CLS is copied only afterwards
        if self.cls == "none":
            return cast(
                Tensor, self.proj(from_groups(self._attend(to_groups(qkv, self.step, grid)), self.step, grid))
            )
        if self.step == "joint":
            return cast(Tensor, self.proj(self._attend(qkv)))
        patches = to_groups(qkv[:, 1:], self.step, grid)
        copies = qkv[:, :1].repeat_interleave(patches.shape[0] // len(x), dim=0)  # (B*G, 1, 3D)
        y = self._attend(torch.cat([copies, patches], dim=1))
        if self.cls == "whole":
            first = self._attend(qkv, queries=1)
        else:  # Linear is affine: the mean of the copies' projections is the projection of their mean
            first = reduce(y[:, :1], "(b g) one d -> b one d", "mean", b=len(x))
        return cast(Tensor, self.proj(torch.cat([first, from_groups(y[:, 1:], self.step, grid)], dim=1)))

    def _attend(self, qkv: Tensor, *, queries: int | None = None) -> Tensor:
        """(G, L, 3D) -> (G, L, D), or the first ``queries`` of L only."""
        q, k, v = rearrange(qkv, "g l (three a d) -> three g a l d", three=3, a=self.heads)
        return cast(Tensor, rearrange(self.dot(q[:, :, :queries], k, v), "g a l d -> g l (a d)"))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = VitLinear(width, 4 * width)
        self.fc2 = VitLinear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x))))


class Block(nn.Module):
    """The attention steps of a scheme, then the MLP (Fig. 1, eq. 8-9)."""

    def __init__(self, width: int, heads: int, *, scheme: Scheme, cls: ClsRule, drop_path: float) -> None:
        super().__init__()
        extra, last = STEPS[scheme]
        self.extra = tuple(prefix for prefix, _ in extra)
        self.cls_in_extra = cls == "paper"
        for prefix, step in extra:
            self.add_module(f"{prefix}_norm1", nn.LayerNorm(width, eps=1e-6))
            rule: Literal["none", "whole"] = "whole" if self.cls_in_extra else "none"
            self.add_module(f"{prefix}_attn", Attention(width, heads, step=step, cls=rule))
            self.add_module(f"{prefix}_fc", ZeroLinear(width, width))
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, step=last, cls="copied")
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)
        self.drop_path = DropPath(drop_path)

    def forward(self, z: Tensor, grid: Grid) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        for prefix in self.extra:
            norm, attn, fc = (self.get_submodule(f"{prefix}_{part}") for part in ("norm1", "attn", "fc"))
            moved = z if self.cls_in_extra else z[:, 1:]
            # drop path before the Linear, whose bias therefore survives (released code)
            moved = moved + fc(self.drop_path(attn(norm(moved), grid)))
            z = moved if self.cls_in_extra else torch.cat([z[:, :1], moved], dim=1)
        z = z + self.drop_path(self.attn(self.norm1(z), grid))
        return z + cast(Tensor, self.drop_path(self.mlp(self.norm2(z))))


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
    """See the module's docstring. ``forward_features`` gives the patches after the last LayerNorm, without CLS."""

    head_name = "head"

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        attention: Scheme,
        cls: ClsRule,
        num_classes: int,
        input_spec: InputSpec,
        drop_path: float = 0.1,
        dropout: float = 0.0,
        position_resize: PositionResize = "bicubic",
        time_resize: TimeResize = "linear",
    ) -> None:
        super().__init__(feature_dim=width, num_classes=num_classes, input_spec=input_spec, dropout=dropout)
        _check_options(
            attention=attention,
            cls=cls,
            drop_path=drop_path,
            width=width,
            heads=heads,
            position_resize=position_resize,
            time_resize=time_resize,
        )
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
        self.check_input(x)
        grid = self._grid(*x.shape[2:])
        z = self._embed(x, grid)
        own_grid = (1, *grid[1:]) if self.attention == "space" else grid
        for block in self.blocks:
            z = block(z, own_grid)
        cls, patches = z[:, 0], z[:, 1:]
        if self.attention == "space":  # frames are averaged before the LayerNorm
            cls = reduce(cls, "(b t) d -> b d", "mean", t=grid[0])
            patches = rearrange(patches, "(b t) n d -> b (t n) d", t=grid[0])
        return self.norm(cls), self.norm(patches).unflatten(1, grid)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, T, H*P, W*P) -> (B, D, T, H, W)."""
        return rearrange(self.forward_tokens(x)[1], "b t h w d -> b d t h w")

    def forward_pooled(self, x: Tensor) -> Tensor:
        """(B, C, T, H*P, W*P) -> (B, D): the CLS token (eq. 12)."""
        return self.forward_tokens(x)[0]

    def checkpoint_blocks(self) -> list[str]:
        """Every transformer block; all hold equally much."""
        return [f"blocks.{i}" for i in range(len(self.blocks))]

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Public weights under our names, embeddings resized; see :mod:`cliplift.models.timesformer_weights`."""
        return adapt_timesformer(
            state,
            own=self.state_dict(),
            grid=self.grid,
            position_resize=self.position_resize,
            time_resize=self.time_resize,
        )

    def _embed(self, x: Tensor, grid: Grid) -> Tensor:
        """Eq. 1: (B, N, D), or (B*T, 1+H*W, D) when every frame is its own sequence."""
        pos = resize_positions(self.pos_embed, self.grid[1:], grid[1:], how=self.position_resize)
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
        if height % self.patch or width % self.patch or min(frames, height, width) < 1:
            raise ModelError(f"crop {height}x{width} must be positive multiples of patch={self.patch}")
        grid = (frames, height // self.patch, width // self.patch)
        odd = [n for n in grid if n % 2]
        if self.attention == "local_global" and odd:
            raise ModelError(
                f"attention='local_global' halves frames, rows and columns: {grid} (frames, patch rows, patch "
                f"columns) must be even; change in_frames or the crop, or take another attention"
            )
        return grid


def _embedding(tokens: int, width: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, tokens, width), std=0.02))


def _check_options(
    *,
    attention: str,
    cls: str,
    drop_path: float,
    width: int,
    heads: int,
    position_resize: str,
    time_resize: str,
) -> None:
    for option, value, known in (
        ("attention", attention, get_args(Scheme)),
        ("cls", cls, get_args(ClsRule)),
        ("position_resize", position_resize, get_args(PositionResize)),
        ("time_resize", time_resize, get_args(TimeResize)),
    ):
        if value not in known:
            raise ModelError(f"{option}={value!r} must be one of {', '.join(known)}")
    if cls == "paper" and attention != "divided":
        raise ModelError(
            f"cls='paper' is a rule for attention='divided'; attention={attention!r} has one rule"
        )
    if not 0 <= drop_path < 1:
        raise ModelError(f"drop_path={drop_path} must be in [0, 1)")
    if width % heads:
        raise ModelError(f"width={width} must be a multiple of heads={heads}")


def _input_spec(frames: int, *, stride: int, crop: int) -> InputSpec:
    """The released code's normalisation (SlowFast's); one clip, three crops (section 4)."""
    return InputSpec(
        frames=frames,
        frame_stride=stride,
        crop_height=crop,
        crop_width=crop,
        mean=(0.45, 0.45, 0.45),
        std=(0.225, 0.225, 0.225),
        test_crops=3,
    )


@register_model(paper=PAPER)
def timesformer_base(
    *,
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
) -> nn.Module:
    """TimeSformer: ViT-B/16, 8 frames of 224 pixels, stride 32. 121,566,352 parameters at 400 classes.

    Args:
        crop: H = W in pixels; other sizes at run time resize the position embedding.
        patch: pixels of a patch's side.
        attention, cls: see the module's docstring.
        drop_path: rate of the last block; it rises linearly from 0 in the first.
        dropout: before the classifier.
        position_resize: "bicubic" over the two axes, or "flat_nearest", the released code's 1-D rule, at load time
            and at run time.
        time_resize: "linear" or "nearest" (released code)."""
    return TimeSformer(
        width=width,
        depth=depth,
        heads=heads,
        patch=patch,
        attention=attention,
        cls=cls,
        num_classes=num_classes,
        input_spec=_input_spec(in_frames, stride=32, crop=crop),
        drop_path=drop_path,
        dropout=dropout,
        position_resize=position_resize,
        time_resize=time_resize,
    )


@register_model(paper=PAPER)
def timesformer_hr(
    *,
    num_classes: int = 400,
    in_frames: int = 16,
    crop: int = 448,
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
) -> nn.Module:
    """TimeSformer-HR: 16 frames of 448 pixels, stride 16; options as :func:`timesformer_base`."""
    return TimeSformer(
        width=width,
        depth=depth,
        heads=heads,
        patch=patch,
        attention=attention,
        cls=cls,
        num_classes=num_classes,
        input_spec=_input_spec(in_frames, stride=16, crop=crop),
        drop_path=drop_path,
        dropout=dropout,
        position_resize=position_resize,
        time_resize=time_resize,
    )


@register_model(paper=PAPER)
def timesformer_large(
    *,
    num_classes: int = 400,
    in_frames: int = 96,
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
) -> nn.Module:
    """TimeSformer-L: 96 frames of 224 pixels, stride 4; options as :func:`timesformer_base`."""
    return TimeSformer(
        width=width,
        depth=depth,
        heads=heads,
        patch=patch,
        attention=attention,
        cls=cls,
        num_classes=num_classes,
        input_spec=_input_spec(in_frames, stride=4, crop=crop),
        drop_path=drop_path,
        dropout=dropout,
        position_resize=position_resize,
        time_resize=time_resize,
    )


@register_model(paper=PAPER)
def timesformer_small(
    *,
    num_classes: int = 400,
    in_frames: int = 8,
    crop: int = 224,
    patch: int = 16,
    width: int = 384,
    depth: int = 12,
    heads: int = 6,
    attention: Scheme = "divided",
    cls: ClsRule = "released",
    drop_path: float = 0.1,
    dropout: float = 0.0,
    position_resize: PositionResize = "bicubic",
    time_resize: TimeResize = "linear",
) -> nn.Module:
    """ViT-S/16 in place of ViT-B/16; options as :func:`timesformer_base`."""
    return TimeSformer(
        width=width,
        depth=depth,
        heads=heads,
        patch=patch,
        attention=attention,
        cls=cls,
        num_classes=num_classes,
        input_spec=_input_spec(in_frames, stride=32, crop=crop),
        drop_path=drop_path,
        dropout=dropout,
        position_resize=position_resize,
        time_resize=time_resize,
    )


@register_model(paper=PAPER)
def timesformer_vitl(
    *,
    num_classes: int = 400,
    in_frames: int = 8,
    crop: int = 224,
    patch: int = 16,
    width: int = 1024,
    depth: int = 24,
    heads: int = 16,
    attention: Scheme = "divided",
    cls: ClsRule = "released",
    drop_path: float = 0.1,
    dropout: float = 0.0,
    position_resize: PositionResize = "bicubic",
    time_resize: TimeResize = "linear",
) -> nn.Module:
    """ViT-L/16 in place of ViT-B/16; options as :func:`timesformer_base`."""
    return TimeSformer(
        width=width,
        depth=depth,
        heads=heads,
        patch=patch,
        attention=attention,
        cls=cls,
        num_classes=num_classes,
        input_spec=_input_spec(in_frames, stride=32, crop=crop),
        drop_path=drop_path,
        dropout=dropout,
        position_resize=position_resize,
        time_resize=time_resize,
    )
