"""Public data sets whose lists are JSON, as published: Something-Something v2 and Diving48.

The files come from outside: a value of another kind, a class that is not in the table, a number out of range or an id
that stands twice is one sentence with file and row. Ids and names are looked up among the files that are there, never
used as paths.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

from cliplift.configs.sections import ConfigError
from cliplift.configs.sources import Diving48Source, SomethingSomethingSource
from cliplift.sharding.manifest import NO_LABEL, SourceVideo
from cliplift.sharding.sources.labels import LabelError, label_name
from cliplift.sharding.sources.lists import Listing, SourceError, read_text
from cliplift.sharding.sources.public_datasets import VideoFolder
from cliplift.sharding.storage import join, open_store

SOMETHING_PREFIX = (
    "something-something-v2-"  # of the published files' names; both with and without are around
)
DIVING48_LISTS = {"train": "Diving48_V2_train.json", "test": "Diving48_V2_test.json"}
DIVING48_TABLE = "Diving48_vocab.json"


class JsonRow:
    """One entry of a list and where it stands."""

    def __init__(self, file: str, number: int, cells: Mapping[str, object]) -> None:
        self.file, self.number, self.cells = file, number, cells

    @property
    def place(self) -> str:
        return f"{self.file}, entry {self.number}"

    def name(self, key: str) -> str:
        """A text or a whole number that names something.

        Raises:
            SourceError: it is missing, empty or something else.
        """
        try:
            found = label_name(self.cells.get(key))
        except LabelError:
            found = None
        if found is None or isinstance(self.cells.get(key), bool):
            raise SourceError(
                f"{self.place}, {key!r}: a name is needed, and it is {_shown(self.cells.get(key))}"
            )
        return found

    def number_of(self, key: str) -> int:
        """A whole number, 0 or more.

        Raises:
            SourceError: it is something else.
        """
        value = self.cells.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 10**9:
            raise SourceError(f"{self.place}, {key!r}: a whole number is needed, and it is {_shown(value)}")
        return value


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:60]


def read_json(url: str, *, key: str) -> object:
    """A JSON file named in the config.

    Raises:
        ConfigError: there is no such file.
        SourceError: it is no JSON, or nested deeper than can be read.
    """
    name = PurePosixPath(url).name
    try:
        tree: object = json.loads(read_text(url, key=key))
    except RecursionError as error:
        raise SourceError(f"{name}: is nested too deeply") from error
    except ValueError as error:  # also numbers with thousands of digits
        if isinstance(error, SourceError | ConfigError):
            raise
        raise SourceError(f"{name}: is not JSON: {error}") from error
    return tree


def json_rows(url: str, *, key: str) -> Iterator[JsonRow]:
    """The entries of a JSON list of objects, numbered from 1.

    Raises:
        ConfigError, SourceError: as :func:`read_json`, and for anything but such a list.
    """
    name, tree = PurePosixPath(url).name, read_json(url, key=key)
    if not isinstance(tree, list):
        raise SourceError(f"{name}: a list is needed, and it is a {type(tree).__name__}")
    for number, cells in enumerate(tree, start=1):
        if not isinstance(cells, dict):
            raise SourceError(
                f"{name}, entry {number}: an object is needed, and it is a {type(cells).__name__}"
            )
        yield JsonRow(name, number, cells)


def read_something_something(source: SomethingSomethingSource) -> Listing:
    """``labels.json`` (class to number), and for each split a list of ids, with the class but for the test videos.

    The lists write "Holding [something]" (``template``), the table of classes "Holding something".
    """
    names = set(open_store(source.lists).list())
    prefix = SOMETHING_PREFIX if f"{SOMETHING_PREFIX}labels.json" in names else ""
    classes = _numbered_classes(join(source.lists, f"{prefix}labels.json"))
    label_of = {name: label for label, name in enumerate(classes)}
    folder, seen = VideoFolder(source.root), set[str]()
    videos: list[SourceVideo] = []
    missing: list[SourceVideo] = []
    for split in ("train", "validation", "test"):
        if split == "test" and f"{prefix}test.json" not in names:
            continue  # what has no labels is often left out
        for row in json_rows(join(source.lists, f"{prefix}{split}.json"), key="source.lists"):
            video_id = _once(row, "id", seen)
            label = NO_LABEL
            if split != "test" or "template" in row.cells:
                name = row.name("template").replace("[", "").replace("]", "")
                if name not in label_of:
                    raise SourceError(f"{row.place}, 'template': {name!r} is not in {prefix}labels.json")
                label = label_of[name]
            file = folder.find(video_id)
            video = SourceVideo(video_id=video_id, source=file or video_id, split=split, label=label)
            (videos if file else missing).append(video)
    return Listing(tuple(videos), classes, source.root, missing=tuple(missing), left_out=folder.left_out)


def _numbered_classes(url: str) -> tuple[str, ...]:
    """Class names by their numbers: a JSON object of names, each with one of the numbers from 0, as text or not."""
    name, tree = PurePosixPath(url).name, read_json(url, key="source.lists")
    if not isinstance(tree, dict) or not tree:
        raise SourceError(f"{name}: an object of class names and their numbers is needed")
    by_number: dict[str, str] = {}
    for label, number in tree.items():
        try:
            known = label_name(label)
        except LabelError as error:
            raise SourceError(f"{name}: {error}") from error
        assert known is not None  # keys are texts
        by_number[str(number)] = known
    try:
        return tuple(by_number[str(number)] for number in range(len(tree)))
    except KeyError as error:
        raise SourceError(
            f"{name}: its {len(tree)} classes are to have the numbers from 0 to {len(tree) - 1}, and none has {error}"
        ) from None


def _once(row: JsonRow, key: str, seen: set[str]) -> str:
    """The name of a video that stands in the lists once."""
    name = row.name(key)
    if name in seen:
        raise SourceError(f"{row.place}, {key!r}: {name!r} stands in the lists twice")
    seen.add(name)
    return name


def read_diving48(source: Diving48Source) -> Listing:
    """``Diving48_V2_train.json`` and ``_test.json`` (``vid_name``, ``label``), and the 48 dives of
    ``Diving48_vocab.json``, each of take-off, somersaults, twists and position.

    Clips are cut already and named ``COMPETITION_NNNNN``; those of one competition are a group.
    """
    classes = _dives(join(source.lists, DIVING48_TABLE))
    folder, seen = VideoFolder(source.root), set[str]()
    videos: list[SourceVideo] = []
    missing: list[SourceVideo] = []
    for split, file_name in DIVING48_LISTS.items():
        for row in json_rows(join(source.lists, file_name), key="source.lists"):
            name, label = _once(row, "vid_name", seen), row.number_of("label")
            if label >= len(classes):
                raise SourceError(
                    f"{row.place}, 'label': {label} is none of the {len(classes)} in {DIVING48_TABLE}"
                )
            file = folder.find(name)
            video = SourceVideo(
                video_id=name,
                source=file or name,
                split=split,
                label=label,
                group=name.rpartition("_")[0] or None,
            )
            (videos if file else missing).append(video)
    return Listing(tuple(videos), classes, source.root, missing=tuple(missing), left_out=folder.left_out)


def _dives(url: str) -> tuple[str, ...]:
    tree = read_json(url, key="source.lists")
    if not isinstance(tree, list) or not tree:
        raise SourceError(f"{DIVING48_TABLE}: a list of dives is needed")
    found: list[str] = []
    for number, words in enumerate(tree):
        if (
            not isinstance(words, list)
            or not words
            or not all(isinstance(w, str) and w.strip() for w in words)
        ):
            raise SourceError(f"{DIVING48_TABLE}, dive {number}: words are needed, and it is {_shown(words)}")
        found.append("_".join(word.strip() for word in words))
    if len(set(found)) < len(found):
        raise SourceError(f"{DIVING48_TABLE}: a dive stands there twice")
    return tuple(found)
