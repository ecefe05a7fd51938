"""Masks: how many tokens, which, and what they depend on."""

from __future__ import annotations

import math

import pytest
import torch

from cliplift.models import ModelError
from cliplift.models.video_vit.masks import (
    LONG_RANGE,
    SHORT_RANGE,
    Blocks,
    MaskDraws,
    block_mask,
    block_numbers,
    bounded_block_mask,
    context_and_targets,
    random_mask,
    running_cell_mask,
    shortest_of_batch,
    token_numbers,
    tube_mask,
    weighted_mask,
)
from cliplift.models.video_vit.positions import TokenGrid

BASE = TokenGrid(8, 14, 14)
GIANT = TokenGrid(8, 16, 16)
SMALL = TokenGrid(8, 8, 8)


def draws(clips: int, *, seed: int = 3, first: int = 0, epoch: int = 0) -> MaskDraws:
    return MaskDraws.of(seed, epoch=epoch, positions=range(first, first + clips))


def splitmix(seed: int, stream: int, epoch: int, position: int, number: int) -> float:
    """The counted random number in plain integers of 64 bits."""
    limit = (1 << 64) - 1
    state = 0x9E3779B97F4A7C15
    for word in (seed, stream, epoch, position, number):
        state = (state ^ (word & limit)) * 0xBF58476D1CE4E5B9 & limit
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & limit
        state ^= state >> 31
    return (state >> 11) / 2**53


def test_random_numbers_are_a_hash_of_their_integers() -> None:
    some = MaskDraws.of(2**63 + 5, epoch=[0, 7], positions=[12, 3_000_000_000])
    found = some.uniform(4, 3, first=10)
    for row, (epoch, position) in enumerate([(0, 12), (7, 3_000_000_000)]):
        expected = [splitmix(2**63 + 5, 4, epoch, position, 10 + k) for k in range(3)]
        assert found[row].tolist() == expected


@pytest.mark.parametrize(
    ("grid", "ratio", "in_frame", "visible"),
    [(BASE, 0.9, 176, 160), (BASE, 0.75, 147, 392), (GIANT, 0.9, 230, 208)],
)
def test_tube_masks_hide_the_same_places_at_all_times(
    grid: TokenGrid, ratio: float, in_frame: int, visible: int
) -> None:
    mask = tube_mask(grid, draws(1000), ratio=ratio)
    frames = mask.unflatten(1, (grid.frames, -1))
    assert (frames.sum(dim=2) == in_frame).all()
    assert (frames == frames[:, :1]).all()
    seen, hidden = token_numbers(mask)
    assert seen.shape == (1000, visible)
    assert hidden.shape == (1000, grid.tokens - visible)
    assert not mask.gather(1, seen).any()
    assert mask.gather(1, hidden).all()
    assert (seen.diff(dim=1) > 0).all()


def test_every_place_is_hidden_equally_often() -> None:
    shares = tube_mask(SMALL, draws(10_000), ratio=0.75)[:, :64].double().mean(dim=0)
    assert (shares - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 10_000)


def test_random_masks_hide_a_fixed_number() -> None:
    mask = random_mask(BASE, draws(1000), ratio=0.9)
    assert (mask.sum(dim=1) == int(0.9 * 1568)).all()
    frames = mask.unflatten(1, (8, -1))
    assert (frames != frames[:, :1]).any()


def test_running_cells_against_a_queue() -> None:
    """The released generator's queue, turned by one for every frame of tokens."""
    grid = TokenGrid(5, 4, 6)
    patterns = set()
    for ratio, hidden in ((0.25, 1), (0.5, 2), (0.75, 3)):
        known = []
        for phase in range(4):
            queue = [True] * hidden + [False] * (4 - hidden)
            queue = queue[phase:] + queue[:phase]
            frames = []
            for _ in range(grid.frames):
                queue = queue[1:] + queue[:1]
                frames += [queue[2 * (h % 2) + w % 2] for h in range(grid.rows) for w in range(grid.columns)]
            known.append(frames)
        found = running_cell_mask(grid, draws(64), ratio=ratio).tolist()
        assert all(row in known for row in found)
        patterns |= {(ratio, known.index(row)) for row in found}
    assert len(patterns) == 12  # every phase is drawn


