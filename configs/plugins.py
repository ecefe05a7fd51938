"""Names the schema takes that are not fixed when it is written: this package's own rows, then those of plug-ins.

A plug-in brings its options as a :class:`~cliplift.configs.sections.Section`, which validates them as every other
section is validated. Nothing in a config, a shard or a checkpoint can add a row.
"""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Collection, Mapping
from functools import cache
from typing import Annotated

from pydantic import AfterValidator, ValidatorFunctionWrapHandler

from cliplift.configs.discovery import Plugin, PluginError, find_plugins, working
from cliplift.configs.load import validate
from cliplift.configs.sections import ConfigError, Section

# Objectives of `cliplift pretrain`; `pipelines/stages/run.py` holds the stage of each.
OBJECTIVES: set[str] = {"classification", "distil", "forecast", "latent", "masked"}
SOURCE_KINDS = (
    "folder", "csv", "kinetics", "kinetics710", "ucf101", "hmdb51", "youtube8m", "something_something", "diving48",
    "tars",
)  # fmt: skip
MAX_DRAWS = 8  # uniform numbers a clip has for all plug-in augmentations of a run together
STAGE_MEMBERS = (
    "networks", "splits", "build_module", "example_inputs", "inputs", "evaluate", "finish", "trained_network",
)  # fmt: skip


@cache
def stage_plugins() -> tuple[Plugin, ...]:
    """Objectives of other packages: a callable ``(run, *, classes, topology)`` that returns a Stage."""
    return find_plugins("stages", taken=OBJECTIVES, check=_check_stage)


@cache
def source_plugins() -> tuple[Plugin, ...]:
    """Sources of other packages: a Section with ``kind`` and ``list_videos()``."""
    return find_plugins("sources", taken=SOURCE_KINDS, check=_check_source)


@cache
def augmentation_plugins() -> tuple[Plugin, ...]:
    """Augmentations of other packages: a Section with ``num_draws`` and ``__call__(clips, draws)``."""
    return find_plugins("augmentations", taken=(), check=_check_augmentation)


def _check_stage(_: str, stage: object) -> None:
    if not callable(stage):
        raise PluginError("it is not callable as (run, *, classes, topology)")
    try:
        inspect.signature(stage).bind(None, classes=(), topology=None)
    except TypeError as error:
        raise PluginError(f"it is not callable as (run, *, classes, topology): {error}") from None
    if isinstance(stage, type) and (missing := [m for m in STAGE_MEMBERS if not hasattr(stage, m)]):
        raise PluginError(f"the stage has no {missing[0]!r}")
    options = getattr(stage, "options", None)
    if options is not None and not _is_section(options):
        raise PluginError("its options are not a Section")


def _check_source(name: str, source: object) -> None:
    if not _is_section(source):
        raise PluginError("it is not a Section")
    kind = source.model_fields.get("kind")
    if kind is None or typing.get_args(kind.annotation) != (name,):
        raise PluginError(f'it has no field `kind: Literal["{name}"]`')
    if not callable(getattr(source, "list_videos", None)):
        raise PluginError("it has no method list_videos()")


def _check_augmentation(_: str, augmentation: object) -> None:
    if not _is_section(augmentation):
        raise PluginError("it is not a Section")
    # Of the class or one it inherits from: every class has a __call__ by its own type, which makes instances.
    if not any(inspect.isfunction(vars(base).get("__call__")) for base in augmentation.__mro__):
        raise PluginError("it has no method __call__(clips, draws)")
    draws = getattr(augmentation, "num_draws", None)
    if not isinstance(draws, int) or not 0 <= draws <= MAX_DRAWS:
        raise PluginError(f"num_draws must be a whole number from 0 to {MAX_DRAWS}, as a ClassVar")


def _is_section(value: object) -> typing.TypeGuard[type[Section]]:
    return isinstance(value, type) and issubclass(value, Section)


def _known_objective(name: str) -> str:
    if name not in OBJECTIVES:
        known = OBJECTIVES | working(stage_plugins()).keys()
        if name not in known:
            raise _unknown(name, known, what="an objective")
    return name


def _unknown(name: str, known: Collection[str], *, what: str, key: str = "") -> ConfigError:
    near = difflib.get_close_matches(name, known, n=1)
    names = ", ".join(sorted(known)) or "none: no plug-in is installed"
    hint = f"did you mean {near[0]!r}?" if near else f"known: {names}"
    return ConfigError(f"{name!r} is not {what}", key=key, value=name, hint=hint)


ObjectiveName = Annotated[str, AfterValidator(_known_objective)]


def objective_options(objective: str, options: Mapping[str, object]) -> Section | None:
    """The options of a plug-in's objective, validated by the schema it brings; None where it has none.

    Raises:
        ConfigError: an option is wrong, or the objective takes none.
    """
    plugin = working(stage_plugins()).get(objective) if objective not in OBJECTIVES else None
    schema: type[Section] | None = getattr(plugin.value, "options", None) if plugin else None
    if schema is None:
        if options:
            key = next(iter(options))
            raise ConfigError(f"the objective {objective!r} takes no options", key=key, value=options[key])
        return None
    return validate(options, schema, {}, "")


def augmentations(chosen: Mapping[str, Mapping[str, object]]) -> tuple[Section, ...]:
    """The plug-in augmentations of a config, name -> options, in its order.

    Raises:
        ConfigError: a name is unknown, an option is wrong, or together they need more random numbers than there are.
    """
    if not chosen:
        return ()
    known = working(augmentation_plugins())
    made: list[Section] = []
    for name, options in chosen.items():
        if name not in known:
            raise _unknown(name, known, what="an augmentation of a plug-in", key=name)
        schema: type[Section] = known[name].value  # type: ignore[assignment]  # checked when it was found
        try:
            made.append(validate(options, schema, {}, ""))
        except ConfigError as error:
            key = ".".join(part for part in (name, error.key) if part)
            raise ConfigError(error.reason, key=key, value=error.value, hint=error.hint) from None
    if (total := sum(one.num_draws for one in made)) > MAX_DRAWS:  # type: ignore[attr-defined]
        raise ConfigError(
            f"need {total} random numbers per clip; there are {MAX_DRAWS}", hint="use fewer of them"
        )
    return tuple(made)


def _checked_augmentations(chosen: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    augmentations(chosen)
    return chosen


AugmentationOptions = Annotated[dict[str, dict[str, object]], AfterValidator(_checked_augmentations)]


def source_or_plugin(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    """Validate a ``source:`` section: by the plug-in its ``kind`` names, else by this package's own schemas.

    Raises:
        ConfigError: an option of the plug-in is wrong.
    """
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    if not isinstance(kind, str) or kind in SOURCE_KINDS:
        return handler(value)
    known = working(source_plugins())
    if kind not in known:
        raise _unknown(kind, {*SOURCE_KINDS, *known}, what="a kind of source", key="kind")
    schema: type[Section] = known[kind].value  # type: ignore[assignment]  # checked when it was found
    if not isinstance(value, Mapping):
        return value if isinstance(value, schema) else handler(value)
    return validate(value, schema, {}, "")
