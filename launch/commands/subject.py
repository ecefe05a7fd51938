"""From the words of a command to the run they name: a YAML file, a packaged recipe, or a run folder.

Imported when a command runs, never for ``--help``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from cliplift.configs.load import (
    COMMAND_LINE,
    LoadedRun,
    Tree,
    apply_overrides,
    dump_run,
    load_run,
    packaged_recipe,
    validate,
)
from cliplift.configs.runs import RUNS, TRAINING, stage_name
from cliplift.configs.sections import ConfigError, Section
from cliplift.configs.training import TrainingRun

T = TypeVar("T")
R = TypeVar("R", bound=Section)
# From a run folder and the words after it to the tree of a config.
FolderConfig = Callable[[str, list[str]], Tree]


def load(word: str, overrides: Sequence[str] = ()) -> LoadedRun[Section]:
    """The run of a YAML file or, where no file has that name, of a packaged recipe.

    Raises:
        ConfigError: there is no such file, or it holds no valid run.
    """
    return load_run(_file_of(word), RUNS, overrides)


def load_training(word: str, overrides: Sequence[str] = ()) -> LoadedRun[TrainingRun]:
    """As :func:`load`, of a run that trains.

    Raises:
        ConfigError: there is no such file, or it holds no valid run of a stage that trains.
    """
    return load_run(
        _file_of(word), TRAINING, overrides, kind="a stage that trains (`cliplift verify` checks shards)"
    )


def load_as(word: str, schema: type[R], overrides: Sequence[str] = ()) -> LoadedRun[R]:
    """As :func:`load`, of a run of one stage.

    Raises:
        ConfigError: there is no such file, or it holds no valid run of that stage.
    """
    loaded = load(word, overrides)
    if not isinstance(loaded.run, schema):
        given = stage_name(type(loaded.run))
        raise ConfigError(
            f"is {given!r}, but the command is {stage_name(schema)!r}",
            key="stage",
            file=str(loaded.file),
            hint=f"run `cliplift {given} {word}`",
        )
    return LoadedRun(run=loaded.run, file=loaded.file, origins=loaded.origins)


def load_stage(
    arguments: argparse.Namespace,
    schema: type[R],
    *,
    from_folder: FolderConfig | None = None,
    extra_key: str | None = None,
    or_url: bool = False,
) -> LoadedRun[R]:
    """The run of one stage that a command's words name.

    Args:
        arguments: ``subject`` and ``rest`` of the command line.
        schema: of the stage that the run must be of.
        from_folder: makes a config of a run folder and the words after it; None where only a config will do.
        extra_key: key of the config that holds what words other than overrides give.
        or_url: whether ``from_folder`` takes the URL of a folder too.

    Raises:
        ConfigError: the words name no such run.
    """
    subject: str = arguments.subject
    overrides = [word for word in arguments.rest if is_override(word)]
    extra = [word for word in arguments.rest if not is_override(word)]
    if from_folder is not None and (Path(subject).is_dir() or (or_url and "://" in subject)):
        return load_tree(from_folder(subject, extra), schema, overrides)
    if from_folder is not None and Path(subject).suffix not in (".yaml", ".yml") and not _recipe(subject):
        raise ConfigError("is neither a folder nor a YAML file", file=subject)
    if extra:
        hint = f"with a YAML file, give {extra_key} in the file or as {extra_key}=..." if extra_key else ""
        raise ConfigError(
            f"{extra[0]!r} is not an override", file=COMMAND_LINE, hint=hint or "write key.path=value"
        )
    return load_as(subject, schema, overrides)


def load_tree(tree: Tree, schema: type[R], overrides: Sequence[str]) -> LoadedRun[R]:
    """The run of a config that no file holds."""
    origins = apply_overrides(tree, overrides)
    run = validate(tree, schema, origins, COMMAND_LINE)
    return LoadedRun(run=run, file=Path(COMMAND_LINE), origins=origins)


def is_override(word: str) -> bool:
    """Whether a word is ``key.path=value``, and not a path with an equals sign in it."""
    key, equals, _ = word.partition("=")
    return bool(equals) and all(part.isidentifier() or part.isdigit() for part in key.split("."))


def run_located(loaded: LoadedRun[R], call: Callable[[], T]) -> T:
    """What the call returns; an error about a key names the file that set it."""
    try:
        return call()
    except ConfigError as error:
        raise loaded.locate(error) from None


def print_run(loaded: LoadedRun[R]) -> int:
    """``--dry-run``: the resolved config. Returns the exit code 0."""
    print(dump_run(loaded.run), end="")
    return 0


def prepare_environment() -> None:
    """Environment that must be set before torch and deepspeed are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def command_words() -> list[str]:
    """The command line as it was written, for ``run.json``."""
    return ["cliplift", *sys.argv[1:]]


def _file_of(word: str) -> Path:
    return _recipe(word) or Path(word)


def _recipe(word: str) -> Path | None:
    """A packaged recipe by name, from any directory; a file of that name in the working directory goes first."""
    return None if Path(word).exists() else packaged_recipe(word)
