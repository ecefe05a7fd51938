"""The files below a folder of raw data: links followed, and what cannot be used named instead of passed over."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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
    root = store.local_path("")
    if root is None:
        return Found(tuple(store.list()), ())
    files: list[str] = []
    left_out: list[LeftOut] = []
    for name, trouble in _walk(root, "", (), Counter(), linked=False):
        reason = trouble or (NOT_UTF8 if printable(name) != name else "")
        if reason:
            left_out.append(LeftOut(printable(name), reason))
        else:
            files.append(name)
    return Found(tuple(sorted(files)), tuple(sorted(left_out, key=lambda item: item.name)))


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
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
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
    for entry in entries:
        name = prefix + entry.name
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError as error:  # a link that leads to itself, or through a folder that may not be entered
            yield name, f"cannot be opened: {error.strerror}"
            continue
        if is_folder:
            yield from _walk(
                Path(entry.path), f"{name}/", (*above, here), ways, linked=linked or entry.is_symlink()
            )
        elif is_file:
            yield name, ""
        elif entry.is_symlink() and not Path(entry.path).exists():
            yield name, DANGLING
        else:
            yield name, NO_FILE


def is_hidden(file: str) -> bool:
    """Whether a file or a folder it lies in is hidden: AppleDouble files, caches, unfinished downloads."""
    return any(part.startswith(".") for part in file.split("/"))


def sort_out(found: Found, suffixes: Iterable[str]) -> tuple[list[str], list[LeftOut]]:
    """The visible files with one of the endings, and everything else with the reason."""
    wanted = frozenset(suffixes)
    taken: list[str] = []
    left_out = list(found.left_out)
    for file in found.files:
        suffix = PurePosixPath(file).suffix.lower()
        if is_hidden(file):
            left_out.append(LeftOut(file, HIDDEN))
        elif suffix in wanted:
            taken.append(file)
        else:
            left_out.append(
                LeftOut(file, f"the ending {suffix or 'none'} is not among those taken for videos")
            )
    return taken, left_out


def warn_left_out(root: str, left_out: Sequence[LeftOut], *, file: str = "") -> None:
    """Log how many files are left out, by reason, with one as an example."""
    if not left_out:
        return
    reasons = Counter(item.reason for item in left_out)
    example = {item.reason: item.name for item in reversed(left_out)}
    parts = [f"{count} ({reason}; e.g. {example[reason]!r})" for reason, count in reasons.most_common(20)]
    log.warning(
        "%s: %d left out: %s%s", root, len(left_out), ", ".join(parts), f"; all are in {file}" if file else ""
    )
