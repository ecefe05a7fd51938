"""The files below a folder of raw data: links followed, and what cannot be used named instead of passed over."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cliplift.sharding.storage import Store

log = logging.getLogger(__name__)

DANGLING = "a link to nothing"
# Links between folders multiply the paths to a file: twelve folders that link to each other hold 12! of them.
MAX_WAYS = 16
TOO_MANY_WAYS = f"a folder that {MAX_WAYS} other paths lead to already, by links"
NO_FILE = "no regular file (a pipe, a socket or a device)"
HIDDEN = "hidden"
NOT_UTF8 = "its name is not UTF-8"


@dataclass(frozen=True)
class LeftOut:
    """Something below a source that is not used, by a name that can be printed, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Found:
    """Files by their path below the root, sorted, and what lies there and cannot be used."""

    files: tuple[str, ...]
    left_out: tuple[LeftOut, ...]


def printable(name: str) -> str:
    """The name itself if it can be stored as UTF-8, else with escapes for what cannot."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return name.encode("utf-8", "backslashreplace").decode()


def find_files(store: Store) -> Found:
    """All files below the root of a store, in the order of their names."""
    files: list[str] = []
    left_out: list[LeftOut] = []
    for name, reason in walk_files(store):
        if reason:
            left_out.append(LeftOut(name, reason))
        else:
            files.append(name)
    return Found(tuple(files), tuple(sorted(left_out, key=lambda item: item.name)))


def walk_files(store: Store) -> Iterator[tuple[str, str]]:
    """(path, '') of every file below the root in the order of their paths, (path, reason) of what cannot be used.

    Of a local tree, the names of one folder and of those above it are held at a time.
    """
    root = store.local_path("")
    if root is None:
        yield from ((name, "") for name in store.list())
        return
    for name, trouble in _walk(root, "", (), Counter(), linked=False):
        shown = printable(name)
        yield shown, trouble or (NOT_UTF8 if shown != name else "")


def _walk(
    folder: Path,
    prefix: str,
    above: tuple[tuple[int, int], ...],
    ways: Counter[tuple[int, int]],
    *,
    linked: bool,
) -> Iterator[tuple[str, str]]:
    """(path, '') of every file and (path, reason) of what cannot be read. A link to a folder above is not entered."""
    try:
        facts = folder.stat()
        here = (facts.st_dev, facts.st_ino)
        names, odd, links = _names(folder)
    except NotADirectoryError:
        return
    except FileNotFoundError:
        if prefix:
            yield prefix.rstrip("/"), DANGLING
        return
    except OSError as error:
        yield prefix.rstrip("/") or ".", f"cannot be opened: {error.strerror}"
        return
    if here in above:
        yield prefix.rstrip("/"), "a link to a folder that it lies in"
        return
    ways[here] += linked
    if linked and ways[here] > MAX_WAYS:
        yield prefix.rstrip("/"), TOO_MANY_WAYS
        return
    for name in names:
        if name.endswith("/"):
            below = folder / name[:-1]
            yield from _walk(below, prefix + name, (*above, here), ways, linked=linked or name in links)
        else:
            yield prefix + name, odd.get(name, "")


def _names(folder: Path) -> tuple[list[str], dict[str, str], set[str]]:
    """The names in a folder, what is wrong with some of them, and which folders are links.

    A folder's name ends in a slash: sorted so, names stand in the order of the paths below them.
    """
    names: list[str] = []
    odd: dict[str, str] = {}
    links: set[str] = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            try:
                if entry.is_dir():
                    name += "/"
                    if entry.is_symlink():
                        links.add(name)
                elif not entry.is_file():
                    gone = entry.is_symlink() and not Path(entry.path).exists()
                    odd[name] = DANGLING if gone else NO_FILE
            except (
                OSError
            ) as error:  # a link that leads to itself, or through a folder that may not be entered
                odd[name] = f"cannot be opened: {error.strerror}"
            names.append(name)
    return sorted(names), odd, links


def is_hidden(file: str) -> bool:
    """Whether a file or a folder it lies in is hidden: AppleDouble files, caches, unfinished downloads."""
    return any(part.startswith(".") for part in file.split("/"))


def why_left_out(file: str, suffixes: Iterable[str]) -> str:
    """Why a file is not taken for a video; empty where it is."""
    if is_hidden(file):
        return HIDDEN
    suffix = PurePosixPath(file).suffix.lower()
    return "" if suffix in suffixes else f"the ending {suffix or 'none'} is not among those taken for videos"


def sort_out(found: Found, suffixes: Iterable[str]) -> tuple[list[str], list[LeftOut]]:
    """The visible files with one of the endings, and everything else with the reason."""
    wanted = frozenset(suffixes)
    taken: list[str] = []
    left_out = list(found.left_out)
    for file in found.files:
        if reason := why_left_out(file, wanted):
            left_out.append(LeftOut(file, reason))
        else:
            taken.append(file)
    return taken, left_out


class LeftOutCount:
    """How much is left out, by reason, with one as an example."""

    def __init__(self) -> None:
        self._reasons: Counter[str] = Counter()
        self._example: dict[str, str] = {}

    def add(self, item: LeftOut) -> None:
        self._reasons[item.reason] += 1
        self._example.setdefault(item.reason, item.name)

    def warn(self, root: str, *, file: str = "") -> None:
        """Log it, unless nothing is left out."""
        if not self._reasons:
            return
        parts = [
            f"{count} ({reason}; e.g. {self._example[reason]!r})"
            for reason, count in self._reasons.most_common(20)
        ]
        log.warning(
            "%s: %d left out: %s%s", root, self._reasons.total(), ", ".join(parts),
            f"; all are in {file}" if file else "",
        )  # fmt: skip


def warn_left_out(root: str, left_out: Iterable[LeftOut], *, file: str = "") -> None:
    """Log how many files are left out, by reason, with one as an example."""
    count = LeftOutCount()
    for item in left_out:
        count.add(item)
    count.warn(root, file=file)
