"""Pretraining without labels: hide blocks of a clip, and predict the features a teacher gives them.

Objective ``latent`` of the pretrain stage: V-JEPA 2 (arXiv 2506.09985), and the dense loss of V-JEPA 2.1. The networks
and their loss are in ``models/video_vit``. The teacher follows the encoder by a moving average that the training loop
makes after each step; it is what the run leaves behind.

A clip's masks are functions of (seed, epoch, position), as in ``masked``, and so, for equal weights, is its loss. The
released rule for the lists of a batch, which depends on the micro-batch, is there by name.

Shape letters: B clips, C channels, T H W frames and pixels, N tokens of a clip, n of its context, m hidden, F width of
what is predicted.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from cliplift.configs.objectives import LatentConfig
from cliplift.configs.runs import PretrainRun
from cliplift.configs.sections import ConfigError
from cliplift.models import create_model
from cliplift.models.protocol import ModelError
from cliplift.models.video_vit.latent import LatentPrediction, LatentPredictor, Prediction
from cliplift.models.video_vit.masks import (
    LONG_RANGE,
    SHORT_RANGE,
    MaskDraws,
    block_numbers,
    bounded_block_mask,
    shortest_of_batch,
)
from cliplift.models.video_vit.model import VideoViT
from cliplift.models.video_vit.positions import TokenGrid
from cliplift.pipelines.checkpoints.folder import complete_checkpoints, damage
from cliplift.pipelines.checkpoints.saved import open_checkpoint
from cliplift.pipelines.checkpoints.stored import COMPLETE
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.engine.task import (
    MovingTeacher,
    SavedModel,
    StageModule,
    data_card,
    example_clips,
    network_weights,
)
from cliplift.pipelines.engine.telemetry import training_flops
from cliplift.pipelines.evaluation.over_split import over_split, validation_loader
from cliplift.pipelines.probes.collapse import (
    CollapseAlarm,
    effective_rank,
    feature_std,
    participation_ratio,
    sampled_tokens,
)
from cliplift.pipelines.probes.pooled import probe
from cliplift.pipelines.stages.masked import HiddenTokensStage, pretraining_options
from cliplift.pipelines.stages.matching import send_to_device
from cliplift.pipelines.stages.starting_weights import freeze_named, initialise_from

log = logging.getLogger(__name__)

MASKS = (SHORT_RANGE, LONG_RANGE)  # each one a pass of encoder and predictor
MASK_TOKENS = {False: 10, True: 8}  # of the predictor, in the released files of 2 and of 2.1 (dense)

# How the names of the networks that can be pretrained like this begin, and the options they need for it.
PREDICTABLE: Mapping[str, Mapping[str, Any]] = {
    "video_vit_": {"final_norm": "tokens"},
    "vjepa2_": {},
    "vjepa21_": {},
}


@dataclass(frozen=True, kw_only=True)
class LatentMasks:
    """The masks of a run: of each clip, for each of :data:`MASKS`, which tokens are context and which are hidden."""

    config: LatentConfig
    grid: TokenGrid
    seed: int
    crop_pixels: int

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(n, m) of each mask; with ``shortest_of_batch`` about what a batch of 24 clips keeps."""
        N = self.grid.tokens
        return tuple((int(mask.context * N), int(mask.targets * N)) for mask in MASKS)

    def numbers(self, *, epochs: Tensor, positions: Tensor, step: int) -> dict[str, Tensor]:
        """``context0`` (B, n), ``hidden0`` (B, m), and so on: int64 on the CPU, ascending.

        Args:
            epochs, positions: (B,) of the clips.
            step: of the optimizer, by which ``shortest_of_batch`` draws the size of its blocks.
        """
        found: dict[str, Tensor] = {}
        draws = MaskDraws(self.seed, epochs, positions)
        for i, blocks in enumerate(MASKS):
            own = draws.of_mask(i, len(MASKS))
            if self.config.masks == "per_clip":
                context, hidden = block_numbers(self.grid, own, blocks)
            else:
                same = MaskDraws(own.seed, torch.zeros_like(epochs), torch.full_like(positions, step))
                mask = bounded_block_mask(self.grid, own, blocks, context=1, targets=1, size_draws=same)
                context, hidden = shortest_of_batch(mask)
            found |= {f"context{i}": context, f"hidden{i}": hidden}
        return found

    def check(self) -> None:
        """Draw the masks of some clips, before a clip is read.

        Raises:
            ConfigError: the blocks do not fit the grid; names the key.
        """
        try:
            with torch.device("cpu"):  # also where a network is being built without memory
                some = torch.arange(8)
                self.numbers(epochs=torch.zeros_like(some), positions=some, step=0)
        except ModelError as error:
            raise ConfigError(
                f"gives {self.grid.rows}x{self.grid.columns} tokens, too few for the blocks that are hidden ({error})",
                key="data.crop_pixels",
                value=self.crop_pixels,
                hint="use larger clips, or a model with smaller patches",
            ) from None


