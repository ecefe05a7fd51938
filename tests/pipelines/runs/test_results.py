"""What a run says on the terminal: worded by hand here, from numbers chosen here."""

from __future__ import annotations

from pathlib import Path

import pytest

from cliplift.pipelines.runs.results import (
    commands_after,
    evaluation_line,
    metric_phrase,
    result_block,
)

FINETUNED = {
    "val_accuracy": 0.625,
    "val_chance": 0.25,
    "accuracy": 0.5714,
    "accuracy_low": 0.41,
    "accuracy_high": 0.728,
    "mean_class_accuracy": 0.5,
    "calibration_error": 0.1234,
    "chance": 0.25,
    "loss": 1.23456,
    "samples": 49.0,
}


@pytest.mark.parametrize(
    ("before", "ending"),
    [
        (None, ", best so far"),
        (0.5, ", best so far"),
        (0.57140001, " (best 57.1 %)"),
        (0.9, " (best 90.0 %)"),
    ],
)
def test_an_evaluation_is_one_line(before: float | None, ending: str) -> None:
    line = evaluation_line(25, {"accuracy": 0.5714, "loss": 1.2}, best_metric="accuracy", before=before)
    assert line == f"step 25: val accuracy 57.1 %, loss 1.2{ending}"


def test_an_evaluation_without_the_metric_that_counts_says_another_number() -> None:
    assert (
        evaluation_line(3, {"skill": -0.25}, best_metric="accuracy", before=None) == "step 3: val skill -0.25"
    )
    assert evaluation_line(3, {}, best_metric="accuracy", before=None) is None


def test_the_block_has_numbers_with_interval_and_chance_folder_and_commands() -> None:
    block = result_block(
        "mine",
        FINETUNED,
        best_metric="accuracy",
        folder="runs/mine",
        next_commands=["cliplift predict runs/mine VIDEO", "cliplift report runs/mine"],
    )
    assert block.splitlines() == [
        "mine: finished",
        "  accuracy 57.1 % (95 % interval 41.0 % to 72.8 %, chance 25.0 %)",
        "  val accuracy 62.5 % (chance 25.0 %)",
        "  mean class accuracy 50.0 %",
        "  calibration error 12.3 %",
        "  loss 1.235",
        "  written to runs/mine",
        "  next: cliplift predict runs/mine VIDEO",
        "        cliplift report runs/mine",
    ]


def test_several_runs_have_a_spread_and_never_the_mean_of_their_intervals() -> None:
    metrics = {"runs": 3.0, "accuracy": 0.5, "accuracy_sd": 0.02, "accuracy_low": 0.4, "accuracy_high": 0.6}
    assert metric_phrase("accuracy", metrics) == "accuracy 50.0 % (sd 2.0 % over 3 runs)"


def test_commands_can_be_pasted(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    assert commands_after("finetune", folder, offline_run=folder / "offline-run-1") == [
        f"cliplift predict '{folder}' VIDEO",
        f"cliplift report '{folder}'",
        f"wandb sync '{folder}/offline-run-1'",
    ]
    first, *_ = commands_after("transfer", "runs/a", offline_run=None)
    assert first == "cliplift finetune CONFIG initialise_from=runs/a"
