"""A transfer run's teacher, objective and probe, and which settings fit together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, field_validator, model_validator

from cliplift.configs.data import DataConfig
from cliplift.configs.sections import ConfigError, Location, Section


class ImageTeacher(Section):
    """A frozen 2D network, and the size it sees frames at."""

    name: str = Field("efficientnet_lite0", description="a 2D model from `cliplift models`")
    options: dict[str, bool | int | float | str] = Field(
        {}, description="architecture options of the teacher"
    )
    pretrained: str | None = Field(
        "imagenet",
        description="its weights: 'imagenet' where a package ships them, or a local file; null is random (tests)",
    )
    resize_pixels: int | None = Field(
        None,
        ge=32,
        description="side the frames are resized to for the teacher, pixels; with cache_features they are cut at this "
        "size (the largest, of several teachers) from the stored picture",
    )


class TeacherConfig(ImageTeacher):
    """The frozen 2D network whose frame features supervise the 3D student; there may be others beside it."""

    frames: int | None = Field(
        None, ge=1, description="frames of the clip averaged by the teacher; None is all of them"
    )
    cache_features: bool = Field(
        False,
        description="compute every training sample's features once, from the plain middle clip, and keep them; the "
        "frames then are not those of the clip's own time and crop",
    )
    others: tuple[ImageTeacher, ...] = Field(
        (),
        description="bank, regression, objective distil: further teachers; each has a predictor of its own, and all "
        "count the same",
    )

    def by_key(self) -> dict[str, ImageTeacher]:
        """All teachers, the first one first, by their key in a run's config."""
        return {"teacher": self} | {f"teacher.others.{i}": one for i, one in enumerate(self.others)}


class CorrespondenceConfig(Section):
    """What the student learns of the teacher: the paper's matching (T3D paper, section 3.2), or another objective."""

    objective: Literal["paper", "infonce", "bank", "regression"] = Field(
        "paper",
        description="paper: its classifier of matching pairs (also called binary); infonce: a clip told from the "
        "others of the batch; bank: from all cached features; regression: the teacher's features predicted",
    )
    feature_dim: int = Field(
        1024, ge=8, description="paper, infonce: width both towers are brought to before they are compared"
    )
    hidden: tuple[int, int] = Field((512, 128), description="paper: widths of fc1 and fc2")
    dropout: tuple[float, float, float] = Field(
        (0.0, 0.0, 0.0), description="paper: dropout before fc1, fc2 and fc3"
    )
    normalise_features: bool = Field(
        False,
        description="paper: LayerNorm both towers' features before they are concatenated, so that neither scale "
        "decides",
    )
    negatives_per_clip: int = Field(
        1, ge=1, description="paper: frames of other videos paired with each clip"
    )
    same_video_negatives: int = Field(
        0,
        ge=0,
        description="further, harder negatives per clip: frames of its own video at another time, for which "
        "data.clips_per_sample is set; bank: above 0, other stored clips of the video count as negatives",
    )
    temperature: float = Field(0.07, gt=0, description="infonce, bank: temperature")
    independent_views: bool = Field(
        True,
        description="frames and clip get separate crops and colours, so that borders or tints do not give the answer",
    )
    time_steps: int = Field(
        1,
        ge=1,
        description="bank, regression: parts of the clip, in order of time, whose teacher features are learned; "
        "1 is their mean",
    )
    time_basis: Literal["parts", "cosines", "spread"] = Field(
        "parts",
        description="regression: parts: the features of each part; cosines: their discrete cosine transform over the "
        "parts, the mean first, each coefficient standardised by itself: what changes counts as much as what stays; "
        "spread: their mean and their standard deviation over the parts, each standardised by itself",
    )
    predict_from: Literal["features", "map"] = Field(
        "features",
        description="bank, regression: features: the clip's one feature predicts all parts, so it must hold what "
        "happens when; map: each part is predicted from the student's feature map at that time",
    )
    regression_loss: Literal["cosine", "smooth_l1"] = Field(
        "cosine", description="regression: distance to the teacher's standardised features"
    )
    order_negatives: int = Field(
        0,
        ge=0,
        description="bank: further negatives per clip: its own parts in another order, backwards first",
    )
    predictor_start: Literal["random", "ridge"] = Field(
        "random",
        description="bank, regression: first weights of the predictor: random, or the ridge regression of the "
        "teacher's features on those of the student as it starts, computed once over the training clips",
    )
    ridge_penalty: float = Field(
        1.0,
        gt=0,
        description="predictor_start ridge: weight of the squared weights beside the mean squared error, in units of "
        "the mean variance of the student's features",
    )

    @field_validator("objective", mode="before")
    @classmethod
    def _older_name(cls, value: object) -> object:
        return "paper" if value == "binary" else value

    @property
    def predicted(self) -> int:
        """How many of the teacher's features are predicted of a clip: of each part, or mean and deviation."""
        return 2 if self.time_basis == "spread" else self.time_steps

    @property
    def predicts_features(self) -> bool:
        """The student predicts the teacher's standardised features; otherwise pairs are matched."""
        return self.objective in ("bank", "regression")


