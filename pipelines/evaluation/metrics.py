"""Metrics of classification, multi-label tagging, matching and retrieval: pure functions on host arrays.

Every number comes from exact counts over all samples given, so it cannot depend on batch size or on the number
of ranks. Scores that are not numbers raise instead of being ranked: a diverged network has no accuracy.

N samples, K classes, Q queries, M candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.floating]
Integers = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


class MetricError(ValueError):
    """The arrays cannot be scored; the message names the shape, row or value at fault."""


def top_k_accuracy(scores: Scores, labels: Integers, *, k: int) -> float:
    """Share of samples whose class is among the ``k`` best scored.

    Args:
        scores: (N, K), higher is better; logits or probabilities.
        labels: (N,) classes, 0 to K - 1.
        k: ties go to the lower class number, so ``k=1`` is exactly the accuracy of ``argmax``.

    Raises:
        MetricError: wrong shapes, a label outside the classes, scores that are NaN, or k outside 1 to K.
    """
    scores, labels = _check_labels(scores, labels)
    K = scores.shape[1]
    if not 1 <= k <= K:
        raise MetricError(f"k={k} needs 1 to {K} classes")
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    ahead = (scores > own) | ((scores == own) & (np.arange(K) < labels[:, None]))
    return float(np.count_nonzero(ahead.sum(axis=1) < k) / len(labels))


def confusion_matrix(predicted: Integers, labels: Integers, *, num_classes: int) -> Counts:
    """Counts (K, K): row is the true class, column the predicted one.

    Raises:
        MetricError: the arrays differ in length, or hold a class outside 0 to K - 1.
    """
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    if predicted.shape != labels.shape or labels.ndim != 1:
        raise MetricError(
            f"predicted {predicted.shape} and labels {labels.shape} must be lists of equal length"
        )
    _check_classes(labels, num_classes, "label")
    _check_classes(predicted, num_classes, "predicted class")
    cells = labels.astype(np.int64) * num_classes + predicted.astype(np.int64)
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.int64)


def per_class_accuracy(confusion: Counts) -> Floats:
    """Recall of every class (K,), from a confusion matrix; NaN for a class without samples."""
    totals = confusion.sum(axis=1)
    shares = np.full(len(totals), np.nan)
    np.divide(np.diag(confusion), totals, out=shares, where=totals > 0)
    return shares


def mean_class_accuracy(confusion: Counts) -> float:
    """Mean recall over the classes that have samples (macro accuracy)."""
    if confusion.sum() == 0:
        raise MetricError("the confusion matrix counts no sample")
    return float(np.nanmean(per_class_accuracy(confusion)))


def average_precision(scores: Scores, targets: npt.ArrayLike) -> float:
    """Area under the precision-recall steps of one class: sum of (R_n - R_(n-1)) P_n over distinct scores.

    Args:
        scores: (N,), higher is better; equal scores enter together, so their order cannot matter.
        targets: (N,) 1 for positives, 0 for negatives.

    Raises:
        MetricError: no positive among the targets.
    """
    recall, precision = precision_recall_curve(scores, targets)
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def precision_recall_curve(scores: Scores, targets: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Recall and precision, each (M,), when the M distinct scores are taken one after the other, the highest first.

    Args:
        scores: (N,), higher is better; equal scores enter together.
        targets: (N,) 1 for positives, 0 for negatives.

    Raises:
        MetricError: no positive among the targets.
    """
    scores, positive = _binary(scores, targets)
    total = int(positive.sum())
    if total == 0:
        raise MetricError("average precision needs at least one positive")
    hits, taken = _at_distinct_scores(scores, positive)
    return hits / total, hits / taken


