"""What a registered model costs, measured: parameters, multiply-accumulates and sizes, on the meta device.

Nothing is computed and no memory is used for tensors, so the largest model takes the time of its Python code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cliplift.models.factory import create_model
from cliplift.models.protocol import VideoModel
from cliplift.models.registry import model_entry, model_options


@dataclass(frozen=True, kw_only=True)
class ModelMeasure:
    """One row of the model table. ``gmacs``: 1e9 multiply-accumulates of convolutions and matrix products, B = 1."""

    name: str
    paper: str
    dims: str
    num_classes: int
    parameters: int
    gmacs: float
    input_shape: tuple[int, ...]
    feature_shape: tuple[int, ...]
    feature_dim: int


def measure_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_frames: int | None = None,
    crop: int | None = None,
    **options: Any,
) -> ModelMeasure:
    """Build a model on the meta device and count.

    Args:
        name: a registered name.
        num_classes: K; None for the published one.
        in_frames: T; None for the model's own.
        crop: H = W of the input, and of the model where that is an option of it; None for the model's own.
        options: architecture options.

    Raises:
        ModelError: as :func:`create_model`.
    """
    options |= {"crop": crop} if crop is not None and "crop" in model_options(name) else {}
    with torch.device("meta"):
        model = create_model(name, num_classes=num_classes, in_frames=in_frames, **options).eval()
        model.requires_grad_(False)  # the counter wants the gradient function of whatever asks for one
        shape = input_shape(model, dims=model_entry(name).dims, crop=crop)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(shape))
        with torch.no_grad():
            features = model.forward_features(torch.empty(shape))
    return ModelMeasure(
        name=name,
        paper=model_entry(name).paper,
        dims=model_entry(name).dims,
        num_classes=model.num_classes,
        parameters=sum(p.numel() for p in model.parameters()),
        gmacs=counter.get_total_flops() / 2e9,
        input_shape=shape[1:],
        # multi-pathway models give one map per pathway, of which the first is shown
        feature_shape=tuple((features if isinstance(features, Tensor) else features[0]).shape[1:]),
        feature_dim=model.feature_dim,
    )


def input_shape(model: VideoModel, *, dims: str, crop: int | None = None, batch: int = 1) -> tuple[int, ...]:
    """The input a model is specified for: (B, C, T, H, W), or (B, C, H, W) for image models."""
    spec = model.input_spec
    time = () if dims == "2d" else (spec.frames,)
    return (batch, spec.channels, *time, crop or spec.crop_height, crop or spec.crop_width)
