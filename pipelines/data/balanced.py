"""Class-balanced order: every class as often as every other, whatever the dataset's counts."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from cliplift.configs.sections import ConfigError
from cliplift.pipelines.data.order import Draw, GlobalOrder, Ints, generator, mix


class BalancedOrder:
    """Rounds of all K classes, each round in an order of its own; within a class, its samples in permuted passes.

    A pure function of (seed, epoch, position) like the other orders. Rounds count on from epoch to epoch, so a rare
    class starts its next pass only after all its samples came. Reads are spread over all shards: shards that are
    remote are better cached.

    Args:
        labels: (N,) class of every sample.
        seed: of all permutations.

    Raises:
        ConfigError: a sample has no class.
    """

    def __init__(self, labels: npt.ArrayLike, seed: int) -> None:
        found = np.asarray(labels, dtype=np.int64)
        if (found < 0).any():
            raise ConfigError(
                f"needs a class for every sample, and {int((found < 0).sum())} have none",
                key="data.class_balanced",
                value=True,
                hint="use false",
            )
        self.num_samples, self.seed = len(found), seed
        self.members: list[Ints] = [np.flatnonzero(found == k) for k in np.unique(found)]
        self.within = [GlobalOrder(len(rows), mix(seed, k)) for k, rows in enumerate(self.members)]
        self._rounds: OrderedDict[int, Ints] = OrderedDict()

    def draw(self, epoch: int, position: int) -> Draw:
        turn, inside = divmod(epoch * self.num_samples + position, len(self.members))
        k = int(self._dealt(turn)[inside])
        passes, at = divmod(turn, len(self.members[k]))
        return Draw(int(self.members[k][self.within[k].sample(passes, at)]), passes)

    def near(self, position: int) -> range:
        """Positions that may stand in for this one."""
        return range(self.num_samples)

    def _dealt(self, turn: int) -> Ints:
        if turn not in self._rounds:
            while len(self._rounds) > 3:
                self._rounds.popitem(last=False)
            self._rounds[turn] = generator(self.seed, turn, 5).permutation(len(self.members))
        return self._rounds[turn]
