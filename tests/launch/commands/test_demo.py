"""The demo as a sequence of runs: which are started, what its table says, and what stops it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cliplift.configs.runs import DemoRun
from cliplift.configs.sections import ConfigError
from cliplift.launch.cli import main
from cliplift.launch.commands import demo
from cliplift.pipelines.report import page
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
        metrics = {"accuracy": 0.5, "chance": 0.1}
        return StageResult(Path(run.output), metrics, finished=not stops, requeue=stops)

    monkeypatch.setattr(stages, "run_stage", run_stage)
    monkeypatch.setattr(demo, "_make_videos", lambda run, root: None)
    monkeypatch.setattr(demo, "_shard", lambda run, root, recipe, **where: None)
    assert demo.demonstrate(DemoRun(output=str(tmp_path / "demo"))) is None
    assert len(started) == stopped_at
    assert not (tmp_path / "demo" / "report.html").exists()


# Test accuracies over the seeds 0, 1, 2, by recipe.
ACCURACIES: Mapping[str, tuple[float, ...]] = {
    "transfer": (0.50, 0.55, 0.60),
    "inflated": (0.40, 0.45, 0.50),
    "scratch": (0.20, 0.30, 0.25),
    "frames": (0.32, 0.32, 0.32),
}
MATCHING = {"matching_accuracy": 0.9, "matching_prior": 0.5, "held_out_clips": 48.0}


def _demonstrated(
    place: Path, monkeypatch: pytest.MonkeyPatch, *, motion: str, classes: int
) -> tuple[list[Any], dict[str, Any]]:
    """The runs that the demo starts, in place of which known numbers come back, and its facts."""
    started: list[Any] = []

    def run_stage(run: Any, *, command: list[str]) -> StageResult:
        started.append(run)
        if run.stage == "transfer":
            return StageResult(Path(run.output), MATCHING, finished=True, requeue=False)
        kind = next(kind for kind in ACCURACIES if kind in run.name)
        metrics = {"accuracy": ACCURACIES[kind][run.seed], "chance": 1 / classes}
        return StageResult(Path(run.output), metrics, finished=True, requeue=False)

    monkeypatch.setattr(stages, "run_stage", run_stage)
    monkeypatch.setattr(demo, "_make_videos", lambda run, root: None)
    monkeypatch.setattr(demo, "_shard", lambda run, root, recipe, **where: None)
    monkeypatch.setattr(page, "write_report", lambda **what: what["output"])
    run = DemoRun.model_validate({"output": str(place), "motion": motion})
    assert demo.demonstrate(run) == place / "report.html"
    return started, json.loads((place / page.DEMO).read_text())


def test_the_table_holds_every_method_and_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started, facts = _demonstrated(tmp_path, monkeypatch, motion="and_kind", classes=12)
    printed = capsys.readouterr().out
    expected = [
        r"3D from transfer +0\.550 +0\.050 +0\.500 0\.550 0\.600",
        r"3D as transfer starts, without it +0\.450 +0\.050 +0\.400 0\.450 0\.500",
        r"3D from scratch +0\.250 +0\.050 +0\.200 0\.300 0\.250",
        r"2D teacher, averaged frames +0\.320 +0\.000 +0\.320 0\.320 0\.320",
        r"a single frame, at best +0\.333$",
        r"chance +0\.083$",
    ]
    assert re.search(r"^time: \d+ s, \d+ CPU seconds$", printed, flags=re.MULTILINE)
    for line in expected:
        assert re.search(line, printed, flags=re.MULTILINE), line
    assert [row["method"] for row in facts["table"]] == [re.split(r" \+", line)[0] for line in expected]
    names = [run.name for run in started]
    assert names == ["demo-kinds-transfer"] + [
        f"demo-kinds-{way}"
        for way in ("from-transfer", "inflated", "from-scratch", "2d-frames")
        for _ in range(3)
    ]


@pytest.mark.parametrize("motion", ["and_kind", "only"])
def test_methods_differ_in_their_start_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, motion: str
) -> None:
    """Of the network that transfer starts from; of scratch where it is the same network, and not a smaller one."""
    started, _ = _demonstrated(tmp_path, monkeypatch, motion=motion, classes=12)
    start = "2d:imagenet" if motion == "and_kind" else None
    assert started[0].model.pretrained == start
    for transferred, other in zip(started[1:4], started[4:7], strict=True):
        assert transferred.initialise_from == str(tmp_path / "transfer")
        assert (other.initialise_from, other.model.pretrained) == (None, start)
        own = {"name": "", "output": "", "initialise_from": None, "model": None}
        assert transferred.model_copy(update=own) == other.model_copy(update=own)
        assert transferred.model == other.model.model_copy(update={"pretrained": None})
        assert transferred.model.name == started[0].model.name
        assert transferred.model.options == started[0].model.options


def test_motion_only_is_the_set_of_motions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, facts = _demonstrated(tmp_path, monkeypatch, motion="only", classes=10)
    assert {run.name for run in started} == {
        "demo-transfer", "demo-from-transfer", "demo-from-scratch", "demo-2d-frames",
    }  # fmt: skip
    assert [run.schedule.steps for run in started] == [200, *(300,) * 6, *(100,) * 3]
    assert DemoRun.model_validate({"motion": "only", "finetune_steps": 9}).scratch_steps is None
    # A frame knows nothing of the motion: chance is all it can reach.
    assert [row["method"] for row in facts["table"]][3:] == ["chance"]
    run = DemoRun.model_validate({"motion": "only"})
    assert (run.size_pixels, run.train_per_class, run.val_per_class, run.test_per_class) == (80, 60, 4, 20)
    assert (run.unlabelled, run.output) == (140, "runs/demo-motion")
    assert DemoRun.model_validate({"motion": "only", "unlabelled": 9}).unlabelled == 9


def test_a_folder_of_the_other_set_is_refused(tmp_path: Path) -> None:
    made = tmp_path / demo.MADE
    made.parent.mkdir()
    made.write_text(json.dumps({"settings": {"motion": "and_kind"}}))
    run = DemoRun.model_validate({"output": str(tmp_path), "motion": "only"})
    with pytest.raises(ConfigError, match="holds the demo with motion=and_kind") as error:
        demo.demonstrate(run)
    assert error.value.key == "output"


def test_a_wrong_set_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "motion=onyl"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "motion: 'onyl' should be 'and_kind' or 'only'" in said


@pytest.mark.slow
@pytest.mark.parametrize("motion", ["and_kind", "only"])
def test_the_whole_demo_in_miniature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], motion: str
) -> None:
    """From videos to the report, with a few clips and steps; what is finished is not done again."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    words = ["size_pixels=64", "train_per_class=2", "val_per_class=1", "test_per_class=1", "unlabelled=48",
             "transfer_steps=2", "finetune_steps=2", "scratch_steps=2", "frames_steps=2", "seeds=[0]"]  # fmt: skip
    command = ["demo", f"motion={motion}", f"output={tmp_path / 'demo'}", *words]
    assert main(command) == 0
    first = json.loads((tmp_path / "demo" / page.DEMO).read_text())
    assert "3D from transfer" in (tmp_path / "demo" / "report.html").read_text()
    capsys.readouterr()
    assert main(command) == 0
    again = json.loads((tmp_path / "demo" / page.DEMO).read_text())
    assert again["table"] == first["table"]
    assert "already finished" in capsys.readouterr().out