class AttentiveProbeConfig(Section):
    """A grid of attentive probes, learning rate x weight decay, trained in one pass over frozen features (V-JEPA 2)."""

    lrs: tuple[float, ...] = Field(
        (5e-3, 3e-3, 1e-3, 3e-4, 1e-4),
        min_length=1,
        description="learning rates of the grid; each falls to 0 by a cosine",
    )
    weight_decays: tuple[float, ...] = Field(
        (0.01, 0.1, 0.4, 0.8), min_length=1, description="weight decays of the grid"
    )
    epochs: float = Field(20, gt=0, description="passes over the probe's training split")
    batch: int = Field(32, ge=1, description="clips of a step over all ranks")
    depth: int = Field(4, ge=1, description="blocks of a head, the last one's query included")
    heads: int = Field(16, ge=1, description="attention heads; the width of the features is a multiple")

    @model_validator(mode="after")
    def _no_negative_rates(self) -> AttentiveProbeConfig:
        for key, values, least in (
            ("lrs", self.lrs, "more than 0"),
            ("weight_decays", self.weight_decays, "0 or more"),
        ):
            if min(values) < 0 or (key == "lrs" and min(values) == 0):
                raise ConfigError(f"must all be {least}", key=key, value=list(values))
        return self


class ProbeConfig(Section):
    """A labelled set the student's frozen features are judged on at every evaluation."""

    shards: tuple[Location, ...] = Field(description="labelled shard datasets; one string will do")
    split: str = Field("train", description="split the probe learns from")
    test_split: str = Field("val", description="split it is tested on")
    fold: int | None = Field(None, ge=1, description="official split number; None where there is one")
    neighbours: int = Field(20, ge=1, description="k of the k-NN vote")
    temperature: float = Field(0.07, gt=0, description="temperature of the k-NN vote's weights")
    linear_steps: int = Field(100, ge=0, description="L-BFGS iterations of the linear probe; 0 leaves it out")
    linear_l2: float = Field(1e-3, ge=0, description="L2 penalty of the linear probe")
    attentive: AttentiveProbeConfig | None = Field(
        None,
        description="attentive probes of the features' tokens, trained anew at every evaluation; null is none",
    )

    @field_validator("shards", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


def with_clips_for_negatives(tree: object) -> object:
    """The tree of a transfer run with ``data.clips_per_sample`` filled in, where negatives of a clip's own video ask
    for several clips of it and the run does not say how many."""
    if not isinstance(tree, Mapping):
        return tree
    data, matching = tree.get("data"), tree.get("correspondence")
    if not isinstance(data, Mapping) or not isinstance(matching, Mapping) or "clips_per_sample" in data:
        return tree
    wanted = matching.get("same_video_negatives")
    if matching.get("objective") in ("bank", "regression") or not isinstance(wanted, int) or wanted < 1:
        return tree
    return {**tree, "data": {**data, "clips_per_sample": wanted + 1}}


def check_transfer(
    teacher: TeacherConfig, matching: CorrespondenceConfig, data: DataConfig, *, global_batch: int
) -> None:
    """Refuse what cannot be learned, before a frame is read.

    Raises:
        ConfigError: names the key.
    """
    if data.modality != "rgb":
        raise ConfigError(
            "has no frames for the teacher to see", key="data.modality", value=data.modality, hint="use rgb"
        )
    if teacher.frames is not None and teacher.frames > data.sampling.frames:
        raise ConfigError(
            f"{teacher.frames} is more than the clip's {data.sampling.frames} frames",
            key="teacher.frames",
            value=teacher.frames,
            hint="use null for all frames",
        )
    needs_indexed = teacher.cache_features or matching.predicts_features
    if data.sequential is not None and needs_indexed:
        key = "teacher.cache_features" if teacher.cache_features else "correspondence.objective"
        raise ConfigError(
            "needs every training clip by number, and a stream of tars has none",
            key=key,
            value=True if teacher.cache_features else matching.objective,
            hint="remove data.sequential and index the tars with `cliplift index`",
        )
    if matching.predicts_features:
        _check_prediction(teacher, matching, data)
    else:
        _check_matching(teacher, matching, data, global_batch=global_batch)


def _check_matching(
    teacher: TeacherConfig, matching: CorrespondenceConfig, data: DataConfig, *, global_batch: int
) -> None:
    if matching.negatives_per_clip >= global_batch:
        raise ConfigError(
            f"needs more clips than the batch has, {global_batch}",
            key="correspondence.negatives_per_clip",
            value=matching.negatives_per_clip,
            hint=f"it must be below engine.global_batch={global_batch}",
        )
    for key, idle in (
        ("time_steps", 1), ("order_negatives", 0), ("predict_from", "features"), ("time_basis", "parts"),
        ("predictor_start", "random"),
    ):  # fmt: skip
        if getattr(matching, key) != idle:
            raise ConfigError(
                f"is not used by objective {matching.objective!r}",
                key=f"correspondence.{key}",
                value=getattr(matching, key),
                hint="set correspondence.objective to bank or regression",
            )
    if teacher.others:
        raise ConfigError(
            f"is not used by objective {matching.objective!r}, whose head takes one teacher",
            key="teacher.others",
            value=[one.name for one in teacher.others],
            hint="set correspondence.objective to bank or regression",
        )
    hard = matching.same_video_negatives
    if hard and teacher.cache_features:
        raise ConfigError(
            "asks for frames of the same video at another time, and cached features have one time for each clip",
            key="correspondence.same_video_negatives",
            value=hard,
            hint="set teacher.cache_features to false, or use correspondence.objective=bank with order_negatives",
        )
    if hard and data.clips_per_sample <= hard:
        raise ConfigError(
            f"needs {hard + 1} clips of each sample, and data.clips_per_sample is {data.clips_per_sample}",
            key="correspondence.same_video_negatives",
            value=hard,
            hint=f"leave data.clips_per_sample out, or set it to {hard + 1} or more",
        )


def _check_prediction(teacher: TeacherConfig, matching: CorrespondenceConfig, data: DataConfig) -> None:
    steps = matching.time_steps
    seen = teacher.frames or data.sampling.frames
    if seen % steps:
        raise ConfigError(
            f"{steps} does not divide the {seen} frames that the teacher sees",
            key="correspondence.time_steps",
            value=steps,
            hint="change it, or teacher.frames",
        )
    if steps > 1 and teacher.cache_features and data.sampling.mode != "segments":
        raise ConfigError(
            "tells parts of the clip apart, and cached features are those of the middle clip, not of the one seen",
            key="correspondence.time_steps",
            value=steps,
            hint="use data.sampling.mode=segments, whose clips all span the whole video, or do not cache",
        )
    _check_time_basis(matching)
    if matching.predictor_start == "ridge" and matching.predict_from == "map":
        raise ConfigError(
            "is of the clip's one feature, and correspondence.predict_from=map predicts from each time",
            key="correspondence.predictor_start",
            value="ridge",
            hint="use random, or predict_from=features",
        )
    if matching.objective == "regression":
        for key in ("same_video_negatives", "order_negatives"):
            if getattr(matching, key):
                raise ConfigError(
                    "is about negatives, and regression has none",
                    key=f"correspondence.{key}",
                    value=getattr(matching, key),
                    hint="set it to 0, or correspondence.objective=bank",
                )
        return
    if not teacher.cache_features:
        raise ConfigError(
            "takes its negatives from the cached features of all clips",
            key="correspondence.objective",
            value=matching.objective,
            hint="set teacher.cache_features to true",
        )
    orders = math.factorial(min(steps, 12)) - 1
    if matching.order_negatives > orders:
        raise ConfigError(
            f"{steps} parts have {orders} other orders" if orders else "one part has no other order",
            key="correspondence.order_negatives",
            value=matching.order_negatives,
            hint="use more correspondence.time_steps, or fewer negatives",
        )


def _check_time_basis(matching: CorrespondenceConfig) -> None:
    """Coefficients over time are of several parts, belong to no one time, and have no order to be shuffled."""
    if matching.time_basis == "parts":
        return
    reasons = {
        "needs two parts of the clip or more": matching.time_steps == 1,
        "is of the whole clip, and correspondence.predict_from=map asks for each time": matching.predict_from
        == "map",
        "is for regression": matching.objective != "regression",
    }
    for reason, applies in reasons.items():
        if applies:
            raise ConfigError(
                reason,
                key="correspondence.time_basis",
                value=matching.time_basis,
                hint="use parts, or objective=regression with time_steps above 1 and predict_from=features",
            )