class FeaturePrediction(nn.Module):
    """Encoder, predictor and teacher with their loss: what is trained."""

    def __init__(self, prediction: LatentPrediction) -> None:
        super().__init__()
        self.prediction = prediction

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``clips`` (B, C, T, H, W), the lists of :class:`LatentMasks`, perhaps ``context_weight`` () -> the loss, that
        of each clip (B,), and two numbers that fall when the teacher collapses."""
        found = self.predict(inputs)
        rows = sampled_tokens(found.target)
        return {
            "loss": found.loss,
            "loss_of_clip": found.loss_of_clip.detach(),
            "feature_std": feature_std(rows),
            "participation_ratio": participation_ratio(rows),
        }

    def predict(self, inputs: Mapping[str, Tensor]) -> Prediction:
        """The loss with the teacher's features."""
        masks = [(inputs[f"context{i}"], inputs[f"hidden{i}"]) for i in range(len(MASKS))]
        weight = inputs.get("context_weight", 0.0)
        return cast(Prediction, self.prediction(inputs["clips"], masks, weight))


class LatentStage(HiddenTokensStage):
    """Latent prediction as a stage. Its loss does not tell which weights are best: it rises while features improve. So
    a probe chooses the checkpoint, and without one the last is the result."""

    without_probe = "probe_knn_accuracy"  # which is then not measured

    def __init__(self, run: PretrainRun, *, classes: Sequence[str], topology: Topology) -> None:
        super().__init__(run, classes=classes, topology=topology)
        self._alarm = CollapseAlarm(std=run.latent.alarm_std, rank_share=run.latent.alarm_rank_share)

    def build_module(self, *, weights: bool) -> StageModule:
        run = self.run
        encoder = build_encoder(run, pretrained=run.model.pretrained if weights else None)
        source = run.initialise_from if weights else None
        if source is not None and not run.latent.keep_predictor:
            initialise_from(encoder, source)
        self._masks_of(encoder).check()
        prediction = with_predictor(encoder, build_encoder(run, pretrained=None), run)
        module = FeaturePrediction(prediction)
        if source is not None and run.latent.keep_predictor:
            continue_from(module, source)
        return StageModule(module=module, network=prediction.teacher)

    @property
    def moving_teacher(self) -> MovingTeacher:
        config = self.run.latent
        last = config.final_teacher_momentum
        return MovingTeacher(
            student="prediction.encoder.",
            teacher="prediction.teacher.",
            momentum=config.teacher_momentum,
            final_momentum=config.teacher_momentum if last is None else last,
            stretch=self.run.schedule.stretch,
        )

    def _masks_of(self, encoder: VideoViT) -> LatentMasks:
        run, crop = self.run, self.run.data.crop_pixels
        grid = encoder.grid(run.data.sampling.frames, crop)
        return LatentMasks(config=run.latent, grid=grid, seed=run.seed, crop_pixels=crop)

    @cached_property
    def _masks(self) -> LatentMasks:
        return self._masks_of(cast(VideoViT, self.built.network))

    def example_inputs(self, built: StageModule, *, micro_batch: int, world_size: int) -> dict[str, Tensor]:
        run = self.run
        inputs = {"clips": example_clips(run, run.data, run.model.name, micro_batch=micro_batch)}
        sizes = self._masks_of(cast(VideoViT, built.network)).sizes
        for i, (context, hidden) in enumerate(sizes):
            inputs[f"context{i}"] = torch.zeros(micro_batch, context, dtype=torch.int64)
            inputs[f"hidden{i}"] = torch.zeros(micro_batch, hidden, dtype=torch.int64)
        if run.latent.dense:
            inputs["context_weight"] = torch.ones(())
        return inputs

    def inputs(self, batch: ClipBatch, *, training: bool, step: int) -> dict[str, Tensor]:
        """A micro-batch as the module's inputs; the masks are made here, on the host."""
        device, config = self.topology.device, self.run.latent
        numbers = self._masks.numbers(epochs=batch.epochs, positions=batch.positions, step=step)
        inputs = {"clips": self.views[training](batch.to(device))}
        inputs |= {name: send_to_device(tokens, device) for name, tokens in numbers.items()}
        if config.dense:
            weight = context_weight(config, step) if training else config.context_weight
            inputs["context_weight"] = torch.full((), weight, device=device)
        return inputs

    @torch.no_grad()
    def evaluate(self, *, topology: Topology) -> dict[str, float]:
        """Loss on the validation split, every clip once, over all ranks, and what a probe says of the teacher. A clip's
        masks are always the same."""
        loader = validation_loader(self.run, self.run.data, topology)
        module = cast(FeaturePrediction, self.module)

        def forward(batch: ClipBatch) -> list[tuple[float, Tensor]]:
            found = module.predict(self.inputs(batch, training=False, step=0))
            means = found.target.mean(dim=1).cpu()
            return [
                (float(loss), row.clone()) for loss, row in zip(found.loss_of_clip.cpu(), means, strict=True)
            ]

        everything = over_split(loader, forward, topology)
        self._last = [(loader.dataset.facts(sample).key, loss) for sample, (loss, _) in everything]
        metrics = latent_metrics([clip for _, clip in everything])
        if self.run.probe is not None:
            metrics |= probe(self.built.network, self.run, self.run.probe, topology=topology)
        return metrics

    def alarm(self, numbers: Mapping[str, float | None]) -> str | None:
        """Of a collapse; see :mod:`cliplift.pipelines.probes.collapse`."""
        return self._alarm.look(numbers)

    @cached_property
    def flops_per_clip(self) -> float | None:
        """Operations of a training step on one clip, counted on the meta device: the teacher goes forward only."""
        with torch.device("meta"), torch.no_grad():
            built = self.build_module(weights=False)
            inputs = self.example_inputs(built, micro_batch=1, world_size=1)
            module = cast(FeaturePrediction, built.module)
            with FlopCounterMode(display=False) as of_all:
                module.predict(inputs)
            with FlopCounterMode(display=False) as of_teacher:
                module.prediction.targets(inputs["clips"])
        teacher = float(of_teacher.get_total_flops())
        trained = training_flops(float(of_all.get_total_flops()) - teacher)
        return None if trained is None else trained + teacher

    def trained_network(self, weights: Mapping[str, Tensor]) -> SavedModel:
        """The teacher alone, as published: `initialise_from` of another run reads it."""
        with torch.device("meta"):
            encoder = build_encoder(self.run, pretrained=None)
        card = data_card(self.run, self.run.data)
        card["objective"], card["latent"] = "latent", self.run.latent.model_dump(mode="json")
        return SavedModel(
            network=encoder,
            options=pretraining_options(self.run, PREDICTABLE, what="by latent prediction"),
            card=card,
            weights=network_weights(weights, prefix="prediction.teacher."),
        )


