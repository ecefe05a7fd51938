"""Supervision transfer from images to clips (T3D paper, arXiv 1711.08200, section 3.2).

A frozen 2D teacher sees X frames of a clip, one at a time, and its features are averaged; a 3D student sees the
clip. A small head on both says whether they belong together. Positives: frames and clip of the same video at the
same time. Negatives: frames of a different video of the same global batch, formed in feature space, so that one
pass of each tower serves one positive and k negatives per clip.

The paper leaves open (and these are the choices here): two-way softmax cross-entropy as the loss, k = 1 so that
chance is 50 %, separate augmentation of frames and clip, a trainable projection where the teacher's width is not
``feature_dim``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliplift.configs.data import ViewsConfig
from cliplift.configs.runs import TransferRun
from cliplift.configs.sections import ConfigError
from cliplift.configs.training import ModelConfig
from cliplift.models import create_model
from cliplift.models.correspondence import CorrespondenceHead
from cliplift.models.protocol import InputSpec, VideoNetwork
from cliplift.models.registry import model_entry
from cliplift.pipelines.data.augment import DeviceAugment
from cliplift.pipelines.data.loader import ClipBatch, EvalLoader
from cliplift.pipelines.distributed.collectives import Topology, all_gather_tensor
from cliplift.pipelines.engine.task import (
    SavedModel,
    StageModule,
    data_card,
    example_clips,
    network_weights,
)
from cliplift.pipelines.engine.telemetry import forward_flops, training_flops
from cliplift.pipelines.evaluation.over_split import over_split
from cliplift.pipelines.runs.folder import RunFolder
from cliplift.pipelines.stages.matching import SupervisionTransfer, draw_pairs, matching_metrics, sent
from cliplift.pipelines.stages.probe import probe
from cliplift.pipelines.stages.starting_weights import freeze_named
from cliplift.pipelines.stages.teacher import cached_features

log = logging.getLogger(__name__)


class TransferStage:
    """Supervision transfer as a stage."""

    best_metric = "matching_accuracy"
    needs_labels = False

    def __init__(self, run: TransferRun, *, classes: Sequence[str], topology: Topology) -> None:
        self.run, self.topology = run, topology
        self.classes: tuple[str, ...] = ()  # labels, where there are any, are not used
        self.clip_frames = run.data.sampling.frames

    @property
    def needs_videos(self) -> int:
        return self.run.correspondence.negatives_per_clip + 1  # a clip's own, and one for each negative

    def networks(self) -> dict[str, str]:
        return {"model.name": self.run.model.name, "teacher.name": self.run.teacher.name}

    def splits(self) -> dict[str, str]:
        return {} if self.run.data.val_share else {"data.val_split": self.run.data.val_split}

    @cached_property
    def built(self) -> StageModule:
        """The module with its starting weights, and the teacher on the device."""
        built = self.build_module(weights=True)
        assert built.frozen is not None
        built.frozen.to(self.topology.device)
        return built

    @property
    def module(self) -> SupervisionTransfer:
        return cast(SupervisionTransfer, self.built.module)

    @property
    def teacher(self) -> VideoNetwork:
        return cast(VideoNetwork, self.built.frozen)

    def build_module(self, *, weights: bool) -> StageModule:
        run, matching = self.run, self.run.correspondence
        teacher = _build_teacher(run, pretrained=run.teacher.pretrained if weights else None)
        student = self._student(pretrained=run.model.pretrained if weights else None)
        if model_entry(run.model.name).dims != "3d":
            raise ConfigError(
                "is a 2D model; the student sees clips",
                key="model.name",
                value=run.model.name,
                hint="choose a 3D model from `cliplift models`",
            )
        freeze_named(student, run.model.frozen)
        head = CorrespondenceHead(
            student.feature_dim,
            cast(int, teacher.feature_dim),
            embed_dim=matching.feature_dim,
            hidden=matching.hidden,
            normalise=matching.normalise_features,
            dropout=matching.dropout,
        )
        return StageModule(
            module=SupervisionTransfer(student, head, matching), network=student, frozen=teacher
        )

    def _student(self, *, pretrained: str | None) -> VideoNetwork:
        run = self.run
        return create_model(
            run.model.name,
            num_classes=0,
            in_frames=run.data.sampling.frames,
            pretrained=pretrained,
            **run.model.options,
        )

    def example_inputs(self, built: StageModule, *, micro_batch: int, world_size: int) -> dict[str, Tensor]:
        run, B, G = self.run, micro_batch, micro_batch * world_size
        clips = example_clips(run, run.data, run.model.name, micro_batch=B)
        k = run.correspondence.negatives_per_clip + run.correspondence.same_video_negatives
        pairs = torch.zeros(B, 1 + k, dtype=torch.int64)
        teacher_dim = cast(VideoNetwork, built.frozen).feature_dim
        return {
            "clips": clips,
            "frame_features": torch.zeros(G, teacher_dim, dtype=clips.dtype),
            "pairs": pairs,
            "targets": torch.zeros_like(pairs),
            "clip_videos": torch.zeros(B, dtype=torch.int64),
            "frame_videos": torch.zeros(G, dtype=torch.int64),
        }

    @cached_property
    def _clip_views(self) -> dict[bool, DeviceAugment]:
        return self._augment(self.built.network.input_spec)

    @cached_property
    def _frame_views(self) -> dict[bool, DeviceAugment]:
        return self._augment(self.teacher.input_spec)

    def _augment(self, spec: InputSpec) -> dict[bool, DeviceAugment]:
        config = self.run.data.augment
        return {training: DeviceAugment(config, spec, training=training) for training in (True, False)}

    def inputs(self, batch: ClipBatch, *, training: bool, step: int) -> dict[str, Tensor]:
        """A micro-batch as the module's inputs; the teacher's features of all ranks are gathered here."""
        clips, features = self._towers(batch, training=training)
        frame_features = all_gather_tensor(features, self.topology)
        videos = all_gather_tensor(batch.video_index, self.topology)
        rows = torch.arange(len(features), device=features.device) + self.topology.rank * len(features)
        pairs = draw_pairs(
            videos=videos,
            rows=rows,
            negatives=self.run.correspondence.negatives_per_clip,
            same_video=self.run.correspondence.same_video_negatives,
            seed=self.run.seed,
            step=step,
        )
        return {
            "clips": clips,
            "frame_features": frame_features,
            "pairs": pairs.frames,
            "targets": pairs.targets,
            "clip_videos": batch.video_index,
            "frame_videos": videos,
        }

    @cached_property
    def _table(self) -> Tensor:
        """The teacher's features of every training sample, where they are computed once."""
        teacher = self.run.teacher

        def features(batch: ClipBatch) -> Tensor:
            return self._teacher_features(self._frame_views[False](subsampled(batch, teacher.frames)))

        return cached_features(
            features,
            self.run.data,
            batch=self.run.evaluation.batch,
            folder=Path(self.run.output),
            identity=" ".join(
                [
                    teacher.model_dump_json(),
                    self.run.data.sampling.model_dump_json(),
                    str(self.run.data.crop_pixels),
                ]
            ),
            topology=self.topology,
        )

    def _towers(self, batch: ClipBatch, *, training: bool) -> tuple[Tensor, Tensor]:
        """The student's clips (B, C, T, H, W) and the teacher's averaged features (B, D)."""
        on_host, batch = batch, batch.to(self.topology.device)
        clips = self._clip_views[training](batch)
        if training and self.run.teacher.cache_features:
            return clips, sent(self._table[on_host.sample_index], self.topology.device).float()
        frames = subsampled(batch, self.run.teacher.frames)
        if training and self.run.correspondence.independent_views:
            frames = redrawn(frames)
            views = recropped(self._frame_views[True](frames), frames.draws)
        else:
            views = self._frame_views[training](frames)
        return clips, self._teacher_features(views)

    @torch.no_grad()
    def _teacher_features(self, clips: Tensor) -> Tensor:
        """(B, C, X, H, W) -> (B, D): the mean over the X frames of the teacher's features."""
        B, C, X, H, W = clips.shape
        frames = clips.transpose(1, 2).reshape(B * X, C, H, W)
        side = self.run.teacher.resize_pixels
        if side is not None and side != H:
            frames = F.interpolate(
                frames, size=(side, side), mode="bilinear", antialias=side < H, align_corners=False
            )
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=frames.is_cuda):
            features = self.teacher(frames)
        averaged: Tensor = features.float().reshape(B, X, -1).mean(dim=1)
        return averaged

    @cached_property
    def flops_per_clip(self) -> float | None:
        """Operations of the student's training step on one clip, and of the teacher on its frames."""
        student = training_flops(
            forward_flops(
                self.run.model, classes=0, frames=self.clip_frames, crop_pixels=self.run.data.crop_pixels
            )
        )
        teacher = ModelConfig(name=self.run.teacher.name, options=dict(self.run.teacher.options))
        side = self.run.teacher.resize_pixels or self.run.data.crop_pixels
        frame = forward_flops(teacher, classes=0, crop_pixels=side)
        if student is None or frame is None:
            return None
        return student + frame * (self.run.teacher.frames or self.clip_frames)

    def clip_table(self, rows: int) -> None:
        """Matching has no class to show for a clip."""
        return

    @torch.no_grad()
    def evaluate(self, *, topology: Topology) -> dict[str, float]:
        """Matching accuracy, AUC and retrieval on the held-out videos, every clip once, over all ranks."""
        one_view = self.run.data.model_copy(update={"views": ViewsConfig()})
        loader = EvalLoader(
            one_view,
            split=self.run.data.val_split,
            batch=self.run.evaluation.batch,
            rank=topology.rank,
            world_size=topology.world_size,
            max_samples=self.run.evaluation.max_samples,
        )

        def forward(batch: ClipBatch) -> list[tuple[int, Tensor, Tensor]]:
            clips, frame_features = self._towers(batch, training=False)
            clip_rows, frame_rows = self.module.student(clips).float().cpu(), frame_features.float().cpu()
            found = zip(batch.video_index.tolist(), clip_rows, frame_rows, strict=True)
            return [(video, clip.clone(), frame.clone()) for video, clip, frame in found]

        everything = [value for _, value in over_split(loader, forward, topology)]
        if len({row[0] for row in everything}) < 2:
            raise ConfigError(
                f"split {self.run.data.val_split!r} holds one video; matching needs two",
                key="data.val_split",
                value=self.run.data.val_split,
                hint="shard more held-out videos",
            )
        device = topology.device
        metrics = matching_metrics(
            self.module,
            clips=torch.stack([row[1] for row in everything]).to(device),
            frames=torch.stack([row[2] for row in everything]).to(device),
            videos=torch.tensor([row[0] for row in everything], device=device),
            seed=self.run.seed,
        )
        if self.run.probe is not None:
            metrics |= probe(self.module.student, self.run, self.run.probe, topology=topology)
        return metrics

    def finish(
        self, metrics: Mapping[str, float], *, topology: Topology, folder: RunFolder
    ) -> dict[str, float]:
        """Say whether a coin could have reached the matching accuracy: then the transfer has failed."""
        accuracy, above = metrics["matching_accuracy"], metrics["above_chance_sigmas"] > 3
        verdict = "above chance" if above else "NOT above chance: the transfer has failed"
        if topology.is_main:
            text = f"matching accuracy {accuracy:.3f} on held-out videos, prior 0.500 ({verdict})"
            print(f"{self.run.name}: {text}", flush=True)
        return dict(metrics)

    def trained_network(self, weights: Mapping[str, Tensor]) -> SavedModel:
        """The student alone."""
        student = self._student(pretrained=None)
        student.load_state_dict(network_weights(weights, prefix="student."))
        card = data_card(self.run, self.run.data)
        return SavedModel(network=student, options=dict(self.run.model.options), card=card)


