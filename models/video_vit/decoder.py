"""Masked autoencoding of pixels: the decoder of VideoMAE and VideoMAE v2, its target and its loss.

Papers: arXiv 2203.12602 (v1), 2303.16727 (v2, dual masking). The encoder sees the visible tokens only. The decoder is
given them, projected, and a mask token at every place it shall fill in; each with the place's vector added, never put
back in order. It gives the pixels of the places filled in.

Target of a tubelet: its pixels in [0, 1] less their mean, over their standard deviation (unbiased) + 1e-6, channel by
channel; ordered frame, row, column, channel. Dual masking decodes a subset of the places. A place that is decoded but
visible to the encoder costs time and does not count in the loss (released code of v2).

Shape letters: B clips, C channels, T H W tokens along time, rows, columns, P pixels of a tubelet's side, N tokens of a
clip, n visible, m decoded, D width, V values of a tubelet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from cliplift.models.protocol import ModelError
from cliplift.models.video_vit.blocks import (
    BlockSpec,
    Deal,
    InitLinear,
    TokenGroup,
    blocks,
    deal,
    gather_tokens,
    own_run,
    share_heads,
)
from cliplift.models.video_vit.model import VideoViT
from cliplift.models.video_vit.positions import sincos_table
from cliplift.models.video_vit.weights import adapt_masked_autoencoder, check_config


class Reconstruction(NamedTuple):
    """What :class:`MaskedAutoencoder` gives. A tuple, so that ZeRO-3 finds the tensors whose backward pass needs
    parameters gathered.

    ``loss``: scalar, the mean of ``loss_of_clip`` (B,), so that it does not depend on how clips are divided into
    batches. ``prediction`` and ``target``: (B, m, V) at ``decoded`` (B, m). ``counted``: (B, m), 1 where the loss
    looks.
    """

    loss: Tensor
    loss_of_clip: Tensor
    prediction: Tensor
    target: Tensor
    decoded: Tensor
    counted: Tensor


class PixelDecoder(nn.Module):
    """Blocks on visible and mask tokens together, LN, Linear to pixels."""

    def __init__(self, spec: BlockSpec, depth: int, values: int) -> None:
        super().__init__()
        self.spec = spec
        self.blocks = blocks(spec, depth)
        self.norm = nn.LayerNorm(spec.width, eps=spec.eps)
        self.head = InitLinear(spec.width, values, init=spec.init)

    def forward(self, x: Tensor, decoded: int, dealt: Deal | None = None) -> Tensor:
        """(B, n + m, D) -> (B, m, V): the last ``decoded`` tokens; with ``dealt``, all of this rank's."""
        for block in self.blocks:
            x = block(x, None, dealt)
        return cast(Tensor, self.head(self.norm(x[:, -decoded:])))


