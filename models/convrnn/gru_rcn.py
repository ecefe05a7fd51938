"""GRU-RCN: a convolutional GRU on every level of an image network, one classifier per level.

Paper: Ballas et al., ICLR 2016, arXiv 1511.06432. VGG-16 sees every frame; its pool2, pool3, pool4, pool5 and fc7 (the
percepts) go into five ConvGRUs of 64, 128, 256, 256 and 512 channels, kernels 3x3 (1x1 at fc7, where it is fully
connected), without biases: 19,353,600 recurrent parameters. Each level's last state is averaged over its map and
classified; the five class probabilities are averaged.

* ``stacked``: a level's gates also see the level below, max-pooled to this level's map (2,179,072 parameters more;
  slightly worse in the paper).
* ``bidirectional``: a second GRU-RCN reads the clip from its end; the last states of both are classified together.

Shape letters: B clips, C channels, T frames, H W positions, N state channels, K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.convrnn.conv_gru import ConvGRULayer
from cliplift.models.image.vgg import VGG16
from cliplift.models.layers import LinearHead, PooledClassifier
from cliplift.models.protocol import InputSpec, ModelError
from cliplift.models.registry import variant

PERCEPTS = (128, 256, 512, 512, 4096)  # channels of pool2, pool3, pool4, pool5, fc7
STATES = (64, 128, 256, 256, 512)
KERNELS = (3, 3, 3, 3, 1)


class GRURCN(PooledClassifier):
    """``forward(x)``: (B, 3, T, H, W) -> (B, K), the logarithms of the averaged class probabilities.

    Args:
        stacked, bidirectional: the paper's variants.
        lower_in_candidate: with ``stacked``, the lower level enters the candidate state too; the paper's do not.
        dropout: before the classifiers.
        train_encoder: False leaves VGG-16 as it is loaded.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_frames: int,
        stacked: bool = False,
        lower_in_candidate: bool = False,
        bidirectional: bool = False,
        dropout: float = 0.7,
        train_encoder: bool = True,
    ) -> None:
        if lower_in_candidate and not stacked:
            raise ModelError("lower_in_candidate=True says how levels are stacked: it needs stacked=True")
        self.directions = 2 if bidirectional else 1
        spec = InputSpec.square(224, frames=in_frames, frame_stride=1)
        width = sum(STATES) * self.directions
        super().__init__(feature_dim=width, num_classes=num_classes, input_spec=spec, dropout=dropout)
        self.train_encoder = train_encoder
        self.encoder = VGG16(num_classes=0).requires_grad_(train_encoder)
        lower = (0, *STATES[:-1]) if stacked else (0,) * len(STATES)
        # level after level, of the first direction and then of the second
        self.levels = nn.ModuleList(
            ConvGRULayer(
                PERCEPTS[i],
                STATES[i],
                input_kernel=KERNELS[i],
                hidden_kernel=KERNELS[i],
                lower_channels=lower[i],
                lower_in_candidate=lower_in_candidate,
                bias=False,
            )
            for _ in range(self.directions)
            for i in range(len(STATES))
        )
        self.stacked = stacked
        self.reset_classifier(num_classes)

    def train(self, mode: bool = True) -> GRURCN:
        """A frozen encoder stays in eval mode, without dropout."""
        super().train(mode)
        if not self.train_encoder:
            self.encoder.eval()
        return self

    def level_states(self, x: Tensor) -> list[Tensor]:
        """(B, 3, T, H, W) -> of every level the hidden states of all steps, (T, B, N or 2N, H', W')."""
        B, _, T = x.shape[:3]
        with torch.set_grad_enabled(self.train_encoder and torch.is_grad_enabled()):
            frames = x.permute(2, 0, 1, 3, 4).flatten(0, 1)
            percepts = [p.view(T, B, *p.shape[1:]) for p in self.encoder.percepts(frames)]
        both = [self._direction(percepts, d) for d in range(self.directions)]
        return both[0] if len(both) == 1 else [torch.cat(pair, dim=2) for pair in zip(*both, strict=True)]

    def _direction(self, percepts: list[Tensor], direction: int) -> list[Tensor]:
        states: list[Tensor] = []
        for level, percept in enumerate(percepts):
            lower = pooled_to(states[-1], percept) if self.stacked and states else None
            layer = self.levels[direction * len(STATES) + level]
            states.append(layer(percept, None, None, direction == 1, lower)[0])
        return states

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, T, 1, 1): every level's states averaged over its map, side by side."""
        self.check_input(x)
        levels = [states.mean(dim=(3, 4)) for states in self.level_states(x)]
        return torch.cat(levels, dim=2).permute(1, 2, 0)[..., None, None]

    def forward_pooled(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D): each direction's state after its last frame, every level's side by side."""
        features = self.forward_features(x)[..., 0, 0]  # (B, D, T)
        if self.directions == 1:
            return features[:, :, -1]
        parts = []
        for level in torch.split(features, [2 * n for n in STATES], dim=1):
            forward, backward = level.chunk(2, dim=1)
            parts += [forward[:, :, -1], backward[:, :, 0]]
        return torch.cat(parts, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K), or (B, D) features when ``num_classes == 0``."""
        pooled: Tensor = self.head_dropout(self.forward_pooled(x))
        if not self.num_classes:
            return pooled
        levels = torch.split(pooled, [n * self.directions for n in STATES], dim=1)
        logits = [head(level) for head, level in zip(self.classifier, levels, strict=True)]
        probabilities = torch.stack([F.log_softmax(z.float(), dim=1) for z in logits])
        return torch.logsumexp(probabilities, dim=0) - math.log(len(logits))

    def reset_classifier(self, num_classes: int) -> None:
        """Five freshly initialised classifiers, one per level; 0 removes them."""
        if num_classes < 0:
            raise ModelError(f"num_classes={num_classes} must be 0 (features) or more")
        self.num_classes = num_classes
        weight = next(self.levels.parameters())
        widths = [n * self.directions for n in STATES] if num_classes else []
        heads = nn.ModuleList(LinearHead(width, num_classes) for width in widths)
        self.classifier = heads.to(device=weight.device, dtype=weight.dtype)

    def checkpoint_blocks(self) -> list[str]:
        own = [f"levels.{i}" for i in range(len(self.levels))]
        inner = [f"encoder.{name}" for name in self.encoder.checkpoint_blocks()]
        return [*inner, *own] if self.train_encoder else own


def pooled_to(lower: Tensor, percept: Tensor) -> Tensor:
    """The lower level's states (T, B, M, H, W) max-pooled to this level's map: by 2 as in VGG, or to one value."""
    flat = lower.flatten(0, 1)
    small = flat.amax(dim=(2, 3), keepdim=True) if percept.shape[-2:] == (1, 1) else F.max_pool2d(flat, 2)
    return small.view(*lower.shape[:2], *small.shape[1:])


gru_rcn = variant("gru_rcn", GRURCN, paper="arXiv 1511.06432", num_classes=101, in_frames=10)
