"""Which batches are too small for the pairs asked for, and what a negative may be."""

from __future__ import annotations

import pytest
import torch

from cliplift.configs.sections import ConfigError
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
