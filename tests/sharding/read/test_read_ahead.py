"""Reading ahead changes when bytes are read, never which."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from cliplift.sharding.read.fetch import ReadAhead


class SlowStore:
    """Takes its time, and remembers what was read and how many reads went on at once."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.lock = seconds, threading.Lock()
        self.read_samples: list[int] = []
        self.now = self.most = 0

    def read(self, sample: int) -> bytes:
        with self.lock:
            self.read_samples.append(sample)
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.seconds)
        with self.lock:
            self.now -= 1
        if sample % 10 == 7:
            raise ValueError(f"sample {sample} is broken")
        return str(sample).encode()


@pytest.fixture
def ahead() -> Callable[..., ReadAhead]:
    made: list[ReadAhead] = []

    def make(store: SlowStore, limit: int) -> ReadAhead:
        made.append(ReadAhead(store.read, limit))
        return made[-1]

    yield make
    for one in made:
        one.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("read-ahead")], (
        "threads end with close()"
    )


def wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not true():
        assert time.monotonic() < until, "did not happen in a minute"
        time.sleep(0.001)


def test_samples_come_as_asked_for_and_are_read_once(ahead: Callable[..., ReadAhead]) -> None:
    store = SlowStore(0.002)
    reader = ahead(store, 4)
    samples = [5, 3, 12, 4, 0, 9, 1, 22]
    reader.plan(samples)
    assert [reader.take(sample) for sample in samples] == [str(sample).encode() for sample in samples]
    assert sorted(store.read_samples) == sorted(samples)


def test_as_many_are_on_the_way_as_allowed_and_no_more(ahead: Callable[..., ReadAhead]) -> None:
    store = SlowStore(0.02)
    reader = ahead(store, 5)
    reader.plan(s for s in range(40) if s % 10 != 7)
    wait_until(lambda: len(store.read_samples) == 5 and store.now == 0)
    time.sleep(0.05)
    assert len(store.read_samples) == 5, "nothing more is read before something is taken"
    assert store.most > 1
    reader.take(0)
    wait_until(lambda: len(store.read_samples) == 6)


def test_latency_is_hidden_behind_work(ahead: Callable[..., ReadAhead]) -> None:
    """A read ends when ten are on the way, three times over; one after the other, the first would never end."""
    together = threading.Barrier(10)

    class Waiting(SlowStore):
        def read(self, sample: int) -> bytes:
            together.wait(timeout=60)
            return super().read(sample)

    store = Waiting()
    reader = ahead(store, 10)
    samples = [s for s in range(34) if s % 10 != 7][:30]
    reader.plan(samples)
    assert [reader.take(sample) for sample in samples] == [str(sample).encode() for sample in samples]
    assert len(store.read_samples) == 30


def test_an_error_is_raised_where_its_sample_is_taken(ahead: Callable[..., ReadAhead]) -> None:
    reader = ahead(SlowStore(), 3)
    reader.plan([1, 7, 2])
    assert reader.take(1) == b"1"
    with pytest.raises(ValueError, match="sample 7 is broken"):
        reader.take(7)
    assert reader.take(2) == b"2"


def test_what_was_not_planned_or_is_asked_for_twice_is_read_there_and_then(
    ahead: Callable[..., ReadAhead],
) -> None:
    store = SlowStore()
    reader = ahead(store, 2)
    reader.plan([1, 2, 1, 3])
    assert [reader.take(s) for s in (9, 1, 2, 1, 3, 9)] == [b"9", b"1", b"2", b"1", b"3", b"9"]
    assert sorted(store.read_samples) == [1, 1, 2, 3, 9, 9]


def test_a_new_plan_frees_what_the_old_one_held(ahead: Callable[..., ReadAhead]) -> None:
    store = SlowStore()
    reader = ahead(store, 2)
    reader.plan([1, 2, 3, 4])
    wait_until(lambda: len(store.read_samples) == 2)
    reader.plan([2, 5, 6])
    assert [reader.take(s) for s in (2, 5, 6)] == [b"2", b"5", b"6"]
    assert sorted(store.read_samples) == [1, 2, 5, 6]


def test_taking_out_of_order_keeps_no_place_for_ever(ahead: Callable[..., ReadAhead]) -> None:
    store = SlowStore()
    reader = ahead(store, 2)
    reader.plan(range(6))
    for sample in (5, 4, 3, 2, 1, 0):
        assert reader.take(sample) == str(sample).encode()
    reader.plan([11, 12])
    wait_until(lambda: {11, 12} <= set(store.read_samples))