def subsampled(batch: ClipBatch, frames: int | None) -> ClipBatch:
    """The batch with X frames of each clip, spread evenly over it (the middle one for X = 1)."""
    T = batch.clips.shape[1]
    if frames is None or frames == T:
        return batch
    at = ((torch.arange(frames, dtype=torch.float64) + 0.5) * T / frames).long().to(batch.clips.device)
    return replace(batch, clips=batch.clips[:, at])


def redrawn(batch: ClipBatch) -> ClipBatch:
    """The same clips with other augmentation draws, still a function of the old ones (so of seed, epoch, sample)."""
    return replace(batch, draws=(batch.draws.double() * 1009.0 + 0.6180339887).frac().to(batch.draws.dtype))


def recropped(clips: Tensor, draws: Tensor, *, smallest: float = 0.7) -> Tensor:
    """Cut another box out of each clip, side ``smallest`` to 1 of the frame, and resize it back: (B, C, X, H, W).

    The crop of the worker is shared by frames and clip; this one decorrelates their geometry.
    """
    B, C, X, H, W = clips.shape
    draws = draws.to(clips.device, non_blocking=True)
    a, b, c = (draws[:, -1 - i].float() for i in range(3))
    side = smallest + (1 - smallest) * a
    theta = clips.new_zeros(B, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, 0, 2] = (1 - side) * (2 * b - 1)
    theta[:, 1, 2] = (1 - side) * (2 * c - 1)
    grid = F.affine_grid(theta, [B, C, H, W], align_corners=False)
    flat = F.grid_sample(
        clips.reshape(B, C * X, H, W), grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return flat.reshape(B, C, X, H, W)


def _build_teacher(run: TransferRun, *, pretrained: str | None) -> nn.Module:
    """The frozen 2D teacher, in eval mode for good (BatchNorm statistics included)."""
    if model_entry(run.teacher.name).dims != "2d":
        raise ConfigError(
            "is not a 2D model",
            key="teacher.name",
            value=run.teacher.name,
            hint="the teacher sees single frames; `cliplift models` shows which models are 2D",
        )
    teacher = create_model(
        run.teacher.name,
        num_classes=0,
        in_frames=None,
        pretrained=pretrained,
        **run.teacher.options,
    )
    return teacher.eval().requires_grad_(False)
