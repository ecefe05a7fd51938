"""Two streams, one answer: the predictions of an RGB run and of a flow run (or of any runs), fused sample by sample.

* ``probabilities``: the weighted mean of the class probabilities ("averaging", Simonyan and Zisserman, arXiv
  1406.2199, section 4; TSN, arXiv 1608.00859, weighs flow 1.5);
* ``l2_logits``: every stream's mean logits divided by their L2 norm, weighted and added (the two-stream results of
  Kalfaoglu et al., arXiv 2008.01232, as artest08/LateTemporalModeling3DCNN computes them).

The norm of logits depends on a constant that softmax loses, so ``l2_logits`` cannot be had from probabilities. It
needs the column ``logits``, which an evaluation writes when its views are averaged as logits.

N samples, K classes, S streams.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cliplift.configs.runs import FuseRun
from cliplift.configs.sections import ConfigError
from cliplift.pipelines.evaluation.evaluate import classification_metrics
from cliplift.pipelines.evaluation.metrics import top_k_accuracy
from cliplift.pipelines.runs.folder import RunFolder, classes_of
from cliplift.pipelines.runs.predictions import PREDICTIONS, Predictions, read_predictions
from cliplift.pipelines.runs.results import result_block

Scores = npt.NDArray[np.float64]
EVALUATION = "evaluate"  # folder of an evaluation inside its run's


@dataclass(frozen=True)
class Stream:
    """One run's predictions, with its class names where it recorded them, and the file they come from."""

    source: str
    rows: Predictions


def read_stream(folder: str) -> Stream:
    """The predictions in an evaluation's folder, in ``evaluate`` below a run's folder, or a Parquet file itself.

    Raises:
        ConfigError: no predictions there, or a file that is none.
    """
    given = Path(folder)
    places = (given, given / PREDICTIONS, given / EVALUATION / PREDICTIONS)
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise ConfigError(
            f"{folder!r} holds no {PREDICTIONS}",
            key="runs",
            value=folder,
            hint="run `cliplift evaluate` on it first",
        )
    rows = read_predictions(path)
    result = RunFolder(path.parent, writes=False).result() or {}
    return Stream(str(path), replace(rows, classes=classes_of(result)))


def align_streams(streams: Sequence[Stream]) -> list[Stream]:
    """The streams with their rows in the order of the first one's, which must be the same samples.

    Raises:
        ConfigError: a sample that is twice in a stream or not in all, another label, or other classes.
    """
    first = streams[0]
    for stream in streams:
        twice = [key for key, n in Counter(stream.rows.keys).items() if n > 1]
        if twice:
            raise _mismatch(stream, f"has {len(twice)} samples twice (first {twice[0]!r})")
    return [_reordered(stream, first) for stream in streams]


def _reordered(stream: Stream, first: Stream) -> Stream:
    rows, wanted = stream.rows, first.rows
    widths = rows.probabilities.shape[1], wanted.probabilities.shape[1]
    if widths[0] != widths[1] or (rows.classes and wanted.classes and rows.classes != wanted.classes):
        raise _mismatch(stream, f"has other classes ({widths[0]}) than {first.source} ({widths[1]})")
    places = {key: row for row, key in enumerate(rows.keys)}
    missing = [key for key in wanted.keys if key not in places]
    if missing or len(places) != len(wanted.keys):
        extra = sorted(set(places) - set(wanted.keys))
        raise _mismatch(
            stream,
            f"and {first.source} hold different samples: {len(missing)} missing, {len(extra)} more "
            f"(first {(missing or extra)[0]!r})",
        )
    order = np.array([places[key] for key in wanted.keys], dtype=np.int64)
    labels = rows.labels[order]
    other = np.flatnonzero(labels != wanted.labels)
    if len(other):
        row = int(other[0])
        raise _mismatch(
            stream,
            f"labels {wanted.keys[row]!r} {labels[row]}, and {first.source} {wanted.labels[row]}",
        )
    return Stream(stream.source, rows.rows(order))


