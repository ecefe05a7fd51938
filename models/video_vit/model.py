"""VideoViT: the plain vision transformer of tubelets that VideoMAE, VideoMAE v2, V-JEPA 2 and 2.1 pretrain.

Papers: Tong et al., VideoMAE, arXiv 2203.12602; Wang et al., VideoMAE V2, arXiv 2303.16727; Assran et al., V-JEPA 2,
arXiv 2506.09985. Public code: MCG-NJU/VideoMAE, OpenGVLab/VideoMAEv2, facebookresearch/vjepa2.

The net: tubelets of 2 frames x P x P pixels -> one Conv3d -> tokens, time first; places as fixed sine/cosine vectors or
rotary; blocks that attend over all tokens given; no CLS. Given the numbers of the visible tokens, everything after the
tubelets is computed for those alone.

What differs between the families is in the constructor's arguments:

    VideoMAE     sine/cosine, no bias of the keys, Xavier; classified from LN(mean of tokens) ("pooled")
    V-JEPA 2     rotary (concatenated), full bias, truncated normal; LN of every token ("tokens")
    V-JEPA 2.1   rotary (interleaved, positions stretched to 16 x 16), four levels each with its LN, an embedding that
                 tells images from videos, and tubelets of one frame for images

With :meth:`VideoViT.deal_tokens`, several ranks share every training clip, each a run of its tokens
(:mod:`cliplift.models.video_vit.blocks`). Tokens are numbered time first, so a rank reads the frames of its run alone.

Shape letters: B clips, C channels, T H W frames, rows and columns of tokens, P pixels of a tubelet's side, N tokens,
n tokens that are given, D width, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from cliplift.models.layers import PooledClassifier
from cliplift.models.protocol import InputSpec, ModelError
from cliplift.models.video_vit.attentive import AttentiveProbe, CrossAttention
from cliplift.models.video_vit.blocks import (
    STD,
    Attention,
    BlockSpec,
    Deal,
    Init,
    InitLinear,
    TokenGroup,
    blocks,
    deal,
    gather_tokens,
    own_run,
)
from cliplift.models.video_vit.positions import (
    RopeLayout,
    Rotation,
    TokenGrid,
    resized_table,
    rotary,
    sincos_table,
)
from cliplift.models.video_vit.weights import adapt_video_vit, check_config

Positions = Literal["sincos", "rope"]
FinalNorm = Literal["pooled", "tokens"]
Head = Literal["linear", "attentive"]
HEAD_SCALE = 0.001  # of the classifier's first weights (VideoMAE)
ROPE_PIXELS = 256  # the crop whose range of positions ``interpolate_rope`` keeps


class TubeletConv(nn.Conv3d):
    """No overlap. V-JEPA starts it as its Linears; VideoMAE leaves torch's own start."""

    def __init__(self, channels: int, width: int, size: tuple[int, int, int], *, init: Init) -> None:
        self.init = init  # read by reset_parameters, which the constructor calls
        super().__init__(channels, width, size, stride=size)

    def reset_parameters(self) -> None:
        if self.init == "xavier":
            super().reset_parameters()
        else:
            nn.init.trunc_normal_(self.weight, std=STD)
            nn.init.zeros_(cast(Tensor, self.bias))


class TubeletEmbed(nn.Module):
    """Non-overlapping tubelets -> tokens; with ``modality``, a learned vector that tells what kind of input it was."""

    def __init__(
        self, channels: int, width: int, *, tubelet: int, patch: int, init: Init, modality: bool
    ) -> None:
        super().__init__()
        self.proj = TubeletConv(channels, width, (tubelet, patch, patch), init=init)
        self.modality = nn.Parameter(torch.randn(1, 1, width) * 1e-6) if modality else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T*tubelet, H*P, W*P) -> (B, T*H*W, D)."""
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        return cast(Tensor, tokens if self.modality is None else tokens + self.modality)


class ClassifierLinear(InitLinear):
    """The first weights a thousandth of the usual: every class starts equal, and the gradient is not zero."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__(width, num_classes, init="truncated", shrink=1 / HEAD_SCALE)