def roc_curve(scores: Scores, targets: npt.ArrayLike) -> tuple[Floats, Floats]:
    """False and true positive rate, each (M + 1,): from (0, 0) over the M distinct scores, highest first, to (1, 1).

    The straight lines between the points are the expected rates where ties are taken in random order, so the area
    under them is :func:`area_under_curve`.

    Args:
        scores: (N,), higher is more positive.
        targets: (N,) 1 or 0.

    Raises:
        MetricError: only one of the two kinds is present.
    """
    scores, positive = _binary(scores, targets)
    positives, negatives = _of_both_kinds(positive, "a ROC curve")
    hits, taken = _at_distinct_scores(scores, positive)
    return np.append(0.0, (taken - hits) / negatives), np.append(0.0, hits / positives)


def mean_average_precision(scores: Scores, targets: npt.ArrayLike) -> float:
    """Mean of the average precisions of the classes that have a positive.

    Args:
        scores: (N, K), higher is better.
        targets: (N, K) 1 where the sample has the class, else 0.

    Raises:
        MetricError: wrong shapes, or no positive at all.
    """
    scores, positive = _multi_label(scores, targets)
    present = np.flatnonzero(positive.any(axis=0))
    if len(present) == 0:
        raise MetricError("mean average precision needs at least one positive")
    return float(np.mean([average_precision(scores[:, c], positive[:, c]) for c in present]))


def global_average_precision(scores: Scores, targets: npt.ArrayLike, *, top: int = 20) -> float:
    """GAP of YouTube-8M: the ``top`` best classes of every sample, pooled into one ranked list.

    Recall counts all positives, including those outside the samples' ``top`` classes (the measure of the
    YouTube-8M challenge, which uses top = 20).

    Args:
        scores: (N, K) confidences comparable between samples.
        targets: (N, K) 1 where the sample has the class, else 0.
    """
    scores, positive = _multi_label(scores, targets)
    total = int(positive.sum())
    if total == 0:
        raise MetricError("global average precision needs at least one positive")
    if top < 1:
        raise MetricError(f"top={top} must be at least 1")
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    hits, taken = _at_distinct_scores(
        np.take_along_axis(scores, best, axis=1).ravel(), np.take_along_axis(positive, best, axis=1).ravel()
    )
    return float(np.sum(np.diff(hits / total, prepend=0.0) * (hits / taken)))


def area_under_curve(scores: Scores, targets: npt.ArrayLike) -> float:
    """Area under the ROC curve: the chance that a positive is scored above a negative; a tie counts one half.

    Args:
        scores: (N,), higher is more positive.
        targets: (N,) 1 or 0.

    Raises:
        MetricError: only one of the two kinds is present.
    """
    scores, positive = _binary(scores, targets)
    positives, negatives = _of_both_kinds(positive, "AUC")
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(sizes)
    mean_rank = last_rank - (sizes - 1) / 2.0  # ranks count from 1, ties share their mean (Mann-Whitney)
    rank_sum = mean_rank[group][positive].sum()
    return float((rank_sum - positives * (positives + 1) / 2.0) / (positives * negatives))


def log_loss(probabilities: Scores, labels: Integers) -> float:
    """Mean of -log of the probability of the true class, in nats; a probability of 0 counts as the smallest float.

    Args:
        probabilities: (N, K), rows that sum to one.
        labels: (N,) classes, 0 to K - 1.

    Raises:
        MetricError: wrong shapes, a label outside the classes, or a value outside 0 to 1.
    """
    probabilities, labels = _check_labels(probabilities, labels)
    if probabilities.min() < 0 or probabilities.max() > 1 + 1e-6:
        raise MetricError("log loss needs probabilities from 0 to 1")
    own = np.take_along_axis(probabilities.astype(np.float64), labels[:, None], axis=1)
    return float(-np.log(np.maximum(own, np.finfo(np.float32).tiny)).mean())


