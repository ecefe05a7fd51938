"""One schema per stage. ``RUNS`` maps the ``stage:`` key of a YAML to it, ``TRAINING`` those that train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from cliplift.configs.data import DataConfig, ViewsConfig
from cliplift.configs.objectives import DistilConfig, ForecastConfig, LatentConfig, MaskedConfig
from cliplift.configs.plugins import ObjectiveName, objective_options
from cliplift.configs.sections import ConfigError, Location, Output, Section
from cliplift.configs.sharding import ShardRun
from cliplift.configs.supervision import (
    CorrespondenceConfig,
    ProbeConfig,
    TeacherConfig,
    check_transfer,
    with_clips_for_negatives,
)
from cliplift.configs.training import TrainingRun


class TransferRun(TrainingRun):
    """2D to 3D supervision transfer: does this frame belong to this clip?"""

    stage: Literal["transfer"] = "transfer"
    teacher: TeacherConfig = TeacherConfig()
    correspondence: CorrespondenceConfig = CorrespondenceConfig()
    probe: ProbeConfig | None = Field(
        None, description="labelled data for a k-NN and a linear probe of the student's features; None is off"
    )
    frozen_batchnorm: bool = Field(
        False,
        description="BatchNorm of the student keeps the statistics and weights it starts with, for a student that "
        "starts from image weights",
    )

    @model_validator(mode="before")
    @classmethod
    def _clips_for_negatives(cls, tree: object) -> object:
        return with_clips_for_negatives(tree)

    @model_validator(mode="after")
    def _possible(self) -> TransferRun:
        check_transfer(self.teacher, self.correspondence, self.data, global_batch=self.engine.global_batch)
        if self.correspondence.predictor_start == "ridge" and self.engine.zero_stage == 3:
            raise ConfigError(
                "needs the student whole before the first step, and at stage 3 no rank holds all of it",
                key="correspondence.predictor_start",
                value="ridge",
                hint="use random, or engine.zero_stage of 2 or less",
            )
        return self


class ClassificationRun(TrainingRun):
    """Shared by pretrain and finetune: supervised classification of clips."""

    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    task: Literal["single_label", "multi_label"] = Field(
        "single_label", description="one class per clip (cross-entropy) or several (BCE, mAP)"
    )
    initialise_from: Location | None = Field(
        None, description="run folder, export folder or weights file whose backbone the model starts from"
    )


class PretrainRun(ClassificationRun):
    """Large-backbone pretraining: on labelled shards, or on any by predicting frames, hidden pixels or features, or by
    learning what image teachers say of every place."""

    stage: Literal["pretrain"] = "pretrain"
    objective: ObjectiveName = Field(
        "classification",
        description="what is learned: classification (the labels); without labels, forecast (the frames to come), "
        "masked (hidden pixels), latent (features of hidden blocks) or distil (image teachers' features, token by "
        "token); or the objective of a plug-in",
    )
    objective_options: dict[str, object] = Field({}, description="options of the objective of a plug-in")
    forecast: ForecastConfig = ForecastConfig()
    masked: MaskedConfig = MaskedConfig()
    latent: LatentConfig = LatentConfig()
    distil: DistilConfig = DistilConfig()
    teacher: TeacherConfig = Field(TeacherConfig(), description="the frozen 2D networks of objective distil")
    probe: ProbeConfig | None = Field(
        None,
        description="labelled data for a k-NN and a linear probe of the encoder's features, with objective masked, "
        "latent or distil; None is off",
    )

    @field_validator("objective_options")
    @classmethod
    def _valid_options(cls, options: dict[str, object], info: ValidationInfo) -> dict[str, object]:
        if "objective" in info.data:  # else the objective is the mistake
            objective_options(info.data["objective"], options)
        return options

    @model_validator(mode="after")
    def _forecast_possible(self) -> PretrainRun:
        if self.objective != "forecast":
            return self
        if self.forecast.input_frames >= self.data.sampling.frames:
            raise ConfigError(
                f"reading {self.forecast.input_frames} of {self.data.sampling.frames} frames leaves none to predict",
                key="forecast.input_frames",
                value=self.forecast.input_frames,
                hint=f"use less than data.sampling.frames={self.data.sampling.frames}",
            )
        self._refuse_labels("forecasting")
        return self

    @model_validator(mode="after")
    def _probe_possible(self) -> PretrainRun:
        if self.probe is not None and self.objective not in ("masked", "latent", "distil"):
            raise ConfigError(
                f"judges features learned without labels, and this run is of objective {self.objective!r}",
                key="probe",
                hint="use null, or objective: masked",
            )
        return self

    @model_validator(mode="after")
    def _masked_possible(self) -> PretrainRun:
        if self.objective == "masked":
            self._refuse_labels("masked pretraining")
            self._refuse_flow("has no pixels to predict")
            self._refuse_half("rounds the pixels that are to be predicted")
        return self

    @model_validator(mode="after")
    def _latent_possible(self) -> PretrainRun:
        if self.objective != "latent":
            return self
        self._refuse_labels("latent prediction")
        self._refuse_flow("is not what its encoders take")
        self._refuse_half("cannot hold the small steps of the teacher's moving average")
        if self.latent.keep_predictor and (self.initialise_from is None or self.model.pretrained is not None):
            raise ConfigError(
                "goes on with the nets of another run, which initialise_from names and model.pretrained does not",
                key="latent.keep_predictor",
                value=True,
                hint="set initialise_from to that run's folder and leave model.pretrained out",
            )
        if self.optim.average_decay:
            raise ConfigError(
                "averages the student, and the result of latent prediction is the teacher, an average already",
                key="optim.average_decay",
                value=self.optim.average_decay,
                hint="use 0; latent.teacher_momentum is the teacher's",
            )
        return self

    @model_validator(mode="after")
    def _distil_possible(self) -> PretrainRun:
        if self.objective != "distil":
            return self
        self._refuse_labels("distillation")
        self._refuse_flow("has no frames for a teacher to see")
        self._refuse_half("rounds the features that are to be learned")
        for key, value, idle in (
            ("cache_features", self.teacher.cache_features, False),
            ("frames", self.teacher.frames, None),
        ):
            if value != idle:
                raise ConfigError(
                    "is of supervision transfer: here every token has a target of its own, at the clip's time and crop",
                    key=f"teacher.{key}",
                    value=value,
                    hint="leave it out; distil.teacher_frames says which frames a teacher sees",
                )
        return self

    def _refuse_flow(self, why: str) -> None:
        if self.data.modality != "rgb":
            raise ConfigError(why, key="data.modality", value=self.data.modality, hint="use rgb")

    def _refuse_half(self, why: str) -> None:
        if self.engine.precision in ("bf16", "fp16"):
            raise ConfigError(
                why, key="engine.precision", value=self.engine.precision, hint="use autocast_bf16"
            )

    def _refuse_labels(self, what: str) -> None:
        about_labels = {
            "label_smoothing": self.label_smoothing,
            "data.augment.mixup_alpha": self.data.augment.mixup_alpha,
            "data.augment.cutmix_alpha": self.data.augment.cutmix_alpha,
        }
        for key, value in about_labels.items():
            if value:
                raise ConfigError(
                    f"is about labels, and {what} has none",
                    key=key,
                    value=value,
                    hint="set it to 0, or objective: classification",
                )


class FinetuneRun(ClassificationRun):
    """Finetuning on a target dataset, with a validation part carved from train where the data has none."""

    stage: Literal["finetune"] = "finetune"
    train_part: Literal["all", "head"] = Field(
        "all", description="what is trained: everything, or the head alone"
    )
    frozen_batchnorm: bool = Field(
        False, description="BatchNorm keeps its statistics and weights, which small batches would spoil"
    )
    classifier_start: Literal["random", "linear"] = Field(
        "random",
        description="first weights of the classifier: random, or those of the linear classifier that fits the training "
        "clips' features of the network as it starts (arXiv:2202.10054), which needs BatchNorm held or none",
    )
    test_split: str = Field("test", description="split evaluated once at the end")
    folds: tuple[int, ...] | Literal["all"] = Field(
        (),
        description="official splits to run one after the other, each in OUTPUT/foldN; all takes every one the shards "
        "have; the result is their mean and standard deviation",
    )
    seeds: tuple[int, ...] = Field(
        (),
        description="seeds to run one after the other, each in OUTPUT/seedN (below foldN); () is `seed` alone",
    )

    @model_validator(mode="after")
    def _start_possible(self) -> FinetuneRun:
        if self.classifier_start == "random":
            return self
        why = {
            self.engine.zero_stage
            == 3: "needs the network whole before the first step, and at ZeRO stage 3 no rank "
            "holds all of it",
            self.task == "multi_label": "is fitted to one class per clip",
            self.data.sequential
            is not None: "needs every training clip by number, and a stream of tars has none",
        }
        if True in why:
            raise ConfigError(why[True], key="classifier_start", value="linear", hint="use random")
        return self


class EvaluateRun(Section):
    """Evaluate a finished run or an export folder on a split."""

    stage: Literal["evaluate"] = "evaluate"
    run: str = Field(description="run folder or export folder to evaluate")
    output: Output = Field(description="folder for predictions and results")
    data: DataConfig | None = Field(None, description="data to evaluate on; None takes the run's own")
    split: str = Field("test", description="split to evaluate")
    views: ViewsConfig | None = Field(None, description="test views; None takes the run's own")
    batch: int = Field(16, ge=1, description="clips per batch")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto takes CUDA where a GPU is present"
    )


class FuseRun(Section):
    """Fuse the predictions of several evaluations of one split: RGB and flow streams, or an ensemble."""

    stage: Literal["fuse"] = "fuse"
    runs: tuple[str, ...] = Field(
        min_length=2, description="evaluations (or runs that were evaluated), in the order of weights"
    )
    output: Output = Field(description="folder for the fused predictions and results")
    method: Literal["probabilities", "l2_logits"] = Field(
        "probabilities",
        description="probabilities: weighted mean of them; l2_logits: weighted sum of logits, each of length 1",
    )
    weights: tuple[float, ...] | None = Field(None, description="one per run; None is equal")

    @model_validator(mode="after")
    def _weights_fit(self) -> FuseRun:
        weights = self.weights
        if weights is not None and (len(weights) != len(self.runs) or min(weights) < 0 or not sum(weights)):
            raise ConfigError(
                f"{list(weights)} must be {len(self.runs)} numbers, none below 0 and not all 0",
                key="weights",
                value=list(weights),
                hint="give one for each of runs",
            )
        return self


SEGMENT_SUFFIXES = (".csv", ".json", ".vtt")


class PredictRun(Section):
    """Class probabilities for video files with a finished run or an export folder."""

    stage: Literal["predict"] = "predict"
    run: str = Field(description="run folder or export folder to predict with")
    videos: tuple[str, ...] = Field(description="files, folders or URLs")
    output: Output | None = Field(
        None, description="JSON-lines file for the predictions; None prints them only"
    )
    top: int = Field(5, ge=1, description="classes listed per video")
    window_seconds: float | None = Field(
        None,
        gt=0,
        description="classify windows of this length sliding over each video; None classifies it whole",
    )
    window_stride_seconds: float | None = Field(
        None, gt=0, description="seconds from one window to the next; None is half a window"
    )
    segments: Output | None = Field(
        None,
        description="file for what happens when, by windows that agree: .csv, .json, or .vtt (subtitles of one video); "
        "None writes none",
    )
    segment_threshold: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="least probability of a class in a segment; None takes the likeliest class whatever it is, and of "
        "several labels those of at least 0.5",
    )
    segment_precision_seconds: float | None = Field(
        None, gt=0, description="how exactly the ends of segments are searched for; None is one frame"
    )
    views: ViewsConfig = ViewsConfig()
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto takes CUDA where a GPU is present"
    )

    @model_validator(mode="after")
    def _segments_possible(self) -> PredictRun:
        for key in ("segment_threshold", "segment_precision_seconds"):
            if getattr(self, key) is not None and self.segments is None:
                raise ConfigError(
                    "is of segments, and none are asked for",
                    key=key,
                    value=getattr(self, key),
                    hint="say segments=segments.csv",
                )
        if self.segments is None:
            return self
        if not self.segments.endswith(SEGMENT_SUFFIXES):
            raise ConfigError(
                f"{self.segments!r} does not end in {', '.join(SEGMENT_SUFFIXES)}",
                key="segments",
                value=self.segments,
                hint="say segments=segments.csv",
            )
        if self.window_seconds is None:
            raise ConfigError(
                "segments are found by windows that slide over the video",
                key="segments",
                value=self.segments,
                hint="say window_seconds=2 too",
            )
        return self


class ExplainRun(Section):
    """Heat maps over videos: where the evidence for a class lies, as mp4 files."""

    stage: Literal["explain"] = "explain"
    run: str = Field(description="run folder or export folder whose model is explained")
    videos: tuple[str, ...] = Field(description="files, folders or URLs")
    output: Output = Field("explained", description="folder for one mp4 per video and explained.json")
    method: Literal["auto", "grad_cam", "rollout", "attention"] = Field(
        "auto",
        description="grad_cam for feature maps, rollout for TimeSformer, attention for models that attend in space; "
        "auto takes what the model has",
    )
    class_name: str | None = Field(
        None, description="class to explain with grad_cam; None is the predicted one"
    )
    layer: str | None = Field(
        None,
        description="submodule whose feature map grad_cam looks at, such as features.transition1; earlier ones have "
        "finer cells; None is the last",
    )
    views: ViewsConfig = ViewsConfig()
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto takes CUDA where a GPU is present"
    )


class ExportRun(Section):
    """Write a run's weights as model.safetensors + config.json (+ model card) for others to load."""

    stage: Literal["export"] = "export"
    run: str = Field(
        description="run folder, or one checkpoint of it (a folder or a URL), whose weights are exported"
    )
    output: Output = Field(description="folder to write")


