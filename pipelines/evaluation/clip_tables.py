"""Rows of clips with their predictions for the tracker's tables."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from cliplift.pipelines.runs.predictions import Predictions
from cliplift.pipelines.runs.tracking import ClipTable

COLUMNS = ("key", "clip", "true", "predicted", "probability")


class _Facts(Protocol):
    @property
    def key(self) -> str: ...


class ShardReader(Protocol):
    """What is needed of a shard dataset: samples by number, their keys, their mp4 bytes."""

    def __len__(self) -> int: ...

    def facts(self, i: int, /) -> _Facts: ...

    def read(self, i: int, /) -> bytes: ...


class OpenShards(Protocol):
    """How a shard dataset is opened: the samples of one split and fold, in the order predictions count them."""

    def __call__(self, url: str, *, split: str | None, fold: int | None) -> ShardReader: ...


def open_shard_dataset(url: str, *, split: str | None, fold: int | None) -> ShardReader:
    """A shard dataset by folder or URL."""
    from cliplift.sharding.read.reader import ShardDataset

    return ShardDataset(url, split=split, fold=fold)


class ShardsByUrl:
    """Datasets by URL, each opened once, or failing once, and searched by key where the numbers have moved."""

    def __init__(self, open_shards: OpenShards, *, split: str | None, fold: int | None) -> None:
        self._open, self._split, self._fold = open_shards, split, fold
        self._datasets: dict[str, ShardReader] = {}
        self._failed: dict[str, Exception] = {}
        self._places: dict[str, dict[str, int]] = {}

    def read(self, url: str, key: str, expected: int) -> bytes:
        """mp4 bytes of the sample ``key``; ``expected`` is where it probably is."""
        dataset = self._dataset(url)
        if expected < len(dataset) and dataset.facts(expected).key == key:
            return dataset.read(expected)
        if url not in self._places:
            self._places[url] = {dataset.facts(i).key: i for i in range(len(dataset))}
        if key not in self._places[url]:
            raise ValueError(f"{url} holds no sample {key!r}; the shards have been rebuilt since the run")
        return dataset.read(self._places[url][key])

    def _dataset(self, url: str) -> ShardReader:
        if url in self._failed:
            raise self._failed[url]
        if url not in self._datasets:
            try:
                self._datasets[url] = self._open(url, split=self._split, fold=self._fold)
            except (ValueError, OSError) as error:
                self._failed[url] = error
                raise
        return self._datasets[url]


def prediction_table(
    predictions: Predictions, *, split: str | None, fold: int | None, rows: int
) -> ClipTable | None:
    """Up to ``rows`` clips, the surest mistakes first, then the surest of the others. None without clips."""
    N = len(predictions.keys)
    if rows == 0 or N == 0 or not predictions.classes:
        return None
    guesses = predictions.predicted
    sureness = predictions.probabilities.max(axis=1)
    wrong = (guesses != predictions.labels) & predictions.labelled
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
