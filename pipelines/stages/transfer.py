"""Supervision transfer from images to clips (T3D paper, arXiv 1711.08200, section 3.2).

A frozen 2D teacher sees X frames of a clip, one at a time, and its features are averaged; a 3D student sees the
clip. A small head on both says whether they belong together. Positives: frames and clip of the same video at the
same time. Negatives: frames of a different video of the same global batch, formed in feature space, so that one
pass of each tower serves one positive and k negatives per clip.

Other objectives (``correspondence.objective``) take the teacher's features themselves as the target:
``feature_targets``.

The paper leaves open (and these are the choices here): two-way softmax cross-entropy as the loss, k = 1 so that
chance is 50 %, separate augmentation of frames and clip, a trainable projection where the teacher's width is not
``feature_dim``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from cliplift.configs.runs import TransferRun
from cliplift.configs.sections import ConfigError
from cliplift.configs.training import ModelConfig
from cliplift.models import create_model
from cliplift.models.correspondence import CorrespondenceHead, FeaturePredictor
from cliplift.models.protocol import InputSpec, VideoNetwork
from cliplift.models.registry import model_entry
from cliplift.pipelines.data.augment import DeviceAugment, recrop, redraw, subsample_frames
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.data.source import ClipSource
from cliplift.pipelines.distributed.collectives import Topology, all_gather_tensor
from cliplift.pipelines.engine.task import (
    SavedModel,
    StageModule,
    data_card,
    example_clips,
    network_weights,
)
from cliplift.pipelines.engine.telemetry import forward_flops, training_flops
from cliplift.pipelines.evaluation.over_split import over_split, validation_loader
from cliplift.pipelines.probes.pooled import probe
from cliplift.pipelines.runs.folder import RunFolder
from cliplift.pipelines.runs.retrieval import write_retrieval
from cliplift.pipelines.stages.feature_targets import FeatureTransfer, other_orders
from cliplift.pipelines.stages.matching import (
    HeldOut,
    SupervisionTransfer,
    draw_pairs,
    matching_metrics,
    send_to_device,
)
from cliplift.pipelines.stages.starting_weights import freeze_batchnorm, freeze_named, refuse_batchnorm
from cliplift.pipelines.stages.teacher import (
    Standardisation,
    Teachers,
    bank_of,
    build_teachers,
    cached_features,
    cosines,
    predictor_start,
)

log = logging.getLogger(__name__)

STATISTICS_SAMPLES = (
    2048  # clips that mean and deviation of a teacher asked anew for every clip are taken from
)


class TransferStage:
    """Supervision transfer as a stage."""

    best_metric = "matching_accuracy"
    needs_labels = False

    def __init__(self, run: TransferRun, *, classes: Sequence[str], topology: Topology) -> None:
        self.run, self.topology = run, topology
        self.classes: tuple[str, ...] = ()  # labels, where there are any, are not used
        self.clip_frames = run.data.sampling.frames
        self._held_out: HeldOut | None = None  # of the last evaluation

    @property
    def needs_videos(self) -> int:
        if self.run.correspondence.predicts_features:
            return 2  # held-out clips are matched with each other's frames
        return self.run.correspondence.negatives_per_clip + 1  # a clip's own, and one for each negative

    def networks(self) -> dict[str, str]:
        teachers = {f"{key}.name": one.name for key, one in self.run.teacher.by_key().items()}
        return {"model.name": self.run.model.name} | teachers

    def splits(self) -> dict[str, str]:
        return {} if self.run.data.val_share else {"data.val_split": self.run.data.val_split}

    @cached_property
    def built(self) -> StageModule:
        """The module with its starting weights, and the teacher on the device."""
        built = self.build_module(weights=True)
        assert built.frozen is not None
        built.frozen.to(self.topology.device)
        return built

    @cached_property
    def module(self) -> SupervisionTransfer | FeatureTransfer:
        module = cast(SupervisionTransfer | FeatureTransfer, self.built.module)
        if self.run.correspondence.predictor_start == "ridge":
            self._start_predictor(cast(FeatureTransfer, module))
        return module

    @torch.no_grad()
    def _start_predictor(self, module: FeatureTransfer) -> None:
        """First weights of the predictor, from the teacher's features and those of the student as it is. Collective."""
        run, matching = self.run, self.run.correspondence
        if not run.frozen_batchnorm:
            refuse_batchnorm(module.student, key="correspondence.predictor_start", value="ridge")
        student = module.student.to(self.topology.device).eval()
        few = None if run.teacher.cache_features else STATISTICS_SAMPLES
        table = self._table if few is None else self._plain_features(max_samples=few)
        taught = f"{run.model.model_dump_json()} {matching.model_dump_json()} {self._features_identity}"
        kept = predictor_start(
            lambda batch: student(self._clip_views[False](batch)),
            table,
            self._standard.to(table.device),
            run.data,
            steps=matching.time_steps,
            penalty=matching.ridge_penalty,
            batch=run.evaluation.batch,
            folder=Path(run.output),
            identity=f"{self._data_identity} {taught}",
            topology=self.topology,
            max_samples=few,
        )
        module.predictor.output.load_state_dict(kept)
        module.train()

    @property
    def teacher(self) -> Teachers:
        return cast(Teachers, self.built.frozen)

    def build_module(self, *, weights: bool) -> StageModule:
        run = self.run
        teacher = build_teachers(run.teacher, weights=weights)
        student = self._student(pretrained=run.model.pretrained if weights else None)
        if model_entry(run.model.name).dims != "3d":
            raise ConfigError(
                "is a 2D model; the student sees clips",
                key="model.name",
                value=run.model.name,
                hint="choose a 3D model from `cliplift models`",
            )
        if run.frozen_batchnorm:
            freeze_batchnorm(student)
        freeze_named(student, run.model.frozen)
        module = self._with_head(student, teacher)
        module.frozen_batchnorm = run.frozen_batchnorm
        return StageModule(module=module, network=student, frozen=teacher)

    def _with_head(self, student: VideoNetwork, teacher: Teachers) -> SupervisionTransfer | FeatureTransfer:
        matching = self.run.correspondence
        if matching.predicts_features:
            from_map = matching.predict_from == "map"
            if from_map:
                self._check_map(student)
            predictor = FeaturePredictor(
                student.feature_dim, teacher.feature_dim, steps=matching.predicted, from_map=from_map
            )
            return FeatureTransfer(student, predictor, matching, widths=teacher.feature_dims)
        head = CorrespondenceHead(
            student.feature_dim,
            teacher.feature_dim,
            embed_dim=matching.feature_dim,
            hidden=matching.hidden,
            normalise=matching.normalise_features,
            dropout=matching.dropout,
        )
        return SupervisionTransfer(student, head, matching)

    def _check_map(self, student: VideoNetwork) -> None:
        """Refuse a student without a map, or with one that cannot be cut into equal parts of time."""
        steps, data = self.run.correspondence.time_steps, self.run.data
        with torch.device("meta"), torch.no_grad():
            copy = self._student(pretrained=None).eval()
            clip = torch.zeros(1, 3, data.sampling.frames, data.crop_pixels, data.crop_pixels)
            shape = tuple(copy.forward_features(clip).shape)
        if len(shape) != 5:
            reason = f"{self.run.model.name} has no feature map over time and space"
        elif shape[1] != student.feature_dim:
            reason = f"the features of {self.run.model.name} are not the mean of its map"
        elif shape[2] % steps:
            reason = (
                f"the map of {self.run.model.name} has {shape[2]} times, which {steps} parts do not divide"
            )
        else:
            return
        raise ConfigError(
            reason,
            key="correspondence.predict_from",
            value="map",
            hint="use features, or another correspondence.time_steps",
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
        if run.correspondence.predicts_features:
            return self._example_targets(built, clips)
        k = run.correspondence.negatives_per_clip + run.correspondence.same_video_negatives
        pairs = torch.zeros(B, 1 + k, dtype=torch.int64)
        teacher_dim = cast(Teachers, built.frozen).feature_dim
        return {
            "clips": clips,
            "frame_features": torch.zeros(G, teacher_dim, dtype=clips.dtype),
            "pairs": pairs,
            "targets": torch.zeros_like(pairs),
            "clip_videos": torch.zeros(B, dtype=torch.int64),
            "frame_videos": torch.zeros(G, dtype=torch.int64),
        }

    def _example_targets(self, built: StageModule, clips: Tensor) -> dict[str, Tensor]:
        """Targets and, where it is used, a bank of two rows: how many it has is known only with the data."""
        matching, B = self.run.correspondence, len(clips)
        width = cast(Teachers, built.frozen).feature_dim
        found = {"clips": clips, "targets": torch.zeros(B, matching.predicted, width)}
        if matching.objective == "regression":
            return found
        row = torch.zeros(B, dtype=torch.int64)
        return found | {
            "bank": torch.zeros(2, matching.time_steps * width, dtype=torch.half),
            "bank_videos": torch.arange(2),
            "own": row,
            "clip_videos": row,
            "orders": torch.zeros(matching.order_negatives, matching.time_steps, dtype=torch.int64),
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
        if self.run.correspondence.predicts_features:
            return {"clips": clips} | self._targets(batch, features, step=step)
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

    def _targets(self, batch: ClipBatch, features: Tensor, *, step: int) -> dict[str, Tensor]:
        """What the module needs besides the clips to predict the teacher's features (B, S D)."""
        matching, device = self.run.correspondence, self.topology.device
        found = {"targets": self._standard(features, steps=matching.time_steps)}
        if matching.objective == "regression":
            return found
        bank, videos = self._bank
        orders = other_orders(matching.time_steps, matching.order_negatives, seed=self.run.seed, step=step)
        return found | {
            "bank": bank,
            "bank_videos": videos,
            "own": send_to_device(batch.sample_index, device),
            "clip_videos": send_to_device(batch.video_index, device),
            "orders": send_to_device(orders, device),
        }

    @cached_property
    def _table(self) -> Tensor:
        """The teacher's features (N, S D) of every training sample, where they are computed once."""
        return self._plain_features()

    def _plain_features(self, *, max_samples: int | None = None) -> Tensor:
        """The teacher's features of the training samples' plain middle clips."""
        teacher, data = self.run.teacher, self.run.data
        side = max((one.resize_pixels or 0 for one in teacher.by_key().values()), default=0) or None
        short = data.resize_short_side_pixels
        if teacher.cache_features and side is not None:  # as sharp as the stored picture is
            short = None if short is None else round(short * side / data.crop_pixels)
            data = data.model_copy(update={"crop_pixels": side, "resize_short_side_pixels": short})

        def features(batch: ClipBatch) -> Tensor:
            return self._teacher_features(self._frame_views[False](subsample_frames(batch, teacher.frames)))

        return cached_features(
            features,
            data,
            batch=self.run.evaluation.batch,
            folder=Path(self.run.output),
            identity=self._features_identity,
            topology=self.topology,
            max_samples=max_samples,
        )

    @property
    def _features_identity(self) -> str:
        """What the kept features depend on, besides the data."""
        data, steps = self.run.data, self.run.correspondence.time_steps
        words = [self.run.teacher.model_dump_json(), data.sampling.model_dump_json()]
        return " ".join([*words, f"{data.crop_pixels} of {data.resize_short_side_pixels}, {steps} parts"])

    @cached_property
    def _standard(self) -> Standardisation:
        """Mean and deviation of the teacher's features over the training samples, or some of them."""
        table = (
            self._table
            if self.run.teacher.cache_features
            else self._plain_features(max_samples=STATISTICS_SAMPLES)
        )
        matching = self.run.correspondence
        basis = matching.time_basis
        found = Standardisation.of(
            table,
            steps=matching.time_steps,
            folder=Path(self.run.output),
            identity=f"{self._data_identity} {self._features_identity}{'' if basis == 'parts' else f' {basis}'}",
            topology=self.topology,
            basis=cosines(matching.time_steps) if basis == "cosines" else None,
            spread=basis == "spread",
        )
        return found.to(self.topology.device)

    @cached_property
    def _bank(self) -> tuple[Tensor, Tensor]:
        """All clips' standardised features (N, S D) in fp16, mapped into memory on a CPU, and their videos (N,)."""
        device = self.topology.device
        bank = bank_of(
            self._table,
            self._standard.to(self._table.device),
            steps=self.run.correspondence.time_steps,
            widths=self.teacher.feature_dims,
            folder=Path(self.run.output),
            identity=f"{self._data_identity} {self._features_identity}",
            topology=self.topology,
        )
        return bank.to(device), torch.from_numpy(self._samples.video_index).to(device)

    @cached_property
    def _samples(self) -> ClipSource:
        """The training samples by number."""
        return ClipSource(self.run.data, split=self.run.data.split)

    @property
    def _data_identity(self) -> str:
        return self._samples.fingerprint

    def _towers(self, batch: ClipBatch, *, training: bool) -> tuple[Tensor, Tensor]:
        """The student's clips (B, C, T, H, W) and the teacher's averaged features (B, D)."""
        on_host, batch = batch, batch.to(self.topology.device)
        clips = self._clip_views[training](batch)
        if training and self.run.teacher.cache_features:
            return clips, send_to_device(self._table[on_host.sample_index], self.topology.device).float()
        frames = subsample_frames(batch, self.run.teacher.frames)
        if training and self.run.correspondence.independent_views:
            frames = redraw(frames)
            views = recrop(self._frame_views[True](frames), frames.draws)
        else:
            views = self._frame_views[training](frames)
        return clips, self._teacher_features(views)

    @torch.no_grad()
    def _teacher_features(self, clips: Tensor) -> Tensor:
        """(B, C, X, H, W) -> (B, S D): the mean of the teacher's features over the frames of each of S parts."""
        B, C, X, H, W = clips.shape
        frames = clips.transpose(1, 2).reshape(B * X, C, H, W)
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=frames.is_cuda):
            features = self.teacher(frames)
        parts = self.run.correspondence.time_steps
        averaged: Tensor = features.float().reshape(B * parts, X // parts, -1).mean(dim=1)
        return averaged.reshape(B, -1)

    @cached_property
    def flops_per_clip(self) -> float | None:
        """Operations of the student's training step on one clip, and of the teacher on its frames."""
        student = training_flops(
            forward_flops(
                self.run.model, classes=0, frames=self.clip_frames, crop_pixels=self.run.data.crop_pixels
            )
        )
        total, frames = student, self.run.teacher.frames or self.clip_frames
        for one in self.run.teacher.by_key().values():
            network = ModelConfig(name=one.name, options=dict(one.options))
            side = one.resize_pixels or self.run.data.crop_pixels
            frame = forward_flops(network, classes=0, crop_pixels=side)
            total = None if total is None or frame is None else total + frame * frames
        return total

    def clip_table(self, rows: int) -> None:
        """Matching has no class to show for a clip."""
        return

    @torch.no_grad()
    def evaluate(self, *, topology: Topology) -> dict[str, float]:
        """Matching accuracy, AUC and retrieval on the held-out videos, every clip once, over all ranks."""
        self._held_out = found = self._of_held_out(topology)
        metrics = matching_metrics(found.scores, videos=found.videos, seed=self.run.seed)
        if isinstance(self.module, FeatureTransfer):
            metrics["feature_cosine"] = self.module.mean_cosine(found.clips, found.frames)
        if self.run.probe is not None:
            metrics |= probe(self.module.student, self.run, self.run.probe, topology=topology)
        return metrics

    def _of_held_out(self, topology: Topology) -> HeldOut:
        """What both towers say of every held-out clip.

        Raises:
            ConfigError: they are of one video.
        """
        loader = validation_loader(self.run, self.run.data, topology)

        def forward(batch: ClipBatch) -> list[tuple[int, Tensor, Tensor]]:
            clips, frame_features = self._towers(batch, training=False)
            if self.run.correspondence.predicts_features:
                steps = self.run.correspondence.time_steps
                frame_features = self._standard(frame_features, steps=steps).flatten(1)
            clip_rows, frame_rows = self.module.clip_rows(clips).float().cpu(), frame_features.float().cpu()
            found = zip(batch.video_index.tolist(), clip_rows, frame_rows, strict=True)
            return [(video, clip.clone(), frame.clone()) for video, clip, frame in found]

        rows = over_split(loader, forward, topology)
        if len({video for _, (video, _, _) in rows}) < 2:
            raise ConfigError(
                f"split {self.run.data.val_split!r} holds one video; matching needs two",
                key="data.val_split",
                value=self.run.data.val_split,
                hint="shard more held-out videos",
            )
        return HeldOut.of(rows, loader.dataset, module=self.module, device=topology.device)

    @torch.no_grad()
    def finish(
        self, metrics: Mapping[str, float], *, topology: Topology, folder: RunFolder
    ) -> dict[str, float]:
        """Say whether a coin could have reached the matching accuracy: then the transfer has failed."""
        accuracy, above = metrics["matching_accuracy"], metrics["above_chance_sigmas"] > 3
        verdict = "above chance" if above else "NOT above chance: the transfer has failed"
        if topology.is_main:
            text = f"matching accuracy {accuracy:.3f} on held-out videos, prior 0.500 ({verdict})"
            print(f"{self.run.name}: {text}", flush=True)
        if self._held_out is None:  # stopped after the last evaluation, and started again
            self.module.eval()
            self._held_out = self._of_held_out(topology)
        if topology.is_main:
            write_retrieval(self._held_out.retrieval(), folder.path)
        return dict(metrics)

    def trained_network(self, weights: Mapping[str, Tensor]) -> SavedModel:
        """The student alone."""
        with torch.device("meta"):
            student = self._student(pretrained=None)
        card = data_card(self.run, self.run.data)
        return SavedModel(
            network=student,
            options=dict(self.run.model.options),
            card=card,
            weights=network_weights(weights, prefix="student."),
        )
