"""The demo as a sequence of runs: a signal that stops one of them stops the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cliplift.configs.runs import DemoRun
from cliplift.launch.commands import demo
from cliplift.pipelines.stages import run as stages
from cliplift.pipelines.stages.run import StageResult


@pytest.mark.parametrize("stopped_at", [1, 2, 4])
def test_a_stopped_run_stops_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    """Videos, shards and training are left out; what is tested is which runs are started."""
    started: list[Any] = []

    def run_stage(run: Any, *, command: list[str]) -> StageResult:
        started.append(run)
        stops = len(started) == stopped_at
        metrics = {"accuracy": 0.5}
        return StageResult(Path(run.output), metrics, finished=not stops, requeue=stops)

    monkeypatch.setattr(stages, "run_stage", run_stage)
    monkeypatch.setattr(demo, "_make_videos", lambda run, root: None)
    monkeypatch.setattr(demo, "_shard", lambda run, root, recipe: None)
    assert demo.demonstrate(DemoRun(output=str(tmp_path / "demo"))) is None
    assert len(started) == stopped_at
    assert not (tmp_path / "demo" / "report.html").exists()
