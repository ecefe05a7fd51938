"""Several teachers side by side: each sees frames as it would alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.configs.sections import ConfigError
from cliplift.configs.supervision import TeacherConfig
from cliplift.models.protocol import InputSpec, VideoNetwork
from cliplift.pipelines.stages.teacher import Teachers, build_teachers


class MeanColour(VideoNetwork):
    """Its features are the frame's size and mean colour, as it is given them."""

    feature_dim = 4

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        nn.Module.__init__(self)
        self.input_spec = InputSpec(mean=mean, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.full((len(x), 1), float(x.shape[-1])), x.mean(dim=(2, 3))], dim=1)


def test_each_sees_the_frames_at_its_size_and_with_its_statistics() -> None:
    ours, theirs = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    first, second = MeanColour(*ours), MeanColour(*theirs)
    pixels = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))

    def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    found = Teachers([first, second], [None, 16])(normalised(*ours))
    small = F.interpolate(normalised(*theirs), size=(16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(found[:, :4], first(normalised(*ours)))
    torch.testing.assert_close(found[:, 4:], second(small), atol=1e-5, rtol=1e-5)
    assert found[:, 4].tolist() == [16.0] * 3


def test_real_networks_stand_side_by_side() -> None:
    """The features of two, frozen and in eval mode, are those of each alone."""
    tree = {
        "pretrained": None,
        "others": [{"name": "efficientnet_lite1", "pretrained": None, "resize_pixels": 48}],
    }
    torch.manual_seed(0)
    both = build_teachers(TeacherConfig.model_validate(tree), weights=True)
    assert both.feature_dims == (1280, 1280)
    assert not both.training
    assert not any(p.requires_grad for p in both.parameters())
    frames = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    larger = F.interpolate(frames, size=(48, 48), mode="bilinear", align_corners=False)
    with torch.no_grad():
        alone = torch.cat([both.networks[0](frames), both.networks[1](larger)], dim=1)
        assert torch.equal(both(frames), alone)


def test_a_further_teacher_that_sees_clips_is_refused() -> None:
    config = TeacherConfig.model_validate(
        {"pretrained": None, "others": [{"name": "t3d_tiny", "pretrained": None}]}
    )
    with pytest.raises(ConfigError, match="is not a 2D model") as caught:
        build_teachers(config, weights=False)
    assert caught.value.key == "teacher.others.0.name"
