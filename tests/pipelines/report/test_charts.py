"""Charts: where data land on the page, ticks, thinning, and gaps."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from cliplift.pipelines.report.charts import (
    Line,
    confusion_heatmap,
    line_chart,
    moving_mean,
    nice_ticks,
    short_number,
    thinned,
    value_strip,
)


def line(values: list[float], **options: object) -> Line:
    steps = np.arange(len(values), dtype=np.float64) * 10
    return Line("a run", 0, steps, np.array(values, dtype=np.float64), **options)  # type: ignore[arg-type]


def points(svg: str, kind: str = "line") -> list[tuple[float, float]]:
    (path,) = re.findall(rf'<path class="{kind}" d="([^"]+)"', svg)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)]


def test_points_lie_where_the_axes_say() -> None:
    svg = line_chart([line([0.0, 1.0, 0.5])], title="accuracy", percent=True)
    # The plot is 298 wide from x = 46 and 178 high from y = 8; 0 % is at its foot.
    assert points(svg) == [(46.0, 186.0), (195.0, 8.0), (344.0, 97.0)]
    labels = [t.text for t in ET.fromstring(svg).iter("text")]
    assert labels[:5] == ["0 %", "25 %", "50 %", "75 %", "100 %"]
    assert "20" in labels


def test_the_pen_is_lifted_over_missing_values() -> None:
    svg = line_chart([line([1.0, np.nan, 2.0, 3.0])], title="loss")
    (path,) = re.findall(r'<path class="line" d="([^"]+)"', svg)
    assert re.findall("[ML]", path) == ["M", "M", "L"]


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5, 0.5], [-1e-9, 1e9], [1e-7, 2e-7]])
def test_flat_single_and_extreme_lines_stay_inside(values: list[float]) -> None:
    svg = line_chart([line(values)], title="x")
    places = [float(v) for v in re.findall(r'c[xy]="([-\d.]+)"', svg)]
    assert places
    assert all(0 <= place <= 360 for place in places)


def test_a_chart_without_values_is_empty() -> None:
    assert line_chart([line([np.nan, np.nan])], title="x") == ""


def test_noisy_lines_get_their_mean_and_overlaid_ones_only_that() -> None:
    values = [float(i % 2) for i in range(100)]
    alone = line_chart([line(values, smoothed=True)], title="x", percent=True)
    assert 'class="raw"' in alone
    middle = [y for _, y in points(alone)[10:-10]]
    assert max(middle) - min(middle) < 40  # raw: 178
    assert 'class="raw"' not in line_chart([line(values, smoothed=True, overlaid=True)], title="x")


def test_ticks_are_round_and_cover_the_data() -> None:
    assert nice_ticks(0, 80, count=5) == [0, 20, 40, 60, 80]
    assert nice_ticks(0.31, 2.12, count=5) == [0, 0.5, 1, 1.5, 2, 2.5]
    assert nice_ticks(0, 0.02, count=5) == [0, 0.005, 0.01, 0.015, 0.02]
    ticks = nice_ticks(5, 5, count=5)
    assert ticks[0] < 5 < ticks[-1]


def test_short_numbers() -> None:
    numbers = (0, 3e-4, 2.5e-5, 0.03, 150, 20_000, 1_500_000, 2e9)
    assert [short_number(n) for n in numbers] == ["0", "3e-4", "2.5e-5", "0.03", "150", "20k", "1.5M", "2G"]


def test_thinning_keeps_means_and_gaps() -> None:
    steps = np.arange(1000, dtype=np.float64)
    values = np.where(steps < 500, 1.0, np.nan)
    few_steps, few = thinned(steps, values, 10)
    assert len(few) == len(few_steps) == 10
    assert few[:5].tolist() == [1.0] * 5
    assert np.isnan(few[5:]).all()
    assert few_steps.mean() == steps.mean()


def test_moving_mean_by_hand() -> None:
    assert moving_mean(np.array([3.0, 0.0, 3.0, 6.0]), 3).tolist() == [1.5, 2.0, 3.0, 4.5]
    with_gap = moving_mean(np.array([3.0, np.nan, 5.0]), 3)
    assert with_gap[[0, 2]].tolist() == [3.0, 5.0]
    assert np.isnan(with_gap[1])


def test_heat_map_shows_every_count_with_its_names() -> None:
    svg = confusion_heatmap(np.array([[3, 1], [0, 4]]), ["<walk>", "run"])
    root = ET.fromstring(svg)
    cells = [(rect.get("class"), rect.findtext("title")) for rect in root.iter("rect")]
    assert cells == [
        ("hit", "<walk> predicted as <walk>: 3 of 4"),
        ("miss", "<walk> predicted as run: 1 of 4"),
        ("hit", "run predicted as run: 4 of 4"),
    ]
    shares = [float(rect.get("fill-opacity", "")) for rect in root.iter("rect")]
    assert shares[1] < shares[0] < shares[2]
    assert {"3", "1", "4"} <= {text.text for text in root.iter("text")}


def test_large_heat_maps_drop_names_and_huge_ones_drop_out() -> None:
    assert not list(ET.fromstring(confusion_heatmap(np.eye(101, dtype=int), ["c"] * 101)).iter("text"))
    assert confusion_heatmap(np.ones((120, 120), dtype=int), ["c"] * 120) == ""


def test_value_strip_places_values_on_its_scale() -> None:
    svg = value_strip([0.25, 0.75], mean=0.5, sd=None, chance=0.125, colour=7)
    root = ET.fromstring(svg)
    assert [float(c.get("cx", "")) for c in root.iter("circle")] == [68.0, 192.0]
    assert "c1" in root.get("class", "").split()
    assert not list(root.iter("rect"))  # no spread, no band
