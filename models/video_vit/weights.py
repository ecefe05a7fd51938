"""Weights of other projects under our names: VideoMAE v1 and v2, V-JEPA 2 and 2.1, Hugging Face's of both.

Read here:

* VideoMAE's and VideoMAE v2's ``.pth`` (key ``model`` or ``module``), pretrained (``encoder.``, ``decoder.``) and
  finetuned (no prefix, ``fc_norm``, ``head``);
* V-JEPA 2's and 2.1's ``.pt`` (keys ``encoder``, ``predictor``, ``target_encoder`` or ``ema_encoder``, each with the
  prefix ``module.backbone.``), and their attentive probes;
* Hugging Face's VideoMAE and VJEPA2, whose queries, keys and values are apart. :mod:`.huggingface` writes these.

A key that none of the layouts knows stays as it is, and loading then refuses it by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cliplift.models.protocol import ModelError

State = dict[str, Tensor]
Renames = Sequence[tuple[str, str]]  # (start of their name, start of ours)

# Hugging Face, inside a block of VideoMAE (encoder and decoder alike) and of VJEPA2 (encoder and predictor alike)
HF_VIDEOMAE_BLOCK: Renames = (
    ("attention.attention.", "attn."),
    ("attention.output.dense.", "attn.proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
)
HF_VJEPA_BLOCK: Renames = (("attention.", "attn."),)
HF_VIDEOMAE_TOP: Renames = (
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("layernorm.", "norm."),
    ("classifier.", "head."),
)
HF_VJEPA_TOP: Renames = (
    ("encoder.embeddings.patch_embeddings.proj.", "patch_embed.proj."),
    ("encoder.layernorm.", "norm."),
)
HF_PREDICTOR_TOP: Renames = (
    ("predictor.embeddings.predictor_embeddings.", "embed.out."),
    ("predictor.embeddings.mask_tokens", "mask_tokens"),
    ("predictor.layernorm.", "norm."),
    ("predictor.proj.", "proj."),
)
HF_PROBE: Renames = (
    ("pooler.cross_attention_layer.layer_norm1.", "pooler.cross_attention_block.norm1."),
    ("pooler.cross_attention_layer.layer_norm2.", "pooler.cross_attention_block.norm2."),
    ("pooler.cross_attention_layer.cross_attn.", "pooler.cross_attention_block.xattn."),
    ("pooler.cross_attention_layer.mlp.", "pooler.cross_attention_block.mlp."),
    ("pooler.self_attention_layers.", "pooler.blocks."),
    ("classifier.", "linear."),
)
HF_PROBE_BLOCK: Renames = (
    ("layer_norm1.", "norm1."),
    ("layer_norm2.", "norm2."),
    ("self_attn.out_proj.", "attn.proj."),
    ("self_attn.", "attn."),
)
# the released code of V-JEPA 2.1
VJEPA21_TOP: Renames = (
    ("patch_embed_img.proj.", "image_embed.proj."),
    ("img_mod_embed", "image_embed.modality"),
    ("video_mod_embed", "patch_embed.modality"),
    ("norms_block.", "level_norms."),
)
PREDICTOR_TOP: Renames = (
    ("predictor_embed.0.", "embed.hidden."),
    ("predictor_embed.2.", "embed.out."),
    ("predictor_embed.", "embed.out."),
    ("predictor_blocks.", "blocks."),
    ("predictor_norm.", "norm."),
    ("predictor_proj.", "proj."),
    ("predictor_proj_context.", "proj_context."),
    ("img_mod_embed", "image_modality"),
    ("video_mod_embed", "video_modality"),
)
# parts of a pretraining file that an encoder has no use for
NOT_ENCODER = ("decoder.", "encoder_to_decoder.", "mask_token", "predictor.")
FIXED_POSITIONS = ("pos_embed", "predictor_pos_embed")


def adapt_video_vit(state: Mapping[str, Tensor], *, own: Mapping[str, Tensor]) -> tuple[State, list[str]]:
    """An encoder's tensors, with or without a classifier, under the names of
    :class:`~cliplift.models.video_vit.model.VideoViT`.

    Args:
        state: any of the sources above, or ours.
        own: the model's state dict, for its names.

    Returns:
        The tensors, and a note for every change.
    """
    notes: list[str] = []
    given = _without_wrapping(state, notes)
    if _is_huggingface(given):
        given = _from_huggingface(given, notes)
    elif any(key.startswith("encoder.patch_embed.") for key in given):  # a file of masked pretraining
        given = _left_out(given, NOT_ENCODER, "of pretraining alone", notes)
        given = {key.removeprefix("encoder."): value for key, value in given.items()}
    given = _left_out(given, FIXED_POSITIONS, "positions are computed", notes)
    given = {_bias_name(swapped(key, VJEPA21_TOP)): value for key, value in given.items()}
    if any(key.startswith("pooler.") for key in given):
        given = {
            f"head.{key}" if key.startswith(("pooler.", "linear.")) else key: value
            for key, value in given.items()
        }
    return _with_pooled_norm(given, own, notes), notes


def adapt_masked_autoencoder(state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
    """A whole pretraining net under the names of :class:`~cliplift.models.video_vit.decoder.MaskedAutoencoder`."""
    notes: list[str] = []
    given = {key.removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith("videomae.") for key in given):
        notes.append("took Hugging Face's names")
        renamed: State = {}
        for key, value in given.items():
            if key.startswith("videomae."):
                renamed[f"encoder.{_hf_videomae_key(key.removeprefix('videomae.'))}"] = value
            else:
                renamed[_hf_block(key, "decoder.decoder_layers.", "decoder.blocks.", HF_VIDEOMAE_BLOCK)] = (
                    value
                )
        given = joined(renamed)
    if "mask_token" in given:
        given["mask_token"] = given["mask_token"].flatten()
    return {_bias_name(key): value for key, value in given.items()}, notes


def adapt_predictor(state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
    """A predictor under the names of :class:`~cliplift.models.video_vit.latent.LatentPredictor`."""
    notes: list[str] = []
    given = _without_wrapping(state, notes)
    if any(key.startswith("predictor.layer.") for key in given):
        notes.append("took Hugging Face's names")
        given = _left_out(given, ("encoder.",), "the encoder", notes)
        given = joined(
            {
                swapped(
                    _hf_block(key, "predictor.layer.", "blocks.", HF_VJEPA_BLOCK), HF_PREDICTOR_TOP
                ): value
                for key, value in given.items()
            }
        )
    given = _left_out(given, FIXED_POSITIONS, "positions are computed", notes)
    given = {swapped(key, PREDICTOR_TOP): value for key, value in given.items()}
    numbered = sorted((key for key in given if re.fullmatch(r"mask_tokens\.\d+", key)), key=_number)
    if numbered:
        given["mask_tokens"] = torch.stack([given.pop(key).flatten() for key in numbered])
    elif "mask_tokens" in given:
        given["mask_tokens"] = given["mask_tokens"].flatten(1)
    return given, notes


def adapt_probe(state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
    """A probe under the names of :class:`~cliplift.models.video_vit.attentive.AttentiveProbe`; V-JEPA's are ours."""
    notes: list[str] = []
    given = _without_wrapping(state, notes)
    if any(key.startswith("pooler.cross_attention_layer.") for key in given):
        notes.append("took Hugging Face's names")
        given = _hf_probe(_left_out(given, ("encoder.", "predictor."), "the backbone", notes))
    return given, notes


