"""How well frames are matched to clips, on held-out videos.

Which frames a clip is paired with: its own, and those of other videos (or of other times).

What transfer trains: the student with the matching head, and its losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cliplift.configs.sections import ConfigError
from cliplift.configs.supervision import CorrespondenceConfig
from cliplift.models.correspondence import CorrespondenceHead
from cliplift.models.protocol import VideoNetwork
from cliplift.pipelines.data.source import ClipSource
from cliplift.pipelines.evaluation.metrics import area_under_curve, retrieval_recall
from cliplift.pipelines.runs.retrieval import Retrieval, ShownClip, retrieval_of
from cliplift.pipelines.stages.starting_weights import KeepsBatchNorm


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
    # Scores for the whole global batch on every rank, of which it takes its rows: so the pairs do not depend on how
    # the batch is divided.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    scores = send_to_device(torch.rand(len(videos), len(videos), generator=generator), videos.device)[rows]
    same = videos[rows, None] == videos[None, :]
    available = (~same).sum(dim=1).min()
    if _fewer(available, negatives, "correspondence.negatives_per_clip"):
        raise ConfigError(
            f"a batch of {len(videos)} clips holds only {int(available)} of other videos than one of its clips",
            key="correspondence.negatives_per_clip",
            value=negatives,
            hint="use a larger engine.global_batch, or shards with more source videos",
        )
    # The k highest of uniform scores are a random choice without replacement; -1 is below all of them.
    chosen = [rows[:, None], scores.masked_fill(same, -1.0).topk(negatives, dim=1).indices]
    if same_video:
        others = same & (torch.arange(len(videos), device=videos.device)[None, :] != rows[:, None])
        if _fewer(others.sum(dim=1).min(), same_video, "correspondence.same_video_negatives"):
            raise ConfigError(
                f"a batch of {len(videos)} clips has a clip with fewer than {same_video} others of its own video",
                key="correspondence.same_video_negatives",
                value=same_video,
                hint=f"set data.clips_per_sample to {same_video + 1} or more",
            )
        chosen.append(scores.masked_fill(~others, -1.0).topk(same_video, dim=1).indices)
    return Pairs(torch.cat(chosen, dim=1))


def send_to_device(values: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, through pinned memory where that is a GPU, so that the host does not wait."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def _fewer(available: Tensor, wanted: int, key: str) -> bool:
    """Whether a batch offers too few pairs. A GPU is not waited for: there, its own assertion ends the run."""
    if available.is_cuda:
        torch._assert_async(available >= wanted, f"a batch offers fewer pairs than {key}={wanted}")
        return False
    return bool(available.numpy() < wanted)


class Scores(Protocol):
    """What transfer trains, whatever the objective, can say which of N clips and N frame rows belong together."""

    def scores(self, clips: Tensor, frames: Tensor) -> Tensor: ...


class SupervisionTransfer(KeepsBatchNorm):
    """Student and matching head: what is trained.

    ``forward(inputs)`` takes clips (B, C, T, H, W), frame_features (G, D) of the global batch, and the pairs
    (B, 1 + k); returns the loss and the matching accuracy of the batch.
    """

    def __init__(self, student: VideoNetwork, head: CorrespondenceHead, config: CorrespondenceConfig) -> None:
        super().__init__()
        self.student, self.head, self.config = student, head, config

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        clip_features = self.student(inputs["clips"])  # (B, D)
        if self.config.objective == "infonce":
            return self._contrast(clip_features, inputs)
        logits = self.head.pair_logits(
            clip_features, inputs["frame_features"], inputs["pairs"]
        )  # (B, 1 + k, 2)
        targets = inputs["targets"]
        # One positive against k negatives: weighted so that both classes count the same in the loss.
        negatives = targets.shape[1] - 1
        weight = logits.new_ones(2)
        weight[0] = 1.0 / negatives  # filled in on the device, not copied there
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), weight=weight.float())
        accuracy = (logits.argmax(dim=-1) == targets).float().mean()
        return {"loss": loss, "matching_accuracy": accuracy.detach()}

    def clip_rows(self, clips: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D), what :meth:`scores` compares clips by."""
        features: Tensor = self.student(clips)
        return features

    def scores(self, clips: Tensor, frames: Tensor) -> Tensor:
        """Matching score of every clip with every frame row, (N, D) and (N, Df) -> (N, N); above 0 means "belongs"."""
        if self.config.objective == "infonce":
            left = F.normalize(self.head.student_projection(clips).float(), dim=-1)
            right = F.normalize(self.head.teacher_projection(frames).float(), dim=-1)
            similarity = left @ right.T
            # InfoNCE has no threshold of its own: centred on the mean over all pairs.
            return similarity - similarity.mean()
        return self.head.score_matrix(clips, frames, chunk=16).float()

    def _contrast(self, clip_features: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """InfoNCE over all frames of the global batch; frames of the same video are negatives only where asked for."""
        clips = F.normalize(self.head.student_projection(clip_features).float(), dim=-1)
        frames = F.normalize(self.head.teacher_projection(inputs["frame_features"]).float(), dim=-1)
        logits = clips @ frames.T / self.config.temperature  # (B, G)
        own = inputs["pairs"][:, 0]
        if not self.config.same_video_negatives:
            same = inputs["clip_videos"][:, None] == inputs["frame_videos"][None, :]
            same = same.scatter(1, own[:, None], False)
            logits = logits.masked_fill(same, -math.inf)
        loss = F.cross_entropy(logits, own)
        return {"loss": loss, "matching_accuracy": (logits.argmax(dim=1) == own).float().mean().detach()}


@dataclass(frozen=True)
class HeldOut:
    """What both towers say of N held-out clips: rows (N, Dc) of clips and (N, Df) of frames, and their matching scores
    (N, N), clip i with the frames of clip j."""

    clips: Tensor
    frames: Tensor
    scores: Tensor
    videos: Tensor  # int64 (N,)
    shown: tuple[ShownClip, ...]

    @classmethod
    def of(
        cls,
        rows: Sequence[tuple[int, tuple[int, Tensor, Tensor]]],
        source: ClipSource,
        *,
        module: Scores,
        device: torch.device,
    ) -> HeldOut:
        """From (sample, (video, clip row, frame row)) in dataset order; on every rank, as ``module`` may be spread."""
        clips = torch.stack([clip for _, (_, clip, _) in rows]).to(device)
        frames = torch.stack([frame for _, (_, _, frame) in rows]).to(device)
        facts = [(sample, source.facts(sample)) for sample, _ in rows]
        return cls(
            clips=clips,
            frames=frames,
            scores=module.scores(clips, frames),
            videos=torch.tensor([video for _, (video, _, _) in rows], device=device),
            shown=tuple(
                ShownClip(key=f.key, video_id=f.video_id, shard_url=source.url_of(i), sample_index=i)
                for i, f in facts
            ),
        )

    def retrieval(self) -> Retrieval:
        """Which clips find their frames, and their neighbours."""
        return retrieval_of(
            scores=self.scores.cpu().numpy(),
            student=self.clips.cpu().numpy(),
            teacher=self.frames.cpu().numpy(),
            videos=self.videos.cpu().numpy(),
            clips=self.shown,
        )


@torch.no_grad()
def matching_metrics(scores: Tensor, *, videos: Tensor, seed: int) -> dict[str, float]:
    """Matching numbers of N held-out clips from their scores (N, N) with all frames.

    ``matching_accuracy``: one positive and one negative per clip, so the prior is exactly 0.5.
    ``above_chance_sigmas``: its distance from the prior in standard errors of a fair coin over the same pairs.
    ``recall_at_1``, ``recall_at_5``: clip -> frame retrieval among all N held-out clips.
    """
    N = len(scores)
    rows = torch.arange(N, device=scores.device)
    pairs = draw_pairs(videos=videos, rows=rows, negatives=1, seed=seed, step=0)
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
