"""The order of samples: a pure function of (seed, epoch, position), independent of ranks, workers and batches.

Two orders, both bijections of the N samples of an epoch, and a weighted mixture of them:

* ``windowed`` (default): shards are permuted and dealt to S streams; each stream shuffles inside windows of its
  samples; positions go round-robin over the streams. Reads stay near each other.
* ``global``: a seeded permutation of all samples, computed point by point in O(1) memory (a Feistel network with
  cycle walking, Black and Rogaway 2002), so that 10^9 samples cost nothing.
* ``Mixture``: several of these side by side, each with its share of the positions.

Balanced order: every class, or every cluster of clips that look alike, as often as every other, whatever its size.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cliplift.configs.sections import ConfigError
from cliplift.sharding.read.shared import SharedArray

Ints = npt.NDArray[np.int64]

CLUSTER_KEY = "data.cluster_balanced"
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


class Draw(NamedTuple):
    """A sample, and the pass over its data in which it is drawn: together the source of its random numbers."""

    sample: int
    epoch: int


@dataclass(frozen=True)
class GlobalOrder:
    """A permutation of N samples for every epoch, evaluated point by point."""

    num_samples: int
    seed: int

    def draw(self, epoch: int, position: int) -> Draw:
        return Draw(self.sample(epoch, position), epoch)

    def sample(self, epoch: int, position: int) -> int:
        """The sample at a position of an epoch."""
        # A Feistel network permutes 2**(2 half) values, at most 4 N. Values of N and above are sent through it again
        # (cycle walking): as the larger map is one to one, so is what it makes of the N samples.
        bits = max(2, (self.num_samples - 1).bit_length())
        half = (bits + 1) // 2
        value = position
        while True:
            value = self._feistel(value, half, epoch)
            if value < self.num_samples:
                return value

    def substitutes(self, position: int) -> range:
        """Positions that may stand in for this one: all of them, as reads are spread over everything anyway."""
        return range(self.num_samples)

    def _feistel(self, value: int, half: int, epoch: int) -> int:
        mask = (1 << half) - 1
        left, right = value >> half, value & mask
        for r in range(ROUNDS):
            left, right = right, left ^ (mix(self.seed, epoch, r, right) & mask)
        return (left << half) | right


class WindowedOrder:
    """Shuffled shards, S streams, shuffled windows: local reads, and still every sample once an epoch.

    Positions are computed one by one from tables of the shards and of the open windows, so that memory does not grow
    with the samples.

    Args:
        shard_ranges: (K, 2) first sample of each of K shards, and the one after its last.
        seed: of all permutations.
        streams: S, shards read side by side.
        window_samples: neighbouring samples of a stream that are shuffled together.
    """

    def __init__(self, shard_ranges: npt.ArrayLike, seed: int, streams: int, window_samples: int) -> None:
        self._ranges = SharedArray(np.asarray(shard_ranges, dtype=np.int64).reshape(-1, 2))
        self.seed, self.streams, self.window_samples = seed, streams, window_samples
        self.num_samples = int((self.ranges[:, 1] - self.ranges[:, 0]).sum())
        self._epochs: OrderedDict[int, _DealtShards] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int, int], Ints] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        # What was computed so far is computed anew where it is needed, and not sent to every worker.
        return self.__dict__ | {"_epochs": OrderedDict(), "_windows": OrderedDict()}

    @property
    def ranges(self) -> Ints:
        """(K, 2) first sample of each shard, and the one after its last."""
        return self._ranges.array

    def draw(self, epoch: int, position: int) -> Draw:
        return Draw(self.sample(epoch, position), epoch)

    def sample(self, epoch: int, position: int) -> int:
        """The sample at a position of an epoch."""
        dealt = self._dealt(epoch)
        # Streams take turns, so that neighbouring positions come from different shards. Within a stream only a window
        # of neighbours is shuffled, so that reads stay near each other.
        stream, turn = dealt.place(position)
        window, inside = divmod(turn, self.window_samples)
        first = window * self.window_samples
        shuffled = self._shuffled(
            epoch, stream, window, min(self.window_samples, int(dealt.lengths[stream]) - first)
        )
        return dealt.sample(stream, first + int(shuffled[inside]))

    def substitutes(self, position: int) -> range:
        """Positions read at about the same time as this one: the same windows of all streams."""
        size = self.streams * self.window_samples
        start = position // size * size
        return range(start, min(start + size, self.num_samples))

    def _dealt(self, epoch: int) -> _DealtShards:
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # two epochs are alive around an epoch's end
                self._epochs.popitem(last=False)
            self._epochs[epoch] = _DealtShards(
                self.ranges, self.streams, generator(self.seed, epoch, 1).permutation(len(self.ranges))
            )
        return self._epochs[epoch]

    def _shuffled(self, epoch: int, stream: int, window: int, size: int) -> Ints:
        key = (epoch, stream, window)
        found = self._windows.get(key)
        if found is None:
            # A first window is keyed by its stream alone: streams of one window keep the order of the versions in which
            # a stream had one generator for all its windows.
            words = (self.seed, epoch, 2, stream, *((window,) if window else ()))
            found = generator(*words).permutation(np.arange(size, dtype=np.int64))
            while len(self._windows) > 2 * self.streams:
                self._windows.popitem(last=False)
            self._windows[key] = found
        return found


class _DealtShards:
    """The shards of one epoch, dealt to streams, and where each position falls."""

    def __init__(self, ranges: Ints, streams: int, permutation: Ints) -> None:
        shuffled = ranges[permutation]
        streams = min(streams, len(ranges))
        self._firsts = [shuffled[number::streams, 0] for number in range(streams)]
        sizes = shuffled[:, 1] - shuffled[:, 0]
        self._stops = [np.cumsum(sizes[number::streams]) for number in range(streams)]
        self.lengths = np.array([stops[-1] for stops in self._stops], dtype=np.int64)
        # Positions go round the streams; one that ends leaves the round. Between two ends the round is the same.
        ends = np.unique(self.lengths)
        self._turns = np.concatenate([[0], ends[:-1]])
        self._rounds = [np.flatnonzero(self.lengths > turn) for turn in self._turns]
        counts = np.array([len(members) for members in self._rounds], dtype=np.int64)
        self._bases = np.concatenate([[0], np.cumsum(counts * (ends - self._turns))])

    def place(self, position: int) -> tuple[int, int]:
        """(stream, turn) of a position."""
        if not 0 <= position < self._bases[-1]:
            raise IndexError(f"position {position} of {self._bases[-1]}")
        part = int(np.searchsorted(self._bases, position, side="right")) - 1
        members = self._rounds[part]
        turn, member = divmod(position - int(self._bases[part]), len(members))
        return int(members[member]), int(self._turns[part]) + turn

    def sample(self, stream: int, number: int) -> int:
        """The number-th sample of a stream, before its windows are shuffled."""
        shard = int(np.searchsorted(self._stops[stream], number, side="right"))
        before = int(self._stops[stream][shard - 1]) if shard else 0
        return int(self._firsts[stream][shard]) + number - before


class Mixture:
    """Several orders read as one, each with a fixed share of the positions.

    Every block of :data:`BLOCK` positions gives each part its share exactly, in an order drawn anew and spread evenly.
    Positions count on from epoch to epoch, and each part is walked through from its first position to its last before
    it starts its next pass; so no sample of a part comes a second time before all others of it came.

    Args:
        parts: the orders; their samples are numbered one part after the other.
        weights: relative shares, one per part.
        seed: of the dealing.

    Raises:
        ValueError: a weight is below half a thousandth of the sum.
    """

    def __init__(
        self, parts: Sequence[GlobalOrder | WindowedOrder], weights: Sequence[float], seed: int
    ) -> None:
        self.parts, self.seed = tuple(parts), seed
        self.quotas = quotas(weights)
        self.num_samples = sum(part.num_samples for part in parts)
        self._starts = [0, *itertools.accumulate(part.num_samples for part in parts)]
        self._blocks: OrderedDict[int, tuple[Ints, Ints]] = OrderedDict()

    def draw(self, epoch: int, position: int) -> Draw:
        block, inside = divmod(epoch * self.num_samples + position, BLOCK)
        which, before = self._dealt(block)
        part = int(which[inside])
        # Every block gives a part its quota exactly, so how often it was drawn before is a product, not a count.
        drawn = block * int(self.quotas[part]) + int(before[inside])
        passes, at = divmod(drawn, self.parts[part].num_samples)
        return Draw(self._starts[part] + self.parts[part].sample(passes, at), passes)

    def substitutes(self, position: int) -> range:
        """Positions dealt together with this one."""
        start = position // BLOCK * BLOCK
        return range(start, min(start + BLOCK, self.num_samples))

    def _dealt(self, block: int) -> tuple[Ints, Ints]:
        """(BLOCK,) the part of each position of a block, and how often it came before in the block."""
        if block not in self._blocks:
            rng = generator(self.seed, block, 3)
            parts = np.repeat(np.arange(len(self.quotas)), self.quotas)
            counts = np.concatenate([np.arange(quota) for quota in self.quotas])
            # Turn i of n lies at random in the i-th of n equal parts of the block: even, yet without a rhythm that
            # could meet the ranks' (every second position to one rank).
            at = (counts + rng.random(BLOCK)) / self.quotas[parts]
            order = np.lexsort((parts, at))
            while len(self._blocks) > 3:
                self._blocks.popitem(last=False)
            self._blocks[block] = parts[order], counts[order]
        return self._blocks[block]


BLOCK = 1000


def quotas(weights: Sequence[float]) -> Ints:
    """How many of :data:`BLOCK` positions each weight gives: rounded down, the rest to the largest remainders."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * BLOCK
    whole = np.floor(exact).astype(np.int64)
    largest = np.argsort(whole - exact, kind="stable")[: BLOCK - int(whole.sum())]
    whole[largest] += 1
    if (whole == 0).any():
        raise ValueError(
            f"weight {weights[int(np.argmin(whole))]} is less than 1/{BLOCK} of the sum of weights"
        )
    return whole


