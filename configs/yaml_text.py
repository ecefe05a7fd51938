"""YAML text -> plain values, for files that may be mistaken or hostile.

The loader follows YAML 1.2 where 1.1 surprises: ``3e-4`` is a float, ``no``, ``on``, ``1:30`` and ``2020-01-01`` are
strings, and a key written twice is an error. What would take long or much memory to build is refused while it is read:
deep nesting, anchors that unfold to millions of values, numbers of thousands of digits.
"""

from __future__ import annotations

import re
from collections.abc import Hashable

import yaml

MAX_CHARACTERS = 1 << 20
MAX_DEPTH = 40
MAX_VALUES = 50_000
MAX_DIGITS = 40
SHOWN = 40  # characters of a value that a message repeats
MERGE = "tag:yaml.org,2002:merge"
YAML_1_1_TAGS = ("bool", "float", "int", "timestamp")


class YamlTextError(ValueError):
    """The text is not YAML that a config can hold; the message ends "is not valid YAML": where, and what is wrong."""


class RunLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars, duplicate-key detection and limits."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        self._nodes += 1
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested more than {MAX_DEPTH} levels deep", mark)
        if self._nodes > MAX_VALUES:
            raise yaml.composer.ComposerError(None, None, f"holds more than {MAX_VALUES} values", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, OverflowError) as error:
            tag = str(node.tag).rsplit(":", 1)[-1]
            raise yaml.constructor.ConstructorError(
                None, None, f"{str(node.value)[:SHOWN]!r} is not a valid {tag}", node.start_mark
            ) from error


RunLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.rsplit(":", 1)[-1] not in YAML_1_1_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RunLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
RunLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")
)
RunLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf|\.nan)$"
    ),
    list("-+.0123456789"),
)


def _mapping(loader: RunLoader, node: yaml.MappingNode) -> dict[Hashable, object]:
    """A mapping whose keys are plain values, each written once; merge keys (``<<``) are read as YAML 1.1 says."""
    seen: set[object] = set()
    for key_node, _ in node.value:
        if key_node.tag == MERGE:
            continue
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(
                None, None, "a list or a mapping where a key is expected", key_node.start_mark
            )
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is written twice", key_node.start_mark
            )
        seen.add(key)
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _integer(loader: RunLoader, node: yaml.ScalarNode) -> int:
    if len(node.value) > MAX_DIGITS:
        raise yaml.constructor.ConstructorError(
            None, None, f"a number of {len(node.value)} digits", node.start_mark
        )
    return yaml.SafeLoader.construct_yaml_int(loader, node)


RunLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
RunLoader.add_constructor("tag:yaml.org,2002:int", _integer)


def read_yaml(text: str) -> object:
    """The value of a YAML text.

    Raises:
        YamlTextError: not YAML, or beyond the limits of this module.
    """
    try:
        node, loader = _composed(text)
        return None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, RecursionError) as error:
        template = "; is a template's {{ mark }} left in the file?" if "{{" in text else ""
        raise YamlTextError(_describe_error(error) + template) from error


def read_word(text: str) -> object:
    """The value of one ``key=VALUE`` word of a command line.

    A word that YAML would cut (at `` #``), unfold (``a: b``, ``- a``) or refuse (``@a``, ``*.mp4``, ``%d``) is the text
    as typed, as it would be between quotes.

    Raises:
        YamlTextError: it opens a list, a mapping or a quotation and does not close it, or goes on behind it.
    """
    word = text.strip()
    if word[:1] in ("&", "!"):  # an anchor or a tag, which no single value needs
        return text
    opened = word[:1] in ("[", "{", "'", '"')
    try:
        node, loader = _composed(word)
        whole = node is None or (node.start_mark.index == 0 and node.end_mark.index == len(word))
        plain = isinstance(node, yaml.CollectionNode) and not node.flow_style
        if (plain or not whole) and opened:
            raise YamlTextError(": it continues after its end")
        if plain or not whole or (node is None and word):
            return text
        return None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, RecursionError) as error:
        if opened:
            raise YamlTextError(_describe_error(error)) from error
        return text


def _composed(text: str) -> tuple[yaml.Node | None, RunLoader]:
    if len(text) > MAX_CHARACTERS:
        raise YamlTextError(f": it holds {len(text)} characters, more than {MAX_CHARACTERS}")
    loader = RunLoader(text)
    node = loader.get_single_node()
    if node is not None:
        _check_unfolded(node)
    return node, loader


def _check_unfolded(root: yaml.Node) -> None:
    """Count the values with every anchor unfolded, each node once: 9 anchors of 9 aliases each are 387 million."""
    sizes: dict[int, int] = {}
    open_: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_:
            raise YamlTextError(f" at line {node.start_mark.line + 1}: an anchor holds itself")
        open_.add(id(node))
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        sizes[id(node)] = 1 + sum(size(part) for part in parts)
        open_.discard(id(node))
        return sizes[id(node)]

    if size(root) > MAX_VALUES:
        raise YamlTextError(f": its anchors unfold to more than {MAX_VALUES} values")


def _describe_error(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f": nested more than {MAX_DEPTH} levels deep"
    mark = getattr(error, "problem_mark", None)
    line = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    template = (
        "; is a template's {{ mark }} left in the file?" if "where a key is expected" in problem else ""
    )
    return f"{line}: {problem}{template}"