class ReportRun(Section):
    """One self-contained HTML page about one or several runs."""

    stage: Literal["report"] = "report"
    runs: tuple[str, ...] = Field(min_length=1, description="run folders, or a demo folder")
    output: Output = Field("report.html", description="HTML file to write")
    title: str | None = Field(None, description="page title; None is made from the runs")
    max_clips: int = Field(24, ge=0, description="sample clips embedded in the page")


# What `cliplift demo motion=only` takes where the run says nothing.
MOTION_ONLY: Mapping[str, object] = {
    "output": "runs/demo-motion",
    "size_pixels": 80,
    "val_per_class": 4,
    "train_per_class": 60,
    "test_per_class": 20,
    "unlabelled": 140,
    "transfer_steps": 200,
    "finetune_steps": 300,
    "scratch_steps": None,
    "frames_steps": 100,
}


class DemoRun(Section):
    """The whole chain on clips made on the spot."""

    stage: Literal["demo"] = "demo"
    motion: Literal["and_kind", "only"] = Field(
        "and_kind",
        description="what tells the classes apart: and_kind: what moves and how it moves; "
        "only: how it moves, a harder set, of which a teacher of single frames knows nothing",
    )
    output: Output = Field(
        "runs/demo",
        description="folder for videos, shards, runs and the report; motion=only: runs/demo-motion",
    )
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="seeds of the finetuning runs")
    size_pixels: int = Field(96, ge=48, description="side of the generated videos, pixels; motion=only: 80")
    train_per_class: int = Field(12, ge=2, description="training clips per class; motion=only: 60")
    val_per_class: int = Field(2, ge=1, description="validation clips per class; motion=only: 4")
    test_per_class: int = Field(16, ge=1, description="test clips per class; motion=only: 20")
    unlabelled: int = Field(
        320, ge=4, description="unlabelled videos for transfer; motion=only: 140, which are longer"
    )
    transfer_steps: int = Field(30, ge=1, description="optimizer steps of transfer; motion=only: 200")
    finetune_steps: int = Field(
        30,
        ge=1,
        description="optimizer steps of each 3D run's classifier; motion=only: 300, of the whole network",
    )
    scratch_steps: int | None = Field(
        300,
        ge=1,
        description="optimizer steps of each 3D run from scratch, of a smaller network; None is finetune_steps, as for "
        "motion=only, where the network is the same",
    )
    frames_steps: int = Field(
        60, ge=1, description="optimizer steps of each run of the 2D baseline's classifier; motion=only: 100"
    )
    workers: int = Field(2, ge=1, description="processes that make and pack the videos")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_set(cls, tree: object) -> object:
        if isinstance(tree, Mapping) and tree.get("motion") == "only":
            return {**MOTION_ONLY, **tree}
        return tree


TRAINING: Mapping[str, type[TrainingRun]] = {
    "transfer": TransferRun,
    "pretrain": PretrainRun,
    "finetune": FinetuneRun,
}
RUNS: Mapping[str, type[Section]] = {
    "shard": ShardRun,
    **TRAINING,
    "evaluate": EvaluateRun,
    "fuse": FuseRun,
    "predict": PredictRun,
    "explain": ExplainRun,
    "export": ExportRun,
    "report": ReportRun,
    "demo": DemoRun,
}


def stage_name(schema: type[Section]) -> str:
    """The ``stage:`` of a run's schema."""
    return next(name for name, known in RUNS.items() if known is schema)
