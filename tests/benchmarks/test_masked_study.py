"""The study of masked pretraining, in miniature: every kind of cell, once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

METHODS = (
    "scratch", "masked", "transfer", "random; probe", "masked; probe", "transfer; probe", "masked; attentive",
)  # fmt: skip


@pytest.mark.slow
def test_every_kind_of_cell_is_measured_once(study: Callable[..., str], tmp_path: Path) -> None:
    short = (
        "--seeds",
        "0",
        "--folds",
        "3",
        "--only-folds",
        "0",
        "--pretrain-steps",
        "2",
        "--finetune-steps",
        "2",
    )
    printed = study("masked_study.py", *short)
    rows = [json.loads(line) for line in (tmp_path / "masked.jsonl").read_text().splitlines()]
    assert [(row["fold"], row["method"]) for row in rows] == [(0, method) for method in METHODS]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert sum(line.startswith("{") for line in printed.splitlines()) == len(rows)
    # what is learned without labels has the same clips by either objective, and is learned once
    assert {row["without_labels_clips"] for row in rows if "without_labels_clips" in row} == {64}
    assert len(list((tmp_path / "runs").glob("without-labels-*"))) == 2
    assert len(list((tmp_path / "runs").glob("classifier-*"))) == 4
    assert study("masked_study.py", *short) == "", "a finished study does nothing"
    assert "| video_vit_tiny_8 |" not in study("masked_study.py", "--folds", "3", "--table"), (
        "of whole sets of folds"
    )
    assert study("masked_study.py", "--folds", "1", "--table").count("| video_vit_tiny_8 |") == len(METHODS)
