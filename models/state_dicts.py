"""State dicts: read from files, brought to a model's names, compared with it, and copied into it.

Nothing read here is executed: safetensors, and ``torch.load(weights_only=True)``. A model may help with the hooks of
:mod:`cliplift.models.protocol`: ``NamesHead``, ``AdaptsStateDict``, ``PublishesWeights``, ``NamesParts`` and
``ChecksForeignConfig``.

:func:`load_state` refuses weights that do not fit and names the first keys; :func:`match_weights` names them all.
"""

from __future__ import annotations

import argparse
import logging
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from cliplift.models.protocol import (
    ChecksForeignConfig,
    ModelError,
    NamesHead,
    NamesParts,
    VideoNetwork,
    adapt_state_dict,
    published_weights,
)
from cliplift.models.weight_files import has_weights, read_json, read_safetensors, read_weights

logger = logging.getLogger(__name__)

FORMAT = 1
CONFIG = "config.json"
HEAD_NAMES = ("classifier", "fc", "head")  # where a model does not name its head
# a blob of Caffe2 and what its ending says. SpatialBN's are s(cale), b(ias), rm and riv, which holds the variance in
# spite of its name
CAFFE2_BLOB = re.compile(r"(.+)_(w|s|b|rm|riv)")
CAFFE2_TENSORS = {"w": "weight", "s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}
# where public checkpoints keep the weights
WRAPPER_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "module")


