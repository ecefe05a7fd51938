"""Clips for the studies in miniature, and a way to start them."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cliplift.sharding.demo.synthetic import write_demo_videos


@pytest.fixture(scope="session")
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


@pytest.fixture
def study(repository: Path, videos: Path, tmp_path: Path) -> Callable[..., str]:
    """``study(script, *words)``: what a script of benchmarks/ prints, writing to ``tmp_path``."""

    def start(script: str, *words: str) -> str:
        command = [sys.executable, str(repository / "benchmarks" / script), "--output", str(tmp_path)]
        command += ["--data", str(videos / "clips.csv"), "--unlabelled", str(videos / "unlabelled"), *words]
        finished = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
        assert finished.returncode == 0, finished.stderr[-2000:]
        return finished.stdout

    return start
