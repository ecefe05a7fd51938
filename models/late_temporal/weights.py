"""Weights for late-temporal models: which tensor of a file belongs to backbone, reduction, temporal head, classifier.

Three sources are read: a model of ours, a checkpoint of artest08/LateTemporalModeling3DCNN, and weights of the
backbone alone (its own public file, or a run of it). What a source does not have keeps its fresh values, and a note
says so: the reduction and the head after backbone-only weights, the block FRMB replaced.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from cliplift.models.protocol import HasPathways, adapt_state_dict
from cliplift.models.state_dicts import head_prefix, rename_key

BACKBONE = "backbone."
# beginnings of names in the public code's modules -> ours, longest first where one begins another
_BERT_NAMES = {"clsToken": "cls_token", "embedding.learnedPosition.pe": "positions"}
_BLOCK_NAMES = {
    "attention.linear_layers.0": "attention.query",
    "attention.linear_layers.1": "attention.key",
    "attention.linear_layers.2": "attention.value",
    "attention.output_linear": "attention.out",
    "feed_forward.w_1": "feed_forward.expand",
    "feed_forward.w_2": "feed_forward.contract",
    "input_sublayer.norm.a_2": "attention_norm.weight",
    "input_sublayer.norm.b_2": "attention_norm.bias",
    "output_sublayer.norm.a_2": "feed_forward_norm.weight",
    "output_sublayer.norm.b_2": "feed_forward_norm.bias",
}
_BERTS = {"bert": "temporal.bert", "bert_slow": "temporal.slow.bert", "bert_fast": "temporal.fast.bert"}
_PARTS = {
    "fc_action": "classifier",
    "mapper": "reduction",
    "mapper_slow": "reduction.slow",
    "mapper_fast": "reduction.fast",
    "lstm": "temporal.lstm",
    "linear": "temporal.linear",
}
_NON_LOCAL_NAMES = {"W_z.0.": "out.", "W_z.1.": "norm."}
PUBLIC_CLASSIFIER = "fc_action."


def late_temporal_state(
    state: Mapping[str, Tensor],
    *,
    own: Mapping[str, Tensor],
    backbone: nn.Module,
    replaced_blocks: tuple[str, ...],
) -> tuple[dict[str, Tensor], list[str]]:
    """Any of the three sources -> tensors under a late-temporal model's names, and what to tell the user.

    Args:
        state: the source's tensors, ``module.`` already taken off.
        own: the model's state dict: ``backbone``, ``reduction``, ``temporal``, ``classifier``.
        backbone: the model's.
        replaced_blocks: names of the backbone's blocks that FRMB replaced.
    """
    if any(key.startswith(BACKBONE) for key in state):
        given = dict(state)
        notes: list[str] = []
    else:
        given, notes = _read_foreign(state, backbone, replaced_blocks)
    parts = [f"{BACKBONE}{name}." for name in replaced_blocks]
    for part in (*parts, "reduction.", "temporal."):
        _fill_part(given, own, part, notes)
    return given, notes


def _read_foreign(
    state: Mapping[str, Tensor], backbone: nn.Module, replaced_blocks: tuple[str, ...]
) -> tuple[dict[str, Tensor], list[str]]:
    # where FRMB replaced a block, mapper.* names the backbone's own new block again
    late, body = _split(state, pathways=isinstance(backbone, HasPathways), doubled=bool(replaced_blocks))
    body, adapted = adapt_state_dict(backbone, body)
    notes = list(adapted)
    head = head_prefix(backbone)
    dropped = [key for key in body if head and key.startswith(head)]
    if dropped:
        notes.append(f"the backbone's own classifier is not used: {', '.join(dropped)}")
    kept = {f"{BACKBONE}{key}": value for key, value in body.items() if key not in dropped}
    if late:
        notes.append("took LateTemporalModeling3DCNN's names for the temporal head")
    return {**kept, **late}, notes


def _split(
    state: Mapping[str, Tensor], *, pathways: bool, doubled: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A public late-temporal state -> (reduction, temporal and classifier under our names, the backbone's part)."""
    if not any(key.startswith(PUBLIC_CLASSIFIER) for key in state):
        return {}, dict(state)
    late: dict[str, Tensor] = {}
    body: dict[str, Tensor] = {}
    for key, value in state.items():
        name = public_name(key, pathways=pathways)
        if name is None:
            body[key.removeprefix("model.")] = value  # SlowFast is a member called model
        elif not (doubled and name.startswith("reduction.")):
            late[name] = value
    return late, body


def public_name(key: str, *, pathways: bool) -> str | None:
    """Our name of a tensor of the public code that is not the backbone's; None for the backbone's.

    ``bert.`` is the only BERT of most nets; ``bert_slow.`` and ``bert_fast.`` are the two of SlowFast's late fusion,
    whose ``mapper.`` is Slow's (``pathways``).
    """
    part, _, inner = key.partition(".")
    if part in _BERTS:
        return f"{_BERTS[part]}.{bert_name(inner)}"
    if part == "NLB":
        return f"temporal.block.{rename_key(inner, _NON_LOCAL_NAMES)}"
    if part == "mapper" and pathways:
        return f"reduction.slow.{inner}"
    return f"{_PARTS[part]}.{inner}" if part in _PARTS else None


def bert_name(key: str) -> str:
    """A name inside the public code's BERT modules -> inside ``TemporalBert``."""
    prefix = "transformer_blocks."
    if not key.startswith(prefix):
        return rename_key(key, _BERT_NAMES)
    index, _, rest = key.removeprefix(prefix).partition(".")
    return f"blocks.{index}.{rename_key(rest, _BLOCK_NAMES)}"


def _fill_part(given: dict[str, Tensor], own: Mapping[str, Tensor], part: str, notes: list[str]) -> None:
    """Where the source has nothing that fits ``part``, leave the model's own values and say so.

    A source that has this part in another form (another head, the block before FRMB) is treated as having none; one
    that has the right names with other shapes is left as it is, and refused when loaded.
    """
    mine = {key for key in own if key.startswith(part)}
    theirs = {key for key in given if key.startswith(part)}
    trained = {key for key in mine if not key.endswith("num_batches_tracked")}
    replaced = part.startswith(BACKBONE)
    same_names = trained <= theirs <= mine
    same_shapes = same_names and all(given[key].shape == own[key].shape for key in theirs)
    if same_shapes or (same_names and not replaced):
        return
    for key in theirs:
        del given[key]
    for key in mine:
        given[key] = own[key]
    if theirs:
        notes.append(f"left out of the source, {part}*: {len(theirs)} tensors of another form")
    if mine:
        notes.append(f"freshly initialised, {part}*: {len(mine)} tensors")
