"""TimeSformer weights for Hugging Face transformers: ``TimesformerForVideoClassification``."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from cliplift.models.protocol import ModelError
from cliplift.models.state_dicts import rename_key
from cliplift.models.timesformer.model import TimeSformer
from cliplift.models.timesformer.weights import HF_BLOCK, HF_TOP
from cliplift.models.weight_files import write_huggingface_folder


def to_huggingface(net: TimeSformer) -> tuple[dict[str, Tensor], dict[str, object]]:
    """What ``transformers.TimesformerForVideoClassification`` loads: its state dict and the fields of its config.

    Raises:
        ModelError: a scheme that transformers lacks or computes wrongly ("space"), or no classifier.
    """
    if net.attention not in ("divided", "joint") or net.cls_rule != "released":
        raise ModelError(
            f"attention={net.attention!r}, cls={net.cls_rule!r}: transformers computes 'divided' with the released "
            f"CLS rule and 'joint' only"
        )
    rows, columns = net.grid[1:]
    if not net.num_classes or rows != columns:
        raise ModelError("transformers needs a classifier and a square crop")
    state = {_to_hf(key): value.detach().clone() for key, value in net.state_dict().items()}
    config = {
        "model_type": "timesformer",
        "architectures": ["TimesformerForVideoClassification"],
        "image_size": rows * net.patch,
        "patch_size": net.patch,
        "num_channels": net.input_spec.channels,
        "num_frames": net.grid[0],
        "hidden_size": net.feature_dim,
        "num_hidden_layers": len(net.blocks),
        "num_attention_heads": net.heads,
        "intermediate_size": 4 * net.feature_dim,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "attention_type": "divided_space_time" if net.attention == "divided" else "joint_space_time",
        "id2label": {str(i): f"LABEL_{i}" for i in range(net.num_classes)},
        "label2id": {f"LABEL_{i}": i for i in range(net.num_classes)},
    }
    return state, config


def save_huggingface(net: TimeSformer, folder: str | Path) -> Path:
    """Write a folder for ``TimesformerForVideoClassification.from_pretrained``: weights, config, and the preprocessing
    this model was trained with (transformers' own default normalises otherwise).

    Raises:
        ModelError: as :func:`to_huggingface`.
    """
    state, config = to_huggingface(net)
    spec = net.input_spec
    processor = {
        "image_processor_type": "VideoMAEImageProcessor",
        "size": {"shortest_edge": spec.crop_height},
        "crop_size": {"height": spec.crop_height, "width": spec.crop_width},
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        **{f"do_{step}": True for step in ("resize", "center_crop", "rescale", "normalize")},
    }
    return write_huggingface_folder(folder, state, config=config, processor=processor)


def _to_hf(key: str) -> str:
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    if match is None:
        return rename_key(key, {ours: theirs for theirs, ours in HF_TOP.items()})
    inner = rename_key(match[2], {ours: theirs for theirs, ours in HF_BLOCK.items()})
    return f"timesformer.encoder.layer.{match[1]}.{inner}"
