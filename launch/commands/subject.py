"""From the words of a command to the run they name: a YAML file, a packaged recipe, or a run folder.

Imported when a command runs, never for ``--help``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cliplift.configs.load import LoadedRun, apply_overrides, dump_run, load_run, packaged_recipe, validate
from cliplift.configs.runs import RUNS
from cliplift.configs.sections import ConfigError, Section

T = TypeVar("T")
# From a run folder and the words after it to the tree of a config.
FolderConfig = Callable[[str, list[str]], dict[str, Any]]


def load(word: str, overrides: Sequence[str] = ()) -> LoadedRun[Any]:
    """The run of a YAML file or, where no file has that name, of a packaged recipe.

    Raises:
        ConfigError: there is no such file, or it holds no valid run.
    """
    return load_run(_recipe(word) or Path(word), RUNS, overrides)


def load_stage(
    arguments: argparse.Namespace,
    stage: str,
    *,
    from_folder: FolderConfig | None = None,
    extra_key: str | None = None,
) -> LoadedRun[Any]:
    """The run of one stage that a command's words name.

    Args:
        arguments: ``subject`` and ``rest`` of the command line.
        stage: what the run must be.
        from_folder: makes a config of a run folder and the words after it; None where only a config will do.
        extra_key: key of the config that holds what words other than overrides give.

    Raises:
        ConfigError: the words name no such run.
    """
    subject: str = arguments.subject
    overrides = [word for word in arguments.rest if is_override(word)]
    extra = [word for word in arguments.rest if not is_override(word)]
    if from_folder is not None and Path(subject).is_dir():
        return load_tree(from_folder(subject, extra), stage, overrides)
    if from_folder is not None and Path(subject).suffix not in (".yaml", ".yml") and not _recipe(subject):
        raise ConfigError("is neither a folder nor a YAML file", file=subject)
    if extra:
        hint = f"with a YAML file, give {extra_key} in the file or as {extra_key}=..." if extra_key else ""
        raise ConfigError(
            f"{extra[0]!r} is not an override", file="command line", hint=hint or "write key.path=value"
        )
    loaded = load(subject, overrides)
    if loaded.run.stage != stage:
        raise ConfigError(
            f"is {loaded.run.stage!r}, but the command is {stage!r}",
            key="stage",
            file=str(loaded.file),
            hint=f"run `cliplift {loaded.run.stage} {subject}`",
        )
    return loaded


def load_tree(tree: dict[str, Any], stage: str, overrides: Sequence[str]) -> LoadedRun[Any]:
    """The run of a config that no file holds."""
    origins = apply_overrides(tree, overrides)
    run: Section = validate(tree, RUNS[stage], origins, "command line")
    return LoadedRun(run=run, file=Path("command line"), origins=origins)


def is_override(word: str) -> bool:
    """Whether a word is ``key.path=value``, and not a path with an equals sign in it."""
    key, equals, _ = word.partition("=")
    return bool(equals) and all(part.isidentifier() or part.isdigit() for part in key.split("."))


def located(loaded: LoadedRun[Any], call: Callable[[], T]) -> T:
    """What the call returns; an error about a key names the file that set it."""
    try:
        return call()
    except ConfigError as error:
        raise loaded.locate(error) from None


def print_run(loaded: LoadedRun[Any]) -> int:
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


def _recipe(word: str) -> Path | None:
    """A packaged recipe by name, from any directory; a file of that name in the working directory goes first."""
    return None if Path(word).exists() else packaged_recipe(word)
