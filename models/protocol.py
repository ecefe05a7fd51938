"""What a model offers: the part every registered model has, and the hooks that some have besides.

This module is the bottom of the folder: the registry, the loaders and every network import it, and it imports none of
them. A hook is asked for with ``isinstance(model, AdaptsStateDict)``, never by the name of an attribute.

Shape letters used everywhere: B clips, C channels, T frames, H W pixels, N tokens, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, Self, get_args, runtime_checkable

from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Dims = Literal["2d", "3d"]
State = dict[str, Tensor]  # a state dict
StateLoader = Callable[[], State]


class ModelError(ValueError):
    """The user asked for a model that cannot be built; the message says what to change."""


class UnknownModelError(ModelError):
    """No model of that name is registered; ``nearest`` holds the names closest to it."""

    def __init__(self, name: str, nearest: list[str]) -> None:
        self.name, self.nearest = name, nearest
        hint = (
            f"did you mean {' or '.join(repr(n) for n in nearest)}?" if nearest else "see `cliplift models`."
        )
        super().__init__(f"unknown model {name!r}: {hint}")


def check_choices(words: object, **options: object) -> None:
    """Refuse the first option whose value is none of the words of its ``Literal`` type.

    Raises:
        ModelError: it names the option, its value and the words.
    """
    *others, last = map(repr, get_args(words))
    for option, value in options.items():
        if value not in get_args(words):
            raise ModelError(f"{option}={value!r} must be {', '.join(others)} or {last}")


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What a model expects of a clip; pixel values are first scaled to [0, 1]."""

    frames: int = 16
    frame_stride: int = 2
    crop_height: int = 112
    crop_width: int = 112
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    test_clips: int = 1
    test_crops: int = 1

    @classmethod
    def square(
        cls,
        side: int,
        *,
        frames: int,
        frame_stride: int,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        test_clips: int = 1,
        test_crops: int = 1,
    ) -> Self:
        """For RGB crops of ``side`` x ``side`` pixels."""
        return cls(
            frames=frames,
            frame_stride=frame_stride,
            crop_height=side,
            crop_width=side,
            mean=mean,
            std=std,
            test_clips=test_clips,
            test_crops=test_crops,
        )


@runtime_checkable
class VideoModel(Protocol):
    """What every registered model offers.

    ``forward(x)``: (B, C, T, H, W) -> (B, K), or features (B, D) when ``num_classes == 0``.
    ``forward_features(x)``: (B, C, T, H, W) -> the last feature map, before pooling and head.
    2D models take images (B, C, H, W); a frame encoder is applied per frame by its caller.
    """

    feature_dim: int
    num_classes: int
    input_spec: InputSpec

    def forward_features(self, x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor: ...

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a freshly initialised one; 0 removes it."""

    def checkpoint_blocks(self) -> list[str]:
        """Names of the submodules, in forward order, that activation checkpointing may wrap."""


class VideoNetwork(nn.Module):
    """An ``nn.Module`` that is a :class:`VideoModel`: the intersection, which Python's types cannot write.

    ``create_model`` returns it, and the networks of this package inherit from it. A network of another package may
    inherit from ``nn.Module`` alone: what is checked is the protocol.
    """

    feature_dim: int
    num_classes: int
    input_spec: InputSpec

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def reset_classifier(self, num_classes: int) -> None:
        raise NotImplementedError

    def checkpoint_blocks(self) -> list[str]:
        raise NotImplementedError


# --- optional hooks: weights ------------------------------------------------------------------------------------------


@runtime_checkable
class NamesHead(Protocol):
    """``head_name`` is the submodule that holds the classifier."""

    head_name: str


@runtime_checkable
class AdaptsStateDict(Protocol):
    def adapt_state_dict(self, state: State) -> tuple[State, list[str]]:
        """Public weights under the model's own names, embeddings resized, and a note for every change."""


@runtime_checkable
class Adapts2dState(Protocol):
    def adapt_2d_state(self, state: State) -> State:
        """Weights of the model's 2D counterpart under the model's own names, before their kernels are inflated."""


@runtime_checkable
class PublishesWeights(Protocol):
    @property
    def published_weights(self) -> Mapping[str, StateLoader]:
        """Tag, such as "imagenet" -> a function that gives the state dict."""


@runtime_checkable
class NamesParts(Protocol):
    """``checkpoint_parts``: where files that hold several nets keep this one's weights; the first found counts."""

    checkpoint_parts: tuple[str, ...]


@runtime_checkable
class ChecksForeignConfig(Protocol):
    def check_foreign_config(self, config: Mapping[str, object]) -> None:
        """Refuse the config of another project's folder by a :class:`ModelError`."""


def adapt_state_dict(model: nn.Module, state: State) -> tuple[State, list[str]]:
    """The model's own translation of public weights; the weights as they are where it has none."""
    return model.adapt_state_dict(state) if isinstance(model, AdaptsStateDict) else (state, [])


def adapt_2d_state(model: nn.Module, state: State) -> State:
    """The model's own translation of 2D weights; the weights as they are where it has none."""
    return model.adapt_2d_state(state) if isinstance(model, Adapts2dState) else state


def published_weights(model: nn.Module) -> Mapping[str, StateLoader]:
    """The tags of the model's published weights; none where it has no such hook."""
    return model.published_weights if isinstance(model, PublishesWeights) else {}


# --- optional hooks: what else a network can do -----------------------------------------------------------------------


@runtime_checkable
class NamesBlocks(Protocol):
    def checkpoint_blocks(self) -> list[str]:
        """As in :class:`VideoModel`."""


@runtime_checkable
class GivesFeatures(Protocol):
    def forward_features(self, x: Tensor) -> Tensor:
        """As in :class:`VideoModel`."""


@runtime_checkable
class HasPathways(Protocol):
    def forward_pathways(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, T, H, W) -> the last maps of a slow and of a fast pathway, each (B, D, T', H', W')."""


@runtime_checkable
class PoolsMap(Protocol):
    """An image network whose features are not the mean of its last map."""

    map_dim: int  # channels of that map

    def pool_map(self, maps: Tensor) -> Tensor:
        """(N, map_dim, H', W') -> the features (N, D)."""


@runtime_checkable
class HasOwnLoss(Protocol):
    def loss(self, x: Tensor, labels: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Clips (B, C, T, H, W), labels (B,) or 0 and 1 (B, K), real frames (B,) -> the scalar to minimise."""


@runtime_checkable
class ShowsAttention(Protocol):
    def attention_maps(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> how much each place counted, (B, T, H', W')."""
