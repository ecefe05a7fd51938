"""What lies in a folder of videos: class folders, split and class folders, videos alone, or a list of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun
from cliplift.configs.sources import VIDEO_SUFFIXES
from cliplift.sharding.manifest import NO_LABEL, SourceVideo
from cliplift.sharding.sources.files import LeftOut, find_files, sort_out
from cliplift.sharding.sources.lists import UNASSIGNED, Entry, Listing, SourceError, read_rows
from cliplift.sharding.sources.read import numbered, open_source
from cliplift.sharding.storage import join, open_store

LIST_SUFFIXES = (".csv", ".tsv", ".parquet")
# The key of a list's section, and what people call the column; the first that is there is taken.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "path_column": ("path", "file", "filename", "file_name", "video", "video_path", "filepath"),
    "label_column": ("label", "class", "category", "action", "class_name"),
    "split_column": ("split", "set", "subset", "partition"),
    "group_column": ("group", "camera", "person", "subject", "participant", "patient", "scene", "session"),
}  # fmt: skip
SPLIT_NAMES: Mapping[str, str] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "validate": "val",
    "dev": "val", "test": "test", "testing": "test",
}  # fmt: skip
LINES = "one folder a class, FOLDER/CLASS/*.mp4, or a list FOLDER/clips.csv with the columns path and label"


@dataclass(frozen=True)
class FoundVideos:
    """The videos of a folder, and the ``source`` section that reads them.

    ``said`` is how they were found; ``rename`` gives the splits they come with our names, and is empty where they come
    with none. ``unlisted`` counts videos that lie there and are not in the list.
    """

    source: Mapping[str, object]
    said: str
    videos: tuple[SourceVideo, ...]
    classes: tuple[str, ...]
    rename: Mapping[str, str]
    missing: tuple[str, ...]
    left_out: int
    unlisted: int = 0

    @property
    def labelled(self) -> bool:
        """Whether videos have classes."""
        return any(video.label != NO_LABEL for video in self.videos)

    @property
    def has_splits(self) -> bool:
        """Whether the videos come with their splits."""
        return bool(self.rename)

    @property
    def group_column(self) -> str | None:
        """The column of the list that names groups."""
        column = self.source.get("group_column")
        return column if isinstance(column, str) else None

    @property
    def root(self) -> str:
        """What the videos' paths lie below."""
        given = self.source.get("root")
        return str(given) if given else str(self.source["file"]).rpartition("/")[0] or "."

    def url(self, video: SourceVideo) -> str:
        """Where a video is."""
        return join(self.root, video.source)


def find_videos(folder: str, *, listed: str | None = None) -> FoundVideos:
    """Look into a local folder.

    Args:
        folder: the user's folder.
        listed: file name of the list to read; None takes the only list with a column of paths, if there is one.

    Raises:
        ConfigError: it is no folder, holds no video, or not in a form that can be read.
        SourceError: a row of the list is wrong.
    """
    if not Path(folder).is_dir():
        raise ConfigError(
            "is not a folder", file=folder, hint=f"name the folder that holds the videos: {LINES}"
        )
    taken, left_out = sort_out(find_files(open_store(folder)), VIDEO_SUFFIXES)
    name = listed if listed is not None else _list_in(folder)
    if name is not None:
        return _from_list(folder, name, set(taken), len(left_out))
    if not taken:
        raise ConfigError("holds no video", file=folder, hint=f"put them in {LINES}")
    return _from_folders(folder, taken)


def _from_list(folder: str, name: str, taken: set[str], left_out: int) -> FoundVideos:
    file = join(folder, name)
    columns = _columns(file)
    if "path_column" not in columns:
        raise ConfigError(
            "has no column with the paths of the videos",
            file=file,
            hint=f"call one {', '.join(COLUMNS['path_column'][:4])} or another of these",
        )
    delimiter = {"delimiter": "\t"} if name.endswith(".tsv") else {}
    source: dict[str, object] = {"kind": "csv", "file": file, **delimiter, **columns}
    source.setdefault("label_column", None)
    listing = _read(source)
    rename = _given_splits(sorted({video.split for video in listing.videos} - {UNASSIGNED}))
    words = ", ".join(f"{column} ({key.removesuffix('_column')})" for key, column in columns.items())
    return FoundVideos(
        source=source,
        said=f"the list {name}: {words}",
        videos=listing.videos,
        classes=listing.classes,
        rename=rename,
        missing=tuple(video.source for video in listing.missing),
        left_out=left_out,
        unlisted=len(taken - {video.source for video in listing.videos}),
    )


