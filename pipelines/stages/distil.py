"""Pretraining without labels: image teachers' features of every place of a clip, learned token by token.

Objective ``distil`` of the pretrain stage: of the visible tokens (Unmasked Teacher, arXiv 2303.16058) or of the hidden
ones (Masked Video Distillation, 2212.04500). The nets and their losses are in ``models/video_vit/distil.py``. Teachers
are those of supervision transfer: section ``teacher``, frozen, in eval mode, beside the module and in no checkpoint.

A teacher sees one frame for each token of time, the first of its tubelet or all of them averaged, in the pixels the
student sees. Its map is brought to the student's grid (``models/video_vit/distil.py``).

A clip's mask is a function of (seed, epoch, position), and with ``mask: attention`` of the teacher's attention to that
clip. On a CPU teachers are asked clip by clip, so that what they say of a clip does not depend on its neighbours to the
last bit.

Shape letters: B clips, C channels, T H W frames and pixels, N tokens of a clip, t rows columns of its grid, n visible,
m hidden, K maps of a teacher, F widths of all teachers' maps together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cliplift.configs.objectives import DistilConfig, MaskedConfig
from cliplift.configs.runs import PretrainRun
from cliplift.configs.sections import ConfigError
from cliplift.configs.training import ModelConfig
from cliplift.models import create_model
from cliplift.models.protocol import InputSpec, ModelError, VideoNetwork
from cliplift.models.video_vit.decoder import other_tokens
from cliplift.models.video_vit.distil import (
    Distilled,
    HiddenPrediction,
    VisibleAlignment,
    image_targets,
    on_grid,
)
from cliplift.models.video_vit.masks import MaskDraws, weighted_mask
from cliplift.models.video_vit.model import VideoViT
from cliplift.models.video_vit.positions import TokenGrid
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.engine.task import (
    OF_CLIP,
    SavedModel,
    StageModule,
    data_card,
    example_clips,
    network_weights,
)
from cliplift.pipelines.engine.telemetry import forward_flops, training_flops
from cliplift.pipelines.evaluation.over_split import over_split, validation_loader
from cliplift.pipelines.probes.pooled import probe
from cliplift.pipelines.stages.masked import ClipMasks, HiddenTokensStage, pretraining_options
from cliplift.pipelines.stages.matching import send_to_device
from cliplift.pipelines.stages.starting_weights import freeze_named, initialise_from
from cliplift.pipelines.stages.teacher import Teachers, build_teachers, renormalised, resized

# How the names of the networks that can be pretrained like this begin, and the options they need for it.
ALIGNABLE: Mapping[str, Mapping[str, Any]] = {"video_vit_": {"final_norm": "tokens"}, "vjepa2_": {}}


class FeatureDistillation(nn.Module):
    """Encoder with aligners or decoders, and the loss: what is trained."""

    def __init__(self, distillation: VisibleAlignment | HiddenPrediction) -> None:
        super().__init__()
        self.distillation = distillation

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``clips`` (B, C, T, H, W), ``visible`` (B, n), ``targets`` (B, K, n or m, F) -> the loss and the mean cosine
        of guesses and targets, and those of each clip (B,)."""
        found = self.distil(inputs)
        return {
            "loss": found.loss,
            f"loss{OF_CLIP}": found.loss_of_clip.detach(),
            "feature_cosine": found.cosine_of_clip.mean(),
            f"feature_cosine{OF_CLIP}": found.cosine_of_clip,
        }

    def distil(self, inputs: Mapping[str, Tensor]) -> Distilled:
        """The losses of the clips."""
        return cast(Distilled, self.distillation(**inputs))


