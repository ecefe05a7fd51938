"""The torch profiler over chosen steps of a run, as a trace file for Perfetto or chrome://tracing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class StepProfiler:
    """Records the steps ``first`` to ``last`` (counted from 1) of every rank into a file of its own."""

    def __init__(
        self, steps: tuple[int, int] | None, *, folder: Path, rank: int, device: torch.device
    ) -> None:
        self.steps, self.folder, self.rank = steps, folder, rank
        self.activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self.activities.append(ProfilerActivity.CUDA)
        self._running: profile | None = None

    def before(self, step: int) -> None:
        """Start when ``step`` is the first one."""
        if self.steps is not None and step == self.steps[0]:
            self._running = profile(activities=self.activities, record_shapes=True)
            self._running.start()

    def after(self, step: int) -> Path | None:
        """Write the trace once ``step`` is the last one; returns its path."""
        if self._running is None or self.steps is None or step < self.steps[1]:
            return None
        return self.close()

    def close(self) -> Path | None:
        """Write what has been recorded, also where the run ends before the last step."""
        if self._running is None or self.steps is None:
            return None
        running, self._running = self._running, None
        running.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"steps_{self.steps[0]:08d}-{self.steps[1]:08d}_rank{self.rank}.json.gz"
        running.export_chrome_trace(str(path))
        return path
