"""Classification with the focal loss (Lin et al., arXiv 1708.02002), as an objective of ``cliplift pretrain``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cliplift.configs.plugins import objective_options
from cliplift.configs.sections import Section
from cliplift.pipelines.engine.task import StageModule
from cliplift.pipelines.stages.classification import ClassificationStage, Classifier


class FocalOptions(Section):
    """``objective_options`` of the focal objective."""

    gamma: float = Field(
        2.0, ge=0, description="how much clips that are easy already count less; 0 is cross-entropy"
    )


class FocalClassifier(Classifier):
    """The network and its focal loss."""

    def __init__(self, network: nn.Module, *, gamma: float) -> None:
        super().__init__(network, label_smoothing=0.0, multi_label=False)
        self.gamma = gamma

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``clips`` (B, C, T, H, W) and ``labels`` (B,) -> loss, accuracy."""
        logits = self.network(inputs["clips"]).float()
        entropy = F.cross_entropy(logits, inputs["labels"], reduction="none")
        loss = ((1 - (-entropy).exp()) ** self.gamma * entropy).mean()
        accuracy = (logits.argmax(dim=1) == inputs["labels"]).float().mean()
        return {"loss": loss, "accuracy": accuracy.detach()}


class FocalStage(ClassificationStage):
    """Classification in everything but the loss."""

    options = FocalOptions

    def build_module(self, *, weights: bool) -> StageModule:
        built = super().build_module(weights=weights)
        chosen = objective_options(self.run.objective, self.run.objective_options)
        return replace(built, module=FocalClassifier(built.network, gamma=chosen.gamma))
