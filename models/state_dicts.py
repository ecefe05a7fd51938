"""Which tensors of a weights source fit a model, told before anything is copied.

:func:`cliplift.models.factory.load_state` refuses weights that do not fit and names the first keys; this names all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from cliplift.models.factory import adapted_state, head_prefix


@dataclass(frozen=True)
class WeightMatch:
    """Keys under the model's names. The classifier's are apart, because another number of classes is no mistake."""

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
        """Whether :func:`~cliplift.models.factory.load_state` would accept the source."""
        return not (self.missing or self.unexpected or self.reshaped)


def match_weights(model: nn.Module, state: Mapping[str, Tensor]) -> WeightMatch:
    """Compare a source's tensors (:func:`cliplift.models.factory.read_state`) with a model's, by name and shape.

    Args:
        model: as for ``load_state``; one on the meta device will do, since only shapes are looked at.
        state: the tensors under the source's own names.

    Raises:
        ModelError: from the model's ``adapt_state_dict``, where no resize or renaming can help.
    """
    given, notes = adapted_state(model, dict(state))
    own = model.state_dict()
    prefix = head_prefix(model)
    heads = [
        {k: v for k, v in tensors.items() if prefix and k.startswith(prefix)} for tensors in (given, own)
    ]
    body = {k: v for k, v in given.items() if k not in heads[0]}
    own_body = {k: v for k, v in own.items() if k not in heads[1]}
    fits = {k for k in body if k in own_body and body[k].shape == own_body[k].shape}
    return WeightMatch(
        matched=tuple(k for k in own_body if k in fits),
        # as load_state: old files lack BatchNorm's counters, which play no part in evaluation
        missing=tuple(k for k in own_body if k not in body and not k.endswith("num_batches_tracked")),
        unexpected=tuple(k for k in body if k not in own_body),
        reshaped=tuple(
            f"{k} {tuple(body[k].shape)} for {tuple(own_body[k].shape)}"
            for k in body
            if k in own_body and k not in fits
        ),
        head_given=tuple(f"{k} {tuple(v.shape)}" for k, v in heads[0].items()),
        head_fits={k: v.shape for k, v in heads[0].items()} == {k: v.shape for k, v in heads[1].items()},
        classes=_classes(heads[0], heads[1], cast(Any, model).num_classes) if heads[1] else None,
        notes=tuple(notes),
    )


def _classes(given: Mapping[str, Tensor], own: Mapping[str, Tensor], num_classes: int) -> int | None:
    """K of the source: the head's outputs are a multiple of K (once, or one set a frame or annotation)."""
    shared = [k for k, v in own.items() if k in given and v.ndim and given[k].ndim]
    other = [k for k in shared if given[k].shape[0] != own[k].shape[0]]
    found = set()
    for key in other or shared:
        sets, rest = divmod(own[key].shape[0], num_classes)
        if not rest and given[key].shape[0] % sets == 0:
            found.add(given[key].shape[0] // sets)
    return found.pop() if len(found) == 1 else None
