"""``cliplift start``: look at a folder of videos, and write the YAML files of the first runs."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cliplift.launch.commands.command import Command

if TYPE_CHECKING:
    from cliplift.launch.check.findings import Finding
    from cliplift.launch.check.machine import Machine
    from cliplift.launch.start.begin import Wishes
    from cliplift.launch.start.files import Plan


def add_options(start: argparse.ArgumentParser) -> None:
    start.add_argument("--name", help="name of the dataset and of the files; default: the folder's")
    start.add_argument(
        "--output", default=".", metavar="FOLDER", help="folder for the YAML files; default: here"
    )
    start.add_argument("--list", metavar="FILE", help="list in the folder to read, where there are several")
    start.add_argument(
        "--group-pattern",
        metavar="REGEX",
        help="its first parentheses match what belongs together in a video's path; '' is each video alone",
    )
    start.add_argument(
        "--look", type=int, default=400, metavar="N", help="videos looked at; 0 is all (default 400)"
    )
    start.add_argument(
        "--seconds",
        type=float,
        default=120.0,
        help="no further videos are looked at after this time (default 120)",
    )
    start.add_argument("--overwrite", action="store_true", help="write over files of the same names")
    start.add_argument("--json", action="store_true", help="print one JSON object, for programs")


def run_start(arguments: argparse.Namespace) -> int:
    """Exit code 1 when something found makes a run impossible; the files are written all the same."""
    from cliplift.launch.check.findings import exit_code, table
    from cliplift.launch.commands.subject import prepare_environment
    from cliplift.launch.start.begin import begin
    from cliplift.launch.start.files import yaml_files

    wishes = _wishes(arguments)
    prepare_environment()
    plan, findings = begin(arguments.subject, wishes, _machine(), on_progress=_progress)
    texts = yaml_files(plan)
    files = write_files(texts, Path(arguments.output), overwrite=arguments.overwrite)
    commands = next_commands(plan, files)
    if arguments.json:
        print(json.dumps(as_json(plan, findings, files, commands), indent=2, ensure_ascii=False))
    else:
        print(table(findings))
        print(f"\nwritten, each choice with its reason: {', '.join(map(str, files))}\n\nnext:")
        print("\n".join(f"  {shlex.join(words)}" for words in commands))
    return exit_code(findings)


def _wishes(arguments: argparse.Namespace) -> Wishes:
    from cliplift.configs.sections import ConfigError
    from cliplift.launch.start.begin import Wishes as Said

    if arguments.look < 0 or not arguments.seconds > 0:
        raise ConfigError(
            "asks for what cannot be",
            file="command line",
            hint="give --look 0 or more, and --seconds above 0",
        )
    return Said(
        name=arguments.name,
        listed=arguments.list,
        group_pattern=arguments.group_pattern,
        look=arguments.look,
        seconds=arguments.seconds,
    )


def _machine() -> Machine:
    """This machine, as `cliplift check` sees it."""
    from cliplift.launch.check.doctor import memory_bytes, usable_cores
    from cliplift.launch.check.machine import choose_machine

    return choose_machine(
        nodes=1,
        gpus=None,
        gpu=None,
        memory_gib=None,
        cores=None,
        cores_here=usable_cores(),
        memory_here=memory_bytes(),
    )


def _progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(
            f"looking at videos: {done} of {of}",
            end="\n" if done == of else "\r",
            file=sys.stderr,
            flush=True,
        )


def write_files(texts: Mapping[str, str], folder: Path, *, overwrite: bool) -> list[Path]:
    """Write the files, each whole, unless one of them is there.

    Raises:
        ConfigError: one of them is there.
    """
    from cliplift.configs.sections import ConfigError

    files = [folder / name for name in texts]
    there = [file for file in files if file.exists()]
    if there and not overwrite:
        raise ConfigError(
            "is there",
            file=str(there[0]),
            hint="--overwrite writes over it, --name NAME or --output FOLDER elsewhere",
        )
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in zip(files, texts.values(), strict=True):
        part = file.with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    return files


def next_commands(plan: Plan, files: Sequence[Path]) -> list[list[str]]:
    """What to type next, in order: the baseline of minutes first."""
    stages = {"shards": "shard", "frames": "finetune", "3d": "finetune", "transfer": "transfer",
              "from_transfer": "finetune"}  # fmt: skip
    commands: list[list[str]] = []
    for file in files:
        key = file.stem.removeprefix(f"{plan.name}_")
        commands.append(["cliplift", stages[key], str(file)])
        if key == "shards":
            commands.append(["cliplift", "show", f"shards/{plan.name}", "--output", f"{plan.name}.html"])
    trained = [
        f"runs/{plan.name}-{file.stem.removeprefix(f'{plan.name}_').replace('_', '-')}" for file in files[1:]
    ]
    return [*commands, ["cliplift", "report", *trained]]


def as_json(
    plan: Plan, findings: Sequence[Finding], files: Sequence[Path], commands: Sequence[Sequence[str]]
) -> dict[str, object]:
    """What was found and written, for programs."""
    found, looks, division = plan.found, plan.looks, plan.division

    def named(pairs: Sequence[tuple[int, int]]) -> list[list[str]]:
        return [[found.videos[number].source for number in pair] for pair in pairs]

    return {
        "folder": plan.folder,
        "name": plan.name,
        "videos": len(found.videos),
        "classes": {
            name: sum(video.label == label for video in found.videos)
            for label, name in enumerate(found.classes)
        },
        "looked_at": len(looks.seen) + len(looks.unreadable),
        "unreadable": {found.videos[number].source: reason for number, reason in looks.unreadable},
        "same_file": named(looks.same),
        "look_alike": named(looks.alike),
        "splits": None if division is None else dict(division.section),
        "split_counts": None
        if division is None
        else {name: list(row) for name, row in division.counts.items()},
        "findings": [vars(finding) for finding in findings],
        "files": [str(file) for file in files],
        "commands": [list(words) for words in commands],
    }


COMMANDS = (
    Command(
        name="start",
        summary="look at a folder of videos and write the YAML files of the first runs",
        subject="FOLDER",
        subject_help="folder with one folder a class, or a list (path, label, group), or videos alone",
        rest="",
        add_options=add_options,
        run=run_start,
    ),
)
