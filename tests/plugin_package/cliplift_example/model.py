"""A video model without convolutions: soft colour histograms over the whole clip, and a linear classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cliplift.models.protocol import InputSpec, VideoNetwork
from cliplift.models.registry import ModelEntry


class ColourHistogram(VideoNetwork):
    """Each channel's values are softly counted in ``bins`` bins with learned centres.

    Args:
        num_classes: K; 0 leaves the classifier out.
        in_frames: T; any number will do.
        bins: bins of each channel.
    """

    def __init__(self, *, num_classes: int, in_frames: int, bins: int) -> None:
        super().__init__()
        self.input_spec = InputSpec(frames=in_frames, crop_height=64, crop_width=64)
        self.feature_dim = 3 * bins
        self.centres = nn.Parameter(torch.linspace(-2.0, 2.0, bins))
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, 3 * bins, 1, 1, 1), shares that sum to 1 for each channel."""
        values = x.flatten(2)[:, :, ::7]  # every seventh pixel is enough to count colours
        near = torch.softmax(-((values[..., None] - self.centres) ** 2) * 8.0, dim=-1)
        return near.mean(dim=2).flatten(1)[:, :, None, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.forward_features(x).flatten(1))

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.classifier = nn.Linear(self.feature_dim, num_classes) if num_classes else nn.Identity()

    def checkpoint_blocks(self) -> list[str]:
        return []


def colour_histogram(*, num_classes: int = 400, in_frames: int = 16, bins: int = 8) -> ColourHistogram:
    """Colour histograms with ``bins`` bins a channel."""
    return ColourHistogram(num_classes=num_classes, in_frames=in_frames, bins=bins)


COLOUR_HISTOGRAM = ModelEntry(name="colour_histogram", build=colour_histogram, paper="Swain & Ballard 1991")
