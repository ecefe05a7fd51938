"""Which tokens of a clip are hidden: pure functions of integers.

A mask depends on (seed, epoch, position of the clip in the data) and on nothing else, so any division of the clips
among ranks, micro-batches and loader workers gives the same masks. Random numbers are counted, not drawn from a
generator with a state: number k of a clip is a hash of (seed, stream, epoch, position, k).

Tube, random and running-cell masks are VideoMAE's (arXiv 2203.12602) and VideoMAE v2's (2303.16727); block masks are
V-JEPA's (2404.08471, 2506.09985); the mask that follows a teacher's attention is Unmasked Teacher's (2303.16058), and
depends on those weights too. All are bool tensors (B, N) over the flat token numbers, True = hidden, on the CPU;
:func:`token_numbers` and :func:`context_and_targets` make the number lists that the networks take.

Shape letters: B clips, T H W tokens along time, rows, columns, N = T*H*W, n and m tokens in a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cliplift.models.protocol import ModelError
from cliplift.models.video_vit.positions import TokenGrid

MAX_REDRAWS = 1_000
# Streams of random numbers, so that no two uses of a clip's numbers are related.
_TUBE, _RANDOM, _CELL, _BLOCK_SIZE, _BLOCK_PLACE, _SUBSET, _WEIGHTED = range(7)


def _signed(word: int) -> int:
    """An unsigned 64-bit constant as torch's int64 holds it; products wrap round alike."""
    return word - (1 << 64) if word >= 1 << 63 else word


