"""Calibration, precision-recall and ROC of a report, against scikit-learn and by hand."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from cliplift.pipelines.report.confidence import averaged, confidence
from cliplift.pipelines.runs.predictions import Predictions
from cliplift.pipelines.runs.records import RunGroup, RunRecord, group_runs


def predicted(
    probabilities: npt.ArrayLike, labels: Sequence[int], *, name: str = "net", classes: Sequence[str] = ("a", "b"),
    seed: int = 0,
) -> RunRecord:  # fmt: skip
    """A run that was tested; without probabilities, one that was not."""
    rows = np.asarray(probabilities, dtype=np.float32)
    N = len(rows)
    predictions = Predictions(
        keys=tuple(f"{i}" for i in range(N)),
        video_ids=tuple(f"video {i}" for i in range(N)),
        shard_urls=("x",) * N,
        sample_index=np.arange(N),
        labels=np.asarray(labels, dtype=np.int64),
        probabilities=rows,
    )
    return RunRecord(
        folder=Path("/runs") / f"{name}-seed{seed}",
        start={"stage": "finetune", "name": f"{name}-seed{seed}"},
        config={"name": name, "seed": seed, "lr": name},
        config_text="",
        result={"metrics": {}, "classes": list(classes)},
        history={},
        predictions=predictions if N else None,
    )


def group(*runs: RunRecord) -> RunGroup:
    (found,) = group_runs(list(runs))
    return found


def drawn(svg: str) -> list[tuple[float, float]]:
    """The points of the one line of a chart, as shares of its axes."""
    (path,) = re.findall(r'<path class="line(?: thin)?" d="([^"]+)"', svg)
    places = re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)
    return [((float(x) - 46) / 298, 1 - (float(y) - 8) / 178) for x, y in places]


def test_two_classes_by_hand() -> None:
    """Second class probable at 0.9, 0.83, 0.7, 0.63, 0.37; truly it, it, not, it, not."""
    second = np.array([0.9, 0.83, 0.7, 0.63, 0.37])
    found = confidence(group(predicted(np.stack([1 - second, second], axis=1), [1, 1, 0, 1, 0])))
    assert found is not None
    (row,) = found.classes
    assert (row.name, row.clips, found.of_two) == ("b", 3, True)
    # Precision at the three positives: 1/1, 2/2, 3/4. Of six pairs one is the wrong way round.
    assert row.average_precision == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert row.area_under_curve == pytest.approx(5 / 6)
    third = 1 / 3
    pr = [(0, 1), (third, 1), (2 * third, 1), (2 * third, 2 * third), (1, 3 / 4), (1, 3 / 5)]
    roc = [(0, 0), (0, third), (0, 2 * third), (1 / 2, 2 * third), (1 / 2, 1), (1, 1)]
    assert drawn(found.precision_recall) == [pytest.approx(point, abs=1e-3) for point in pr]
    assert drawn(found.roc) == [pytest.approx(point, abs=1e-3) for point in roc]
    assert found.accuracy == pytest.approx(4 / 5)
    assert found.confidence == pytest.approx((0.9 + 0.83 + 0.7 + 0.63 + 0.63) / 5)
    # One clip a bin but for two of confidence 0.63, both right: |1-.9| + |1-.83| + |0-.7| + |2-1.26|, over 5.
    assert found.calibration_error == pytest.approx((0.1 + 0.17 + 0.7 + 0.74) / 5, abs=1e-6)
    bins = {round(b.low * 15): (b.clips, round(b.confidence, 6), b.accuracy) for b in found.bins}
    assert bins == {9: (2, 0.63, 1.0), 10: (1, 0.7, 0.0), 12: (1, 0.83, 1.0), 13: (1, 0.9, 1.0)}
    ET.fromstring(found.diagram)


def test_many_classes_as_scikit_learn_says() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    K, N = 8, 300
    labels = rng.integers(K - 1, size=N)  # the last class does not occur
    probabilities = rng.dirichlet(np.ones(K), size=N).astype(np.float32)
    probabilities[np.arange(N), labels] += rng.random(N).astype(np.float32) / 4
    probabilities = np.round(probabilities / probabilities.sum(axis=1, keepdims=True), 2)  # with ties
    names = [f"class {k}" for k in range(K)]
    found = confidence(group(predicted(probabilities, labels.tolist(), classes=names)))
    assert found is not None
    assert {row.name for row in found.classes} == set(names[:-1])
    assert [row.colour for row in found.classes] == [0, 1, 2, 3, 4, None, None]
    for row in found.classes:
        k = names.index(row.name)
        scores = probabilities[:, k].astype(np.float64)
        assert row.average_precision == pytest.approx(sklearn.average_precision_score(labels == k, scores))
        assert row.area_under_curve == pytest.approx(sklearn.roc_auc_score(labels == k, scores))
    precisions = [row.average_precision for row in found.classes]
    assert precisions == sorted(precisions)
    assert found.mean_average_precision == pytest.approx(np.mean(precisions))


def test_runs_are_averaged_at_equal_rates() -> None:
    """The area under the mean curve is the mean of the areas."""
    rng = np.random.default_rng(1)
    labels = rng.integers(2, size=200)
    runs = []
    for seed, noise in enumerate((0.3, 1.2)):
        second = 1 / (1 + np.exp(-(labels - 0.5 + noise * rng.normal(size=200))))
        runs.append(predicted(np.stack([1 - second, second], axis=1), labels.tolist(), seed=seed))
    both, each = confidence(group(*runs)), [confidence(group(one)) for one in runs]
    assert both is not None
    alone = [one.classes[0] for one in each if one is not None]
    areas = [one.area_under_curve for one in alone]
    assert both.classes[0].area_under_curve == pytest.approx(np.mean(areas))
    assert both.classes[0].clips == 2 * labels.sum()
    x, y = np.array(drawn(both.roc)).T
    assert np.trapezoid(y, x) == pytest.approx(np.mean(areas), abs=0.01)
    x, y = np.array(drawn(both.precision_recall)).T
    assert np.trapezoid(y, x) == pytest.approx(np.mean([one.average_precision for one in alone]), abs=0.01)


def test_vertical_averages_by_hand() -> None:
    up = (np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0]))  # straight up, then across
    slope = (np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    x, y = averaged([up, slope], steps=False)
    assert y == pytest.approx((1 + x) / 2)
    x, y = averaged([(np.array([0.5, 1.0]), np.array([1.0, 0.4]))], steps=True)
    assert y[x <= 0.5] == pytest.approx(1.0)
    assert y[x > 0.51] == pytest.approx(0.4)


def test_unlabelled_clips_and_single_classes_have_no_curves() -> None:
    assert confidence(group(predicted([[0.5, 0.5]], [-1]))) is None
    assert confidence(group(predicted([], []))) is None
    found = confidence(group(predicted([[0.2, 0.8], [0.4, 0.6], [0.9, 0.1]], [1, 1, -1])))
    assert found is not None
    assert (found.samples, found.classes, found.roc) == (2, (), "")
