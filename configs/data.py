"""How training reads shards: order, temporal sampling, augmentation, decoding. One section, used by every stage.

What training reads: shard datasets with weights, or a stream of tars without an index.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from cliplift.configs.plugins import AugmentationOptions
from cliplift.configs.sections import ConfigError, Location, Section
from cliplift.configs.where_reader import parse

SMALLEST_SHARE = 0.001  # the loader deals positions in blocks of a thousand


class WeightedShards(Section):
    """A shard dataset and its share of the training clips."""

    url: Location = Field(
        description="folder or URL of a shard dataset; without weights, `data.shards` may hold the URL alone"
    )
    weight: float = Field(
        gt=0,
        description="share of the training clips drawn from it, relative to the other weights; all have one or none",
    )


class SequentialConfig(Section):
    """Training from plain WebDataset tars without an index, as a stream. Not exact: see docs/loading.md."""

    tars: tuple[str, ...] = Field(
        min_length=1,
        description="files or URLs of tars, {000..123} stands for a range; one string will do",
    )
    samples_per_epoch: int = Field(
        ge=1, description="samples counted as one epoch; a stream does not know how many it has"
    )
    video_key: str = Field("mp4", description="ending of the members that hold the video")
    label_key: str = Field("label", description="key of the JSON member with the class name or number")
    shuffle_samples: int = Field(64, ge=1, description="encoded samples each worker keeps to shuffle")

    @field_validator("tars", mode="before")
    @classmethod
    def _one_tar(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


def shard_entry(entry: object, place: int) -> object:
    """An entry of ``shards``; an error in one written as a mapping names its own key."""
    if isinstance(entry, (str, WeightedShards)):
        return entry
    hint = "an entry is a URL, or {url: URL, weight: NUMBER}"
    if not isinstance(entry, dict):
        raise ConfigError(f"{entry!r} is not a URL", key=str(place), value=entry, hint=hint)
    try:
        return WeightedShards.model_validate(entry)
    except ValidationError as error:
        # An unknown key explains the missing one beside it.
        first = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")[0]
        reasons = {"extra_forbidden": "unknown key", "missing": "is missing"}
        reason = reasons.get(first["type"]) or f"{first['input']!r} {first['msg'].removeprefix('Input ')}"
        name = str(first["loc"][0])
        raise ConfigError(reason, key=f"{place}.{name}", value=entry.get(name), hint=hint) from None


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
    position: Literal["spread", "from_start"] = Field(
        "spread",
        description="spread: from the first frame to the last, one clip in the middle; "
        "from_start: clip i of n begins at share i/n of the possible starts, one clip at the first frame; "
        "segments: the frame at share (i + 1/2)/n of each part, or at i/n",
    )
    every_frames: int | None = Field(
        None,
        ge=1,
        description="clips begin at every n-th stored frame of the video instead, as many as fit whole; the clip's own "
        "length gives non-overlapping ones",
    )
    average: Literal["probabilities", "logits"] = Field(
        "probabilities", description="what is averaged over the views"
    )

    @model_validator(mode="after")
    def _one_way(self) -> ViewsConfig:
        if self.every_frames is not None and (self.clips != 1 or self.position != "spread"):
            raise ConfigError(
                "places the clips itself",
                key="every_frames",
                value=self.every_frames,
                hint="leave out clips and position",
            )
        return self


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
    corner_distortion: int = Field(
        0, ge=0, description="how many steps of corner_scales the crop's height and width may be apart"
    )
    corner_places: Literal[5, 13] = Field(
        5,
        description="where a multi_scale_corner crop may lie: corners and centre, or also the middles of the edges and "
        "between corners and centre",
    )
    short_side_pixels: tuple[int, int] | None = Field(
        None,
        description="random: short side drawn for each clip from this range before crop_pixels are cut, pixels; "
        "None is always resize_short_side_pixels",
    )
    flip: bool = Field(
        True, description="mirror half of the clips; off when left and right are different classes"
    )
    flip_label_pairs: tuple[tuple[str, str], ...] = Field(
        (), description="class names that swap when a clip is mirrored"
    )
    rand_augment_ops: int = Field(
        0,
        ge=0,
        le=8,
        description="RandAugment: operations applied to each clip, one after the other; 0 is off",
    )
    rand_augment_magnitude: float = Field(
        7.0, ge=0, le=10, description="RandAugment: strength of the operations, 10 is the strongest"
    )
    rand_augment_magnitude_std: float = Field(
        0.5,
        ge=0,
        description="RandAugment: standard deviation of the strength, drawn anew for every operation",
    )
    rand_augment_probability: float = Field(
        0.5, ge=0, le=1, description="RandAugment: share of its operations that are carried out"
    )
    brightness: float = Field(0.0, ge=0, le=1, description="brightness factor drawn from [1-x, 1+x]")
    contrast: float = Field(0.0, ge=0, le=1, description="contrast factor drawn from [1-x, 1+x]")
    saturation: float = Field(0.0, ge=0, le=1, description="saturation factor drawn from [1-x, 1+x]")
    grayscale_probability: float = Field(0.0, ge=0, le=1, description="share of clips turned gray")
    erase_probability: float = Field(0.0, ge=0, le=1, description="share of clips with one random box erased")
    mixup_alpha: float = Field(0.0, ge=0, description="Beta parameter of mixup; 0 is off")
    cutmix_alpha: float = Field(0.0, ge=0, description="Beta parameter of cutmix; 0 is off")
    plugins: AugmentationOptions = Field(
        {},
        description="augmentations of plug-ins, name: {option: value}, applied in this order after the others; "
        "`cliplift doctor` lists them",
    )
    normalize_brightness: bool = Field(
        False,
        description="scale each clip to mean luma 0.45 before anything else, for dark footage (train and test)",
    )

    @field_validator("short_side_pixels")
    @classmethod
    def _range(cls, bounds: tuple[int, int] | None) -> tuple[int, int] | None:
        if bounds is not None and not 0 < bounds[0] <= bounds[1]:
            raise ValueError("must be two positive numbers, the smaller first")
        return bounds

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if not 0 < bounds[0] <= bounds[1]:
            raise ValueError("must be two positive numbers, the smaller first")
        return bounds


COLOUR_AUGMENTATIONS = (
    "rand_augment_ops",
    "brightness",
    "contrast",
    "saturation",
    "grayscale_probability",
    "normalize_brightness",
)


class DataConfig(Section):
    """Everything the clip loader needs."""

    shards: tuple[Location | WeightedShards, ...] = Field(
        description="folders or URLs of shard datasets (local, s3://, gs://, https://), read as one; one string will do"
    )
    sequential: SequentialConfig | None = Field(
        None,
        description="train on a stream of tars without an index instead; `shards` then gives classes and evaluation",
    )
    modality: Literal["rgb", "flow"] = Field(
        "rgb",
        description="what the network sees: the clips, or the optical flow stored beside them (2 channels, x and y)",
    )
    where: str | None = Field(
        None,
        description="which clips of `split` are trained on, such as `motion > 0.001 and not duplicate`; None trains on "
        "all, and evaluation always takes all of its clips",
    )
    split: str = Field("train", description="split trained on, as recorded in the shards")
    val_split: str = Field("val", description="split used for evaluation during training")
    class_balanced: bool = Field(
        False,
        description="train on every class equally often instead of as often as its clips; reads are spread over shards",
    )
    cluster_balanced: bool = Field(
        False,
        description="train on every cluster of clips that look alike equally often (the column `cluster`, which "
        "`cliplift score SHARDS cluster` makes); reads are spread over shards",
    )
    val_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the training split held out as val_split where the shards have none, in whole groups",
    )
    label_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of each class's training videos used, at least one; the few-label protocols",
    )
    subset_seed: int = Field(0, ge=0, description="seed of the choices of val_share and label_share")
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
    decoder: Literal["decord", "pyav", "torchcodec"] = Field(
        "pyav", description="video decoder; all give the same pixels on our shards"
    )
    clips_per_sample: int = Field(
        1,
        ge=1,
        description="clips cut from each sample that is read (repeated augmentation), next to each other",
    )
    workers: int = Field(
        0, ge=0, description="decoding processes per rank; 0 decodes in the training process"
    )
    read_ahead: int = Field(
        16,
        ge=0,
        description="samples each worker reads ahead of decoding, side by side; 0 reads when it decodes",
    )
    prefetch_batches: int = Field(2, ge=1, description="micro-batches each worker prepares ahead")
    worker_timeout_seconds: float = Field(
        120.0, gt=0, description="no batch from the workers for longer than this is an error, seconds"
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
    cache_folder: Location | None = Field(
        None, description="local folder that caches remote shards, shared by the processes of a node"
    )
    cache_gib: float = Field(50.0, gt=0, description="upper bound of that cache, GiB")

    @field_validator("shards", mode="before")
    @classmethod
    def _entries(cls, value: object) -> object:
        if isinstance(value, (str, dict)):
            value = (value,)
        if not isinstance(value, (list, tuple)):
            return value
        return tuple(shard_entry(entry, place) for place, entry in enumerate(value))

    @property
    def urls(self) -> tuple[str, ...]:
        """The shard datasets."""
        return tuple(entry if isinstance(entry, str) else entry.url for entry in self.shards)

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The share of each shard dataset; None reads all as one."""
        found = tuple(entry.weight for entry in self.shards if isinstance(entry, WeightedShards))
        return found or None

    @model_validator(mode="after")
    def _possible(self) -> DataConfig:
        if not self.shards:
            raise ConfigError("names no shard dataset", key="shards", hint="give at least one folder or URL")
        jitter = self.augment.short_side_pixels
        if jitter is not None and jitter[0] < self.crop_pixels:
            raise ConfigError(
                f"{jitter[0]} is smaller than crop_pixels={self.crop_pixels}",
                key="augment.short_side_pixels",
                value=list(jitter),
                hint="the crop must fit into the resized frame",
            )
        self._check_where()
        self._check_weights()
        self._check_augmentation()
        self._check_modality()
        if self.resize_short_side_pixels is not None and self.resize_short_side_pixels < self.crop_pixels:
            raise ConfigError(
                f"{self.resize_short_side_pixels} is smaller than crop_pixels={self.crop_pixels}",
                key="resize_short_side_pixels",
                value=self.resize_short_side_pixels,
                hint="the crop must fit into the resized frame",
            )
        return self

    def _check_where(self) -> None:
        if self.where is None:
            return
        try:
            parse(self.where)
        except ConfigError as error:
            raise ConfigError(error.reason, key="where", value=self.where, hint=error.hint) from None
        if self.sequential is not None:
            raise ConfigError(
                "chooses clips by what is known of them, and a stream is read without an index",
                key="where",
                value=self.where,
                hint="train on indexed shards",
            )

    def _check_augmentation(self) -> None:
        if self.views.crops == 10 and self.augment.flip_label_pairs:
            raise ConfigError(
                "ten crops mirror clips, and mirrored clips are of another class here",
                key="views.crops",
                value=10,
                hint="use 1, 3 or 5 crops",
            )

    def _check_modality(self) -> None:
        if self.modality == "rgb":
            return
        if self.sequential is not None:
            raise ConfigError(
                "reads the clips of a stream alone",
                key="modality",
                value=self.modality,
                hint="read flow from indexed shards",
            )
        for name in COLOUR_AUGMENTATIONS:
            value = getattr(self.augment, name)
            if value:
                raise ConfigError(
                    "changes colours, and flow has none",
                    key=f"augment.{name}",
                    value=value,
                    hint="set it to 0",
                )

    def _check_weights(self) -> None:
        weights = self.weights or ()
        if self.class_balanced and self.cluster_balanced:
            raise ConfigError(
                "deals clips by cluster, and data.class_balanced by class",
                key="cluster_balanced",
                value=True,
                hint="use one of the two",
            )
        for name, dealt in (("class_balanced", "class"), ("cluster_balanced", "cluster")):
            if weights and getattr(self, name):
                raise ConfigError(
                    f"deals clips by {dealt}, and data.shards gives weights by dataset",
                    key=name,
                    value=True,
                    hint="use one of the two",
                )
        if weights and len(weights) < len(self.shards):
            bare = next(entry for entry in self.shards if isinstance(entry, str))
            raise ConfigError(
                f"{bare} has no weight, others have one",
                key="shards",
                value=bare,
                hint=f"write {{url: {bare}, weight: 1.0}}, or give no weights to read all as one",
            )
        if weights and min(weights) < SMALLEST_SHARE * sum(weights):
            raise ConfigError(
                f"weight {min(weights):g} is less than {SMALLEST_SHARE:.1%} of the sum {sum(weights):g}",
                key="shards",
                value=min(weights),
                hint="leave that dataset out or give it more",
            )
