"""Lists of raw videos: a folder of classes, or a CSV / Parquet list; with their labels, splits and groups."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Protocol

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun
from cliplift.configs.sources import (
    CsvSource,
    Diving48Source,
    FolderSource,
    Hmdb51Source,
    Kinetics710Source,
    KineticsSource,
    SomethingSomethingSource,
    Source,
    SplitConfig,
    TarsSource,
    Ucf101Source,
    YouTube8MSource,
)
from cliplift.sharding.manifest import NO_LABEL, SourceVideo, digest
from cliplift.sharding.sources.files import DANGLING, LeftOut, walk_files, why_left_out
from cliplift.sharding.sources.json_lists import read_diving48, read_something_something
from cliplift.sharding.sources.kinetics710 import read_kinetics710
from cliplift.sharding.sources.labels import LabelError, label_name, number_labels
from cliplift.sharding.sources.lists import (
    UNASSIGNED,
    Entry,
    Listing,
    Row,
    SourceError,
    Stream,
    read_rows,
    stream_of,
)
from cliplift.sharding.sources.public_datasets import read_hmdb51, read_kinetics, read_ucf101, read_youtube8m
from cliplift.sharding.sources.tars import read_tars
from cliplift.sharding.storage import Store, join, open_store, without_secrets

log = logging.getLogger(__name__)


class SourcePlugin(Protocol):
    """A source of another package: a config section that lists its videos itself."""

    kind: str

    def list_videos(self) -> Listing:
        """The videos with labels and classes; ``split`` is :data:`UNASSIGNED` where the source has none.

        Raises:
            ConfigError: the source does not exist; the error names the key.
            SourceError: a row of it is wrong.
        """
        ...


def open_source(run: ShardRun) -> Stream:
    """The videos of a run's source one after the other, before splits are assigned.

    Raises, also while it is gone through:
        ConfigError: the source does not exist.
        SourceError: a row is wrong, naming file, line and column.
    """
    found = _open_source(run.source)
    return found if isinstance(found, Stream) else stream_of(found)


def read_source(run: ShardRun) -> Listing:
    """The same in memory, classes numbered and splits assigned; raises as :func:`open_source` does."""
    stream = open_source(run)
    items = list(stream.entries)
    entries = [item for item in items if isinstance(item, Entry)]
    classes, numbers = stream.number([entry.name for entry in entries])
    labelled = [
        entry._replace(video=numbered(entry.video, entry.name, number))
        for entry, number in zip(entries, numbers, strict=True)
    ]
    present = (entry.video for entry in labelled if not entry.missing)
    return Listing(
        tuple(assign_splits(present, run.splits, folds=stream.folds)),
        classes,
        stream.root,
        missing=tuple(entry.video for entry in labelled if entry.missing),
        folds=stream.folds,
        left_out=tuple(item for item in items if isinstance(item, LeftOut)),
    )


def numbered(video: SourceVideo, name: str | None, label: int) -> SourceVideo:
    """The video with the label of its class's name; one without a name keeps the label it has."""
    return video if name is None else replace(video, label=label)


def _open_source(source: Source) -> Listing | Stream:
    readers: dict[type, Callable[[Any], Listing | Stream]] = {
        FolderSource: _read_folder,
        CsvSource: _read_csv,
        KineticsSource: read_kinetics,
        Kinetics710Source: read_kinetics710,
        Ucf101Source: read_ucf101,
        Hmdb51Source: read_hmdb51,
        YouTube8MSource: read_youtube8m,
        SomethingSomethingSource: read_something_something,
        Diving48Source: read_diving48,
        TarsSource: read_tars,
    }
    return readers.get(type(source), _read_plugin)(source)


def _read_plugin(source: SourcePlugin) -> Listing:
    """What the source of another package lists."""
    listing = source.list_videos()
    if not isinstance(listing, Listing):
        raise SourceError(
            f"list_videos() of the source {source.kind!r} returned a {type(listing).__name__}, no Listing"
        )
    return listing


