"""What a shard build may be told: where the videos are, how they are split, cut, encoded and packed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cliplift.configs.sections import ConfigError, Output, Section
from cliplift.configs.sources import Source, SplitConfig


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


class ShotsCut(Section):
    """Each video is cut where the shot changes (PySceneDetect, extra ``shots``); long shots are cut into windows."""

    kind: Literal["shots"] = "shots"
    detector: Literal["content", "adaptive"] = Field(
        "content",
        description="content compares neighbouring frames; adaptive compares with a rolling average",
    )
    threshold: float | None = Field(
        None,
        gt=0,
        description="change that makes a cut; None is PySceneDetect's own (27 content, 3 adaptive)",
    )
    min_seconds: float = Field(1.0, gt=0, description="a shot shorter than this is left out, seconds")
    max_seconds: float | None = Field(
        10.0,
        gt=0,
        description="a longer shot is cut into windows of this length, seconds; None keeps it whole",
    )
    max_per_video: int | None = Field(
        None, ge=1, description="clips kept per video, spread evenly over it; None keeps all"
    )


Cut = Annotated[WholeCut | WindowsCut | ShotsCut, Field(discriminator="kind")]

# crf of about equal quality (SSIM on Kinetics-like clips): the scales of the encoders differ.
CRF_OF_CODEC = {"h264": 23, "hevc": 26, "av1": 35}


class TranscodeConfig(Section):
    """How a clip is encoded. The defaults are the measured optimum for training decoders."""

    mode: Literal["encode", "copy"] = Field(
        "encode",
        description="copy cuts without re-encoding where the source already fits (codec, size, rate, closed GOPs, a key"
        " frame at the cut) and encodes the others",
    )
    encoder: Literal["pyav", "ffmpeg"] = Field(
        "pyav", description="pyav encodes in the worker; ffmpeg pipes the frames to the ffmpeg command line"
    )
    codec: Literal["h264", "hevc", "av1"] = Field(
        "h264", description="codec of the stored clips; decord 0.6 reads no AV1, so train with decoder: pyav"
    )

    short_side_pixels: int = Field(
        256, ge=16, description="short side of a stored clip, pixels; never upscaled"
    )
    max_fps: float = Field(30.0, gt=0, description="faster sources keep every n-th frame, frames/s")
    fps: float | None = Field(
        None, gt=0, description="resample every clip to exactly this rate, frames/s; None keeps the source's"
    )
    crf: int = Field(
        23,
        ge=0,
        le=63,
        description="constant rate factor of the encoder; lower is larger and better; 26 if codec is hevc, 35 if av1",
    )
    gop_frames: int = Field(16, ge=1, description="frames between key frames; every group is closed")
    b_frames: int = Field(2, ge=0, le=8, description="B frames in a row")
    preset: Literal[
        "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"
    ] = Field("veryfast", description="x264 preset; other encoders take their nearest one")
    tune: Literal["fastdecode", "none"] = Field(
        "fastdecode", description="fastdecode costs 13 % bytes, saves 30 % decoding"
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

    @model_validator(mode="before")
    @classmethod
    def _crf_of_codec(cls, given: object) -> object:
        if isinstance(given, dict) and "crf" not in given and given.get("codec") in CRF_OF_CODEC:
            return given | {"crf": CRF_OF_CODEC[given["codec"]]}
        return given

    @model_validator(mode="after")
    def _crf_in_range(self) -> TranscodeConfig:
        if self.codec != "av1" and self.crf > 51:
            raise ConfigError("x264 and x265 end at 51", key="crf", value=self.crf)
        return self


class FlowConfig(Section):
    """Optical flow of every clip, stored beside it as ``KEY.flow.mp4`` (extra ``flow``, OpenCV)."""

    method: Literal["dis", "tvl1"] = Field(
        "dis", description="dis: dense inverse search; tvl1: a hundred times slower, opencv-contrib only"
    )
    preset: Literal["ultrafast", "fast", "medium"] = Field("medium", description="effort of dis")
    bound_pixels: float = Field(
        20.0,
        gt=0,
        description="longest motion between frames that the 8 bits represent, pixels; longer motion is clipped",
    )


class LayoutConfig(Section):
    """How videos are packed into shards."""

    videos_per_shard: int = Field(
        512, ge=1, le=99_999, description="videos of one shard; aim at 256 MiB to 1 GiB per shard"
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
    private_redirects: bool = Field(
        False,
        description="follow redirects of HTTP sources also to loopback, private and link-local addresses",
    )
    max_missing_share: float = Field(
        0.05, ge=0, le=1, description="videos of the list that may be absent, share"
    )
    max_refused_share: float = Field(
        0.05, ge=0, le=1, description="clips that may be refused before the dataset is not finalized, share"
    )
    attempts: int = Field(
        2, ge=1, description="how often a video is tried when its worker died or ran out of time"
    )


class RayConfig(Section):
    """How a build uses a Ray cluster (``engine: ray``, extra ``ray``)."""

    address: str | None = Field(
        None,
        description="address of the cluster; None is RAY_ADDRESS, else a running one, else one started here",
    )
    cpus_per_shard: int = Field(
        1, ge=1, description="cores that the task of one shard asks for, and worker processes it starts"
    )
    retries: int = Field(
        3, ge=0, description="how often a shard is built again when its Ray worker or node is lost"
    )


class ShardTrackConfig(Section):
    """W&B of a build that is started by the command line, ``job_type=shard``."""

    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto is online with an API key, else offline files"
    )
    project: str | None = Field(None, description="W&B project; None is WANDB_PROJECT, or cliplift")
    entity: str | None = Field(None, description="W&B user or team; None is WANDB_ENTITY, or the key's own")
    group: str | None = Field(
        None, description="W&B group, the campaign; None is WANDB_RUN_GROUP, or the run's name"
    )
    tags: tuple[str, ...] = Field((), description="W&B tags; none are those of WANDB_TAGS")
    notes: str = Field("", description="W&B notes")
    folder: str = Field(
        "",
        description="local folder of W&B's files; empty is the output, or the working folder"
        " when the output is a URL",
    )
    every_seconds: float = Field(10.0, gt=0, description="time between logged points, seconds")


class ShardRun(Section):
    """Raw videos to WebDataset shards with an index."""

    stage: Literal["shard"] = "shard"
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="name of the dataset, part of every file name"
    )
    output: Output = Field(description="folder or URL (s3://, gs://, memory://) the shards are written to")
    source: Source
    splits: SplitConfig = SplitConfig()
    cut: Cut = WholeCut()
    transcode: TranscodeConfig = TranscodeConfig()
    flow: FlowConfig | None = Field(
        None, description="compute optical flow and store it beside every clip; None stores none"
    )
    shards: LayoutConfig = LayoutConfig()
    limits: LimitsConfig = LimitsConfig()
    duplicates: Literal["report", "remove_exact", "remove"] = Field(
        "report",
        description="what to do about clips that another video already contains: report them, or remove all but one "
        "where the content is the same (remove_exact) or also where it looks the same (remove)",
    )
    engine: Literal["local", "ray"] = Field(
        "local", description="what runs the work: this machine, or a Ray cluster"
    )
    ray: RayConfig = RayConfig()
    track: ShardTrackConfig = ShardTrackConfig()
    workers: int = Field(0, ge=0, description="worker processes on this machine; 0 is one per core")
    verify_decode: Literal["none", "sample", "full"] = Field(
        "none",
        description="clips decoded once more at the end; each was decoded in full before its shard was sealed",
    )
