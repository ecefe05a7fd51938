"""SlowFast weights from the formats they are published in.

Our names are PySlowFast's (``.pyth`` files of facebookresearch/SlowFast), but for the classifier. Read besides:
pytorchvideo's (``blocks.1.multipathway_blocks.0...``) and Caffe2's blobs (``t_res2_0_branch2a_w``), in which the
model zoo of PySlowFast has the Kinetics weights. Those ``.pkl`` files are plain pickles and are never opened here:
save their "blobs" as tensors (safetensors or ``torch.save``) first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

Patterns = Sequence[tuple[str, str]]

_PYTORCHVIDEO_TOP: Patterns = (
    (r"multipathway_blocks\.([01])\.(conv|norm)\.(.+)", r"pathway\1_stem.\2.\3"),
    (r"multipathway_fusion\.conv_fast_to_slow\.(.+)", r"fuse.conv_f2s.\1"),
    (r"multipathway_fusion\.norm\.(.+)", r"fuse.bn.\1"),
    (r"multipathway_blocks\.([01])\.res_blocks\.(\d+)\.(.+)", r"pathway\1_res\2.\3"),
)
_PYTORCHVIDEO_INNER: Patterns = (
    (r"_stem\.norm\.", "_stem.bn."),
    (r"\.branch1_conv\.", ".branch1."),
    (r"\.branch1_norm\.", ".branch1_bn."),
    (r"\.branch2\.conv_([abc])\.", r".branch2.\1."),
    (r"\.branch2\.norm_([abc])\.", r".branch2.\1_bn."),
)
# The Fast pathway's names begin with t_. A lateral connection is called after the layer it leaves
_CAFFE2: Patterns = (
    (r"t_pool1_subsample_bn", "s1_fuse.bn"),
    (r"t_pool1_subsample", "s1_fuse.conv_f2s"),
    (r"t_res(\d)_\d+_branch2c_bn_subsample_bn", r"s\1_fuse.bn"),
    (r"t_res(\d)_\d+_branch2c_bn_subsample", r"s\1_fuse.conv_f2s"),
    (r"res_conv1_bn", "s1.pathway0_stem.bn"),
    (r"t_res_conv1_bn", "s1.pathway1_stem.bn"),
    (r"conv1", "s1.pathway0_stem.conv"),
    (r"t_conv1", "s1.pathway1_stem.conv"),
    (r"res(\d)_(\d+)_branch1(_bn)?", r"s\1.pathway0_res\2.branch1\3"),
    (r"t_res(\d)_(\d+)_branch1(_bn)?", r"s\1.pathway1_res\2.branch1\3"),
    (r"res(\d)_(\d+)_branch2([abc](?:_bn)?)", r"s\1.pathway0_res\2.branch2.\3"),
    (r"t_res(\d)_(\d+)_branch2([abc](?:_bn)?)", r"s\1.pathway1_res\2.branch2.\3"),
    (r"pred", "projection"),
)
_CAFFE2_TENSORS = {
    "w": "weight",
    "s": "weight",
    "b": "bias",
    "rm": "running_mean",
    "riv": "running_var",
}


def adapt_slowfast(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Foreign weights under our names, and a note; names that no rule knows stay, and loading refuses them."""
    if any(key.startswith("blocks.0.multipathway") for key in state):
        return {_from_pytorchvideo(k): v for k, v in state.items()}, ["took pytorchvideo's names"]
    if "t_conv1_w" in state:
        return {_from_caffe2(k): v for k, v in state.items()}, ["took the names of Caffe2's blobs"]
    if "s1.pathway0_stem.conv.weight" in state and not any(k.startswith("projection.") for k in state):
        renamed = {_after("head.projection.", "projection.", key): value for key, value in state.items()}
        return renamed, ["took PySlowFast's names"]
    return state, []


def _after(old: str, new: str, key: str) -> str:
    return new + key.removeprefix(old) if key.startswith(old) else key


def _from_pytorchvideo(key: str) -> str:
    """``blocks.N`` is stage N + 1 with the lateral connection that follows it; ``blocks.6`` is the head."""
    match = re.fullmatch(r"blocks\.(\d)\.(.+)", key)
    if match is None:
        return key
    stage, inner = int(match[1]) + 1, match[2]
    if inner.startswith("proj."):
        return "projection." + inner.removeprefix("proj.")
    for old, new in _PYTORCHVIDEO_TOP:
        inner, found = re.subn(f"^{old}$", new, inner)
        if found:
            break
    for old, new in _PYTORCHVIDEO_INNER:
        inner = re.sub(old, new, inner)
    return f"s{stage}_{inner}" if inner.startswith("fuse.") else f"s{stage}.{inner}"


def _from_caffe2(blob: str) -> str:
    match = re.fullmatch(r"(.+)_(w|s|b|rm|riv)", blob)
    if match is None:
        return blob
    for old, new in _CAFFE2:
        if re.fullmatch(old, match[1]):
            return f"{re.sub(f'^{old}$', new, match[1])}.{_CAFFE2_TENSORS[match[2]]}"
    return blob
