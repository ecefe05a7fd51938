"""Where raw videos come from and how they are split, for a shard build."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Discriminator, Field, PlainSerializer, WrapValidator, field_validator, model_validator

from cliplift.configs.plugins import source_or_plugin
from cliplift.configs.sections import ConfigError, Location, Section

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".m2ts",
    ".flv", ".wmv", ".asf", ".3gp", ".ogv", ".gif", ".mts", ".m2t", ".vob", ".mpe", ".m1v", ".m2v", ".divx", ".xvid",
    ".f4v", ".3g2", ".3gpp", ".ogm", ".qt", ".mxf", ".dv", ".rm", ".rmvb", ".wtv", ".mk3d", ".mjpeg", ".mjpg",
    ".y4m", ".apng",
)  # fmt: skip


class FolderSource(Section):
    """Videos in a folder, the class told by the sub-folder they lie in."""

    kind: Literal["folder"] = "folder"
    root: Location = Field(description="folder or URL that holds the videos")
    layout: Literal["split/class", "class", "flat"] = Field(
        "class",
        description="what the sub-folders say: split then class, class alone, or nothing (unlabelled videos)",
    )
    suffixes: tuple[str, ...] = Field(
        VIDEO_SUFFIXES, description="file endings taken for videos, lower case with the dot"
    )
    classes: tuple[str, ...] = Field(
        (), description="class names in label order; empty sorts the names found"
    )


class CsvSource(Section):
    """A CSV or Parquet list of videos, one per row; paths may be fsspec URLs."""

    kind: Literal["csv"] = "csv"
    file: Location = Field(description="the list: .csv, .tsv or .parquet")
    root: Location = Field(
        "", description="folder or URL put before relative paths; empty is the folder of the list"
    )
    delimiter: str = Field(
        ",", min_length=1, max_length=1, description="character between the columns of a text list"
    )
    path_column: str = Field("path", description="column with the path or URL of the video")
    label_column: str | None = Field(
        "label", description="column with the class name; None for unlabelled videos"
    )
    split_column: str | None = Field(
        None, description="column with the split; None assigns splits by `splits`"
    )
    group_column: str | None = Field(None, description="column naming the group a video belongs to")
    id_column: str | None = Field(None, description="column with the video's id; None takes the path")
    start_column: str | None = Field(None, description="column with the start of the clip, seconds")
    end_column: str | None = Field(None, description="column with the end of the clip, seconds")
    classes: tuple[str, ...] = Field(
        (), description="class names in label order; empty sorts the names found"
    )


class KineticsSource(Section):
    """Kinetics-400/600/700 from the official lists; test lists without labels give unlabelled videos."""

    kind: Literal["kinetics"] = "kinetics"
    lists: tuple[str, ...] = Field(
        min_length=1, description="official CSV files; their split column gives the split"
    )
    root: Location = Field(
        description="folder or URL of the videos, ID_SSSSSS_EEEEEE.ext or ID.ext, below any folders (labels, splits)"
    )
    classes_file: str | None = Field(
        None, description="class names in label order, one per line; None sorts them"
    )


class Ucf101Source(Section):
    """UCF101 with its three official splits."""

    kind: Literal["ucf101"] = "ucf101"
    lists: str = Field(description="folder with classInd.txt, trainlist01-03.txt and testlist01-03.txt")
    root: Location = Field(description="folder or URL of the videos, with or without class folders")


class Hmdb51Source(Section):
    """HMDB51 with its three official splits."""

    kind: Literal["hmdb51"] = "hmdb51"
    lists: str = Field(description="folder with CLASS_test_split1-3.txt (testTrainMulti_7030_splits)")
    root: Location = Field(description="folder or URL of the videos, with or without class folders")


class YouTube8MSource(Section):
    """YouTube-8M: ids and labels from the TFRecords, the videos from a folder of one's own downloads."""

    kind: Literal["youtube8m"] = "youtube8m"
    records: str = Field(
        description="folder or URL of *.tfrecord files (frame or video level) named train*, validate*, test*"
    )
    vocabulary: str = Field(description="vocabulary.csv: Index and Name of every class")
    root: Location = Field(
        description="folder or URL of the videos, named by YouTube id or by the record's own id"
    )
    ids: str | None = Field(
        None, description="CSV with columns id and youtube_id; None: files are named by the record's id"
    )


