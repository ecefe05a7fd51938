"""Experiments beside each other: lineage with numbers, what differs in their configs, who leads on the same clips."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cliplift.pipelines.report.campaign import (
    config_differences,
    headline,
    lineage_graph,
    paired_differences,
    shortened,
)
from cliplift.pipelines.report.sections import curves
from cliplift.pipelines.runs.predictions import Predictions
from cliplift.pipelines.runs.records import RunGroup, RunRecord, Series, group_runs


def run(
    name: str,
    *,
    stage: str = "finetune",
    metrics: dict[str, float] | None = None,
    right: Sequence[bool] | None = None,
    keys: str = "abcdefghij",
    **config: object,
) -> RunRecord:
    predictions = None
    if right is not None:
        N = len(right)
        predictions = Predictions(
            keys=tuple(keys[:N]),
            video_ids=tuple(f"video {key}" for key in keys[:N]),
            shard_urls=("x",) * N,
            sample_index=np.arange(N),
            labels=np.zeros(N, dtype=np.int64),
            targets=None,
            probabilities=np.array([[0.9, 0.1] if each else [0.1, 0.9] for each in right], dtype=np.float32),
        )
    return RunRecord(
        folder=Path("/runs") / name,
        start={"stage": stage, "name": name},
        config={"name": name, "output": name, "data": {"shards": ["/shards/mine"]}, **config},
        config_text="",
        result={"metrics": metrics or {}},
        history={},
        predictions=predictions,
    )


def campaign() -> list[RunGroup]:
    return group_runs(
        [
            run("first", stage="transfer", metrics={"matching_accuracy": 0.7}, seed=0),
            run("net-seed0", metrics={"accuracy": 0.5}, seed=0, initialise_from="/runs/first", lr=0.1),
            run("net-seed1", metrics={"accuracy": 0.7}, seed=1, initialise_from="/runs/first", lr=0.1),
            run("scratch", metrics={"accuracy": 0.4}, seed=0, initialise_from=None, lr=0.2),
        ]
    )


def test_the_graph_goes_from_shards_over_parents_to_experiments_with_their_numbers() -> None:
    root = ET.fromstring(lineage_graph(campaign()))
    boxes = {
        texts[0].text: (float(box.attrib["x"]), texts[1].text)
        for g in root.iter("g")
        for box in g.iter("rect")
        if (texts := list(g.iter("text")))
    }
    assert set(boxes) == {"mine", "first", "net", "scratch"}
    assert boxes["first"][1] == "matching accuracy 70.0 %"
    assert boxes["net"][1] == "accuracy 60.0 % ± 14.1, 2 runs"
    assert boxes["mine"][0] < boxes["first"][0] < boxes["net"][0]
    assert boxes["scratch"][0] == boxes["first"][0]
    said = root.attrib["aria-label"]
    assert said == "Lineage: mine to first; mine to net; first to net; mine to scratch"
    assert len(list(root.iter("path"))) == 4
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    for box in root.iter("rect"):
        x, y, w, h = (float(box.attrib[key]) for key in ("x", "y", "width", "height"))
        assert x + w < width
        assert y + h < height


def test_no_graph_where_nothing_follows_from_another_run() -> None:
    assert lineage_graph(group_runs([run("a", lr=1), run("b", lr=2)])) == ""


def test_a_circle_of_damaged_configs_is_drawn_and_ends() -> None:
    groups = group_runs(
        [run("a", initialise_from="/runs/b", lr=1), run("b", initialise_from="/runs/a", lr=2)]
    )
    ET.fromstring(lineage_graph(groups))


def test_hostile_names_stay_text() -> None:
    evil = "<script>\"'&"
    groups = group_runs([run(evil, lr=1), run("b", initialise_from=f"/runs/{evil}", lr=2)])
    root = ET.fromstring(lineage_graph(groups))
    assert evil in [text.text for text in root.iter("text")]
    assert not list(root.iter("script"))


def test_configs_show_what_differs_between_experiments_and_no_more() -> None:
    (table,) = config_differences(campaign())
    assert table.stage == "finetune"
    assert [group.label for group in table.groups] == ["net", "scratch"]
    assert dict(table.rows) == {"initialise_from": ("first", "null"), "lr": ("0.1", "0.2")}


def test_the_lead_on_the_same_clips_is_paired() -> None:
    """Six of ten clips right against four of them: each clip that differs speaks for the first."""
    better, worse = [True] * 6 + [False] * 4, [True] * 4 + [False] * 6
    groups = group_runs([run("worse", right=worse, lr=1), run("better", right=better, lr=2)])
    (lead,) = paired_differences(groups)
    assert (lead.better.label, lead.other.label, lead.clips) == ("better", "worse", 10)
    assert lead.points == pytest.approx(0.2)
    assert 0 <= lead.low < 0.2 < lead.high  # no resample can be below zero: no clip speaks for the other
    assert not lead.is_clear  # but one in ten resamples (0.8 to the tenth) has none that differs
    clear = group_runs([run("worse", right=[False] * 10, lr=1), run("better", right=better, lr=2)])
    assert paired_differences(clear)[0].is_clear


def test_seeds_are_averaged_clip_by_clip() -> None:
    groups = group_runs(
        [
            run("net-0", right=[True, False, False], seed=0, lr=1),
            run("net-1", right=[True, True, False], seed=1, lr=1),
            run("none", right=[False, False, False], lr=2),
        ]
    )
    (lead,) = paired_differences(groups)
    assert lead.points == pytest.approx((1 + 0.5 + 0) / 3)


def test_other_clips_are_not_compared() -> None:
    groups = group_runs([run("a", right=[True], lr=1), run("b", right=[False], keys="z", lr=2)])
    assert paired_differences(groups) == []


def test_headlines_and_long_names() -> None:
    (group,) = group_runs([run("a", metrics={"loss": 1.0})])
    assert headline(group) == ""
    assert shortened("x" * 30) == "x" * 30
    assert len(shortened("videomae-base-finetune-on-everything-seed12")) <= 30


def test_one_point_or_a_constant_has_no_chart() -> None:
    """Also not the main ones: an accuracy that was measured once stands in the table."""

    def series(*values: float) -> Series:
        return Series(np.arange(len(values), dtype=np.float64), np.array(values))

    history = {
        "train/loss": series(2.0, 1.0),
        "eval/accuracy": series(0.5),
        "train/lr": series(0.1, 0.1, 0.1),
    }
    (found,) = curves(group_runs([replace(run("net"), history=history)]))
    assert [panel.title for panel in (*found.main, *found.more)] == ["Loss"]
    del history["train/loss"]
    assert curves(group_runs([replace(run("net"), history=history)])) == []


def points_of(path: str) -> list[tuple[float, float]]:
    """Many points along an SVG path of M, H and C."""
    found: list[tuple[float, float]] = []
    for letter, text in re.findall(r"([MHC])([^MHC]*)", path):
        numbers = [float(word) for word in text.split()]
        x, y = found[-1] if found else (0.0, 0.0)
        if letter == "C":
            a, b, c = zip(numbers[0::2], numbers[1::2], strict=True)
            for t in np.linspace(0, 1, 60).tolist():
                weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
                corners = ((x, y), a, b, c)
                found.append(
                    (
                        sum(w * p[0] for w, p in zip(weights, corners, strict=True)),
                        sum(w * p[1] for w, p in zip(weights, corners, strict=True)),
                    )
                )
        elif letter == "H":
            found += [(x + (numbers[0] - x) * t, y) for t in np.linspace(0, 1, 60).tolist()]
        else:
            found.append((numbers[0], numbers[1]))
    return found


@pytest.mark.parametrize("seed", [None, *range(8)])
def test_no_edge_of_the_graph_is_hidden_behind_a_box(seed: int | None) -> None:
    """The shards lead to every finetuning past the boxes of the transfers between them."""
    groups = campaign()
    if seed is not None:
        rng = np.random.default_rng(seed)
        named = "abcdefghijkl"
        parents = [
            f"/runs/net {named[rng.integers(k)]}" if k and rng.random() < 0.7 else None
            for k in range(len(named))
        ]
        runs = [
            run(f"net {letter}", lr=letter, initialise_from=parent)
            for letter, parent in zip(named, parents, strict=True)
        ]
        groups = group_runs(runs)
    root = ET.fromstring(lineage_graph(groups))
    boxes = [
        tuple(float(box.attrib[key]) for key in ("x", "y", "width", "height")) for box in root.iter("rect")
    ]
    curves_drawn = [points_of(path.attrib["d"]) for path in root.iter("path")]
    assert len(curves_drawn) == root.attrib["aria-label"].count(" to ")
    for x, y in (point for points in curves_drawn for point in points):
        assert not any(left < x < left + w and top < y < top + h for left, top, w, h in boxes)
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    assert all(-1 <= x <= width and -1 <= y <= height for points in curves_drawn for x, y in points)
