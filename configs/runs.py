"""One schema per stage. ``RUNS`` maps the ``stage:`` key of a YAML to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from cliplift.configs.data import DataConfig, ViewsConfig
from cliplift.configs.sections import ConfigError, Section
from cliplift.configs.sharding import ShardRun
from cliplift.configs.training import ModelConfig, TrainingRun


class TeacherConfig(Section):
    """The frozen 2D network whose frame features supervise the 3D student."""

    name: str = Field("efficientnet_lite0", description="a 2D model from `cliplift models`")
    options: dict[str, bool | int | float | str] = Field(
        {}, description="architecture options of the teacher"
    )
    pretrained: str | None = Field(
        "imagenet",
        description="its weights: 'imagenet' where a package ships them, or a local file; null is random (tests)",
    )
    frames: int | None = Field(
        None, ge=1, description="frames of the clip averaged by the teacher; None is all of them"
    )
    resize_pixels: int | None = Field(
        None, ge=32, description="side the frames are resized to for the teacher, pixels"
    )


class CorrespondenceConfig(Section):
    """The matching head and how its pairs are formed (T3D paper, section 3.2)."""

    feature_dim: int = Field(
        1024, ge=8, description="width both towers are brought to before they are concatenated"
    )
    hidden: tuple[int, int] = Field((512, 128), description="widths of fc1 and fc2")
    dropout: tuple[float, float, float] = Field(
        (0.0, 0.0, 0.0), description="dropout before fc1, fc2 and fc3"
    )
    normalise_features: bool = Field(
        False,
        description="LayerNorm both towers' features before they are concatenated, so that neither scale decides",
    )
    negatives_per_clip: int = Field(1, ge=1, description="frames of other videos paired with each clip")
    objective: Literal["binary", "infonce"] = Field(
        "binary",
        description="binary: the paper's matching classifier; infonce: contrastive over the whole batch",
    )
    temperature: float = Field(0.07, gt=0, description="infonce temperature")
    independent_views: bool = Field(
        True,
        description="frames and clip get separate crops and colours, so that borders or tints do not give the answer",
    )


class TransferRun(TrainingRun):
    """2D to 3D supervision transfer: does this frame belong to this clip?"""

    stage: Literal["transfer"] = "transfer"
    data: DataConfig
    model: ModelConfig
    teacher: TeacherConfig = TeacherConfig()
    correspondence: CorrespondenceConfig = CorrespondenceConfig()

    @model_validator(mode="after")
    def _pairs_exist(self) -> TransferRun:
        if self.correspondence.negatives_per_clip >= self.engine.global_batch:
            raise ConfigError(
                f"needs more clips than the batch has, {self.engine.global_batch}",
                key="correspondence.negatives_per_clip",
                value=self.correspondence.negatives_per_clip,
                hint=f"it must be below engine.global_batch={self.engine.global_batch}",
            )
        frames = self.teacher.frames
        if frames is not None and frames > self.data.sampling.frames:
            raise ConfigError(
                f"{frames} is more than the clip's {self.data.sampling.frames} frames",
                key="teacher.frames",
                value=frames,
                hint="use null for all frames",
            )
        return self


class ClassificationRun(TrainingRun):
    """Shared by pretrain and finetune: supervised classification of clips."""

    data: DataConfig
    model: ModelConfig
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    task: Literal["single_label", "multi_label"] = Field(
        "single_label", description="one class per clip (cross-entropy) or several (BCE, mAP)"
    )
    initialise_from: str | None = Field(
        None, description="run folder, export folder or weights file whose backbone the model starts from"
    )


class PretrainRun(ClassificationRun):
    """Large-backbone pretraining on labelled shards."""

    stage: Literal["pretrain"] = "pretrain"


class FinetuneRun(ClassificationRun):
    """Finetuning on a target dataset, with a validation part carved from train where the data has none."""

    stage: Literal["finetune"] = "finetune"
    train_part: Literal["all", "head"] = Field(
        "all", description="what is trained: everything, or the head alone"
    )
    test_split: str = Field("test", description="split evaluated once at the end")


class EvaluateRun(Section):
    """Evaluate a finished run or an export folder on a split."""

    stage: Literal["evaluate"] = "evaluate"
    run: str = Field(description="run folder or export folder to evaluate")
    output: str = Field(description="folder for predictions and results")
    data: DataConfig | None = Field(None, description="data to evaluate on; None takes the run's own")
    split: str = Field("test", description="split to evaluate")
    views: ViewsConfig | None = Field(None, description="test views; None takes the run's own")
    batch: int = Field(16, ge=1, description="clips per batch")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto takes CUDA where a GPU is present"
    )


class PredictRun(Section):
    """Class probabilities for video files with a finished run or an export folder."""

    stage: Literal["predict"] = "predict"
    run: str = Field(description="run folder or export folder to predict with")
    videos: tuple[str, ...] = Field(description="files, folders or URLs")
    output: str | None = Field(None, description="JSON-lines file for the predictions; None prints them only")
    top: int = Field(5, ge=1, description="classes listed per video")
    views: ViewsConfig = ViewsConfig()
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto takes CUDA where a GPU is present"
    )


class ExportRun(Section):
    """Write a run's weights as model.safetensors + config.json (+ model card) for others to load."""

    stage: Literal["export"] = "export"
    run: str = Field(description="run folder whose weights are exported")
    output: str = Field(description="folder to write")


class ReportRun(Section):
    """One self-contained HTML page about one or several runs."""

    stage: Literal["report"] = "report"
    runs: tuple[str, ...] = Field(min_length=1, description="run folders, or a demo folder")
    output: str = Field("report.html", description="HTML file to write")
    title: str | None = Field(None, description="page title; None is made from the runs")
    max_clips: int = Field(24, ge=0, description="sample clips embedded in the page")


class DemoRun(Section):
    """The whole chain on clips made on the spot."""

    stage: Literal["demo"] = "demo"
    output: str = Field("runs/demo", description="folder for videos, shards, runs and the report")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="seeds of the finetuning runs")
    size_pixels: int = Field(80, ge=48, description="side of the generated videos, pixels")
    train_per_class: int = Field(60, ge=2, description="training clips per action class")
    val_per_class: int = Field(4, ge=1, description="validation clips per action class")
    test_per_class: int = Field(20, ge=1, description="test clips per action class")
    unlabelled: int = Field(140, ge=4, description="unlabelled videos for transfer")
    transfer_steps: int = Field(200, ge=1, description="optimizer steps of transfer")
    finetune_steps: int = Field(300, ge=1, description="optimizer steps of each 3D finetuning run")
    frames_steps: int = Field(
        100, ge=1, description="optimizer steps of each run of the 2D baseline's classifier"
    )
    workers: int = Field(2, ge=1, description="processes that make and pack the videos")


RUNS: Mapping[str, type[Section]] = {
    "shard": ShardRun,
    "transfer": TransferRun,
    "pretrain": PretrainRun,
    "finetune": FinetuneRun,
    "evaluate": EvaluateRun,
    "predict": PredictRun,
    "export": ExportRun,
    "report": ReportRun,
    "demo": DemoRun,
}
