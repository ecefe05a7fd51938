"""How scores are spread: histograms against counts by hand, and pages of clips over a score and around a threshold."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from cliplift.configs.where_reader import parse
from cliplift.launch import cli
from cliplift.sharding.scoring.histogram import histogram, text_histogram
from cliplift.sharding.scoring.sheet import Threshold, around, spread_over, thresholds

STILL, DAMAGED = ("k1", "k4", "k5", "k8"), "k6"


def test_bins_of_equal_width() -> None:
    found = histogram("x", np.array([0.0, 0.1, 1.0, 2.0, 2.5, 4.0, np.nan], dtype=np.float32), bins=4)
    assert found.edges == (0.0, 1.0, 2.0, 3.0, 4.0)
    assert found.counts == (2, 1, 2, 1)
    assert (found.clips, found.missing) == (6, 1)
    assert found.quantiles == pytest.approx({"least": 0, "5 %": 0, "median": 1.0, "95 %": 4, "most": 4})


def test_bins_of_equal_ratio_where_values_span_orders_of_magnitude() -> None:
    values = np.array([0, 0, 1e-3, 1e-2, 1e-1, 1.0])
    found = histogram("x", values, bins=4)
    assert found.edges == pytest.approx((0, 1e-3, 1e-2, 1e-1, 1))
    assert found.counts == (2, 1, 1, 2), "the last bin holds both its ends"


def test_true_and_false_empty_and_equal_columns() -> None:
    assert histogram("x", np.array([1, 0, 1], dtype=np.uint8)).counts == (1, 2)
    assert histogram("x", np.array([np.nan])).counts == ()
    assert text_histogram(histogram("x", np.array([np.nan]))) == "x: 0 clips, 1 without a value"
    assert sum(histogram("x", np.array([3.0, 3.0])).counts) == 2
    assert sum(histogram("x", np.array([0.0, 0.0, 0.0, 5.0])).counts) == 4


def test_text_marks_the_threshold_and_draws_a_bar_for_a_single_clip() -> None:
    text = text_histogram(histogram("x", np.array([0.0] * 999 + [2.0]), bins=2), marks=(1.5, 2.0))
    first, second = text.splitlines()[1:]
    assert first.endswith("999 " + "#" * 40)
    assert second.endswith("1 #  <- 1.5, 2")


def test_thresholds_of_an_expression() -> None:
    found = thresholds(
        parse("0.1 < motion <= 0.5 and not (height >= 240 or duplicate) and brightness > -1 and 1 < 2")
    )
    assert found == (
        Threshold("motion", ">", 0.1), Threshold("motion", "<=", 0.5), Threshold("height", ">=", 240.0),
        Threshold("brightness", ">", -1.0),
    )  # fmt: skip
    assert thresholds(parse("class == 'x' or motion > height")) == ()


def test_clips_near_a_threshold_and_over_a_range() -> None:
    values = np.array([5.0, 1.0, np.nan, 3.0, 2.0, 4.0], dtype=np.float32)
    out, left = around(values, Threshold("x", ">=", 3.0), 2)
    assert (out.tolist(), left.tolist()) == ([4, 1], [3, 5]), "nearest first"
    assert spread_over(values, 3).tolist() == [1, 3, 0]
    assert spread_over(values, 99).tolist() == [1, 4, 3, 5, 0]
    assert spread_over(np.array([np.nan]), 3).tolist() == []


def captions(page: Path) -> list[str]:
    return re.findall(r"<figcaption>([^<]*)</figcaption>", page.read_text())


def test_a_page_over_a_score(scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "motion.html"
    assert cli.main(["show", str(scored), "--score", "motion", "--output", str(page), "--clips", "20"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("motion: 8 clips, 1 without a value; least ")
    assert said.splitlines()[-1] == str(page)
    shown = [float(text.split()[1]) for text in captions(page)]
    assert len(shown) == 8
    assert shown == sorted(shown)
    assert cli.main(["show", str(scored), "--score", "sharpness"]) == 2
    assert re.search(
        r"no column 'sharpness'; it has brightness, .*cliplift score \S+ sharpness", capsys.readouterr().err
    )


def test_a_page_on_both_sides_of_a_threshold(
    scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "where.html"
    words = ["show", str(scored), "--where", "motion > 0.00098 and not duplicate", "--output", str(page)]
    assert cli.main([*words, "--clips", "3"]) == 0
    said = capsys.readouterr().out
    assert "train: 2 of 8 clips (25.0%)" in said
    assert re.search(r"<- 0\.00098$", said, flags=re.MULTILINE)
    html = page.read_text()
    out, left = html.split("<h3>Left out</h3>")[1].split("<h3>Left</h3>")
    names = [re.findall(r"(\d)\.mp4", part) for part in (out, left)]
    assert {f"k{n}" for n in names[0]} <= set(STILL)
    assert len(names[0]) == 3
    assert not {f"k{n}" for n in names[1]} & {*STILL, DAMAGED}
    assert cli.main([*words[:3], "not duplicate", "--output", str(page)]) == 0
    out, left = page.read_text().split("<h3>Left out</h3>")[1].split("<h3>Left</h3>")
    assert re.findall(r"(\d)\.mp4", out) == ["7"]
    assert cli.main([*words, "--score", "motion"]) == 2


@pytest.mark.slow
def test_real_offline_tables(
    unscored: Path, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(unscored, tmp_path / "set"))
    shutil.copytree(scored / "scores", folder / "scores")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (folder / "wandb.json").write_text('{"id": "b1b1b1b1"}')  # as a build that was logged leaves it
    assert cli.main(["score", str(folder), "motion", "brightness", "duplicate"]) == 0
    (run,) = (folder / "wandb").glob("offline-run-*-b1b1b1b1")
    tables = {path.name.split("_")[0]: json.loads(path.read_text()) for path in run.rglob("*.table.json")}
    assert set(tables) == {"scores", "scored"}
    rows = {
        row[0]: dict(zip(tables["scores"]["columns"], row, strict=True)) for row in tables["scores"]["data"]
    }
    assert set(rows) == {"motion", "brightness", "duplicate"}
    assert (rows["motion"]["clips"], rows["motion"]["failed"]) == (8, 1)
    clips = [dict(zip(tables["scored"]["columns"], row, strict=True)) for row in tables["scored"]["data"]]
    assert {clip["key"]: clip["duplicate"] for clip in clips}["k7"] == 1
    assert {clip["key"] for clip in clips if clip["motion"] is not None and clip["motion"] < 1e-6} == set(
        STILL
    )
    assert cli.main(["score", str(folder), "motion"]) == 0
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1, "nothing new is logged"
