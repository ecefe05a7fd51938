"""Hiera's public weights (key ``model_state``) under our names, and the resizing of its learned places.

Classifiers: our names but for ``head.projection`` and ``pos_embed_{spatial,temporal}``. Masked autoencoders: encoder
and decoder side by side, where ours have the encoder below ``encoder.``; the convolutions of stages 1 and 2 are
``multi_scale_fusion_heads.{0,1}``.

Shape letters: T H W frames, rows and columns of tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]
DECODER = ("decoder_", "mask_token", "encoder_norm.", "multi_scale_fusion_heads.", "fusion.")


def adapt_hiera(
    state: Mapping[str, Tensor], *, own: Mapping[str, Tensor], grid: tuple[int, int, int]
) -> tuple[State, list[str]]:
    """An encoder's tensors, with or without a classifier, from a file of either kind.

    Args:
        state: under the released names, or ours.
        own: the model's state dict, for its names.
        grid: T, H, W of the model's tables in tokens.

    Returns:
        The tensors, and a note for every change.
    """
    notes: list[str] = []
    left = [key for key in state if key.startswith(DECODER)]
    if left:
        notes.append(f"left out {len(left)} tensors of pretraining alone ({', '.join(left[:3])}, ...)")
    given = {_name(key.removeprefix("encoder.")): value for key, value in state.items() if key not in left}
    pretrained = left or not any(key.startswith("head.") for key in given)
    if "norm.weight" in own and "norm.weight" not in given and pretrained:
        bias = 0.02  # where the released code starts it
        given |= {
            "norm.weight": torch.ones_like(own["norm.weight"]),
            "norm.bias": torch.full_like(own["norm.bias"], bias),
        }
        notes.append("norm, which pretraining does not have, starts fresh")
    if "norm.weight" not in own and "norm.weight" in given:
        given = {key: value for key, value in given.items() if not key.startswith("norm.")}
        notes.append("left out norm, which is the classifier's")
    return _resized(given, grid, notes), notes


def adapt_hiera_autoencoder(state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
    """A whole masked autoencoder under the names of
    :class:`~cliplift.models.hiera.decoder.HieraMaskedAutoencoder`."""
    if any(key.startswith("encoder.") for key in state):
        return dict(state), []
    given: State = {}
    for key, value in state.items():
        if key.startswith("multi_scale_fusion_heads."):
            index, _, rest = key.removeprefix("multi_scale_fusion_heads.").partition(".")
            given[f"fusion.{index}.conv.{rest}"] = value
        else:
            given[key if key.startswith(DECODER) else f"encoder.{_name(key)}"] = value
    return given, ["took the released names"]


def _name(key: str) -> str:
    return key.replace("head.projection.", "head.").replace("pos_embed_", "places.")


def _resized(given: State, grid: tuple[int, int, int], notes: list[str]) -> State:
    """Tables of another square crop or clip length, bicubic over rows and columns, linear over time."""
    space, time = given.get("places.spatial"), given.get("places.temporal")
    side = round(space.shape[1] ** 0.5) if space is not None else 0
    if space is not None and space.shape[1] != grid[1] * grid[2] and side * side == space.shape[1]:
        plane = torch.unflatten(space.transpose(1, 2), 2, (side, side))
        moved = F.interpolate(plane, size=grid[1:], mode="bicubic", align_corners=False)
        given["places.spatial"] = moved.flatten(2).transpose(1, 2)
        notes.append(f"resized the spatial table from {side}x{side} to {grid[1]}x{grid[2]} tokens (bicubic)")
    if time is not None and time.shape[1] != grid[0]:
        moved = F.interpolate(time.transpose(1, 2), size=grid[0], mode="linear", align_corners=False)
        given["places.temporal"] = moved.transpose(1, 2)
        notes.append(
            f"resized the temporal table from {time.shape[1]} to {grid[0]} frames of tokens (linear)"
        )
    return given
