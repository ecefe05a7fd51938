"""A sweep on the page: where its lines run, which trials are shown, and hostile or damaged records."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from cliplift.configs.runs import ReportRun
from cliplift.configs.sections import ConfigError
from cliplift.pipelines.report.page import run_report
from cliplift.pipelines.report.sweep import parallel_coordinates, sweep_page
from cliplift.pipelines.runs.sweeps import SweepRecord, TrialRecord, read_sweep, write_sweep

HOSTILE = "<script>alert(1)</script>\"'&"


@pytest.fixture(scope="module")
def pages(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    return load_module(Path(__file__).with_name("test_report.py"))


def trial(
    number: int, value: float | None, *, lr: object = 0.1, flip: object = True, steps: int = 90
) -> TrialRecord:
    values = {"optim.lr": lr, "flip": flip}
    return TrialRecord(
        number, values, steps, f"trial{number:03d}", value, "" if value is not None else "diverged"
    )


def record(*runs: TrialRecord, maximise: bool = True) -> SweepRecord:
    return SweepRecord("lr", "grid", "accuracy", maximise, runs)


def test_lines_cross_each_axis_at_their_value() -> None:
    """Axes at x = 60, 210, 360; 190 high from y = 34: lr on a logarithmic scale, a choice, the metric."""
    found = record(trial(0, 0.5, lr=0.001), trial(1, 0.7, lr=0.1), trial(2, 0.6, lr=0.01, flip=False))
    root = ET.fromstring(parallel_coordinates(found, found.best_first()))
    lines = {}
    for group in root.iter("g"):
        (path,) = group.iter("path")
        words = re.findall(r"[ML]([\d.]+) ([\d.]+)", path.attrib["d"])
        lines[group.findtext("title")] = [(float(x), float(y)) for x, y in words]
    foot, top = 224.0, 34.0
    true, false = top + 190 * 0.25, top + 190 * 0.75  # of the names in order of the alphabet: false, true
    assert lines == {
        "trial 1: 70.0 % with optim.lr=0.1, flip=true": [(60, top), (210, true), (360, top)],
        "trial 2: 60.0 % with optim.lr=0.01, flip=false": [
            (60, (top + foot) / 2),
            (210, false),
            (360, (top + foot) / 2),
        ],
        "trial 0: 50.0 % with optim.lr=0.001, flip=true": [(60, foot), (210, true), (360, foot)],
    }
    assert {"0.001", "0.01", "0.1", "true", "false", "accuracy", "optim.lr"} <= {
        t.text for t in root.iter("text")
    }


def test_steps_have_an_axis_where_they_differ() -> None:
    found = record(trial(0, 0.9, steps=10), trial(1, 0.5), trial(2, 0.6))
    ranked = found.best_first()
    assert [run.trial for run in ranked] == [2, 1, 0]  # what stopped early is below, however good it was
    assert "steps" in parallel_coordinates(found, ranked)
    assert "steps" not in parallel_coordinates(record(trial(1, 0.5)), ranked[:1])


def test_the_page_has_all_trials_and_the_runs_of_the_best(tmp_path: Path, pages: ModuleType) -> None:
    runs = [trial(k, k / 10, lr=10.0**-k) for k in range(7)]
    for run in runs:
        pages.write_run(
            tmp_path / "sweep" / run.folder,
            name=f"net {'abcdefg'[run.trial]}",
            config={"lr": run.trial},
            accuracy=0.5,
        )
    write_sweep(tmp_path / "sweep", record(*runs, trial(7, None)))
    output = tmp_path / "r.html"
    run_report(ReportRun(runs=(str(tmp_path / "sweep"),), output=str(output), max_clips=0))
    page = pages._Page(output)
    assert page.text.count("Resolved config") == 5
    assert "net c" in page.text
    assert "net b" not in page.text
    table = page.html.split('aria-label="Trials of lr"')[1].split("</table>")[0]
    assert re.findall(r'<th scope="row"[^>]*>.*?(\d)</th>', table) == list("65432107")
    assert "diverged" in table
    assert "1e-6" in page.text or "1e-06" in page.text


def test_hostile_values_stay_text(tmp_path: Path) -> None:
    values = {HOSTILE: HOSTILE}
    write_sweep(tmp_path, SweepRecord(HOSTILE, "grid", HOSTILE, True, (TrialRecord(0, values, 1, "a", 0.5),)))
    page = sweep_page(tmp_path)
    assert page is not None
    assert "<script>" not in page.chart
    ET.fromstring(page.chart)


@pytest.mark.parametrize(
    "damage",
    ["{", "[]", '{"name": 1}', '{"runs": 3}'],
)
def test_a_damaged_record_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "sweep.json").write_text(damage)
    with pytest.raises(ConfigError, match=r"sweep\.json is damaged"):
        read_sweep(tmp_path)


@pytest.mark.parametrize("folder", ["../elsewhere", "/etc"])
def test_a_record_names_no_folder_outside(tmp_path: Path, folder: str) -> None:
    write_sweep(tmp_path, record(trial(0, 0.5)))
    tree = json.loads((tmp_path / "sweep.json").read_text())
    tree["runs"][0]["folder"] = folder
    (tmp_path / "sweep.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="damaged"):
        read_sweep(tmp_path)


def test_no_sweep_and_one_without_numbers_have_no_section(tmp_path: Path) -> None:
    assert sweep_page(tmp_path) is None
    write_sweep(tmp_path, record(trial(0, None)))
    assert sweep_page(tmp_path) is None