class TokenTeachers:
    """The frozen teachers asked for every token of a clip."""

    def __init__(self, teachers: Teachers, config: DistilConfig, *, grid: TokenGrid, tubelet: int) -> None:
        self.teachers, self.config, self.grid, self.tubelet = teachers, config, grid, tubelet

    @torch.no_grad()
    def __call__(self, clips: Tensor, spec: InputSpec) -> tuple[Tensor, Tensor]:
        """Clips (B, C, T, H, W), normalised as ``spec`` says -> the teachers' features of all tokens (B, K, N, F), and
        the first teacher's attention to them (B, N), fp32."""
        # On a CPU a clip by itself: in a batch the last bits of its features would depend on its neighbours.
        parts = torch.split(clips, 1) if clips.device.type == "cpu" else (clips,)
        found = [self._of_clips(part, spec) for part in parts]
        return torch.cat([features for features, _ in found]), torch.cat([seen for _, seen in found])

    def _of_clips(self, clips: Tensor, spec: InputSpec) -> tuple[Tensor, Tensor]:
        step = self.tubelet if self.config.teacher_frames == "first" else 1
        frames = clips[:, :, ::step].transpose(1, 2).flatten(0, 1)  # (B X, C, H, W)
        features, attention = [], None
        for network, side, own in zip(
            self.teachers.networks, self.teachers.sides, self.teachers.specs, strict=True
        ):
            seen = renormalised(resized(frames, side), spec, own)
            with torch.autocast(seen.device.type, torch.bfloat16, enabled=seen.is_cuda):
                maps, counted = image_targets(cast(VideoNetwork, network), seen, layers=self.config.layers)
            features.append(torch.stack([self._by_token(one, len(clips)) for one in maps], dim=1))
            if attention is None:
                attention = self._by_token(counted[:, None], len(clips))[..., 0]
        assert attention is not None  # there is a first teacher
        return torch.cat(features, dim=-1), attention

    def _by_token(self, maps: Tensor, clips: int) -> Tensor:
        """Maps of the frames (B X, D, h, w) -> (B, N, D)."""
        placed = on_grid(maps.float(), self.grid.rows, self.grid.columns)
        of_time = torch.unflatten(placed, 0, (clips, self.grid.frames, -1)).mean(
            dim=2
        )  # (B, t, D, rows, columns)
        return of_time.flatten(3).transpose(2, 3).flatten(1, 2)


