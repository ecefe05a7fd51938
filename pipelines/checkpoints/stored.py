"""Checkpoints in a store: any file system that fsspec opens, where every rank uploads its own files itself.

A store cannot rename a folder, so the files go up under their final names and ``COMPLETE.json`` last: without it a
checkpoint does not count. One of a step that is there already (an evaluation that was stopped is saved again with its
metrics) gets a number behind its name, ``step_00000040.1``: the one before it stays whole until this one is.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cliplift.sharding.storage import Store, join, open_store, without_secrets

COMPLETE = "COMPLETE.json"
CHECKPOINT_NAME = re.compile(r"step_(\d{8})(?:\.(\d+))?")


@dataclass(frozen=True)
class StoredFolder:
    """A folder in a store: that of a run's checkpoints, or one of them.

    Attributes:
        url: of the folder.
        local: a folder on this machine that is this rank's alone, for files on their way up or down.
    """

    url: str
    local: Path

    def __str__(self) -> str:
        return without_secrets(self.url)

    def __truediv__(self, name: str) -> StoredFolder:
        return StoredFolder(join(self.url, name), self.local / name)

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def store(self) -> Store:
        return open_store(self.url)

    def checkpoints(self) -> tuple[list[StoredFolder], list[StoredFolder]]:
        """(complete ones, ones that were not uploaded to their end), each oldest first."""
        names = self.store.list()
        found = {name.partition("/")[0] for name in names if "/" in name}
        steps = _oldest_first(name for name in found if CHECKPOINT_NAME.fullmatch(name))
        sealed = {name for name in steps if f"{name}/{COMPLETE}" in names}
        complete = [self / name for name in steps if name in sealed]
        return complete, [self / name for name in steps if name not in sealed]

    def new_name(self, step: int) -> str:
        """A name for a checkpoint of this step that no complete one has."""
        name = f"step_{step:08d}"
        same = [found.name for found in self.checkpoints()[0] if found.name.split(".")[0] == name]
        numbers = [int(found.partition(".")[2] or 0) for found in same]
        return f"{name}.{max(numbers) + 1}" if numbers else name

    def remove(self) -> None:
        """All files of this folder, the seal first: what is half removed does not count."""
        store = self.store
        for name in sorted(store.list(), key=lambda name: name != COMPLETE):
            store.remove(name)

    def fetch(self, name: str) -> Path:
        """A copy of a file, until :meth:`let_go`."""
        self.local.mkdir(parents=True, exist_ok=True)
        self.store.fetch(name, self.local / name)
        return self.local / name

    def let_go(self) -> None:
        """Remove what lies on this machine; files that are mapped stay readable."""
        shutil.rmtree(self.local, ignore_errors=True)


def _oldest_first(names: Iterable[str]) -> list[str]:
    def order(name: str) -> tuple[str, int]:
        step, _, number = name.partition(".")
        return step, int(number or 0)

    return sorted(names, key=order)