def two_class_metrics(scores: Scores, labels: Integers) -> dict[str, float]:
    """``precision``, ``recall`` and ``f1`` of class 1 at one half, and ``area_under_curve`` where both classes occur.

    Args:
        scores: (N,) probability of class 1; above one half is taken for class 1.
        labels: (N,) 0 or 1.

    A ratio of nothing (no sample taken for class 1, or none that is) counts as 0.
    """
    scores, positive = _binary(scores, labels)
    taken = scores > 0.5
    hits = int(np.count_nonzero(taken & positive))
    found = {
        "precision": hits / max(int(taken.sum()), 1),
        "recall": hits / max(int(positive.sum()), 1),
        "f1": 2 * hits / max(int(taken.sum()) + int(positive.sum()), 1),
    }
    if 0 < positive.sum() < len(positive):
        found["area_under_curve"] = area_under_curve(scores, labels)
    return found


def retrieval_recall(scores: Scores, *, k: int, matches: Integers | None = None) -> float:
    """R@k: share of queries whose own candidate is among the ``k`` best scored.

    Equal scores count as drawn in random order (the expected value), so a network whose features have
    collapsed to one point scores k / M and not 1.

    Args:
        scores: (Q, M) similarity of every query with every candidate.
        k: a k above M counts all candidates.
        matches: (Q,) column of each query's own candidate; None is the diagonal.
    """
    scores = _numbers(scores, ndim=2)
    Q, M = scores.shape
    own = np.arange(Q) if matches is None else np.asarray(matches)
    if own.shape != (Q,):
        raise MetricError(f"matches {own.shape} must give one column for each of the {Q} queries")
    _check_classes(own, M, "match")
    if k < 1:
        raise MetricError(f"k={k} must be at least 1")
    score = np.take_along_axis(scores, own[:, None], axis=1)
    higher = (scores > score).sum(axis=1)
    equal = (scores == score).sum(axis=1)  # its own candidate included
    return float(np.clip((k - higher) / equal, 0.0, 1.0).mean())


