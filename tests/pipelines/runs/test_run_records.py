"""Reading run folders back, and telling seeds of one experiment from other experiments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cliplift.configs.sections import ConfigError
from cliplift.pipelines.runs.records import RunRecord, group_runs, read_history, read_run


def record(folder: str, *, name: str = "run", seed: int = 0, **config: Any) -> RunRecord:
    tree = {
        "stage": "finetune",
        "name": name,
        "seed": seed,
        "output": folder,
        "track": {"group": name},
        **config,
    }
    return RunRecord(
        folder=Path(folder),
        start={"stage": "finetune", "name": name},
        config=tree,
        config_text=yaml.safe_dump(tree),
        result=None,
        history={},
        predictions=None,
    )


def test_history_of_a_restarted_run_keeps_the_last_line_of_a_step(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "train/loss": 3.0},
        {"step": 2, "train/loss": 2.0, "train/lr": 0.1},
        {"step": 2, "eval/accuracy": 0.5},
        {"step": 2, "train/loss": 1.5},  # after the restart
        {"step": 3, "train/loss": float("nan"), "note": "text"},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "train/lo')
    history = read_history(path)
    assert history.keys() == {"train/loss", "train/lr", "eval/accuracy"}
    assert history["train/loss"].steps.tolist() == [1, 2, 3]
    assert history["train/loss"].values[:2].tolist() == [3.0, 1.5]
    assert np.isnan(history["train/loss"].values[2])
    assert history["eval/accuracy"].values.tolist() == [0.5]


DAMAGED_LINES = {
    "cut": b'{"step": 2, "train/lo',
    "not text": b"\xff\xfe\x00",
    "empty": b"",
    "no object": b"[1, 2]",
    "deep": b"[" * 100_000,
    "long integer": b'{"step": 2, "train/loss": ' + b"9" * 5000 + b"}",
    "too large for a float": b'{"step": 2, "train/loss": 1' + b"0" * 400 + b"}",
    "strange step": b'{"step": "two", "train/loss": 1}',
    "no step": b'{"train/loss": 1}',
}


@pytest.mark.parametrize("line", DAMAGED_LINES.values(), ids=DAMAGED_LINES)
def test_a_damaged_line_of_the_history_is_left_out_alone(
    tmp_path: Path, line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "train/loss": 3}\n' + line + b'\n{"step": 3, "train/loss": 1}\n')
    history = read_history(path)["train/loss"]
    assert history.steps.tolist() == [1, 3]
    assert history.values.tolist() == [3, 1]
    if b'step": "two' not in line and b'{"train' not in line:
        assert "the first is line 2" in caplog.text


@pytest.mark.parametrize(
    "damage", [b"", b'{"metrics": {"accu', b"\xff\x00", b"[]", b'{"metrics": 3, "classes": 4}']
)
@pytest.mark.parametrize("name", ["run.json", "result.json"])
def test_a_damaged_record_leaves_the_others(tmp_path: Path, name: str, damage: bytes) -> None:
    (tmp_path / "config.yaml").write_text("stage: finetune\nname: a\n")
    (tmp_path / "run.json").write_text('{"name": "a", "stage": "finetune", "seconds": 3}')
    (tmp_path / "result.json").write_text('{"metrics": {"accuracy": 0.5}, "seconds": 3}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 3}\n')
    (tmp_path / name).write_bytes(damage)
    found = read_run(tmp_path)
    assert found.stage == "finetune"
    assert found.metrics == ({"accuracy": 0.5} if name == "run.json" else {})
    assert found.history["train/loss"].values.tolist() == [3]
    assert found.classes() == ()


@pytest.mark.parametrize("text", ["{", "a: " + "[" * 5000, "a: 1\n b: 2", "a: \x00"])
def test_a_config_that_is_no_yaml_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml is not YAML"):
        read_run(tmp_path)


def test_metrics_without_a_number_are_absent(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"name": "a"}')
    (tmp_path / "result.json").write_text('{"metrics": {"accuracy": 0.5, "top5_accuracy": null, "auc": NaN}}')
    assert read_run(tmp_path).metrics == {"accuracy": 0.5}


def test_seeds_are_one_kind_and_another_setting_is_another() -> None:
    groups = group_runs(
        [
            record("a", name="scratch-seed0", seed=0, lr=0.1),
            record("b", name="scratch-seed1", seed=1, lr=0.1),
            record("c", name="warm", seed=0, lr=0.2),
        ]
    )
    assert [(g.label, [str(r.folder) for r in g.runs]) for g in groups] == [
        ("scratch", ["a", "b"]),
        ("warm", ["c"]),
    ]
    assert [g.colour for g in groups] == [0, 1]


def test_seeds_that_start_from_seeds_of_one_parent_are_one_kind() -> None:
    groups = group_runs(
        [
            record("t0", name="transfer-0", seed=0),
            record("t1", name="transfer-1", seed=1),
            record("f0", name="fine-0", seed=0, initialise_from="t0"),
            record("f1", name="fine-1", seed=1, initialise_from="t1"),
            record("f2", name="other", seed=1, initialise_from="elsewhere"),
            record("e0", name="test-0", run="f0"),
            record("e1", name="test-1", run="f1"),
        ]
    )
    kinds = [("transfer", 2), ("fine", 2), ("other", 1), ("test", 2)]
    assert [(g.label, len(g.runs)) for g in groups] == kinds


def test_kinds_of_one_name_are_told_apart_by_folder() -> None:
    groups = group_runs([record("runs/fast", lr=1), record("runs/slow", lr=2)])
    assert [g.label for g in groups] == ["run (fast)", "run (slow)"]


def test_given_labels_decide(tmp_path: Path) -> None:
    labels = {(tmp_path / name).resolve(): "method" for name in ("a", "b")}
    groups = group_runs([record(str(tmp_path / "a"), lr=1), record(str(tmp_path / "b"), lr=2)], labels)
    assert [(g.label, len(g.runs)) for g in groups] == [("method", 2)]
