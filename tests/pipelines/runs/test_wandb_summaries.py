"""What W&B shows of a run in one line: the best and the last of its numbers; and the mean over folds and seeds."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cliplift.configs.load import load_run
from cliplift.configs.runs import TRAINING
from cliplift.configs.training import TrainingRun
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.runs.tracking import Tracker, log_aggregate, metric_summary

ALONE = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def offline(repository: Path, folder: Path) -> TrainingRun:
    words = [f"output={folder}", "track.wandb=offline", "track.group=campaign", "name=mine"]
    return load_run(repository / "configs/finetune/demo.yaml", TRAINING, words).run


@pytest.mark.parametrize(
    ("key", "summary"),
    [
        ("eval/accuracy", "max,last"),
        ("eval/mean_class_accuracy", "max,last"),
        ("eval/loss", "min,last"),
        ("train/loss", "min,last"),
        ("train/accuracy", None),  # of the batch: its largest value is chance
        ("speed/clips_per_second", None),
        ("step", None),
    ],
)
def test_which_end_is_better(key: str, summary: str | None) -> None:
    assert metric_summary(key) == summary


def kinds(records: list[Any], kind: str) -> list[Any]:
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def test_offline_files_say_how_numbers_are_summed_up(
    repository: Path, tmp_path: Path, wandb_files: ModuleType
) -> None:
    tracker = Tracker(offline(repository, tmp_path), stage="finetune", folder=tmp_path, topology=ALONE)
    for step, (loss, accuracy) in enumerate([(2.0, 0.25), (1.0, 0.75), (1.5, 0.5)]):
        tracker.log(step, {"eval/loss": loss, "eval/accuracy": accuracy, "optim/lr": 0.1})
    tracker.finish()
    records = wandb_files.finished_records(tmp_path)
    metrics = {m.name: m for m in kinds(records, "metric")}
    assert metrics["eval/accuracy"].summary.max
    assert not metrics["eval/accuracy"].summary.min
    assert metrics["eval/loss"].step_metric == "step"
    assert "optim/lr" not in metrics
    summary = wandb_files.wandb_summary(records)
    assert summary["eval/loss"] == {"min": 1.0, "last": 1.5}
    assert summary["eval/accuracy"] == {"max": 0.75, "last": 0.5}


def test_folds_and_seeds_have_a_run_of_their_mean(
    repository: Path, tmp_path: Path, wandb_files: ModuleType
) -> None:
    runs = {"mine-seed0": {"accuracy": 0.5, "loss": 1.0}, "mine-seed1": {"accuracy": 0.7, "only_here": 3.0}}
    log_aggregate(
        offline(repository, tmp_path),
        folder=tmp_path,
        metrics={"accuracy": 0.6, "accuracy_sd": 0.1},
        runs=runs,
    )
    records = wandb_files.finished_records(tmp_path)
    run = kinds(records, "run")[0]
    assert (run.job_type, run.run_group) == ("aggregate", "campaign")
    summed = wandb_files.wandb_summary(records)
    assert summed["accuracy"] == 0.6
    assert summed["accuracy_sd"] == 0.1
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/runs_*.table.json")
    stored = json.loads(table.read_text())
    assert stored["columns"] == ["run", "accuracy"]
    assert stored["data"] == [["mine-seed0", 0.5], ["mine-seed1", 0.7]]