def assign_splits(videos: Iterable[SourceVideo], config: SplitConfig, *, folds: int) -> Iterator[SourceVideo]:
    """Give every video its group and its split; a group never straddles two assigned splits."""
    pattern = re.compile(config.group_pattern) if config.group_pattern else None
    named = {group: split for split, groups in config.groups.items() for group in groups}
    used: set[str] = set()
    allowed: set[str] = set()
    for video in videos:
        group = video.group
        if pattern is not None:
            match = pattern.search(video.source)
            if match is None:
                raise ConfigError(
                    f"does not match {video.source!r}", key="splits.group_pattern", value=config.group_pattern
                )
            group = match.group(1)
        split = config.rename.get(video.split, video.split)
        if folds:
            split = "all"
        elif group is not None and group in named:
            used.add(group)
            split = named[group]
        elif split == UNASSIGNED:
            split = _by_hash(group if group is not None else video.video_id, config)
        if split not in allowed:
            _require_split_name(split)
            allowed.add(split)
        given = (group, split) == (video.group, video.split)
        yield video if given else replace(video, group=group, split=split)
    if unknown := sorted(set(named) - used):
        raise ConfigError(f"no video belongs to group {unknown[0]!r}", key="splits.groups", value=unknown[0])


def warn_of_gaps(
    config: SplitConfig, labels_of_split: Mapping[str, Mapping[int, int]], classes: Sequence[str]
) -> None:
    """Log which of several splits is empty, or lacks a class that another one has: few groups, dealt by hash.

    Args:
        config: says which splits there are to be.
        labels_of_split: label to the number of videos that have it, of each split.
        classes: names of the classes.
    """
    wanted = [
        split for split in dict.fromkeys((*config.shares, *config.groups)) if config.shares.get(split) != 0
    ]
    if len(wanted) < 2:
        return
    known = {label for labels in labels_of_split.values() for label in labels} - {NO_LABEL}
    for split in wanted:
        lacking = sorted(known - set(labels_of_split.get(split, {})))
        if labels_of_split.get(split) and not lacking:
            continue
        names = ", ".join(repr(classes[label]) for label in lacking[:3])
        more = f" and {len(lacking) - 3} more of {len(classes)} classes" if len(lacking) > 3 else ""
        what = f"no video of {names}{more}" if labels_of_split.get(split) else "no video"
        log.warning(
            "split %r has %s: few groups were dealt by hash; name the groups of each split in splits.groups, or try "
            "another splits.seed (`cliplift start FOLDER` looks for a division that has every class in every split)",
            split, what,
        )  # fmt: skip


