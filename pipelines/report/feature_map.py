"""The report's map of features: one run's test clips in the plane, near where the network sees them as alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from cliplift.pipelines.evaluation.features import MAX_POINTS, plane, read_features
from cliplift.pipelines.report.charts import COLOURS, scatter
from cliplift.pipelines.runs.records import RunRecord

MAX_NAMED = 24


@dataclass(frozen=True)
class Embedding:
    """A chart, or a sentence on why there is none."""

    svg: Markup
    text: str
    names: Sequence[tuple[str, int]]


def embedding(run: RunRecord) -> Embedding | None:
    """The map of a run's labelled test clips; None for runs that kept no features."""
    predictions = run.predictions
    features = None if predictions is None else read_features(run.folder, rows=len(predictions.keys))
    if features is None or predictions is None:
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
