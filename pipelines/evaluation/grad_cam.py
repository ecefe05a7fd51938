"""Where in a clip the evidence for a class lies: Grad-CAM (arXiv 1610.02391) on the 3D feature map.

For class c and feature map A (channels k over T', H', W'), equations 1 and 2 of the paper with time as a third axis:

    weight_k = mean over T', H', W' of d(logit_c) / d(A_k)
    map      = ReLU(sum over k of weight_k A_k)

The map is brought to the clip's size and scaled by its own maximum. It answers "where did the network look", not
"how sure is it": read it beside the probability.

B clips, C channels, T frames, H W pixels, K classes; T' H' W' is the grid of the feature map.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliplift.configs.sharding import TranscodeConfig
from cliplift.models.layers import evaluating
from cliplift.models.protocol import GivesFeatures
from cliplift.models.streams import LUMA
from cliplift.sharding.storage import whole_file
from cliplift.sharding.video.transcode import encode_array

Frames = npt.NDArray[np.uint8]  # (T, H, W, 3)
Heat = npt.NDArray[np.float32]  # (T, H, W) in [0, 1]

# Heat from nothing to most: dark violet, magenta, orange, pale yellow; lightness rises all the way.
_HEAT_COLOURS = np.array(
    [[22, 11, 57], [87, 15, 109], [165, 44, 96], [226, 86, 52], [251, 155, 6], [252, 255, 164]],
    dtype=np.float64,
)


class ExplainError(ValueError):
    """The model or the input cannot be explained this way; the message says why."""


@dataclass(frozen=True)
class Explanation:
    """Heat maps of a batch of clips, for one class each."""

    heat: Tensor  # float32 (B, T, H, W) in [0, 1]; all zero where nothing speaks for the class
    coarse: Tensor  # float32 (B, T', H', W'), unscaled, before interpolation
    classes: Tensor  # int64 (B,) the class each map explains
    probabilities: Tensor  # float32 (B,) of that class


def grad_cam(
    model: nn.Module, clips: Tensor, *, classes: Tensor | None = None, layer: str | None = None
) -> Explanation:
    """Grad-CAM at the output of ``model.forward_features``, or of a submodule.

    Args:
        model: a classifier whose ``forward`` calls its ``forward_features``; it is put into eval mode for the call
            and left as it was. Works with frozen parameters and inside ``torch.no_grad()``.
        clips: (B, C, T, H, W), normalised as for training.
        classes: (B,) the class to explain for each clip; None takes the one the model predicts.
        layer: name of a submodule with an output (B, C, T', H', W'), called once; an earlier one has finer cells and
            less meaning. None is the last feature map, as in the paper.

    Raises:
        ExplainError: the model has no (B, C, T', H', W') feature map on the way to its logits (token models have
            none), or a class or the layer does not exist.
    """
    if clips.ndim != 5:
        raise ExplainError(f"clips must have the shape (B, C, T, H, W), got {tuple(clips.shape)}")
    watching = _watched_features(model) if layer is None else _watched_layer(model, layer)
    with evaluating(model), watching as seen, torch.enable_grad():
        logits = model(clips).float()
        features = _feature_map(seen, layer or type(model).__name__, clips)
        chosen = logits.argmax(dim=1) if classes is None else _check_classes(classes, logits)
        # Clips of a batch do not meet in eval mode: the gradient of the sum is each clip's own gradient.
        own = logits.gather(1, chosen[:, None]).sum()
        (gradient,) = torch.autograd.grad(own, features, allow_unused=True)
    if gradient is None:
        raise ExplainError(f"the logits of {type(model).__name__} do not depend on {layer or 'its features'}")
    weights = gradient.float().mean(dim=(2, 3, 4), keepdim=True)  # (B, C, 1, 1, 1)
    coarse = (weights * features.detach().float()).sum(dim=1).relu()  # (B, T', H', W')
    size = (int(clips.shape[2]), int(clips.shape[3]), int(clips.shape[4]))
    heat = F.interpolate(coarse[:, None], size=size, mode="trilinear", align_corners=False)[:, 0]
    peak = heat.amax(dim=(1, 2, 3), keepdim=True)
    probabilities = logits.detach().softmax(dim=1).gather(1, chosen[:, None])[:, 0]
    return Explanation(
        heat=torch.where(
            peak > 0, heat / peak.clamp_min(torch.finfo(heat.dtype).tiny), torch.zeros_like(heat)
        ),
        coarse=coarse,
        classes=chosen,
        probabilities=probabilities,
    )


def share_inside(heat: Tensor, boxes: Tensor) -> Tensor:
    """Share of each map's mass inside a box per frame: how well a map points at a known object.

    Args:
        heat: (B, T, H, W), not negative.
        boxes: int64 (B, T, 4): top, left, bottom, right in pixels, the last two exclusive.

    Returns:
        (B,) shares; NaN for a map without mass. A map spread evenly scores the boxes' share of the pixels.
    """
    B, T, H, W = heat.shape
    if boxes.shape != (B, T, 4):
        raise ExplainError(f"boxes must have the shape {(B, T, 4)}, got {tuple(boxes.shape)}")
    top, left, bottom, right = (edge[..., None, None] for edge in boxes.unbind(dim=-1))
    rows = torch.arange(H, device=heat.device)[:, None]
    columns = torch.arange(W, device=heat.device)[None, :]
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)  # (B, T, H, W)
    return (heat * inside).sum(dim=(1, 2, 3)) / heat.sum(dim=(1, 2, 3))


def overlay(frames: Frames, heat: Heat, *, strength: float = 0.65) -> Frames:
    """Frames with the map over them: cold places darkened to gray, hot ones in the colours of the map.

    Args:
        frames: (T, H, W, 3) RGB.
        heat: (T, H, W) in [0, 1], of the same size.
        strength: opacity where the map is 1.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or heat.shape != frames.shape[:3]:
        raise ExplainError(f"frames {frames.shape} and heat {heat.shape} do not belong together")
    luma = frames @ np.array(LUMA)  # (T, H, W)
    ground = 0.6 * luma[..., None].repeat(3, axis=-1)
    position = np.clip(heat, 0, 1).astype(np.float64) * (len(_HEAT_COLOURS) - 1)
    colours = np.stack(
        [np.interp(position, np.arange(len(_HEAT_COLOURS)), _HEAT_COLOURS[:, c]) for c in range(3)], axis=-1
    )
    opacity = strength * np.clip(heat, 0, 1)[..., None]
    blended: Frames = np.rint(ground * (1 - opacity) + colours * opacity).astype(np.uint8)
    return blended


def overlay_video(frames: Frames, heat: Heat, *, fps: float) -> bytes:
    """An mp4 with the clip on the left and its overlay on the right.

    Args:
        frames: (T, H, W, 3) RGB, H and W even.
        heat: (T, H, W) in [0, 1].
        fps: frames per second of the clip as sampled.
    """
    side_by_side = np.concatenate([frames, overlay(frames, heat)], axis=2)
    return encode_array(
        np.ascontiguousarray(side_by_side),
        fps=Fraction(fps).limit_denominator(1001),
        config=TranscodeConfig.model_validate({}),
    )


def write_overlay(path: Path, frames: Frames, heat: Heat, *, fps: float) -> None:
    """Write the mp4 of :func:`overlay_video`; the file is replaced at once."""
    data = overlay_video(frames, heat, fps=fps)
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def _cut_off(features: Tensor, seen: list[Tensor]) -> Tensor:
    """Note the features as a leaf of the graph; returns what the network goes on with."""
    leaf = features.detach().requires_grad_(True)
    seen.append(leaf)
    return leaf.clone()  # what follows may work in place, which a leaf does not allow


@contextmanager
def _watched_features(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what ``forward_features`` returns, cut off from what came before so that no backbone graph is kept."""
    if not isinstance(model, GivesFeatures):
        raise ExplainError(f"{type(model).__name__} has no forward_features")
    original = model.forward_features
    was_own = "forward_features" in vars(model)
    seen: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        with torch.no_grad():
            features = original(x)
        if not isinstance(features, Tensor):
            raise ExplainError(f"{type(model).__name__} has several feature maps; Grad-CAM needs one")
        return _cut_off(features, seen)

    object.__setattr__(model, "forward_features", watched)
    try:
        yield seen
    finally:
        if was_own:
            object.__setattr__(model, "forward_features", original)
        else:
            object.__delattr__(model, "forward_features")


@contextmanager
def _watched_layer(model: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """Collect what a submodule returns, cut off from what came before it."""
    modules = dict(model.named_modules())
    if not name or name not in modules:
        near = difflib.get_close_matches(name, modules, n=3, cutoff=0.3)
        raise ExplainError(
            f"{type(model).__name__} has no layer {name!r}; near it: {', '.join(near) or 'none'}"
        )
    seen: list[Tensor] = []

    def watched(_: nn.Module, __: object, output: object) -> Tensor:
        if not isinstance(output, Tensor):
            raise ExplainError(f"{name} does not return one tensor")
        return _cut_off(output, seen)

    handle = modules[name].register_forward_hook(watched)
    try:
        yield seen
    finally:
        handle.remove()


def _feature_map(seen: list[Tensor], name: str, clips: Tensor) -> Tensor:
    if len(seen) != 1:
        raise ExplainError(f"{name} computed its features {len(seen)} times; Grad-CAM needs exactly one")
    features = seen[0]
    # More cells than the clip has frames: another order of axes, such as (B, T, C, H, W) between a network's blocks.
    shaped = features.ndim == 5 and len(features) == len(clips) and features.shape[2] <= clips.shape[2]
    if not shaped:
        raise ExplainError(f"{name} has features {tuple(features.shape)}; Grad-CAM needs (B, C, T', H', W')")
    return features


def _check_classes(classes: Tensor, logits: Tensor) -> Tensor:
    B, K = logits.shape
    if classes.shape != (B,) or classes.dtype != torch.int64:
        raise ExplainError(
            f"classes must be int64 of shape ({B},), got {classes.dtype} {tuple(classes.shape)}"
        )
    if bool(((classes < 0) | (classes >= K)).any()):
        raise ExplainError(f"classes {classes.tolist()} must lie between 0 and {K - 1}")
    return classes.to(logits.device)
