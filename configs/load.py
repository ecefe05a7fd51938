"""YAML file + ``base:`` files + ``key.path=value`` overrides -> one frozen, validated run.

How YAML is read, and which of its features are refused, is in :mod:`cliplift.configs.yaml_text`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cliplift.configs.sections import ConfigError, Section
from cliplift.configs.yaml_text import MAX_CHARACTERS, YamlTextError, read_word, read_yaml

COMMAND_LINE = "command line"
RECIPES = Path(__file__).resolve().parent
MAX_BASE_FILES = 100  # base files of base files, each reading counted

R = TypeVar("R", bound=Section)
Tree = dict[str, object]  # a config as YAML has it: sections, lists and plain values


@dataclass(frozen=True)
class LoadedRun(Generic[R]):
    """A validated run and where each of its keys was written."""

    run: R
    file: Path
    origins: Mapping[str, str] = field(default_factory=dict)

    def locate(self, error: ConfigError) -> ConfigError:
        """The error with the file that set its key (or that set the nearest section above it)."""
        return error if error.file else error.at(_origin(self.origins, error.key, str(self.file)))


def load_run(
    path: str | Path,
    schemas: Mapping[str, type[R]],
    overrides: Sequence[str] = (),
    *,
    kind: str = "a stage",
) -> LoadedRun[R]:
    """Read, merge, override and validate one run.

    Args:
        path: the YAML file.
        schemas: stage name -> schema; the file's ``stage:`` key chooses.
        overrides: ``key.path=value`` words; the value is read as YAML.
        kind: what a stage in ``schemas`` is called in the message about one that is not.

    Raises:
        ConfigError: one sentence with file, dotted key, value and the nearest valid key.
    """
    tree, origins = read_tree(Path(path))
    origins |= apply_overrides(tree, overrides)
    stage = tree.get("stage")
    if not isinstance(stage, str) or stage not in schemas:
        raise ConfigError(
            f"{stage!r} is not {kind}" if stage is not None else "is missing",
            key="stage",
            value=stage,
            file=_origin(origins, "stage", str(path)),
            hint=_did_you_mean(str(stage), schemas) or f"it must be one of {', '.join(schemas)}",
        )
    return LoadedRun(run=validate(tree, schemas[stage], origins, str(path)), file=Path(path), origins=origins)


def apply_overrides(tree: Tree, overrides: Sequence[str]) -> dict[str, str]:
    """Set ``key.path=value`` words in a tree, in place; returns the origin of each key set."""
    origins: dict[str, str] = {}
    for word in overrides:
        _override(tree, origins, word)
    return origins


def dump_run(run: Section) -> str:
    """The resolved run as YAML that :func:`load_run` reads back to an equal run."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def read_tree(
    path: Path, *, parents: tuple[Path, ...] = (), read: list[Path] | None = None
) -> tuple[Tree, dict[str, str]]:
    """A YAML file merged over its ``base:`` files, and the file that set each dotted key.

    ``parents`` are the files whose base this one is, ``read`` all files read so far.
    """
    resolved, read = path.resolve(), [] if read is None else read
    read.append(resolved)
    if len(read) > MAX_BASE_FILES:
        raise ConfigError(f"more than {MAX_BASE_FILES} base files are named", key="base", file=str(path))
    if resolved in parents:
        chain = " -> ".join(p.name for p in (*parents, resolved))
        raise ConfigError(f"the base files form a circle: {chain}", key="base", file=str(path))
    own = _read_yaml(path)
    bases = own.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(b, str) and "\0" not in b for b in bases):
        raise ConfigError("must be a path or a list of paths", key="base", value=bases, file=str(path))
    tree: Tree = {}
    origins: dict[str, str] = {}
    for base in bases:
        below, below_origins = read_tree(_base_path(path, base), parents=(*parents, resolved), read=read)
        _merge(tree, below)
        origins |= below_origins
    _merge(tree, own)
    origins |= {key: str(path) for key in _dotted_keys(own)}
    return tree, origins


def packaged_recipe(name: str) -> Path | None:
    """The file of a recipe shipped with the package: ``transfer/demo`` or ``configs/transfer/demo.yaml``."""
    path = RECIPES / f"{name.removeprefix('configs/').removesuffix('.yaml')}.yaml"
    return path if path.is_file() else None


def _base_path(path: Path, base: str) -> Path:
    beside = path.parent / base
    return beside if beside.exists() else packaged_recipe(base) or beside


def _read_yaml(path: Path) -> Tree:
    try:
        with path.open("rb") as file:
            # A byte more than is allowed is refused with the other limits; a device or a pipe may have no end.
            text = file.read(4 * MAX_CHARACTERS + 1).decode("utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        raise ConfigError(
            "no such config file",
            file=str(path),
            hint=f"did you mean {path.parent / near[0]}?" if near else "",
        ) from None
    except (OSError, UnicodeDecodeError, ValueError) as error:  # ValueError: a NUL in the name
        raise ConfigError(f"cannot be read: {error}", file=str(path)) from error
    try:
        tree = read_yaml(text)
    except YamlTextError as error:
        raise ConfigError(f"is not valid YAML{error}", file=str(path)) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"must hold keys and values, not a {type(tree).__name__}", file=str(path))
    return tree


def _merge(tree: Tree, over: Mapping[str, object]) -> None:
    """Put ``over`` on top of ``tree`` in place: sections merge key by key, everything else is replaced."""
    for key, value in over.items():
        below = tree.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and not _changes_kind(below, value):
            _merge(below, value)
        else:
            tree[key] = value


def _changes_kind(below: Mapping[str, object], over: Mapping[str, object]) -> bool:
    """A section that says another ``kind`` replaces the one below it: its other keys belong to the old kind."""
    return "kind" in over and "kind" in below and over["kind"] != below["kind"]


