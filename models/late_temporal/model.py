"""3D backbones with a temporal head in place of temporal average pooling.

Paper: Kalfaoglu et al., "Late Temporal Modeling in 3D CNN Architectures with BERT for Action Recognition", arXiv
2008.01232. The backbones are other modules of this package; the heads are in ``heads``, FRMB and FRAB in ``reduction``;
the registered models are in ``variants``.

Weights: a whole model of ours, a file of the public code (artest08/LateTemporalModeling3DCNN), or a file of the
backbone alone (then reduction and head start fresh); see ``weights``.

Shape letters: B clips, C channels, T frames, H W pixels, T' H' W' the feature map, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from cliplift.models.late_temporal.heads import Bert, HeadOptions, TemporalHead
from cliplift.models.late_temporal.reduction import Reduction, last_block, reducing_block, replace_block
from cliplift.models.late_temporal.weights import late_temporal_state
from cliplift.models.layers import PooledClassifier
from cliplift.models.protocol import (
    HasPathways,
    ModelError,
    StateLoader,
    VideoNetwork,
    adapt_2d_state,
    check_choices,
    published_weights,
)

Fusion = Literal["early", "late"]
FAST_SHARE = 4  # early fusion brings Fast to a quarter of Slow's reduced channels: 128 beside 512


class XavierHead(nn.Linear):
    """(B, D) -> (B, K): Xavier-uniform weights and zero bias, as all classifiers of the public code."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


@dataclass(frozen=True, kw_only=True)
class ReductionOptions:
    """``kind`` "frmb" replaces the backbone's last block, "frab" adds one after it; ``channels`` is C after it."""

    kind: Reduction = "none"
    channels: int = 512

    def __post_init__(self) -> None:
        check_choices(Reduction, reduction=self.kind)

    def apply(
        self, backbone: nn.Module, block: str, dim: int, channels: int
    ) -> tuple[nn.Module, tuple[str, ...]]:
        """Bring what leaves ``block`` from ``dim`` to ``channels``: what to append, and the blocks replaced."""
        if self.kind == "frab":
            return reducing_block(backbone.get_submodule(block), dim, channels), ()
        if self.kind == "frmb":
            replace_block(backbone, block, channels)
            return nn.Identity(), (block,)
        return nn.Identity(), ()


class LateTemporal(PooledClassifier):
    """``forward(x)``: (B, C, T, H, W) -> backbone -> reduction -> temporal head -> (B, K).

    Args:
        backbone: a model of this package without classifier, with ``forward_features`` (B, C, T', H', W').
        reduction: what stands between it and the head; the identity without FRAB.
        temporal: the temporal head, or one per pathway.
        replaced_blocks: names of the backbone's blocks that FRMB took the place of.
    """

    def __init__(
        self,
        backbone: VideoNetwork,
        *,
        reduction: nn.Module,
        temporal: TemporalHead | nn.ModuleDict,
        replaced_blocks: tuple[str, ...],
        num_classes: int,
    ) -> None:
        heads = temporal.values() if isinstance(temporal, nn.ModuleDict) else (temporal,)
        super().__init__(
            feature_dim=sum(cast(TemporalHead, head).out_dim for head in heads),
            num_classes=num_classes,
            input_spec=backbone.input_spec,
        )
        self.backbone, self.reduction, self.temporal = backbone, reduction, temporal
        self.replaced_blocks = replaced_blocks
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T', H', W'): the reduced feature map."""
        return cast(Tensor, self.reduction(self.backbone.forward_features(x)))

    def head_inputs(self, x: Tensor) -> list[tuple[TemporalHead, Tensor]]:
        """(B, C, T, H, W) -> every temporal head with its feature map."""
        return [(cast(TemporalHead, self.temporal), self.forward_features(x))]

    def forward_pooled(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D): the heads' answers side by side (in training after their dropout)."""
        self.check_input(x)
        return torch.cat([head(maps) for head, maps in self.head_inputs(x)], dim=1)

    def forward_attention(self, x: Tensor) -> tuple[Tensor, tuple[tuple[Tensor, ...], ...]]:
        """Logits and where BERT looked.

        Returns:
            (B, K), and for every BERT (one, or Slow's and Fast's) and layer the attention (B, h, T' + 1, T' + 1),
            CLS first, before its dropout.

        Raises:
            ModelError: the model's head is not "bert".
        """
        self.check_input(x)
        summaries, attention = [], []
        for head, maps in self.head_inputs(x):
            if not isinstance(head, Bert):
                raise ModelError(f"a {type(head).__name__} head has no attention; build it with head='bert'")
            output = head.attend(maps, return_attention=True)
            summaries.append(head.dropout(output.summary))
            attention.append(output.attention)
        return cast(Tensor, self.classifier(torch.cat(summaries, dim=1))), tuple(attention)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a freshly initialised one; 0 removes it. The temporal head stays."""
        super().reset_classifier(num_classes)
        if num_classes:
            reference = next(self.parameters())
            head = XavierHead(self.feature_dim, num_classes)
            self.classifier = head.to(device=reference.device, dtype=reference.dtype)

    def checkpoint_blocks(self) -> list[str]:
        own = [] if isinstance(self.reduction, nn.Identity) else ["reduction"]
        if isinstance(self.reduction, nn.ModuleDict):  # one for each pathway
            own = [f"reduction.{name}" for name in self.reduction]
        return [*(f"backbone.{name}" for name in self.backbone.checkpoint_blocks()), *own]

    # --- weights --------------------------------------------------------------------------------------------------

    @property
    def published_weights(self) -> Mapping[str, StateLoader]:
        """The backbone's tags; :meth:`adapt_state_dict` brings their tensors into the backbone part."""
        return published_weights(self.backbone)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Own, public late-temporal, and backbone-only weights; see ``weights``."""
        return late_temporal_state(
            state, own=self.state_dict(), backbone=self.backbone, replaced_blocks=self.replaced_blocks
        )

    def adapt_2d_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """2D weights to be inflated: those of the backbone's 2D counterpart."""
        return adapt_2d_state(self.backbone, state)


