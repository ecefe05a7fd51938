"""The study of transfer, in miniature: every kind of cell, once."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cliplift.sharding.demo.synthetic import write_demo_videos

METHODS = ("frames", "scratch", "regression", "regression; probe")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty labelled clips of two classes, each of a group of its own, in clips.csv, and some without labels."""
    folder = tmp_path_factory.mktemp("videos")
    write_demo_videos(
        folder, train_per_class=15, val_per_class=0, test_per_class=0, unlabelled=20, seconds=2.5
    )
    rows = [
        {"path": str(clip.relative_to(folder)), "label": label.name, "group": f"{label.name} {number}"}
        for label in sorted((folder / "labelled" / "train").iterdir())[:2]
        for number, clip in enumerate(sorted(label.glob("*.mp4")))
    ]
    with (folder / "clips.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ("path", "label", "group"))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def study(repository: Path, videos: Path, output: Path, *words: str) -> str:
    command = [sys.executable, str(repository / "benchmarks" / "transfer_study.py"), "--output", str(output)]
    command += ["--data", str(videos / "clips.csv"), "--unlabelled", str(videos / "unlabelled"), *words]
    finished = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout


@pytest.mark.slow
def test_every_kind_of_cell_is_measured_once(repository: Path, videos: Path, tmp_path: Path) -> None:
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
    printed = study(repository, videos, tmp_path, *words)
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
    assert study(repository, videos, tmp_path, *words) == "", "a finished study does nothing"
    table = study(repository, videos, tmp_path, "--table")
    assert all(f"| t3d_tiny | {method} | 1 |" in table for method in METHODS)
