"""The command line: ``cliplift STAGE CONFIG [key=value ...]``. The only reader of argv.

Parses the words and calls the command, a file in ``launch/commands``; torch, deepspeed and the schema are imported
when it runs, so ``cliplift --help`` stays instant.

The config fields of a stage as text: dotted key, type, default, description. Made from the schema itself.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import io
import json
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from cliplift.launch.commands.command import all_commands
from cliplift.launch.completion import SHELLS, completion_script

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from cliplift.configs.sections import ConfigError

WIDTH = 110


def describe_fields(schema: type[BaseModel], section: str | None = None) -> str:
    """Every field of a schema, or of one of its sections, as aligned lines; in words of YAML.

    Raises:
        ConfigError: there is no such section or key.
    """
    fields = list(field_keys(schema))
    if section is not None:
        fields = [(key, info) for key, info in fields if _is_inside(key, section)]
        if not fields:
            raise _no_section(section, schema)
    lines = []
    for key, info in fields:
        default = (
            "required"
            if info.is_required()
            else f"default {_short(info.get_default(call_default_factory=True))}"
        )
        lines.append(f"  {key}  ({type_name(info.annotation)}, {default})")
        if info.description:
            text = re.sub(r"\bNone\b", "null", info.description)
            lines += textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _is_inside(key: str, section: str) -> bool:
    """Whether a dotted key is the section or in it; what tells kinds of a section apart may be left out."""
    plain = re.sub(r"\[[^\]]*\]", "", key)
    return any(each == section or each.startswith(f"{section}.") for each in (key, plain))


def _no_section(section: str, schema: type[BaseModel]) -> ConfigError:
    from cliplift.configs.sections import ConfigError

    keys = [re.sub(r"\[[^\]]*\]", "", key) for key, _ in field_keys(schema)]
    parts = dict.fromkeys(part for key in keys for part in (key.rpartition(".")[0], key) if part)
    nearest = difflib.get_close_matches(section, parts, n=1)
    sections = dict.fromkeys(key.partition(".")[0] for key in keys if "." in key)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"the sections are {', '.join(sections)}"
    return ConfigError(f"there is no section {section!r}", key="--help", hint=hint, file="command line")


def field_keys(schema: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """Dotted key and field of all that a schema and its sections take."""
    return _fields(schema, "")


def _fields(schema: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, info in schema.model_fields.items():
        sections = list(_sections(info.annotation))
        origin = typing.get_origin(info.annotation)
        if not sections or origin is dict:
            yield f"{prefix}{name}", info
        many = "[]" if origin in (tuple, list) else ".KEY" if origin is dict else ""
        for section in sections:
            kind = section.model_fields.get("kind")
            tag = f"[{typing.get_args(kind.annotation)[0]}]" if kind and len(sections) > 1 else ""
            yield from _fields(section, f"{prefix}{name}{many}{tag}.")


def _sections(annotation: object) -> Iterator[type[BaseModel]]:
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _sections(argument)


def type_name(annotation: object) -> str:
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


def _short(value: object) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)


# What a file system refuses because of the place the user named or its state, and what to do about it.
USERS_FAULTS = {
    errno.ENOSPC: "no space is left there; free some, or name another output (temporary files go to TMPDIR)",
    errno.EDQUOT: "your quota there is used up; free some space, or name another output",
    errno.EROFS: "is on a read-only file system; name another output",
    errno.EACCES: "permission denied; name another place, or change its owner or mode",
    errno.EPERM: "the operation is not permitted there; name another place",
    errno.ENOTDIR: "a part of this path is a file where a folder is needed; name another output",
    errno.EISDIR: "is a folder where a file is needed; name a file",
    errno.ENAMETOOLONG: "the file name is too long for this file system",
    errno.EEXIST: "is a file where a folder is needed; name another output",
    errno.ENOENT: "is not there, or a folder above it is not",
    errno.ELOOP: "its symbolic links lead in a circle",
    errno.EFBIG: "the file is larger than this process or file system allows",
    errno.EIO: "the device cannot read or write it; look at the system's log",
    errno.ESTALE: "the network file system has lost it; mount it again",
}
# Those that say enough without a file name. Libraries below (safetensors, torch) tell some of them as text alone.
FULL_OR_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
BROKEN_PIPE_STATUS = 141  # as a shell reports a process that SIGPIPE ended
USER_ERROR = 2
CHECK_FAILED = 1


class _Parser(argparse.ArgumentParser):
    """argparse that keeps our promise of one sentence and exit code 2."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"argument STAGE: invalid choice: '([^']*)'", message)
        if unknown:
            nearest = difflib.get_close_matches(unknown[1], all_commands(), n=1)
            hint = f": did you mean {nearest[0]!r}?" if nearest else ""
            message = f"there is no command {unknown[1]!r}{hint}"
        self.exit(USER_ERROR, f"cliplift: {message}; see `{self.prog} --help`\n")