def _dotted_keys(tree: Mapping[str, object], prefix: str = "") -> list[str]:
    keys = []
    for key, value in tree.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _dotted_keys(value, f"{prefix}{key}.")
    return keys


def _override(tree: Tree, origins: dict[str, str], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"{word!r} is not an override", file=COMMAND_LINE, hint="write key.path=value")
    try:
        value = read_word(text) if text else ""
    except YamlTextError as error:
        raise ConfigError(
            f"{text!r} is not valid YAML{error}",
            key=key,
            file=COMMAND_LINE,
            hint=f"quote it if it is meant as text: '{key}=\"...\"'",
        ) from error
    node: Tree | list[object] = tree
    *sections, leaf = key.split(".")
    for section in sections:
        if isinstance(node, list):
            below = node[_list_index(section, node, key)]
        else:
            if node.get(section) is None:
                node[section] = {}
            below = node[section]
        if not isinstance(below, (dict, list)):
            raise ConfigError(
                f"{section!r} is a value, not a section", key=key, value=value, file=COMMAND_LINE
            )
        node = below
    if isinstance(node, list):
        node[_list_index(leaf, node, key)] = value
    else:
        node[leaf] = value
    origins[key] = COMMAND_LINE


def _list_index(text: str, items: list[object], key: str) -> int:
    if not text.isdigit() or int(text) >= len(items):
        raise ConfigError(f"{text!r} is not an index into a list of {len(items)}", key=key, file=COMMAND_LINE)
    return int(text)


def _origin(origins: Mapping[str, str], key: str, default: str) -> str:
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return default


def validate(tree: Mapping[str, object], schema: type[R], origins: Mapping[str, str], file: str) -> R:
    """Validate a merged tree; the first error becomes one :class:`ConfigError` sentence."""
    try:
        return schema.model_validate(tree)
    except ValidationError as errors:
        # An unknown key explains the missing one beside it (a typo causes both), so it is reported first.
        details = sorted(errors.errors(), key=lambda e: e["type"] != "extra_forbidden")[0]
        raise _sentence(details, tree, schema, origins, file) from None


def _sentence(
    details: ErrorDetails,
    tree: Mapping[str, object],
    schema: type[BaseModel],
    origins: Mapping[str, str],
    file: str,
) -> ConfigError:
    path, sections = _walk(details["loc"], tree, schema)
    key, value = ".".join(path), details["input"]
    where = _origin(origins, key, file)
    if details["type"] == "extra_forbidden":
        parent = sections[-1]
        hint = _did_you_mean(path[-1], [".".join([*path[:-1], f]) for f in parent.model_fields], leaf=True)
        hint = hint or _same_leaf_elsewhere(path[-1], schema) or f"it may be {_listing(parent.model_fields)}"
        return ConfigError(f"unknown key (value {value!r})", key=key, value=value, hint=hint, file=where)
    if details["type"] == "missing":
        return ConfigError("is missing", key=key, hint="this key has no default: set it", file=where)
    inner = details.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):
        full_key = ".".join(part for part in (key, inner.key) if part)
        return ConfigError(
            inner.reason,
            key=full_key,
            value=inner.value,
            hint=inner.hint,
            file=_origin(origins, full_key, file),
        )
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input ")
    expected = details.get("ctx", {}).get("expected")
    hint = _did_you_mean(str(value), re.findall(r"'([^']+)'", expected)) if isinstance(expected, str) else ""
    shown = re.sub(r"://[^/@']*@", "://", repr(value))  # user and password of a URL
    return ConfigError(f"{shown} {message}", key=key, value=value, hint=hint, file=where)


def _walk(
    loc: Sequence[str | int], tree: object, schema: type[BaseModel]
) -> tuple[list[str], list[type[BaseModel]]]:
    """Turn pydantic's location into the dotted key as written (union tags dropped) and the schemas passed."""
    path: list[str] = []
    sections: list[type[BaseModel]] = [schema]
    annotation: object = schema
    node = tree
    for part in loc:
        choices = _schemas_in(annotation)
        tagged = [c for c in choices if _kind_of(c) == part]
        in_fields = [c for c in choices if part in c.model_fields]
        if tagged and not (isinstance(node, Mapping) and part in node):
            sections.append(tagged[0])
            annotation = tagged[0]
            continue
        path.append(str(part))
        if in_fields:
            owner = annotation if isinstance(annotation, type) and annotation in in_fields else in_fields[0]
            annotation = owner.model_fields[str(part)].annotation
        else:
            annotation = annotation if not choices or isinstance(part, int) else None
        if part != loc[-1]:
            sections += _schemas_in(annotation)[:1]
        node = node.get(part) if isinstance(node, Mapping) else None
    return path, sections


def _schemas_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [schema for arg in get_args(annotation) for schema in _schemas_in(arg)]


def _kind_of(schema: type[BaseModel]) -> object:
    kind = schema.model_fields.get("kind")
    return get_args(kind.annotation)[0] if kind and get_args(kind.annotation) else None


def _did_you_mean(word: str, choices: Iterable[str], *, leaf: bool = False) -> str:
    names = {(c.rpartition(".")[2] if leaf else c): c for c in map(str, choices)}
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean {names[near[0]]!r}?" if near else ""


def _same_leaf_elsewhere(leaf: str, schema: type[BaseModel], prefix: str = "") -> str:
    for name, info in schema.model_fields.items():
        if prefix and name == leaf:
            return f"did you mean '{prefix}{name}'?"
        for section in _schemas_in(info.annotation):
            if found := _same_leaf_elsewhere(leaf, section, f"{prefix}{name}."):
                return found
    return ""


def _listing(names: Collection[str]) -> str:
    return ", ".join(sorted(names))
