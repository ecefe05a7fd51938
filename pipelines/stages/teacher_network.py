"""The frozen 2D networks that teach: one, or several whose features stand side by side."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliplift.configs.sections import ConfigError
from cliplift.configs.supervision import ImageTeacher, TeacherConfig
from cliplift.models import create_model
from cliplift.models.protocol import InputSpec, VideoNetwork
from cliplift.models.registry import model_entry


class Teachers(nn.Module):
    """One or several 2D networks on the same frames, each at a size and with pixel statistics of its own.

    ``feature_dims`` are the widths of their features, ``input_spec`` the one by which the frames are normalised: the
    first network's.
    """

    def __init__(self, networks: list[VideoNetwork], sides: list[int | None]) -> None:
        super().__init__()
        self.networks, self.sides = nn.ModuleList(networks), sides
        self.feature_dims = tuple(network.feature_dim for network in networks)
        self.feature_dim = sum(self.feature_dims)
        self.specs = [network.input_spec for network in networks]
        self.input_spec = self.specs[0]

    def forward(self, frames: Tensor) -> Tensor:
        """(B, C, H, W), normalised for the first network -> (B, D), the features of all, one after the other.

        In the precision of each network's features; they are concatenated in fp32.
        """
        found = []
        for network, side, spec in zip(self.networks, self.sides, self.specs, strict=True):
            found.append(network(renormalised(resized(frames, side), self.input_spec, spec)).float())
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def resized(frames: Tensor, side: int | None) -> Tensor:
    """(B, C, H, W) -> (B, C, side, side); as they are where the side is theirs, or None."""
    height = frames.shape[2]
    if side is None or side == height:
        return frames
    return F.interpolate(
        frames, size=(side, side), mode="bilinear", antialias=side < height, align_corners=False
    )


def renormalised(frames: Tensor, made: InputSpec, wanted: InputSpec) -> Tensor:
    """Frames (B, C, H, W) with another mean and deviation of the pixels in [0, 1]."""
    if (made.mean, made.std) == (wanted.mean, wanted.std):
        return frames
    old_mean, old_std, mean, std = (
        frames.new_tensor(values)[:, None, None] for values in (made.mean, made.std, wanted.mean, wanted.std)
    )
    return (frames * old_std + old_mean - mean) / std


def build_teachers(config: TeacherConfig, *, weights: bool) -> Teachers:
    """The frozen teachers of a run, in eval mode for good (BatchNorm statistics included).

    Args:
        config: of the teacher, and of those beside it.
        weights: load their weights; otherwise random ones, where only shapes are wanted.

    Raises:
        ConfigError: a teacher is not a 2D model.
    """
    networks = [_network(teacher, key=key, weights=weights) for key, teacher in config.by_key().items()]
    teachers = Teachers(networks, [teacher.resize_pixels for teacher in config.by_key().values()])
    return teachers.eval().requires_grad_(False)


def _network(teacher: ImageTeacher, *, key: str, weights: bool) -> VideoNetwork:
    if model_entry(teacher.name).dims != "2d":
        raise ConfigError(
            "is not a 2D model",
            key=f"{key}.name",
            value=teacher.name,
            hint="the teacher sees single frames; `cliplift models` shows which models are 2D",
        )
    return create_model(
        teacher.name,
        num_classes=0,
        in_frames=None,
        pretrained=teacher.pretrained if weights else None,
        **teacher.options,
    )
