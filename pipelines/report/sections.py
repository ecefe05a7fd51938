"""What a report shows of groups of runs: curves, confusions, classes, a map of features, lineage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from cliplift.configs.sections import ConfigError
from cliplift.pipelines.evaluation.features import MAX_POINTS, plane
from cliplift.pipelines.evaluation.metrics import confusion_matrix, per_class_accuracy
from cliplift.pipelines.report.charts import COLOURS, Line, confusion_heatmap, line_chart, scatter
from cliplift.pipelines.runs.predictions import read_features
from cliplift.pipelines.runs.records import TRANSFER, RunGroup, RunRecord, Series


@dataclass(frozen=True)
class Panel:
    """One chart of curves."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class CurveSet:
    """The charts of the runs of one family of stages: those everybody looks at, and the rest."""

    title: str
    groups: tuple[RunGroup, ...]
    main: tuple[Panel, ...]
    more: tuple[Panel, ...]


_TITLES = {
    "loss": "Loss",
    "accuracy": "Accuracy",
    "matching_accuracy": "Matching accuracy",
    "mean_average_precision": "Mean average precision",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "clips_per_second": "Clips per second",
    "frames_per_second": "Frames per second",
    "data_wait_share": "Share of time waiting for data",
    "step_seconds": "Seconds per step",
    "recall_at_1": "R@1",
    "recall_at_5": "R@5",
    "auc": "AUC",
}
_PRIMARY = ("loss", "accuracy", "matching_accuracy", "mean_average_precision", "lr")
_NOT_CURVES = ("samples", "chance", "held_out_clips", "matching_prior")
MAX_NAMED = 24  # classes in the legend of the map of features
_SHARES = ("accuracy", "recall", "share", "precision")


def curves(groups: Sequence[RunGroup]) -> list[CurveSet]:
    """Charts of the logged numbers, the runs of a stage overlaid; transfer apart, as its loss is another one."""
    families = {
        "Classification": [g for g in groups if g.stage != TRANSFER],
        "Supervision transfer": [g for g in groups if g.stage == TRANSFER],
    }
    sets = [_curve_set(title, [g for g in members if _logged(g)]) for title, members in families.items()]
    return [curve_set for curve_set in sets if curve_set.main or curve_set.more]


def _curve_set(title: str, groups: Sequence[RunGroup]) -> CurveSet:
    quantities = sorted({_quantity(name) for group in groups for name in _logged(group)} - set(_NOT_CURVES))
    quantities = [q for q in quantities if not q.endswith(("_low", "_high"))]
    main = [_panel(groups, q) for q in _PRIMARY if q in quantities and _is_curve(groups, q)]
    more = [_panel(groups, q) for q in quantities if q not in _PRIMARY and _is_curve(groups, q)]
    return CurveSet(title, tuple(groups), tuple(p for p in main if p.svg), tuple(p for p in more if p.svg))


def _logged(group: RunGroup) -> set[str]:
    return {name for run in group.runs for name in run.history}


def _quantity(name: str) -> str:
    return name.partition("/")[2] or name


def _is_curve(groups: Sequence[RunGroup], quantity: str) -> bool:
    """Whether a number changes: a constant, or one that was logged once, is no curve."""
    found = [
        series.values[np.isfinite(series.values)]
        for group in groups
        for run in group.runs
        for name, series in run.history.items()
        if _quantity(name) == quantity
    ]
    return any(len(np.unique(values)) > 1 for values in found)


def _panel(groups: Sequence[RunGroup], quantity: str) -> Panel:
    title = _TITLES.get(quantity, quantity.replace("_", " ").capitalize())
    lines = [
        _line(group, run, name, series)
        for group in groups
        for run in group.runs
        for name, series in sorted(run.history.items(), reverse=True)  # training below validation
        if _quantity(name) == quantity
    ]
    lines += [mean for group in groups for mean in _means(group, quantity)]
    values = np.concatenate([line.values for line in lines])
    finite = values[np.isfinite(values)]
    share = any(word in quantity for word in _SHARES) and bool(((finite >= 0) & (finite <= 1)).all())
    return Panel(title, line_chart(lines, title=title, percent=share))


