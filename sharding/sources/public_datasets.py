"""The public datasets' official lists, as published: Kinetics-400/600/700, UCF101, HMDB51, YouTube-8M."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath

from cliplift.configs.sections import ConfigError
from cliplift.configs.sources import (
    VIDEO_SUFFIXES,
    Hmdb51Source,
    KineticsSource,
    Ucf101Source,
    YouTube8MSource,
)
from cliplift.sharding.manifest import SourceVideo
from cliplift.sharding.sources.files import find_files, is_hidden
from cliplift.sharding.sources.labels import number_labels
from cliplift.sharding.sources.lists import (
    Listing,
    SourceError,
    read_rows,
    read_text,
    read_url,
)
from cliplift.sharding.sources.tfrecord import RecordError, context_features, records
from cliplift.sharding.storage import join, open_store

FOLDS = (1, 2, 3)
HMDB51_MARKS = {"0": "", "1": "train", "2": "test"}
KINETICS_COLUMNS = ("youtube_id", "time_start", "time_end", "split")


class VideoFolder:
    """The videos below a folder, found by name whatever folders lie between."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._by_stem: dict[str, list[str]] = {}
        found = find_files(open_store(root))
        self.left_out = tuple(item for item in found.left_out if not is_hidden(item.name))
        for file in found.files:
            path = PurePosixPath(file)
            if path.suffix.lower() in VIDEO_SUFFIXES and not is_hidden(file):
                self._by_stem.setdefault(path.stem, []).append(file)

    def find(self, stem: str, *, inside: str = "") -> str | None:
        """The file with that name; of several, the one in a folder called ``inside``."""
        found = sorted(self._by_stem.get(stem, ()))
        preferred = [f for f in found if inside in PurePosixPath(f).parts[:-1]]
        return next(iter(preferred or found), None)


def read_kinetics(source: KineticsSource) -> Listing:
    """Rows ``[label,]youtube_id,time_start,time_end,split[,is_cc]``.

    A file named ``ID_SSSSSS_EEEEEE`` holds the ten seconds already; from one named ``ID`` they are cut.
    """
    folder = VideoFolder(source.root)
    videos: list[SourceVideo] = []
    missing: list[SourceVideo] = []
    names: list[str | None] = []
    absent: list[str | None] = []
    places: dict[tuple[str, float | None, float | None], list[str]] = {}
    for url in source.lists:
        for row in read_rows(url, needed=KINETICS_COLUMNS, key="source.lists"):
            label = row.text("label") if "label" in row.cells else None
            name, split = row.text("youtube_id"), row.text("split")
            start, end = row.seconds("time_start"), row.seconds("time_end")
            if start is None or end is None or end <= start:
                raise SourceError(f"{row.place('time_end')}: the clip does not end after it starts")
            stem = f"{name}_{int(start):06d}_{int(end):06d}"
            cut = folder.find(stem, inside=label or split)
            whole = None if cut else folder.find(name, inside=label or split)
            file = cut or whole
            video = SourceVideo(video_id=name, source=file or stem, split=split)
            if whole:
                video = replace(video, start_seconds=start, end_seconds=end)
            (videos if file else missing).append(video)
            # A class is one of the list's, downloaded or not: else every later label would shift.
            (names if file else absent).append(label)
            places.setdefault((video.source, video.start_seconds, video.end_seconds), []).append(
                f"{row.file}, line {row.line}"
            )
    given = (
        read_text(source.classes_file, key="source.classes_file").split("\n") if source.classes_file else ()
    )
    classes, labels = number_labels(
        names + absent, [n.strip() for n in given if n.strip()], key="source.classes_file"
    )
    labelled = [replace(v, label=n) for v, n in zip(videos + missing, labels, strict=True)]
    return Listing(
        tuple(labelled[: len(videos)]),
        classes,
        source.root,
        missing=tuple(labelled[len(videos) :]),
        left_out=folder.left_out,
        places=places,
    )


def read_ucf101(source: Ucf101Source) -> Listing:
    """``classInd.txt`` (number, name), ``trainlistNN.txt`` (path, number) and ``testlistNN.txt`` (path)."""
    numbers: dict[str, int] = {}
    for line, words in _lines(source.lists, "classInd.txt"):
        if len(words) != 2 or not words[0].isdigit():
            raise SourceError(f"classInd.txt, line {line}: expected a number and a class name")
        numbers[words[1]] = int(words[0])
    classes = tuple(sorted(numbers, key=lambda n: numbers[n]))
    folds: dict[str, list[str]] = {}
    for fold in FOLDS:
        for split in ("train", "test"):
            name = f"{split}list{fold:02d}.txt"
            for line, words in _lines(source.lists, name):
                label = words[0].split("/")[0]
                if label not in numbers:
                    raise SourceError(
                        f"{name}, line {line}, column 1: class {label!r} is not in classInd.txt"
                    )
                if len(words) > 1 and words[1] != str(numbers[label]):
                    raise SourceError(
                        f"{name}, line {line}, column 2: {words[1]} is not the number of {label}"
                    )
                folds.setdefault(words[0], [""] * len(FOLDS))[fold - 1] = split
    groups = {path: _ucf101_group(path) for path in folds}
    return _folded(source.root, folds, classes, groups, ids=groups)