def fused_probabilities(
    probabilities: Sequence[npt.NDArray[np.floating]], weights: Sequence[float]
) -> Scores:
    """Weighted mean of (N, K) class probabilities: rows still add up to 1."""
    total = sum(w * p.astype(np.float64) for w, p in zip(weights, probabilities, strict=True))
    mean: Scores = np.asarray(total) / sum(weights)
    return mean


def fused_logits(logits: Sequence[Scores], weights: Sequence[float]) -> Scores:
    """Weighted sum of (N, K) logits, each row divided by its L2 norm first; a row of zeros stays zero."""
    total = np.zeros_like(logits[0])
    for weight, scores in zip(weights, logits, strict=True):
        norm = np.linalg.norm(scores, axis=1, keepdims=True)
        total += weight * np.divide(scores, norm, out=np.zeros_like(scores), where=norm > 0)
    return total


def fuse(streams: Sequence[Stream], *, method: str, weights: Sequence[float]) -> Predictions:
    """One set of predictions from several, in the first one's order.

    Raises:
        ConfigError: streams that do not hold the same samples, or no logits for ``l2_logits``.
    """
    same = align_streams(streams)
    if method == "l2_logits":
        scores = fused_logits([_needed_logits(stream) for stream in same], weights)
        # Softmax keeps the order; of scores between -S and S it says nothing about confidence.
        exponents = np.exp(scores - scores.max(axis=1, keepdims=True))
        probabilities = exponents / exponents.sum(axis=1, keepdims=True)
    else:
        probabilities = fused_probabilities([stream.rows.probabilities for stream in same], weights)
    classes = next((stream.rows.classes for stream in same if stream.rows.classes), ())
    return replace(same[0].rows, probabilities=probabilities.astype(np.float32), classes=classes, logits=None)


def run_fuse(run: FuseRun, *, command: Sequence[str]) -> dict[str, float]:
    """``cliplift fuse``: predictions.parquet and result.json of the streams together, and the numbers printed.

    Accuracies need labels: samples with several labels or none are fused, and only counted.
    """
    started = time.monotonic()
    weights = run.weights or (1.0,) * len(run.runs)
    streams = [read_stream(folder) for folder in run.runs]
    predictions = fuse(streams, method=run.method, weights=weights)
    metrics = _metrics(predictions, align_streams(streams), run.method)
    folder = RunFolder.create(run.output, writes=True)
    folder.write_start(run, stage="fuse", name=" + ".join(run.runs), command=command, world_size=1)
    predictions.write(folder.predictions)
    title = f"{len(streams)} streams fused"
    print(result_block(title, metrics, best_metric="accuracy", folder=folder.path))
    folder.write_result(
        stage="fuse",
        metrics=metrics,
        seconds=time.monotonic() - started,
        classes=predictions.classes,
        fused=[stream.source for stream in streams],
        weights=list(weights),
        method=run.method,
    )
    return metrics


def _metrics(predictions: Predictions, streams: Sequence[Stream], method: str) -> dict[str, float]:
    """Those of an evaluation, and every stream's own accuracy; no calibration for what is no probability."""
    if not predictions.labelled.all():
        return {"samples": float(len(predictions.labels))}
    metrics = classification_metrics(predictions)
    if method == "l2_logits":
        del metrics["calibration_error"]
    alone = {
        f"stream_{n}_accuracy": top_k_accuracy(stream.rows.probabilities, predictions.labels, k=1)
        for n, stream in enumerate(streams, start=1)
    }
    return metrics | alone


def _needed_logits(stream: Stream) -> Scores:
    if stream.rows.logits is None:
        raise ConfigError(
            f"l2_logits needs logits, and {stream.source} has only probabilities",
            key="method",
            value="l2_logits",
            hint="evaluate with views.average=logits, or use method=probabilities",
        )
    return stream.rows.logits.astype(np.float64)


def _mismatch(stream: Stream, what: str) -> ConfigError:
    return ConfigError(
        f"{stream.source} {what}",
        key="runs",
        value=stream.source,
        hint="fuse evaluations of the same split of the same dataset",
    )
