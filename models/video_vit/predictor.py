"""V-JEPA's predictor: from the encoder's tokens of the context to the features of the tokens left out.

Sources: facebookresearch/vjepa2, src/models/predictor.py (2) and app/vjepa_2_1/models/predictor.py (2.1); arXiv
2506.09985. Context tokens are projected to a narrow width; every target place gets a learned mask token; all go through
the blocks together, ordered by place, with rotary positions; the targets, and in 2.1 the context too, are projected to
the width of what is predicted.

A checkpoint holds several mask tokens; which one is used depends on the clip length, so a run with one length uses one.

Shape letters: B clips, n context tokens, m target tokens, E width of the context (levels times the encoder's width),
D the predictor's, F width of the prediction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.protocol import ModelError
from cliplift.models.video_vit.blocks import BlockSpec, InitLinear, blocks, gather_tokens
from cliplift.models.video_vit.model import ROPE_PIXELS, VideoViT
from cliplift.models.video_vit.positions import RopeLayout, TokenGrid, rotary
from cliplift.models.video_vit.weights import adapt_predictor, check_config


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
