"""The sample order, pinned across versions: a resumed run must go on in the order it began.

The reference is written here from the definitions alone: the published splitmix64 finaliser (Steele, Lea and Flood,
2014), chained over words, and a Feistel network of six rounds whose round function takes seed, epoch, round and half.
"""

from __future__ import annotations

import numpy as np
import pytest

from cliplift.pipelines.data.order import BalancedOrder, GlobalOrder, Mixture, WindowedOrder, mix

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


def rng(*words: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=reference_mix(*words)))


def reference_windowed(
    shards: list[tuple[int, int]], *, seed: int, streams: int, window: int, epoch: int
) -> list[int]:
    """Shards shuffled and dealt to streams, each stream shuffled window by window, streams read in turn."""
    shuffled = [shards[i] for i in rng(seed, epoch, 1).permutation(len(shards))]
    queues = []
    for stream in range(min(streams, len(shards))):
        samples = [sample for shard in shuffled[stream::streams] for sample in range(*shard)]
        queue: list[int] = []
        for number, start in enumerate(range(0, len(samples), window)):
            part = samples[start : start + window]
            # The first window of a stream is drawn without its number.
            words = (seed, epoch, 2, stream, number) if number else (seed, epoch, 2, stream)
            queue += [part[i] for i in rng(*words).permutation(len(part))]
        queues.append(queue)
    rounds = range(max(map(len, queues)))
    return [queue[turn] for turn in rounds for queue in queues if turn < len(queue)]


@pytest.mark.parametrize(("streams", "window"), [(1, 4), (3, 5), (2, 100), (9, 3)])
def test_the_windowed_order_never_changes(streams: int, window: int) -> None:
    shards = [(0, 7), (7, 20), (20, 21), (21, 34), (34, 50)]
    order = WindowedOrder(shards, 5, streams, window)
    for epoch in (0, 1, 3):
        expected = reference_windowed(shards, seed=5, streams=streams, window=window, epoch=epoch)
        assert [order.sample(epoch, position) for position in range(50)] == expected


def test_the_mixed_order_never_changes() -> None:
    """Of every thousand positions 750 and 250, turn i of n at random in the i-th of n equal parts of the block."""
    parts, seed = (GlobalOrder(40, 1), GlobalOrder(900, 2)), 6
    mixture = Mixture(parts, (3, 1), seed)
    drawn = [0, 0]
    for block in range(2):
        draws = rng(seed, block, 3).random(1000).tolist()
        turns = [(0, turn) for turn in range(750)] + [(1, turn) for turn in range(250)]
        places = [
            ((turn + draw) / (750, 250)[part], part) for (part, turn), draw in zip(turns, draws, strict=True)
        ]
        for position, (_, part) in enumerate(sorted(places), start=1000 * block):
            passes, at = divmod(drawn[part], parts[part].num_samples)
            drawn[part] += 1
            expected = (0, 40)[part] + reference_sample(parts[part].num_samples, part + 1, passes, at)
            assert mixture.draw(*divmod(position, 940)) == (expected, passes)


def test_the_balanced_order_never_changes() -> None:
    """Rounds of all classes in an order of their own; within a class, passes in the order of its own seed."""
    labels, seed = [0, 2, 2, 0, 5, 2, 0, 0, 5], 4
    order = BalancedOrder(labels, seed)
    members = [[i for i, label in enumerate(labels) if label == k] for k in (0, 2, 5)]
    for position in range(90):
        turn, inside = divmod(position, 3)
        k = int(rng(seed, turn, 5).permutation(3)[inside])
        passes, at = divmod(turn, len(members[k]))
        row = reference_sample(len(members[k]), reference_mix(seed, k), passes, at)
        assert order.draw(*divmod(position, 9)) == (members[k][row], passes)
