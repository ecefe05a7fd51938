"""Folders for unfinished work that are gone afterwards, also after ``kill -9``.

A killed process cannot clean up. So every scratch folder is locked by its owner for as long as that lives, and whoever
makes the next one removes those that nobody holds any more.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cliplift.sharding.storage import Store

PREFIX = "cliplift-scratch-"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new empty folder in the system's place for temporary files (``TMPDIR``), removed at the end."""
    parent = Path(tempfile.gettempdir())
    sweep(parent)
    folder, lock = _locked_folder(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@contextmanager
def local_copy(store: Store, name: str) -> Iterator[Path]:
    """A file of a store on the local disk: itself, or a copy that is removed at the end."""
    path = store.local_path(name)
    if path is not None:
        yield path
        return
    with scratch_folder() as folder:
        copy = folder / "copy"
        store.fetch(name, copy)
        yield copy


def sweep(parent: Path) -> None:
    """Remove the scratch folders below ``parent`` whose owners have died."""
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # gone meanwhile, or another user's
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # its owner lives
            continue
        finally:
            os.close(lock)


def _locked_folder(parent: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock; children do not inherit it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.is_dir():
                return folder, lock
            os.close(lock)  # swept in the moment between its making and its locking