def _from_folders(folder: str, taken: Sequence[str]) -> FoundVideos:
    layout, root = _layout(folder, taken)
    source: dict[str, object] = {"kind": "folder", "root": root, "layout": layout}
    listing = _read(source)
    said = {
        "flat": "videos without class folders, so without labels",
        "class": "one folder a class",
        "split/class": "split folders with class folders in them",
    }[layout]
    return FoundVideos(
        source=source,
        said=said if root == folder else f"{said}, below {root}",
        videos=listing.videos,
        classes=listing.classes,
        rename=_given_splits(sorted({video.split for video in listing.videos} - {UNASSIGNED})),
        missing=tuple(video.source for video in listing.missing),
        left_out=len(listing.left_out),
    )


def _layout(folder: str, taken: Sequence[str]) -> tuple[str, str]:
    """What the sub-folders say, and the folder that they are in."""
    loose = [file for file in taken if "/" not in file]
    if len(loose) == len(taken):
        return "flat", folder
    if loose:
        raise ConfigError(
            f"{len(loose)} videos lie beside the class folders, such as {loose[0]}",
            file=folder,
            hint="move them into the folder of their class, or elsewhere, or write a list",
        )
    tops = {file.split("/")[0] for file in taken}
    if not all(top.lower() in SPLIT_NAMES for top in tops):
        return "class", folder
    if any(file.count("/") < 2 for file in taken):
        raise ConfigError(
            f"the folders {', '.join(sorted(tops))} are named like splits, and hold videos without a class folder",
            file=folder,
            hint="put FOLDER/SPLIT/CLASS/*.mp4, or rename them if they are classes",
        )
    if len(tops) == 1:  # one part alone is no split: it is divided here
        return "class", join(folder, next(iter(tops)))
    return "split/class", folder


def _read(source: Mapping[str, object]) -> Listing:
    """Everything the section lists, classes numbered and splits as they are given; what is missing is told."""
    run = ShardRun.model_validate({"name": "start", "output": "nowhere", "source": source})
    stream = open_source(run)
    items = list(stream.entries)
    entries = [item for item in items if isinstance(item, Entry)]
    classes, labels = stream.number([entry.name for entry in entries])
    videos = [numbered(e.video, e.name, label) for e, label in zip(entries, labels, strict=True)]
    return Listing(
        videos=tuple(v for v, entry in zip(videos, entries, strict=True) if not entry.missing),
        classes=classes,
        root=stream.root,
        missing=tuple(v for v, entry in zip(videos, entries, strict=True) if entry.missing),
        left_out=tuple(item for item in items if isinstance(item, LeftOut)),
    )


def _given_splits(names: Sequence[str]) -> dict[str, str]:
    """Our names of the splits that the videos come with; names that say nothing to us stay."""
    return {name: SPLIT_NAMES.get(name.lower(), name) for name in names}


def _list_in(folder: str) -> str | None:
    """The one list of the folder that has a column of paths.

    Raises:
        ConfigError: there are several.
    """
    found = []
    for path in sorted(Path(folder).iterdir()):
        if path.suffix.lower() not in LIST_SUFFIXES or path.name.startswith(".") or not path.is_file():
            continue
        try:
            columns = _columns(join(folder, path.name))
        except (SourceError, ConfigError):
            continue  # a table about something else
        if "path_column" in columns:
            found.append(path.name)
    if len(found) > 1:
        raise ConfigError(
            f"holds the lists {', '.join(found)}", file=folder, hint=f"say which: --list {found[0]}"
        )
    return found[0] if found else None


def _columns(file: str) -> dict[str, str]:
    """The columns of a list by the key that takes them."""
    first = next(read_rows(file, delimiter="\t" if file.endswith(".tsv") else ",", key="--list"), None)
    by_lower = {} if first is None else {column.lower(): column for column in reversed(list(first.cells))}
    found = {}
    for key, names in COLUMNS.items():
        name = next((name for name in names if name in by_lower), None)
        if name is not None:
            found[key] = by_lower[name]
    return found
