"""``leaks.json`` beside a dataset: which test sets it was compared with, and which of its videos they hold.

A check is of the shards, whatever generation: scores added or videos removed leave it true, and shards added do not. It
has no date, so that the same check gives the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from cliplift.sharding.manifest import (
    Dataset,
    canonical,
    digest,
    parsed_json,
    require_true,
    typed,
)
from cliplift.sharding.read.generations import open_dataset, read_dataset, read_removed
from cliplift.sharding.storage import Store

LEAKS_FILE = "leaks.json"
LEAKS_FORMAT = "cliplift-leaks/1"


@dataclass(frozen=True)
class LeakCheck:
    """One check.

    Attributes:
        shards: :func:`shards_digest` of the dataset that was searched.
        against: name of the dataset whose clips were looked for.
        against_shards: its :func:`shards_digest`.
        against_fingerprint: its fingerprint.
        splits: its splits whose clips were looked for.
        fold: its official split number, from 1; 0 for all.
        method: how; ``looks-1`` is the first version of the search by hashed pictures.
        clips: clips that were searched.
        against_clips: clips that were looked for.
        videos: ids of the searched dataset's videos that hold one of them, sorted; those removed since, too.
    """

    shards: str
    against: str
    against_shards: str
    against_fingerprint: str
    splits: tuple[str, ...]
    fold: int
    method: str
    clips: int
    against_clips: int
    videos: tuple[str, ...]

    @property
    def compared(self) -> tuple[object, ...]:
        """What was compared with what, and how."""
        return self.shards, self.against_shards, self.splits, self.fold, self.method

    def covers(self, *, shards: str, tested_shards: str, split: str, fold: int | None) -> bool:
        """Whether it says something of training on these shards and testing on a split of those."""
        same = self.shards == shards and self.against_shards == tested_shards
        return same and split in self.splits and self.fold in (0, fold or 0)


@dataclass(frozen=True)
class KnownLeaks:
    """What is known of a dataset when it is read.

    Attributes:
        shards: :func:`shards_digest`.
        fingerprint: of the generation.
        checks: those that were made of these shards.
        left: of each check, how many of its videos are still returned.
    """

    shards: str
    fingerprint: str
    checks: tuple[LeakCheck, ...] = ()
    left: tuple[int, ...] = ()


@dataclass(frozen=True)
class _File:
    checks: tuple[LeakCheck, ...] = field(default=())


def shards_digest(dataset: Dataset) -> str:
    """What is the same for all generations that have the same shards, whatever was removed from them or scored."""
    return digest(canonical([[shard.file, shard.sha256] for shard in dataset.shards]))


def read_checks(store: Store) -> tuple[LeakCheck, ...]:
    """All checks that are written beside a dataset.

    Raises:
        ManifestError: the file is damaged.
    """
    file = f"{store.url}/{LEAKS_FILE}"
    try:
        data = store.read(LEAKS_FILE)
    except FileNotFoundError:
        return ()
    found = typed(_File, parsed_json(data, file, LEAKS_FORMAT), file, "a list of checks").checks
    for check in found:
        counts = check.clips >= 0 and check.against_clips >= 0 and check.fold >= 0
        require_true({"checks": counts and list(check.videos) == sorted(set(check.videos))}, file)
    return found


def add_checks(store: Store, made: Iterable[LeakCheck]) -> None:
    """Write checks beside those that there are.

    The same check made again after videos were removed finds these no more; it keeps their ids.
    """
    checks = {check.compared: check for check in read_checks(store)}
    for check in made:
        before = checks.get(check.compared)
        known = set(check.videos) | set(before.videos if before is not None else ())
        checks[check.compared] = replace(check, videos=tuple(sorted(known)))
    ordered = sorted(checks.values(), key=lambda check: canonical(check.compared))
    tree = {"format": LEAKS_FORMAT, "checks": [dataclasses.asdict(check) for check in ordered]}
    store.write(LEAKS_FILE, canonical(tree) + b"\n")


def known_leaks(url: str) -> KnownLeaks:
    """What is known of the generation that a URL names, or of the latest.

    Raises:
        ConfigError: there is no such dataset.
        ManifestError: its files are damaged.
    """
    store, dataset = open_dataset(url)
    shards = shards_digest(dataset)
    checks = tuple(check for check in read_checks(store) if check.shards == shards)
    if not checks:
        return KnownLeaks(shards, dataset.fingerprint)
    # What was removed is returned by no generation, earlier ones included.
    removed = read_removed(store, read_dataset(store))
    left = tuple(len(set(check.videos) - removed) for check in checks)
    return KnownLeaks(shards, dataset.fingerprint, checks, left)


def removed_because(store: Store, ids: Iterable[str]) -> dict[str, int]:
    """How many of these removed videos each test set was found to hold, by its name; raises ManifestError."""
    gone = frozenset(ids)
    counts: dict[str, set[str]] = {}
    for check in read_checks(store):
        if found := gone & set(check.videos):
            counts.setdefault(check.against, set()).update(found)
    return {name: len(found) for name, found in sorted(counts.items())}
