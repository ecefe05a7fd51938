"""Lists of raw videos: a folder of classes, or a CSV / Parquet list; with their labels, splits and groups."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, Protocol

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun
from cliplift.configs.sources import (
    CsvSource,
    FolderSource,
    Hmdb51Source,
    KineticsSource,
    Source,
    SplitConfig,
    TarsSource,
    Ucf101Source,
    YouTube8MSource,
)
from cliplift.sharding.manifest import SourceVideo, canonical, digest
from cliplift.sharding.sources.files import DANGLING, find_files, is_hidden, sort_out
from cliplift.sharding.sources.labels import LabelError, label_name, number_labels
from cliplift.sharding.sources.lists import UNASSIGNED, Listing, Row, SourceError, read_rows
from cliplift.sharding.sources.public_datasets import read_hmdb51, read_kinetics, read_ucf101, read_youtube8m
from cliplift.sharding.sources.tars import read_tars
from cliplift.sharding.storage import Store, join, open_store, without_secrets


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


def read_source(run: ShardRun) -> Listing:
    """List the videos of a run's source, with splits assigned.

    Raises:
        ConfigError: the source does not exist or holds no video.
        SourceError: a row is wrong, naming file, line and column.
    """
    listing = _read_listing(run.source)
    if not listing.videos:
        raise ConfigError(
            "no video was found", key="source", value=listing.root, hint=f"{len(listing.missing)} are missing"
        )
    _unique_ids(listing)
    return replace(listing, videos=tuple(assign_splits(listing.videos, run.splits, folds=listing.folds)))


def _read_listing(source: Source) -> Listing:
    readers: dict[type, Callable[[Any], Listing]] = {
        FolderSource: _read_folder,
        CsvSource: _read_csv,
        KineticsSource: read_kinetics,
        Ucf101Source: read_ucf101,
        Hmdb51Source: read_hmdb51,
        YouTube8MSource: read_youtube8m,
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


def _unique_ids(listing: Listing) -> None:
    seen: set[tuple[str, float | None, float | None]] = set()
    for video in listing.videos:
        name = (video.source, video.start_seconds, video.end_seconds)
        if name in seen:
            places = " and ".join(listing.places.get(name, ())[:2])
            raise SourceError(
                f"{video.source} is listed twice{f', {places}' if places else ''}; remove one of its rows"
            )
        seen.add(name)


def assign_splits(videos: Iterable[SourceVideo], config: SplitConfig, *, folds: int) -> Iterator[SourceVideo]:
    """Give every video its group and its split; a group never straddles two assigned splits."""
    pattern = re.compile(config.group_pattern) if config.group_pattern else None
    named = {group: split for split, groups in config.groups.items() for group in groups}
    used: set[str] = set()
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
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", split):
            raise ConfigError(
                f"{split!r} cannot name a split",
                key="splits.rename",
                value=split,
                hint="give it another name with splits.rename",
            )
        yield replace(video, group=group, split=split)
    if unknown := sorted(set(named) - used):
        raise ConfigError(f"no video belongs to group {unknown[0]!r}", key="splits.groups", value=unknown[0])


def _by_hash(group: str, config: SplitConfig) -> str:
    draw = int(digest(f"{config.seed}:{group}".encode())[:13], 16) / 16**13
    reached = 0.0
    for split, share in config.shares.items():
        reached += share
        if draw < reached:
            return split
    return next(split for split, share in reversed(config.shares.items()) if share > 0)


def _read_folder(source: FolderSource) -> Listing:
    store = open_store(source.root)
    files, left_out = sort_out(find_files(store), source.suffixes)
    if not files:
        raise ConfigError(
            "holds no video",
            key="source.root",
            value=source.root,
            hint=f"looked for {' '.join(source.suffixes)}",
        )
    depth = {"split/class": 2, "class": 1, "flat": 0}[source.layout]
    videos: list[SourceVideo] = []
    names: list[str | None] = []
    # A link to a video that is gone is a video that is missing, and its class is a class.
    gone = [item.name for item in left_out if item.reason == DANGLING and _is_video(item.name, source)]
    for file in (*files, *gone):
        parts = file.split("/")
        if len(parts) <= depth:
            raise ConfigError(
                f"{file!r} does not lie in {source.layout} folders", key="source.layout", value=source.layout
            )
        names.append(parts[depth - 1] if depth else None)
        split = parts[0] if depth == 2 else UNASSIGNED
        videos.append(
            SourceVideo(video_id=str(PurePosixPath(file).with_suffix("")), source=file, split=split)
        )
    classes, labels = number_labels(names, source.classes, key="source.classes")
    labelled = [replace(v, label=n) for v, n in zip(videos, labels, strict=True)]
    missing = labelled[len(files) :]
    left_out = [item for item in left_out if item.name not in set(gone)]
    return Listing(
        tuple(labelled[: len(files)]), classes, source.root, missing=tuple(missing), left_out=tuple(left_out)
    )


def _is_video(file: str, source: FolderSource) -> bool:
    return PurePosixPath(file).suffix.lower() in source.suffixes and not is_hidden(file)


def _read_csv(source: CsvSource) -> Listing:
    root = source.root or source.file.rpartition("/")[0] or "."
    wanted = (source.path_column, source.label_column, source.split_column, source.group_column,
              source.id_column, source.start_column, source.end_column)  # fmt: skip
    names: list[str | None] = []
    videos: list[SourceVideo] = []
    places: dict[tuple[str, float | None, float | None], list[str]] = {}
    for row in read_rows(source.file, delimiter=source.delimiter, needed=[c for c in wanted if c]):
        path = row.text(source.path_column)
        start, end = row.seconds(source.start_column), row.seconds(source.end_column)
        if end is not None and end <= (start or 0.0):
            raise SourceError(
                f"{row.file}, line {row.line}, column {source.end_column!r}: {end:g} is not after the start"
            )
        names.append(_row_label(row, source.label_column))
        places.setdefault((path, start, end), []).append(f"{row.file}, line {row.line}")
        videos.append(
            SourceVideo(
                video_id=row.text(source.id_column)
                if source.id_column
                else _without_suffix(without_secrets(path)),
                source=path,
                split=row.text(source.split_column) if source.split_column else UNASSIGNED,
                group=row.text(source.group_column) if source.group_column else None,
                start_seconds=start,
                end_seconds=end,
            )
        )
    classes, labels = number_labels(names, source.classes, key="source.classes", positions=True)
    labelled = [replace(v, label=n) for v, n in zip(videos, labels, strict=True)]
    present, missing = split_missing(labelled, root)
    return Listing(tuple(present), classes, root, missing=tuple(missing), places=places)


def _without_suffix(path: str) -> str:
    name = PurePosixPath(path)
    return str(name.with_suffix("") if name.name else name)


def _row_label(row: Row, column: str | None) -> str | None:
    if column is None:
        return None
    row.text(column)  # a label that is not there is refused as every empty cell is
    try:
        return label_name(row.cells[column])
    except LabelError as error:
        raise SourceError(f"{row.place(column)}: {error}") from error


def split_missing(videos: Sequence[SourceVideo], root: str) -> tuple[list[SourceVideo], list[SourceVideo]]:
    """Listed videos that exist below the root, and those that do not. URLs are tried when they are read."""
    store: Store = open_store(root)
    below: set[str] | None = None
    present: list[SourceVideo] = []
    missing: list[SourceVideo] = []
    for video in videos:
        if "://" in video.source:
            exists = True
        elif video.source.startswith("/"):
            exists = _exists(open_store("/"), video.source.lstrip("/"))
        elif store.local_path("") is not None:
            exists = _exists(store, video.source)
        else:
            below = set(store.list()) if below is None else below
            exists = video.source in below
        (present if exists else missing).append(video)
    return present, missing


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


def listing_digest(videos: Sequence[SourceVideo]) -> str:
    """sha256 of the rows of a plan."""
    return digest(canonical([_plan_row(v) for v in videos]))


def _plan_row(video: SourceVideo) -> list[object]:
    return [video.video_id, video.source, video.split, video.label, video.labels, video.folds,
            video.group, video.start_seconds, video.end_seconds]  # fmt: skip