class _StageHelp(argparse.Action):
    """``--help`` of a stage: its usage, then every config field with unit and default."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, schema: str | None) -> None:
        if schema is None:
            super().__init__(option_strings, dest, nargs=0, help="show this help")
        else:
            text = "show this help and every config field, or those of one section such as optim"
            super().__init__(option_strings, dest, nargs="?", metavar="SECTION", help=text)
        self.schema = schema

    def __call__(
        self, parser: argparse.ArgumentParser, _: argparse.Namespace, section: object, __: str | None = None
    ) -> None:
        wanted = section if isinstance(section, str) else None
        try:
            text = self._text(parser, wanted)
        except ValueError as error:  # a ConfigError: there is no such section
            parser.exit(USER_ERROR, f"cliplift: {error}\n")
        try:
            print(text, flush=True)
        except BrokenPipeError:
            _discard_output()
            parser.exit(BROKEN_PIPE_STATUS)
        parser.exit()

    def _text(self, parser: argparse.ArgumentParser, section: str | None) -> str:
        if self.schema is None:
            return parser.format_help()
        from cliplift.configs.runs import RUNS

        fields = describe_fields(RUNS[self.schema], section)
        return (
            fields if section else f"{parser.format_help()}\nconfig fields (stage: {self.schema}):\n{fields}"
        )


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cliplift", description="Raw videos to shards to a pretrained, finetuned, evaluated video model."
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    parser.add_argument(
        "--completion",
        choices=SHELLS,
        metavar="SHELL",
        help="print what completes words in bash, zsh or fish",
    )
    _accept_local_rank(parser)
    _accept_plugins(parser, dest="plugins")
    stages = parser.add_subparsers(dest="command", metavar="STAGE", parser_class=_Parser)
    for name, command in all_commands().items():
        stage = stages.add_parser(name, help=command.summary, description=command.summary, add_help=False)
        stage.add_argument("-h", "--help", action=_StageHelp, schema=command.schema)
        if command.subject:
            stage.add_argument(
                "subject",
                metavar=command.subject,
                nargs=None if command.subject_required else "?",
                help=command.subject_help,
            )
        if command.rest:
            stage.add_argument("rest", metavar=command.rest, nargs="*", help=command.rest_help)
        if command.schema is not None:
            stage.add_argument("--dry-run", action="store_true", help="print the resolved config and exit")
        if command.distributed:
            _accept_local_rank(stage)
        command.add_options(stage)
        _accept_plugins(stage, dest="more_plugins")
    return parser


def completed_words() -> dict[str, list[str]]:
    """What may follow each command: its options, and ``key=`` of its config."""
    from cliplift.configs.runs import RUNS

    found: dict[str, list[str]] = {}
    for name, command in all_commands().items():
        options = _Parser(add_help=False)
        command.add_options(options)
        words = [word for action in options._actions for word in action.option_strings] + ["--help"]
        if command.schema is not None:
            keys = [
                key for key, _ in field_keys(RUNS[command.schema]) if "[" not in key and ".KEY." not in key
            ]
            words += ["--dry-run", *(f"{key}=" for key in keys)]
        found[name] = [word for word in words if word.startswith("--") or word.endswith("=")]
    return found


def _accept_local_rank(parser: argparse.ArgumentParser) -> None:
    """The deepspeed launcher puts it before our words; the rank itself is read from the environment."""
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)


def _accept_plugins(parser: argparse.ArgumentParser, *, dest: str) -> None:
    parser.add_argument(
        "--plugin",
        metavar="MODULE",
        action="append",
        default=[],
        dest=dest,
        help="module with PLUGINS to import, beside the installed plug-ins; may be repeated",
    )


def _name_plugins(modules: Sequence[str]) -> None:
    """Hand the modules on to whatever looks for plug-ins, here and in the processes started from here.

    Raises:
        ConfigError: there is no such module. One that exists and is broken is left out with a warning.
    """
    from cliplift.configs.discovery import VARIABLE, module_exists, named_modules, search_here
    from cliplift.configs.sections import ConfigError

    search_here()
    for module in modules:
        importable = all(part.isidentifier() for part in module.split(".")) and not module.endswith(".py")
        if not importable or not module_exists(module):
            hint = "name it as `import` would, from this folder or an installed package"
            raise ConfigError(
                f"there is no module {module!r}",
                key="--plugin",
                value=module,
                file="command line",
                hint=f"{hint}: {module.removesuffix('.py')}" if module.endswith(".py") else hint,
            )
    os.environ[VARIABLE] = ",".join(dict.fromkeys((*named_modules(), *modules)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 done, 1 a check failed, 2 the user's mistake."""
    _write_any_text()
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(words)
    if arguments.version:
        from importlib.metadata import version

        print(f"cliplift {version('cliplift')}")
        return 0
    if arguments.completion is not None:
        print(completion_script(arguments.completion, completed_words()), end="")
        return 0
    if arguments.command is None:
        parser.print_help()
        return 0
    if unknown:
        # Options may stand between overrides: argparse hands the words after them back as unknown.
        flags = [word for word in unknown if word.startswith("-")]
        if flags or not hasattr(arguments, "rest"):
            parser.error(f"{arguments.command} does not take {' '.join(flags or unknown)}")
        arguments.rest += unknown
    return _guarded(arguments)