def latent_metrics(clips: Sequence[tuple[float, Tensor]]) -> dict[str, float]:
    """Over (loss, mean token of the teacher (F,)) of clips: the mean loss, and how much the clips' features differ."""
    rows = torch.stack([row for _, row in clips]).double()
    rows = F.layer_norm(rows, rows.shape[1:])
    return {
        "loss": sum(loss for loss, _ in clips) / len(clips),
        "feature_std": float(feature_std(rows)),
        "effective_rank": effective_rank(rows),
        "samples": float(len(clips)),
    }


def context_weight(config: LatentConfig, step: int) -> float:
    """The weight of the context's part of the loss at an optimizer step (from 0)."""
    if config.context_ramp_steps is None:
        return config.context_weight
    first, last = config.context_ramp_steps
    return config.context_weight * min(max((step - first) / (last - first), 0.0), 1.0)


def build_encoder(run: PretrainRun, *, pretrained: str | None) -> VideoViT:
    """The run's network without a classifier, of tokens that can be left out.

    Raises:
        ConfigError: the model or its options are not for latent prediction.
    """
    options = pretraining_options(run, PREDICTABLE, what="by latent prediction")
    network = create_model(
        run.model.name, num_classes=0, in_frames=run.data.sampling.frames, pretrained=pretrained, **options
    )
    assert isinstance(network, VideoViT)  # pretraining_options knows no others
    if run.latent.dense and not network.levels:
        raise ConfigError(
            f"predicts four levels of the encoder, and {run.model.name} has one",
            key="latent.dense",
            value=True,
            hint="use false, or a vjepa21_* model",
        )
    return network


