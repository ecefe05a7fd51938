"""The sample order, pinned across versions: a resumed run must go on in the order it began.

The reference is written here from the definitions alone: the published splitmix64 finaliser (Steele, Lea and Flood,
2014), chained over words, and a Feistel network of six rounds whose round function takes seed, epoch, round and half.
"""

from __future__ import annotations

import pytest

from cliplift.pipelines.data.order import GlobalOrder, mix

WORD = 2**64


def reference_mix(*words: int) -> int:
    state = 0x9E3779B97F4A7C15
    for word in words:
        z = (state ^ (word % WORD)) * 0xBF58476D1CE4E5B9 % WORD
        z = (z ^ (z // 2**27)) * 0x94D049BB133111EB % WORD
        state = z ^ (z // 2**31)
    return state


def reference_sample(samples: int, seed: int, epoch: int, position: int) -> int:
    """Walk the cycle of a permutation of 2^(2 half) values until it is back among the samples."""
    half = 1
    while 4**half < samples:
        half += 1
    side, value = 2**half, position
    while True:
        left, right = divmod(value, side)
        for turn in range(6):
            left, right = right, left ^ (reference_mix(seed, epoch, turn, right) % side)
        value = left * side + right
        if value < samples:
            return value


@pytest.mark.parametrize("words", [(), (0,), (1, 2, 3), (-1,), (2**64 - 1, 7), (123456789, 0, 5, 99)])
def test_the_hash_is_the_published_one(words: tuple[int, ...]) -> None:
    assert mix(*words) == reference_mix(*words)


@pytest.mark.parametrize(
    ("samples", "seed"), [(1, 0), (2, 0), (5, 3), (16, 1), (17, 1), (1000, 42), (10**9, 7)]
)
def test_the_order_of_samples_never_changes(samples: int, seed: int) -> None:
    order = GlobalOrder(samples, seed)
    for epoch in (0, 1, 9):
        positions = range(min(samples, 40))
        expected = [reference_sample(samples, seed, epoch, position) for position in positions]
        assert [order.sample(epoch, position) for position in positions] == expected