@dataclass(frozen=True)
class LoadReport:
    """What loading did beside copying: key names, and the notes that were logged."""

    loaded: int
    head_skipped: tuple[str, ...] = ()
    head_fresh: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_state(model: nn.Module, source: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights source, under the names they have there."""
    published = published_weights(model)
    if str(source) in published:
        return published[str(source)]()
    path = Path(source)
    if path.is_dir():
        _check_foreign_config(model, path)
        if has_weights(path):
            return read_weights(path)
    if not path.is_file():
        tags = f" (tags of this model: {sorted(published)})" if published else ""
        raise ModelError(f"pretrained={str(source)!r}: no such file or export folder{tags}")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    _refuse_compressed(path)
    try:
        # public files keep the arguments of their training beside the weights: a Namespace of plain values
        with torch.serialization.safe_globals([argparse.Namespace]):
            mapped = zipfile.is_zipfile(path)  # older files cannot be
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception:  # pickle, zip and torch raise their own each; torch's text advises unpickling anyway
        raise ModelError(
            f"{path}: damaged, or it holds pickled objects beside tensors, which are never loaded because they can "
            "run code. Save the state dict alone: torch.save(model.state_dict(), path), or as .safetensors."
        ) from None
    return _unwrap(content, path, model.checkpoint_parts if isinstance(model, NamesParts) else ())


def _refuse_compressed(path: Path) -> None:
    """torch.save stores its tensors as they are. torch.load would inflate a file of kilobytes to any size."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # BadZipFile, and what damaged names and sizes raise; torch may yet inflate it
        raise ModelError(f"{path}: a damaged archive ({error}); copy or download it again") from None
    compressed = any(e.compress_type != zipfile.ZIP_STORED for e in entries)
    if compressed or sum(e.file_size for e in entries) > path.stat().st_size:
        raise ModelError(
            f"{path}: its tensors are compressed, which torch.save never does, so it is not read: what it "
            "expands to is not bounded. Save it again with torch.save(model.state_dict(), path)."
        )


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> LoadReport:
    """Copy tensors into a model by name, as :func:`~cliplift.models.factory.load_pretrained` says.

    ``source`` names them in messages. Raises ModelError where they are not this model's.
    """
    given, notes = adapted_state(model, dict(state))
    own = model.state_dict()
    head = head_prefix(model)
    in_head = [k for k in (*given, *own) if head and k.startswith(head)]
    # the head is taken whole or not at all: half a classifier would be neither the source's nor fresh
    fits = all(k in given and k in own and given[k].shape == own[k].shape for k in in_head)
    skipped = () if fits else tuple(k for k in given if k in in_head)
    fresh = () if fits else tuple(k for k in own if k in in_head)
    body = {k: v for k, v in given.items() if k not in skipped}
    _refuse_mismatches(body, {k: v for k, v in own.items() if k not in fresh}, source)
    model.load_state_dict(body, strict=False)
    if skipped or fresh:
        notes.append(
            f"head not loaded: left out of the source {_shapes(given, skipped)}; "
            f"freshly initialised {_shapes(own, fresh)}"
        )
    for note in notes:
        logger.info("%s: %s", source, note)
    return LoadReport(loaded=len(body), head_skipped=skipped, head_fresh=fresh, notes=tuple(notes))


def head_prefix(model: nn.Module) -> str:
    """``"classifier."`` or the like: what the classifier's keys begin with; empty when the model has no such part."""
    if isinstance(model, NamesHead):
        return f"{model.head_name}."
    return next((f"{name}." for name in HEAD_NAMES if hasattr(model, name)), "")


def adapted_state(model: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under the model's own names, as far as it knows theirs, and a note for every change."""
    notes: list[str] = []
    if state and all(key.startswith("module.") for key in state):  # saved from DistributedDataParallel
        state = {key.removeprefix("module."): value for key, value in state.items()}
        notes.append("took the prefix 'module.' off the keys")
    state, more = adapt_state_dict(model, state)
    return state, notes + more


def rename_key(key: str, prefixes: Mapping[str, str]) -> str:
    """The key with the first of ``prefixes`` (old -> new) that it begins with exchanged; else as it is."""
    start = next((old for old in prefixes if key.startswith(old)), None)
    return key if start is None else prefixes[start] + key.removeprefix(start)


def rename_prefixes(state: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """:func:`rename_key` for all keys."""
    return {rename_key(key, prefixes): value for key, value in state.items()}


def rename_numbered_children(
    state: Mapping[str, Tensor], children: Sequence[str], *, head: str
) -> dict[str, Tensor]:
    """LateTemporalModeling3DCNN's names: ``features.N`` is the backbone's N-th child, ``fc_action`` the classifier."""
    names = {f"features.{n}.": f"{child}." for n, child in enumerate(children)}
    return rename_prefixes(state, names | {"fc_action.": f"{head}."})


def _mismatches(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Keys of the model that the source lacks, keys it has too many, and those of another shape."""
    return {
        # old files lack BatchNorm's counters, which play no part in evaluation
        "missing": tuple(k for k in own if k not in given and not k.endswith("num_batches_tracked")),
        "unexpected": tuple(k for k in given if k not in own),
        "reshaped": tuple(
            f"{k} {tuple(v.shape)} for {tuple(own[k].shape)}"
            for k, v in given.items()
            if k in own and v.shape != own[k].shape
        ),
    }


def _refuse_mismatches(given: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    problems = [
        f"{len(keys)} {'of another shape' if what == 'reshaped' else what} "
        f"({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in _mismatches(given, own).items()
        if keys
    ]
    if problems:
        raise ModelError(
            f"{source}: not the weights of this model: {'; '.join(problems)}. Check the model's name and options."
        )


def _shapes(state: Mapping[str, Tensor], keys: tuple[str, ...]) -> str:
    return ", ".join(f"{key} {tuple(state[key].shape)}" for key in keys) or "nothing"


def _check_foreign_config(model: nn.Module, folder: Path) -> None:
    """Another project's folder may say in its config what no tensor's shape tells, such as the number of heads."""
    path = folder / CONFIG
    if not isinstance(model, ChecksForeignConfig) or not path.is_file():
        return
    config = read_json(path)
    if isinstance(config, dict) and config.get("format") != FORMAT:
        try:
            model.check_foreign_config(config)
        except ModelError as error:
            raise ModelError(f"{folder}: {error}") from None


def _unwrap(content: object, path: Path, parts: tuple[str, ...] = ()) -> dict[str, Tensor]:
    for key in (*parts, *WRAPPER_KEYS):
        found = content.get(key) if isinstance(content, dict) else None
        if isinstance(found, list) and key in parts:
            if len(found) != 1:
                raise ModelError(
                    f"{path}: {key!r} holds {len(found)} nets: save the one you want to a file of its own"
                )
            found = found[0]
        if isinstance(found, dict):
            content = found
            break
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"{path}: holds no state dict (a mapping of names to tensors)")
    return cast(dict[str, Tensor], content)


@dataclass(frozen=True)
class WeightMatch:
    """Keys under the model's names. The classifier's are apart: a different number of classes is not an error."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]  # of the model, not in the source
    unexpected: tuple[str, ...]  # of the source, not in the model
    reshaped: tuple[str, ...]  # "KEY (2, 3) for (2, 4)"
    head_given: tuple[str, ...]  # "KEY (5, 768)", of the source
    head_fits: bool  # the source has all of the model's head; true for a model and a source without one
    classes: int | None  # K of the source's head; None where it has no head that the model knows
    notes: tuple[str, ...]  # what was renamed, completed or resized

    @property
    def loads(self) -> bool:
        """Whether :func:`load_state` would accept the source."""
        return not (self.missing or self.unexpected or self.reshaped)


def match_weights(model: VideoNetwork, state: Mapping[str, Tensor]) -> WeightMatch:
    """Compare a source's tensors (:func:`read_state`) with a model's, by name and shape.

    Args:
        model: as for ``load_state``; one on the meta device is enough, since only shapes are compared.
        state: the tensors under the source's own names.

    Raises:
        ModelError: from the model's ``adapt_state_dict``, where no resizing or renaming can help.
    """
    given, notes = adapted_state(model, dict(state))
    own = model.state_dict()
    prefix = head_prefix(model)
    heads = [
        {k: v for k, v in tensors.items() if prefix and k.startswith(prefix)} for tensors in (given, own)
    ]
    body = {k: v for k, v in given.items() if k not in heads[0]}
    own_body = {k: v for k, v in own.items() if k not in heads[1]}
    return WeightMatch(
        matched=tuple(k for k, v in own_body.items() if k in body and body[k].shape == v.shape),
        **_mismatches(body, own_body),
        head_given=tuple(f"{k} {tuple(v.shape)}" for k, v in heads[0].items()),
        head_fits={k: v.shape for k, v in heads[0].items()} == {k: v.shape for k, v in heads[1].items()},
        classes=_count_classes(heads[0], heads[1], model.num_classes) if heads[1] else None,
        notes=tuple(notes),
    )


def _count_classes(given: Mapping[str, Tensor], own: Mapping[str, Tensor], num_classes: int) -> int | None:
    """K of the source: the head's outputs are a multiple of K (once, or one set per frame or annotation)."""
    shared = [k for k, v in own.items() if k in given and v.ndim and given[k].ndim]
    other = [k for k in shared if given[k].shape[0] != own[k].shape[0]]
    found = set()
    for key in other or shared:
        sets, rest = divmod(own[key].shape[0], num_classes)
        if not rest and given[key].shape[0] % sets == 0:
            found.add(given[key].shape[0] // sets)
    return found.pop() if len(found) == 1 else None
