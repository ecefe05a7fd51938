"""Sums of what happened since the last logged line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class TrainingWindow:
    """Sums since the last logged line."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    failed: int = 0

    def add(self, values: Mapping[str, Tensor], *, seconds: float, waited: float) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value
        self.steps += 1
        self.seconds += seconds
        self.waited += waited