def test_running_cells_at_a_half_cover_every_token_once_in_two_steps() -> None:
    frames = running_cell_mask(BASE, draws(1000), ratio=0.5).unflatten(1, (8, -1))
    assert (frames.sum(dim=(1, 2)) == 784).all()
    assert (
        frames[:, :-2] != frames[:, 2:]
    ).all()  # two frames of tokens apart: what one decodes, the other does not
    assert (frames[:, :4].sum(dim=1) == 2).all()  # a whole round of the cell decodes every place twice


def test_dual_masking_counts_as_published() -> None:
    some = draws(1000)
    hidden, decoded = tube_mask(BASE, some, ratio=0.9), ~running_cell_mask(BASE, some, ratio=0.5)
    assert (decoded.sum(dim=1) == 784).all()
    assert ((decoded & hidden).sum(dim=1) == 704).all()


@pytest.mark.parametrize("make", ["tube", "random", "cell", "blocks"])
def test_a_mask_depends_on_seed_epoch_and_position_alone(make: str) -> None:
    def masks(some: MaskDraws) -> torch.Tensor:
        if make == "blocks":
            return torch.cat(block_numbers(SMALL, some, SHORT_RANGE), dim=1)
        rule = {"tube": tube_mask, "random": random_mask, "cell": running_cell_mask}[make]
        return rule(SMALL, some, ratio=0.5)

    whole = masks(draws(32))
    shuffled = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    for size in (1, 5, 32):
        parts = [masks(MaskDraws.of(3, epoch=0, positions=p.tolist())) for p in shuffled.split(size)]
        assert torch.equal(torch.cat(parts), whole[shuffled])
    for other in (draws(32, seed=4), draws(32, epoch=1), draws(32, first=32)):
        assert not torch.equal(masks(other), whole)


@pytest.mark.parametrize(("blocks", "context"), [(SHORT_RANGE, 0.373), (LONG_RANGE, 0.185)])
def test_context_left_by_blocks_is_what_the_released_code_leaves(blocks: Blocks, context: float) -> None:
    left = (~block_mask(GIANT, draws(3000), blocks)).double().mean()
    assert left == pytest.approx(context, abs=0.01)


def test_a_block_has_the_drawn_area_and_aspect_and_spans_the_clip() -> None:
    one = Blocks(count=1, scale=(0.2, 0.4), context=0.1, targets=0.1, aspect=(0.5, 2.0))
    masks = block_mask(GIANT, draws(200), one).unflatten(1, tuple(GIANT))
    assert (masks == masks[:, :1]).all()
    sizes = set()
    for frame in masks[:, 0]:
        rows, columns = frame.any(dim=1).sum().item(), frame.any(dim=0).sum().item()
        assert frame.sum() == rows * columns  # a rectangle
        assert 0.2 * 256 * 0.85 <= rows * columns <= 0.4 * 256 * 1.15  # rounding of the two sides
        assert 0.4 <= rows / columns <= 2.5
        sizes.add((rows, columns))
    assert len(sizes) > 20
    part = block_mask(
        GIANT, draws(200), Blocks(count=1, scale=(0.2, 0.2), duration=(0.25, 0.5), context=0.1, targets=0.1)
    )
    spans = part.unflatten(1, tuple(GIANT)).any(dim=3).any(dim=2).sum(dim=1)
    assert set(spans.tolist()) == {2, 3}  # int(8 * [0.25, 0.5))


def test_one_size_a_batch_as_released() -> None:
    one = Blocks(count=1, scale=(0.2, 0.6), context=0.1, targets=0.1)
    step = MaskDraws.of(3, epoch=0, positions=[17] * 50)
    masks = block_mask(GIANT, draws(50), one, size_draws=step)
    assert len(set(masks.sum(dim=1).tolist())) == 1
    assert len({tuple(row.tolist()) for row in masks}) > 10  # places are each clip's own


