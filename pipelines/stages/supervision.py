"""What transfer trains: the student with the matching head, and its losses."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliplift.configs.runs import CorrespondenceConfig
from cliplift.models.correspondence import CorrespondenceHead


class SupervisionTransfer(nn.Module):
    """Student and matching head: what is trained.

    ``forward(inputs)`` takes clips (B, C, T, H, W), frame_features (G, D) of the global batch, and the pairs
    (B, 1 + k); returns the loss and the matching accuracy of the batch.
    """

    def __init__(self, student: nn.Module, head: CorrespondenceHead, config: CorrespondenceConfig) -> None:
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
        weight = logits.new_tensor([1.0 / negatives, 1.0])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), weight=weight.float())
        accuracy = (logits.argmax(dim=-1) == targets).float().mean()
        return {"loss": loss, "matching_accuracy": accuracy.detach()}

    def _contrast(self, clip_features: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """InfoNCE over all frames of the global batch; frames of the same video are negatives only where asked for."""
        clips = F.normalize(self.head.student_projection(clip_features).float(), dim=-1)
        frames = F.normalize(self.head.teacher_projection(inputs["frame_features"]).float(), dim=-1)
        logits = clips @ frames.T / self.config.temperature  # (B, G)
        own = inputs["pairs"][:, 0]
        if not self.config.same_video_negatives:
            same = inputs["clip_videos"][:, None] == inputs["frame_videos"][None, :]
            same[torch.arange(len(own)), own] = False
            logits = logits.masked_fill(same, -math.inf)
        loss = F.cross_entropy(logits, own)
        return {"loss": loss, "matching_accuracy": (logits.argmax(dim=1) == own).float().mean().detach()}
