"""The order of samples: a pure function of (seed, epoch, position), independent of ranks, workers and batches.

Two orders, both bijections of the N samples of an epoch:

* ``windowed`` (default): shards are permuted and dealt to S streams; each stream shuffles inside windows of its
  samples; positions go round-robin over the streams. Reads stay near each other.
* ``global``: a seeded permutation of all samples, computed point by point in O(1) memory (a Feistel network with
  cycle walking, Black and Rogaway 2002), so that 10^9 samples cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

ROUNDS = 6
_MASK = (1 << 64) - 1


def mix(*words: int) -> int:
    """A 64-bit hash of integers (splitmix64 finaliser, chained): the source of every random draw of the data."""
    state = 0x9E3779B97F4A7C15
    for word in words:
        state = (state ^ (word & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def generator(*words: int) -> np.random.Generator:
    """A numpy generator that depends on these integers alone."""
    return np.random.Generator(np.random.Philox(key=mix(*words)))


@dataclass(frozen=True)
class GlobalOrder:
    """A permutation of N samples for every epoch, evaluated point by point."""

    num_samples: int
    seed: int

    def sample(self, epoch: int, position: int) -> int:
        """The sample at a position of an epoch."""
        bits = max(2, (self.num_samples - 1).bit_length())
        half = (bits + 1) // 2
        value = position
        while True:
            value = self._feistel(value, half, epoch)
            if value < self.num_samples:
                return value

    def _feistel(self, value: int, half: int, epoch: int) -> int:
        mask = (1 << half) - 1
        left, right = value >> half, value & mask
        for r in range(ROUNDS):
            left, right = right, left ^ (mix(self.seed, epoch, r, right) & mask)
        return (left << half) | right


@dataclass(frozen=True)
class WindowedOrder:
    """Shuffled shards, S streams, shuffled windows: local reads, and still every sample once an epoch."""

    shard_ranges: tuple[tuple[int, int], ...]
    seed: int
    streams: int
    window_samples: int

    @property
    def num_samples(self) -> int:
        return sum(stop - start for start, stop in self.shard_ranges)

    def sample(self, epoch: int, position: int) -> int:
        return int(_windowed_epoch(self, epoch)[position])


@lru_cache(maxsize=4)
def _windowed_epoch(order: WindowedOrder, epoch: int) -> Ints:
    """All samples of an epoch in order, 8 bytes each; two epochs are alive around an epoch's end."""
    rng = generator(order.seed, epoch, 1)
    dealt: list[list[Ints]] = [[] for _ in range(order.streams)]
    for place, shard in enumerate(rng.permutation(len(order.shard_ranges))):
        start, stop = order.shard_ranges[shard]
        dealt[place % order.streams].append(np.arange(start, stop, dtype=np.int64))
    streams = [
        _shuffled_windows(
            np.concatenate(parts), order.window_samples, generator(order.seed, epoch, 2, number)
        )
        for number, parts in enumerate(dealt)
        if parts
    ]
    return _round_robin(streams)


def _shuffled_windows(samples: Ints, window: int, rng: np.random.Generator) -> Ints:
    return np.concatenate(
        [rng.permutation(samples[start : start + window]) for start in range(0, len(samples), window)]
    )


def _round_robin(streams: Sequence[Ints]) -> Ints:
    """One sample of each stream in turn; a stream that ends leaves the round."""
    turn = np.concatenate([np.arange(len(stream)) for stream in streams])
    which = np.concatenate([np.full(len(stream), number) for number, stream in enumerate(streams)])
    ordered: Ints = np.concatenate(streams)[np.lexsort((which, turn))]
    return ordered


Order = GlobalOrder | WindowedOrder


def rank_positions(*, step: int, global_batch: int, rank: int, world_size: int) -> range:
    """Positions that a rank reads in optimizer step ``step``: those of the global batch that are rank mod ranks."""
    return range(step * global_batch + rank, (step + 1) * global_batch, world_size)
