"""Video models: clips (B, C, T, H, W) to features or logits. Needs torch, einops and safetensors, nothing else of ours.

In reading order: ``protocol`` (what a model offers), ``registry`` (names, options, variants), ``state_dicts`` and
``streams`` (weights by name; RGB and flow), ``weight_files`` (safetensors on disk, in parts), ``layers`` and
``inflate`` (shared layers; 2D weights in 3D networks), ``factory`` (``create_model``, export folders, the Hub),
``measure`` (parameters and products), ``correspondence`` (the transfer's head); then the networks by room: ``image``;
``conv3d``, ``timesformer``, ``video_vit``, ``convrnn``; ``hiera``, ``per_frame`` and ``late_temporal``, which are
built on the others.
"""

from cliplift.models.factory import create_model, from_pretrained, save_pretrained
from cliplift.models.protocol import InputSpec, ModelError, UnknownModelError, VideoModel, VideoNetwork
from cliplift.models.registry import list_models, model_options, register_model, variant

__all__ = [
    "InputSpec",
    "ModelError",
    "UnknownModelError",
    "VideoModel",
    "VideoNetwork",
    "create_model",
    "from_pretrained",
    "list_models",
    "model_options",
    "register_model",
    "save_pretrained",
    "variant",
]
