"""The registered models: ``list_models(pattern)``, their options, and how a model or a variant is registered.

Every entry is a function ``name(*, num_classes, in_frames, **options)`` that returns an ``nn.Module`` satisfying
:class:`~cliplift.models.protocol.VideoModel`; :func:`cliplift.models.factory.create_model` calls it. A family has one
builder with all its options, and one :func:`variant` for each published size.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from torch import nn

from cliplift.configs.discovery import Plugin, PluginError, find_plugins, working
from cliplift.models.protocol import Dims, UnknownModelError


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A model of the registry, or of a plug-in: how to build it, and what is known of it without building it."""

    name: str
    build: Callable[..., nn.Module]  # keyword arguments num_classes, in_frames and the model's options
    dims: Dims = "3d"
    paper: str = ""  # a short citation
    default_classes: int = 400  # K of the published weights


_ENTRIES: dict[str, ModelEntry] = {}
BY_PREFIX: dict[str, Callable[[str], ModelEntry]] = {}  # of another package's names, such as timm:NAME
_F = TypeVar("_F", bound=Callable[..., nn.Module])
_M = TypeVar("_M", bound=nn.Module)


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


def variant(
    name: str,
    build: Callable[..., _M],
    *,
    paper: str,
    dims: Dims = "3d",
    fixed: Mapping[str, object] | None = None,
    **defaults: object,
) -> Callable[..., _M]:
    """Register one size of a family: its builder with some arguments fixed and other defaults for the rest.

    Args:
        name: the name to register, and of the function returned.
        build: the family's builder; all its arguments are keyword-only.
        paper, dims: as for :func:`register_model`; the published K is the default of ``num_classes``.
        fixed: arguments that are no options of this variant.
        defaults: defaults that differ from the builder's.

    Returns:
        The registered function. ``inspect.signature`` sees the builder's arguments without the fixed ones.
    """
    held = dict(fixed or {})
    signature = inspect.signature(build)
    assert held.keys() | defaults.keys() <= signature.parameters.keys(), (
        f"{name}: {build} has no such arguments"
    )
    parameters = [
        p.replace(default=defaults.get(p.name, p.default))
        for p in signature.parameters.values()
        if p.name not in held
    ]

    def build_variant(**options: object) -> _M:
        return build(**held, **{**defaults, **options})

    build_variant.__name__, build_variant.__doc__ = name, build.__doc__
    build_variant.__module__ = build.__module__
    build_variant.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    classes = next(p.default for p in parameters if p.name == "num_classes")
    return register_model(dims=dims, paper=paper, default_classes=classes)(build_variant)


def list_models(pattern: str = "*", *, dims: Dims | None = None) -> list[str]:
    """Names of the registered models that match a shell pattern, sorted. ``list_models("t3d*")``."""
    _import_families()
    named = fnmatch.filter(_ENTRIES, pattern)
    return sorted(name for name in named if dims in (None, _ENTRIES[name].dims))


def model_entry(name: str) -> ModelEntry:
    """The registry's entry of a model. Raises :class:`UnknownModelError` with the nearest names."""
    _import_families()
    prefix, colon, rest = name.partition(":")
    if colon and prefix in BY_PREFIX:
        return BY_PREFIX[prefix](rest)
    if name not in _ENTRIES:
        raise UnknownModelError(name, difflib.get_close_matches(name, _ENTRIES, n=3, cutoff=0.5))
    return _ENTRIES[name]


def model_options(name: str) -> Mapping[str, inspect.Parameter]:
    """The options a model takes beyond ``num_classes`` and ``in_frames``, by name, with their defaults."""
    parameters = inspect.signature(model_entry(name).build).parameters
    return {k: p for k, p in parameters.items() if k not in ("num_classes", "in_frames")}


def _import_families() -> None:
    """Import every module of this package once, so that its models are registered, then those of plug-ins."""
    for module in pkgutil.walk_packages([str(Path(__file__).parent)], f"{__package__}."):
        importlib.import_module(module.name)
    for plugin in working(model_plugins()).values():
        assert isinstance(plugin.value, ModelEntry)
        _ENTRIES.setdefault(plugin.name, plugin.value)


@cache
def model_plugins() -> tuple[Plugin, ...]:
    """Models of other packages, each a :class:`ModelEntry`. This package's own are registered already."""
    return find_plugins("models", taken=tuple(_ENTRIES), check=_check_entry)


def _check_entry(name: str, entry: object) -> None:
    if not isinstance(entry, ModelEntry):
        raise PluginError("it is not a ModelEntry")
    if entry.name != name:
        raise PluginError(f"its ModelEntry has the name {entry.name!r}")
    if entry.dims not in typing.get_args(Dims):
        raise PluginError(f"its dims are {entry.dims!r}; they may be {' or '.join(typing.get_args(Dims))}")
    takes = inspect.signature(entry.build).parameters
    for argument in ("num_classes", "in_frames"):
        if argument not in takes:
            raise PluginError(f"its builder takes no {argument!r}")
