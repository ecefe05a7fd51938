"""The study of transfer, in miniature: every kind of cell, once."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

METHODS = ("frames", "scratch", "regression", "regression; probe")


@pytest.mark.slow
def test_every_kind_of_cell_is_measured_once(study: Callable[..., str], tmp_path: Path) -> None:
    words = (
        "--methods",
        *METHODS,
        "--shares",
        "1",
        "--seeds",
        "0",
        "--transfer-steps",
        "2",
        "--finetune-steps",
        "2",
    )
    printed = study("transfer_study.py", *words)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["fold"], row["method"]) for row in rows] == [(f, m) for f in range(3) for m in METHODS]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert sum(line.startswith("{") for line in printed.splitlines()) == len(rows)
    held_out = [list(csv.DictReader((tmp_path / f"fold{fold}.csv").open())) for fold in range(3)]
    tested = [{row["group"] for row in fold if row["split"] == "test"} for fold in held_out]
    assert [len(groups) for groups in tested] == [10, 10, 10]
    assert len(set().union(*tested)) == 30, "each group is tested once"
    assert not any(
        row["group"] in groups
        for groups, fold in zip(tested, held_out, strict=True)
        for row in fold
        if row["split"] == "train"
    )
    assert study("transfer_study.py", *words) == "", "a finished study does nothing"
    table = study("transfer_study.py", "--table")
    assert all(f"| t3d_tiny | {method} | 1 |" in table for method in METHODS)
