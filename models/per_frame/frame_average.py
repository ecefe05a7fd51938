"""The image baseline for clips: a 2D network on every frame, features averaged over time, a linear classifier.

It cannot know the order of the frames. Whatever it scores is what appearance alone tells about the classes, so it
is the row every 3D result is read against (and the paper's teacher side, T3D, arXiv 1711.08200, section 3.2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cliplift.models.per_frame.frame_sequence import encoder_weights, on_encoder
from cliplift.models.protocol import StateLoader, VideoNetwork
from cliplift.models.registry import variant


class FrameAverage(VideoNetwork):
    """``forward(x)``: (B, C, T, H, W) -> (B, K); features are the mean over T of the encoder's (B, D).

    ``train_encoder=False`` trains the classifier alone.
    """

    def __init__(
        self, encoder: VideoNetwork, *, num_classes: int, in_frames: int, train_encoder: bool = True
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.train_encoder = train_encoder
        self.feature_dim = encoder.feature_dim
        self.input_spec = dataclasses.replace(encoder.input_spec, frames=in_frames, frame_stride=2)
        self.reset_classifier(num_classes)
        if not train_encoder:
            self.encoder.requires_grad_(False)

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(self.feature_dim, num_classes) if num_classes else nn.Identity()

    @property
    def published_weights(self) -> Mapping[str, StateLoader]:
        """The encoder's published weights under this model's names."""
        return encoder_weights(self.encoder)

    def train(self, mode: bool = True) -> FrameAverage:
        """A frozen encoder stays in eval mode: its BatchNorm statistics belong to its weights."""
        super().train(mode)
        if not self.train_encoder:
            self.encoder.eval()
        return self

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D, T, 1, 1): the encoder's feature of every frame."""
        B, C, T, H, W = x.shape
        frames = x.transpose(1, 2).reshape(B * T, C, H, W)
        with torch.set_grad_enabled(self.train_encoder and torch.is_grad_enabled()):
            features = self.encoder(frames)  # (B T, D)
        per_frame: Tensor = features.reshape(B, T, -1).transpose(1, 2)[..., None, None]
        return per_frame

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.forward_features(x).mean(dim=(2, 3, 4)))
        return logits

    def checkpoint_blocks(self) -> list[str]:
        return [f"encoder.{name}" for name in self.encoder.checkpoint_blocks()] if self.train_encoder else []


# ``pretrained`` takes the encoder's published tags, such as "imagenet", beside files of the whole model
frame_average = variant(
    "frame_average",
    on_encoder(FrameAverage),
    paper="2D frames averaged over time",
    fixed={"encoder_layer": None},
    num_classes=400,
    in_frames=16,
)