def check_config(config: Mapping[str, object], expected: Mapping[str, int]) -> None:
    """What a Hugging Face folder's config says of things that no tensor's shape tells.

    Args:
        config: the content of ``config.json``.
        expected: its field -> this model's value.

    Raises:
        ModelError: another value; the published "small" VideoMAE was converted with 16 heads for 6, for one.
    """
    for field, own in expected.items():
        if field in config and config[field] != own:
            raise ModelError(
                f"its config.json says {field}={config[field]}, this model has {own}: build it with that"
            )


def swapped(key: str, table: Renames) -> str:
    """The key with the first matching start replaced."""
    for old, new in table:
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def joined(state: Mapping[str, Tensor]) -> State:
    """Queries, keys and values that stand apart, as one tensor each.

    ``attn.query.weight`` (also ``q_proj``), key and value become ``attn.qkv.weight``, their biases ``attn.qkv.bias``;
    or ``attn.qkv.q_bias`` and ``attn.qkv.v_bias`` where keys have none. ``xattn.q_proj`` becomes ``xattn.q``, and keys
    and values ``xattn.kv``.
    """
    pattern = re.compile(r"(.*\bx?attn\.)(query|key|value|q_proj|k_proj|v_proj)\.(weight|bias)")
    apart: dict[tuple[str, str], dict[str, Tensor]] = {}
    result: State = {}
    for key, value in state.items():
        match = pattern.fullmatch(key)
        if match is None:
            result[key] = value
        else:
            apart.setdefault((match[1], match[3]), {})[match[2][0]] = value
    for (stem, kind), parts in apart.items():
        if stem.endswith("xattn."):
            result[f"{stem}q.{kind}"] = parts["q"]
            result[f"{stem}kv.{kind}"] = torch.cat([parts["k"], parts["v"]])
        elif kind == "bias" and "k" not in parts:
            result |= {f"{stem}qkv.{letter}_bias": value for letter, value in parts.items()}
        elif parts.keys() == {"q", "k", "v"}:
            result[f"{stem}qkv.{kind}"] = torch.cat([parts["q"], parts["k"], parts["v"]])
        else:  # incomplete: under a name that loading will refuse
            result |= {f"{stem}{letter}.{kind}": value for letter, value in parts.items()}
    return result


