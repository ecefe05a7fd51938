"""Videos inside WebDataset tars that others wrote: found by one pass over the headers, read by range.

The tars are not trusted. Only headers pass through ``tarfile``, at most :data:`MAX_HEADER_BYTES` at a time; the size of
a member is compared with the file before a byte of it is read, and members that are labels are small.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from cliplift.configs.sections import ConfigError
from cliplift.configs.sources import VIDEO_SUFFIXES, TarsSource
from cliplift.sharding.manifest import MEMBERS, SourceVideo
from cliplift.sharding.scratch import local_copy
from cliplift.sharding.sources.files import LeftOut, find_files, printable
from cliplift.sharding.sources.labels import LabelError, json_facts, member_label, number_labels
from cliplift.sharding.sources.lists import UNASSIGNED, Entry, SourceError, Stream
from cliplift.sharding.storage import Store, open_store

INSIDE = re.compile(r"(?P<tar>.+\.tar)#(?P<offset>\d+)\+(?P<length>\d+)")
MAX_HEADER_BYTES = 1 << 20  # long names and pax records; real ones are a few hundred bytes
MAX_JSON_BYTES = 8 << 20
MAX_CLS_BYTES = 4096
MAX_MEMBERS_OF_A_SAMPLE = 1000
# Members beside a clip that are videos but not the sample's own.
BESIDE = {suffix for suffix in MEMBERS.values() if "." in suffix}


@dataclass(frozen=True)
class Member:
    """A regular member of a tar."""

    name: str
    offset: int
    size: int
    sparse: bool


@dataclass(frozen=True)
class TarVideo:
    """The video of one WebDataset sample, and what its other members say of it."""

    key: str
    member: Member
    json_member: Member | None
    json_data: bytes
    label: str | None
    source: str


@dataclass(frozen=True)
class TarContent:
    """A tar: its videos, what cannot be used with the reason, and the damage that ends it ('' for none)."""

    videos: tuple[TarVideo, ...]
    left_out: tuple[LeftOut, ...]
    damage: str


def read_tar(path: Path, *, label_key: str) -> TarContent:
    """The samples of a tar, in one pass over its headers; only json and class members are read.

    Args:
        path: a local tar.
        label_key: key of the json member that holds the class; a ``.cls`` member goes before it.
    """
    videos: list[TarVideo] = []
    left_out: list[LeftOut] = []
    damage = ""
    with path.open("rb") as file:
        try:
            for key, members in _samples(_members(file)):
                try:
                    videos += _sample(file, key, members, label_key=label_key, left_out=left_out)
                except (SourceError, LabelError) as error:
                    left_out.append(LeftOut(printable(key), str(error)))
        except _DamagedError as error:
            damage = str(error)
            if error.inside:
                left_out.append(LeftOut(printable(error.inside), f"the tar is damaged after it: {damage}"))
    return TarContent(tuple(videos), tuple(left_out), damage)


class _DamagedError(SourceError):
    """The headers of a tar cannot be followed further; ``inside`` is the key of the sample that is not whole."""

    def __init__(self, reason: str, *, inside: str = "") -> None:
        super().__init__(reason)
        self.inside = inside


class _Headers:
    """The file that ``tarfile`` reads headers from: never many bytes at once, whatever a header says of itself."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _members(file: BinaryIO) -> Iterator[Member]:
    """The regular members in order. Raises _DamagedError where the tar cannot be followed."""
    # tarfile raises more than its own errors on headers made to mislead it, and follows chains of them by recursion.
    wrong = (tarfile.TarError, ValueError, OverflowError, IndexError, KeyError, RecursionError, MemoryError)
    offset = -1
    try:
        archive = tarfile.TarFile(fileobj=_Headers(file), errorlevel=0)  # type: ignore[arg-type]
    except (*wrong, EOFError) as error:
        raise _DamagedError(_what(error)) from error
    while True:
        try:
            member = archive.next()
        except wrong as error:
            raise _DamagedError(_what(error)) from error
        if member is None:
            # tarfile takes a header that is none for the end, and what lies behind it would vanish.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise _DamagedError(f"at byte {archive.offset} there is no header")
            return
        archive.members = []  # type: ignore[attr-defined]  # a tar of millions of members is not kept in memory
        if member.size < 0 or member.offset_data <= offset:
            raise _DamagedError("a header leads backwards")
        offset = member.offset_data
        if member.isfile():
            yield Member(member.name, member.offset_data, member.size, member.issparse())


def _what(error: Exception) -> str:
    return str(error) if isinstance(error, tarfile.TarError) else "a header is no header"


