"""The folders of checkpoints: which are whole, which is the newest usable one, what must be free on the disk.

``COMPLETE.json`` lists every file of a checkpoint with size and crc32 and is written last. A folder without it, or with
a file that differs from it, is skipped with a warning; the previous checkpoint is used. On a disk and in a store alike.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeGuard

from cliplift.configs.sections import ConfigError
from cliplift.models.weight_files import WrittenFile
from cliplift.pipelines.checkpoints.slices import CheckpointError
from cliplift.pipelines.checkpoints.stored import COMPLETE, StoredFolder
from cliplift.pipelines.distributed.collectives import Topology, broadcast_object, gather_objects
from cliplift.sharding.storage import StorageError

FORMAT = 3
READABLE_FORMATS = (1, 2, 3)
STATE = "state.json"
NAMES = "step_????????"
BEST = "best"  # the folder in that of the checkpoints with the one of the best metric

Folder = Path | StoredFolder  # of checkpoints, or one of them


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step_{step:08d}"


def complete_checkpoints(folder: Folder) -> Sequence[Folder]:
    """Checkpoints that were written to the end, oldest first."""
    if isinstance(folder, StoredFolder):
        return folder.checkpoints()[0]
    return sorted(path for path in folder.glob(NAMES) if (path / COMPLETE).is_file())


def newest_usable(folder: Folder, *, topology: Topology, say: Callable[[str], None]) -> Folder | None:
    """The newest checkpoint whose files are all as they were written; damaged ones are told about and passed over.

    Collective. Rank 0 lists the folder for all, and each rank reads a share of the files: those it would load, where
    the number of ranks is the same.

    Raises:
        CheckpointError: on all ranks, where a store cannot be read. That is no damage: to go on from an older
            checkpoint would throw work away.
    """
    if isinstance(folder, StoredFolder):
        folder.let_go()  # what a killed start left
    for name in _listed(folder, topology=topology, say=say)[::-1]:
        path = folder / name
        problem, outage = _looked_at(path, topology)
        if outage is not None:
            raise CheckpointError(f"the checkpoints cannot be read: {outage}; start again when they can")
        if problem is None:
            return path
        if isinstance(path, StoredFolder):
            path.let_go()
        say(f"checkpoint {path.name} is damaged ({problem}); using the previous one")
    return None


def _listed(folder: Folder, *, topology: Topology, say: Callable[[str], None]) -> list[str]:
    """Names of the complete checkpoints, oldest first, as rank 0 finds them."""
    names, problem = list[str](), None
    if topology.is_main:
        try:
            if isinstance(folder, StoredFolder):
                complete, unsealed = folder.checkpoints()
                names = [path.name for path in complete]
                for path in unsealed:
                    say(f"checkpoint {path} was not uploaded to its end and is passed over")
            else:
                names = [path.name for path in complete_checkpoints(folder)]
        except (OSError, StorageError) as error:
            problem = str(error)
    names, problem = broadcast_object((names, problem), topology)
    if problem is not None:
        raise CheckpointError(f"the checkpoints cannot be listed: {problem}")
    return names


def _looked_at(path: Folder, topology: Topology) -> tuple[str | None, str | None]:
    """What is wrong with a checkpoint, and why that cannot be told; the same on all ranks."""
    found, outage = None, None
    try:
        found = damage(path, rank=topology.rank, ranks=topology.world_size)
    except StorageError as error:
        outage = str(error)
    said = gather_objects([(found, outage)], topology)
    damages, outages = ([each[i] for each in said if each[i] is not None] for i in (0, 1))
    return next(iter(damages), None), next(iter(outages), None)


def damage(path: Folder, *, rank: int = 0, ranks: int = 1, unread: str = "") -> str | None:
    """What is wrong with a checkpoint's files, or None; of several ranks, each looks at its own share of them.

    Of files whose names begin with ``unread``, the size alone is looked at.

    From a store each rank fetches its share: the copies are read by :func:`open_checkpoint`, and gone after it.

    Raises:
        StorageError: the store does not answer.
    """
    try:
        files = sealed_files(path)
        share = list(_share(list(files), rank=rank, ranks=ranks))
        # On a disk every rank looks for all files: one that is on another host's disk is missing here.
        for name in share if isinstance(path, StoredFolder) else files:
            size = _size(path, name)
            if size is None:
                return f"{name} is missing"
            if size != files[name].size_bytes:
                return f"{name} differs from what was written"
        for name in (name for name in share if not (unread and name.startswith(unread))):
            copy = path.fetch(name) if isinstance(path, StoredFolder) else path / name
            if crc32_of(copy) != files[name].crc32:
                return f"{name} differs from what was written"
    except StorageError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        return f"{COMPLETE}: {error}"
    return None


def _size(path: Folder, name: str) -> int | None:
    if isinstance(path, StoredFolder):
        return path.store.size(name)
    return (path / name).stat().st_size if (path / name).is_file() else None


def read_small(path: Folder, name: str) -> bytes:
    """A small file of a checkpoint."""
    return path.store.read(name) if isinstance(path, StoredFolder) else (path / name).read_bytes()


def _share(names: list[str], *, rank: int, ranks: int) -> Iterator[str]:
    """The files that ``rank`` checks: those of the rank of its own number, and of the others every ``ranks``-th."""
    for place, name in enumerate(names):
        written_by = re.search(r"-rank(\d+)\.", name)
        if (int(written_by[1]) if written_by else place) % ranks == rank:
            yield name


def sealed_files(path: Folder) -> dict[str, WrittenFile]:
    """Name -> size and checksum of every file that a checkpoint's COMPLETE.json lists.

    Raises:
        ValueError: it is malformed.
    """
    complete = json.loads(read_small(path, COMPLETE).decode("utf-8"))
    if not isinstance(complete, dict):
        raise ValueError(f"holds a {type(complete).__name__}, not an object")
    written = complete.get("format")
    if not _is_count(written) or written not in READABLE_FORMATS:
        raise ValueError(f"format {written!r:.40}, this version reads {READABLE_FORMATS}")
    listed = complete.get("files")
    if not isinstance(listed, dict) or STATE not in listed:
        raise ValueError(f"does not list {STATE}")
    files: dict[str, WrittenFile] = {}
    for name, facts in listed.items():
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ValueError(f"lists {name!r:.80}, which is no file of this folder")
        size, crc = (facts.get("bytes"), facts.get("crc32")) if isinstance(facts, dict) else (None, None)
        if not (_is_count(size) and _is_count(crc)):
            raise ValueError(f"gives no size and crc32 of {name!r:.80}")
        files[name] = WrittenFile(size_bytes=size, crc32=crc)
    return files


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def crc32_of(path: Path) -> int:
    """The checksum of a file, read in blocks of 1 MiB."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def count(folder: Folder) -> int:
    """How many checkpoints there are, damaged ones too."""
    return len(folder.checkpoints()[0] if isinstance(folder, StoredFolder) else list(folder.glob(NAMES)))


