"""Class-balanced order: exact shares, whole passes, and the same for any way of reading it."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest

from cliplift.configs.sections import ConfigError
from cliplift.pipelines.data.order import BalancedOrder

LABELS = [0] * 50 + [3] * 7 + [1] * 23  # 80 samples of three classes, one number unused


def test_every_class_comes_equally_often() -> None:
    order = BalancedOrder(LABELS, seed=5)
    drawn = [order.draw(e, p).sample for e in range(3) for p in range(80)]
    counts = Counter(LABELS[sample] for sample in drawn)
    assert set(counts.values()) == {80}, "3 epochs of 80 are 80 rounds of three classes"
    for start in range(0, 240, 3):
        assert {LABELS[s] for s in drawn[start : start + 3]} == {0, 1, 3}, "every round has every class"


def test_no_sample_comes_again_before_all_of_its_class_came() -> None:
    order = BalancedOrder(LABELS, seed=5)
    draws = [order.draw(e, p) for e in range(3) for p in range(80)]
    for label, size in Counter(LABELS).items():
        mine = [d for d in draws if LABELS[d.sample] == label]
        for start in range(0, len(mine) - size + 1, size):
            passes = mine[start : start + size]
            assert len({d.sample for d in passes}) == size
            assert {d.epoch for d in passes} == {start // size}, "each pass has random numbers of its own"


def test_it_is_a_function_of_seed_and_position() -> None:
    order, again = BalancedOrder(LABELS, seed=5), BalancedOrder(np.array(LABELS), seed=5)
    at = [(e, p) for e in (2, 0, 1) for p in (79, 3, 40, 0)]
    assert [order.draw(*a) for a in at] == [again.draw(*a) for a in reversed(at)][::-1]
    other = BalancedOrder(LABELS, seed=6)
    assert [order.draw(0, p) for p in range(30)] != [other.draw(0, p) for p in range(30)]


def test_unlabelled_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 have none") as caught:
        BalancedOrder([0, -1, 1, -1], seed=0)
    assert caught.value.key == "data.class_balanced"


def test_a_worker_is_not_sent_the_samples() -> None:
    """Their order by class is a file that the processes of a host share."""
    labels = np.random.default_rng(0).integers(0, 50, 200_000)
    order = BalancedOrder(labels, seed=5)
    data = pickle.dumps(order)
    assert len(data) < 20_000
    again = pickle.loads(data)
    assert [again.draw(1, p) for p in range(200)] == [order.draw(1, p) for p in range(200)]