def _line(group: RunGroup, run: RunRecord, name: str, series: Series) -> Line:
    training = name.startswith("train/")
    return Line(
        label=f"{run.name}, {'training' if training else 'validation' if name.startswith('eval/') else name}",
        colour=group.colour,
        steps=series.steps,
        values=series.values,
        dashed=name.startswith("eval/") and any(n == f"train/{_quantity(name)}" for n in run.history),
        smoothed=training and _quantity(name) != "lr",
        overlaid=len(group.runs) > 1,
        faint=_shared_steps(group, name) is not None,
    )


def _means(group: RunGroup, quantity: str) -> list[Line]:
    """The mean of a group's runs at the steps that all of them logged, with one standard deviation to each side."""
    lines = []
    for name in sorted((n for n in _logged(group) if _quantity(n) == quantity), reverse=True):
        steps = _shared_steps(group, name)
        if steps is None:
            continue
        series = [run.history[name] for run in group.runs]
        values = np.stack([one.values[np.searchsorted(one.steps, steps)] for one in series])
        first = _line(group, group.runs[0], name, series[0])
        lines.append(
            replace(
                first,
                label=f"{group.label}, mean of {len(series)} runs, {first.label.rpartition(', ')[2]}",
                steps=steps,
                values=values.mean(axis=0),
                spread=values.std(axis=0, ddof=1),
                overlaid=False,
                faint=False,
            )
        )
    return lines


def _shared_steps(group: RunGroup, name: str) -> npt.NDArray[np.float64] | None:
    """Steps at which every run of a group of several logged a number; None where there are fewer than two."""
    series = [run.history[name] for run in group.runs if name in run.history]
    if len(series) < len(group.runs) or len(series) < 2:
        return None
    steps = reduce(np.intersect1d, (one.steps for one in series))
    return steps if len(steps) > 1 else None


@dataclass(frozen=True)
class ClassResult:
    """One class: how many of its samples were right, and what most of the others were taken for."""

    name: str
    right: int
    total: int
    share: float
    mistaken_for: str
    mistaken: int


@dataclass(frozen=True)
class Confusions:
    """Predictions of a group's runs, counted together."""

    group: RunGroup
    accuracy: float
    samples: int
    heatmap: Markup
    classes: tuple[ClassResult, ...]  # best first; classes without samples are left out
    worst: tuple[ClassResult, ...]
    pairs: tuple[tuple[str, str, int, float], ...]  # true, predicted, count, share of the true class


def confusions(group: RunGroup, *, most: int = 6) -> Confusions | None:
    """Count the predictions of a group, runs added up; None where there are none with single labels."""
    tables = [run.predictions for run in group.runs if run.predictions is not None]
    tables = [t for t in tables if t.labelled.any()]
    if not tables:
        return None
    classes = next(run.classes() for run in group.runs if run.predictions is not None)
    counts = sum(
        (
            confusion_matrix(t.predicted[t.labelled], t.labels[t.labelled], num_classes=len(classes))
            for t in tables
        ),
        start=np.zeros((len(classes), len(classes)), dtype=np.int64),
    )
    results = _class_results(counts, classes)
    return Confusions(
        group=group,
        accuracy=float(np.trace(counts) / counts.sum()),
        samples=int(counts.sum()),
        heatmap=confusion_heatmap(counts, classes),
        classes=results,
        worst=tuple(r for r in reversed(results) if r.share < 1)[:most],
        pairs=_confused_pairs(counts, classes, most=most),
    )


def _class_results(counts: npt.NDArray[np.int64], classes: Sequence[str]) -> tuple[ClassResult, ...]:
    shares = per_class_accuracy(counts)
    results = []
    for k, name in enumerate(classes):
        if math.isnan(shares[k]):
            continue
        others = counts[k].copy()
        others[k] = 0
        worst = int(others.argmax())
        found = int(others[worst])
        results.append(
            ClassResult(
                name,
                int(counts[k, k]),
                int(counts[k].sum()),
                float(shares[k]),
                classes[worst] if found else "",
                found,
            )
        )
    return tuple(sorted(results, key=lambda r: -r.share))


