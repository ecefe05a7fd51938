"""The config fields of a stage as text: dotted key, type, default, description. Made from the schema itself."""

from __future__ import annotations

import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

WIDTH = 110


def describe_fields(schema: type[BaseModel]) -> str:
    """Every field of a schema, sections included, as aligned lines."""
    lines = []
    for key, info in _fields(schema, ""):
        default = (
            "required"
            if info.is_required()
            else f"default {_short(info.get_default(call_default_factory=True))}"
        )
        lines.append(f"  {key}  ({type_name(info.annotation)}, {default})")
        if info.description:
            lines += textwrap.wrap(info.description, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _fields(schema: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, info in schema.model_fields.items():
        sections = list(_sections(info.annotation))
        if not sections:
            yield f"{prefix}{name}", info
        many = typing.get_origin(info.annotation) in (tuple, list)
        for section in sections:
            kind = section.model_fields.get("kind")
            tag = f"[{typing.get_args(kind.annotation)[0]}]" if kind and len(sections) > 1 else ""
            yield from _fields(section, f"{prefix}{name}{'[]' if many else ''}{tag}.")


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _sections(argument)


def type_name(annotation: Any) -> str:
    """A type as users read it: ``int``, ``a|b``, ``list of str``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "|".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else type_name(a) for a in arguments)
    if origin in (tuple, list):
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return "keys and values"
    if origin is typing.Annotated:
        return type_name(arguments[0])
    return getattr(annotation, "__name__", str(annotation))


def _short(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return str(list(value))
    return str(value)