_START, _FIRST, _SECOND = (_signed(w) for w in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class MaskDraws:
    """What the masks of some clips depend on.

    Args:
        seed: of the run.
        epochs, positions: (B,) int64: the pass over the data, and the clip's place in it.
    """

    seed: int
    epochs: Tensor
    positions: Tensor

    @classmethod
    def of(cls, seed: int, *, epoch: int | Sequence[int], positions: Sequence[int]) -> MaskDraws:
        """From plain integers; one epoch for all clips, or one each."""
        places = torch.as_tensor(list(positions), dtype=torch.int64)
        epochs = [epoch] * len(places) if isinstance(epoch, int) else list(epoch)
        return cls(seed, torch.as_tensor(epochs, dtype=torch.int64), places)

    def __len__(self) -> int:
        return len(self.positions)

    def rows(self, which: Tensor) -> MaskDraws:
        return MaskDraws(self.seed, self.epochs[which], self.positions[which])

    def of_mask(self, number: int, masks: int) -> MaskDraws:
        """What one of several masks of the same clips depends on: numbers unrelated to those of the others."""
        return MaskDraws(self.seed * masks + number, self.epochs, self.positions)

    def uniform(self, stream: int, count: int, *, first: int = 0) -> Tensor:
        """Numbers ``first`` to ``first + count`` of a stream: (B, count), float64 in [0, 1)."""
        state = torch.tensor(_START, dtype=torch.int64)
        words = (
            torch.tensor(_signed(self.seed % (1 << 64)), dtype=torch.int64),
            torch.tensor(stream, dtype=torch.int64),
            self.epochs[:, None],
            self.positions[:, None],
            torch.arange(first, first + count)[None],
        )
        for word in words:
            state = _mixed(state, word)
        return _shifted(state, 11).double() * 2.0**-53


def _mixed(state: Tensor, word: Tensor) -> Tensor:
    """One step of a chained splitmix64 finaliser."""
    state = (state ^ word) * _FIRST
    state = (state ^ _shifted(state, 27)) * _SECOND
    return state ^ _shifted(state, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Right shift that draws in zeros."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def tube_mask(grid: TokenGrid, draws: MaskDraws, *, ratio: float) -> Tensor:
    """One random set of places, hidden at all times: int(ratio * H * W) of each frame of tokens. (B, N)."""
    _check_ratio(ratio)
    of_frame = _chosen(draws, _TUBE, grid.tokens_of_a_frame, int(ratio * grid.tokens_of_a_frame))
    return of_frame.repeat(1, grid.frames)


def random_mask(grid: TokenGrid, draws: MaskDraws, *, ratio: float) -> Tensor:
    """int(ratio * N) tokens anywhere. (B, N)."""
    _check_ratio(ratio)
    return exact_mask(grid, draws, hidden=int(ratio * grid.tokens))


def exact_mask(grid: TokenGrid, draws: MaskDraws, *, hidden: int) -> Tensor:
    """``hidden`` tokens anywhere. (B, N)."""
    return _chosen(draws, _RANDOM, grid.tokens, hidden)


def running_cell_mask(grid: TokenGrid, draws: MaskDraws, *, ratio: float) -> Tensor:
    """VideoMAE v2's decoder mask. (B, N).

    int(4 * ratio) neighbours, in cyclic order, of every cell of 2 x 2 are hidden; the pattern advances by one with each
    token of time, and starts in one of 4 phases, drawn for the clip. At ratio 0.5, two frames of tokens that are two
    apart hide every place once.
    """
    hidden = int(4 * ratio)
    if not 0 < hidden < 4:
        raise ModelError(
            f"ratio={ratio}: a running cell hides 1, 2 or 3 of its 4 tokens, so 0.25 <= ratio < 1"
        )
    phase = (draws.uniform(_CELL, 1) * 4).long()[:, :, None, None]
    t = torch.arange(grid.frames)[:, None, None]
    inside = 2 * (torch.arange(grid.rows)[:, None] % 2) + torch.arange(grid.columns) % 2
    return ((inside + t + 1 + phase) % 4 < hidden).flatten(1)


def weighted_mask(grid: TokenGrid, draws: MaskDraws, weights: Tensor, *, ratio: float) -> Tensor:
    """Unmasked Teacher's mask (arXiv 2303.16058): int(ratio * H * W) of each frame of tokens are hidden, and the
    visible ones are drawn without replacement, each as likely as its weight says. (B, N) on the device of the weights.

    The place with the smallest E / weight comes first, E exponential (Efraimidis and Spirakis 2006), so that a mask is
    a function of the clip's counted numbers and its weights.

    Args:
        weights: (B, N), a teacher's attention; none below 0.
    """
    _check_ratio(ratio)
    places = grid.tokens_of_a_frame
    waiting = -draws.uniform(_WEIGHTED, grid.tokens).neg().log1p()  # exponential
    if weights.is_cuda:
        waiting = waiting.pin_memory().to(weights.device, non_blocking=True)
    arrival = waiting / weights.double().clamp_min(torch.finfo(torch.float32).tiny)
    ranks = torch.unflatten(arrival, 1, (grid.frames, places)).argsort(dim=2, stable=True).argsort(dim=2)
    return (ranks >= places - int(ratio * places)).flatten(1)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """One of V-JEPA's masks: the union of ``count`` blocks. Published: 8 of scale 0.15, and 2 of scale 0.7.

    Args:
        scale, duration: ranges of a block's share of the frame and of the clip's length.
        aspect: range of height over width.
        context, targets: shares of the clip's tokens that are used, of those left and of those hidden. Ours are what
            the released code keeps on average after cutting the lists of 24 clips to the shortest.
    """

    count: int
    scale: tuple[float, float]
    context: float
    targets: float
    duration: tuple[float, float] = (1.0, 1.0)
    aspect: tuple[float, float] = (0.75, 1.5)

    def __post_init__(self) -> None:
        ranges = (self.scale, self.duration, self.aspect)
        if self.count < 1 or any(not 0 < low <= high for low, high in ranges):
            raise ModelError(f"{self}: the count and all ranges must be positive, and ranges ascend")
        if self.scale[1] > 1 or self.duration[1] > 1:
            raise ModelError(f"{self}: scale and duration are shares of the clip, at most 1")


SHORT_RANGE = Blocks(count=8, scale=(0.15, 0.15), context=0.25, targets=0.465)
LONG_RANGE = Blocks(count=2, scale=(0.7, 0.7), context=0.064, targets=0.703)


def block_mask(
    grid: TokenGrid,
    draws: MaskDraws,
    blocks: Blocks,
    *,
    size_draws: MaskDraws | None = None,
    attempt: int = 0,
) -> Tensor:
    """The union of a clip's blocks. (B, N), True = to be predicted.

    Args:
        size_draws: what the block's size is drawn from. None: the clip itself. The released code draws one size a
            batch: for that, give draws whose positions are all the number of the optimizer step.
        attempt: another one gives other, unrelated places, and sizes where the clip draws them.
    """
    sizes = (
        _block_sizes(grid, draws, blocks, attempt)
        if size_draws is None
        else _block_sizes(grid, size_draws, blocks, 0)
    )
    wide = 3 * blocks.count
    places = draws.uniform(_BLOCK_PLACE, wide, first=attempt * wide).reshape(-1, blocks.count, 3)
    room = torch.tensor(grid) - sizes + 1  # (B, 3)
    start = (places * room[:, None]).long()  # (B, count, 3)
    inside = []
    for axis, length in enumerate(grid):
        at = torch.arange(length)
        first = start[:, :, axis, None]
        inside.append((at >= first) & (at < first + sizes[:, None, axis, None]))  # (B, count, length)
    t, h, w = inside
    covered = t[:, :, :, None, None] & h[:, :, None, :, None] & w[:, :, None, None, :]
    return torch.any(covered, dim=1).flatten(1)


def block_numbers(grid: TokenGrid, draws: MaskDraws, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Context and target tokens of a V-JEPA mask, clip by clip: int(share * N) of each, whatever else is in the batch.

    Returns:
        Token numbers (B, n) and (B, m), ascending.

    Raises:
        ModelError: shares that the blocks hardly ever or never give.
    """
    context, targets = int(blocks.context * grid.tokens), int(blocks.targets * grid.tokens)
    mask = bounded_block_mask(grid, draws, blocks, context=context, targets=targets)
    return context_and_targets(mask, draws, context=context, targets=targets)


def bounded_block_mask(
    grid: TokenGrid,
    draws: MaskDraws,
    blocks: Blocks,
    *,
    context: int,
    targets: int,
    size_draws: MaskDraws | None = None,
) -> Tensor:
    """:func:`block_mask`, drawn again clip by clip until ``context`` tokens are left and ``targets`` are hidden.

    Raises:
        ModelError: numbers that the blocks hardly ever or never give.
    """
    if context < 1 or targets < 1 or context + targets > grid.tokens:
        raise ModelError(
            f"context={context} and targets={targets} tokens must be positive and fit into the clip's {grid.tokens}"
        )
    mask = torch.zeros(len(draws), grid.tokens, dtype=torch.bool)
    open_rows = torch.arange(len(draws))
    for attempt in range(MAX_REDRAWS):
        sizes = None if size_draws is None else size_draws.rows(open_rows)
        drawn = block_mask(grid, draws.rows(open_rows), blocks, size_draws=sizes, attempt=attempt)
        hidden = drawn.sum(dim=1)
        good = (hidden >= targets) & (grid.tokens - hidden >= context)
        mask[open_rows[good]] = drawn[good]
        open_rows = open_rows[~good]
        if not len(open_rows):
            return mask
    raise ModelError(
        f"{blocks} on {grid.frames}x{grid.rows}x{grid.columns} tokens did not leave {context} and hide {targets} in "
        f"{MAX_REDRAWS} draws: take fewer context or target tokens, or a larger crop"
    )


def context_and_targets(
    mask: Tensor, draws: MaskDraws, *, context: int, targets: int
) -> tuple[Tensor, Tensor]:
    """Per-clip rule: of each clip's visible and hidden tokens, a random subset of fixed size.

    Every token of a clip is as likely to be dropped as any other, no other clip has a say, and the lists' lengths are
    the same in every batch.

    Args:
        mask: (B, N), True = hidden, with at least so many of each (:func:`bounded_block_mask`).
        context, targets: n and m.

    Returns:
        Token numbers (B, n) and (B, m), ascending.
    """
    keys = draws.uniform(_SUBSET, mask.shape[1])
    return _lowest(keys, ~mask, context), _lowest(keys, mask, targets)


def shortest_of_batch(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The released code's rule: cut every list to the shortest of the batch, from its end.

    Token numbers ascend with time, so what is lost is always the end of the clip, and how much depends on which clips
    share a batch: losses are then a function of the micro-batch. Here for comparison with the published runs.

    Returns:
        Context and target numbers, (B, n) and (B, m), ascending.
    """
    lists = []
    for part in (~mask, mask):
        shortest = int(part.sum(dim=1).min())
        lists.append(part.long().argsort(dim=1, descending=True, stable=True)[:, :shortest])
    return lists[0], lists[1]


def token_numbers(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Visible and hidden token numbers of masks (B, N), each ascending: (B, n) and (B, m).

    Raises:
        ModelError: clips with different numbers of hidden tokens.
    """
    hidden = mask.sum(dim=1)
    if len(mask) and bool((hidden != hidden[0]).any()):
        raise ModelError(
            f"the clips of a batch must hide equally many tokens, got {sorted(set(hidden.tolist()))}"
        )
    order = mask.long().argsort(dim=1, stable=True)
    visible = mask.shape[1] - (int(hidden[0]) if len(mask) else 0)
    return order[:, :visible], order[:, visible:]


def _chosen(draws: MaskDraws, stream: int, size: int, count: int) -> Tensor:
    """``count`` of ``size``, each subset equally likely: (B, size) bool."""
    ranks = draws.uniform(stream, size).argsort(dim=1, stable=True).argsort(dim=1)
    return ranks < count


def _lowest(keys: Tensor, allowed: Tensor, count: int) -> Tensor:
    """The places of the ``count`` lowest keys among the allowed, ascending."""
    short = int(allowed.sum(dim=1).min()) if len(allowed) else count
    if short < count:
        raise ModelError(f"{count} tokens asked of a clip that has {short}")
    return keys.masked_fill(~allowed, 2.0).argsort(dim=1, stable=True)[:, :count].sort(dim=1).values


def _block_sizes(grid: TokenGrid, draws: MaskDraws, blocks: Blocks, attempt: int) -> Tensor:
    """(B, 3): tokens of a block along time, rows, columns."""
    shares = draws.uniform(_BLOCK_SIZE, 3, first=3 * attempt)
    duration, scale, aspect = (
        low + shares[:, i] * (high - low)
        for i, (low, high) in enumerate((blocks.duration, blocks.scale, blocks.aspect))
    )
    area = (grid.tokens_of_a_frame * scale).floor()
    frames = (grid.frames * duration).floor().clamp(min=1)
    rows = (area * aspect).sqrt().round().clamp(min=1, max=grid.rows)
    columns = (area / aspect).sqrt().round().clamp(min=1, max=grid.columns)
    return torch.stack([frames, rows, columns], dim=1).long()


def _check_ratio(ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise ModelError(f"ratio={ratio} must be in [0, 1)")