class DistilStage(HiddenTokensStage):
    """Distillation as a stage. A probe or ``feature_cosine`` chooses the best weights."""

    without_probe = "feature_cosine"

    def networks(self) -> dict[str, str]:
        teachers = {f"{key}.name": one.name for key, one in self.run.teacher.by_key().items()}
        return super().networks() | teachers

    @cached_property
    def built(self) -> StageModule:
        """The module with its starting weights, and the teachers on the device."""
        built = self.build_module(weights=True)
        assert built.frozen is not None
        built.frozen.to(self.topology.device)
        return built

    def build_module(self, *, weights: bool) -> StageModule:
        run = self.run
        encoder = build_encoder(run, pretrained=run.model.pretrained if weights else None)
        if weights and run.initialise_from is not None:
            initialise_from(encoder, run.initialise_from)
        grid = self._grid(encoder)
        self._masks_of(grid)  # what cannot be masked is refused here
        freeze_named(encoder, run.model.frozen)
        teachers = build_teachers(run.teacher, weights=weights)
        distillation = with_targets(encoder, run.distil, widths=teacher_widths(run, grid))
        return StageModule(module=FeatureDistillation(distillation), network=encoder, frozen=teachers)

    def _grid(self, encoder: VideoViT) -> TokenGrid:
        return encoder.grid(self.run.data.sampling.frames, self.run.data.crop_pixels)

    def _masks_of(self, grid: TokenGrid) -> ClipMasks:
        config = self.run.distil
        # of a mask that follows attention as many tokens are hidden as of tubes
        kind = "tube" if config.mask == "attention" else config.mask
        masked = MaskedConfig(mask=kind, ratio=config.ratio)
        return ClipMasks(config=masked, grid=grid, seed=self.run.seed, section="distil")

    @cached_property
    def _masks(self) -> ClipMasks:
        return self._masks_of(self._grid(cast(VideoViT, self.built.network)))

    @cached_property
    def _teachers(self) -> TokenTeachers:
        encoder = cast(VideoViT, self.built.network)
        teachers = cast(Teachers, self.built.frozen)
        return TokenTeachers(teachers, self.run.distil, grid=self._masks.grid, tubelet=encoder.tubelet)

    def example_inputs(self, built: StageModule, *, micro_batch: int, world_size: int) -> dict[str, Tensor]:
        run, config = self.run, self.run.distil
        masks = self._masks_of(self._grid(cast(VideoViT, built.network)))
        width = sum(cast(VisibleAlignment | HiddenPrediction, cast(Any, built.module).distillation).widths)
        tokens = masks.visible if config.tokens == "visible" else masks.grid.tokens - masks.visible
        return {
            "clips": example_clips(run, run.data, run.model.name, micro_batch=micro_batch),
            "visible": torch.zeros(micro_batch, masks.visible, dtype=torch.int64),
            "targets": torch.zeros(micro_batch, config.layers, tokens, width),
        }

    def inputs(self, batch: ClipBatch, *, training: bool, step: int) -> dict[str, Tensor]:
        """A micro-batch as the module's inputs; masks are drawn on the host, but those that follow attention."""
        device, masks = self.topology.device, self._masks
        clips = self.views[training](batch.to(device))
        features, attention = self._teachers(clips, self.built.network.input_spec)
        if self.run.distil.mask == "attention":
            draws = MaskDraws(self.run.seed, batch.epochs, batch.positions)
            hidden = weighted_mask(masks.grid, draws, attention, ratio=self.run.distil.ratio)
            order = hidden.long().argsort(dim=1, stable=True)
            visible = order[:, : masks.visible]
        else:
            numbers = masks.numbers(epochs=batch.epochs, positions=batch.positions)["visible"]
            visible = send_to_device(numbers, device)
        return {"clips": clips, "visible": visible, "targets": self._at(features, visible)}

    def _at(self, features: Tensor, visible: Tensor) -> Tensor:
        """Of the features of all tokens (B, K, N, F) those that are learned: at ``visible`` (B, n), or elsewhere."""
        places = visible
        if self.run.distil.tokens == "hidden":
            places = other_tokens(visible, features.shape[2])
        return features.gather(
            2, places[:, None, :, None].expand(-1, features.shape[1], -1, features.shape[3])
        )

    @torch.no_grad()
    def evaluate(self, *, topology: Topology) -> dict[str, float]:
        """Loss and cosine on the validation split, every clip once, over all ranks. A clip has the same mask every
        time."""
        loader = validation_loader(self.run, self.run.data, topology)
        module = cast(FeatureDistillation, self.module)

        def forward(batch: ClipBatch) -> list[tuple[float, float]]:
            found = module.distil(self.inputs(batch, training=False, step=0))
            rows = torch.stack([found.loss_of_clip, found.cosine_of_clip], dim=1).double().tolist()
            return [(loss, cosine) for loss, cosine in rows]

        everything = over_split(loader, forward, topology)
        self._last = [(loader.dataset.facts(sample).key, loss) for sample, (loss, _) in everything]
        losses, cosines = zip(*(clip for _, clip in everything), strict=True)
        metrics = {
            "loss": sum(losses) / len(losses),
            "feature_cosine": sum(cosines) / len(cosines),
            "samples": float(len(losses)),
        }
        if self.run.probe is not None:
            metrics |= probe(self.built.network, self.run, self.run.probe, topology=topology)
        return metrics

    @cached_property
    def flops_per_clip(self) -> float | None:
        """Operations of a training step on one clip, of the tokens it computes, and of the teachers on its frames."""
        with torch.device("meta"), torch.no_grad():
            built = self.build_module(weights=False)  # not counted: the teachers' maps are looked at
            with FlopCounterMode(display=False) as counter:
                built.module(self.example_inputs(built, micro_batch=1, world_size=1))
        total = training_flops(float(counter.get_total_flops()))
        encoder = cast(VideoViT, built.network)
        frames = self.run.data.sampling.frames
        frames //= encoder.tubelet if self.run.distil.teacher_frames == "first" else 1
        for one in self.run.teacher.by_key().values():
            network = ModelConfig(name=one.name, options=dict(one.options))
            frame = forward_flops(
                network, classes=0, crop_pixels=one.resize_pixels or self.run.data.crop_pixels
            )
            total = None if total is None or frame is None else total + frame * frames
        return total

    def trained_network(self, weights: Mapping[str, Tensor]) -> SavedModel:
        """The encoder alone: `initialise_from` of another run reads it."""
        with torch.device("meta"):
            encoder = build_encoder(self.run, pretrained=None)
        card = data_card(self.run, self.run.data)
        card["objective"], card["distil"] = "distil", self.run.distil.model_dump(mode="json")
        return SavedModel(
            network=encoder,
            options=pretraining_options(self.run, ALIGNABLE, what="by distillation"),
            card=card,
            weights=network_weights(weights, prefix="distillation.encoder."),
        )


