"""The command line: ``cliplift STAGE CONFIG [key=value ...]``. The only reader of argv.

torch, deepspeed and the stages are imported when a stage runs, so ``cliplift --help`` stays instant.

The config fields of a stage as text: dotted key, type, default, description. Made from the schema itself.
"""

from __future__ import annotations

import argparse
import errno
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, NoReturn

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cliplift.launch.commands.command import COMMANDS

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
}
USER_ERROR = 2
CHECK_FAILED = 1


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
    _add_import_options(stages["import-weights"])
    _add_check_options(stages["check"])
    _add_submit_options(stages["submit"])
    _add_bench_options(stages["bench"])


def _add_import_options(weights: argparse.ArgumentParser) -> None:
    weights.add_argument("--model", required=True, help="registered name of the model; see `cliplift models`")
    weights.add_argument("--output", default=None, help="folder to write: model.safetensors and config.json")
    weights.add_argument(
        "--option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="option of the model; may be repeated",
    )
    weights.add_argument(
        "--num-classes",
        type=int,
        default=None,
        help="classes; default: the source's; 0 leaves the classifier out",
    )
    weights.add_argument("--in-frames", type=int, default=None, help="frames of a clip; default: the model's")
    weights.add_argument("--dry-run", action="store_true", help="print which tensors fit, and write nothing")


def _add_check_options(check: argparse.ArgumentParser) -> None:
    check.add_argument("--nodes", type=int, default=1, help="nodes the run will have")
    check.add_argument(
        "--gpus", type=int, default=None, help="GPUs a node; 0 is a CPU run; default: those here"
    )
    check.add_argument(
        "--gpu", default=None, help="kind of GPU, such as h200, a100-80, l40s; default: the one here"
    )
    check.add_argument("--memory", type=float, default=None, help="memory of one GPU (or of the host), GiB")
    check.add_argument("--cores", type=int, default=None, help="processor cores a node; default: those here")
    check.add_argument(
        "--mfu", type=float, default=None, help="share of the peak reached, 0 to 1, if you know it"
    )


def _add_submit_options(submit: argparse.ArgumentParser) -> None:
    submit.add_argument("--to", choices=("slurm", "kubernetes", "local"), required=True, help="where it runs")
    submit.add_argument("--print", action="store_true", help="show every file and do nothing")
    submit.add_argument("--folder", default=None, help="folder for the files; default: jobs/NAME")
    submit.add_argument("--nodes", type=int, default=1, help="nodes of a training job")
    submit.add_argument(
        "--gpus", type=int, default=0, help="GPUs a node, one rank each; 0 is one CPU rank a node"
    )
    submit.add_argument("--cpus", type=int, default=8, help="processor cores a node or a part of sharding")
    submit.add_argument("--memory", type=int, default=None, help="memory a node, GiB; default: the cluster's")
    submit.add_argument("--parts", type=int, default=16, help="tasks a shard build is divided into")
    submit.add_argument("--signal-seconds", type=int, default=180, help="time to save before a job is killed")
    submit.add_argument("--image", default=None, help="container image to run in (needed by Kubernetes)")
    slurm = submit.add_argument_group("Slurm")
    slurm.add_argument(
        "--time", default="24:00:00", help="time limit of one start; it is requeued at the end"
    )
    for name in ("partition", "account", "qos"):
        slurm.add_argument(f"--{name}", default=None, help=f"#SBATCH --{name}")
    slurm.add_argument("--module", action="append", default=[], help="module to load; may be repeated")
    slurm.add_argument(
        "--setup", action="append", default=[], help="line of shell run first; may be repeated"
    )
    slurm.add_argument(
        "--sbatch", action="append", default=[], help="another #SBATCH option; may be repeated"
    )
    slurm.add_argument("--container-tool", default="enroot", help="enroot (pyxis) or apptainer")
    slurm.add_argument(
        "--mount", action="append", default=[], help="FROM:TO, into the container; may be repeated"
    )
    kubernetes = submit.add_argument_group("Kubernetes")
    kubernetes.add_argument("--namespace", default=None, help="namespace; default: kubectl's")
    kubernetes.add_argument("--volume", action="append", default=[], help="CLAIM:/path; may be repeated")
    kubernetes.add_argument(
        "--workdir", default=None, help="directory relative paths of the config start from"
    )
    kubernetes.add_argument(
        "--secret", action="append", default=[], help="secret whose keys become variables"
    )
    kubernetes.add_argument("--service-account", default=None, help="service account of the pods")
    kubernetes.add_argument(
        "--pytorchjob", action="store_true", help="a Kubeflow PyTorchJob, not an Indexed Job"
    )


def _add_bench_options(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--steps", type=int, default=50, help="batches, or training steps, that are timed")
    bench.add_argument("--warm-up", type=int, default=10, help="batches or steps before")
    bench.add_argument("--minutes", type=float, default=7.0, help="gpu: rows run until they are over")
    bench.add_argument("--output", default=None, help="JSON file for the numbers")
    bench.add_argument("--gpus", type=int, default=1, help="data: ranks that share the global batch")
    bench.add_argument(
        "--appetite",
        type=float,
        default=None,
        help="data: clips/s one GPU takes; says how many cores feed --gpus",
    )
    bench.add_argument(
        "--synthetic", action="store_true", help="train: one batch made up and used again, no loader"
    )


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
    except OSError as error:
        if error.errno not in USERS_FAULTS or (error.filename is None and error.errno != errno.ENOSPC):
            raise
        what, place = USERS_FAULTS[error.errno], error.filename or "the output or TMPDIR"
        print(f"cliplift: {place}: {what}", file=sys.stderr)
    except KeyboardInterrupt:
        print("cliplift: interrupted", file=sys.stderr)
        return 130
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