def with_predictor(encoder: VideoViT, teacher: VideoViT, run: PretrainRun) -> LatentPrediction:
    """The encoder with a predictor of the configured size and its teacher.

    What clips of several frames never use is left out of training: V-JEPA 2.1's parameters for images, and the norms of
    levels that are not predicted.

    Raises:
        ConfigError: sizes of the predictor that do not go together.
    """
    config = run.latent
    freeze_named(encoder, run.model.frozen)
    try:
        predictor = LatentPredictor.of(
            encoder,
            width=config.predictor_width,
            depth=config.predictor_depth,
            heads=config.predictor_heads,
            levels=len(encoder.levels) if config.dense else 1,
            mask_tokens=MASK_TOKENS[config.dense],
            predict_context=config.dense,
        )
    except ModelError as error:
        raise ConfigError(
            f"no such predictor: {error}", key="latent.predictor_width", value=config.predictor_width
        ) from None
    unused = [encoder.image_embed, *(encoder.level_norms[:-1] if encoder.levels and not config.dense else ())]
    for part in unused:
        if part is not None:
            part.requires_grad_(False)
    if predictor.image_modality is not None:
        predictor.image_modality.requires_grad_(False)
    return LatentPrediction(
        encoder, predictor, teacher, dense=config.dense, near_first=config.context_near_first
    )


@torch.no_grad()
def continue_from(module: FeaturePrediction, source: str) -> None:
    """Give encoder, predictor and teacher the weights they have in another run, tensor by tensor.

    Positions are computed, so that clips may have another length and size than there. The optimizer begins anew.

    Args:
        module: what is to be trained.
        source: the folder of that run, whose last checkpoint is taken, or one of its checkpoints.

    Raises:
        ConfigError: there is no whole checkpoint, or it is of other nets; names the first difference.
    """
    given = Path(source)
    found = [given] if (given / COMPLETE).is_file() else complete_checkpoints(given / "checkpoints")
    problem = damage(found[-1], unread="optimizer") if found else "it holds no whole checkpoint"
    if problem is not None:
        raise ConfigError(
            f"{source!r} cannot be gone on from: {problem}",
            key="initialise_from",
            value=source,
            hint="give the folder of a run of latent prediction that has checkpoints, or one of them",
        )
    alone = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    saved = open_checkpoint(found[-1], topology=alone).parameters
    own = dict(module.named_parameters())
    theirs = {name: saved.shape(name) for name in saved}
    different = sorted(own.keys() ^ theirs.keys()) or [
        n for n, p in own.items() if tuple(p.shape) != theirs[n]
    ]
    if different:
        raise ConfigError(
            f"{source!r} is a checkpoint of other nets ({len(different)} differences, first {different[0]})",
            key="initialise_from",
            value=source,
            hint="take that run's model, latent.dense and size of the predictor, or latent.keep_predictor=false",
        )
    for name, parameter in own.items():
        parameter.copy_(saved.whole(name))
    log.info("encoder, predictor and teacher go on from %s", found[-1])
