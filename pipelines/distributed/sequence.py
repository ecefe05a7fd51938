"""Sequence parallelism: neighbouring ranks share every training clip, each with a run of its tokens.

DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509): tokens are dealt over the ranks of a group, and attention exchanges
them for heads by an all-to-all, so that each rank attends with its own heads over all tokens. What the network does
with that is in :mod:`cliplift.models.video_vit.blocks`; here are the exchanges and their gradients.

Gradients: the ranks of a group compute the same loss, each from its own tokens and what it was given of the others'.
Every exchange has its exact adjoint with respect to the sum of the losses of all ranks. The mean of the gradients over
all ranks, which DeepSpeed makes at every ZeRO stage, is therefore the gradient of the mean loss over the clips: the sum
over the ranks of a group of what their tokens give, averaged over the groups. Nothing has to be scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cliplift.configs.sections import ConfigError
from cliplift.configs.training import EngineConfig
from cliplift.models.protocol import ModelError
from cliplift.models.video_vit.blocks import DealsTokens
from cliplift.pipelines.distributed.collectives import Topology

KEY = "engine.sequence_parallel"


class SequenceGroup:
    """This rank's group, as networks know it (:class:`~cliplift.models.video_vit.blocks.TokenGroup`).

    Without ``ranks`` nothing is sent, and what would come has its shape alone: to measure with.
    """

    def __init__(self, *, rank: int, size: int, ranks: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size, self._ranks = rank, size, ranks

    def exchange(self, rows: Tensor, *, given: Sequence[int], taken: Sequence[int]) -> Tensor:
        """(sum of ``given``, ...), of which rank j gets the j-th ``given`` rows -> (sum of ``taken``, ...), the i-th
        ``taken`` rows from rank i."""
        found: Tensor = _Exchange.apply(rows, self, given, taken)  # type: ignore[no-untyped-call]
        return found

    def gather(self, rows: Tensor, lengths: Sequence[int]) -> Tensor:
        """(lengths[rank], ...) -> (sum of ``lengths``, ...): the rows of all ranks, used by all of them alike."""
        found: Tensor = _Gather.apply(rows, self, lengths)  # type: ignore[no-untyped-call]
        return found

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks, used by all of them alike."""
        found: Tensor = _Total.apply(x, self)  # type: ignore[no-untyped-call]
        return found

    def send(self, rows: Tensor, *, given: Sequence[int], taken: Sequence[int]) -> Tensor:
        """:meth:`exchange` without a gradient."""
        received = rows.new_empty(sum(taken), *rows.shape[1:])
        if self._ranks is not None:
            dist.all_to_all_single(received, rows.contiguous(), list(taken), list(given), group=self._ranks)
        return received

    def collect(self, rows: Tensor, lengths: Sequence[int]) -> Tensor:
        """:meth:`gather` without a gradient. Collectives want equal parts: shorter ones end in rows nobody reads."""
        own = rows.new_zeros(max(lengths), *rows.shape[1:])
        own[: len(rows)] = rows
        parts = [torch.empty_like(own) for _ in lengths]
        if self._ranks is not None:
            dist.all_gather(parts, own, group=self._ranks)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def add_up(self, x: Tensor) -> Tensor:
        """:meth:`total` without a gradient."""
        found = x.clone(memory_format=torch.contiguous_format)
        if self._ranks is not None:
            dist.all_reduce(found, group=self._ranks)
        return found


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, group: SequenceGroup, given: Sequence[int], taken: Sequence[int]
    ) -> Tensor:
        ctx.back = partial(group.send, given=taken, taken=given)
        return group.send(rows, given=given, taken=taken)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Every row goes back to where it came from."""
        return ctx.back(gradient), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: SequenceGroup, lengths: Sequence[int]) -> Tensor:
        ctx.size, ctx.first, ctx.length = group.size, sum(lengths[: group.rank]), lengths[group.rank]
        return group.collect(rows, lengths)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The sum over the ranks of the gradients of these rows. All have the same: none is sent."""
        return ctx.size * gradient[ctx.first : ctx.first + ctx.length], None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup) -> Tensor:
        ctx.size = group.size
        return group.add_up(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The sum over the ranks, as of gathered rows."""
        return ctx.size * gradient, None


_made: dict[
    tuple[int, int], dist.ProcessGroup
] = {}  # (ranks, size) -> this rank's group of a process's world


def sequence_group(topology: Topology, *, timeout_seconds: float) -> SequenceGroup:
    """This rank's group of ``topology.sequence_parallel`` neighbours. Collective over all ranks."""
    size, rank = topology.sequence_parallel, topology.rank
    key = topology.world_size, size
    if key not in _made:
        # Every rank takes part in making every group, in the same order.
        for first in range(0, topology.world_size, size):
            members = list(range(first, first + size))
            made = dist.new_group(members, timeout=timedelta(seconds=timeout_seconds))
            if rank in members:
                _made[key] = made
    return SequenceGroup(rank=rank % size, size=size, ranks=_made[key])


def share_clips(module: nn.Module, group: SequenceGroup) -> None:
    """Make a stage's module share its training clips with the group.

    Raises:
        ConfigError: it has no such way, or not for so many ranks.
    """
    if not isinstance(module, DealsTokens):
        raise ConfigError(
            "this objective keeps every clip on one rank",
            key=KEY,
            value=group.size,
            hint="use 1; supervised training of the video ViTs can share clips",
        )
    try:
        module.deal_tokens(group)
    except ModelError as error:
        raise ConfigError(str(error), key=KEY, value=group.size, hint="1 turns it off") from None


def require_shared(module: nn.Module, engine: EngineConfig) -> None:
    """Refuse a module, which may be on the meta device, whose clips cannot be shared as the engine section says."""
    if engine.sequence_parallel > 1:
        share_clips(module, SequenceGroup(rank=0, size=engine.sequence_parallel))
