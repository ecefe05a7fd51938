"""Distillation of image teachers into a video encoder, token by token.

Both ways give the encoder the visible tokens alone, and its frozen teachers single frames.

``VisibleAlignment`` (Unmasked Teacher, arXiv 2303.16058; OpenGVLab/unmasked_teacher): the last K blocks' visible
tokens, each after the encoder's LN and with its place's vector added, pass a Linear and an LN and are compared with
the teacher's last K maps at those places. There is no decoder.

``HiddenPrediction`` (Masked Video Distillation, arXiv 2212.04500; ruiwang2021/mvd): a decoder for each teacher, as
VideoMAE's, gives the teacher's features at the places that are hidden.

Which loss compares them is free: 2 - 2 cos (UMT), smooth L1 (MVD) or the mean squared difference.

Any image network has a last feature map and can teach. One that knows more offers ``teach_tokens``: maps after several
layers, and how much each place counted. Where a network does not say what counted, it is the energy of its last map,
the sum of squares over channels (activation-based attention, arXiv 1612.03928).

Shape letters: B clips, C channels, T H W frames and pixels, N tokens of a clip, n visible, m hidden, K blocks or maps,
D width of the encoder or channels of a map, h w its places, F widths of all teachers' features together, which stand
side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.protocol import ModelError, VideoNetwork
from cliplift.models.video_vit.blocks import BlockSpec, Init, InitLinear, gather_tokens
from cliplift.models.video_vit.decoder import PixelDecoder, other_tokens
from cliplift.models.video_vit.model import VideoViT
from cliplift.models.video_vit.positions import TokenGrid, sincos_table

DistanceKind = Literal["cosine", "smooth_l1", "l2"]
TARGET_EPS = 1e-6  # of the layer norm of targets (MVD)
MAX_STRETCH = 2  # a map may have half as many rows and columns as the tokens, no fewer


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


class Distilled(NamedTuple):
    """What the nets below give. A tuple, so that ZeRO-3 finds the tensors whose backward pass needs parameters
    gathered.

    ``loss``: scalar, the mean of ``loss_of_clip`` (B,), so that it does not depend on how clips are divided into
    batches. ``cosine_of_clip`` (B,): mean cosine of the guesses with the targets.
    """

    loss: Tensor
    loss_of_clip: Tensor
    cosine_of_clip: Tensor


def compared(
    found: Tensor, target: Tensor, *, widths: Sequence[int], distance: DistanceKind, normalise: bool
) -> Distilled:
    """Guesses and targets (B, K, n, F) -> their distance, teachers, maps and tokens averaged.

    Args:
        widths: of the teachers, which count the same whatever their width.
        normalise: layer-norm each target without weights first; ``cosine`` compares directions in any case.
    """
    losses, cosines = [], []
    for guess, right in zip(
        torch.split(found.float(), list(widths), dim=-1),
        torch.split(target.float(), list(widths), dim=-1),
        strict=True,
    ):
        cosine = F.cosine_similarity(guess, right, dim=-1)  # (B, K, n)
        if distance == "cosine":
            loss = 2 - 2 * cosine
        else:
            wanted = F.layer_norm(right, right.shape[-1:], eps=TARGET_EPS) if normalise else right
            apart = F.smooth_l1_loss if distance == "smooth_l1" else F.mse_loss
            loss = apart(guess, wanted, reduction="none").mean(dim=-1)
            cosine = F.cosine_similarity(guess, wanted, dim=-1)
        losses.append(loss.mean(dim=-1).mean(dim=-1))
        cosines.append(cosine.detach().mean(dim=-1).mean(dim=-1))
    of_clip = torch.stack(losses).mean(dim=0)
    return Distilled(of_clip.mean(), of_clip, torch.stack(cosines).mean(dim=0))


def _check_encoder(encoder: VideoViT) -> None:
    if encoder.final_norm != "tokens" or encoder.levels:
        raise ModelError(
            "distillation needs an encoder with one LN of every token: final_norm='tokens', no levels"
        )


class TokenAligner(nn.Module):
    """Linear, then LN: an encoder's token to one teacher's width."""

    def __init__(self, width: int, features: int, *, init: Init, eps: float) -> None:
        super().__init__()
        self.linear = InitLinear(width, features, init=init)
        self.norm = nn.LayerNorm(features, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, width of the teacher)."""
        return cast(Tensor, self.norm(self.linear(x)))


