"""Video models: clips (B, C, T, H, W) to features or logits. Needs torch and einops, nothing else of ours."""

from cliplift.models.factory import from_pretrained, save_pretrained
from cliplift.models.registry import (
    InputSpec,
    ModelError,
    UnknownModelError,
    VideoModel,
    create_model,
    list_models,
    model_options,
    register_model,
)

__all__ = [
    "InputSpec",
    "ModelError",
    "UnknownModelError",
    "VideoModel",
    "create_model",
    "from_pretrained",
    "list_models",
    "model_options",
    "register_model",
    "save_pretrained",
]
