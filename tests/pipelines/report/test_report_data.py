"""What a report says of the data of a run: test clips in training, and what a filter left of each class."""

from __future__ import annotations

import json
from pathlib import Path

from cliplift.pipelines.report.page import write_report


def written(
    folder: Path, *, start: dict[str, object], result: dict[str, object], where: str | None = None
) -> str:
    """The page of a finished run with these records."""
    folder.mkdir()
    (folder / "config.yaml").write_text(
        json.dumps({"stage": "finetune", "data": {"shards": ["s"], "where": where}})
    )
    (folder / "run.json").write_text(json.dumps({"stage": "finetune", "name": "one", **start}))
    metrics = {"accuracy": 0.5, "chance": 0.5}
    (folder / "result.json").write_text(json.dumps({"stage": "finetune", "metrics": metrics, **result}))
    return write_report(runs=[folder], output=folder / "r.html", title=None, max_clips=0).read_text()


def test_test_clips_in_training_and_filters(tmp_path: Path) -> None:
    rows = [
        {"status": "found", "text": "pretrain of a on <b> holds 2 videos"},
        {"status": "?", "text": "damaged"},
    ]
    left = {
        "dataset": "s",
        "split": "train",
        "left": 3,
        "clips": 8,
        "classes": {"walk": [2, 5], "jump": [1, 3]},
    }
    start = {"filtered": [left, {"left": 1}, 4]}
    page = written(tmp_path / "run", start=start, result={"leaks": rows}, where="motion > 0.1")
    assert "Test clips in training" in page
    assert "pretrain of a on &lt;b&gt; holds 2 videos" in page
    assert "damaged" not in page
    assert "<code>motion &gt; 0.1</code> leaves 3 of 8 clips of train of s" in page
    assert page.index("1/3") < page.index("2/5"), "the class that loses most comes first"


def test_a_run_without_either_has_neither(tmp_path: Path) -> None:
    page = written(tmp_path / "run", start={}, result={})
    assert "Test clips in training" not in page
    assert "<h3>Filters</h3>" not in page
