"""The module a stage trains and a batch for it, without data, weights from files or processes: to measure it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from cliplift.configs.runs import ClassificationRun, FinetuneRun, PretrainRun, TransferRun
from cliplift.models import VideoNetwork, create_model
from cliplift.models.correspondence import CorrespondenceHead
from cliplift.models.layers import checkpoint_blocks
from cliplift.models.registry import model_entry
from cliplift.pipelines.stages.classification import Classifier, freeze_all_but_head
from cliplift.pipelines.stages.forecast import Forecasting, build_forecaster
from cliplift.pipelines.stages.matching import SupervisionTransfer

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def build_module(run: TransferRun | ClassificationRun, *, classes: int) -> tuple[nn.Module, nn.Module | None]:
    """The module a stage trains, and its frozen teacher, without weights from files."""
    options = dict[str, Any](run.model.options)
    frames = run.data.sampling.frames
    if isinstance(run, PretrainRun) and run.objective == "forecast":
        forecaster = build_forecaster(run, pretrained=None)
        return _prepared(Forecasting(forecaster, run.forecast), forecaster, run), None
    if isinstance(run, ClassificationRun):
        network = create_model(run.model.name, num_classes=classes, in_frames=frames, **options)
        if isinstance(run, FinetuneRun) and run.train_part == "head":
            freeze_all_but_head(network)
        multi_label = run.task == "multi_label"
        module: nn.Module = Classifier(network, label_smoothing=run.label_smoothing, multi_label=multi_label)
        return _prepared(module, network, run), None
    student: Any = create_model(run.model.name, num_classes=0, in_frames=frames, **options)
    teacher: Any = create_model(run.teacher.name, num_classes=0, **dict[str, Any](run.teacher.options))
    matching = run.correspondence
    head = CorrespondenceHead(
        student.feature_dim,
        cast(int, teacher.feature_dim),
        embed_dim=matching.feature_dim,
        hidden=matching.hidden,
        normalise=matching.normalise_features,
        dropout=matching.dropout,
    )
    return _prepared(SupervisionTransfer(student, head, matching), student, run), teacher


def _prepared(module: nn.Module, network: VideoNetwork, run: TransferRun | ClassificationRun) -> nn.Module:
    """As the engine prepares it: weights cast, blocks recomputed."""
    dtype = HALF.get(run.engine.precision)
    if dtype is not None:
        module = module.to(dtype)
    if run.engine.checkpoint_blocks_share:
        checkpoint_blocks(network, run.engine.checkpoint_blocks_share)
    return module.train()


def stage_inputs(
    run: TransferRun | ClassificationRun,
    *,
    classes: int,
    teacher_dim: int,
    micro_batch: int,
    world_size: int,
) -> dict[str, Tensor]:
    """A micro-batch of the shapes the stage's module gets; ``teacher_dim`` is the width of the teacher's features."""
    B, T, side = micro_batch, run.data.sampling.frames, run.data.crop_pixels
    dtype = HALF.get(run.engine.precision, torch.float32)
    clips = torch.zeros(B, 3, T, side, side, dtype=dtype)
    if run.engine.channels_last:
        clips = clips.contiguous(memory_format=torch.channels_last_3d)
    if model_entry(run.model.name).dims == "2d":
        clips = clips[:, :, 0]
    if isinstance(run, ClassificationRun):
        inputs = {"clips": clips, "labels": torch.zeros(B, dtype=torch.int64)}
        if run.task == "multi_label" or run.data.augment.mixup_alpha or run.data.augment.cutmix_alpha:
            inputs["targets"] = torch.zeros(B, classes)
        return inputs
    G = B * world_size
    k = run.correspondence.negatives_per_clip + run.correspondence.same_video_negatives
    pairs = torch.zeros(B, 1 + k, dtype=torch.int64)
    videos = torch.zeros(B, dtype=torch.int64)
    return {
        "clips": clips,
        "frame_features": torch.zeros(G, teacher_dim, dtype=dtype),
        "pairs": pairs,
        "targets": torch.zeros_like(pairs),
        "clip_videos": videos,
        "frame_videos": torch.zeros(G, dtype=torch.int64),
    }
