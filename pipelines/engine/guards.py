"""What a run does about a step whose loss is not finite, or far above those before it."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Literal

from cliplift.configs.training import EngineConfig

Verdict = Literal["fine", "not finite", "spike", "overflow"]


class DivergedError(ValueError):
    """The run cannot go on: too many bad steps in a row, too many rewinds, or ``on_bad_step: stop``."""


class LossGuard:
    """Judges every step's loss, the mean over all ranks, so that all ranks judge alike."""

    def __init__(self, engine: EngineConfig) -> None:
        self.factor = engine.loss_spike_factor
        self.recent: deque[float] = deque(maxlen=engine.loss_spike_window_steps)

    def judge(self, loss: float) -> Verdict:
        """``spike``: above ``loss_spike_factor`` times the median of a full window. Bad losses enter no window."""
        if not math.isfinite(loss):
            return "not finite"
        full = len(self.recent) == self.recent.maxlen
        if self.factor is not None and full and loss > self.factor * statistics.median(self.recent):
            return "spike"
        self.recent.append(loss)
        return "fine"
