"""The clips a report shows: which ones, their predictions, and the bytes of each as a data URL."""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cliplift.pipelines.evaluation.clip_tables import OpenShards, ShardsByUrl, open_shard_dataset
from cliplift.pipelines.runs.predictions import Predictions
from cliplift.pipelines.runs.records import RunRecord

log = logging.getLogger(__name__)

MAX_CLIP_BYTES = 2 * 1024**2
MAX_PAGE_BYTES = 24 * 1024**2
TOP = 3


@dataclass(frozen=True)
class Guess:
    """One class and its probability in a prediction."""

    name: str
    probability: float
    correct: bool


@dataclass(frozen=True)
class SampleClip:
    """One clip with its true class, its best guesses and its bytes."""

    key: str
    video_id: str
    truth: str
    right: bool
    guesses: tuple[Guess, ...]
    source: str  # data:video/mp4;base64,...


@dataclass(frozen=True)
class SampleClips:
    """The clips shown and, in sentences, what could not be shown."""

    clips: tuple[SampleClip, ...]
    notes: tuple[str, ...]


def choose_samples(predictions: Predictions, *, count: int) -> list[int]:
    """Rows to show: up to half are mistakes, the surest first; the rest are right, in dataset order.

    Both are taken in turn from every true class, so that no class fills the page.
    """
    wrong = predictions.labelled & (predictions.predicted != predictions.labels)
    right = predictions.labelled & ~wrong
    surest = np.argsort(-predictions.probabilities.max(axis=1), kind="stable")
    wrong_rows = _in_turn([int(row) for row in surest if wrong[row]], predictions.labels)
    right_rows = _in_turn([int(row) for row in np.flatnonzero(right)], predictions.labels)
    mistakes = min(len(wrong_rows), max(count // 2, count - len(right_rows)))
    return wrong_rows[:mistakes] + right_rows[: count - mistakes]


def _in_turn(rows: Sequence[int], labels: npt.NDArray[np.int64]) -> list[int]:
    """The rows dealt class by class: first of every class, second of every class, ..."""
    turns: dict[int, int] = {}
    keyed = []
    for place, row in enumerate(rows):
        label = int(labels[row])
        turns[label] = turns.get(label, -1) + 1
        keyed.append((turns[label], place, row))
    return [row for _, _, row in sorted(keyed)]


class EmbeddedClips:
    """Reads clips of runs as data URLs, as many as a page holds; ``notes`` says what could not be shown.

    A clip that is too large or cannot be read is left out: a report about a run must not need the run's data to be
    still in place.
    """

    def __init__(self, open_shards: OpenShards = open_shard_dataset) -> None:
        self.notes: list[str] = []
        self._open = open_shards
        self._shards: dict[tuple[str | None, int | None], ShardsByUrl] = {}
        self._read: dict[tuple[str, str], str | None] = {}
        self._bytes = 0

    def source(self, run: RunRecord, row: int) -> str | None:
        """``data:video/mp4;base64,...`` of the clip in a row of a run's predictions; None where it is left out."""
        predictions = run.predictions
        assert predictions is not None
        place = predictions.shard_urls[row], predictions.keys[row]
        if place not in self._read:
            self._read[place] = self._source(run, *place, int(predictions.sample_index[row]))
        return self._read[place]

    def _source(self, run: RunRecord, url: str, key: str, number: int) -> str | None:
        fold = run.setting("data.fold")
        stored = _tested_split(run), fold if isinstance(fold, int) else None
        if stored not in self._shards:
            self._shards[stored] = ShardsByUrl(self._open, split=stored[0], fold=stored[1])
        try:
            data = self._shards[stored].read(url, key, number)
        except (ValueError, OSError) as error:  # moved, deleted or damaged shards
            log.warning("%s: clip %s is left out of the report: %s", run.name, key, error)
            self.notes.append(f"Clip {key} could not be read: {error}")
            return None
        if len(data) > MAX_CLIP_BYTES or self._bytes + len(data) > MAX_PAGE_BYTES:
            self.notes.append(f"Clip {key} was left out for its size, {len(data) / 1024**2:.1f} MiB.")
            return None
        self._bytes += len(data)
        return f"data:video/mp4;base64,{base64.b64encode(data).decode('ascii')}"


def sample_clips(run: RunRecord, embedded: EmbeddedClips, *, count: int) -> SampleClips:
    """The chosen clips of a run, those that can be read."""
    predictions, classes = run.predictions, run.classes()
    if predictions is None or count == 0:
        return SampleClips((), ())
    known = len(embedded.notes)
    chosen = [(row, embedded.source(run, row)) for row in choose_samples(predictions, count=count)]
    clips = tuple(_clip(predictions, row, classes, source) for row, source in chosen if source is not None)
    return SampleClips(clips, tuple(dict.fromkeys(embedded.notes[known:])))


def _tested_split(run: RunRecord) -> str | None:
    """The split a run's predictions are of: finetune names it ``test_split``, evaluate ``split``."""
    split = run.setting("test_split") or run.setting("split")
    if run.setting("data.val_share") and split == run.setting("data.val_split"):
        split = run.setting("data.split")  # a held-out share of the training split is stored in that split
    return None if split is None else str(split)


def _clip(predictions: Predictions, row: int, classes: Sequence[str], source: str) -> SampleClip:
    label, predicted = int(predictions.labels[row]), int(predictions.predicted[row])
    probabilities = predictions.probabilities[row]
    best = np.argsort(-probabilities, kind="stable")[:TOP]
    return SampleClip(
        key=predictions.keys[row],
        video_id=predictions.video_ids[row],
        truth=classes[label],
        right=label == predicted,
        guesses=tuple(Guess(classes[k], float(probabilities[k]), int(k) == label) for k in best),
        source=source,
    )
