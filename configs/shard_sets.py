"""What training reads: shard datasets with weights, or a stream of tars without an index."""

from __future__ import annotations

from pydantic import Field, ValidationError, field_validator

from cliplift.configs.sections import ConfigError, Section

SMALLEST_SHARE = 0.001  # the loader deals positions in blocks of a thousand


class WeightedShards(Section):
    """A shard dataset and its share of the training clips."""

    url: str = Field(
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
    """An entry of ``shards``; what is wrong with one written as a mapping is said under its own key."""
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
