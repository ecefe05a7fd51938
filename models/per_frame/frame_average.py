"""The image baseline for clips: a 2D network on every frame, features averaged over time, a linear classifier.

It cannot know the order of the frames. Whatever it scores is what appearance alone tells about the classes, so it
is the row every 3D result is read against (and the paper's teacher side, T3D, arXiv 1711.08200, section 3.2).
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from cliplift.models.per_frame.frame_sequence import OnEncoder, on_encoder
from cliplift.models.protocol import VideoNetwork
from cliplift.models.registry import variant


class FrameAverage(OnEncoder):
    """``forward(x)``: (B, C, T, H, W) -> (B, K); features are the mean over T of the encoder's (B, D)."""

    def __init__(
        self, encoder: VideoNetwork, *, num_classes: int, in_frames: int, train_encoder: bool = True
    ) -> None:
        super().__init__(encoder, in_frames=in_frames, frame_stride=2, train_encoder=train_encoder)
        self.feature_dim = encoder.feature_dim
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(self.feature_dim, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D, T, 1, 1): the encoder's feature of every frame."""
        return self.on_frames(self.encoder, x)[..., None, None]

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.forward_features(x).mean(dim=(2, 3, 4))))


# ``pretrained`` takes the encoder's published tags, such as "imagenet", beside files of the whole model
frame_average = variant(
    "frame_average",
    on_encoder(FrameAverage),
    paper="2D frames averaged over time",
    fixed={"encoder_layer": None},
    num_classes=400,
    in_frames=16,
)
