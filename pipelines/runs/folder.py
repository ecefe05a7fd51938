"""The folder of a run: what was asked (config.yaml), how it was started (run.json), what came out (result.json).

One run per folder: a second job started on the same output would mix its checkpoints with those of the first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeGuard

from cliplift.configs.discovery import plugin_versions
from cliplift.configs.load import dump_run
from cliplift.configs.sections import ConfigError, Section
from cliplift.pipelines.runs.predictions import PREDICTIONS
from cliplift.sharding.storage import whole_file

Record = dict[str, object]  # an object of JSON

CONFIG, RUN, RESULT, WEIGHTS = "config.yaml", "run.json", "result.json", "weights"
HISTORY = "metrics.jsonl"


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run and the small files in it. Only rank 0 writes."""

    path: Path
    writes: bool = True

    @classmethod
    def create(cls, path: str | Path, *, writes: bool) -> RunFolder:
        """Make the folder. Raises :class:`ConfigError` when it cannot be written."""
        folder = cls(Path(path), writes)
        if writes:
            try:
                folder.path.mkdir(parents=True, exist_ok=True)
                probe = folder.path / ".writable"
                probe.write_bytes(b"")
                probe.unlink()
            except OSError as error:
                raise ConfigError(
                    f"{str(path)!r} cannot be written: {error.strerror}",
                    key="output",
                    value=str(path),
                    hint="choose another folder",
                ) from error
        return folder

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS

    @property
    def predictions(self) -> Path:
        return self.path / PREDICTIONS

    def write_start(
        self, run: Section, *, stage: str, name: str, command: Sequence[str], world_size: int
    ) -> None:
        """Resolved config and start record; a restart adds to the list of starts, and its command is the record's."""
        if not self.writes:
            return
        write_text(self.path / CONFIG, dump_run(run))
        record = self.start_record() or {"stage": stage, "name": name, "starts": []}
        record |= {"command": list(command), "command_line": shlex.join(command)}
        record |= _environment() | {"world_size": world_size}
        before = record.get("starts")
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        starts = [*(before if isinstance(before, list) else []), now]
        record |= {"starts": starts, "started_utc": starts[0]}
        write_json(self.path / RUN, record)

    def add_to_record(self, **facts: object) -> None:
        """Facts that are known only after the start, in run.json: a checkpoint can be read with them alone."""
        if self.writes:
            write_json(self.path / RUN, (self.start_record() or {}) | facts)

    def write_result(
        self,
        *,
        stage: str,
        metrics: Mapping[str, float | None],
        seconds: float,
        classes: Sequence[str] = (),
        **facts: object,
    ) -> None:
        """The run's final numbers."""
        if not self.writes:
            return
        write_json(
            self.path / RESULT,
            {
                "stage": stage,
                "metrics": dict(metrics),
                "seconds": round(seconds, 3),
                "classes": list(classes),
                **facts,
            },
        )
        record = self.start_record() or {}
        write_json(self.path / RUN, record | {"seconds": round(seconds, 3)})

    def start_record(self) -> Record | None:
        return read_json(self.path / RUN)

    def result(self) -> Record | None:
        """The final numbers, or None while the run has not finished."""
        return read_json(self.path / RESULT)


def _environment() -> Record:
    from importlib.metadata import version

    import torch

    plugins = plugin_versions()
    return {
        "cliplift_version": version("cliplift"),
        "torch_version": torch.__version__,
        "deepspeed_version": version("deepspeed"),
        "python": platform.python_version(),
        "git_commit": _git_commit(),
        **({"plugins": plugins} if plugins else {}),
    }


def _git_commit() -> str | None:
    """Commit of the working directory, with ``+changes`` when it differs; None outside a repository."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        status = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: a reader sees the old text or the new, never half of it."""
    with whole_file(path) as temporary:
        # A file name that is not UTF-8 is written with escapes, which JSON reads back.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def json_bytes(value: object) -> bytes:
    """The bytes that :func:`write_json` writes, for a place that is no file. ValueError for a number JSON lacks."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", errors="backslashreplace")


def write_json(path: Path, value: object) -> None:
    """Replace a file at once, as :func:`write_text` does."""
    with whole_file(path) as temporary:
        temporary.write_bytes(json_bytes(value))


def read_json(path: Path) -> Record | None:
    """The object in a file, or None. A damaged file is logged: it must not keep a run from going on."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        logger.warning("%s is damaged (%s) and is treated as missing", path, error)
        return None
    if not isinstance(value, dict):
        logger.warning("%s is damaged (no object) and is treated as missing", path)
        return None
    return value


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value of a record is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def metrics_of(result: Record) -> dict[str, float]:
    """The metrics of a result.json; one without a number is left out."""
    metrics = result.get("metrics")
    found = metrics if isinstance(metrics, dict) else {}
    return {name: float(value) for name, value in found.items() if is_number(value)}


def classes_of(result: Record) -> tuple[str, ...]:
    """The class names of a result.json; empty where it records none."""
    classes = result.get("classes")
    return tuple(map(str, classes)) if isinstance(classes, list) else ()


def seconds_of(record: Record) -> float | None:
    """How long the run of a result.json or run.json took; None where it does not say."""
    seconds = record.get("seconds")
    return float(seconds) if is_number(seconds) else None


logger = logging.getLogger(__name__)

LOCK = "run.lock"
WAIT_SECONDS = 10.0  # a run that was just ended may take a moment to be gone
TAKEN = (errno.EACCES, errno.EAGAIN)


@contextlib.contextmanager
def sole_writer(folder: Path, *, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold ``folder/run.lock`` while the block runs.

    A POSIX record lock: it goes with its process however that ends, holds between the hosts of a shared file system
    that knows locks, and is not handed to children. Where the file system knows none, it is logged and left at that.

    Raises:
        ConfigError: another process holds it; names its host and number.
    """
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        _lock_file(file, wait_seconds=wait_seconds)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def _lock_file(file: IO[str], *, wait_seconds: float) -> None:
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in TAKEN:
                logger.warning(
                    "%s cannot be locked (%s): start no second run on it", file.name, error.strerror
                )
                return
        if time.monotonic() > deadline:
            file.seek(0)
            raise ConfigError(
                f"{Path(file.name).parent} is being written by {file.read().strip() or 'another run'}",
                key="output",
                value=str(Path(file.name).parent),
                hint="wait for it to end, or use another output",
            )
        time.sleep(0.2)