def _without_wrapping(state: Mapping[str, Tensor], notes: list[str]) -> State:
    """Without the prefixes of DistributedDataParallel and of V-JEPA's and Hugging Face's wrappers."""
    wrappers = ("module.", "backbone.", "videomae.", "vjepa2.")
    result: State = {}
    taken: dict[str, None] = {}
    for key, value in state.items():
        bare = key
        while (prefix := next((w for w in wrappers if bare.startswith(w)), None)) is not None:
            bare = bare.removeprefix(prefix)
            taken[prefix] = None
        result[bare] = value
    notes += [f"took the prefix {prefix!r} off the keys" for prefix in taken]
    return result


def _is_huggingface(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith(("encoder.layer.", "encoder.embeddings.")) for key in state)


def _from_huggingface(state: State, notes: list[str]) -> State:
    notes.append("took Hugging Face's names")
    given = _left_out(state, NOT_ENCODER, "of pretraining alone", notes)
    if any(key.startswith("encoder.embeddings.") for key in given):  # VJEPA2
        if any(key.startswith("pooler.") for key in given):
            given = _hf_probe(given)
        table = [*HF_VJEPA_TOP, ("classifier.", "head.")]
        renamed = {
            swapped(_hf_block(key, "encoder.layer.", "blocks.", HF_VJEPA_BLOCK), table): value
            for key, value in given.items()
        }
    else:
        renamed = {_hf_videomae_key(key): value for key, value in given.items()}
    return joined(renamed)


def _hf_videomae_key(key: str) -> str:
    return swapped(_hf_block(key, "encoder.layer.", "blocks.", HF_VIDEOMAE_BLOCK), HF_VIDEOMAE_TOP)


def _hf_probe(state: State) -> State:
    renamed = {swapped(key, HF_PROBE): value for key, value in state.items()}
    return joined(
        {
            _hf_block(key, "pooler.blocks.", "pooler.blocks.", HF_PROBE_BLOCK): value
            for key, value in renamed.items()
        }
    )


def _hf_block(key: str, theirs: str, ours: str, table: Renames) -> str:
    """``encoder.layer.3.attention.x`` -> ``blocks.3.attn.x``; keys outside the blocks stay."""
    index, dot, inner = key.removeprefix(theirs).partition(".")
    if not key.startswith(theirs) or not dot or not index.isdecimal():
        return key
    return f"{ours}{index}.{swapped(inner, table)}"


def _bias_name(key: str) -> str:
    """VideoMAE keeps the two biases in the attention; here they stand beside the weight they belong to."""
    return re.sub(r"\battn\.([qv]_bias)$", r"attn.qkv.\1", key)


def _left_out(state: State, starts: Sequence[str], why: str, notes: list[str]) -> State:
    left = [key for key in state if key.startswith(tuple(starts))]
    if left:
        notes.append(
            f"left out {len(left)} tensors ({', '.join(left[:3])}{', ...' * (len(left) > 3)}): {why}"
        )
    return {key: value for key, value in state.items() if key not in left}


def _with_pooled_norm(given: State, own: Mapping[str, Tensor], notes: list[str]) -> State:
    """A pretrained encoder in a net that classifies from LN(mean of tokens): its LN of every token is not used there,
    and the new one starts at 1 and 0 (released code)."""
    if "fc_norm.weight" not in own or "fc_norm.weight" in given or "norm.weight" not in given:
        return given
    fresh: dict[str, Callable[[Tensor], Tensor]] = {
        "fc_norm.weight": torch.ones_like,
        "fc_norm.bias": torch.zeros_like,
    }
    notes.append("left out norm.weight, norm.bias of pretraining; fc_norm starts fresh")
    kept = {key: value for key, value in given.items() if not key.startswith("norm.")}
    return kept | {key: make(own[key]) for key, make in fresh.items()}


def _number(key: str) -> int:
    return int(key.rpartition(".")[2])