def _guarded(arguments: argparse.Namespace) -> int:
    from cliplift.configs.sections import ConfigError

    try:
        if modules := [*arguments.plugins, *arguments.more_plugins]:
            _name_plugins(modules)
        status = all_commands()[arguments.command].run(arguments)
        sys.stdout.flush()  # here, where a full disk or a closed pipe is reported as such
        return status
    except ConfigError as error:
        print(f"cliplift: {error}", file=sys.stderr)
    except ValueError as error:
        # The packages' own user errors (models, shards, decoding); any other ValueError is a bug and keeps
        # its traceback.
        if not type(error).__module__.startswith("cliplift."):
            raise
        print(f"cliplift: {error}", file=sys.stderr)
    except BrokenPipeError:
        _discard_output()
        return BROKEN_PIPE_STATUS
    except KeyboardInterrupt as error:
        print(f"cliplift: {error or 'interrupted'}", file=sys.stderr)
        stopped: int = getattr(error, "exit_status", 130)  # StoppedBySignalError names its signal's
        return stopped
    except Exception as error:
        sentence = _fault_of_place(error)
        if sentence is None:
            raise
        print(f"cliplift: {sentence}", file=sys.stderr)
        _discard_output()
    return USER_ERROR


def _fault_of_place(error: BaseException) -> str | None:
    """What the file system refused, as a sentence; None where the error is none of its own."""
    if isinstance(error, OSError):
        alone = error.filename is None
        if error.errno is not None and error.errno in (FULL_OR_BROKEN if alone else USERS_FAULTS):
            place = error.filename2 or error.filename or "the output or TMPDIR"
            return f"{place}: {USERS_FAULTS[error.errno]}"
        if alone and "temporary directory" in str(error):
            return f"TMPDIR: {error.strerror}; set it to a folder that can be written"
        return None
    for number in FULL_OR_BROKEN:
        if os.strerror(number) in str(error) or f"os error {number})" in str(error):
            return f"the output or TMPDIR: {USERS_FAULTS[number]}"
    return None


def _discard_output() -> None:
    """Where stdout's buffer cannot be written, let it go; Python would try again at its end and say so."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # type: ignore[union-attr]


def _write_any_text() -> None:
    """A class or a file may have a name that the terminal's encoding lacks: it is written with escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
