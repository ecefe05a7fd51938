"""Weights and clips that any program can compute, so that another project's outputs for them can be written down."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in [-0.3, 0.3) for the names of a state dict, in the order of the sorted names."""
    filled = {}
    for k, (name, tensor) in enumerate(sorted(state.items())):
        i = torch.arange(tensor.numel())
        values = 0.6 * (((31 * i * i + 7919 * i + 104729 * k) % 65537).double() / 65537 - 0.5)
        filled[name] = values.float().reshape(tensor.shape)
    return filled


def clip(*shape: int) -> Tensor:
    """Numbers in [-2, 2)."""
    i = torch.arange(math.prod(shape))
    return (((17 * i * i + 4973 * i) % 65521).double() / 65521 * 4 - 2).float().reshape(shape)


def sample(tensor: Tensor, count: int) -> list[float]:
    """``count`` or a few more numbers, evenly spread."""
    flat = tensor.detach().flatten()
    return [round(v, 6) for v in flat[:: max(1, flat.numel() // count)].tolist()]
