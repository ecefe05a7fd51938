"""What a command of ``cliplift`` is, and where all of them are found."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module

from cliplift.launch.commands import MODULES


def no_options(_: argparse.ArgumentParser) -> None:
    """For a command that takes its words alone."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One subcommand: what it does, what its words are, which options it takes, and the function that runs it.

    An empty ``subject`` means that there is none, an empty ``rest`` that no words follow it. ``schema`` is the stage
    whose config fields ``--help`` lists. ``run`` takes the parsed words and returns the exit code.
    """

    name: str
    summary: str
    run: Callable[[argparse.Namespace], int]
    add_options: Callable[[argparse.ArgumentParser], None] = no_options
    subject: str = "CONFIG"
    subject_help: str = "YAML file, or the name of a packaged recipe such as transfer/demo"
    subject_required: bool = True
    rest: str = "key=value"
    rest_help: str = "overrides of config keys, such as optim.lr=3e-4"
    schema: str | None = None
    distributed: bool = False


@cache
def all_commands() -> Mapping[str, Command]:
    """Every command by name, in the order of ``cliplift --help``."""
    rows = [row for name in MODULES for row in import_module(f"{__package__}.{name}").COMMANDS]
    commands = {row.name: row for row in rows}
    assert len(commands) == len(rows), "two commands have one name"
    return commands


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """``--json``: the result as one object on standard output, what is meant for people on standard error."""
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON object, for programs"
    )


@contextlib.contextmanager
def for_programs(as_json: bool) -> Iterator[None]:
    """Inside, what is printed for people goes to standard error where the result is printed as JSON."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield


def print_json(value: object) -> None:
    """The object that ``--json`` promises."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False), flush=True)
