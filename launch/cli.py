"""The command line: ``cliplift STAGE CONFIG [key=value ...]``. The only reader of argv.

torch, deepspeed and the stages are imported when a stage runs, so ``cliplift --help`` stays instant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import NoReturn

USER_ERROR = 2
CHECK_FAILED = 1


@dataclass(frozen=True, kw_only=True)
class Command:
    """One subcommand: what it does, what its first word is, and the extra options it takes.

    ``handled_by`` is the module of ``cliplift.launch`` whose ``run_COMMAND`` does it.
    """

    summary: str
    subject: str = "CONFIG"
    subject_help: str = "YAML file, or the name of a packaged recipe such as transfer/demo"
    subject_required: bool = True
    rest: str = "key=value"
    rest_help: str = "overrides of config keys, such as optim.lr=3e-4"
    schema: str | None = None
    distributed: bool = False
    handled_by: str = "stages"


RUN_OR_CONFIG = "run or export folder, or a YAML file"
COMMANDS: dict[str, Command] = {
    "shard": Command(summary="pack videos into WebDataset shards", schema="shard"),
    "verify": Command(
        summary="check a shard dataset: checksums, index against tar, decodability",
        subject="URL",
        subject_help="folder or URL of a shard dataset",
        rest="",
    ),
    "show": Command(
        summary="write an HTML contact sheet and statistics of a shard dataset",
        subject="URL",
        subject_help="folder or URL of a shard dataset",
        rest="",
    ),
    "index": Command(
        summary="index WebDataset tars made by other tools, so that training can read them exactly",
        subject="URL",
        subject_help="folder or URL of the tars; the folder a tar lies in is its split",
        rest="",
    ),
    "transfer": Command(
        summary="2D to 3D supervision transfer: does this frame belong to this clip?",
        schema="transfer",
        distributed=True,
    ),
    "pretrain": Command(
        summary="pretrain a backbone on labelled shards", schema="pretrain", distributed=True
    ),
    "finetune": Command(summary="finetune on a target dataset and test", schema="finetune", distributed=True),
    "evaluate": Command(
        summary="evaluate a run on a split",
        subject="RUN|CONFIG",
        subject_help=RUN_OR_CONFIG,
        schema="evaluate",
        distributed=True,
    ),
    "predict": Command(
        summary="classify video files",
        subject="RUN|CONFIG",
        subject_help=RUN_OR_CONFIG,
        rest="VIDEO|key=value",
        rest_help="videos (files or folders) and overrides of config keys",
        schema="predict",
    ),
    "report": Command(
        summary="one self-contained HTML page about runs",
        subject="RUN|CONFIG",
        subject_help="run or demo folder, or a YAML file",
        rest="RUN|key=value",
        rest_help="more run folders, and overrides of config keys",
        schema="report",
    ),
    "export": Command(
        summary="write a run's weights as safetensors + config.json",
        subject="RUN|CONFIG",
        subject_help="run folder, or a YAML file",
        rest="FOLDER|key=value",
        rest_help="folder to write, and overrides of config keys",
        schema="export",
    ),
    "models": Command(
        summary="list the models, with parameters and GMACs measured",
        subject="PATTERN",
        subject_help="shell pattern of names, such as 't3d*'",
        subject_required=False,
        rest="",
    ),
    "demo": Command(
        summary="the whole chain on clips made on the spot, on a CPU in minutes",
        subject_required=False,
        subject_help="YAML file; none is needed",
        schema="demo",
    ),
}


class _Parser(argparse.ArgumentParser):
    """argparse that keeps our promise of one sentence and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"cliplift: {message}; see `{self.prog} --help`\n")


class _StageHelp(argparse.Action):
    """``--help`` of a stage: its usage, then every config field with unit and default."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, schema: str | None) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show this help and every config field")
        self.schema = schema

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(parser.format_help())
        if self.schema is not None:
            from cliplift.configs.runs import RUNS
            from cliplift.launch.fields import describe_fields

            print(f"config fields (stage: {self.schema}):\n{describe_fields(RUNS[self.schema])}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cliplift", description="Raw videos to shards to a pretrained, finetuned, evaluated video model."
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    _accept_local_rank(parser)
    stages = parser.add_subparsers(dest="command", metavar="STAGE", parser_class=_Parser)
    for name, command in COMMANDS.items():
        stage = stages.add_parser(name, help=command.summary, description=command.summary, add_help=False)
        stage.add_argument("-h", "--help", action=_StageHelp, schema=command.schema)
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
    _add_special_options(stages.choices)
    return parser


def _accept_local_rank(parser: argparse.ArgumentParser) -> None:
    """The deepspeed launcher puts it before our words; the rank itself is read from the environment."""
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)


def _add_special_options(stages: Mapping[str, argparse.ArgumentParser]) -> None:
    shard = stages["shard"]
    shard.add_argument(
        "--part",
        metavar="I/N",
        help="build part I of N, from 0, for array jobs; auto reads the scheduler's index",
    )
    shard.add_argument(
        "--phase",
        choices=("all", "plan", "build", "finalize", "verify"),
        default="all",
        help="run one phase alone",
    )
    shard.add_argument(
        "--retry-failed", action="store_true", help="try the refused clips of the ledger again"
    )
    stages["verify"].add_argument(
        "--decode", choices=("none", "sample", "full"), default="sample", help="how many clips are decoded"
    )
    stages["show"].add_argument("--output", default="contact-sheet.html", help="HTML file to write")
    stages["show"].add_argument("--clips", type=int, default=24, help="clips shown of each split")
    index = stages["index"]
    index.add_argument("--name", required=True, help="name of the dataset")
    index.add_argument("--label-key", default="label", help="key of the JSON member that holds the class")
    index.add_argument("--classes", nargs="+", default=(), help="class names in label order; default: sorted")
    index.add_argument("--workers", type=int, default=0, help="decoding processes; 0 is one per core")
    stages["models"].add_argument("--markdown", action="store_true", help="print a Markdown table")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 done, 1 a check failed, 2 the user's mistake."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(words)
    if arguments.version:
        from importlib.metadata import version

        print(f"cliplift {version('cliplift')}")
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

    module = import_module(f"cliplift.launch.{COMMANDS[arguments.command].handled_by}")
    handler: Callable[[argparse.Namespace], int] = getattr(
        module, f"run_{arguments.command.replace('-', '_')}"
    )
    try:
        return handler(arguments)
    except ConfigError as error:
        print(f"cliplift: {error}", file=sys.stderr)
    except ValueError as error:
        # The packages' own user errors (models, shards, decoding); any other ValueError is a bug and keeps
        # its traceback.
        if not type(error).__module__.startswith("cliplift."):
            raise
        print(f"cliplift: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("cliplift: interrupted", file=sys.stderr)
        return 130
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
