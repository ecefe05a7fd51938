"""2D weights in 3D networks.

* ``centre``: the 2D kernel at the middle frame, zeros elsewhere. Exact: a clip of identical frames gives the 2D
  network's output, also at the clip's ends, where zero padding stands in for frames.
* ``mean``: the 2D kernel divided by T, repeated over T (Carreira and Zisserman, I3D, arXiv 1705.07750, section 2.3).
  Exact away from the ends only; with zero padding the first and last frames see smaller sums.
* what a network has besides the 2D kernels (P3D's temporal convolutions, TAM's sums over frames) it initialises itself
  so that it starts as the 2D network; see its ``adapt_2d_state``.

What could not be carried over stays freshly initialised, and is logged by name.

Shape letters: O output channels, I input channels, T frames, h w kernel size.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from cliplift.models.protocol import ModelError, adapt_2d_state, adapt_state_dict, check_choices
from cliplift.models.state_dicts import head_prefix

logger = logging.getLogger(__name__)

Kernels = Literal["centre", "mean"]


@dataclass(frozen=True)
class InflationReport:
    """State-dict keys by what became of them: ``fresh`` ones of the 3D model, ``unused`` ones of the 2D weights."""

    copied: tuple[str, ...]
    inflated: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]


def inflate_kernel(kernel: Tensor, depth: int, *, kernels: Kernels = "centre") -> Tensor:
    """(O, I, h, w) -> (O, I, depth, h, w).

    The centre of an even depth is the later of the two middle frames, depth // 2, as in the P3D author's transfer.

    Raises:
        ModelError: depth < 1 or an unknown rule.
    """
    check_choices(Kernels, kernels=kernels)
    if depth < 1 or kernel.ndim != 4:
        raise ModelError(f"cannot inflate a kernel of shape {tuple(kernel.shape)} to depth {depth}")
    if kernels == "mean":
        return (kernel / depth).unsqueeze(2).repeat(1, 1, depth, 1, 1)
    inflated = kernel.new_zeros(*kernel.shape[:2], depth, *kernel.shape[2:])
    inflated[:, :, depth // 2] = kernel
    return inflated


def inflate(
    model: nn.Module,
    state_2d: Mapping[str, Tensor],
    *,
    kernels: Kernels = "centre",
    source: str = "2D weights",
) -> InflationReport:
    """Fill a 3D model from a 2D network's state dict.

    Tensors go by name. Equal shapes are copied, (O, I, h, w) becomes (O, I, T, h, w) by the rule, and the rest of
    the model stays as it is. The classifier is never carried over: its classes are images'.

    Args:
        model: the 3D model; ``adapt_2d_state(state)`` and ``adapt_state_dict(state)``, where it has them, translate
            the names first.
        state_2d: the 2D weights, under torchvision's names.
        kernels: "centre" or "mean".
        source: named in the log.

    Returns:
        Which keys were copied, inflated, left fresh, and left unused.

    Raises:
        ModelError: nothing fits, so these are not weights of the 2D counterpart.
    """
    state, _ = adapt_state_dict(model, adapt_2d_state(model, dict(state_2d)))
    own, head = model.state_dict(), head_prefix(model)
    copied, inflated, fresh = [], [], []
    for key, target in own.items():
        # the classifier of images has other classes, even where its shape happens to agree
        given = None if head and key.startswith(head) else state.get(key)
        if given is not None and given.shape == target.shape:
            target.copy_(given)
            copied.append(key)
        elif given is not None and _is_flat_form(given, target):
            target.copy_(inflate_kernel(given, target.shape[2], kernels=kernels))
            inflated.append(key)
        else:
            fresh.append(key)
    used = {*copied, *inflated}
    report = InflationReport(
        tuple(copied), tuple(inflated), tuple(fresh), tuple(key for key in state if key not in used)
    )
    # biases and BatchNorms fit many networks; without a kernel these are not the 2D counterpart's weights
    if not inflated and not any(own[key].ndim >= 4 for key in copied):
        raise ModelError(
            f"{source}: no kernel fits {type(model).__name__}; these are not weights of its 2D counterpart"
        )
    done = f"{len(copied)} tensors copied, {len(inflated)} kernels inflated ({kernels})"
    left = [", ".join(keys) or "nothing" for keys in (report.fresh, report.unused)]
    logger.info("%s: %s; freshly initialised: %s; unused: %s", source, done, *left)
    return report


def _is_flat_form(given: Tensor, target: Tensor) -> bool:
    return (
        given.ndim == 4
        and target.ndim == 5
        and given.shape[:2] == target.shape[:2]
        and given.shape[2:] == target.shape[3:]
    )
