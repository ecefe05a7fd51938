"""Image networks as teachers of a video encoder's tokens: what they say of every place of a frame; a ViT that is one.

Any image network has a last feature map. One that knows more offers ``teach_tokens``: maps after several layers, and
how much each place counted. Where a network does not say what counted, it is the energy of its last map, the sum of
squares over channels (activation-based attention, arXiv 1612.03928).

``ImageViT`` is the ViT with a class token that CLIP, DINO and MAE trained. Papers: Dosovitskiy et al., arXiv
2010.11929; CLIP, 2103.00020; MAE, 2111.06377; DINO, 2104.14294. Weights are named as in timm (``vit_base_patch16_224``,
``vit_base_patch16_clip_quickgelu_224``), whose names DINO's and MAE's own files share; CLIP's vision tower is read from
Hugging Face's names too. A patch convolution, a class token before the tokens, learned places, pre-norm blocks, LN.
CLIP has an LN before the blocks too, no bias of the convolution, its own activation, and a projection after the last
LN.

Shape letters: B images, C channels, H W pixels, P pixels of a patch's side, h w places of a map, N patches, D width or
channels, E width after the projection, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.layers import PooledClassifier
from cliplift.models.protocol import InputSpec, ModelError, VideoNetwork, check_choices
from cliplift.models.registry import variant
from cliplift.models.video_vit.blocks import STD, Block, BlockSpec, InitLinear, blocks
from cliplift.models.video_vit.weights import joined, swapped

MAX_STRETCH = 2  # a map may have half as many rows and columns as the tokens, no fewer
Style = Literal["plain", "clip"]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Hugging Face's CLIP vision tower: inside a block, and around them
HF_BLOCK = (
    ("self_attn.out_proj.", "attn.proj."), ("self_attn.", "attn."), ("layer_norm1.", "norm1."),
    ("layer_norm2.", "norm2."),
)  # fmt: skip
HF_TOP = (
    ("embeddings.class_embedding", "cls_token"), ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("embeddings.position_embedding.weight", "pos_embed"), ("pre_layrnorm.", "norm_pre."), ("post_layernorm.", "norm."),
)  # fmt: skip


@runtime_checkable
class TeachesTokens(Protocol):
    """An image network with maps after several layers and an attention of its own."""

    def teach_tokens(self, x: Tensor, *, layers: int) -> tuple[list[Tensor], Tensor]:
        """(B, C, H, W) -> the maps (B, D, h, w) after its last ``layers`` layers, in order, and how much each place
        counted for the whole picture, (B, h, w), above 0."""
        ...


def image_targets(network: VideoNetwork, frames: Tensor, *, layers: int) -> tuple[list[Tensor], Tensor]:
    """An image network's maps (B, D, h, w) after its last ``layers`` layers, and its attention (B, h, w).

    Args:
        frames: (B, C, H, W), normalised as the network's input_spec says.

    Raises:
        ModelError: it has no map, or fewer than are asked for.
    """
    if isinstance(network, TeachesTokens):
        return network.teach_tokens(frames, layers=layers)
    found = network.forward_features(frames)
    if found.ndim != 4:
        raise ModelError(f"{type(network).__name__} has no feature map with places: {tuple(found.shape)}")
    if layers > 1:
        raise ModelError(
            f"{type(network).__name__} gives the map after its last layer alone, not after {layers}"
        )
    return [found], found.float().square().sum(dim=1)


def on_grid(maps: Tensor, rows: int, columns: int) -> Tensor:
    """Maps (B, D, h, w) with one value for each token of a frame: (B, D, rows, columns).

    A map that is finer is averaged over the part of the picture that a token covers (adaptive average pooling: equal
    parts where the sizes divide). A coarser one is interpolated bilinearly.

    Raises:
        ModelError: it is coarser than that by more than two.
    """
    h, w = maps.shape[2:]
    if (h, w) == (rows, columns):
        return maps
    if h * MAX_STRETCH < rows or w * MAX_STRETCH < columns:
        raise ModelError(
            f"a map of {h}x{w} places says too little of {rows}x{columns} tokens: at least half as many a side are "
            "needed"
        )
    if h >= rows and w >= columns:
        return F.adaptive_avg_pool2d(maps, (rows, columns))
    return F.interpolate(maps, size=(rows, columns), mode="bilinear", align_corners=False)


class PatchEmbed(nn.Module):
    """Non-overlapping patches -> tokens."""

    def __init__(self, channels: int, width: int, *, patch: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h*P, w*P) -> (B, h*w, D)."""
        return cast(Tensor, self.proj(x).flatten(2).transpose(1, 2))