def start_afresh(folder: Folder, *, topology: Topology, say: Callable[[str], None]) -> None:
    """Keep an earlier run's checkpoints out of the way of a new one. Collective.

    Raises:
        ConfigError: they are in a store, which cannot rename a folder.
    """
    if not isinstance(folder, StoredFolder):
        if topology.is_main:
            set_aside(folder, say=say)
        return
    if _listed(folder, topology=topology, say=say) or _listed(folder / BEST, topology=topology, say=say):
        raise ConfigError(
            f"{folder} holds checkpoints of an earlier run, and a store cannot set them aside",
            key="checkpoint.url",
            value=str(folder),
            hint="give another URL, remove them, or continue with checkpoint.resume=auto",
        )


def set_aside(folder: Path, *, say: Callable[[str], None]) -> None:
    """Rename the checkpoints of an earlier run, so that a fresh start neither resumes, keeps nor returns them."""
    if not folder.exists():
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
        number += 1
    folder.replace(aside)
    say(f"starts afresh; the checkpoints of the previous run are in {aside.name}")


def checkpoint_bytes(*, parameters: int, trainable: int, moments: int, averaged: bool = False) -> int:
    """Bytes of one checkpoint without its small files (buffers, random states, JSON).

    Args:
        parameters, trainable: numbers of fp32 values; the trainable ones also have optimizer state.
        moments: optimizer tensors per trainable parameter (AdamW 2, SGD with momentum 1).
        averaged: whether a moving average of the trainable parameters is saved too.
    """
    return 4 * (parameters + trainable * (moments + averaged))


def check_space(
    folder: Path, *, parameters: int, trainable: int, moments: int, averaged: bool = False
) -> None:
    """Refuse to start a run whose first checkpoint cannot fit on the disk.

    Args:
        folder: where checkpoints go; its nearest existing parent is asked for free space.
        parameters, trainable, moments, averaged: as for :func:`checkpoint_bytes`.

    Raises:
        ConfigError: fewer bytes are free than one checkpoint takes.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    needed = checkpoint_bytes(parameters=parameters, trainable=trainable, moments=moments, averaged=averaged)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ConfigError(
            f"one checkpoint takes {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free",
            key="output",
            value=str(folder.parent),
            hint="free some space, or choose another folder",
        )