class VisibleAlignment(nn.Module):
    """See the module's docstring. ``encoder`` keeps its own parameters and state-dict keys, below "encoder.".

    Args:
        encoder: a :class:`VideoViT` with ``final_norm="tokens"`` and one level.
        widths: of the teachers' features.
        layers: K, how many of the last blocks are aligned (UMT: 6).
        distance, normalise: as :func:`compared`.

    Raises:
        ModelError: another encoder, or more layers than it has blocks.
    """

    def __init__(
        self,
        encoder: VideoViT,
        widths: Sequence[int],
        *,
        layers: int = 1,
        distance: DistanceKind = "cosine",
        normalise: bool = True,
    ) -> None:
        super().__init__()
        _check_encoder(encoder)
        depth = len(encoder.blocks)
        if not 0 < layers <= depth:
            raise ModelError(f"layers={layers} of an encoder of {depth} blocks")
        self.encoder, self.widths = encoder, tuple(widths)
        self.distance, self.normalise = distance, normalise
        self.layers = tuple(range(depth - layers, depth))
        spec = encoder.spec
        self.aligners = nn.ModuleList(
            nn.ModuleList(TokenAligner(spec.width, width, init=spec.init, eps=spec.eps) for width in widths)
            for _ in self.layers
        )

    def forward(self, clips: Tensor, visible: Tensor, targets: Tensor) -> Distilled:
        """
        Args:
            clips: (B, C, T, H, W), normalised as the encoder's input_spec says.
            visible: numbers (B, n) of the tokens the encoder sees, ascending.
            targets: (B, K, n, F), the teachers' features there.
        """
        places = gather_tokens(
            _places(self.encoder.grid(*clips.shape[2:]), self.encoder.feature_dim, clips), visible
        )
        found = [
            torch.cat([align(z + places.to(z.dtype)) for align in cast(nn.ModuleList, aligners)], dim=-1)
            for z, aligners in zip(
                self.encoder.forward_levels(clips, visible, layers=self.layers), self.aligners, strict=True
            )
        ]
        return compared(
            torch.stack(found, dim=1),
            targets,
            widths=self.widths,
            distance=self.distance,
            normalise=self.normalise,
        )

    def checkpoint_blocks(self) -> list[str]:
        """The encoder's blocks."""
        return [f"encoder.{block}" for block in self.encoder.checkpoint_blocks()]


class FeatureDecoder(nn.Module):
    """One teacher's decoder: visible tokens, projected, and mask tokens together through blocks, LN and Linear."""

    def __init__(self, encoder: VideoViT, features: int, *, width: int, depth: int, heads: int) -> None:
        super().__init__()
        spec = BlockSpec(
            width=width,
            heads=heads,
            hidden=width * encoder.spec.hidden // encoder.spec.width,  # the encoder's ratio
            qkv_bias=encoder.spec.qkv_bias,
            init=encoder.spec.init,
        )
        self.down = InitLinear(encoder.feature_dim, width, init=spec.init)
        # one dimension, by which the optimizer knows what not to decay
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02, a=-0.02, b=0.02))
        self.decoder = PixelDecoder(spec, depth, features)

    def forward(self, tokens: Tensor, visible: Tensor, hidden: Tensor, grid: TokenGrid) -> Tensor:
        """Tokens of the encoder (B, n, D) at ``visible`` (B, n) -> features (B, m, width of the teacher) at
        ``hidden``."""
        z = self.down(tokens)
        table = _places(grid, z.shape[-1], z)
        asked = (self.mask_token + gather_tokens(table, hidden)).to(z.dtype)
        x = torch.cat([z + gather_tokens(table, visible).to(z.dtype), asked], dim=1)
        return cast(Tensor, self.decoder(x, hidden.shape[1]))


class HiddenPrediction(nn.Module):
    """See the module's docstring. ``encoder`` keeps its own parameters and state-dict keys, below "encoder.".

    Args:
        encoder, widths, distance, normalise: as :class:`VisibleAlignment`.
        width, depth, heads: of each teacher's decoder. Published: depth 2 for ViT-B, 4 for L, 8 for H.
    """

    def __init__(
        self,
        encoder: VideoViT,
        widths: Sequence[int],
        *,
        width: int,
        depth: int,
        heads: int,
        distance: DistanceKind = "smooth_l1",
        normalise: bool = True,
    ) -> None:
        super().__init__()
        _check_encoder(encoder)
        self.encoder, self.widths = encoder, tuple(widths)
        self.distance, self.normalise = distance, normalise
        self.decoders = nn.ModuleList(
            FeatureDecoder(encoder, features, width=width, depth=depth, heads=heads) for features in widths
        )

    def forward(self, clips: Tensor, visible: Tensor, targets: Tensor) -> Distilled:
        """
        Args:
            clips, visible: as in :class:`VisibleAlignment`.
            targets: (B, 1, m, F), the teachers' features at all other places, ascending.
        """
        grid = self.encoder.grid(*clips.shape[2:])
        hidden = other_tokens(visible, grid.tokens)
        tokens = self.encoder.forward_tokens(clips, visible)
        found = torch.cat([decode(tokens, visible, hidden, grid) for decode in self.decoders], dim=-1)
        return compared(
            found[:, None], targets, widths=self.widths, distance=self.distance, normalise=self.normalise
        )

    def checkpoint_blocks(self) -> list[str]:
        """The encoder's blocks, then the decoders', which hold more tokens each."""
        inner = [f"encoder.{name}" for name in self.encoder.checkpoint_blocks()]
        for i, decode in enumerate(self.decoders):
            depth = len(cast(FeatureDecoder, decode).decoder.blocks)
            inner += [f"decoders.{i}.decoder.blocks.{j}" for j in range(depth)]
        return inner


def _places(grid: TokenGrid, width: int, like: Tensor) -> Tensor:
    """The fixed position vectors of a clip's tokens (N, width), on the device of another tensor."""
    return sincos_table(grid.tokens, width, device=like.device)
