"""Random gamma correction of a clip."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from cliplift.configs.sections import Section


class Gamma(Section):
    """Raises pixels to a power between 1 / (1 + strength) and 1 + strength, one for all frames of a clip."""

    num_draws: ClassVar[int] = 1
    strength: float = Field(0.5, ge=0, description="largest power of a clip, minus 1")

    def __call__(self, clips: Tensor, draws: Tensor) -> Tensor:
        """(B, C, T, H, W) in [0, 1], and draws (B, 1), to clips of the same shape."""
        power = (1.0 + self.strength) ** (2.0 * draws[:, 0] - 1.0)
        return clips.clamp(0.0, 1.0) ** power.view(-1, 1, 1, 1, 1)
