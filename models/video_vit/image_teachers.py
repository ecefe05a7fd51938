"""Image ViTs, which teach a video encoder's tokens several maps and an attention (``TeachesTokens`` of distil.py).

``ImageViT`` is the ViT with a class token that CLIP, DINO and MAE trained. Papers: Dosovitskiy et al., arXiv
2010.11929; CLIP, 2103.00020; MAE, 2111.06377; DINO, 2104.14294. Weights are named as in timm (``vit_base_patch16_224``,
``vit_base_patch16_clip_quickgelu_224``), whose names DINO's and MAE's own files share; CLIP's vision tower is read from
Hugging Face's names too. A patch convolution, a class token before the tokens, learned places, pre-norm blocks, LN.
CLIP has an LN before the blocks too, no bias of the convolution, its own activation, and a projection after the last
LN.

``timm:NAME`` is any other image ViT of timm (extra ``timm``): SigLIP, DINOv2, EVA. Nothing is downloaded: weights are a
file, such as the ``model.safetensors`` of timm's repository of the model.

Shape letters: B images, C channels, H W pixels, P pixels of a patch's side, h w places of a map, N patches, D width or
channels, E width after the projection, K classes.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.layers import PooledClassifier
from cliplift.models.protocol import InputSpec, ModelError, check_choices
from cliplift.models.registry import BY_PREFIX, ModelEntry, variant
from cliplift.models.video_vit.blocks import STD, Block, BlockSpec, InitLinear, blocks
from cliplift.models.video_vit.weights import joined, swapped

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


def patch_grid(height: int, width: int, *, patch: int) -> tuple[int, int]:
    """Rows and columns of patches of a picture.

    Raises:
        ModelError: it is not made of whole patches.
    """
    if min(height, width) < patch or height % patch or width % patch:
        raise ModelError(f"{height}x{width} pixels are not made of whole patches of {patch}x{patch}")
    return height // patch, width // patch


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
        """:func:`patch_grid` of a picture."""
        return patch_grid(height, width, patch=self.patch)

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


# What a ViT of timm has, and a network of convolutions, of windows or of stages lacks
TIMM_MEMBERS = ("patch_embed", "blocks", "num_prefix_tokens", "forward_intermediates")


class TimmTeacher(PooledClassifier):
    """A ViT of timm (huggingface/pytorch-image-models), as timm builds it, below "network.".

    Its feature is timm's own before the head; ``forward_features`` are the patches'. What it teaches: the patch tokens
    after each of the last blocks, normed as the last, without class and register tokens; and the class token's
    attention to them in the last block, without a class token that of the pool's query (SigLIP), else the energy of the
    last map.

    Args:
        network: made by ``timm.create_model`` without a head.
        patch: pixels of a patch's side.
        num_classes, input_spec: as for every model.
    """

    head_name = "head"
    input_dims = 4

    def __init__(self, network: nn.Module, *, patch: int, num_classes: int, input_spec: InputSpec) -> None:
        super().__init__(
            feature_dim=_whole(network, "num_features"), num_classes=num_classes, input_spec=input_spec
        )
        self.network, self.patch = network, patch
        self.reset_classifier(num_classes)

    def teach_tokens(self, x: Tensor, *, layers: int) -> tuple[list[Tensor], Tensor]:
        """(B, C, h*P, w*P) -> the maps after its last ``layers`` blocks, (B, D, h, w) each, and attention (B, h, w)."""
        self.check_input(x)
        rows, columns = patch_grid(*x.shape[2:], patch=self.patch)
        blocks = cast(nn.ModuleList, self.network.blocks)
        if not 0 < layers <= len(blocks):
            raise ModelError(f"layers={layers} of a network of {len(blocks)} blocks")
        seen: list[Tensor] = []
        attention = getattr(blocks[-1], "attn", None)
        hook = attention and attention.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            maps = self._maps(x, layers)
        finally:
            if hook:
                hook.remove()
        counted = self._counted(maps[-1], attention, seen)
        return maps, torch.unflatten(counted, 1, (rows, columns))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, h*P, w*P) -> (B, D, h, w)."""
        self.check_input(x)
        patch_grid(*x.shape[2:], patch=self.patch)
        return self._maps(x, 1)[0]

    def forward_pooled(self, x: Tensor) -> Tensor:
        """(B, C, h*P, w*P) -> (B, D)."""
        self.check_input(x)
        return cast(Tensor, self.network(x))

    def checkpoint_blocks(self) -> list[str]:
        """Every transformer block."""
        return [f"network.blocks.{i}" for i in range(len(cast(nn.ModuleList, self.network.blocks)))]

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """timm's names below "network."; its classifier or projection, which the net is built without, is left out."""
        if any(key.startswith("network.") for key in state):
            return state, []
        own = self.network.state_dict()
        heads = [key for key in state if key.startswith("head.") and key not in own]
        notes = [f"left out timm's head: {', '.join(heads)}"] if heads else []
        return {f"network.{key}": value for key, value in state.items() if key not in heads}, notes

    def _maps(self, x: Tensor, layers: int) -> list[Tensor]:
        intermediates = cast(Callable[..., list[Tensor]], self.network.forward_intermediates)
        return intermediates(x, indices=layers, norm=True, output_fmt="NCHW", intermediates_only=True)

    def _counted(self, last: Tensor, attention: object, seen: list[Tensor]) -> Tensor:
        """How much each patch counted, (B, N), above 0."""
        network, prefix = self.network, _whole(self.network, "num_prefix_tokens")
        if getattr(network, "cls_token", None) is not None and hasattr(attention, "qkv") and seen:
            return timm_attention(cast(nn.Module, attention), seen[0])[:, prefix:]
        pool = getattr(network, "attn_pool", None)
        if isinstance(pool, nn.Module) and all(hasattr(pool, name) for name in ("latent", "q", "kv")):
            return pool_attention(pool, last.flatten(2).transpose(1, 2))
        return last.float().square().sum(dim=1).flatten(1)


