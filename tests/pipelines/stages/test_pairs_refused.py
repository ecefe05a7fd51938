"""Which batches are too small for the pairs asked for, and what a negative may be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cliplift.configs.sections import ConfigError
from cliplift.pipelines.stages import matching
from cliplift.pipelines.stages.matching import draw_pairs


def test_the_clip_with_the_fewest_others_decides() -> None:
    """Videos 0 0 0 1: the clip of video 1 has three of other videos, those of video 0 only one."""
    videos, rows = torch.tensor([0, 0, 0, 1]), torch.arange(4)
    draw_pairs(videos=videos, rows=rows, negatives=1, seed=0, step=0)
    with pytest.raises(ConfigError, match="holds only 1 of other videos"):
        draw_pairs(videos=videos, rows=rows, negatives=2, seed=0, step=0)


@pytest.mark.parametrize("step", range(5))
def test_negatives_are_of_other_videos_and_hard_ones_of_the_same(step: int) -> None:
    """Asked for as many as there are, so that one wrong candidate must show."""
    videos, rows = torch.tensor([0, 0, 1, 1, 2, 2]), torch.arange(6)
    frames = draw_pairs(videos=videos, rows=rows, negatives=4, seed=1, step=step, same_video=1).frames
    for clip, (own, *others, hard) in enumerate(frames.tolist()):
        assert own == clip
        assert sorted(others) == [row for row in range(6) if row // 2 != clip // 2]
        assert hard == clip ^ 1, "the other clip of the same video"


def test_too_few_clips_of_the_same_video_are_refused() -> None:
    """Video 1 has one clip, video 0 has three."""
    with pytest.raises(ConfigError, match="others of its own video"):
        draw_pairs(
            videos=torch.tensor([0, 0, 0, 1]), rows=torch.arange(4), negatives=1, seed=0, step=0, same_video=1
        )


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (0, 1), (1, 0), (7, 12_345)])
def test_pairs_are_pinned_across_versions(seed: int, step: int) -> None:
    """The rule written out: the highest of torch's uniform draws, seeded with 1,000,003 seed + step, among others."""
    videos = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3])
    draws = torch.rand(9, 9, generator=torch.Generator().manual_seed(1_000_003 * seed + step)).tolist()
    rows = torch.tensor([4, 0, 8])
    frames = draw_pairs(videos=videos, rows=rows, negatives=3, seed=seed, step=step, same_video=1).frames
    for row, found in zip(rows.tolist(), frames.tolist(), strict=True):
        ranked = sorted(range(9), key=lambda column, row=row: -draws[row][column])
        others = [column for column in ranked if videos[column] != videos[row]]
        own = [column for column in ranked if videos[column] == videos[row] and column != row]
        assert found == [row, *others[:3], own[0]]


def test_the_way_out_is_named_with_its_numbers() -> None:
    """Two more frames of the same video need three clips of every video."""
    videos = torch.tensor([0, 0, 1, 1])
    with pytest.raises(ConfigError, match="a clip with fewer than 2 others") as caught:
        draw_pairs(videos=videos, rows=torch.arange(4), negatives=1, seed=0, step=0, same_video=2)
    assert (caught.value.key, caught.value.value) == ("correspondence.same_video_negatives", 2)
    assert "set data.clips_per_sample to 3 or more" in str(caught.value)
    with pytest.raises(ConfigError, match="a batch of 4 clips holds only 2 of other videos") as caught:
        draw_pairs(videos=videos, rows=torch.arange(4), negatives=3, seed=0, step=0)
    assert (caught.value.key, caught.value.value) == ("correspondence.negatives_per_clip", 3)


class OnGpu:
    """What of a GPU's tensor the checks use; a GPU is not waited for."""

    is_cuda = True

    def __init__(self, number: int) -> None:
        self.number = number

    def __ge__(self, other: int) -> bool:
        return self.number >= other


@pytest.mark.parametrize(("available", "enough"), [(3, False), (4, True), (5, True)])
def test_on_a_gpu_its_own_assertion_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, available: int, enough: bool
) -> None:
    asserted: list[tuple[Any, str]] = []
    monkeypatch.setattr(torch, "_assert_async", lambda condition, said: asserted.append((condition, said)))
    assert matching._fewer(OnGpu(available), 4, "a.key") is False  # type: ignore[arg-type]
    assert asserted == [(enough, "a batch offers fewer pairs than a.key=4")]


def test_the_host_does_not_wait_for_a_copy_to_the_gpu() -> None:
    calls: list[Any] = []

    class Host:
        def pin_memory(self) -> Host:
            calls.append("pinned")
            return self

        def to(self, device: torch.device, *, non_blocking: bool) -> str:
            calls.append((device, non_blocking))
            return "there"

    gpu = torch.device("cuda")
    assert matching.send_to_device(Host(), gpu) == "there"  # type: ignore[arg-type]
    assert calls == ["pinned", (gpu, True)]
    values = torch.ones(2)
    assert matching.send_to_device(values, torch.device("cpu")) is values
