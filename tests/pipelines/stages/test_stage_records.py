"""What a stage leaves behind while it trains: W&B and TensorBoard files read back, and a restart after SIGKILL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cliplift.configs.load import dump_run
from cliplift.models import from_pretrained
from cliplift.sharding.read.reader import ShardDataset

CLIPLIFT = [sys.executable, "-m", "cliplift.launch.cli"]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_offline_wandb_files_hold_what_the_jsonl_holds(transferred: Path, wandb_files: ModuleType) -> None:
    history = wandb_files.wandb_history(transferred)
    logged = [row for row in rows(transferred) if "train/loss" in row]
    assert logged
    for row in logged:
        assert history[row["step"]]["train/loss"] == pytest.approx(row["train/loss"], rel=1e-6)
    (run,) = {
        r.run.run_id: r.run
        for r in wandb_files.wandb_records(transferred)
        if r.WhichOneof("record_type") == "run"
    }.values()
    assert run.run_id == json.loads((transferred / "wandb.json").read_text())["id"]
    assert (run.project, run.job_type, run.run_group) == ("cliplift", "transfer", "demo-transfer")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["optim"]["lr"] == 1e-3


def test_wandb_shows_clips_lineage_and_the_code_state(finetuned: Path, wandb_files: ModuleType) -> None:
    history = wandb_files.wandb_history(finetuned)
    tables = {step: h["clips.path"] for step, h in history.items() if "clips.path" in h}
    assert sorted(tables) == [3, 6]
    stored = json.loads(next(finetuned.glob(f"wandb/*/files/{tables[3]}")).read_text())
    assert stored["columns"] == ["key", "clip", "true", "predicted", "probability"]
    dataset = ShardDataset(str(finetuned.parent / "shards" / "actions"), split="val")
    known = {dataset.facts(i).key: dataset.read(i) for i in range(len(dataset))}
    assert len(stored["data"]) == 3
    for key, _, true, predicted, probability in stored["data"]:
        assert key in known, "validation clips"
        assert {true, predicted} <= set(dataset.classes)
        assert 0 < probability <= 1
    records = list(wandb_files.wandb_records(finetuned))
    artifacts = [r.artifact for r in records if r.WhichOneof("record_type") == "artifact"]
    first = next(a for a in artifacts if a.type == "run_table")
    clips = [Path(e.local_path) for e in first.manifest.contents if e.path.endswith(".mp4")]
    assert all(path.is_relative_to(finetuned) for path in clips), "the folder can be synced from elsewhere"
    assert {path.read_bytes() for path in clips} == {known[row[0]] for row in stored["data"]}
    config: dict[str, Any] = {}
    for record in records:
        kind = record.WhichOneof("record_type")
        items = (
            record.run.config.update if kind == "run" else record.config.update if kind == "config" else ()
        )
        config |= {item.key: json.loads(item.value_json) for item in items}
    assert (
        config["data_fingerprint"] == json.loads((finetuned / "result.json").read_text())["data_fingerprint"]
    )
    assert config["environment"]["torch_version"] == torch.__version__
    assert "git_commit" in config["environment"]
    (model,) = [a for a in artifacts if a.type == "model"]
    assert any((finetuned / "weights").absolute().as_uri() in e.ref for e in model.manifest.contents), (
        "by reference"
    )


def test_tensorboard_files_hold_what_the_jsonl_holds(finetuned: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finetuned / "tensorboard"))
    events.Reload()
    expected = {r["step"]: r["train/loss"] for r in rows(finetuned) if "train/loss" in r}
    assert expected
    assert {e.step: e.value for e in events.Scalars("train/loss")} == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_kill_9_and_restart_equals_an_unbroken_run(
    place: Path, load: Callable[..., Any], wandb_files: ModuleType
) -> None:
    """Same losses to the last bit, same W&B run, every step once; each start is a process of its own."""
    configs = {}
    for output in ("unbroken", "killed"):
        run = load("transfer/demo", output, "schedule.steps=12", "engine.global_batch=8",
                   "correspondence.negatives_per_clip=2", "checkpoint.every_steps=4",
                   "track.every_steps=1", "track.wandb=offline")  # fmt: skip
        configs[output] = place / f"{output}.yaml"
        configs[output].write_text(dump_run(run))

    # Each with a W&B service of its own, which dies with it: this process's would go on holding the run.
    environment = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}

    def start(output: str) -> subprocess.Popen[bytes]:
        command = [*CLIPLIFT, "transfer", str(configs[output])]
        return subprocess.Popen(command, env=environment, stdout=-3, stderr=-3)

    assert start("unbroken").wait() == 0
    process = start("killed")
    deadline = time.monotonic() + 200
    while not (place / "killed" / "checkpoints" / "step_00000004").is_dir():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (place / "killed" / "result.json").exists(), "it was killed before the end"
    first_id = json.loads((place / "killed" / "wandb.json").read_text())["id"]
    assert start("killed").wait() == 0
    losses = [
        [(r["step"], r["train/loss"]) for r in rows(place / f) if "train/loss" in r]
        for f in ("unbroken", "killed")
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[1]] == list(range(1, 13))
    ids = {
        r.run.run_id
        for r in wandb_files.wandb_records(place / "killed")
        if r.WhichOneof("record_type") == "run"
    }
    assert ids == {first_id}
    a, b = (from_pretrained(place / f / "weights").state_dict() for f in ("unbroken", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