def _require_split_name(split: str) -> None:
    """Raise ConfigError unless a split's name can be that of a folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", split):
        raise ConfigError(
            f"{split!r} cannot name a split",
            key="splits.rename",
            value=split,
            hint="give it another name with splits.rename",
        )


def _by_hash(group: str, config: SplitConfig) -> str:
    draw = int(digest(f"{config.seed}:{group}".encode())[:13], 16) / 16**13
    reached = 0.0
    for split, share in config.shares.items():
        reached += share
        if draw < reached:
            return split
    return next(split for split, share in reversed(config.shares.items()) if share > 0)


def _read_folder(source: FolderSource) -> Stream:
    number = partial(number_labels, given=source.classes, key="source.classes")
    return Stream(source.root, _folder_entries(source), number)


def _folder_entries(source: FolderSource) -> Iterator[Entry | LeftOut]:
    wanted = frozenset(source.suffixes)
    depth = {"split/class": 2, "class": 1, "flat": 0}[source.layout]
    found = False
    for file, trouble in walk_files(open_store(source.root)):
        # A link to a video that is gone is a video that is missing, and its class is a class.
        gone = trouble == DANGLING
        reason = why_left_out(file, wanted) or ("" if gone else trouble)
        if reason:
            yield LeftOut(file, trouble or reason)
            continue
        parts = file.split("/")
        if len(parts) <= depth:
            raise ConfigError(
                f"{file!r} does not lie in {source.layout} folders", key="source.layout", value=source.layout
            )
        found = found or not gone
        video = SourceVideo(
            video_id=str(PurePosixPath(file).with_suffix("")),
            source=file,
            split=parts[0] if depth == 2 else UNASSIGNED,
        )
        yield Entry(video, parts[depth - 1] if depth else None, missing=gone)
    if not found:
        raise ConfigError(
            "holds no video",
            key="source.root",
            value=source.root,
            hint=f"looked for {' '.join(source.suffixes)}",
        )


def _read_csv(source: CsvSource) -> Stream:
    root = source.root or source.file.rpartition("/")[0] or "."
    number = partial(number_labels, given=source.classes, key="source.classes", positions=True)
    return Stream(root, _csv_entries(source, root), number)


def _csv_entries(source: CsvSource, root: str) -> Iterator[Entry]:
    wanted = (source.path_column, source.label_column, source.split_column, source.group_column,
              source.id_column, source.start_column, source.end_column)  # fmt: skip
    exists = _Exists(root)
    for row in read_rows(source.file, delimiter=source.delimiter, needed=[c for c in wanted if c]):
        path = row.text(source.path_column)
        start, end = row.seconds(source.start_column), row.seconds(source.end_column)
        if end is not None and end <= (start or 0.0):
            raise SourceError(
                f"{row.file}, line {row.line}, column {source.end_column!r}: {end:g} is not after the start"
            )
        video = SourceVideo(
            video_id=row.text(source.id_column)
            if source.id_column
            else without_suffix(without_secrets(path)),
            source=path,
            split=row.text(source.split_column) if source.split_column else UNASSIGNED,
            group=row.text(source.group_column) if source.group_column else None,
            start_seconds=start,
            end_seconds=end,
        )
        name = _row_label(row, source.label_column)
        yield Entry(video, name, missing=not exists(path), place=f"{row.file}, line {row.line}")


def without_suffix(path: str) -> str:
    """A path in its plain form and without its ending, as :class:`PurePosixPath` has it, several times as fast."""
    root = path[: len(path) - len(path.lstrip("/"))]
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if parts:
        stem, dot, suffix = parts[-1].rpartition(".")
        if dot and stem and suffix:
            parts[-1] = stem
    # Two slashes in front, and no other number of them, are another root than one.
    return (root if len(root) == 2 else root[:1]) + "/".join(parts) or "."


def _row_label(row: Row, column: str | None) -> str | None:
    if column is None:
        return None
    row.text(column)  # a label that is not there is refused as every empty cell is
    try:
        return label_name(row.cells[column])
    except LabelError as error:
        raise SourceError(f"{row.place(column)}: {error}") from error


class _Exists:
    """Whether a listed video exists below a root. URLs are tried when they are read; a bucket is listed once."""

    def __init__(self, root: str) -> None:
        self._store: Store = open_store(root)
        self._below: set[str] | None = None

    def __call__(self, source: str) -> bool:
        if "://" in source:
            return True
        if source.startswith("/"):
            return _exists(open_store("/"), source.lstrip("/"))
        if self._store.local_path("") is not None:
            return _exists(self._store, source)
        if self._below is None:
            self._below = set(self._store.list())
        return source in self._below


def _exists(store: Store, name: str) -> bool:
    """Whether there is such a local file: none has a name that is too long, holds a NUL or is out of reach."""
    path = store.local_path(name)
    try:
        return path is not None and path.is_file()  # a pipe or a device may have no end
    except (OSError, ValueError):
        return False


def video_url(root: str, video: SourceVideo) -> str:
    """Where a video of the plan is read from."""
    return join(root, video.source)
