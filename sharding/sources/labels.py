"""What a label means: one rule for lists, folders, foreign tars, their indexes and tars read without an index.

A label is a class name. The name of a number is its digits, so ``2`` in a list, ``2`` in a ``.cls`` member and the
JSON numbers ``2`` and ``2.0`` are one class. Classes that are found rather than given stand in the order of their
numbers, then of their names: text order would put 10 before 2 and shift every label behind.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence

from cliplift.configs.sections import ConfigError
from cliplift.sharding.manifest import NO_LABEL

log = logging.getLogger(__name__)

# Longer runs of digits are names: no data set has that many classes, and Python refuses to read thousands of digits.
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}(\.0*)?")
MAX_NAME_CHARACTERS = 1000


class LabelError(ValueError):
    """A label is no class name and no class number."""


def label_name(value: object) -> str | None:
    """The class name that a cell, a JSON value or the content of a ``.cls`` member stands for.

    Args:
        value: None for a video without a label; bytes are UTF-8.

    Raises:
        LabelError: it is empty, no text, or a container.
    """
    if value is None:
        return None
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise LabelError(f"its label {value[:40]!r} is not UTF-8") from error
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    if not isinstance(value, str | int) or (isinstance(value, int) and abs(value) >= 10**18):
        raise LabelError(f"its label is {_shown(value)}, neither a class name nor a class number")
    name = str(value).strip()
    if not name:
        raise LabelError("its label is empty")
    if "\0" in name or len(name) > MAX_NAME_CHARACTERS or not _encodable(name):
        raise LabelError(f"its label {name[:40]!a} cannot name a class")
    return name


def _shown(value: object) -> str:
    if isinstance(value, float):
        return repr(value)
    return "a huge number" if isinstance(value, int) else f"a {type(value).__name__}"


def _encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_facts(data: bytes) -> dict[str, object]:
    """The JSON member of a sample; empty where it holds something other than an object.

    Raises:
        LabelError: it is no JSON, or nested deeper than can be read.
    """
    try:
        tree = json.loads(data)
    except RecursionError as error:
        raise LabelError("its json is nested too deeply") from error
    except ValueError as error:  # also text that is not UTF-8
        raise LabelError("its json member is not whole JSON") from error
    return tree if isinstance(tree, dict) else {}


def member_label(cls: bytes | None, json_data: bytes | None, label_key: str) -> str | None:
    """The class name that the members of a WebDataset sample give: ``.cls``, else the JSON member's ``label_key``.

    Raises:
        LabelError: the member that gives it cannot be read, or holds no class.
    """
    if cls is not None:
        return label_name(cls)
    return label_name(json_facts(json_data).get(label_key)) if json_data else None


def _number(name: str) -> int | None:
    return int(name.partition(".")[0]) if _INTEGER.fullmatch(name) else None


def ordered_classes(names: Sequence[str], *, key: str) -> tuple[str, ...]:
    """Different class names in label order: numbers by value, then the other names by their text.

    Raises:
        ConfigError: two of them are the same number, written in two ways.
    """
    numbers: dict[int, str] = {}
    others = []
    for name in sorted(set(names)):
        number = _number(name)
        if number is None:
            others.append(name)
        elif number in numbers:
            raise ConfigError(
                f"the labels {numbers[number]!r} and {name!r} are one number written in two ways",
                key=key,
                value=[],
                hint="write them alike, or name the classes in order",
            )
        else:
            numbers[number] = name
    if numbers and others:
        log.warning(
            "the labels are partly numbers (%r) and partly names (%r), each a class of its own; if a number means a"
            " place among the names, name the classes in order",
            numbers[min(numbers)],
            others[0],
        )
    return (*(numbers[n] for n in sorted(numbers)), *others)


def find_class(name: str, numbers: Mapping[str, int]) -> int | None:
    """The class of a name that :func:`label_name` gave; None where there is no such class.

    A label that is one of the names is that class. Any other number counts the classes from 0, unless they are
    numbers themselves: where the classes are 0, 1 and 3, a 2 is a mistake and not the third of them.

    Args:
        numbers: the number of every class by its name, from 0.
    """
    if name in numbers:
        return numbers[name]
    number = _number(name)
    if number is None:
        return None
    if numbers and all(_number(known) is not None for known in numbers):
        same = [place for known, place in numbers.items() if _number(known) == number]
        return same[0] if len(same) == 1 else None
    return number if 0 <= number < len(numbers) else None


def number_labels(
    names: Sequence[str | None], given: Sequence[str], *, key: str, positions: bool = False
) -> tuple[tuple[str, ...], list[int]]:
    """Class names in label order and the label of each video.

    Args:
        names: class name of each video; None is unlabelled.
        given: the classes in label order; empty orders those found by :func:`ordered_classes`.
        key: key of the config that gives them, for messages.
        positions: whether a number that is no given class counts the given classes from 0.

    Raises:
        ConfigError: a label is none of the given classes.
    """
    found = {n for n in names if n is not None}
    if not given:
        classes = ordered_classes(sorted(found), key=key)
        number = {name: i for i, name in enumerate(classes)}
    else:
        classes = tuple(given)
        number = {name: i for i, name in enumerate(classes)}
        known = dict(number)
        for name in sorted(found - set(classes)):
            place = find_class(name, known) if positions else None
            if place is None:
                raise ConfigError(f"does not name the class {name!r}", key=key, value=list(given))
            number[name] = place
    return classes, [NO_LABEL if n is None else number[n] for n in names]
