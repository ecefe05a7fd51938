"""Videos listed in a text file, one per line: the class, a space, and the path below the file's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from cliplift.configs.sections import ConfigError, Section
from cliplift.sharding.manifest import SourceVideo
from cliplift.sharding.sources.labels import number_labels
from cliplift.sharding.sources.lists import UNASSIGNED, Listing, SourceError


class TextSource(Section):
    """``source:`` section of kind ``text``."""

    kind: Literal["text"] = "text"
    file: str = Field(description="the list")
    classes: tuple[str, ...] = Field(
        (), description="class names in label order; empty sorts the names found"
    )

    def list_videos(self) -> Listing:
        list_file = Path(self.file)
        if not list_file.is_file():
            raise ConfigError("does not exist", key="source.file", value=self.file)
        rows = []
        for number, line in enumerate(list_file.read_text(encoding="utf-8").splitlines(), 1):
            name, space, path = line.partition(" ")
            if not space:
                raise SourceError(f"{list_file}, line {number}: {line!r} is not a class and a path")
            rows.append((name, path))
        classes, labels = number_labels([name for name, _ in rows], self.classes, key="source.classes")
        videos = tuple(
            SourceVideo(video_id=str(Path(path).with_suffix("")), source=path, split=UNASSIGNED, label=label)
            for (_, path), label in zip(rows, labels, strict=True)
        )
        return Listing(videos=videos, classes=classes, root=str(list_file.parent))
