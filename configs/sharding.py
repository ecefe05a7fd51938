"""What a shard build may be told: where the videos are, how they are split, cut, encoded and packed."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cliplift.configs.sections import ConfigError, Section

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".m2ts",
    ".flv", ".wmv", ".asf", ".3gp", ".ogv", ".gif",
)  # fmt: skip


class FolderSource(Section):
    """Videos in a folder, the class told by the sub-folder they lie in."""

    kind: Literal["folder"] = "folder"
    root: str = Field(description="folder or URL that holds the videos")
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
    """A CSV or Parquet list of videos, one a row; paths may be fsspec URLs."""

    kind: Literal["csv"] = "csv"
    file: str = Field(description="the list: .csv, .tsv or .parquet")
    root: str = Field(
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
    root: str = Field(
        description="folder or URL of the videos, ID_SSSSSS_EEEEEE.ext or ID.ext, below any folders (labels, splits)"
    )
    classes_file: str | None = Field(
        None, description="class names in label order, one a line; None sorts them"
    )


class Ucf101Source(Section):
    """UCF101 with its three official splits."""

    kind: Literal["ucf101"] = "ucf101"
    lists: str = Field(description="folder with classInd.txt, trainlist01-03.txt and testlist01-03.txt")
    root: str = Field(description="folder or URL of the videos, with or without class folders")


class Hmdb51Source(Section):
    """HMDB51 with its three official splits."""

    kind: Literal["hmdb51"] = "hmdb51"
    lists: str = Field(description="folder with CLASS_test_split1-3.txt (testTrainMulti_7030_splits)")
    root: str = Field(description="folder or URL of the videos, with or without class folders")


class YouTube8MSource(Section):
    """YouTube-8M: ids and labels from the TFRecords, the videos from a folder of one's own downloads."""

    kind: Literal["youtube8m"] = "youtube8m"
    records: str = Field(
        description="folder or URL of *.tfrecord files (frame or video level) named train*, validate*, test*"
    )
    vocabulary: str = Field(description="vocabulary.csv: Index and Name of every class")
    root: str = Field(
        description="folder or URL of the videos, named by YouTube id or by the record's own id"
    )
    ids: str | None = Field(
        None, description="CSV with columns id and youtube_id; None: files are named by the record's id"
    )


Source = Annotated[
    FolderSource | CsvSource | KineticsSource | Ucf101Source | Hmdb51Source | YouTube8MSource,
    Field(discriminator="kind"),
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
        description="regular expression searched in a video's path; its first bracket is the group; None: each alone",
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
                raise ValueError("needs a bracket around the part that names the group")
        return pattern

    @model_validator(mode="after")
    def _names(self) -> SplitConfig:
        for name in (*self.shares, *self.groups, *self.rename.values()):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ConfigError(
                    f"{name!r} cannot name a split", key="shares", value=name, hint="use letters and digits"
                )
        return self


class WholeCut(Section):
    """Each video, or the span its row gives, is one clip."""

    kind: Literal["whole"] = "whole"


class WindowsCut(Section):
    """Each video is cut into windows of one length."""

    kind: Literal["windows"] = "windows"
    length_seconds: float = Field(10.0, gt=0, description="length of a window, seconds")
    stride_seconds: float | None = Field(
        None, gt=0, description="start-to-start distance, seconds; None is the length"
    )
    min_seconds: float = Field(1.0, gt=0, description="a last window shorter than this is left out, seconds")
    max_per_video: int | None = Field(
        None, ge=1, description="windows kept per video, spread evenly over it; None keeps all"
    )


Cut = Annotated[WholeCut | WindowsCut, Field(discriminator="kind")]


class TranscodeConfig(Section):
    """How a clip is encoded. The defaults are the measured optimum for training decoders."""

    short_side_pixels: int = Field(
        256, ge=16, description="short side of a stored clip, pixels; never upscaled"
    )
    max_fps: float = Field(30.0, gt=0, description="faster sources keep every n-th frame, frames/s")
    fps: float | None = Field(
        None, gt=0, description="resample every clip to exactly this rate, frames/s; None keeps the source's"
    )
    crf: int = Field(23, ge=0, le=51, description="x264 constant rate factor; lower is larger and better")
    gop_frames: int = Field(16, ge=1, description="frames between key frames; every group is closed")
    b_frames: int = Field(2, ge=0, le=8, description="B frames in a row")
    preset: Literal[
        "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"
    ] = Field("veryfast", description="x264 preset")
    tune: Literal["fastdecode", "none"] = Field(
        "fastdecode", description="x264 tune; fastdecode costs 13 % bytes, saves 30 % decoding"
    )
    deinterlace: Literal["flagged", "never", "always"] = Field(
        "flagged", description="which frames are deinterlaced"
    )
    min_frames: int = Field(8, ge=1, description="a clip with fewer frames is refused")
    max_seconds: float = Field(
        300.0, gt=0, description="a clip longer than this is refused: cut it into windows"
    )
    max_missing_share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="a clip is refused when more than this share of its claimed length does not decode",
    )


class LayoutConfig(Section):
    """How videos are packed into shards."""

    videos_per_shard: int = Field(
        512, ge=1, le=99_999, description="videos of one shard; aim at 256 MiB to 1 GiB a shard"
    )
    seed: int = Field(0, ge=0, description="seed of the order in which videos are dealt to shards")


class LimitsConfig(Section):
    """What one video may cost, and how much loss a build tolerates."""

    clip_timeout_seconds: float = Field(
        120.0, gt=0, description="a clip not done in this time costs its worker, seconds"
    )
    memory_mib: int | None = Field(
        4096, ge=256, description="address space of one worker process, MiB; None is unlimited"
    )
    max_missing_share: float = Field(
        0.05, ge=0, le=1, description="videos of the list that may be absent, share"
    )
    max_refused_share: float = Field(
        0.05, ge=0, le=1, description="clips that may be refused before the dataset is not finalized, share"
    )
    attempts: int = Field(
        2, ge=1, description="times a video is tried when its worker died or ran out of time"
    )


class ShardRun(Section):
    """Raw videos to WebDataset shards with an index."""

    stage: Literal["shard"] = "shard"
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="name of the dataset, part of every file name"
    )
    output: str = Field(description="folder or URL (s3://, gs://, memory://) the shards are written to")
    source: Source
    splits: SplitConfig = SplitConfig()
    cut: Cut = WholeCut()
    transcode: TranscodeConfig = TranscodeConfig()
    shards: LayoutConfig = LayoutConfig()
    limits: LimitsConfig = LimitsConfig()
    workers: int = Field(0, ge=0, description="worker processes on this machine; 0 is one per core")
    verify_decode: Literal["none", "sample", "full"] = Field(
        "none",
        description="clips decoded once more at the end; each was decoded in full before its shard was sealed",
    )
