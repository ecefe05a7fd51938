"""Our weights in Hugging Face's format, for ``transformers`` to load: VideoMAE and VJEPA2.

The inverse of what :mod:`cliplift.models.video_vit.weights` reads; the same tables serve both.

Two LayerNorms cannot be told their eps through a config: ``transformers`` computes VideoMAE's ``fc_norm`` and
``decoder.norm`` with 1e-5, and V-JEPA 2's probe with the encoder's 1e-6; the released code has 1e-6 and 1e-5. Outputs
differ by about 1e-5 of their size.

Shape letters: D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cliplift.models.protocol import InputSpec, ModelError
from cliplift.models.video_vit.blocks import BlockSpec
from cliplift.models.video_vit.decoder import MaskedAutoencoder
from cliplift.models.video_vit.latent import LatentPredictor
from cliplift.models.video_vit.model import VideoViT
from cliplift.models.video_vit.weights import (
    HF_PREDICTOR_TOP,
    HF_PROBE,
    HF_PROBE_BLOCK,
    HF_VIDEOMAE_BLOCK,
    HF_VIDEOMAE_TOP,
    HF_VJEPA_BLOCK,
    HF_VJEPA_TOP,
    Renames,
    State,
    swapped,
)
from cliplift.models.weight_files import write_huggingface_folder

Config = dict[str, Any]
Exported = tuple[State, Config]
NAMES = {"q": "query", "k": "key", "v": "value"}
PROBE_NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}


def videomae_to_huggingface(model: VideoViT | MaskedAutoencoder) -> Exported:
    """What ``VideoMAEForVideoClassification`` (of a classifier) or ``VideoMAEForPreTraining`` loads.

    Returns:
        Its state dict, and the fields of its config.

    Raises:
        ModelError: a net that ``transformers`` has no VideoMAE for.
    """
    if isinstance(model, MaskedAutoencoder):
        return _pretraining(model)
    if model.final_norm != "pooled" or not model.num_classes:
        raise ModelError("transformers' VideoMAE classifier needs final_norm='pooled' and a classifier")
    state = {_videomae_key(key): value for key, value in _apart(model.state_dict()).items()}
    config = _videomae_config(model) | {
        "architectures": ["VideoMAEForVideoClassification"],
        "use_mean_pooling": True,
        **_labels(model.num_classes),
    }
    return state, config


def vjepa2_to_huggingface(model: VideoViT, predictor: LatentPredictor | None = None) -> Exported:
    """What ``VJEPA2Model``, or ``VJEPA2ForVideoClassification`` of a model with an attentive head, loads.

    Args:
        model: an encoder of V-JEPA 2.
        predictor: its predictor; without, ``transformers`` makes a random one, which features do not need.

    Returns:
        Its state dict, and the fields of its config.

    Raises:
        ModelError: a net that ``transformers`` has no VJEPA2 for (2.1, interleaved pairs, another head).
    """
    _check_vjepa2(model, predictor)
    whole = {_vjepa_key(key): value for key, value in _apart(model.state_dict()).items()}
    if predictor is not None:
        for key, value in _apart(predictor.state_dict()).items():
            whole[_predictor_key(key)] = value[:, None, None] if key == "mask_tokens" else value
    config = _vjepa_config(model, predictor)
    if not model.num_classes:
        return whole, config | {"architectures": ["VJEPA2Model"]}
    heads = ("pooler.", "classifier.")
    state = {key if key.startswith(heads) else f"vjepa2.{key}": value for key, value in whole.items()}
    return state, config | {"architectures": ["VJEPA2ForVideoClassification"], **_labels(model.num_classes)}


def save_huggingface(
    model: VideoViT | MaskedAutoencoder, folder: str | Path, *, predictor: LatentPredictor | None = None
) -> Path:
    """Write a folder for ``from_pretrained``: weights, config, and the preprocessing this model was trained with.

    Args:
        model: rotary encoders become VJEPA2, others VideoMAE.
        folder: made if it is not there.
        predictor: of V-JEPA 2.

    Raises:
        ModelError: as the two functions above.
    """
    encoder = model.encoder if isinstance(model, MaskedAutoencoder) else model
    if isinstance(model, VideoViT) and model.positions == "rope":
        state, config = vjepa2_to_huggingface(model, predictor)
    elif predictor is None:
        state, config = videomae_to_huggingface(model)
    else:
        raise ModelError("a predictor belongs to an encoder with rotary positions")
    processor = _processor(encoder.input_spec, config["model_type"])
    return write_huggingface_folder(folder, state, config=config, processor=processor)


def _pretraining(model: MaskedAutoencoder) -> Exported:
    if model.encoder.num_classes or model.encoder.positions != "sincos":
        raise ModelError(
            "transformers' VideoMAE has sine/cosine positions, and no classifier while it is pretrained"
        )
    state: State = {}
    for key, value in _apart(model.state_dict()).items():
        if key.startswith("encoder."):
            state[_videomae_key(key.removeprefix("encoder."))] = value
        elif key == "mask_token":
            state[key] = value[None, None]
        else:
            state[_block_key(key, "decoder.blocks.", "decoder.decoder_layers.", HF_VIDEOMAE_BLOCK)] = value
    spec = model.decoder.spec
    return state, _videomae_config(model.encoder) | {
        "architectures": ["VideoMAEForPreTraining"],
        "use_mean_pooling": False,
        "norm_pix_loss": model.normalise,
        "decoder_hidden_size": spec.width,
        "decoder_intermediate_size": spec.hidden,
        "decoder_num_attention_heads": spec.heads,
        "decoder_num_hidden_layers": len(model.decoder.blocks),
    }


def _apart(state: Mapping[str, Tensor]) -> State:
    """Queries, keys and values as tensors of their own, named as Hugging Face names them in encoders and in probes;
    the two lone biases stand in the attention, as in the files on the Hub."""
    result: State = {}
    for key, value in state.items():
        match = re.fullmatch(r"(.*\bx?attn\.)(qkv|kv|q)\.(weight|bias|q_bias|v_bias)", key)
        if match is None:
            result[key] = value
            continue
        stem, letters, kind = match.groups()
        if kind in ("q_bias", "v_bias"):
            result[f"{stem}{kind}"] = value
            continue
        names = PROBE_NAMES if "pooler." in stem else NAMES
        for letter, part in zip(letters, value.chunk(len(letters)), strict=True):
            result[f"{stem}{names[letter]}.{kind}"] = part
    return result


def _inverse(table: Renames) -> Renames:
    """From our names to theirs; longer starts first, since the first that matches counts."""
    return sorted(((ours, theirs) for theirs, ours in table), key=lambda pair: -len(pair[0]))


def _block_key(key: str, ours: str, theirs: str, table: Renames) -> str:
    index, dot, inner = key.removeprefix(ours).partition(".")
    if not key.startswith(ours) or not dot:
        return key
    return f"{theirs}{index}.{swapped(inner, _inverse(table))}"


def _videomae_key(key: str) -> str:
    theirs = _block_key(key, "blocks.", "encoder.layer.", HF_VIDEOMAE_BLOCK)
    theirs = swapped(theirs, _inverse(HF_VIDEOMAE_TOP))
    return theirs if theirs.startswith(("fc_norm.", "classifier.")) else f"videomae.{theirs}"


def _vjepa_key(key: str) -> str:
    if key.startswith("head."):
        bare = key.removeprefix("head.")
        inner = _block_key(bare, "pooler.blocks.", "pooler.blocks.", HF_PROBE_BLOCK)
        return swapped(inner, _inverse(HF_PROBE))
    return swapped(_block_key(key, "blocks.", "encoder.layer.", HF_VJEPA_BLOCK), _inverse(HF_VJEPA_TOP))


def _predictor_key(key: str) -> str:
    inner = _block_key(key, "blocks.", "predictor.layer.", HF_VJEPA_BLOCK)
    return inner if inner.startswith("predictor.layer.") else swapped(inner, _inverse(HF_PREDICTOR_TOP))


def _check_vjepa2(model: VideoViT, predictor: LatentPredictor | None) -> None:
    plain = not model.levels and model.image_embed is None and not model.interpolate_rope
    if model.positions != "rope" or model.layout != "concatenated" or not plain:
        raise ModelError(
            "transformers has V-JEPA 2 (rotary, layout='concatenated'); it has no 2.1 and no other layout"
        )
    if model.spec.qkv_bias != "full" or model.final_norm != "tokens":
        raise ModelError("transformers' V-JEPA 2 has full biases and final_norm='tokens'")
    if model.num_classes and (model.head_kind != "attentive" or model.probe_heads != model.spec.heads):
        raise ModelError(
            f"transformers' V-JEPA 2 classifier is an attentive probe with the encoder's {model.spec.heads} heads; "
            f"this model has head={model.head_kind!r} with probe_heads={model.probe_heads}"
        )
    if predictor is not None and (predictor.embed.hidden or predictor.proj_context or predictor.native):
        raise ModelError("transformers has V-JEPA 2's predictor; it has no 2.1's")


def _square(model: VideoViT) -> int:
    _, rows, columns = model.native_grid
    if rows != columns:
        raise ModelError("transformers needs a square crop")
    return rows * model.patch


def _videomae_config(model: VideoViT) -> Config:
    if model.positions != "sincos" or model.spec.qkv_bias != "query_value":
        raise ModelError("transformers' VideoMAE has sine/cosine positions and no bias of the keys")
    spec = model.spec
    return {
        "model_type": "videomae",
        "image_size": _square(model),
        "patch_size": model.patch,
        "num_channels": model.input_spec.channels,
        "num_frames": model.input_spec.frames,
        "tubelet_size": model.tubelet,
        "hidden_size": spec.width,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.hidden,
        "hidden_act": "gelu",
        "layer_norm_eps": spec.eps,
        "qkv_bias": True,
    }


def _vjepa_config(model: VideoViT, predictor: LatentPredictor | None) -> Config:
    spec = model.spec
    config: Config = {
        "model_type": "vjepa2",
        "crop_size": _square(model),
        "patch_size": model.patch,
        "in_chans": model.input_spec.channels,
        "frames_per_clip": model.input_spec.frames,
        "tubelet_size": model.tubelet,
        "hidden_size": spec.width,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": spec.heads,
        "mlp_ratio": _ratio(spec),
        "hidden_act": "gelu",
        "layer_norm_eps": spec.eps,
        "num_pooler_layers": 3,
    }
    if predictor is not None:
        config |= {
            "pred_hidden_size": predictor.spec.width,
            "pred_num_attention_heads": predictor.spec.heads,
            "pred_num_hidden_layers": len(predictor.blocks),
            "pred_num_mask_tokens": len(predictor.mask_tokens),
            "pred_mlp_ratio": _ratio(predictor.spec),
        }
    return config


def _ratio(spec: BlockSpec) -> float:
    """A number r with int(width * r) == hidden, which is how ``transformers`` computes it."""
    exact = spec.hidden / spec.width
    return exact if int(spec.width * exact) == spec.hidden else (spec.hidden + 0.5) / spec.width


def _labels(classes: int) -> Config:
    return {
        "id2label": {str(i): f"LABEL_{i}" for i in range(classes)},
        "label2id": {f"LABEL_{i}": i for i in range(classes)},
    }


def _processor(spec: InputSpec, model_type: str) -> Config:
    """Without it, ``transformers`` would scale and normalise by its own rule."""
    family = {"videomae": "image_processor_type", "vjepa2": "video_processor_type"}[model_type]
    name = {"videomae": "VideoMAEImageProcessor", "vjepa2": "VJEPA2VideoProcessor"}[model_type]
    return {
        family: name,
        "size": {"shortest_edge": spec.crop_height},
        "crop_size": {"height": spec.crop_height, "width": spec.crop_width},
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        **{f"do_{step}": True for step in ("resize", "center_crop", "rescale", "normalize")},
    }
