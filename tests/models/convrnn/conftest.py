"""Random weights in double precision, for comparisons with the papers' equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn


def randomised(module: nn.Module, *, seed: int = 0, scale: float = 0.4) -> Any:
    """The module in double precision, every weight random: peepholes and biases start at constants."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
    return module


@pytest.fixture(name="randomised")
def randomised_fixture() -> Callable[..., Any]:
    """``randomised(module, seed=0, scale=0.4)``."""
    return randomised
