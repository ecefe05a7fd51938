"""Metrics against figures worked out by hand, brute-force counts over all pairs, and scikit-learn where installed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cliplift.pipelines.evaluation import metrics
from cliplift.pipelines.evaluation.metrics import MetricError


@pytest.fixture
def labelled() -> tuple[np.ndarray, np.ndarray]:
    """Softmax scores (200, 7) without ties, and labels that favour the true class a little."""
    rng = np.random.default_rng(3)
    labels = rng.integers(7, size=200)
    logits = rng.normal(size=(200, 7)) + 1.3 * np.eye(7)[labels]
    exponentials = np.exp(logits)
    return (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32), labels


@pytest.fixture
def tagged() -> tuple[np.ndarray, np.ndarray]:
    """Scores (60, 5) in tenths, so with many ties, and multi-hot targets; class 4 has no positive."""
    rng = np.random.default_rng(11)
    scores = rng.integers(11, size=(60, 5)) / 10.0
    targets = (rng.random((60, 5)) < 0.3 * (scores + 0.2)).astype(np.int64)
    targets[:, 4] = 0
    return scores, targets


def test_top_k_by_hand() -> None:
    scores = np.array([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
    labels = np.array([1, 1, 0, 0])
    assert metrics.top_k_accuracy(scores, labels, k=1) == 0.5
    assert metrics.top_k_accuracy(scores, labels, k=2) == 0.75
    assert metrics.top_k_accuracy(scores, labels, k=3) == 1.0


def test_top_k_of_ties_is_argmax_and_a_constant_network_scores_one_class() -> None:
    labels = np.array([0, 1, 2, 2])
    assert metrics.top_k_accuracy(np.zeros((4, 3)), labels, k=1) == 0.25
    assert metrics.top_k_accuracy(np.zeros((4, 3)), labels, k=2) == 0.5
    rng = np.random.default_rng(0)
    tied = rng.integers(3, size=(500, 4)).astype(np.float32)
    labels = rng.integers(4, size=500)
    assert metrics.top_k_accuracy(tied, labels, k=1) == np.mean(tied.argmax(axis=1) == labels)


def test_top_k_matches_scikit_learn(labelled: tuple[np.ndarray, np.ndarray]) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, labels = labelled
    for k in (1, 3, 5):
        expected = sklearn.top_k_accuracy_score(labels, scores, k=k, labels=range(7))
        assert metrics.top_k_accuracy(scores, labels, k=k) == pytest.approx(expected, abs=1e-12)


def test_confusion_by_hand() -> None:
    confusion = metrics.confusion_matrix(np.array([0, 1, 1, 2, 0]), np.array([0, 1, 0, 2, 2]), num_classes=4)
    assert confusion.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    shares = metrics.per_class_accuracy(confusion)
    assert shares[:3].tolist() == [0.5, 1.0, 0.5]
    assert np.isnan(shares[3])
    assert metrics.mean_class_accuracy(confusion) == pytest.approx(2 / 3)


def test_confusion_matches_scikit_learn(labelled: tuple[np.ndarray, np.ndarray]) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, labels = labelled
    predicted = scores.argmax(axis=1)
    confusion = metrics.confusion_matrix(predicted, labels, num_classes=7)
    assert np.array_equal(confusion, sklearn.confusion_matrix(labels, predicted, labels=range(7)))
    macro = sklearn.balanced_accuracy_score(labels, predicted)
    assert metrics.mean_class_accuracy(confusion) == pytest.approx(macro, abs=1e-12)


def test_average_precision_by_hand() -> None:
    # Ranked: hit, miss, hit, miss -> precision 1 at recall 1/2, 2/3 at recall 1.
    assert metrics.average_precision(np.array([0.9, 0.8, 0.7, 0.1]), [1, 0, 1, 0]) == pytest.approx(5 / 6)
    # All equal: one step, precision is the share of positives.
    assert metrics.average_precision(np.full(8, 0.3), [1, 1, 0, 0, 0, 0, 0, 0]) == pytest.approx(0.25)


def test_mean_average_precision_leaves_classes_without_positives_out() -> None:
    scores = np.array([[0.9, 0.1, 0.5], [0.8, 0.2, 0.5], [0.7, 0.9, 0.5]])
    targets = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0]])
    assert metrics.mean_average_precision(scores, targets) == pytest.approx((5 / 6 + 1 / 2) / 2)


def test_average_precisions_match_scikit_learn(tagged: tuple[np.ndarray, np.ndarray]) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, targets = tagged
    for c in range(4):
        expected = sklearn.average_precision_score(targets[:, c], scores[:, c])
        assert metrics.average_precision(scores[:, c], targets[:, c]) == pytest.approx(expected, abs=1e-12)
    macro = sklearn.average_precision_score(targets[:, :4], scores[:, :4], average="macro")
    assert metrics.mean_average_precision(scores, targets) == pytest.approx(macro, abs=1e-12)
    # With every class of every sample in the pool, GAP is the micro average.
    micro = sklearn.average_precision_score(targets, scores, average="micro")
    assert metrics.global_average_precision(scores, targets, top=5) == pytest.approx(micro, abs=1e-12)


def test_global_average_precision_by_hand() -> None:
    scores = np.array([[0.9, 0.6, 0.1], [0.8, 0.7, 0.2]])
    targets = np.array([[1, 0, 1], [0, 1, 0]])
    # Best class of each sample: 0.9 (hit), 0.8 (miss); three positives in all, so recall stops at 1/3.
    assert metrics.global_average_precision(scores, targets, top=1) == pytest.approx(1 / 3)
    # Best two: 0.9 hit, 0.8 miss, 0.7 hit, 0.6 miss -> 1/3 * 1 + 1/3 * 2/3.
    assert metrics.global_average_precision(scores, targets, top=2) == pytest.approx(5 / 9)


def test_area_under_curve_is_the_share_of_ordered_pairs(tagged: tuple[np.ndarray, np.ndarray]) -> None:
    scores, targets = tagged[0][:, 0], tagged[1][:, 0]
    pairs = list(itertools.product(scores[targets == 1], scores[targets == 0]))
    by_count = np.mean([1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs])
    assert metrics.area_under_curve(scores, targets) == pytest.approx(by_count, abs=1e-12)
    assert metrics.area_under_curve(np.zeros(6), [1, 0, 1, 0, 0, 0]) == 0.5
    assert metrics.area_under_curve(np.array([1.0, 2.0, 3.0]), [0, 1, 1]) == 1.0


def test_area_under_curve_matches_scikit_learn(tagged: tuple[np.ndarray, np.ndarray]) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, targets = tagged
    expected = sklearn.roc_auc_score(targets[:, 1], scores[:, 1])
    assert metrics.area_under_curve(scores[:, 1], targets[:, 1]) == pytest.approx(expected, abs=1e-12)


def test_retrieval_by_hand() -> None:
    scores = np.array([[0.9, 0.1, 0.2], [0.8, 0.5, 0.1], [0.3, 0.2, 0.1]])
    assert metrics.retrieval_recall(scores, k=1) == pytest.approx(1 / 3)
    assert metrics.retrieval_recall(scores, k=2) == pytest.approx(2 / 3)
    assert metrics.retrieval_recall(scores, k=5) == 1.0
    assert metrics.retrieval_recall(scores, k=1, matches=np.array([0, 0, 0])) == 1.0


def test_retrieval_of_collapsed_features_is_chance() -> None:
    assert metrics.retrieval_recall(np.ones((20, 20)), k=1) == pytest.approx(1 / 20)
    assert metrics.retrieval_recall(np.ones((20, 20)), k=5) == pytest.approx(5 / 20)


def test_retrieval_of_ties_is_the_mean_over_random_orders() -> None:
    scores = np.array([[0.5, 0.5, 0.9, 0.5], [0.1, 0.5, 0.5, 0.0]])
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(4000):
        noise = rng.random(scores.shape) * 1e-6  # far below the gaps: it only orders equal scores
        order = np.argsort(-(scores + noise), axis=1)[:, :2]
        found += sum(q in order[q] for q in range(2))
    # 8000 draws: three standard errors of a share are below 0.017.
    assert metrics.retrieval_recall(scores, k=2) == pytest.approx(found / 8000, abs=0.02)


def test_calibration_by_hand() -> None:
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.65, 0.35], [0.35, 0.65]])
    labels = np.array([0, 1, 0, 1])
    # Bin of 0.95: accuracy 1/2; bin of 0.65: accuracy 1. Half of the samples each.
    expected = 0.5 * abs(0.5 - 0.95) + 0.5 * abs(1 - 0.65)
    assert metrics.expected_calibration_error(probabilities, labels, bins=10) == pytest.approx(expected)


def test_calibration_bins_include_their_upper_edge() -> None:
    # 0.5 belongs to (0.25, 0.5], 0.6 to (0.5, 0.75]: apart, their gaps add up instead of cancelling.
    probabilities = np.array([[0.5, 0.5, 0.0], [0.6, 0.4, 0.0]])
    expected = 0.5 * abs(1 - 0.5) + 0.5 * abs(0 - 0.6)
    assert metrics.expected_calibration_error(probabilities, np.array([0, 1]), bins=4) == pytest.approx(
        expected
    )


def test_bootstrap_interval_agrees_with_the_normal_one_and_repeats() -> None:
    right = np.repeat([1.0, 0.0], [300, 100])
    low, high = metrics.bootstrap_interval(right, seed=7)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)  # 0.0424
    # The percentiles of 2000 means have a standard error of about 0.0011 here; four of them.
    assert low == pytest.approx(0.75 - half, abs=0.005)
    assert high == pytest.approx(0.75 + half, abs=0.005)
    assert metrics.bootstrap_interval(right, seed=7) == (low, high)
    assert metrics.bootstrap_interval(right, seed=8) != (low, high)


def test_bootstrap_of_whole_groups_is_wider() -> None:
    right = np.repeat(np.tile([1.0, 0.0], 20), 10)  # 40 videos of 10 clips, all clips of a video alike
    low, high = metrics.bootstrap_interval(right, seed=0)
    group_low, group_high = metrics.bootstrap_interval(right, seed=0, groups=np.repeat(np.arange(40), 10))
    # 40 independent values instead of 400: wider by about the root of 10.
    assert (group_high - group_low) / (high - low) == pytest.approx(np.sqrt(10), rel=0.15)


def test_bootstrap_of_many_samples_is_drawn_in_parts() -> None:
    low, high = metrics.bootstrap_interval(np.ones(300_000), seed=0, resamples=30)
    assert (low, high) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: metrics.top_k_accuracy(np.array([[np.nan, 1.0]]), np.array([0]), k=1), "row 0"),
        (lambda: metrics.top_k_accuracy(np.zeros((2, 3)), np.array([0, -1]), k=1), "label -1 in row 1"),
        (lambda: metrics.top_k_accuracy(np.zeros((2, 3)), np.array([0, 1]), k=4), "k=4"),
        (lambda: metrics.top_k_accuracy(np.zeros((0, 3)), np.zeros(0, dtype=int), k=1), "non-empty"),
        (lambda: metrics.top_k_accuracy(np.zeros((2, 3)), np.array([0.0, 1.0]), k=1), "integer"),
        (lambda: metrics.confusion_matrix(np.array([3]), np.array([0]), num_classes=3), "predicted class 3"),
        (lambda: metrics.confusion_matrix(np.array([1, 2]), np.array([0]), num_classes=3), "equal length"),
        (lambda: metrics.mean_class_accuracy(np.zeros((2, 2), dtype=np.int64)), "no sample"),
        (lambda: metrics.area_under_curve(np.zeros(3), [1, 1, 1]), "3 positives and 0 negatives"),
        (lambda: metrics.average_precision(np.zeros(3), [0, 0, 0]), "positive"),
        (lambda: metrics.mean_average_precision(np.zeros((3, 2)), np.zeros((3, 2))), "positive"),
        (lambda: metrics.global_average_precision(np.zeros((3, 2)), np.full((3, 2), 2)), "0 or 1"),
        (lambda: metrics.retrieval_recall(np.zeros((3, 2)), k=1), "match 2 in row 2"),
        (lambda: metrics.expected_calibration_error(np.array([[3.0, -1.0]]), np.array([0])), "softmax"),
        (lambda: metrics.bootstrap_interval([1.0], seed=0, level=1.0), "level"),
    ],
)
def test_bad_input_is_named(call: object, said: str) -> None:
    with pytest.raises(MetricError, match=said):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("row", [[1.0, -0.5], [1.5, 0.5]])
def test_calibration_refuses_what_lies_on_either_side_of_a_probability(row: list[float]) -> None:
    with pytest.raises(MetricError, match="between 0 and 1"):
        metrics.expected_calibration_error(np.array([row]), np.array([0]))


def test_log_loss_by_hand() -> None:
    probabilities = np.array([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]])
    assert metrics.log_loss(probabilities, np.array([0, 0, 0])) == pytest.approx(np.log(2 * 4 * 1) / 3)
    impossible = metrics.log_loss(np.array([[1.0, 0.0]]), np.array([1]))
    assert 80 < impossible < 100
    with pytest.raises(MetricError, match="probabilities from 0 to 1"):
        metrics.log_loss(np.array([[2.0, -1.0]]), np.array([0]))


def test_two_classes_by_hand() -> None:
    """Three taken for class 1, two of them rightly; one of three is missed. A half is not taken."""
    scores, labels = np.array([0.9, 0.8, 0.6, 0.5, 0.1]), np.array([1, 0, 1, 1, 0])
    found = metrics.two_class_metrics(scores, labels)
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["area_under_curve"] == pytest.approx(4 / 6)
    assert metrics.two_class_metrics(np.array([0.1, 0.2]), np.array([0, 0])) == {
        "precision": 0.0,
        "recall": 0.0,
        "f1": 0.0,
    }


def test_two_classes_match_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(5)
    labels = rng.integers(2, size=300)
    scores = np.clip(0.3 * labels + 0.7 * rng.random(300), 0, 1)
    found = metrics.two_class_metrics(scores, labels)
    taken = scores > 0.5
    assert found["precision"] == pytest.approx(sklearn.precision_score(labels, taken))
    assert found["recall"] == pytest.approx(sklearn.recall_score(labels, taken))
    assert found["f1"] == pytest.approx(sklearn.f1_score(labels, taken))
    assert found["area_under_curve"] == pytest.approx(sklearn.roc_auc_score(labels, scores))
    both = np.stack([1 - scores, scores], axis=1)
    assert metrics.log_loss(both, labels) == pytest.approx(sklearn.log_loss(labels, scores), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: metrics.confusion_matrix(np.array([1]), np.array([0, 1]), num_classes=3), "equal length"),
        (lambda: metrics.confusion_matrix(*np.zeros((2, 2, 2), int), num_classes=3), "equal length"),
        (
            lambda: metrics.confusion_matrix(np.array([0]), np.array([3]), num_classes=3),
            "label 3 in row 0 is outside 0 to 2",
        ),
        (
            lambda: metrics.average_precision(np.zeros(2), [1, 0, 1]),
            r"scores \(2,\) and targets \(3,\) differ",
        ),
        (lambda: metrics.average_precision(np.zeros(2), [1]), r"scores \(2,\) and targets \(1,\) differ"),
        (lambda: metrics.average_precision(np.zeros(2), [1, -1]), "0 or 1"),
        (lambda: metrics.mean_average_precision(np.zeros((3, 2)), np.zeros((3, 3))), "differ in shape"),
        (
            lambda: metrics.global_average_precision(np.zeros((3, 2)), np.zeros((3, 2))),
            "at least one positive",
        ),
        (lambda: metrics.global_average_precision(np.zeros((1, 2)), np.ones((1, 2)), top=0), "top=0"),
        (lambda: metrics.area_under_curve(np.zeros(2), [0, 0]), "0 positives and 2 negatives"),
        (lambda: metrics.top_k_accuracy(np.zeros((2, 3)), np.array([0, 1]), k=0), "k=0 needs 1 to 3"),
        (lambda: metrics.top_k_accuracy(np.zeros((2, 3)), np.array([0]), k=1), "one label per row"),
        (
            lambda: metrics.top_k_accuracy(np.zeros((2, 3)), np.array([0, 3]), k=1),
            "label 3 in row 1 is outside",
        ),
        (lambda: metrics.top_k_accuracy(np.zeros(3), np.array([0]), k=1), "array of 2 axes"),
        (
            lambda: metrics.top_k_accuracy(np.array([[0.0], [np.nan], [np.nan]]), np.zeros(3, int), k=1),
            "2 of 3 rows hold NaN, first in row 1",
        ),
        (lambda: metrics.retrieval_recall(np.zeros((2, 3)), k=0), "k=0"),
        (
            lambda: metrics.retrieval_recall(np.zeros((2, 3)), k=1, matches=np.array([0])),
            "each of the 2 queries",
        ),
        (lambda: metrics.bootstrap_interval([1.0, 0.0], seed=0, groups=[1]), "differ in length"),
        (lambda: metrics.bootstrap_interval([1.0, 0.0], seed=0, groups=[1, 2, 3]), "differ in length"),
        (lambda: metrics.bootstrap_interval([1.0], seed=0, level=0.0), "level=0.0"),
        (lambda: metrics.bootstrap_interval([1.0], seed=0, resamples=0), "resamples=0"),
    ],
)
def test_what_does_not_fit_together_is_refused(call: object, said: str) -> None:
    with pytest.raises(MetricError, match=said):
        call()  # type: ignore[operator]


def test_gap_takes_twenty_classes_of_a_sample_unless_told_otherwise() -> None:
    """The only positive is the 20th of 21 classes, and then the 21st: precision 1/20, and not found at all."""
    scores = -np.arange(21.0)[None]
    assert metrics.global_average_precision(scores, np.eye(21)[19:20]) == pytest.approx(1 / 20)
    assert metrics.global_average_precision(scores, np.eye(21)[20:21]) == 0.0
    assert metrics.global_average_precision(scores, np.eye(21)[20:21], top=21) == pytest.approx(1 / 21)


def test_a_class_without_samples_divides_nothing_by_zero() -> None:
    with np.errstate(all="raise"):
        shares = metrics.per_class_accuracy(np.array([[3, 1], [0, 0]]))
        assert metrics.mean_class_accuracy(np.array([[3, 1], [0, 0]])) == 0.75
    assert shares[0] == 0.75
    assert np.isnan(shares[1])


def test_calibration_bins_are_fifteen_and_hold_both_ends() -> None:
    """0.51 and 0.52 fall into one bin of fifteen (7/15 to 8/15), where their gaps nearly cancel."""
    probabilities = np.array([[0.51, 0.49], [0.52, 0.48]])
    found = metrics.expected_calibration_error(probabilities, np.array([0, 1]))
    assert found == pytest.approx(abs((1 - 0.51) + (0 - 0.52)) / 2)
    certain = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert metrics.expected_calibration_error(certain, np.array([0, 1])) == pytest.approx(0.5)
    # Rounding of a softmax is no mistake.
    rounded = np.array([[1 + 5e-7, -5e-7], [1 + 5e-7, -5e-7]])
    assert metrics.expected_calibration_error(rounded, np.array([0, 0])) == pytest.approx(0, abs=1e-6)


def test_the_bootstraps_interval_is_the_quantiles_of_the_resampled_means() -> None:
    """The rule written out: N draws with replacement, their mean, and where the outer 5 % of 2000 such means begin."""
    values = np.array([0.0, 1.0, 1.0, 4.0, 2.0])
    draws = np.random.default_rng(3).integers(5, size=(2000, 5))
    means = np.sort([np.mean(values[row]) for row in draws])
    low, high = metrics.bootstrap_interval(values, seed=3)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-12)
    low, high = metrics.bootstrap_interval(values, seed=3, level=0.5, resamples=2000)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.25, 0.75])), abs=1e-12)


def test_groups_of_different_size_are_drawn_whole() -> None:
    """Three videos of 1, 2 and 3 clips: the mean of a draw is the sum over its clips by their number."""
    values, groups = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.0]), ["a", "b", "b", "c", "c", "c"]
    sums, sizes = np.array([1.0, 1.0, 1.0]), np.array([1.0, 2.0, 3.0])
    draws = np.random.default_rng(5).integers(3, size=(100, 3))
    means = [sums[row].sum() / sizes[row].sum() for row in draws]
    found = metrics.bootstrap_interval(values, seed=5, resamples=100, groups=groups)
    assert found == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-12)
