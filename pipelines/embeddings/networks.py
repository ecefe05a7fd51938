"""Which frozen network a word such as ``embedding:efficientnet_lite0`` names, and what it sees of a clip.

Shape letters: C channels, T frames, H W pixels, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cliplift.configs.data import DataConfig, SamplingConfig, ViewsConfig
from cliplift.configs.sections import ConfigError
from cliplift.models import create_model
from cliplift.models.factory import read_config
from cliplift.models.protocol import ModelError, VideoNetwork, published_weights
from cliplift.models.registry import model_entry
from cliplift.models.streams import FLOW_CHANNELS
from cliplift.pipelines.evaluation.evaluate import load_network
from cliplift.pipelines.evaluation.predict import data_of
from cliplift.pipelines.runs.folder import WEIGHTS
from cliplift.sharding.scores.vectors import EmbeddingFacts

WORD = "embedding"
DEFAULT = "efficientnet_lite0"
VERSION = 2  # of how embeddings and sketches are made
IMAGE_FRAMES = 8  # of a clip, for a 2D network: one out of the middle of each eighth


@dataclass(frozen=True)
class FrozenNetwork:
    """A network without its classifier, in eval mode.

    Attributes:
        network: 2D, or 3D.
        two_dimensional: whether it sees frames one by one; their features are then averaged.
        data: the frames of a clip that it sees, and how they are cut.
        facts: what tells its embeddings from those of others.
    """

    network: VideoNetwork
    two_dimensional: bool
    data: DataConfig
    facts: EmbeddingFacts

    @torch.no_grad()
    def features(self, clip: Tensor) -> Tensor:
        """A normalised clip (1, C, T, H, W) on the network's device -> (D,) in fp32 on the CPU."""
        if self.two_dimensional:
            found: Tensor = self.network(clip[0].transpose(0, 1)).float().mean(dim=0)
        else:
            found = self.network(clip).float()[0]
        return found.cpu()


def is_embedding(word: str) -> bool:
    """Whether a word of ``cliplift score`` asks for an embedding."""
    return word == WORD or word.startswith(f"{WORD}:")


def frozen_network(word: str) -> FrozenNetwork:
    """The network that a word names, on the CPU.

    Args:
        word: ``embedding`` (efficientnet_lite0), ``embedding:MODEL`` (its published weights), ``embedding:MODEL=FILE``
            (those of a file), or ``embedding:FOLDER`` of a run or an export.

    Raises:
        ConfigError: it names no network, one without weights at hand, or one that sees optical flow.
        ModelError: there is no such model, or the weights are not its own.
    """
    named = word.partition(":")[2] or DEFAULT
    if Path(named).is_dir():
        name, network, data = _of_folder(named)
    else:
        name, _, source = named.partition("=")
        network, data = _of_registry(name, source)
    if network.input_spec.channels == FLOW_CHANNELS:
        raise ConfigError(
            f"{name} sees optical flow", file="command line", value=word, hint="name one that sees RGB"
        )
    network.reset_classifier(0)
    network.eval().requires_grad_(False)
    flat = model_entry(name).dims == "2d"
    seen = data.model_dump_json(include={"sampling", "crop_pixels", "resize_short_side_pixels", "augment"})
    facts = EmbeddingFacts(
        model=name,
        weights_sha256=weights_sha256(network.state_dict()),
        input=seen,
        width=network.feature_dim,
        version=VERSION,
    )
    return FrozenNetwork(network, flat, data, facts)


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Of all tensors: names, types, shapes and bytes, in the order of their names."""
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return found.hexdigest()


def _of_folder(folder: str) -> tuple[str, VideoNetwork, DataConfig]:
    network, card = load_network(folder)
    inner = Path(folder) / WEIGHTS
    name = str(read_config(inner if inner.is_dir() else folder)["name"])
    flat = model_entry(name).dims == "2d"
    return name, network, _image_data(network) if flat else data_of(card, network, ViewsConfig())


def _of_registry(name: str, source: str) -> tuple[VideoNetwork, DataConfig]:
    network = create_model(name, num_classes=0)
    tags = sorted(published_weights(network))
    if source and source not in tags and not Path(source).exists():
        raise ModelError(f"{WORD}:{name}={source}: there is no such file")
    if not source and not tags:
        raise ConfigError(
            f"{name} has no weights at hand",
            file="command line",
            value=f"{WORD}:{name}",
            hint=f"give a file of weights, {WORD}:{name}=FILE, or the folder of a run or an export, {WORD}:FOLDER",
        )
    network = create_model(
        name, num_classes=0, pretrained=source or ("imagenet" if "imagenet" in tags else tags[0])
    )
    flat = model_entry(name).dims == "2d"
    return network, _image_data(network) if flat else data_of({}, network, ViewsConfig())


def _image_data(network: VideoNetwork) -> DataConfig:
    """Frames spread over the whole clip, each the largest square in the middle at the network's own size."""
    side = network.input_spec.crop_height
    sampling = SamplingConfig(mode="segments", frames=IMAGE_FRAMES)
    return DataConfig(
        shards=("unused:",),
        sampling=sampling,
        crop_pixels=side,
        resize_short_side_pixels=side,
        decoder="pyav",
    )