def _ucf101_group(path: str) -> str | None:
    """Clips of one group are cut from the same video: ``v_CLASS_gNN_cNN``."""
    match = re.search(r"v_(.+_g\d+)_c\d+", path)
    return match.group(1) if match else None


def read_hmdb51(source: Hmdb51Source) -> Listing:
    """``CLASS_test_splitN.txt``: file and 1 (train), 2 (test) or 0 (not used in that split)."""
    folds: dict[str, list[str]] = {}
    classes: set[str] = set()
    for name in open_store(source.lists).list():
        match = re.fullmatch(r"(?:.*/)?(.+)_test_split([123])\.txt", name)
        if match is None:
            continue
        classes.add(match.group(1))
        for line, words in _lines(source.lists, name):
            if len(words) != 2 or words[1] not in HMDB51_MARKS:
                raise SourceError(f"{name}, line {line}, column 2: expected a file name and 0, 1 or 2")
            path = f"{match.group(1)}/{words[0]}"
            folds.setdefault(path, [""] * len(FOLDS))[int(match.group(2)) - 1] = HMDB51_MARKS[words[1]]
    if not classes:
        raise ConfigError("holds no CLASS_test_splitN.txt", key="source.lists", value=source.lists)
    groups = {path: _hmdb51_film(path) for path in folds}
    return _folded(source.root, folds, tuple(sorted(classes)), groups, ids={})


def _hmdb51_film(path: str) -> str | None:
    """Clips are named ``FILM_CLASS_`` and six properties: visible body parts, camera, people, view, quality, number."""
    label, _, name = path.partition("/")
    properties = r"[fuhl]_(?:cm|nm)_np\d+_(?:fr|ba|le|ri)_(?:bad|med|goo)_\d+"
    match = re.fullmatch(rf"(.+)_{re.escape(label)}_{properties}", PurePosixPath(name).stem)
    return match.group(1) if match else None


def _folded(
    root: str,
    folds: dict[str, list[str]],
    classes: tuple[str, ...],
    groups: dict[str, str | None],
    ids: dict[str, str | None],
) -> Listing:
    folder = VideoFolder(root)
    number = {name: i for i, name in enumerate(classes)}
    videos: list[SourceVideo] = []
    missing: list[SourceVideo] = []
    for path, splits in sorted(folds.items()):
        label, _, name = path.partition("/")
        file = folder.find(PurePosixPath(name).stem, inside=label)
        video = SourceVideo(
            video_id=ids.get(path) or PurePosixPath(name).stem,
            source=file or path,
            split="all",
            label=number[label],
            folds=tuple(splits),
            group=groups.get(path),
        )
        (videos if file else missing).append(video)
    return Listing(
        tuple(videos), classes, root, missing=tuple(missing), folds=len(FOLDS), left_out=folder.left_out
    )


def read_youtube8m(source: YouTube8MSource) -> Listing:
    """Ids and labels of the records, joined with the videos that were downloaded; several labels a video."""
    position: dict[int, int] = {}
    names: list[str] = []
    for row in read_rows(source.vocabulary, needed=("Index", "Name"), key="source.vocabulary"):
        if not row.text("Index").isdigit():
            raise SourceError(f"{row.place('Index')}: {row.text('Index')!r} is not a number")
        position[int(row.text("Index"))] = len(names)
        names.append(
            str(row.cells["Name"]).strip() or f"class {row.text('Index')}"
        )  # a few are published nameless
    youtube_ids: dict[str, str] = {}
    if source.ids is not None:
        youtube_ids = {
            r.text("id"): r.text("youtube_id")
            for r in read_rows(source.ids, needed=("id", "youtube_id"), key="source.ids")
        }
    folder = VideoFolder(source.root)
    videos: list[SourceVideo] = []
    missing: list[SourceVideo] = []
    for name in open_store(source.records).list():
        split = re.match(r"(?:.*/)?(train|validate|test)[^/]*\.tfrecord$", name)
        if split is None:
            continue
        for record_id, labels in _records(source.records, name):
            if unknown := [n for n in labels if n not in position]:
                raise SourceError(
                    f"{name}, video {record_id}: label {unknown[0]} is not in {source.vocabulary}"
                )
            known = youtube_ids.get(record_id)
            file = (folder.find(known) if known else None) or folder.find(record_id)
            video = SourceVideo(
                video_id=known or record_id,
                source=file or known or record_id,
                split=split.group(1),
                labels=tuple(sorted(position[n] for n in labels)),
            )
            (videos if file else missing).append(video)
    return Listing(tuple(videos), tuple(names), source.root, missing=tuple(missing), left_out=folder.left_out)


def _records(root: str, name: str) -> Iterator[tuple[str, list[int]]]:
    for message in records(read_url(join(root, name), key="source.records"), file=name):
        try:
            features = context_features(message)
        except RecordError as error:
            raise RecordError(f"{name}: {error}") from error
        ids = features.get("id") or features.get("video_id") or []
        if not ids or not isinstance(ids[0], bytes):
            raise RecordError(f"{name}: a record has neither 'id' nor 'video_id'; is this YouTube-8M?")
        yield ids[0].decode(), [n for n in features.get("labels", []) if isinstance(n, int)]


def _lines(folder: str, name: str) -> Iterator[tuple[int, list[str]]]:
    """Numbered lines of a list as words; CRLF and trailing blanks are as published."""
    text = read_text(join(folder, name), key="source.lists")
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line.split()
