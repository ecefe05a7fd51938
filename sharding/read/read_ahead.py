"""Bytes fetched by threads before they are asked for, so that the latency of a store is not waited for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor


class ReadAhead:
    """Reads planned samples side by side, at most ``limit`` of them read and not yet taken.

    What :meth:`take` returns does not depend on the threads: it is what reading the sample there and then would give,
    its error included. The plan is a hint: a sample that was not planned is read at once.

    Args:
        read: gives the bytes of a sample by number; called from several threads.
        limit: threads, and the most samples held.
    """

    def __init__(self, read: Callable[[int], bytes], limit: int) -> None:
        assert limit >= 1
        self._read, self._limit = read, limit
        self._planned: deque[int] = deque()
        self._running: dict[int, Future[bytes]] = {}
        self._threads = ThreadPoolExecutor(limit, thread_name_prefix="read-ahead")

    def plan(self, samples: Iterable[int]) -> None:
        """What will be taken from now on, in this order; reads of anything else are given up."""
        self._planned = deque(dict.fromkeys(samples))
        for sample in set(self._running) - set(self._planned):
            self._running.pop(sample).cancel()
        self._top_up()

    def take(self, sample: int) -> bytes:
        """The bytes of a sample; waits for them where they are on their way."""
        if sample in self._planned:
            self._planned.remove(sample)
        under_way = self._running.pop(sample, None)
        self._top_up()
        return self._read(sample) if under_way is None else under_way.result()

    def close(self) -> None:
        """Give up what is planned and end the threads; reads under way are waited for."""
        self._planned.clear()
        self._running.clear()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _top_up(self) -> None:
        for sample in self._planned:
            if len(self._running) >= self._limit:
                return
            if sample not in self._running:
                self._running[sample] = self._threads.submit(self._read, sample)
