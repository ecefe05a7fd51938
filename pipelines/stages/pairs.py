"""Which frames a clip is paired with: its own, and those of other videos (or of other times)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cliplift.configs.sections import ConfigError


@dataclass(frozen=True)
class Pairs:
    """For clip i, column 0 of ``frames`` is its own frames' row, the others are rows it does not belong to."""

    frames: Tensor  # int64 (B, 1 + k), k negatives of both kinds

    @property
    def targets(self) -> Tensor:
        """1 for the positive column, 0 for the negatives: int64 (B, 1 + k)."""
        targets = torch.zeros_like(self.frames)
        targets[:, 0] = 1
        return targets


def draw_pairs(
    *, videos: Tensor, rows: Tensor, negatives: int, seed: int, step: int, same_video: int = 0
) -> Pairs:
    """Choose the frames each clip is paired with, from the whole global batch.

    Args:
        videos: int64 (G,) source video of every clip of the global batch.
        rows: int64 (B,) this rank's rows in it.
        negatives: k, frames of other videos per clip.
        same_video: further negatives per clip: frames of its own video at another time, which are harder.
        seed, step: the choice is a function of these and ``videos`` alone, the same on every rank.

    Raises:
        ConfigError: a clip has fewer than k clips of other videos, or ``same_video`` others of its own, in the batch.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    scores = torch.rand(len(videos), len(videos), generator=generator).to(videos.device)[rows]
    same = videos[rows, None] == videos[None, :]
    available = int((~same).sum(dim=1).min())
    if available < negatives:
        raise ConfigError(
            f"a batch of {len(videos)} clips holds only {available} of other videos than one of its clips",
            key="correspondence.negatives_per_clip",
            value=negatives,
            hint="use a larger engine.global_batch, or shards with more source videos",
        )
    chosen = [rows[:, None], scores.masked_fill(same, -1.0).topk(negatives, dim=1).indices]
    if same_video:
        others = same & (torch.arange(len(videos), device=videos.device)[None, :] != rows[:, None])
        if int(others.sum(dim=1).min()) < same_video:
            raise ConfigError(
                f"a batch of {len(videos)} clips has a clip with fewer than {same_video} others of its own video",
                key="correspondence.same_video_negatives",
                value=same_video,
                hint=f"set data.clips_per_sample to {same_video + 1} or more",
            )
        chosen.append(scores.masked_fill(~others, -1.0).topk(same_video, dim=1).indices)
    return Pairs(torch.cat(chosen, dim=1))