def timm_attention(attention: nn.Module, z: Tensor) -> Tensor:
    """Of the first token to all, the mean over the heads of timm's ``Attention``: (B, 1 + N, D) -> (B, 1 + N)."""
    heads = _whole(attention, "num_heads")
    qkv = cast(nn.Module, attention.qkv)(z)
    query, key, _ = rearrange(qkv, "b n (three a d) -> three b a n d", three=3, a=heads).unbind()
    query, key = (
        cast(nn.Module, getattr(attention, f"{name}_norm"))(one) for name, one in (("q", query), ("k", key))
    )
    return _softmax_mean(query[:, :, :1], key)


def pool_attention(pool: nn.Module, z: Tensor) -> Tensor:
    """Of the latent query of timm's ``AttentionPoolLatent`` to the tokens, heads and queries averaged:
    (B, N, D) -> (B, N)."""
    heads = _whole(pool, "num_heads")
    places = getattr(pool, "pos_embed", None)
    z = z if places is None else z + places
    latent = cast(Tensor, pool.latent).expand(len(z), -1, -1)
    query = rearrange(cast(nn.Module, pool.q)(latent), "b q (a d) -> b a q d", a=heads)
    kv = cast(nn.Module, pool.kv)(z)
    key, _ = rearrange(kv, "b n (two a d) -> two b a n d", two=2, a=heads).unbind()
    query, key = (
        cast(nn.Module, getattr(pool, f"{name}_norm"))(one) for name, one in (("q", query), ("k", key))
    )
    return _softmax_mean(query, key)


def _softmax_mean(query: Tensor, key: Tensor) -> Tensor:
    """(B, heads, Q, d) and (B, heads, N, d) -> (B, N)."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    mean: Tensor = scores.float().softmax(dim=-1).mean(dim=(1, 2))
    return mean


def _whole(module: nn.Module, name: str) -> int:
    value = getattr(module, name, None)
    if not isinstance(value, int):
        raise ModelError(f"timm's {type(module).__name__} has no number {name!r}")
    return value


def timm_teacher(of: str, *, num_classes: int, in_frames: int, crop: int | None) -> TimmTeacher:
    """An image ViT of timm, of random weights.

    Args:
        of: one of ``timm.list_models()``; a tag of weights behind it (``.openai``) is passed over.
        crop: H = W in pixels, which learned places are made for; None is the published size. Other sizes at run time
            resize them.

    Raises:
        ModelError: timm is not installed, has no such model, or the model has no patch tokens.
    """
    timm = _timm()
    name = of.partition(".")[0]  # a tag says which weights, and those are in a file
    if not timm.is_model(name):
        near = timm.list_models(f"*{name[:8]}*")[:3]
        raise ModelError(f"timm has no model {name!r}" + (f"; it has {', '.join(near)}" if near else ""))
    sizes = {} if crop is None else {"img_size": crop}
    try:
        network = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True, **sizes)
    except TypeError:
        network = None  # without places that can be resized: not a ViT
    if network is None or not all(hasattr(network, member) for member in TIMM_MEMBERS):
        raise ModelError(
            f"timm's {name!r} has no patch tokens that could teach; take an image ViT such as "
            "vit_base_patch16_clip_224, vit_base_patch16_siglip_224 or vit_small_patch14_dinov2"
        )
    given: Mapping[str, object] = network.pretrained_cfg
    rows, _ = network.patch_embed.patch_size
    return TimmTeacher(
        network, patch=int(rows), num_classes=num_classes, input_spec=_input_spec(given, in_frames, crop)
    )


def _input_spec(given: Mapping[str, object], frames: int, crop: int | None) -> InputSpec:
    """From timm's record of how the published weights were trained."""
    side = crop or int(cast(tuple[int, int, int], given["input_size"])[1])
    mean, std = (tuple(float(v) for v in cast(tuple[float, ...], given[name])) for name in ("mean", "std"))
    return InputSpec.square(side, frames=frames, frame_stride=1, mean=mean, std=std)


def _timm() -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        hint = "models named timm:... need the extra timm: pip install 'cliplift[timm]'"
        raise ModelError(f"{hint} ({error})") from None


def timm_entry(name: str) -> ModelEntry:
    """The entry of a model of timm, whether or not timm is installed and has it."""

    def build(*, num_classes: int = 0, in_frames: int = 1, crop: int | None = None) -> TimmTeacher:
        return timm_teacher(name, num_classes=num_classes, in_frames=in_frames, crop=crop)

    return ModelEntry(name=f"timm:{name}", build=build, dims="2d", paper="timm", default_classes=0)


BY_PREFIX["timm"] = timm_entry