class LateTemporalSlowFast(LateTemporal):
    """Two pathways, brought together before BERT ("early") or after one BERT each ("late"); paper's Figure 3.

    Early: Slow is reduced to 512 and Fast to 128, Fast's maps are averaged over the alpha time steps that belong to
    one of Slow's, and the 640 channels side by side are the tokens. Late: Slow is reduced to 512, Fast keeps its 256
    channels and all its time steps; the classifier sees both answers, 768.
    """

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C_slow + C_fast, T', H', W') at Slow's time steps."""
        slow, fast = self.reduced_pathways(x)
        runs = torch.unflatten(fast, 2, (slow.shape[2], -1))  # (B, C, T', alpha, H', W')
        return torch.cat((slow, runs.mean(dim=3)), dim=1)

    def reduced_pathways(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, T, H, W) -> Slow's map (B, 512, T', H', W') and Fast's (B, 128 or 256, alpha T', H', W')."""
        assert isinstance(self.backbone, HasPathways)
        maps = self.backbone.forward_pathways(x)
        blocks = cast(nn.ModuleDict, self.reduction)
        slow, fast = (
            blocks[name](m) if name in blocks else m for name, m in zip(("slow", "fast"), maps, strict=True)
        )
        return slow, fast

    def head_inputs(self, x: Tensor) -> list[tuple[TemporalHead, Tensor]]:
        """(B, C, T, H, W) -> every temporal head with its feature map."""
        if isinstance(self.temporal, TemporalHead):
            return super().head_inputs(x)
        return [
            (cast(TemporalHead, self.temporal[name]), maps)
            for name, maps in zip(("slow", "fast"), self.reduced_pathways(x), strict=True)
        ]


def with_temporal_head(
    backbone: VideoNetwork,
    *,
    tokens: tuple[int, ...],
    head: HeadOptions,
    reduction: ReductionOptions,
    num_classes: int,
) -> LateTemporal:
    """Put a temporal head on a backbone of one pathway, in place: with "frmb" its last block is exchanged.

    Args:
        backbone: without classifier.
        tokens: (T',) of a whole clip.
    """
    dim = backbone.feature_dim
    block, replaced = reduction.apply(backbone, last_block(backbone), dim, reduction.channels)
    if reduction.kind != "none":
        dim = reduction.channels
    temporal = head.build(dim=dim, tokens=tokens[0])
    return LateTemporal(
        backbone, reduction=block, temporal=temporal, replaced_blocks=replaced, num_classes=num_classes
    )


def with_temporal_heads_on_pathways(
    backbone: VideoNetwork,
    *,
    tokens: tuple[int, ...],
    head: HeadOptions,
    reduction: ReductionOptions,
    fusion: Fusion,
    num_classes: int,
) -> LateTemporalSlowFast:
    """The same for a backbone with ``forward_pathways``.

    Args:
        backbone: SlowFast without classifier.
        tokens: T' of Slow and of Fast for a whole clip.
        fusion: "early" or "late".

    Raises:
        ModelError: another fusion.
    """
    check_choices(Fusion, fusion=fusion)
    # blocks come in forward order, and each pathway has its own
    last = {
        name: [n for n in backbone.checkpoint_blocks() if f"pathway{p}_res" in n][-1]
        for p, name in enumerate(("slow", "fast"))
    }
    dims = {"slow": _out_channels(backbone, last["slow"]), "fast": _out_channels(backbone, last["fast"])}
    # late fusion leaves Fast its 256 channels: its BERT can afford them
    wanted = {"slow": reduction.channels}
    if fusion == "early":
        wanted["fast"] = reduction.channels // FAST_SHARE
    blocks = nn.ModuleDict()
    replaced: tuple[str, ...] = ()
    for name, channels in wanted.items() if reduction.kind != "none" else ():
        block, names = reduction.apply(backbone, last[name], dims[name], channels)
        if not names:
            blocks[name] = block
        replaced += names
        dims[name] = channels
    temporal: TemporalHead | nn.ModuleDict
    if fusion == "early":
        temporal = head.build(dim=sum(dims.values()), tokens=tokens[0])
    else:
        temporal = nn.ModuleDict(
            {name: head.build(dim=dims[name], tokens=n) for name, n in zip(dims, tokens, strict=True)}
        )
    return LateTemporalSlowFast(
        backbone, reduction=blocks, temporal=temporal, replaced_blocks=replaced, num_classes=num_classes
    )


def _out_channels(backbone: nn.Module, block: str) -> int:
    layers = [m for m in backbone.get_submodule(block).modules() if isinstance(m, nn.Conv3d)]
    return layers[-1].out_channels
