"""Latent prediction: V-JEPA's predictor, V-JEPA 2's loss, and the dense one of V-JEPA 2.1.

Papers: V-JEPA, arXiv 2404.08471; V-JEPA 2, 2506.09985. Public code: facebookresearch/vjepa2, src/models/predictor.py,
app/vjepa and app/vjepa_2_1.

A teacher, a copy of the encoder that follows it by a moving average, sees the whole clip; its features, layer-normed
without weights, are the target. For each mask of a clip the encoder sees the context tokens alone, and the predictor
gives the features of the hidden ones. Loss: mean absolute difference, averaged over the masks.

The predictor: context tokens are projected to a narrow width; every target place gets a learned mask token; all go
through the blocks together, ordered by place, with rotary positions; the targets, and in 2.1 the context too, are
projected to the width of what is predicted. A checkpoint holds several mask tokens; which one is used depends on the
clip length, so a run with one length uses one.

Dense (2.1): four levels of the encoder are given to the predictor and predicted, each layer-normed. The features of the
context are predicted too; the difference there is weighted by 1 / sqrt(distance to the nearest hidden token).

Shape letters: B clips, C channels, T H W frames and pixels, N tokens of a clip, n of its context, m hidden; E width of
the predictor's context (levels times the encoder's width), D width of the encoder or of the predictor, F width of what
is predicted: the encoder's, or four times that.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.protocol import ModelError
from cliplift.models.video_vit.blocks import BlockSpec, InitLinear, blocks, gather_tokens
from cliplift.models.video_vit.model import ROPE_PIXELS, VideoViT
from cliplift.models.video_vit.positions import RopeLayout, TokenGrid, rotary
from cliplift.models.video_vit.weights import adapt_predictor, check_config

TARGET_EPS = 1e-5  # of the layer norm of the targets


class LevelsEmbed(nn.Module):
    """Context tokens to the predictor's width; several levels pass a hidden layer of the encoder's width first."""

    def __init__(self, encoder_width: int, width: int, levels: int) -> None:
        super().__init__()
        self.hidden = (
            InitLinear(levels * encoder_width, encoder_width, init="truncated") if levels > 1 else None
        )
        self.out = InitLinear(encoder_width, width, init="truncated")

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, E) -> (B, n, D)."""
        return cast(Tensor, self.out(x if self.hidden is None else F.gelu(self.hidden(x))))


