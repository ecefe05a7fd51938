"""One run a folder: a second job started on the same output would mix its checkpoints with those of the first."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cliplift.configs.sections import ConfigError

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
        _take(file, wait_seconds=wait_seconds)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def _take(file: IO[str], *, wait_seconds: float) -> None:
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
