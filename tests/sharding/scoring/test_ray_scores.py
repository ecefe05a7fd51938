"""Scores made on a real Ray cluster of this machine: the same columns as without one."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from cliplift.launch import cli
from cliplift.sharding.manifest import generation_file
from cliplift.sharding.scoring.ray_scores import score_on_ray
from cliplift.sharding.scoring.run import ScoreError, ScoreProgress, score_dataset

NAMES = ("motion", "brightness", "duplicate")
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


def columns(folder: Path) -> tuple[bytes, bytes]:
    head, values = (folder / generation_file(2, name) for name in ("scores.json", "scores.bin"))
    return head.read_bytes(), values.read_bytes()


@pytest.mark.slow
@needs_ray
def test_a_cluster_gives_the_same_bytes_and_scores_what_is_lacking(tmp_path: Path, unscored: Path) -> None:
    here, there = (Path(shutil.copytree(unscored, tmp_path / name)) for name in ("here", "there"))
    report = score_dataset(str(here), NAMES, workers=1)
    score_dataset(str(there), NAMES, workers=1, part=(0, 2))  # the others are left for the cluster
    seen: list[ScoreProgress] = []
    found = score_on_ray(str(there), NAMES, on_progress=seen.append)
    assert columns(there) == columns(here)
    assert found.columns == report.columns
    assert 0 < found.scored < report.scored
    assert seen[-1].shards_done == seen[-1].shards_total > 0
    assert score_on_ray(str(there), NAMES).scored == 0, "nothing is lacking, and no cluster is asked"


@pytest.mark.slow
@needs_ray
def test_a_damaged_shard_is_told_in_one_sentence(tmp_path: Path, unscored: Path) -> None:
    folder = Path(shutil.copytree(unscored, tmp_path / "set"))
    tar = sorted(folder.rglob("*.tar"))[0]
    data = bytearray(tar.read_bytes())
    data[600:700] = bytes(100)
    tar.write_bytes(data)
    with pytest.raises(ScoreError) as caught:
        score_on_ray(str(folder), ["brightness"])
    assert "\n" not in str(caught.value)
    assert tar.name in str(caught.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--engine", "ray", "--part", "0/2"], "leave --part and --workers out"),
        (["--engine", "ray", "--workers", "2"], "leave --part and --workers out"),
        (["--ray-address", "127.0.0.1:1"], "needs --engine ray"),
    ],
)
def test_what_does_not_fit_a_cluster_is_refused(
    unscored: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["score", str(unscored), "motion", *words]) == 2
    assert sentence in capsys.readouterr().err
