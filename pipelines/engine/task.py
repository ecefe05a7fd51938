"""What the engine asks of a stage and of a loader, and what it gives back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from cliplift.pipelines.data.loader import ClipBatch
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.engine.zero_state import gathered_parameters
from cliplift.pipelines.runs.tracking import ClipTable


class Loader(Protocol):
    """What the engine needs of a clip loader."""

    fingerprint: str
    steps_per_epoch: int

    def micro_batches(self, *, start_step: int, stop_step: int) -> Iterator[ClipBatch]: ...


class TrainingTask(Protocol):
    """A stage: what is trained, how a batch becomes its input, how it is judged.

    ``module(inputs)`` returns a dictionary with ``loss``, the mean over the micro-batch, and scalar metrics.
    ``evaluate`` is called on all ranks; higher is better for ``best_metric``. ``flops_per_clip`` are the operations of
    a training step per clip, None where unknown. ``clip_table`` gives column names and rows (an mp4's bytes become
    a playable cell) about the last evaluation, None where there is nothing to show.
    """

    module: nn.Module
    clip_frames: int
    best_metric: str

    def inputs(self, batch: ClipBatch, *, training: bool, step: int) -> dict[str, Tensor]: ...

    def evaluate(self, *, topology: Topology) -> dict[str, float]: ...

    @property
    def flops_per_clip(self) -> float | None: ...

    def clip_table(self, rows: int) -> ClipTable | None: ...


@dataclass
class FitResult:
    """The end of a run; ``engine`` is alive until :meth:`release` so that sharded weights can still be used."""

    steps: int
    metrics: dict[str, float]
    interrupted: bool
    seconds: float
    clips_per_second: float
    skipped_steps: int
    engine: Any = field(repr=False, default=None)

    def weights(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer of the module in fp32 on the CPU, whole. Collective."""
        module = self.engine.module
        kept = module.state_dict().keys()
        buffers = {n: b.detach().cpu().clone() for n, b in module.named_buffers() if n in kept}
        return gathered_parameters(self.engine) | buffers

    def release(self) -> None:
        """Free the engine and its memory."""
        if self.engine is not None:
            self.engine.destroy()
            self.engine = None
