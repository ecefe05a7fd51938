"""Augmentations of plug-ins: which draws each gets, when they run, and what they must not do."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from cliplift.configs import plugins
from cliplift.configs.data import AugmentConfig
from cliplift.configs.discovery import Plugin
from cliplift.configs.load import validate
from cliplift.configs.sections import ConfigError, Section
from cliplift.models.protocol import InputSpec
from cliplift.pipelines.data.augment import DeviceAugment
from cliplift.pipelines.data.batch import NUM_DRAWS, ClipBatch

SPEC = InputSpec(mean=(0.0,) * 3, std=(1.0,) * 3)


class Add(Section):
    """Adds ``amount`` times each clip's draw."""

    num_draws: ClassVar[int] = 1
    amount: float = 1.0

    def __call__(self, clips: Tensor, draws: Tensor) -> Tensor:
        assert draws.shape == (len(clips), 1)
        return clips + self.amount * draws.view(-1, 1, 1, 1, 1)


class Greedy(Add):
    num_draws: ClassVar[int] = 8


class Halve(Add):
    num_draws: ClassVar[int] = 0

    def __call__(self, clips: Tensor, draws: Tensor) -> Tensor:
        return clips[:, :, ::2]


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"add": Add, "more": type("More", (Add,), {}), "greedy": Greedy, "halve": Halve}
    listed = tuple(Plugin(group="augmentations", name=n, origin="test", value=v) for n, v in found.items())
    monkeypatch.setattr(plugins, "augmentation_plugins", lambda: listed)


def config(chosen: dict[str, dict[str, float]]) -> AugmentConfig:
    return validate({"flip": False, "plugins": chosen}, AugmentConfig, {}, "file.yaml")


def black(batch: int) -> ClipBatch:
    """Black clips (B, 4, 8, 8, 3) with draws that say clip and column."""
    draws = torch.arange(batch)[:, None] + torch.arange(NUM_DRAWS) / 100
    clips, numbers = torch.zeros(batch, 4, 8, 8, 3, dtype=torch.uint8), torch.zeros(batch, dtype=torch.int64)
    return ClipBatch(
        clips=clips,
        labels=numbers,
        sample_index=numbers,
        video_index=numbers,
        views=numbers,
        draws=draws,
        epochs=numbers,
        positions=numbers,
    )


def test_each_gets_its_own_draws_and_the_clips_in_order() -> None:
    views = DeviceAugment(config({"add": {}, "more": {"amount": 10.0}}), SPEC, training=True)
    out = views(black(3))
    # clip b: column 13 once, and column 14 ten times
    expected = torch.tensor([(b + 0.13) + 10 * (b + 0.14) for b in range(3)])
    torch.testing.assert_close(out.mean(dim=(1, 2, 3, 4)), expected)
    assert out.shape == (3, 3, 4, 8, 8)


def test_evaluation_is_left_alone() -> None:
    assert DeviceAugment(config({"add": {}}), SPEC, training=False)(black(2)).abs().max() == 0


def test_the_shape_must_stay() -> None:
    with pytest.raises(ConfigError, match=r"Halve.*\(2, 3, 2, 8, 8\) for \(2, 3, 4, 8, 8\)"):
        DeviceAugment(config({"halve": {}}), SPEC, training=True)(black(2))


def test_draws_run_out() -> None:
    with pytest.raises(
        ConfigError, match=r"file\.yaml: plugins: need 9 random numbers per clip; there are 8"
    ):
        config({"add": {}, "greedy": {}})


def test_a_wrong_option_names_its_key() -> None:
    with pytest.raises(
        ConfigError, match=r"file\.yaml: plugins\.add\.amuont: unknown key .* did you mean 'amount'"
    ):
        config({"add": {"amuont": 1.0}})