def expected_calibration_error(probabilities: Scores, labels: Integers, *, bins: int = 15) -> float:
    """Mean distance between confidence and accuracy over equal bins of confidence (arXiv 1706.04599, eq. 3).

    Args:
        probabilities: (N, K) in [0, 1]; the confidence is the largest of each row.
        labels: (N,) classes, 0 to K - 1.
        bins: bin m of M holds confidences in ((m - 1) / M, m / M].
    """
    confidence, right, bin_of = _by_confidence(probabilities, labels, bins)
    gap = np.bincount(bin_of, weights=right - confidence, minlength=bins)  # size x (accuracy - confidence)
    return float(np.abs(gap).sum() / len(right))


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram (arXiv 1706.04599, figure 1): what each of M bins of confidence holds.

    Attributes:
        counts: (M,) samples.
        confidence, accuracy: (M,) their means, NaN in an empty bin.
    """

    counts: Counts
    confidence: Floats
    accuracy: Floats


def reliability(probabilities: Scores, labels: Integers, *, bins: int = 15) -> Reliability:
    """The bins of :func:`expected_calibration_error`, which is the mean of their gaps weighted by their counts."""
    confidence, right, bin_of = _by_confidence(probabilities, labels, bins)
    counts = np.bincount(bin_of, minlength=bins)
    sums = [np.bincount(bin_of, weights=each, minlength=bins) for each in (confidence, right)]
    means = [np.divide(each, counts, out=np.full(bins, np.nan), where=counts > 0) for each in sums]
    return Reliability(counts.astype(np.int64), *means)


def _by_confidence(
    probabilities: Scores, labels: Integers, bins: int
) -> tuple[Floats, npt.NDArray[np.bool_], Counts]:
    """Of each sample (N,): its confidence, whether it is right, the number of its bin."""
    probabilities, labels = _check_labels(probabilities, labels)
    if probabilities.min() < -1e-6 or probabilities.max() > 1 + 1e-6:
        raise MetricError("calibration needs probabilities between 0 and 1; apply softmax to logits first")
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    return confidence, right, np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def bootstrap_interval(
    values: npt.ArrayLike,
    *,
    seed: int,
    level: float = 0.95,
    resamples: int = 2000,
    groups: npt.ArrayLike | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of per-sample values.

    Args:
        values: (N,) one number per sample, such as 1 for a right prediction and 0 for a wrong one.
        seed: the same seed gives the same interval.
        level: share of the resampled means inside the interval.
        resamples: number of resampled means.
        groups: (N,) source of each sample, such as the video its clip was cut from; whole groups are then
            drawn, as clips of one video are not independent.
    """
    numbers = _numbers(np.asarray(values, dtype=np.float64), ndim=1)
    if not 0 < level < 1 or resamples < 1:
        raise MetricError(f"level={level} must lie between 0 and 1, resamples={resamples} above 0")
    sums: Floats = numbers.astype(np.float64)
    sizes: Floats = np.ones(len(numbers))
    if groups is not None:
        _, group = np.unique(np.asarray(groups), return_inverse=True)
        if group.shape != numbers.shape:
            raise MetricError(f"groups {group.shape} and values {numbers.shape} differ in length")
        sums = np.bincount(group, weights=numbers).astype(np.float64)
        sizes = np.bincount(group).astype(np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    at_once = max(1, 4_000_000 // len(sums))  # bounds memory for large test sets
    for start in range(0, resamples, at_once):
        drawn = generator.integers(len(sums), size=(min(at_once, resamples - start), len(sums)))
        means[start : start + len(drawn)] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _at_distinct_scores(scores: Scores, positive: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Positives found and candidates taken when a descending list is cut after each distinct score."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    ends = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)
    return np.cumsum(positive[order])[ends].astype(np.float64), ends + 1.0


def _check_labels(scores: Scores, labels: Integers) -> tuple[Scores, Integers]:
    scores, labels = _numbers(scores, ndim=2), np.asarray(labels)
    if labels.shape != scores.shape[:1]:
        raise MetricError(f"scores {scores.shape} need one label per row, got labels {labels.shape}")
    _check_classes(labels, scores.shape[1], "label")
    return scores, labels


def _of_both_kinds(positive: npt.NDArray[np.bool_], what: str) -> tuple[int, int]:
    """How many are positive and negative; MetricError where one of the kinds is missing."""
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        raise MetricError(f"{what} needs both kinds, got {positives} positives and {negatives} negatives")
    return positives, negatives


def _binary(scores: Scores, targets: npt.ArrayLike) -> tuple[Scores, npt.NDArray[np.bool_]]:
    return _numbers(scores, ndim=1), _zero_one(targets, np.shape(scores))


def _multi_label(scores: Scores, targets: npt.ArrayLike) -> tuple[Scores, npt.NDArray[np.bool_]]:
    return _numbers(scores, ndim=2), _zero_one(targets, np.shape(scores))


def _zero_one(targets: npt.ArrayLike, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    array = np.asarray(targets)
    if array.shape != shape:
        raise MetricError(f"scores {shape} and targets {array.shape} differ in shape")
    if not np.isin(array, (0, 1)).all():
        raise MetricError("targets must be 0 or 1")
    return array.astype(np.bool_)


def _numbers(scores: Scores, *, ndim: int) -> Scores:
    scores = np.asarray(scores)
    if scores.ndim != ndim or scores.size == 0:
        raise MetricError(f"scores {scores.shape} must be a non-empty array of {ndim} axes")
    rows = np.isnan(scores).reshape(len(scores), -1).any(axis=1)
    if rows.any():
        raise MetricError(
            f"{int(rows.sum())} of {len(scores)} rows hold NaN, first in row {int(rows.argmax())}"
        )
    return scores


def _check_classes(values: Integers, num_classes: int, name: str) -> None:
    if values.size and not np.issubdtype(values.dtype, np.integer):
        raise MetricError(f"a {name} must be an integer, got {values.dtype}")
    outside = np.flatnonzero((values < 0) | (values >= num_classes))
    if len(outside):
        row = int(outside[0])
        raise MetricError(f"{name} {int(values[row])} in row {row} is outside 0 to {num_classes - 1}")
