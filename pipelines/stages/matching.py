"""How well frames are matched to clips, on held-out videos."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cliplift.pipelines.evaluation.metrics import area_under_curve, retrieval_recall
from cliplift.pipelines.stages.pairs import draw_pairs
from cliplift.pipelines.stages.supervision import SupervisionTransfer


@torch.no_grad()
def matching_metrics(
    module: SupervisionTransfer, *, clips: Tensor, frames: Tensor, videos: Tensor, seed: int
) -> dict[str, float]:
    """Matching numbers of N held-out clips (N, Dc) and their frames' features (N, Df).

    ``matching_accuracy``: one positive and one negative per clip, so the prior is exactly 0.5.
    ``above_chance_sigmas``: its distance from the prior in standard errors of a fair coin over the same pairs.
    ``recall_at_1``, ``recall_at_5``: clip -> frame retrieval among all N held-out clips.
    """
    N = len(clips)
    rows = torch.arange(N, device=clips.device)
    pairs = draw_pairs(videos=videos, rows=rows, negatives=1, seed=seed, step=0)
    scores = module_scores(module, clips, frames)  # (N, N)
    chosen = scores.gather(1, pairs.frames)
    right = (chosen > 0) == (pairs.targets == 1)
    accuracy = right.float().mean().item()
    return {
        "matching_accuracy": accuracy,
        "matching_prior": 0.5,
        "above_chance_sigmas": (accuracy - 0.5) / (0.5 / math.sqrt(right.numel())),
        "auc": area_under_curve(chosen.flatten().cpu().numpy(), pairs.targets.flatten().cpu().numpy()),
        "recall_at_1": retrieval_recall(scores.cpu().numpy(), k=1),
        "recall_at_5": retrieval_recall(scores.cpu().numpy(), k=5),
        "held_out_clips": float(N),
    }


def module_scores(module: SupervisionTransfer, clips: Tensor, frames: Tensor) -> Tensor:
    """Matching score of every clip with every frame row, (N, N); above 0 means "belongs"."""
    if module.config.objective == "infonce":
        left = F.normalize(module.head.student_projection(clips).float(), dim=-1)
        right = F.normalize(module.head.teacher_projection(frames).float(), dim=-1)
        similarity = left @ right.T
        # InfoNCE has no threshold of its own: centred on the mean over all pairs.
        return similarity - similarity.mean()
    return module.head.score_matrix(clips, frames, chunk=16).float()
