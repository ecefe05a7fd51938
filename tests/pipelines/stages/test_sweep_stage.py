"""A sweep of real runs: trained, chosen by validation clips alone, and shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cliplift.launch.cli import main
from cliplift.pipelines.runs.predictions import read_predictions
from cliplift.sharding.read.reader import ShardDataset


@pytest.mark.slow
def test_from_the_yaml_to_the_report(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "sweep"
    base = {
        "base": "finetune/demo_scratch",
        "data": {"shards": f"{place}/shards/actions", "workers": 0},
        "schedule": {"steps": 4},
        "engine": {"global_batch": 4},
        "track": {"wandb": "disabled"},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(base))
    sweep = {
        "stage": "sweep",
        "name": "lr",
        "output": str(output),
        "run": "mine.yaml",
        "method": "halving",
        "trials": 2,
        "factor": 2,
        "least_steps": 2,
        "parameters": {"optim.lr": {"low": 1e-4, "high": 1e-2, "scale": "log"}},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["finished"] is True
    assert [(row["trial"], row["steps"]) for row in found["runs"]][:1] == [(0, 2)]
    assert sorted(row["steps"] for row in found["runs"]) == [2, 2, 4]
    best = max(found["runs"], key=lambda row: row["steps"])
    short = [row["value"] for row in found["runs"] if row["steps"] == 2]
    assert next(r["value"] for r in found["runs"] if r["steps"] == 2 and r["trial"] == best["trial"]) == max(
        short
    )
    held_out = {ShardDataset(f"{place}/shards/actions", split="val").facts(i).key for i in range(10)}
    for row in found["runs"]:
        assert set(read_predictions(output / row["folder"] / "predictions.parquet").keys) == held_out
    assert main(["report", str(output), "max_clips=2"]) == 0
    page = (output / "report.html").read_text()
    assert "Parallel coordinates of 2 trials" in page