def _confused_pairs(
    counts: npt.NDArray[np.int64], classes: Sequence[str], *, most: int
) -> tuple[tuple[str, str, int, float], ...]:
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [(int(i) // len(classes), int(i) % len(classes)) for i in order]
    totals = counts.sum(axis=1)
    return tuple(
        (classes[a], classes[b], int(wrong[a, b]), float(wrong[a, b] / totals[a]))
        for a, b in pairs
        if wrong[a, b]
    )


@dataclass(frozen=True)
class Embedding:
    """A chart, or a sentence on why there is none."""

    svg: Markup
    text: str
    names: Sequence[tuple[str, int]]


def embedding(run: RunRecord) -> Embedding | None:
    """The map of a run's labelled test clips; None for runs that kept no features."""
    predictions = run.predictions
    if predictions is None:
        return None
    try:
        features = read_features(run.folder, rows=len(predictions.keys))
    except ConfigError as error:
        return Embedding(Markup(""), f"The map of features is left out: {error}.", ())
    if features is None:
        return None
    rows = np.flatnonzero(predictions.labelled)
    if len(rows) > MAX_POINTS:
        rows = rows[np.linspace(0, len(rows) - 1, MAX_POINTS).astype(int)]
    if len(rows) < 5:
        return None
    try:
        points = plane(features[rows])
    except ImportError:
        text = "The map of features needs scikit-learn: pip install 'cliplift[tsne]'."
        return Embedding(Markup(""), text, ())
    classes, labels = run.classes(), predictions.labels[rows].tolist()
    text = f"t-SNE of the classifier's input for {len(rows)} test clips of {run.name}, coloured by true class"
    present = sorted(set(labels))[:MAX_NAMED]
    return Embedding(
        scatter(points, labels, classes, title=text), text, [(classes[k], k % COLOURS) for k in present]
    )


def lineage(group: RunGroup, groups: Sequence[RunGroup]) -> list[tuple[str, str]]:
    """Where a group's weights and data come from: (what, value) in the order things happened."""
    run = group.runs[0]
    steps: list[tuple[str, str]] = []
    shards = run.setting("data.shards")
    shards = shards if isinstance(shards, list) else []
    urls = [str(s["url"]) if isinstance(s, Mapping) and "url" in s else str(s) for s in shards]
    fingerprint = str((run.result or {}).get("data_fingerprint") or "")
    if urls:
        mark = f" ({fingerprint[:12]})" if fingerprint else ""
        steps.append(("shards", " + ".join(Path(u).name or u for u in urls) + mark))
    if teacher := run.setting("teacher.name"):
        weights = run.setting("teacher.pretrained")
        steps.append(
            ("teacher", f"{teacher}, {weights} weights" if weights else f"{teacher}, random weights")
        )
    others = run.setting("teacher.others")
    for other in others if isinstance(others, list) else ():
        if isinstance(other, Mapping):
            steps.append(("teacher", str(other.get("name"))))
    evaluated = (run.result or {}).get("evaluated") or run.setting("run")
    source = run.setting("initialise_from") or evaluated
    if source:
        steps.append(("starts from", _known_as(str(source), groups)))
    elif pretrained := run.setting("model.pretrained"):
        is_path = "/" in str(pretrained) or Path(str(pretrained)).exists()
        steps.append(
            ("starts from", _known_as(str(pretrained), groups) if is_path else f"{pretrained} weights")
        )
    elif run.setting("model.name"):
        steps.append(("starts from", "random weights"))
    model = run.setting("model.name")
    steps.append((run.stage, f"{group.label}: {model}" if model else group.label))
    return steps


def _known_as(folder: str, groups: Sequence[RunGroup]) -> str:
    """The group a folder belongs to, else the folder itself."""
    wanted = Path(folder).resolve()
    for group in groups:
        if any(run.folder.resolve() == wanted for run in group.runs):
            return group.label
    return folder
