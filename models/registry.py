"""The model registry: ``create_model(name, ...)`` and ``list_models(pattern)``, in timm's grammar.

Shape letters used everywhere: B clips, C channels, T frames, H W pixels, N tokens, D width, K classes.

Every registered entry point is a function ``name(*, num_classes, in_frames, **options) -> nn.Module`` that
returns a module satisfying :class:`VideoModel`.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Dims = Literal["2d", "3d"]


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


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    name: str
    build: Callable[..., nn.Module]
    dims: Dims
    paper: str
    default_classes: int


_ENTRIES: dict[str, ModelEntry] = {}
_F = TypeVar("_F", bound=Callable[..., nn.Module])


def register_model(*, dims: Dims = "3d", paper: str = "", default_classes: int = 400) -> Callable[[_F], _F]:
    """Register the decorated function under its own name.

    ``paper`` is a short citation shown by ``cliplift models``; ``default_classes`` the K of the published weights.
    """

    def register(build: _F) -> _F:
        name = build.__name__
        assert name not in _ENTRIES, f"model {name!r} is registered twice"
        _ENTRIES[name] = ModelEntry(
            name=name, build=build, dims=dims, paper=paper, default_classes=default_classes
        )
        return build

    return register


def list_models(pattern: str = "*", *, dims: Dims | None = None) -> list[str]:
    """Names of the registered models that match a shell pattern, sorted. ``list_models("t3d*")``."""
    _import_families()
    return sorted(
        name
        for name, entry in _ENTRIES.items()
        if fnmatch.fnmatchcase(name, pattern) and dims in (None, entry.dims)
    )


def model_entry(name: str) -> ModelEntry:
    """The registry's entry of a model. Raises :class:`UnknownModelError` with the nearest names."""
    _import_families()
    try:
        return _ENTRIES[name]
    except KeyError:
        raise UnknownModelError(name, difflib.get_close_matches(name, _ENTRIES, n=3, cutoff=0.5)) from None


def model_options(name: str) -> Mapping[str, inspect.Parameter]:
    """The options a model takes beyond ``num_classes`` and ``in_frames``, by name, with their defaults."""
    parameters = inspect.signature(model_entry(name).build).parameters
    return {k: p for k, p in parameters.items() if k not in ("num_classes", "in_frames")}


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_frames: int | None = None,
    pretrained: str | None = None,
    **options: Any,
) -> nn.Module:
    """Build a registered model.

    Args:
        name: a name from :func:`list_models`.
        num_classes: K of the classifier; 0 for features only; None for the published K.
        in_frames: clip length T; None for the model's own. Models that take any T only record it.
        pretrained: path of a local ``.safetensors`` file, a cliplift export folder, or a ``.pt``/``.pth`` state
            dict (read with ``weights_only=True``); a tag of the model's published weights such as "imagenet"; or
            "2d:" and one of these, to inflate 2D weights. Heads of another K are replaced, and that is logged.
        options: architecture options of that model (:func:`model_options`).

    Raises:
        UnknownModelError: no such name; the message names the nearest ones.
        ModelError: an unknown option, or one with an impossible value.
    """
    entry = model_entry(name)
    known = model_options(name)
    for option in options:
        if option not in known:
            nearest = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"it takes {sorted(known)}."
            raise ModelError(f"model {name!r} has no option {option!r}: {hint}")
    classes = entry.default_classes if num_classes is None else num_classes
    if classes < 0:
        raise ModelError(f"model {name!r}: num_classes={classes} must be 0 (features) or more")
    frames = {} if in_frames is None else {"in_frames": in_frames}
    model = entry.build(num_classes=classes, **frames, **options)
    if pretrained is not None:
        from cliplift.models.factory import load_pretrained

        load_pretrained(model, pretrained)
    return model


def _import_families() -> None:
    """Import every module of this package once, so that its models are registered."""
    import importlib
    import pkgutil

    import cliplift.models as package

    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
