"""The order of samples is a bijection, cheap at any size, and knows nothing of ranks."""

from __future__ import annotations

import itertools
import time
import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from cliplift.pipelines.order import GlobalOrder, WindowedOrder, mix, rank_positions


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 700), seed=st.integers(0, 2**40), epoch=st.integers(0, 50))
def test_global_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    order = GlobalOrder(n, seed)
    assert sorted(order.sample(epoch, p) for p in range(n)) == list(range(n))


@settings(max_examples=60, deadline=None)
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


def test_a_billion_samples_cost_nothing() -> None:
    order = GlobalOrder(10**9, 7)
    tracemalloc.start()
    began = time.perf_counter()
    first = [order.sample(2, p) for p in range(1024)]
    seconds = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(first)) == 1024
    assert max(first) > 9 * 10**8
    assert seconds < 1.0
    assert peak < 10 * 2**20


def test_ranks_share_a_batch_without_overlap() -> None:
    for world in (1, 2, 3, 4, 6, 12):
        parts = [
            list(rank_positions(step=5, global_batch=12, rank=r, world_size=world)) for r in range(world)
        ]
        assert sorted(p for part in parts for p in part) == list(range(60, 72))
        assert {len(part) for part in parts} == {12 // world}


def test_mix_is_the_same_everywhere() -> None:
    """Fixed values: another machine or version must draw the same samples for a resumed run."""
    assert mix(0, 0) != mix(0, 1) != mix(1, 0)
    assert 0 <= mix(-5, 2**80) < 2**64
    bits = [sum((mix(a) >> b) & 1 for a in range(4096)) for b in range(64)]
    assert all(abs(count - 2048) < 5 * 32 for count in bits), "each bit is set half of the time"