class ImageViT(PooledClassifier):
    """See the module's docstring. Its feature is the class token's; ``forward_features`` are the patches'.

    Args:
        spec: width, heads, hidden width, epsilon and activation of the blocks.
        depth: number of blocks.
        patch: pixels of a patch's side.
        pre_norm: an LN before the blocks, and no bias of the patch convolution (CLIP).
        projection: E, the width after a last Linear without bias (CLIP); 0 for none.
        num_classes, input_spec: as for every model.
    """

    head_name = "head"
    input_dims = 4

    def __init__(
        self,
        *,
        spec: BlockSpec,
        depth: int,
        patch: int,
        pre_norm: bool,
        projection: int,
        num_classes: int,
        input_spec: InputSpec,
    ) -> None:
        width = spec.width
        super().__init__(feature_dim=projection or width, num_classes=num_classes, input_spec=input_spec)
        self.patch, self.depth = patch, depth
        rows, columns = self.grid(input_spec.crop_height, input_spec.crop_width)
        self.patch_embed = PatchEmbed(input_spec.channels, width, patch=patch, bias=not pre_norm)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 1e-6)
        self.pos_embed = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(1, 1 + rows * columns, width), std=STD)
        )
        self.native_grid = (rows, columns)
        self.norm_pre = nn.LayerNorm(width, eps=spec.eps) if pre_norm else nn.Identity()
        self.blocks = blocks(spec, depth)
        self.norm = nn.LayerNorm(width, eps=spec.eps)
        self.projection = (
            InitLinear(width, projection, init="truncated", bias=False) if projection else nn.Identity()
        )
        self.reset_classifier(num_classes)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture.

        Raises:
            ModelError: it is not made of whole patches.
        """
        if min(height, width) < self.patch or height % self.patch or width % self.patch:
            raise ModelError(
                f"{height}x{width} pixels are not made of whole patches of {self.patch}x{self.patch}"
            )
        return height // self.patch, width // self.patch

    def teach_tokens(self, x: Tensor, *, layers: int) -> tuple[list[Tensor], Tensor]:
        """(B, C, h*P, w*P) -> the patches after each of the last ``layers`` blocks, each normed and projected as the
        last, (B, E, h, w); and the class token's attention to them in the last block, heads averaged, (B, h, w)."""
        if not 0 < layers <= self.depth:
            raise ModelError(f"layers={layers} of a network of {self.depth} blocks")
        rows, columns = self.grid(*x.shape[2:])
        z, found = self._embed(x), []
        for i, block in enumerate(self.blocks):
            if i == self.depth - 1:
                attention = class_attention(cast(Block, block), z)
            z = block(z)
            if i >= self.depth - layers:
                found.append(rearrange(self._after(z)[:, 1:], "b (h w) e -> b e h w", h=rows, w=columns))
        return found, torch.unflatten(attention, 1, (rows, columns))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, h*P, w*P) -> (B, E, h, w)."""
        rows, columns = self.grid(*x.shape[2:])
        return rearrange(self._tokens(x)[:, 1:], "b (h w) e -> b e h w", h=rows, w=columns)

    def forward_pooled(self, x: Tensor) -> Tensor:
        """(B, C, h*P, w*P) -> (B, E): the class token's."""
        self.check_input(x)
        return self._tokens(x)[:, 0]

    def checkpoint_blocks(self) -> list[str]:
        """Every transformer block; all hold equally much."""
        return [f"blocks.{i}" for i in range(self.depth)]

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """timm's and Hugging Face's CLIP under our names, and places for another grid."""
        return adapt_image_vit(state, own=self.state_dict(), grid=self.native_grid)

    def _embed(self, x: Tensor) -> Tensor:
        self.check_input(x)
        places = resized_places(self.pos_embed, self.native_grid, self.grid(*x.shape[2:]))
        z = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1) + places
        return cast(Tensor, self.norm_pre(z))

    def _tokens(self, x: Tensor) -> Tensor:
        z = self._embed(x)
        for block in self.blocks:
            z = block(z)
        return self._after(z)

    def _after(self, z: Tensor) -> Tensor:
        return cast(Tensor, self.projection(self.norm(z)))