def _samples(members: Iterator[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Runs of members with one key. WebDataset's rule: the key is the path up to the first dot of the file name."""
    run: dict[str, Member] = {}
    key = ""
    try:
        for member in members:
            stem, _, suffix = PurePosixPath(member.name).name.partition(".")
            this = str(PurePosixPath(member.name).parent / stem)
            if this != key or len(run) >= MAX_MEMBERS_OF_A_SAMPLE:
                yield key, run
                key, run = this, {}
            run[suffix.lower()] = member
    except _DamagedError as error:
        # Its label may lie behind the damage: the sample that was being read is not used.
        raise _DamagedError(str(error), inside=key) from error
    yield key, run


def _sample(
    file: BinaryIO, key: str, members: dict[str, Member], *, label_key: str, left_out: list[LeftOut]
) -> Iterator[TarVideo]:
    """The video of a sample, if it has one. Raises SourceError, LabelError where it cannot be used."""
    tar_bytes = os.fstat(file.fileno()).st_size
    videos = [member for suffix, member in members.items() if f".{suffix}" in VIDEO_SUFFIXES]
    if not videos:
        for suffix, member in members.items():
            if "." in suffix and suffix not in BESIDE and f".{suffix.rpartition('.')[2]}" in VIDEO_SUFFIXES:
                left_out.append(
                    LeftOut(
                        printable(member.name),
                        f"its key ends at the first dot, so it is a {suffix!r} member; rename it without dots",
                    )
                )
        return
    left_out += [LeftOut(printable(m.name), f"a second video of sample {printable(key)}") for m in videos[1:]]
    if printable(key) != key:
        raise SourceError("its name is not UTF-8")
    if videos[0].sparse:
        raise SourceError("its video is a sparse member")
    if videos[0].offset + videos[0].size > tar_bytes:
        raise SourceError("the tar ends inside its video")
    cls = _small(file, members.get("cls"), tar_bytes, MAX_CLS_BYTES)
    json_member = members.get("json")
    facts: dict[str, object] = {}
    json_data = b""
    try:
        json_data = _small(file, json_member, tar_bytes, MAX_JSON_BYTES) or b""
        facts = json_facts(json_data) if json_data else {}
    except (SourceError, LabelError):
        if cls is None:
            raise
        json_member, json_data = None, b""  # the label is known without it
    label = member_label(cls, json_data, label_key)
    source = next((str(facts[name]) for name in ("url", "source") if facts.get(name)), key)
    yield TarVideo(key, videos[0], json_member, json_data, label=label, source=printable(source))


def _small(file: BinaryIO, member: Member | None, tar_bytes: int, most: int) -> bytes | None:
    """The content of a member that is read whole. Raises SourceError where it is not as small as it should be."""
    if member is None:
        return None
    kind = member.name.rpartition(".")[2]
    if member.sparse or member.size > most:
        raise SourceError(f"its {printable(kind)} member has {member.size} bytes, more than {most}")
    if member.offset + member.size > tar_bytes:
        raise SourceError(f"the tar ends inside its {printable(kind)} member")
    file_offset = file.tell()
    file.seek(member.offset)
    data = file.read(member.size)
    file.seek(file_offset)
    return data


def read_tars(source: TarsSource) -> Stream:
    """List the videos in all tars below a root, tar by tar; a folder a tar lies in names its split.

    Raises, also while it is gone through:
        ConfigError: there is no tar.
        SourceError: a tar's headers are damaged.
    """
    number = partial(number_labels, given=source.classes, key="source.classes", positions=True)
    return Stream(source.root, _entries(source), number)


def _entries(source: TarsSource) -> Iterator[Entry | LeftOut]:
    store = open_store(source.root)
    below = find_files(store)
    tars = [file for file in below.files if file.endswith(".tar")]
    if not tars:
        raise ConfigError("holds no .tar", key="source.root", value=source.root)
    yield from below.left_out
    for tar in tars:
        content = _content(store, tar, source.label_key)
        yield from (LeftOut(f"{tar}/{item.name}", item.reason) for item in content.left_out)
        for found in content.videos:
            split = tar.split("/")[0] if "/" in tar else UNASSIGNED
            place = f"{tar}#{found.member.offset}+{found.member.size}"
            yield Entry(SourceVideo(video_id=f"{tar}/{found.key}", source=place, split=split), found.label)


def _content(store: Store, tar: str, label_key: str) -> TarContent:
    with local_copy(store, tar) as path:
        content = read_tar(path, label_key=label_key)
    if content.damage:
        raise SourceError(f"{tar}: its headers are damaged: {content.damage}; fetch it again or leave it out")
    return content


def inside_tar(url: str) -> tuple[str, int, int] | None:
    """Tar, offset and length of a video inside a tar, as :func:`read_tars` names it; None for a plain file."""
    match = INSIDE.fullmatch(url)
    return (match["tar"], int(match["offset"]), int(match["length"])) if match else None
