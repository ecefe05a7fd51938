"""The hardest clips of a report: counted over runs and experiments, by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from cliplift.pipelines.report.clips import EmbeddedClips
from cliplift.pipelines.report.hardest import hardest_clips
from cliplift.pipelines.runs.records import group_runs

CLASSES = ("walk", "run", "jump")
SURE = {0: [0.8, 0.1, 0.1], 1: [0.1, 0.8, 0.1], 2: [0.1, 0.1, 0.8]}


@pytest.fixture(scope="module")
def predicted(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    return load_module(Path(__file__).with_name("test_confidence.py"))


@pytest.fixture(scope="module")
def pages(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    return load_module(Path(__file__).with_name("test_report.py"))


@pytest.fixture
def embedded(pages: ModuleType) -> EmbeddedClips:
    return EmbeddedClips(lambda url, **_: pages._Clips([f"{i}" for i in range(4)]))


def test_by_runs_that_are_right_then_by_the_true_class(
    predicted: ModuleType, embedded: EmbeddedClips
) -> None:
    """Clip 0 is always right, clip 1 once, clip 2 never (jump twice, run once), clip 3 never and less probable."""
    answers = [(0, 0, 2, 1), (0, 1, 2, 1), (0, 0, 1, 1)]
    runs = [
        predicted.predicted([SURE[k] for k in said], [0, 1, 0, 0], name=name, classes=CLASSES, seed=seed)
        for seed, (said, name) in enumerate(zip(answers, ("a", "a", "b"), strict=True))
    ]
    runs[0].predictions.probabilities[3] = [0.05, 0.9, 0.05]  # type: ignore[union-attr]
    found = hardest_clips(group_runs(runs), embedded)
    assert [clip.key for clip in found] == ["3", "2", "1"]
    assert [(clip.right, clip.tests, clip.truth) for clip in found] == [
        (0, 3, "walk"),
        (0, 3, "walk"),
        (1, 3, "run"),
    ]
    assert [(clip.taken_for, clip.taken) for clip in found] == [("run", 3), ("jump", 2), ("walk", 2)]
    assert [round(clip.probability, 4) for clip in found] == [0.0833, 0.1, 0.3333]
    assert all(clip.source and clip.source.startswith("data:video/mp4;base64,") for clip in found)
    assert [clip.key for clip in hardest_clips(group_runs(runs), embedded, most=1)] == ["3"]


def test_one_run_alone_has_sample_clips_and_no_hardest(
    predicted: ModuleType, embedded: EmbeddedClips
) -> None:
    assert hardest_clips(group_runs([predicted.predicted([SURE[1]], [0], classes=CLASSES)]), embedded) == []


def test_on_the_page_with_what_they_are_taken_for(tmp_path: Path, pages: ModuleType) -> None:
    runs = [pages.write_run(tmp_path / f"s{k}", name=f"net-seed{k}", seed=k) for k in (0, 1)]
    page = pages.report(tmp_path, *runs, max_clips=4)
    assert "right in 0 of 2 runs, taken for run in 2; walk is 10 % probable" in page.text
    assert "right in 0 of 2 runs, taken for walk in 2; jump is 10 % probable" in page.text
    videos = [a for tag, a in page.elements if tag == "video"]
    assert len(videos) == 4 + 2
    assert [("autoplay" in a) for a in videos] == [True] * 4 + [False] * 2
    assert not [a for tag, a in page.elements if tag == "th" and "scope" not in a]
    alone = pages.report(tmp_path, pages.write_run(tmp_path / "alone"))
    assert "Hardest clips" not in alone.text
    none = pages.report(tmp_path, *runs, max_clips=0)
    assert none.attributes("video", "src") == []