class Kinetics710Source(Section):
    """Kinetics-710: Kinetics-400, 600 and 700 merged by YouTube id, under the published table of 710 classes."""

    kind: Literal["kinetics710"] = "kinetics710"
    lists: dict[Literal["k400", "k600", "k700"], tuple[str, ...]] = Field(
        min_length=1, description="official CSV files of each edition; what they hold out is not trained on"
    )
    root: Location = Field(
        description="folder or URL of all videos, ID_SSSSSS_EEEEEE.ext or ID.ext, below any folders"
    )
    classes_file: str = Field(
        description="label_map_k710.txt: a class name and, behind a tab, its number on each line"
    )
    maps: str = Field(
        description="folder with map_k400.json, map_k600.json and map_k700.json: the numbers of an edition's classes, "
        "in the order of their names"
    )


class SomethingSomethingSource(Section):
    """Something-Something v2 with its official lists; the test list has no classes."""

    kind: Literal["something_something"] = "something_something"
    lists: str = Field(
        description="folder with labels.json, train.json, validation.json and perhaps test.json, with or without "
        "something-something-v2- before their names"
    )
    root: Location = Field(description="folder or URL of the videos, named ID.webm")


class Diving48Source(Section):
    """Diving48 with the lists of its second version."""

    kind: Literal["diving48"] = "diving48"
    lists: str = Field(
        description="folder with Diving48_V2_train.json, Diving48_V2_test.json and Diving48_vocab.json"
    )
    root: Location = Field(description="folder or URL of the videos, named by vid_name")


class TarsSource(Section):
    """Videos in WebDataset tars written by others (video2dataset); the first folder of a tar's path is its split."""

    kind: Literal["tars"] = "tars"
    root: Location = Field(description="folder or URL of the tars")
    label_key: str = Field(
        "label", description="key of a sample's json that holds the class; a .cls member goes before it"
    )
    classes: tuple[str, ...] = Field(
        (), description="class names in label order; empty sorts the names found"
    )


Source = Annotated[
    FolderSource
    | CsvSource
    | KineticsSource
    | Kinetics710Source
    | Ucf101Source
    | Hmdb51Source
    | YouTube8MSource
    | SomethingSomethingSource
    | Diving48Source
    | TarsSource,
    Discriminator("kind"),
    WrapValidator(source_or_plugin),
    PlainSerializer(lambda source: source.model_dump(mode="json")),
]


class SplitConfig(Section):
    """Which split a video goes to, where the source does not say; whole groups stay together."""

    shares: dict[str, float] = Field(
        {"train": 1.0}, description="share of the groups that goes to each split, by hash of the group's name"
    )
    groups: dict[str, tuple[str, ...]] = Field(
        {},
        description="split -> names of groups that go there whatever their hash; the others follow `shares`",
    )
    group_pattern: str | None = Field(
        None,
        description="regular expression searched in a video's path; what its first parentheses match is the group; "
        "None: each alone",
    )
    rename: dict[str, str] = Field(
        {}, description="split name in the source -> name in the shards, e.g. validate: val"
    )
    seed: int = Field(0, ge=0, description="seed of the hash that assigns groups")

    @field_validator("shares")
    @classmethod
    def _shares(cls, shares: dict[str, float]) -> dict[str, float]:
        if not shares or any(s < 0 for s in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
            raise ValueError("must be non-negative and sum to 1")
        return shares

    @field_validator("group_pattern")
    @classmethod
    def _pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                brackets = re.compile(pattern).groups
            except re.error as error:
                raise ValueError(f"is not a regular expression: {error}") from error
            if brackets < 1:
                raise ValueError("needs parentheses around the part that names the group")
        return pattern

    @model_validator(mode="after")
    def _names(self) -> SplitConfig:
        for name in (*self.shares, *self.groups, *self.rename.values()):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ConfigError(
                    f"{name!r} cannot name a split", key="shares", value=name, hint="use letters and digits"
                )
        return self
