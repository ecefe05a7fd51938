"""Rows of clips with their predictions for the tracker's tables."""

from __future__ import annotations

import numpy as np

from cliplift.pipelines.engine.task import ClipTable
from cliplift.pipelines.evaluation.evaluate import Predictions
from cliplift.pipelines.report.clips import ShardsByUrl, open_shard_dataset

COLUMNS = ("key", "clip", "true", "predicted", "probability")


def prediction_table(
    predictions: Predictions, *, split: str | None, fold: int | None, rows: int
) -> ClipTable | None:
    """Up to ``rows`` clips, the surest mistakes first, then the surest of the others. None without clips."""
    N = len(predictions.keys)
    if rows == 0 or N == 0 or not predictions.classes:
        return None
    guesses = predictions.probabilities.argmax(axis=1)
    sureness = predictions.probabilities.max(axis=1)
    wrong = (guesses != predictions.labels) & (predictions.labels >= 0)
    order = np.lexsort((-sureness, ~wrong))[:rows]
    shards = ShardsByUrl(open_shard_dataset, split=split, fold=fold)
    return COLUMNS, [_row(predictions, int(i), int(guesses[i]), shards) for i in order]


def _row(predictions: Predictions, i: int, guess: int, shards: ShardsByUrl) -> list[object]:
    label = int(predictions.labels[i])
    return [
        predictions.keys[i],
        shards.read(predictions.shard_urls[i], predictions.keys[i], int(predictions.sample_index[i])),
        predictions.classes[label] if label >= 0 else None,
        predictions.classes[guess],
        float(predictions.probabilities[i, guess]),
    ]