def build_encoder(run: PretrainRun, *, pretrained: str | None) -> VideoViT:
    """The run's network without a classifier, of tokens that can be left out.

    Raises:
        ConfigError: the model or its options are not for distillation.
    """
    options = pretraining_options(run, ALIGNABLE, what="by distillation")
    network = create_model(
        run.model.name, num_classes=0, in_frames=run.data.sampling.frames, pretrained=pretrained, **options
    )
    assert isinstance(network, VideoViT)  # pretraining_options knows no others
    return network


def teacher_widths(run: PretrainRun, grid: TokenGrid) -> tuple[int, ...]:
    """Channels of each teacher's map, found by asking it for one frame without memory.

    Raises:
        ConfigError: a teacher has no map, or one that does not fit the student's grid; names the key.
    """
    with torch.device("meta"), torch.no_grad():
        teachers = build_teachers(run.teacher, weights=False)
        widths = []
        for (key, one), network in zip(run.teacher.by_key().items(), teachers.networks, strict=True):
            side = one.resize_pixels or run.data.crop_pixels
            try:
                maps, _ = image_targets(
                    cast(VideoNetwork, network), torch.zeros(1, 3, side, side), layers=run.distil.layers
                )
            except ModelError as error:
                raise ConfigError(str(error), key=f"{key}.name", value=one.name, hint=_ABOUT_MAPS) from None
            try:
                on_grid(maps[-1], grid.rows, grid.columns)
            except ModelError as error:
                raise ConfigError(
                    f"{one.name} sees {side} pixels and gives {error}",
                    key=f"{key}.resize_pixels",
                    value=one.resize_pixels,
                    hint=f"use {-(-grid.rows * side // maps[-1].shape[2])}",
                ) from None
            widths.append(int(maps[-1].shape[1]))
    return tuple(widths)


_ABOUT_MAPS = "choose another teacher, or distil.layers=1"


def with_targets(
    encoder: VideoViT, config: DistilConfig, *, widths: Sequence[int]
) -> VisibleAlignment | HiddenPrediction:
    """The encoder with aligners, or with decoders of the configured size or the published one.

    Raises:
        ConfigError: sizes that do not go together.
    """
    distance = config.distance
    try:
        if config.tokens == "visible":
            return VisibleAlignment(
                encoder,
                widths,
                layers=config.layers,
                distance=distance,
                normalise=config.normalise_targets,
            )
        return HiddenPrediction(
            encoder,
            widths,
            width=config.decoder_width or encoder.feature_dim,
            depth=config.decoder_depth,
            heads=config.decoder_heads or encoder.spec.heads,
            distance=distance,
            normalise=config.normalise_targets,
        )
    except ModelError as error:
        key, value = (
            ("distil.layers", config.layers)
            if config.tokens == "visible"
            else ("distil.decoder_width", config.decoder_width)
        )
        raise ConfigError(f"do not go together: {error}", key=key, value=value) from None