class LatentPredictor(nn.Module):
    """See the module's docstring.

    Args:
        encoder_width: width of one level of the encoder.
        width, depth, heads: of the predictor; published 384, 12 (2.1 g and G: 24) and 12.
        levels: encoder levels that the context holds side by side, E = levels * encoder_width.
        predicted: F; None for levels * encoder_width.
        mask_tokens: how many are learned; 10 in released V-JEPA 2 files, 8 in 2.1's.
        predict_context: also project the context tokens (2.1's dense loss).
        modality: learned vectors that tell images from videos (2.1).
        layout: of rotary pairs; 2 "concatenated", 2.1 "interleaved".
        native: rows and columns to stretch positions to (2.1: (16, 16)); None for none.
    """

    checkpoint_parts = ("predictor",)  # where V-JEPA's files keep it

    def __init__(
        self,
        encoder_width: int,
        *,
        width: int = 384,
        depth: int = 12,
        heads: int = 12,
        levels: int = 1,
        predicted: int | None = None,
        mask_tokens: int = 10,
        predict_context: bool = False,
        modality: bool = False,
        layout: RopeLayout = "concatenated",
        native: tuple[int, int] | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if levels < 1 or mask_tokens < 1:
            raise ModelError(f"levels={levels} and mask_tokens={mask_tokens} must be 1 or more")
        self.spec = BlockSpec(width=width, heads=heads, hidden=4 * width)
        self.layout: RopeLayout = layout
        self.native = native
        self.embed = LevelsEmbed(encoder_width, width, levels)
        self.mask_tokens = nn.Parameter(torch.zeros(mask_tokens, width))
        self.video_modality, self.image_modality = (
            nn.Parameter(torch.randn(1, 1, width) * 1e-6) if modality else None for _ in range(2)
        )
        self.blocks = blocks(self.spec, depth, drop_path=drop_path)
        self.norm = nn.LayerNorm(width, eps=self.spec.eps)
        outputs = levels * encoder_width if predicted is None else predicted
        self.proj = InitLinear(width, outputs, init="truncated")
        self.proj_context = InitLinear(width, outputs, init="truncated") if predict_context else None

    @classmethod
    def of(cls, encoder: VideoViT, **options: Any) -> LatentPredictor:
        """The predictor that fits an encoder's positions and levels; ``options`` as the constructor's."""
        side = ROPE_PIXELS // encoder.patch
        own: dict[str, Any] = {
            "levels": max(len(encoder.levels), 1),
            "layout": encoder.layout,
            "native": (side, side) if encoder.interpolate_rope else None,
            "modality": encoder.image_embed is not None,
        }
        return cls(encoder.feature_dim, **(own | options))

    def forward(
        self,
        context: Tensor,
        context_numbers: Tensor,
        target_numbers: Tensor,
        grid: TokenGrid,
        *,
        mask_token: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            context: encoder tokens (B, n, E).
            context_numbers, target_numbers: their flat numbers (B, n), and (B, m) of those to predict.
            grid: the clip's grid; one frame of tokens is an image.
            mask_token: which mask token to use, modulo their count.

        Returns:
            The prediction (B, m, F) in the order of ``target_numbers``, and that of the context (B, n, F), or None.
        """
        x = self.embed(context)
        token = self.mask_tokens[mask_token % len(self.mask_tokens)].to(x.dtype)
        asked = token.expand(len(x), target_numbers.shape[1], -1)
        numbers = torch.cat([context_numbers, target_numbers], dim=1)
        order = numbers.argsort(dim=1)
        x, numbers = gather_tokens(torch.cat([x, asked], dim=1), order), numbers.gather(1, order)
        modality = self.image_modality if grid.frames == 1 else self.video_modality
        if modality is not None:
            x = x + modality
        rotation = rotary(numbers, grid, self.spec.head_width, layout=self.layout, native=self.native)
        for block in self.blocks:
            x = block(x, rotation)
        x = gather_tokens(self.norm(x), order.argsort(dim=1))
        seen, left_out = x[:, : context.shape[1]], x[:, context.shape[1] :]
        return self.proj(left_out), None if self.proj_context is None else self.proj_context(seen)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Public weights under our names; see :mod:`cliplift.models.video_vit.weights`."""
        return adapt_predictor(state)

    def check_foreign_config(self, config: Mapping[str, object]) -> None:
        """Raises ModelError for a Hugging Face config that is not of this net."""
        check_config(config, {"pred_num_attention_heads": self.spec.heads})

    def checkpoint_blocks(self) -> list[str]:
        """Every transformer block; all hold equally much."""
        return [f"blocks.{i}" for i in range(len(self.blocks))]


class Prediction(NamedTuple):
    """What :class:`LatentPrediction` gives. A tuple, so that ZeRO-3 finds the tensors whose backward pass needs
    parameters gathered.

    ``loss``: scalar, the mean of ``loss_of_clip`` (B,), so that it does not depend on how clips are divided into
    batches. ``target``: (B, N, F), the teacher's layer-normed features of all tokens.
    """

    loss: Tensor
    loss_of_clip: Tensor
    target: Tensor


class LatentPrediction(nn.Module):
    """An encoder, its predictor, and its teacher, which is never trained: whoever trains moves it.

    Args:
        encoder: what is trained.
        predictor: made by ``LatentPredictor.of(encoder, ...)``.
        teacher: another encoder of the same kind, which is given the weights of the first, a tensor at a time; None
            makes a copy, which under ZeRO-3 would be whole on every rank while the network is built.
        dense: V-JEPA 2.1's loss, of all levels and of the context.
        near_first: weight the context by its distance to the hidden tokens (2.1's pretraining).

    Raises:
        ModelError: ``dense`` with an encoder without levels or a predictor that gives no context.
    """

    def __init__(
        self,
        encoder: VideoViT,
        predictor: LatentPredictor,
        teacher: VideoViT | None = None,
        *,
        dense: bool = False,
        near_first: bool = True,
    ) -> None:
        super().__init__()
        if encoder.final_norm != "tokens":
            raise ModelError("latent prediction needs an LN of every token: final_norm='tokens'")
        if dense and (not encoder.levels or predictor.proj_context is None):
            raise ModelError("dense latent prediction needs an encoder with levels, and predict_context=True")
        self.encoder, self.predictor = encoder, predictor
        self.dense, self.near_first = dense, near_first
        self.teacher = copy.deepcopy(encoder) if teacher is None else teacher
        self.teacher.requires_grad_(False).eval()
        with torch.no_grad():
            for own, given in zip(self.teacher.parameters(), encoder.parameters(), strict=True):
                own.copy_(given)
        self.layers = encoder.levels if dense else (len(encoder.blocks) - 1,)

    def train(self, mode: bool = True) -> LatentPrediction:
        """The teacher is never in training mode: it drops nothing."""
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def targets(self, clips: Tensor) -> Tensor:
        """(B, C, T, H, W) -> the teacher's features of every token, layer-normed level by level: (B, N, F), fp32."""
        levels = self.teacher.forward_levels(clips, layers=self.layers)
        width = (levels[0].shape[-1],)
        return torch.cat([F.layer_norm(level.float(), width, eps=TARGET_EPS) for level in levels], dim=-1)

    def forward(
        self,
        clips: Tensor,
        masks: Sequence[tuple[Tensor, Tensor]],
        context_weight: Tensor | float = 0.0,
    ) -> Prediction:
        """
        Args:
            clips: (B, C, T, H, W), normalised as the encoder's input_spec says.
            masks: for each mask the numbers of the context tokens (B, n) and of the hidden ones (B, m); n and m may
                differ from mask to mask.
            context_weight: of the context's part of the loss, with ``dense``.
        """
        target = self.targets(clips)
        grid = self.encoder.grid(*clips.shape[2:])
        total = torch.zeros(len(clips), device=clips.device)
        for context, hidden in masks:
            seen = torch.cat(self.encoder.forward_levels(clips, context, layers=self.layers), dim=-1)
            found, of_context = self.predictor(seen, context, hidden, grid)
            total = total + _difference(found, target, hidden).mean(dim=1)
            if self.dense:
                off = _difference(of_context, target, context)
                if self.near_first:
                    off = off / distance_to_hidden(context, hidden, grid).sqrt()
                total = total + context_weight * off.mean(dim=1)
        loss_of_clip = total / len(masks)
        return Prediction(loss_of_clip.mean(), loss_of_clip, target)

    def checkpoint_blocks(self) -> list[str]:
        """The encoder's blocks, then the predictor's."""
        of_encoder = [f"encoder.{block}" for block in self.encoder.checkpoint_blocks()]
        return of_encoder + [f"predictor.{block}" for block in self.predictor.checkpoint_blocks()]


def _difference(found: Tensor, target: Tensor, numbers: Tensor) -> Tensor:
    """Mean absolute difference over the values of each token: (B, m, F), (B, N, F) at (B, m) -> (B, m)."""
    return (found.float() - gather_tokens(target, numbers)).abs().mean(dim=2)


def distance_to_hidden(context: Tensor, hidden: Tensor, grid: TokenGrid) -> Tensor:
    """Distance in tokens, along time, rows and columns, of each context token (B, n) to the nearest hidden one (B, m).

    The lists of a clip have no token in common, so it is 1 or more. (B, n), fp32.
    """
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(_places(context, grid), _places(hidden, grid), compute_mode=exact).amin(dim=2)


def _places(numbers: Tensor, grid: TokenGrid) -> Tensor:
    """Flat numbers (B, n) -> time, row and column (B, n, 3), fp32."""
    of_frame = numbers % grid.tokens_of_a_frame
    axes = numbers // grid.tokens_of_a_frame, of_frame // grid.columns, of_frame % grid.columns
    return torch.stack(axes, dim=-1).float()
