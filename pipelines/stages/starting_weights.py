"""Where a network's weights come from before training, and which of them training leaves alone."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cliplift.configs.sections import ConfigError
from cliplift.models.factory import load_pretrained
from cliplift.models.weight_files import has_weights
from cliplift.pipelines.runs.folder import WEIGHTS

log = logging.getLogger(__name__)


def batchnorms(module: nn.Module) -> list[nn.Module]:
    """Every BatchNorm layer inside."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


class KeepsBatchNorm(nn.Module):
    """A trained module whose BatchNorm can be held as it is: it then normalises with its running statistics in training
    too, and they do not move."""

    frozen_batchnorm = False

    def train(self, mode: bool = True) -> Self:
        """Training mode, BatchNorm that is frozen excepted."""
        super().train(mode)
        if self.frozen_batchnorm:
            for module in batchnorms(self):
                module.eval()
        return self


def refuse_batchnorm(network: nn.Module, *, key: str, value: str) -> None:
    """Refuse a network whose features in training will be others than now, with the statistics of each batch.

    Raises:
        ConfigError: names ``key``.
    """
    if batchnorms(network):
        raise ConfigError(
            "needs a student whose BatchNorm is held: this one's changes what its features are with every batch",
            key=key,
            value=value,
            hint="set frozen_batchnorm to true, with model.pretrained, or use random",
        )


def freeze_batchnorm(network: nn.Module) -> None:
    """Leave the weights and biases of every BatchNorm layer out of training."""
    for module in batchnorms(network):
        module.requires_grad_(False)


def freeze_named(network: nn.Module, patterns: Sequence[str]) -> None:
    """Leave the parameters out of training whose names match a shell pattern.

    Raises:
        ConfigError: a pattern matches none.
    """
    names = dict(network.named_parameters())
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise ConfigError(
                f"{pattern!r} matches no parameter of the model",
                key="model.frozen",
                value=pattern,
                hint=f"its parameters are named like {', '.join(list(names)[:3])}",
            )
        for name in matched:
            names[name].requires_grad_(False)


def initialise_from(network: nn.Module, source: str) -> None:
    """Load the backbone of a run folder, an export folder or a weights file into a network, head excepted."""
    folder = Path(source) / WEIGHTS
    path = folder if folder.is_dir() else Path(source)
    if not path.exists():
        raise ConfigError(
            f"{source!r} does not exist",
            key="initialise_from",
            value=source,
            hint="give a finished run's folder, an export folder or a weights file",
        )
    if Path(source).is_dir() and not folder.is_dir() and not has_weights(path):
        raise ConfigError(
            f"{source!r} holds no weights",
            key="initialise_from",
            value=source,
            hint="the run has not finished; start it again and it continues",
        )
    load_pretrained(network, str(path))
    log.info("backbone starts from %s", source)


def freeze_all_but_head(network: nn.Module) -> None:
    """Leave only the classifier trainable: the parameters a fresh ``reset_classifier`` makes."""
    before = {id(parameter) for parameter in network.parameters()}
    network.reset_classifier(int(network.num_classes))  # type: ignore[operator, arg-type]
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) not in before)
