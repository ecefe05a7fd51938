"""The state of a run, in memory and on disk: weights, their average, optimizer, schedule, and where it is.

One object so that saving, resuming, rewinding and taking the result see the same set of things.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from cliplift.configs.training import TrainingRun
from cliplift.pipelines.checkpoints.folder import BEST, Folder, newest_usable
from cliplift.pipelines.checkpoints.saved import (
    SavedState,
    TrainedTensors,
    load_buffers,
    open_checkpoint,
    random_state,
    set_random_state,
)
from cliplift.pipelines.checkpoints.saver import Saver, Snapshot
from cliplift.pipelines.checkpoints.stored import StoredFolder
from cliplift.pipelines.checkpoints.targets import Target
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.engine.deepspeed_setup import build_engine, resumable
from cliplift.pipelines.engine.ema import WeightAverage
from cliplift.pipelines.engine.optim import Schedule
from cliplift.pipelines.engine.zero_state import (
    load_parameters,
    optimizer_slices,
    parameter_slices,
    restore_optimizer,
)
from cliplift.pipelines.runs.published import PublishedRun
from cliplift.sharding.storage import join

CHECKPOINTS = "checkpoints"


class RunState:
    """A run's engine and everything a checkpoint holds of it. Methods are collective.

    ``step`` counts optimizer steps; ``step + data_offset`` is the data position in steps: rewinds pass over the data
    that led to a bad step. ``skipped`` counts updates left out, ``best`` is the best validation metric so far and
    ``metrics`` are those of the last evaluation. ``evaluation_due``: a signal stopped the evaluation of this step.
    """

    def __init__(
        self,
        module: nn.Module,
        run: TrainingRun,
        *,
        schedule: Schedule,
        identity: Mapping[str, object],
        topology: Topology,
        say: Callable[[str], None],
    ) -> None:
        self.run, self.schedule, self.identity = run, schedule, identity
        self.topology, self.say = topology, say
        self.folder = checkpoint_folder(run, rank=topology.rank)
        self._saved: Target | None = None  # the last checkpoint that this process wrote or is writing
        self._continued: Folder | None = None  # the one it went on from after that
        self.step, self.data_offset, self.skipped, self.rewinds = 0, 0, 0, 0
        self.best: float | None = None
        self.metrics: dict[str, float] = {}
        self.evaluation_due = False
        asynchronous = run.checkpoint.asynchronous
        self.saver = Saver(
            topology,
            asynchronous=topology.device.type == "cuda" if asynchronous == "auto" else asynchronous,
            timeout_seconds=run.engine.collective_timeout_seconds,
            records=PublishedRun(run.checkpoint.url, Path(run.output)).publish_records,
        )
        saved = resumable(self.folder, run, identity=identity, topology=topology, say=say)
        self.engine = build_engine(module, run, folder=self.folder, saved=saved, topology=topology)
        decay = run.optim.average_decay
        self.average = WeightAverage(self.engine, decay=decay) if decay else None
        if saved is not None:
            self._continue(saved)
            say(f"continues from step {self.step}")

    @property
    def data_step(self) -> int:
        """The data position, in optimizer steps."""
        return self.step + self.data_offset

    def save(self, tracker_id: str | None, *, best: bool = False) -> None:
        """A checkpoint of this step; ``best`` keeps it apart from the last ones, alone."""
        average = self.average
        snapshot = Snapshot(
            parameters=parameter_slices(self.engine),
            optimizer=optimizer_slices(self.engine),
            buffers=dict(self.engine.module.named_buffers()),
            random_state=random_state(self.topology.device),
            average={} if average is None else average.slices(),
            average_buffers={} if average is None else average.buffers,
            state={
                "step": self.step,
                "data_offset": self.data_offset,
                "skipped_steps": self.skipped,
                "rewinds": self.rewinds,
                "average_updates": 0 if average is None else average.updates,
                "best": self.best,
                "metrics": self.metrics,
                "evaluation_due": self.evaluation_due,
                "schedule": self.schedule.state(),
                "identity": dict(self.identity),
                "sequence_parallel": self.topology.sequence_parallel,
                "tracker_id": tracker_id,
            },
        )
        if best:
            self.saver.save(self.folder / BEST, snapshot, keep_last=1)
        else:
            self._saved = self.saver.save(self.folder, snapshot, keep_last=self.run.checkpoint.keep_last)

    def _continue(self, saved: SavedState) -> None:
        """Everything of a checkpoint but weights and optimizer state."""
        self._saved, self._continued = None, saved.path
        set_random_state(saved.random_state, self.topology.device)
        state = saved.state
        self.schedule.load(state["schedule"])
        self.step, self.skipped = state["step"], state["skipped_steps"]
        self.data_offset, self.rewinds = state["data_offset"], state["rewinds"]
        self.best, self.metrics = state["best"], dict(state["metrics"])
        self.evaluation_due = state.get("evaluation_due", False)  # checkpoints of earlier versions lack it
        if self.average is not None and any(True for _ in saved.average):
            self.average.restore(saved.average, saved.average_buffers, updates=state["average_updates"])

    def rewind(self) -> bool:
        """Back to the newest checkpoint; the data up to and with this step's is left out from then on.

        False where there is no checkpoint yet.
        """
        self.saver.wait()
        saved = self._newest(self.folder)
        if saved is None:
            return False
        next_data, skipped, rewinds = self.data_step + 1, self.skipped, self.rewinds + 1
        load_parameters(self.engine, saved.parameters)
        load_buffers(self.engine.module, saved.buffers)
        restore_optimizer(self.engine, saved.optimizer)
        self._continue(saved)
        self.skipped, self.rewinds = skipped, rewinds
        self.data_offset = next_data - self.step
        return True

    def take_result(self, *, refresh_statistics: Callable[[], None]) -> TrainedTensors:
        """Put what the run is for into the module: the best evaluated weights, or the last; averaged, if they are.

        ``refresh_statistics`` re-estimates BatchNorm under averaged weights; without an average, the statistics kept
        are those of the evaluation.

        Returns:
            the module's tensors, read from the checkpoint that holds them: nothing is gathered.
        """
        best = self._newest(self.folder / BEST) if self.run.checkpoint.keep_best else None
        if best is not None and best.state["step"] != self.step:
            self.say(f"uses the best weights, those of step {best.state['step']}")
            load_parameters(self.engine, best.parameters, best.average)
            load_buffers(self.engine.module, {**best.buffers, **best.average_buffers})
            self.metrics = dict(best.state["metrics"])
            saved, averaged = best, True
        else:
            place = self._continued if self._saved is None else self._saved.place
            assert place is not None, "the last step is saved"
            saved = open_checkpoint(place, topology=self.topology)
            averaged = self.average is not None
            if self.average is not None:
                self.average.replace_weights()
        if self.average is not None:
            refresh_statistics()
        kept = self.engine.module.state_dict().keys()
        buffers = {n: b.detach().cpu().clone() for n, b in self.engine.module.named_buffers() if n in kept}
        return TrainedTensors(saved, buffers=buffers, averaged=averaged)

    def _newest(self, folder: Folder) -> SavedState | None:
        path = newest_usable(folder, topology=self.topology, say=self.say)
        return None if path is None else open_checkpoint(path, topology=self.topology)


def checkpoint_folder(run: TrainingRun, *, rank: int) -> Folder:
    """Where the checkpoints of a run go: into its folder, or to ``checkpoint.url`` through a folder of each rank."""
    local = Path(run.output) / CHECKPOINTS
    url = run.checkpoint.url
    return local if url is None else StoredFolder(join(url, CHECKPOINTS), local / f"rank{rank}")


def run_identity(run: TrainingRun, *, data_fingerprint: str, total_steps: int) -> dict[str, object]:
    """What must not change between stop and resume for the run to be the same run."""
    return {
        "data.shards": data_fingerprint,
        "seed": run.seed,
        "engine.global_batch": run.engine.global_batch,
        "optim.name": run.optim.name,
        "schedule": total_steps,
    }
