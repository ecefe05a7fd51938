"""Which plug-ins are installed, or named by ``--plugin``: found, imported and checked, one group at a time.

A package names its plug-ins as entry points of ``cliplift.models``, ``cliplift.stages``, ``cliplift.sources`` and
``cliplift.augmentations``. A module that is still being developed is named by ``--plugin MODULE``, which the command
line puts into ``CLIPLIFT_PLUGINS`` so that ranks and children see it; the module has
``PLUGINS = {"models": {NAME: OBJECT}, ...}``.

Only what the user installed or named on the command line is imported. No config, shard or checkpoint names a module.
A plug-in that is broken is reported once and left out; the others work. Needs the standard library alone, because
``models`` asks it as well.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path

GROUPS = ("models", "stages", "sources", "augmentations")
VARIABLE = "CLIPLIFT_PLUGINS"  # module names, separated by commas

logger = logging.getLogger(__name__)


class PluginError(ValueError):
    """What is wrong with a plug-in, as the end of a sentence."""


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """One plug-in: what it adds, and who brought it. ``fault`` says why it is left out; empty when it works."""

    group: str
    name: str
    origin: str  # the package and its version, or --plugin MODULE
    value: object = None
    fault: str = ""


def find_plugins(
    group: str, *, taken: Collection[str], check: Callable[[str, object], None]
) -> tuple[Plugin, ...]:
    """Every plug-in of a group, the broken ones with their fault. Logs a warning for each of those.

    Args:
        group: one of :data:`GROUPS`.
        taken: names that this package uses itself.
        check: raises :class:`PluginError` when an object does not offer what its group needs.
    """
    assert group in GROUPS, group
    used = set(taken)
    plugins = []
    for name, origin, load in _candidates(group):
        value, fault = None, ""
        if name in used:
            fault = "its name is taken"
        else:
            try:
                value = load()
                check(name, value)
            except (
                Exception,
                SystemExit,
            ) as error:  # foreign code may raise anything, and must not stop the others
                fault = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        if fault:
            logger.warning("plug-in %r of cliplift.%s (%s) is left out: %s", name, group, origin, fault)
        else:
            used.add(name)
        plugins.append(Plugin(group=group, name=name, origin=origin, value=value, fault=fault))
    return tuple(plugins)


def working(plugins: Collection[Plugin]) -> dict[str, Plugin]:
    """Those without a fault, by name."""
    return {plugin.name: plugin for plugin in plugins if not plugin.fault}


def named_modules() -> tuple[str, ...]:
    """The modules that ``--plugin`` names, in the order given."""
    return tuple(name for name in os.environ.get(VARIABLE, "").split(",") if name)


def plugin_versions() -> dict[str, str]:
    """Who adds plug-ins: each package with its version, each ``--plugin MODULE`` with a digest of its source.

    None of them is imported. Two processes that differ here may compute different things under one config.
    """
    versions: dict[str, str] = {}
    for group in GROUPS:
        for point in metadata.entry_points(group=f"cliplift.{group}"):
            if point.dist is not None:
                versions[point.dist.name] = point.dist.version
    for module in named_modules():
        versions[f"{module} (--plugin)"] = _source_digest(module)
    return dict(sorted(versions.items()))


def search_here() -> None:
    """Let imports find modules in the working directory, after everything that is installed."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def module_exists(name: str) -> bool:
    """Whether there is a module of this name, be it broken. Imports the packages it lies in, never itself."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        # A package on the way that misses something else is there, and says so when it is imported.
        return not (error.name and f"{name}.".startswith(f"{error.name}."))
    except (Exception, SystemExit):
        return True


def _source_digest(module: str) -> str:
    """A short digest of a module's file, or of all Python files of a package."""
    search_here()
    spec = importlib.util.find_spec(module) if module_exists(module) else None
    if spec is None or spec.origin is None:
        return "not found"
    origin = Path(spec.origin)
    files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(origin.parent).as_posix()}\0".encode())
        total.update(file.read_bytes())
    return total.hexdigest()[:12]


def _candidates(group: str) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(name, origin, how to load it), installed packages first, in an order that does not depend on the disk."""
    found = metadata.entry_points(group=f"cliplift.{group}")
    for point in sorted(found, key=lambda p: (p.name, p.dist.name if p.dist else "")):
        origin = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
        yield point.name, origin, point.load
    for module in named_modules():
        values = _declared(module).get(group, {})
        for name, value in values.items():
            yield name, f"--plugin {module}", partial(_unchanged, value)


def _unchanged(value: object) -> object:
    return value


@cache
def _declared(module: str) -> Mapping[str, Mapping[str, object]]:
    """``PLUGINS`` of a module named by ``--plugin``; of one that is broken, nothing, after a warning."""
    search_here()
    try:
        declared = importlib.import_module(module).PLUGINS
        for group, values in declared.items():
            if group not in GROUPS:
                raise PluginError(f"PLUGINS has the key {group!r}; it may have {', '.join(GROUPS)}")
            if not isinstance(values, Mapping):
                raise PluginError(f"PLUGINS[{group!r}] is not a mapping of names to objects")
    except (Exception, SystemExit) as error:  # foreign code may raise anything, and must not stop the others
        fault = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        logger.warning("--plugin %s is left out: %s", module, fault)
        return {}
    checked: Mapping[str, Mapping[str, object]] = declared
    return checked