class VideoViT(PooledClassifier):
    """See the module's docstring.

    Args:
        spec: width, heads, hidden width, bias and initialisation of the blocks.
        depth: number of blocks.
        patch, tubelet: pixels of a tubelet's side, and its frames.
        positions: "sincos" or "rope".
        layout: of rotary pairs; see :mod:`cliplift.models.video_vit.positions`.
        interpolate_rope: stretch rows and columns to the range of a 256-pixel crop.
        final_norm: "tokens", LN of every token (``norm``), as in all pretraining; or "pooled", LN of their mean
            (``fc_norm``), as VideoMAE is finetuned.
        levels: numbers of the blocks whose outputs are levels, each with its own LN, the last block among them; empty
            for one final norm.
        images: also take clips of one frame, by tubelets of one frame.
        position_resize: what another grid than the native one does to the sine/cosine table. "flat" (released code)
            counts tokens anew, so that a token's vector depends on the grid; "trilinear" keeps its place.
        head: "linear" on the pooled feature, or "attentive", a probe of 4 blocks on the tokens with
            ``probe_heads`` heads.
        num_classes, input_spec, drop_path, dropout: as for every model; ``drop_path`` is the last block's rate.
    """

    head_name = "head"
    token_group: TokenGroup | None = None  # of the ranks that share every training clip
    # where V-JEPA's files keep an encoder: the teacher first, which is what is evaluated
    checkpoint_parts = ("target_encoder", "ema_encoder", "encoder")

    def __init__(
        self,
        *,
        spec: BlockSpec,
        depth: int,
        patch: int,
        num_classes: int,
        input_spec: InputSpec,
        tubelet: int = 2,
        positions: Positions = "sincos",
        layout: RopeLayout = "concatenated",
        interpolate_rope: bool = False,
        final_norm: FinalNorm = "tokens",
        levels: Sequence[int] = (),
        images: bool = False,
        position_resize: Literal["flat", "trilinear"] = "flat",
        head: Head = "linear",
        probe_heads: int = 16,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            feature_dim=spec.width, num_classes=num_classes, input_spec=input_spec, dropout=dropout
        )
        _check_choices(positions, final_norm, position_resize, head)
        _check_levels(tuple(levels), depth, final_norm)
        self.spec, self.patch, self.tubelet = spec, patch, tubelet
        self.positions, self.layout, self.interpolate_rope = positions, layout, interpolate_rope
        self.final_norm, self.levels = final_norm, tuple(levels)
        self.head_kind, self.probe_heads = head, probe_heads
        self.position_resize = position_resize
        self.native_grid = self.grid(input_spec.frames, input_spec.crop_height, input_spec.crop_width)
        embed = {"patch": patch, "init": spec.init, "modality": images}
        self.patch_embed = TubeletEmbed(input_spec.channels, spec.width, tubelet=tubelet, **embed)  # type: ignore[arg-type]
        self.image_embed = (
            TubeletEmbed(input_spec.channels, spec.width, tubelet=1, **embed)  # type: ignore[arg-type]
            if images
            else None
        )
        self.blocks = blocks(spec, depth, drop_path=drop_path)
        norms = [nn.LayerNorm(spec.width, eps=spec.eps) for _ in self.levels or (depth - 1,)]
        if self.levels:
            self.level_norms = nn.ModuleList(norms)
        elif final_norm == "tokens":
            self.norm = norms[0]
        else:
            self.fc_norm = norms[0]
        self.reset_classifier(num_classes)

    def grid(self, frames: int, height: int, width: int | None = None) -> TokenGrid:
        """Tokens along time, rows and columns of a clip of ``frames`` x ``height`` x ``width`` pixels (square if None).

        Raises:
            ModelError: sizes that are no positive multiples of the tubelet.
        """
        width = height if width is None else width
        tubelet = 1 if frames == 1 and getattr(self, "image_embed", None) is not None else self.tubelet
        if min(frames, height, width) < 1 or frames % tubelet or height % self.patch or width % self.patch:
            raise ModelError(
                f"a clip of {frames} frames of {height}x{width} pixels is not made of whole tubelets of {tubelet} "
                f"frames of {self.patch}x{self.patch}: change in_frames or the crop"
            )
        return TokenGrid(frames // tubelet, height // self.patch, width // self.patch)

    def forward_tokens(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """The tokens after the last block and, with ``final_norm="tokens"``, its LN.

        Args:
            x: (B, C, T*tubelet, H*P, W*P).
            keep: flat numbers (B, n) of the tokens to compute, each row without repeats; None for all N.

        Returns:
            (B, n, D) in the order of ``keep``.
        """
        last = len(self.blocks) - 1
        return self.forward_levels(x, keep, layers=(last,))[0]

    def forward_levels(
        self, x: Tensor, keep: Tensor | None = None, *, layers: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Tokens after several blocks, each after LN: the model's levels, or its only norm for all ``layers``.

        Args:
            x, keep: as :meth:`forward_tokens`.
            layers: numbers of blocks, ascending; None for the model's levels, or the last block where it has none.

        Returns:
            One (B, n, D) for each of them.
        """
        wanted = tuple(layers if layers is not None else self.levels or (len(self.blocks) - 1,))
        levels, dealt = self._own_levels(x, keep, wanted)
        if dealt is None:
            return levels
        group = self.token_group
        assert group is not None
        return [group.gather(z.transpose(0, 1), dealt).transpose(0, 1) for z in levels]

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, T*tubelet, H*P, W*P) -> (B, D, T, H, W)."""
        grid = self.grid(*x.shape[2:])
        return rearrange(
            self.forward_tokens(x), "b (t h w) d -> b d t h w", t=grid.frames, h=grid.rows, w=grid.columns
        )

    def forward_pooled(self, x: Tensor) -> Tensor:
        """(B, C, T*tubelet, H*P, W*P) -> (B, D): the mean token."""
        z, dealt = self._own_tokens(x)
        if dealt is None:
            mean = z.mean(dim=1)
        else:
            assert self.token_group is not None
            # Added up over the ranks in fp32 at least, as within one.
            wide = torch.promote_types(z.dtype, torch.float32)
            mean = (self.token_group.total(z.sum(dim=1, dtype=wide)) / sum(dealt)).to(z.dtype)
        return cast(Tensor, self.fc_norm(mean) if self.final_norm == "pooled" else mean)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T*tubelet, H*P, W*P) -> (B, K) logits, or (B, D) features when ``num_classes == 0``."""
        if self.head_kind == "attentive" and self.num_classes:
            z, dealt = self._own_tokens(x)
            return cast(Tensor, self.head(self.head_dropout(z), dealt))
        return super().forward(x)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a freshly initialised one; 0 removes it."""
        super().reset_classifier(num_classes)
        if num_classes:
            reference = self.patch_embed.proj.weight
            head = (
                ClassifierLinear(self.feature_dim, num_classes)
                if self.head_kind == "linear"
                else AttentiveProbe(self.feature_dim, num_classes=num_classes, heads=self.probe_heads)
            )
            self.head = head.to(device=reference.device, dtype=reference.dtype)

    def deal_tokens(self, group: TokenGroup | None) -> None:
        """Share every clip of a forward pass in training with the ranks of ``group``, which all call it with the same
        clips; with None no more. In evaluation each rank computes its own clips.

        Raises:
            ModelError: their number does not divide the heads, or what is to be dealt is too small.
        """
        attentions = [m for m in self.modules() if isinstance(m, Attention | CrossAttention)]
        if group is not None:
            heads, tokens = math.gcd(*(m.heads for m in attentions)), self.native_grid.tokens
            possible = [size for size in range(1, heads + 1) if heads % size == 0 and size <= tokens]
            if group.size not in possible:
                raise ModelError(
                    f"{group.size} ranks cannot share {heads} heads of {tokens} tokens evenly: possible are "
                    f"{', '.join(map(str, possible))}"
                )
            if self.head_kind == "attentive" and self.head_dropout.p:
                raise ModelError("ranks that share clips would drop other tokens each: use dropout=0")
        self.token_group = group
        for attention in attentions:
            attention.token_group = group

    def checkpoint_blocks(self) -> list[str]:
        """Every transformer block; all hold equally much."""
        return [f"blocks.{i}" for i in range(len(self.blocks))]

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Public weights under our names; see :mod:`cliplift.models.video_vit.weights`."""
        return adapt_video_vit(state, own=self.state_dict())

    def check_foreign_config(self, config: Mapping[str, object]) -> None:
        """Raises ModelError for a Hugging Face config that is not of this net."""
        check_config(config, {"num_attention_heads": self.spec.heads})

    def _own_tokens(self, x: Tensor) -> tuple[Tensor, Deal | None]:
        (z,), dealt = self._own_levels(x, None, (len(self.blocks) - 1,))
        return z, dealt

    def _own_levels(
        self, x: Tensor, keep: Tensor | None, wanted: Sequence[int]
    ) -> tuple[list[Tensor], Deal | None]:
        """Tokens after several blocks; where ranks share the clips, those of this rank, and how they were dealt."""
        self.check_input(x)
        grid = self.grid(*x.shape[2:])
        dealt = self._deal(grid.tokens if keep is None else keep.shape[1])
        z, rotation = self._embed(x, grid, keep, dealt)
        found = []
        for i, block in enumerate(self.blocks):
            z = block(z, rotation, dealt)
            if i in wanted:
                found.append(self._normed(z, i))
            if i == max(wanted):
                break
        return found, dealt

    def _deal(self, tokens: int) -> Deal | None:
        group = self.token_group
        if group is None or not self.training:
            return None
        if tokens < group.size:
            raise ModelError(f"{group.size} ranks cannot share {tokens} tokens")
        return deal(tokens, group.size)

    def _embed(
        self, x: Tensor, grid: TokenGrid, keep: Tensor | None, dealt: Deal | None
    ) -> tuple[Tensor, Rotation | None]:
        if dealt is not None:
            assert self.token_group is not None
            own = own_run(dealt, self.token_group.rank)
            if keep is None:
                return self._embed_run(x, grid, own)
            keep = keep[:, own]
        z = self._embedding(x)(x)
        if self.positions == "sincos":
            z = z + self._table(grid, z.device).to(z.dtype)
        if keep is not None:
            z = gather_tokens(z, keep)
        return z, self.rotation(grid, keep, device=z.device)

    def _embed_run(self, x: Tensor, grid: TokenGrid, run: slice) -> tuple[Tensor, Rotation | None]:
        """The tokens of one run, from the frames that they are in."""
        each = grid.tokens_of_a_frame
        first, stop = run.start // each, -(-run.stop // each)
        frames = x.unflatten(2, (grid.frames, -1))[:, :, first:stop].flatten(2, 3)  # type: ignore[no-untyped-call]
        z = self._embedding(x)(frames)[:, run.start - first * each : run.stop - first * each]
        if self.positions == "sincos":
            z = z + self._table(grid, z.device)[run].to(z.dtype)
        numbers = torch.arange(run.start, run.stop, device=z.device)
        return z, self.rotation(grid, numbers, device=z.device)

    def _embedding(self, x: Tensor) -> nn.Module:
        """What makes tokens of the pixels: of an image by itself, where the model takes images."""
        return self.image_embed if self.image_embed is not None and x.shape[2] == 1 else self.patch_embed

    def rotation(self, grid: TokenGrid, keep: Tensor | None, *, device: torch.device) -> Rotation | None:
        """Rotary cosines and sines of a clip's tokens, or of those in ``keep``; None for sine/cosine positions."""
        if self.positions != "rope":
            return None
        numbers = torch.arange(grid.tokens, device=device) if keep is None else keep
        side = ROPE_PIXELS // self.patch
        native = (side, side) if self.interpolate_rope else None
        return rotary(numbers, grid, self.spec.head_width, layout=self.layout, native=native)

    def _table(self, grid: TokenGrid, device: torch.device) -> Tensor:
        if self.position_resize == "flat" or grid == self.native_grid:
            return sincos_table(grid.tokens, self.feature_dim, device=device)
        table = sincos_table(self.native_grid.tokens, self.feature_dim, device=device)
        return resized_table(table, self.native_grid, grid)

    def _normed(self, z: Tensor, layer: int) -> Tensor:
        if self.levels:
            at = self.levels.index(layer) if layer in self.levels else len(self.levels) - 1
            return cast(Tensor, self.level_norms[at](z))
        return cast(Tensor, self.norm(z) if self.final_norm == "tokens" else z)


def _check_choices(positions: str, final_norm: str, position_resize: str, head: str) -> None:
    for option, value, known in (
        ("positions", positions, ("sincos", "rope")),
        ("final_norm", final_norm, ("pooled", "tokens")),
        ("position_resize", position_resize, ("flat", "trilinear")),
        ("head", head, ("linear", "attentive")),
    ):
        if value not in known:
            raise ModelError(f"{option}={value!r} must be one of {', '.join(known)}")
    if head == "attentive" and final_norm == "pooled":
        raise ModelError("head='attentive' reads tokens: it needs final_norm='tokens'")


def _check_levels(levels: tuple[int, ...], depth: int, final_norm: str) -> None:
    if depth < 1:
        raise ModelError(f"depth={depth} must be 1 or more")
    if levels and (list(levels) != sorted(set(levels)) or levels[-1] != depth - 1 or levels[0] < 0):
        raise ModelError(
            f"levels={levels} must ascend and end at the last of the {depth} blocks, {depth - 1}"
        )
    if levels and final_norm != "tokens":
        raise ModelError("levels have an LN of every token: final_norm must be 'tokens'")