class MaskedAutoencoder(nn.Module):
    """An encoder with VideoMAE's decoder. ``encoder`` keeps its own parameters and state-dict keys, below "encoder.".

    Args:
        encoder: a :class:`VideoViT` with sine/cosine positions or rotary ones, and ``final_norm="tokens"``.
        width, depth, heads: of the decoder. Published: half of the encoder's width, head width 64, 4 blocks (S, B);
            v1's L and H 12 blocks; v2's L, H and g 4 blocks of 512, 8 heads.
        normalise: normalise the target's tubelets.
    """

    def __init__(
        self, encoder: VideoViT, *, width: int, depth: int, heads: int, normalise: bool = True
    ) -> None:
        super().__init__()
        if encoder.final_norm != "tokens" or encoder.levels:
            raise ModelError(
                "masked pretraining needs an encoder with one LN of every token: final_norm='tokens', no levels"
            )
        spec = BlockSpec(
            width=width,
            heads=heads,
            hidden=width * encoder.spec.hidden // encoder.spec.width,  # the encoder's ratio (released code)
            qkv_bias=encoder.spec.qkv_bias,
            init=encoder.spec.init,
        )
        channels = encoder.input_spec.channels
        self.encoder, self.normalise = encoder, normalise
        self.encoder_to_decoder = InitLinear(encoder.feature_dim, width, init=spec.init, bias=False)
        # one dimension, by which the optimizer knows what not to decay (released code: not the mask token)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02, a=-0.02, b=0.02))
        self.decoder = PixelDecoder(spec, depth, channels * encoder.tubelet * encoder.patch**2)

    def forward(self, clips: Tensor, visible: Tensor, decoded: Tensor | None = None) -> Reconstruction:
        """
        Args:
            clips: (B, C, T*tubelet, H*P, W*P), normalised as the encoder's input_spec says.
            visible: numbers (B, n) of the tokens the encoder sees, ascending.
            decoded: numbers (B, m) of the tokens to reconstruct; None for all that are not visible.
        """
        grid = self.encoder.grid(*clips.shape[2:])
        if decoded is None:
            decoded = other_tokens(visible, grid.tokens)
        seen = torch.zeros(len(clips), grid.tokens, device=clips.device).scatter_(1, visible, 1.0)
        tokens, dealt = self.encoder.own_tokens(clips, visible)
        if dealt is not None:
            visible, decoded, dealt = self._own(visible, decoded, dealt)
        latent = self.encoder_to_decoder(tokens)
        table = sincos_table(grid.tokens, latent.shape[-1], device=latent.device).to(latent.dtype)
        filled = self.mask_token + gather_tokens(table, decoded)
        x = torch.cat([latent + gather_tokens(table, visible), filled.to(latent.dtype)], dim=1)
        prediction = self.decoder(x, decoded.shape[1], dealt)
        with torch.no_grad():
            target = gather_tokens(self.target(clips), decoded)
            counted = 1 - seen.gather(1, decoded)
        error = (prediction.float() - target).square().mean(dim=-1)
        sums = torch.stack([(error * counted).sum(dim=1), counted.sum(dim=1)])
        if dealt is not None and self.encoder.token_group is not None:
            sums = self.encoder.token_group.total(sums)
        of_clip = sums[0] / sums[1].clamp(min=1)
        return Reconstruction(of_clip.mean(), of_clip, prediction, target, decoded, counted)

    def _own(self, visible: Tensor, decoded: Tensor, dealt: Deal) -> tuple[Tensor, Tensor, Deal]:
        """This rank's visible tokens, those that it decodes, and how both together are dealt.

        The decoder's attention meets them in the order of the ranks, which is not that of the clip: places are added to
        the tokens before, and their order means nothing to it.
        """
        group = self.encoder.token_group
        assert group is not None
        if decoded.shape[1] < group.size:
            raise ModelError(f"{group.size} ranks cannot share {decoded.shape[1]} tokens to decode")
        filled = deal(decoded.shape[1], group.size)
        both = tuple(n + m for n, m in zip(dealt, filled, strict=True))
        return visible[:, own_run(dealt, group.rank)], decoded[:, own_run(filled, group.rank)], both

    def deal_tokens(self, group: TokenGroup | None) -> None:
        """Share every training clip with the ranks of a group, as :meth:`VideoViT.deal_tokens`; encoder and decoder
        alike. Prediction and target are then those of this rank, and the loss is of all."""
        share_heads(self, group, tokens=self.encoder.native_grid.tokens)
        self.encoder.deal_tokens(group)

    def target(self, clips: Tensor) -> Tensor:
        """(B, C, T*tubelet, H*P, W*P) as given to the encoder -> (B, N, V), float32."""
        spec, encoder = self.encoder.input_spec, self.encoder
        return tubelet_targets(
            clips,
            mean=spec.mean,
            std=spec.std,
            tubelet=encoder.tubelet,
            patch=encoder.patch,
            normalise=self.normalise,
        )

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Public weights under our names; see :mod:`cliplift.models.video_vit.weights`."""
        return adapt_masked_autoencoder(state)

    def check_foreign_config(self, config: Mapping[str, object]) -> None:
        """Raises ModelError for a Hugging Face config that is not of this net."""
        self.encoder.check_foreign_config(config)
        check_config(config, {"decoder_num_attention_heads": self.decoder.spec.heads})

    def checkpoint_blocks(self) -> list[str]:
        """The encoder's blocks, then the decoder's, which hold more tokens each."""
        inner = [f"encoder.{name}" for name in self.encoder.checkpoint_blocks()]
        return inner + [f"decoder.blocks.{i}" for i in range(len(self.decoder.blocks))]


def other_tokens(numbers: Tensor, tokens: int) -> Tensor:
    """The numbers (B, N - n) of a clip's ``tokens`` that are not in ``numbers`` (B, n), ascending. Nothing is read
    back from the device: their count is known."""
    taken = torch.zeros(len(numbers), tokens, dtype=torch.int64, device=numbers.device)
    taken.scatter_(1, numbers, 1)
    return taken.argsort(dim=1, stable=True)[:, : tokens - numbers.shape[1]]


def tubelet_targets(
    clips: Tensor,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    tubelet: int,
    patch: int,
    normalise: bool,
) -> Tensor:
    """Pixels in [0, 1] by tubelets: (B, C, T*tubelet, H*P, W*P) -> (B, T*H*W, tubelet*P*P*C), float32."""
    # plain numbers, channel by channel: a tensor of them would be copied to the device, and the host would wait for it
    pixels = [clips[:, c].float() * std[c] + mean[c] for c in range(clips.shape[1])]
    cubes = rearrange(
        torch.stack(pixels, dim=1),
        "b c (t p0) (h p1) (w p2) -> b (t h w) (p0 p1 p2) c",
        p0=tubelet,
        p1=patch,
        p2=patch,
    )
    if normalise:
        spread = cubes.var(dim=2, unbiased=True, keepdim=True).sqrt() + 1e-6
        cubes = (cubes - cubes.mean(dim=2, keepdim=True)) / spread
    return cubes.flatten(2)
