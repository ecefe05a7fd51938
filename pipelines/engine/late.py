"""What the device found of a step, read by the host one step late, so that it never waits for the step just queued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cliplift.pipelines.engine.faults import VERDICTS, Verdict


class LateValues:
    """A device tensor on its way to pinned host memory.

    The copy is queued behind the work that computes the values. :meth:`read` waits for that work alone, not for what
    was queued after it.
    """

    def __init__(self, values: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        values = values.detach()
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()
        else:
            self._host = values.clone()

    def read(self) -> npt.NDArray[np.floating]:
        """The values, on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.numpy()


@dataclass
class LoggedStep:
    """A line of the log whose means are not yet on the host; ``names`` are those of ``means``.

    ``ranks`` is (ranks, 2): of each the share of its time that it waited for data, and the seconds of a forward pass.
    """

    step: int
    names: Sequence[str]
    means: LateValues
    ranks: LateValues
    numbers: dict[str, float | None]

    def read(self) -> dict[str, float | None]:
        """All numbers of the line, ``train/`` before the names of the means."""
        found = zip(self.names, self.means.read(), strict=True)
        return self.numbers | {MEAN_PREFIX.get(name, "train/") + name: float(value) for name, value in found}


# Where a mean is logged that is not one of the stage's losses and metrics.
MEAN_PREFIX = {"data_wait_share": "speed/"}


@dataclass
class StepOutcome:
    """One step that was queued: whether it was good, and whether a signal has reached any rank.

    ``overflow`` is DeepSpeed's own finding, known on the host at ZeRO stages 1 to 3.
    """

    step: int
    judged: LateValues
    overflow: bool
    log: LoggedStep | None = field(default=None)

    def read(self) -> tuple[Verdict, bool]:
        verdict, signalled = self.judged.read()
        return VERDICTS[int(verdict)], bool(signalled > 0)
