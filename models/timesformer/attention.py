"""The five attention schemes of TimeSformer and the transformer block that holds them.

Paper: Bertasius, Wang, Torresani, "Is Space-Time Attention All You Need for Video Understanding?", ICML 2021,
arXiv 2102.05095 (section 3.2, Fig. 1 and 2, eq. 2-13). Public code: facebookresearch/TimeSformer
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
* Drop path acts per clip; the released code drops the space step per frame.

Shape letters: B clips, T frames, H W patches down and across, N tokens = 1 + T*H*W, D width, A heads, G groups,
L tokens of a group. Token 0 is CLS; the patches follow frame by frame, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.layers import DropPath
from cliplift.models.protocol import ModelError, check_choices

Scheme = Literal["divided", "joint", "space", "local_global", "axial"]
ClsRule = Literal["released", "paper"]
# what CLS does in a step: no part; a copy in every group, averaged; a key of every group, and a query of all patches
ClsPart = Literal["none", "copied", "whole"]
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


def check_scheme(scheme: str, *, cls: str, width: int, heads: int, drop_path: float) -> None:
    """Raises ModelError for options a block cannot be built with."""
    check_choices(Scheme, attention=scheme)
    check_choices(ClsRule, cls=cls)
    if cls == "paper" and scheme != "divided":
        raise ModelError(f"cls='paper' is a rule for attention='divided'; attention={scheme!r} has one rule")
    if not 0 <= drop_path < 1:
        raise ModelError(f"drop_path={drop_path} must be in [0, 1)")
    if heads < 1 or width % heads:
        raise ModelError(f"width={width} must be a multiple of heads={heads}")


def check_grid(scheme: str, grid: Grid) -> None:
    """Raises ModelError for a clip whose patches a scheme cannot group."""
    if scheme == "local_global" and any(n % 2 for n in grid):
        raise ModelError(
            f"attention='local_global' halves frames, rows and columns: {grid} (frames, patch rows, patch "
            f"columns) must be even; change in_frames or the crop, or take another attention"
        )


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


class DotProduct(nn.Module):
    """softmax(q k^T / sqrt(D/A)) v without the matrix in memory; a module so that q and k can be observed."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(G, A, L, D/A) and keys, values (G, A, S, D/A) -> (G, A, L, D/A)."""
        return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head attention within the groups of one step (eq. 2-8)."""

    def __init__(self, width: int, heads: int, *, step: str, cls: ClsPart) -> None:
        super().__init__()
        self.heads, self.step, self.cls = heads, step, cls
        self.qkv = VitLinear(width, 3 * width)
        self.dot = DotProduct()
        self.proj = VitLinear(width, width)

    def forward(self, x: Tensor, grid: Grid, *, cls_only: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D), or CLS' output alone, (B, 1, D); without CLS in and out, (B, N-1, D), when
        ``cls="none"``."""
        qkv = self.qkv(x)  # once per token: CLS is copied only afterwards
        if self.cls == "none":
            y = self._attend(to_groups(qkv, self.step, grid))
            return cast(Tensor, self.proj(from_groups(y, self.step, grid)))
        queries = 1 if cls_only else None
        if self.step == "joint":
            return cast(Tensor, self.proj(self._attend(qkv, queries=queries)))
        first, patches = split_cls(qkv)
        patches = to_groups(patches, self.step, grid)
        copies = first.repeat_interleave(patches.shape[0] // len(x), dim=0)  # (B*G, 1, 3D)
        y_copies, y = split_cls(self._attend(torch.cat([copies, patches], dim=1), queries=queries))
        if self.cls == "whole":
            y_first = self._attend(qkv, queries=1)
        else:  # Linear is affine: the mean of the copies' projections is the projection of their mean
            y_first = reduce(y_copies, "(b g) one d -> b one d", "mean", b=len(x))
        if cls_only:
            return cast(Tensor, self.proj(y_first))
        return cast(Tensor, self.proj(torch.cat([y_first, from_groups(y, self.step, grid)], dim=1)))

    def _attend(self, qkv: Tensor, *, queries: int | None = None) -> Tensor:
        """(G, L, 3D) -> (G, L, D), or the first ``queries`` of L only."""
        q, k, v = rearrange(qkv, "g l (three a d) -> three g a l d", three=3, a=self.heads).unbind()
        return cast(Tensor, rearrange(self.dot(q[:, :, :queries], k, v), "g a l d -> g l (a d)"))


def split_cls(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1 + L, D) -> (B, 1, D) and (B, L, D). One split, whose gradient is one concatenation; two slices would
    each fill a tensor of zeros."""
    first, rest = x.split([1, x.shape[1] - 1], dim=1)  # type: ignore[no-untyped-call]
    return first, rest


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
            part: ClsPart = "whole" if self.cls_in_extra else "none"
            self.add_module(f"{prefix}_attn", Attention(width, heads, step=step, cls=part))
            self.add_module(f"{prefix}_fc", ZeroLinear(width, width))
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, step=last, cls="copied")
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)
        self.drop_path = DropPath(drop_path)

    def forward(self, z: Tensor, grid: Grid, cls_only: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D), or CLS alone, (B, 1, D), which leaves out what only the patches' outputs need."""
        if self.extra:
            if self.cls_in_extra:
                z = self._extra_steps(z, grid)
            else:
                first, patches = split_cls(z)
                z = torch.cat([first, self._extra_steps(patches, grid)], dim=1)
        update = self.attn(self.norm1(z), grid, cls_only=cls_only)
        z = (z[:, :1] if cls_only else z) + self.drop_path(update)
        return z + cast(Tensor, self.drop_path(self.mlp(self.norm2(z))))

    def _extra_steps(self, z: Tensor, grid: Grid) -> Tensor:
        """The steps before the ViT's own, on the patches alone or on all tokens."""
        for prefix in self.extra:
            norm, attn, fc = (self.get_submodule(f"{prefix}_{part}") for part in ("norm1", "attn", "fc"))
            # drop path before the Linear, whose bias therefore survives (released code)
            z = z + fc(self.drop_path(attn(norm(z), grid)))
        return z