Order = GlobalOrder | WindowedOrder | Mixture


def rank_positions(*, step: int, global_batch: int, rank: int, world_size: int) -> range:
    """Positions that a rank reads in optimizer step ``step``: those of the global batch that are rank mod ranks."""
    return range(step * global_batch + rank, (step + 1) * global_batch, world_size)


class BalancedOrder:
    """Rounds of all K classes, each round in an order of its own; within a class, its samples in permuted passes.

    A pure function of (seed, epoch, position) like the other orders. Rounds count on from epoch to epoch, so a rare
    class starts its next pass only after all its samples came. Reads are spread over all shards: shards that are
    remote are better cached. Clusters are dealt as classes are.

    Args:
        labels: (N,) class of every sample, or its cluster.
        seed: of all permutations.
        key: of the config that asks for it, for messages.

    Raises:
        ConfigError: a sample has no class.
    """

    def __init__(self, labels: npt.ArrayLike, seed: int, *, key: str = "data.class_balanced") -> None:
        found = np.asarray(labels, dtype=np.int64)
        if (found < 0).any():
            what = "cluster" if key == CLUSTER_KEY else "class"
            raise ConfigError(
                f"needs a {what} for every sample, and {int((found < 0).sum())} have none",
                key=key,
                value=True,
                hint="use data.where: cluster >= 0" if key == CLUSTER_KEY else "use false",
            )
        self.num_samples, self.seed = len(found), seed
        # All samples, one class after the other, and where each class begins: the only table of an order.
        self._members = SharedArray(np.argsort(found, kind="stable"))
        self._starts = np.cumsum([0, *np.unique(found, return_counts=True)[1]]).tolist()
        sizes = np.diff(self._starts).tolist()
        self.within = [GlobalOrder(size, mix(seed, k)) for k, size in enumerate(sizes)]
        self._rounds: OrderedDict[int, Ints] = OrderedDict()

    def draw(self, epoch: int, position: int) -> Draw:
        # A round is K positions, one of each class. Rounds are counted through the whole run, as an epoch's N positions
        # seldom end with one.
        turn, inside = divmod(epoch * self.num_samples + position, len(self.within))
        k = int(self._dealt(turn)[inside])
        passes, at = divmod(turn, self.within[k].num_samples)
        return Draw(int(self._members.array[self._starts[k] + self.within[k].sample(passes, at)]), passes)

    def substitutes(self, position: int) -> range:
        """Positions that may stand in for this one."""
        return range(self.num_samples)

    def _dealt(self, turn: int) -> Ints:
        if turn not in self._rounds:
            while len(self._rounds) > 3:
                self._rounds.popitem(last=False)
            self._rounds[turn] = generator(self.seed, turn, 5).permutation(len(self.within))
        return self._rounds[turn]
