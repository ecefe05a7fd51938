"""The order of samples is a bijection, cheap at any size, and knows nothing of ranks."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
import tracemalloc
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cliplift.pipelines.data.order import (
    BLOCK,
    GlobalOrder,
    Mixture,
    WindowedOrder,
    mix,
    quotas,
    rank_positions,
)


@settings(max_examples=60)
@given(n=st.integers(1, 700), seed=st.integers(0, 2**40), epoch=st.integers(0, 50))
def test_global_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    order = GlobalOrder(n, seed)
    assert sorted(order.sample(epoch, p) for p in range(n)) == list(range(n))


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
    streams=st.integers(1, 9),
    window=st.integers(1, 64),
)
def test_windowed_is_a_bijection(sizes: list[int], seed: int, epoch: int, streams: int, window: int) -> None:
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    order = WindowedOrder(tuple(itertools.pairwise(starts)), seed, streams, window)
    found = [order.sample(epoch, p) for p in range(order.num_samples)]
    assert sorted(found) == list(range(sum(sizes)))


def test_epochs_and_seeds_differ() -> None:
    ranges = tuple((i * 20, i * 20 + 20) for i in range(10))
    for a, b in (
        (GlobalOrder(200, 0), GlobalOrder(200, 1)),
        (WindowedOrder(ranges, 0, 4, 32), WindowedOrder(ranges, 1, 4, 32)),
    ):
        one = [a.sample(0, p) for p in range(200)]
        assert one != [a.sample(1, p) for p in range(200)]
        assert one != [b.sample(0, p) for p in range(200)]
        assert one == [a.sample(0, p) for p in range(200)]


def test_global_positions_are_well_spread() -> None:
    """Neighbouring positions are as far apart as chance has them: a third of N on average."""
    n = 10_007
    order = GlobalOrder(n, 3)
    found = [order.sample(0, p) for p in range(n)]
    distance = sum(abs(a - b) for a, b in itertools.pairwise(found)) / n
    assert abs(distance / n - 1 / 3) < 0.02


def test_windowed_reads_stay_near_each_other() -> None:
    """While the first window of every stream is read, at most two shards a stream are open."""
    ranges = tuple((i * 100, i * 100 + 100) for i in range(40))
    order = WindowedOrder(ranges, 0, 4, 100)
    shards = {order.sample(0, p) // 100 for p in range(400)}
    assert len(shards) <= 8


def test_a_worker_is_sent_a_windowed_order_without_its_shards() -> None:
    """Neither the list of shards, which is a file of the host, nor what was computed on the way."""
    order = WindowedOrder(tuple((i * 10, i * 10 + 10) for i in range(100_000)), 5, 4, 64)
    found = [order.sample(epoch, position) for epoch in (0, 1) for position in range(9)]
    sent = pickle.dumps(order)
    assert len(sent) < 4096
    again = pickle.loads(sent)
    assert [again.sample(epoch, position) for epoch in (0, 1) for position in range(9)] == found


def test_a_billion_samples_cost_nothing() -> None:
    order = GlobalOrder(10**9, 7)
    tracemalloc.start()
    with mock.patch("cliplift.pipelines.data.order.mix", wraps=mix) as hashed:
        first = [order.sample(2, p) for p in range(1024)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(first)) == 1024
    assert max(first) > 9 * 10**8
    # 2^30 values hold 10^9 samples: a position takes 1.07 walks of the cycle on average, of six hashes each.
    assert hashed.call_count < 1024 * 6 * 1.2
    assert peak < 10 * 2**20


def test_ranks_share_a_batch_without_overlap() -> None:
    for world in (1, 2, 3, 4, 6, 12):
        parts = [
            list(rank_positions(step=5, global_batch=12, rank=r, world_size=world)) for r in range(world)
        ]
        assert sorted(p for part in parts for p in part) == list(range(60, 72))
        assert {len(part) for part in parts} == {12 // world}


def test_every_word_counts_in_a_hash_and_every_bit_is_set_half_of_the_time() -> None:
    assert mix(0, 0) != mix(0, 1) != mix(1, 0)
    assert 0 <= mix(-5, 2**80) < 2**64
    bits = [sum((mix(a) >> b) & 1 for a in range(4096)) for b in range(64)]
    assert all(abs(count - 2048) < 5 * 32 for count in bits), "each bit is set half of the time"


@settings(max_examples=20)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    weights=st.lists(st.floats(0.01, 50), min_size=5, max_size=5),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 10**7),
)
def test_a_mixture_gives_every_part_its_share_and_walks_each_through(
    sizes: list[int], weights: list[float], seed: int, start: int
) -> None:
    kept = [max(w, 0.01 * sum(weights)) for w in weights[: len(sizes)]]
    parts = [
        GlobalOrder(n, seed + i) if i % 2 else WindowedOrder([(0, n)], seed, 2, 16)
        for i, n in enumerate(sizes)
    ]
    mixture = Mixture(parts, kept, seed)
    N, offsets = sum(sizes), [0, *itertools.accumulate(sizes)]
    assert mixture.num_samples == N
    first = start // BLOCK * BLOCK  # a whole block, somewhere far into the run
    block = [mixture.draw(*divmod(at, N)) for at in range(first, first + BLOCK)]
    assert block[7] == Mixture(parts, kept, seed).draw(*divmod(first + 7, N)), (
        "a function of the position alone"
    )
    for number, weight in enumerate(kept):
        drawn = [d for d in block if offsets[number] <= d.sample < offsets[number + 1]]
        assert abs(len(drawn) - BLOCK * weight / sum(kept)) <= 1
        # In each pass over a part no sample comes twice, and a pass ends before the next begins.
        assert len(set(drawn)) == len(drawn)
        assert [d.epoch for d in drawn] == sorted(d.epoch for d in drawn)
        whole = {d.epoch for d in drawn} - {drawn[0].epoch, drawn[-1].epoch}
        for one in whole:
            seen = sorted(d.sample - offsets[number] for d in drawn if d.epoch == one)
            assert seen == list(range(sizes[number]))


def test_a_mixture_is_even_and_meets_no_rhythm_of_the_ranks() -> None:
    mixture = Mixture([GlobalOrder(5000, 0), GlobalOrder(5000, 1)], [1.0, 1.0], 3)
    first = np.array([mixture.draw(0, p).sample < 5000 for p in range(8000)])
    for ranks in (1, 2, 4, 8):
        for rank in range(ranks):
            assert abs(first[rank::ranks].mean() - 0.5) < 0.06
    assert np.abs(np.cumsum(first - 0.5)).max() < 12, "any stretch has its share, give or take a few"


def test_quotas_add_up() -> None:
    assert quotas([1, 1, 1]).tolist() == [334, 333, 333]
    assert quotas([0.001, 0.999]).tolist() == [1, 999]
    with pytest.raises(ValueError, match="less than 1/1000"):
        quotas([1.0, 10_000.0])


@pytest.mark.parametrize(
    ("kind", "most_hashes", "most_drawn"),
    [
        # 2^30 values hold 10^9 samples: 1.07 walks of the cycle on average, of six hashes each.
        ("global", 256 * 6 * 1.2, 0),
        # One permutation of the shards, and of the first window of each of the 8 streams.
        ("windowed", 9, 2_000_000 + 8 * 256),
        # Both, and the dealing of one block.
        ("mixture", 256 * 6 * 1.2 + 10, 2_000_000 + 8 * 256 + 1000),
    ],
)
def test_a_thousand_million_samples_cost_nothing(kind: str, most_hashes: float, most_drawn: int) -> None:
    """The first batch: numbers hashed and drawn, and the memory, in a process of its own so that it is the order's."""
    script = f"""
import numpy as np
from cliplift.pipelines.data import order as module
hashed, drawn = [], []
mix, generator = module.mix, module.generator

class Counting:
    def __init__(self, *words):
        self.rng = generator(*words)
    def permutation(self, of):
        drawn.append(of if isinstance(of, int) else len(of))
        return self.rng.permutation(of)
    def random(self, size):
        drawn.append(size)
        return self.rng.random(size)

module.mix = lambda *words: (hashed.append(1), mix(*words))[1]
module.generator = Counting
n, kind = 10**9, {kind!r}
ranges = np.stack([np.arange(0, n, 500), np.arange(500, n + 1, 500)], axis=1)
windowed, whole = module.WindowedOrder(ranges, 0, 8, 256), module.GlobalOrder(n, 0)
order = dict(windowed=windowed, mixture=module.Mixture([windowed, whole], [3, 1], 0))
order["global"] = whole
batch = [order[kind].draw(0, position).sample for position in range(256)]
assert len(set(batch)) == 256 and max(batch) < 2 * n
# Not ru_maxrss: a new process inherits that of the one it was forked from.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(len(hashed), sum(drawn), int(peak.split()[1]) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    hashed, drawn, mib = map(float, done.stdout.split())
    assert hashed <= most_hashes
    assert drawn <= most_drawn
    assert drawn >= most_drawn / 2, "what is drawn was counted"
    assert mib < 300


def test_positions_near_a_windowed_one_are_the_windows_read_with_it() -> None:
    """3 streams with windows of 5 are read 15 positions at a time; the last group ends with the samples."""
    order = WindowedOrder([(0, 20), (20, 40), (40, 52)], 0, 3, 5)
    assert order.substitutes(0) == order.substitutes(14) == range(15)
    assert order.substitutes(15) == order.substitutes(29) == range(15, 30)
    assert order.substitutes(45) == order.substitutes(51) == range(45, 52)


def test_positions_near_a_mixed_one_are_those_of_its_block_of_a_thousand() -> None:
    order = Mixture((GlobalOrder(1500, 0), GlobalOrder(1000, 1)), (1, 1), 0)
    assert order.substitutes(0) == order.substitutes(999) == range(1000)
    assert order.substitutes(1000) == range(1000, 2000)
    assert order.substitutes(2000) == order.substitutes(2499) == range(2000, 2500)