def class_attention(block: Block, z: Tensor) -> Tensor:
    """The class token's attention to the patches in a block, the mean over its heads: (B, 1 + N, D) -> (B, N)."""
    query, key, _ = rearrange(
        block.attn.qkv(block.norm1(z)), "b n (three a d) -> three b a n d", three=3, a=block.attn.heads
    ).unbind()
    scores = query[:, :, :1] @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    attention: Tensor = scores.float().softmax(dim=-1).mean(dim=1)
    return attention[:, 0, 1:]


def resized_places(places: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Learned places (1, 1 + N, D), the class token's first, for another grid: bicubic, as timm does."""
    if old == new:
        return places
    picture = rearrange(places[:, 1:], "one (h w) d -> one d h w", h=old[0])
    resized = F.interpolate(picture, size=new, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([places[:, :1], rearrange(resized, "one d h w -> one (h w) d")], dim=1)


def adapt_image_vit(
    state: Mapping[str, Tensor], *, own: Mapping[str, Tensor], grid: tuple[int, int]
) -> tuple[dict[str, Tensor], list[str]]:
    """Public tensors under the names of :class:`ImageViT`, and a note for every change.

    Args:
        state: timm's, DINO's, MAE's, Hugging Face's CLIP with or without its text tower, or ours.
        own: the model's state dict.
        grid: of the model's places.
    """
    notes: list[str] = []
    given = dict(state)
    if any(key.startswith("vision_model.") for key in given):
        notes.append("took Hugging Face's names of CLIP's vision tower, and left out the rest")
        given = _from_huggingface(given)
    if "projection.weight" in own and "head.weight" in given and "head.weight" not in own:
        given["projection.weight"] = given.pop("head.weight")  # timm keeps CLIP's projection there
    places = given.get("pos_embed")
    if places is not None and places.ndim == 3 and places.shape[1] != own["pos_embed"].shape[1]:
        side = round((places.shape[1] - 1) ** 0.5)
        if side * side == places.shape[1] - 1:
            given["pos_embed"] = resized_places(places.float(), (side, side), grid)
            notes.append(f"resized the places of {side}x{side} patches to {grid[0]}x{grid[1]}")
    return given, notes


def _from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if key == "visual_projection.weight":
            renamed["projection.weight"] = value
        elif key.startswith("vision_model.") and not key.endswith("position_ids"):
            name = key.removeprefix("vision_model.")
            block = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
            if block is None:
                renamed[swapped(name, HF_TOP)] = value
                continue
            renamed[f"blocks.{block[1]}.{swapped(block[2], HF_BLOCK)}"] = value
    found = joined(renamed)
    for name in ("cls_token", "pos_embed"):
        if name in found:
            found[name] = found[name].reshape(1, -1, found[name].shape[-1])
    return found


def image_vit(
    *,
    num_classes: int = 1000,
    in_frames: int = 1,
    crop: int = 224,
    patch: int = 16,
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    style: Style = "plain",
    projection: int = 0,
) -> ImageViT:
    """A ViT of the plain kind (DINO, MAE, supervised) or CLIP's.

    Args:
        crop: H = W in pixels; learned places are resized for other crops.
        patch: pixels of a patch's side.
        style: "plain", or "clip": an LN before the blocks, no bias of the patch convolution, CLIP's activation, epsilon
            1e-5, and CLIP's statistics of the pixels.
        projection: width after CLIP's last projection, 512 for its ViT-B/16; 0 leaves it out.
    """
    check_choices(Style, style=style)
    clip = style == "clip"
    spec = BlockSpec(
        width=width,
        heads=heads,
        hidden=4 * width,
        eps=1e-5 if clip else 1e-6,
        activation="quick_gelu" if clip else "gelu",
    )
    pixels = {"mean": CLIP_MEAN, "std": CLIP_STD} if clip else {}
    return ImageViT(
        spec=spec,
        depth=depth,
        patch=patch,
        pre_norm=clip,
        projection=projection,
        num_classes=num_classes,
        input_spec=InputSpec.square(crop, frames=in_frames, frame_stride=1, **pixels),  # type: ignore[arg-type]
    )


PAPER = "Dosovitskiy et al., ICLR 2021"
image_vit_small_16 = variant("image_vit_small_16", image_vit, paper=PAPER, dims="2d", width=384, heads=6)
image_vit_base_16 = variant(
    "image_vit_base_16", image_vit, paper=PAPER, dims="2d"
)  # 86,567,656, 1000 classes
image_vit_large_14 = variant(
    "image_vit_large_14", image_vit, paper=PAPER, dims="2d", patch=14, width=1024, depth=24, heads=16
)
