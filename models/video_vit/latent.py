"""Latent prediction: V-JEPA 2's loss, and the dense one of V-JEPA 2.1.

Papers: V-JEPA, arXiv 2404.08471; V-JEPA 2, 2506.09985. Public code: facebookresearch/vjepa2, app/vjepa and
app/vjepa_2_1.

A teacher, a copy of the encoder that follows it by a moving average, sees the whole clip; its features, layer-normed
without weights, are the target. For each mask of a clip the encoder sees the context tokens alone, and the predictor
gives the features of the hidden ones. Loss: mean absolute difference, averaged over the masks.

Dense (2.1): four levels of the encoder are given to the predictor and predicted, each layer-normed. The features of the
context are predicted too; the difference there is weighted by 1 / sqrt(distance to the nearest hidden token).

Shape letters: B clips, C channels, T H W frames and pixels, N tokens of a clip, n of its context, m hidden, D width of
the encoder, F width of what is predicted: D, or four times D.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.protocol import ModelError
from cliplift.models.video_vit.blocks import gather_tokens
from cliplift.models.video_vit.model import VideoViT
from cliplift.models.video_vit.positions import TokenGrid
from cliplift.models.video_vit.predictor import LatentPredictor

TARGET_EPS = 1e-5  # of the layer norm of the targets


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
