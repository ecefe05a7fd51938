"""What an evaluation says of test clips in all that its weights were trained on, from the records of the runs alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.pipelines.runs.folder import RunFolder
from cliplift.pipelines.runs.leaks import (
    LEAK_CHECKS,
    LEAKS,
    LeakStatement,
    leak_record,
    leak_statements,
    lines_at_start,
    stored_statements,
)
from cliplift.pipelines.runs.trained_on import record_data
from cliplift.sharding.build.finalize import remove_videos
from cliplift.sharding.leaks.check import LeakReport, find_leaks
from cliplift.sharding.leaks.records import add_checks
from cliplift.sharding.read.generations import open_dataset
from cliplift.sharding.storage import open_store


@pytest.fixture
def pretraining(leaking: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(leaking, tmp_path / "pretraining"))


def run_folder(folder: Path, stage: str, dataset: Path | str, *, source: Path | None = None) -> Path:
    """A run as it leaves its records when it starts on a dataset."""
    folder.mkdir()
    start = {"initialise_from": str(source)} if source else {}
    (folder / "config.yaml").write_text(json.dumps({"stage": stage, **start}))
    record = {
        "stage": stage,
        "name": folder.name,
        "datasets": [str(dataset)],
        LEAK_CHECKS: leak_record([str(dataset)]),
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def statements(run: Path, tests_set: Path, split: str = "test") -> list[tuple[str, str]]:
    return [(one.status, one.text) for one in leak_statements(run, [str(tests_set)], split=split, fold=None)]


def test_the_lineage_of_a_finetuned_run(
    pretraining: Path, tests_set: Path, report: LeakReport, tmp_path: Path
) -> None:
    first = run_folder(tmp_path / "first", "pretrain", pretraining)
    second = run_folder(tmp_path / "second", "finetune", tests_set, source=first / "weights")
    own, unchecked = statements(second, tests_set)
    assert own[0] == "same"
    assert (unchecked[0], f"cliplift dedupe {pretraining} --against {tests_set}" in unchecked[1]) == (
        "unchecked",
        True,
    )
    add_checks(open_store(str(pretraining)), [report.check])
    _, since = statements(second, tests_set)
    assert since[0] == "found", "the search was made after the training"
    assert "a search made since found 2 videos of tested (test)" in since[1]
    # Trained again, with what was found in it, and once more without.
    third = run_folder(tmp_path / "third", "pretrain", pretraining)
    assert [status for status, _ in statements(third, tests_set)] == ["found"]
    before = open_dataset(str(pretraining))[1].fingerprint
    remove_videos(str(pretraining), report.check.videos)
    fourth = run_folder(tmp_path / "fourth", "pretrain", f"{pretraining}@2")
    ((status, text),) = statements(fourth, tests_set)
    assert (status, "the 2 videos that were found were removed before" in text) == ("removed", True)
    assert [status for status, _ in statements(third, tests_set)] == ["found"], "what it was trained on stays"
    (line,) = lines_at_start(leak_record([f"{pretraining}@2"]))
    after = open_dataset(str(pretraining))[1].fingerprint
    assert after != before
    assert f"fingerprint {after[:12]}, without 2 videos that hold clips of tested (test)" in line
    assert [status for status, _ in statements(fourth, tests_set, "train")] == ["unchecked"], "another split"


@pytest.mark.slow
def test_nothing_found_and_nothing_known(
    tests_set: Path, tmp_path: Path, make_set: Callable[..., Path], dark_clip: bytes
) -> None:
    other = make_set(tmp_path / "other", "other", {"x": ("train", dark_clip)})
    add_checks(open_store(str(other)), [find_leaks(str(other), str(tests_set), workers=1).check])
    run = run_folder(tmp_path / "run", "pretrain", other, source=tmp_path / "elsewhere")
    clean, unknown = statements(run, tests_set)
    assert clean == (
        "clean", f"pretrain of run on {other}: searched for tested (test), nothing was found"
    )  # fmt: skip
    assert unknown == (
        "unknown",
        f"what the weights of {tmp_path / 'elsewhere'} were trained on is not known",
    )
    shutil.rmtree(other)
    assert [status for status, _ in statements(run, tests_set)] == ["clean", "unknown"], (
        "the run's own record says it"
    )


def test_circles_and_damaged_records_end(tests_set: Path, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", "pretrain", tmp_path / "gone", source=tmp_path / "run")
    assert [status for status, _ in statements(run, tests_set)] == ["unknown"]
    for checks in (3, [{"dataset": "x"}], [{"dataset": "x", "known": {"shards": 3}}], [7]):
        (run / "run.json").write_text(
            json.dumps({"stage": "pretrain", "datasets": [str(tests_set)], LEAK_CHECKS: checks})
        )
        assert [status for status, _ in statements(run, tests_set)] == ["same"]
    told = LeakStatement("clean", "x")
    rows = [{"status": "clean", "text": "x"}, {"status": "no", "text": "x"}, 3, {"text": "x"}]
    assert stored_statements({LEAKS: rows}) == [told]
    assert stored_statements({}) == []


def test_a_run_that_goes_on_keeps_what_was_known_when_it_began(
    pretraining: Path, report: LeakReport, tmp_path: Path, repository: Path
) -> None:
    words = [f"data.shards={pretraining}", f"output={tmp_path / 'run'}", "data.where=frames > 60"]
    run = load_run(repository / "configs/pretrain/demo.yaml", RUNS, words).run
    folder = RunFolder.create(run.output, writes=True)  # type: ignore[attr-defined]
    (said,) = record_data(run, folder)  # type: ignore[arg-type]
    assert said == f"{pretraining}: 'frames > 60' leaves 5 of 7 clips of train"
    record = folder.start_record() or {}
    assert record["filtered"] == [
        {"dataset": str(pretraining), "split": "train", "left": 5, "clips": 7, "classes": {"c": [5, 7]}}
    ]
    add_checks(open_store(str(pretraining)), [report.check])
    assert len(record_data(run, folder)) == 1  # type: ignore[arg-type]
    assert (folder.start_record() or {})[LEAK_CHECKS] == record[LEAK_CHECKS]
    again = load_run(repository / "configs/pretrain/demo.yaml", RUNS, [*words, "checkpoint.resume=never"]).run
    found = record_data(again, folder)[0]  # type: ignore[arg-type]
    assert "2 videos that hold clips of tested (test) are trained on; `cliplift dedupe" in found
