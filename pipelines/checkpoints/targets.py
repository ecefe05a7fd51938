"""Where one checkpoint is written: what is done before, with each file, at the end, and where it fails.

On a disk the files are written into a folder beside, which is renamed when it is complete. In a store each file is
written on this machine, uploaded and removed, and the seal goes up last (``stored.py``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from cliplift.models.weight_files import WrittenFile
from cliplift.pipelines.checkpoints.folder import (
    FORMAT,
    NAMES,
    STATE,
    Folder,
    checkpoint_path,
    complete_checkpoints,
    crc32_of,
)
from cliplift.pipelines.checkpoints.stored import COMPLETE, StoredFolder
from cliplift.pipelines.distributed.collectives import Topology, broadcast_object
from cliplift.pipelines.runs.folder import json_bytes, write_json
from cliplift.sharding.storage import StorageError

PARTIAL = ".partial"


class Target(Protocol):
    """One checkpoint that is being written. ``partial`` is the folder on this machine that a rank writes into."""

    partial: Path
    where: str  # the folder of checkpoints, as it may be shown
    advice: str  # to whom it failed for

    @property
    def place(self) -> Folder:
        """The checkpoint, once it is complete."""
        ...

    def clear(self) -> None:
        """Remove what saves left that did not come to their end, before anything is written."""
        ...

    def agree(self, group: dist.ProcessGroup | None) -> None:
        """Have all ranks know the checkpoint's name. Collective in ``group``, where None is that of the training."""
        ...

    def take(self, file: Path) -> None:
        """A file that this rank has written is complete."""
        ...

    def leave(self) -> None:
        """All files of this rank have been taken."""
        ...

    def seal(self, files: Mapping[str, WrittenFile], state: Mapping[str, object]) -> None:
        """Make the checkpoint count, on rank 0, when the files of all ranks have been taken."""
        ...

    def prune(self, *, keep_last: int) -> None:
        """Remove older complete checkpoints, on rank 0."""
        ...

    def discard(self) -> None:
        """Remove what was written: the save has failed."""
        ...


def target_of(folder: Folder, *, step: int, topology: Topology, records: Callable[[], None]) -> Target:
    """The checkpoint of a step in a folder. ``records`` publishes a run's small files beside a stored one."""
    if isinstance(folder, StoredFolder):
        return _InStore(folder, step=step, topology=topology, records=records)
    return _OnDisk(folder, step=step, topology=topology)


class _OnDisk:
    advice = "free some space and start again"

    def __init__(self, folder: Path, *, step: int, topology: Topology) -> None:
        self._folder, self._topology = folder, topology
        self.where, self._final = str(folder), checkpoint_path(folder, step)
        self.partial = folder / f"{self._final.name}{PARTIAL}"

    @property
    def place(self) -> Path:
        return self._final

    def clear(self) -> None:
        if self._topology.is_main:
            for left in self._folder.glob(f"{NAMES}{PARTIAL}"):  # of a run that was killed
                shutil.rmtree(left)
            self.partial.mkdir(parents=True)

    def agree(self, group: dist.ProcessGroup | None) -> None:
        """All ranks know the name."""

    def take(self, file: Path) -> None:
        """It stays where it is."""

    def leave(self) -> None:
        """Nothing to tidy up."""

    def seal(self, files: Mapping[str, WrittenFile], state: Mapping[str, object]) -> None:
        """Write the state, then the list of all files, and give the folder its name."""
        write_json(self.partial / STATE, {"format": FORMAT, **state})
        own = self.partial / STATE
        sealed = {**files, STATE: WrittenFile(size_bytes=own.stat().st_size, crc32=crc32_of(own))}
        write_json(self.partial / COMPLETE, _listing(sealed))
        for path in (own, self.partial / COMPLETE, self.partial):
            to_disk(path)
        if self._final.exists():
            shutil.rmtree(self._final)
        self.partial.replace(self._final)
        to_disk(self._folder)

    def prune(self, *, keep_last: int) -> None:
        for old in complete_checkpoints(self._folder)[:-keep_last]:
            assert isinstance(old, Path)
            shutil.rmtree(old)

    def discard(self) -> None:
        if self._topology.is_main:
            shutil.rmtree(self.partial, ignore_errors=True)


class _InStore:
    advice = "start again when the store can be written"

    def __init__(
        self, folder: StoredFolder, *, step: int, topology: Topology, records: Callable[[], None]
    ) -> None:
        self._folder, self._step, self._topology, self._records = folder, step, topology, records
        self._name, self.where = "", str(folder)
        self.partial = folder.local / f"step_{step:08d}{PARTIAL}"

    @property
    def place(self) -> StoredFolder:
        return self._folder / self._name

    def clear(self) -> None:
        """What earlier saves left: each rank on its own machine, rank 0 in the store."""
        self._folder.let_go()
        if self._topology.is_main:
            for left in self._folder.checkpoints()[1]:
                left.remove()
            self._name = self._folder.new_name(self._step)

    def agree(self, group: dist.ProcessGroup | None) -> None:
        self._name = broadcast_object(self._name, self._topology, group=group)

    def take(self, file: Path) -> None:
        self.place.store.publish(file, file.name)

    def leave(self) -> None:
        self._folder.let_go()

    def seal(self, files: Mapping[str, WrittenFile], state: Mapping[str, object]) -> None:
        """The state, the run's records, and the list of all files last."""
        store = self.place.store
        text = json_bytes({"format": FORMAT, **state})
        store.write(STATE, text)
        self._records()
        own = WrittenFile(size_bytes=len(text), crc32=zlib.crc32(text))
        store.write(COMPLETE, json_bytes(_listing({**files, STATE: own})))

    def prune(self, *, keep_last: int) -> None:
        complete = self._folder.checkpoints()[0]
        steps = {path.name.partition(".")[0]: path.name for path in complete}  # of each step the last one
        kept = set(list(steps.values())[-keep_last:])
        for old in complete:
            if old.name not in kept:
                old.remove()

    def discard(self) -> None:
        self._folder.let_go()
        if self._topology.is_main and self._name:
            with contextlib.suppress(OSError, StorageError):  # it has no seal; the next save removes it
                self.place.remove()


def _listing(files: Mapping[str, WrittenFile]) -> dict[str, object]:
    listed = {
        name: {"bytes": written.size_bytes, "crc32": written.crc32} for name, written in sorted(files.items())
    }
    return {"format": FORMAT, "files": listed}


def to_disk(path: Path) -> None:
    """Have the system write a file or a folder's entries: only then does a checkpoint outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)
