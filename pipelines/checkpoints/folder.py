"""The folders of checkpoints: which are whole, which is the newest usable one, what must be free on the disk.

``COMPLETE.json`` lists every file of a checkpoint with size and crc32 and is written last. A folder without it, or with
a file that differs from it, is skipped with a warning; the previous checkpoint is used.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeGuard

from cliplift.configs.sections import ConfigError
from cliplift.models.weight_files import WrittenFile
from cliplift.pipelines.distributed.collectives import Topology, broadcast_object, gather_objects

FORMAT = 3
READABLE_FORMATS = (1, 2, 3)
COMPLETE, STATE = "COMPLETE.json", "state.json"
NAMES = "step_????????"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step_{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were written to the end, oldest first."""
    return sorted(path for path in folder.glob(NAMES) if (path / COMPLETE).is_file())


def newest_usable(folder: Path, *, topology: Topology, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are all as they were written; damaged ones are told about and passed over.

    Collective. Rank 0 lists the folder for all, and each rank reads a share of the files: those it would load, where
    the number of ranks is the same.
    """
    for path in broadcast_object(complete_checkpoints(folder)[::-1], topology):
        problems = gather_objects([damage(path, rank=topology.rank, ranks=topology.world_size)], topology)
        problem = next((found for found in problems if found is not None), None)
        if problem is None:
            return path
        say(f"checkpoint {path.name} is damaged ({problem}); using the previous one")
    return None


def damage(path: Path, *, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint's files, or None; of several ranks, each looks at its own share of them."""
    try:
        files = sealed_files(path / COMPLETE)
        for name, written in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != written.size_bytes:
                return f"{name} differs from what was written"
        for name in _share(list(files), rank=rank, ranks=ranks):
            if crc32_of(path / name) != files[name].crc32:
                return f"{name} differs from what was written"
    except (OSError, ValueError, RecursionError) as error:
        return f"{COMPLETE}: {error}"
    return None


def _share(names: list[str], *, rank: int, ranks: int) -> Iterator[str]:
    """The files that ``rank`` checks: those of the rank of its own number, and of the others every ``ranks``-th."""
    for place, name in enumerate(names):
        written_by = re.search(r"-rank(\d+)\.", name)
        if (int(written_by[1]) if written_by else place) % ranks == rank:
            yield name


def sealed_files(seal: Path) -> dict[str, WrittenFile]:
    """Name -> size and checksum of every file a COMPLETE.json lists; raises ValueError where it is malformed."""
    complete = json.loads(seal.read_text(encoding="utf-8"))
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