@pytest.mark.parametrize("blocks", [SHORT_RANGE, LONG_RANGE])
def test_the_per_clip_rule_prefers_no_end_of_the_clip(blocks: Blocks) -> None:
    clips, grid = 10_000, SMALL
    totals = torch.zeros(2, grid.frames, dtype=torch.float64)
    first = last = 0.0
    for start in range(0, clips, 2_500):
        some = draws(2_500, first=start)
        lists = block_numbers(grid, some, blocks)
        assert [part.shape[1] for part in lists] == [
            int(share * grid.tokens) for share in (blocks.context, blocks.targets)
        ]
        for i, numbers in enumerate(lists):
            totals[i] += torch.bincount((numbers // grid.tokens_of_a_frame).flatten(), minlength=grid.frames)
        cut = shortest_of_batch(block_mask(grid, some, blocks)[:24])[1] // grid.tokens_of_a_frame
        first, last = first + (cut == 0).sum().item(), last + (cut == grid.frames - 1).sum().item()
    for i, share in enumerate((blocks.context, blocks.targets)):
        expected = int(share * grid.tokens) / grid.frames
        found = totals[i] / clips
        # a clip's count at one time has a variance below its mean
        assert (found - expected).abs().max() < 5 * math.sqrt(expected / clips)
    assert last < 0.5 * first  # the released rule, for comparison, loses the end


def test_lists_are_inside_their_mask_and_ascend() -> None:
    some = draws(100)
    mask = bounded_block_mask(SMALL, some, SHORT_RANGE, context=100, targets=200)
    context, targets = context_and_targets(mask, some, context=100, targets=200)
    assert not mask.gather(1, context).any()
    assert mask.gather(1, targets).all()
    assert (context.diff(dim=1) > 0).all()
    assert (targets.diff(dim=1) > 0).all()


def test_the_released_rule_takes_the_first_of_every_list() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 1, 0, 1, 0]], dtype=torch.bool)
    context, targets = shortest_of_batch(mask)
    assert context.tolist() == [[0, 3], [3, 5]]
    assert targets.tolist() == [[1, 2, 4], [0, 1, 2]]


def test_mistakes_are_told() -> None:
    with pytest.raises(ModelError, match="ratio=1"):
        tube_mask(BASE, draws(1), ratio=1.0)
    with pytest.raises(ModelError, match="1, 2 or 3 of its 4"):
        running_cell_mask(BASE, draws(1), ratio=0.1)
    with pytest.raises(ModelError, match="did not leave"):
        bounded_block_mask(SMALL, draws(4), LONG_RANGE, context=400, targets=100)
    with pytest.raises(ModelError, match="fit into"):
        bounded_block_mask(SMALL, draws(4), LONG_RANGE, context=400, targets=200)
    with pytest.raises(ModelError, match="equally many"):
        token_numbers(torch.tensor([[True, False], [True, True]]))
    with pytest.raises(ModelError, match="shares"):
        Blocks(count=1, scale=(0.5, 1.5), context=0.1, targets=0.1)


def test_a_mask_by_attention_draws_the_visible_without_replacement_by_weight() -> None:
    """Two of four places of each of two frames are visible; how often each pair must be is written out."""
    grid, clips = TokenGrid(2, 2, 2), 20_000
    weight = {0: 4.0, 1: 3.0, 2: 2.0, 3: 1.0}
    rows = torch.tensor([list(weight.values()) * 2]).expand(clips, -1)
    mask = weighted_mask(grid, draws(clips), rows, ratio=0.5)
    assert (mask.unflatten(1, (2, 4)).sum(dim=2) == 2).all()
    visible = ~mask.unflatten(1, (2, 4))
    for frame in (0, 1):
        for a in range(4):
            for b in range(a + 1, 4):
                chance = sum(
                    weight[first] / 10 * weight[second] / (10 - weight[first])
                    for first, second in ((a, b), (b, a))
                )
                seen = (visible[:, frame, a] & visible[:, frame, b]).double().mean().item()
                assert abs(seen - chance) < 4 * math.sqrt(chance * (1 - chance) / clips), (frame, a, b)
    assert not torch.equal(visible[:, 0], visible[:, 1]), "each frame is drawn by itself"


def test_a_mask_by_attention_depends_on_its_clip_alone() -> None:
    weights = torch.rand(6, BASE.tokens, generator=torch.Generator().manual_seed(0))
    whole = weighted_mask(BASE, draws(6), weights, ratio=0.8)
    assert (whole.sum(dim=1) == 8 * 156).all()  # int(0.8 * 196) of each frame
    for i in range(6):
        alone = weighted_mask(BASE, draws(1, first=i), weights[i : i + 1], ratio=0.8)
        assert torch.equal(alone[0], whole[i])
    assert not torch.equal(weighted_mask(BASE, draws(6, epoch=1), weights, ratio=0.8), whole)


def test_places_that_a_teacher_never_looks_at_are_hidden_first() -> None:
    weights = torch.zeros(3, SMALL.tokens)
    weights[:, ::4] = 1.0
    mask = weighted_mask(SMALL, draws(3), weights, ratio=0.75)
    assert torch.equal(~mask, weights.bool())
