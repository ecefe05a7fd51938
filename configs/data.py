"""How training reads shards: order, temporal sampling, augmentation, decoding. One section, used by every stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from cliplift.configs.sections import ConfigError, Section


class SamplingConfig(Section):
    """Which frames of a stored clip make one training clip."""

    frames: int = Field(16, ge=1, description="frames T of a clip")
    stride: int = Field(2, ge=1, description="step between sampled frames, in frames of the stored video")
    fps: float | None = Field(
        None, gt=0, description="resample by time stamps to this rate before striding, frames/s"
    )
    mode: Literal["dense", "segments"] = Field(
        "dense",
        description="dense: consecutive frames x stride; segments: one frame from each of T equal parts (TSN)",
    )
    short_clips: Literal["loop", "hold"] = Field(
        "loop", description="a video shorter than the clip starts again, or its last frame is held"
    )


class ViewsConfig(Section):
    """The views of one video whose predictions are averaged at test time."""

    clips: int = Field(1, ge=1, description="clips spread uniformly over the video")
    crops: Literal[1, 3, 5, 10] = Field(
        1, description="spatial crops of each clip: centre, three, five, or ten with flips"
    )
    average: Literal["probabilities", "logits"] = Field(
        "probabilities", description="what is averaged over the views"
    )


class AugmentConfig(Section):
    """Spatial and colour augmentation; one draw per clip, the same for all its frames."""

    crop: Literal["random_resized", "multi_scale_corner", "random", "centre"] = Field(
        "random_resized", description="how the training crop is cut"
    )
    scale: tuple[float, float] = Field(
        (0.5, 1.0), description="area of a random_resized crop, share of the frame"
    )
    ratio: tuple[float, float] = Field((0.75, 1.3333), description="aspect ratio of a random_resized crop")
    corner_scales: tuple[float, ...] = Field(
        (1.0, 0.875, 0.75, 0.66), description="sides of a multi_scale_corner crop, share of the short side"
    )
    flip: bool = Field(
        True, description="mirror half of the clips; off when left and right are different classes"
    )
    flip_label_pairs: tuple[tuple[str, str], ...] = Field(
        (), description="class names that swap when a clip is mirrored"
    )
    brightness: float = Field(0.0, ge=0, le=1, description="brightness factor drawn from [1-x, 1+x]")
    contrast: float = Field(0.0, ge=0, le=1, description="contrast factor drawn from [1-x, 1+x]")
    saturation: float = Field(0.0, ge=0, le=1, description="saturation factor drawn from [1-x, 1+x]")
    grayscale_probability: float = Field(0.0, ge=0, le=1, description="share of clips turned gray")
    erase_probability: float = Field(0.0, ge=0, le=1, description="share of clips with one random box erased")
    mixup_alpha: float = Field(0.0, ge=0, description="Beta parameter of mixup; 0 is off")
    cutmix_alpha: float = Field(0.0, ge=0, description="Beta parameter of cutmix; 0 is off")
    normalize_brightness: bool = Field(
        False,
        description="scale each clip to mean luma 0.45 before anything else, for dark footage (train and test)",
    )

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if not 0 < bounds[0] <= bounds[1]:
            raise ValueError("must be two positive numbers, the smaller first")
        return bounds


class DataConfig(Section):
    """Everything the clip loader needs."""

    shards: tuple[str, ...] = Field(
        description="folders or URLs of shard datasets (local, s3://, gs://, https://), read as one; one string will do"
    )
    split: str = Field("train", description="split trained on, as recorded in the shards")
    val_split: str = Field("val", description="split used for evaluation during training")
    fold: int | None = Field(
        None, ge=1, description="official split number (UCF101, HMDB51); None where there is one"
    )
    sampling: SamplingConfig = SamplingConfig()
    views: ViewsConfig = ViewsConfig()
    augment: AugmentConfig = AugmentConfig()
    crop_pixels: int = Field(112, ge=8, description="side of the square clip given to the network, pixels")
    resize_short_side_pixels: int | None = Field(
        None, ge=8, description="short side before test crops, pixels; None is crop_pixels * 8 / 7"
    )
    order: Literal["windowed", "global"] = Field(
        "windowed", description="windowed keeps reads local; global is a full permutation of all samples"
    )
    streams: int = Field(
        8,
        ge=1,
        description="shards read side by side by the windowed order; part of the order, not of the topology",
    )
    window_samples: int = Field(256, ge=1, description="samples shuffled together by the windowed order")
    decoder: Literal["decord", "pyav", "torchcodec"] = Field("decord", description="video decoder")
    workers: int = Field(
        0, ge=0, description="decoding processes per rank; 0 decodes in the training process"
    )
    prefetch_batches: int = Field(2, ge=1, description="micro-batches each worker prepares ahead")
    worker_timeout_seconds: float = Field(
        120.0, gt=0, description="a worker silent for longer is an error, seconds"
    )
    max_failed_in_row: int = Field(50, ge=1, description="stop after this many unreadable samples in a row")
    max_failed_share: float = Field(
        0.05, ge=0, le=1, description="stop when more than this share of samples is unreadable"
    )
    cache_decoded_mib: int = Field(
        0,
        ge=0,
        description="keep decoded videos in memory, at most this much per process, MiB; 0 decodes every time",
    )
    cache_folder: str | None = Field(
        None, description="local folder that caches remote shards, shared by the processes of a node"
    )
    cache_gib: float = Field(50.0, gt=0, description="upper bound of that cache, GiB")

    @field_validator("shards", mode="before")
    @classmethod
    def _one_url(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _possible(self) -> DataConfig:
        if not self.shards:
            raise ConfigError("names no shard dataset", key="shards", hint="give at least one folder or URL")
        if self.resize_short_side_pixels is not None and self.resize_short_side_pixels < self.crop_pixels:
            raise ConfigError(
                f"{self.resize_short_side_pixels} is smaller than crop_pixels={self.crop_pixels}",
                key="resize_short_side_pixels",
                value=self.resize_short_side_pixels,
                hint="the crop must fit into the resized frame",
            )
        return self
