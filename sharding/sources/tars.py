"""Videos inside WebDataset tars that others wrote: found by one pass over the headers, read by range."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from cliplift.configs.sections import ConfigError
from cliplift.configs.sources import VIDEO_SUFFIXES, TarsSource
from cliplift.sharding.manifest import SourceVideo
from cliplift.sharding.scratch import local_copy
from cliplift.sharding.sources.lists import UNASSIGNED, Listing, SourceError, number_labels
from cliplift.sharding.storage import Store, open_store

INSIDE = re.compile(r"(?P<tar>.+\.tar)#(?P<offset>\d+)\+(?P<length>\d+)")


@dataclass(frozen=True)
class TarVideo:
    """The video of one WebDataset sample, and what its other members say of it."""

    key: str
    member: tarfile.TarInfo
    json_member: tarfile.TarInfo | None
    json_data: bytes
    label: str | None
    source: str


def tar_videos(archive: tarfile.TarFile, *, label_key: str) -> Iterator[TarVideo]:
    """The samples of an open tar that hold a video; only their json and class members are read.

    Args:
        archive: the tar.
        label_key: key of the json member that holds the class; a ``.cls`` member goes before it.
    """
    members: dict[str, tarfile.TarInfo] = {}
    key = ""
    for member in archive:
        if not member.isfile():
            continue
        # WebDataset's rule: a sample's key is the path up to the first dot of the file name.
        stem, _, suffix = PurePosixPath(member.name).name.partition(".")
        this = str(PurePosixPath(member.name).parent / stem)
        if this != key:
            yield from _sample(archive, key, members, label_key)
            key, members = this, {}
        members[suffix.lower()] = member
    yield from _sample(archive, key, members, label_key)


def _sample(
    archive: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo], label_key: str
) -> Iterator[TarVideo]:
    video = next((member for suffix, member in members.items() if f".{suffix}" in VIDEO_SUFFIXES), None)
    if video is None:
        return
    json_member = members.get("json")
    json_data = member_bytes(archive, json_member) if json_member else b""
    facts: Any = {}
    try:
        facts = json.loads(json_data) if json_data else {}
    except ValueError:
        json_member, json_data = None, b""
    told = facts if isinstance(facts, dict) else {}
    label = (
        member_bytes(archive, members["cls"]).decode(errors="replace").strip() if "cls" in members else None
    )
    if label is None and told.get(label_key) is not None:
        label = str(told[label_key])
    source = str(told.get("url") or told.get("source") or key)
    yield TarVideo(key, video, json_member, json_data, label=label, source=source)


def member_bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The content of a regular member."""
    content = archive.extractfile(member)
    assert content is not None, "a regular member has content"
    return content.read()


def read_tars(source: TarsSource) -> Listing:
    """List the videos in all tars below a root; a folder a tar lies in names its split.

    Raises:
        ConfigError: there is no tar.
        SourceError: a tar's headers are damaged.
    """
    store = open_store(source.root)
    tars = [file for file in store.list() if file.endswith(".tar")]
    if not tars:
        raise ConfigError("holds no .tar", key="source.root", value=source.root)
    videos: list[SourceVideo] = []
    names: list[str | None] = []
    for tar in tars:
        for found in _videos_of(store, tar, source.label_key):
            split = tar.split("/")[0] if "/" in tar else UNASSIGNED
            place = f"{tar}#{found.member.offset_data}+{found.member.size}"
            videos.append(SourceVideo(video_id=f"{tar}/{found.key}", source=place, split=split))
            names.append(found.label)
    classes, labels = number_labels(names, source.classes, key="source.classes")
    numbered = tuple(replace(v, label=n) for v, n in zip(videos, labels, strict=True))
    return Listing(numbered, classes, source.root)


def _videos_of(store: Store, tar: str, label_key: str) -> list[TarVideo]:
    try:
        with local_copy(store, tar) as path, tarfile.open(path, "r:") as archive:
            return list(tar_videos(archive, label_key=label_key))
    except tarfile.TarError as error:
        raise SourceError(
            f"{tar}: its headers are damaged: {error}; fetch it again or leave it out"
        ) from error


def inside_tar(url: str) -> tuple[str, int, int] | None:
    """Tar, offset and length of a video inside a tar, as :func:`read_tars` names it; None for a plain file."""
    match = INSIDE.fullmatch(url)
    return (match["tar"], int(match["offset"]), int(match["length"])) if match else None
