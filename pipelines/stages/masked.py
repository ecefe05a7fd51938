"""Pretraining without labels: hide most of a clip, and predict the pixels of what is hidden.

Objective ``masked`` of the pretrain stage: VideoMAE (arXiv 2203.12602), VideoMAE v2 with its second mask for the
decoder (2303.16727), and Hiera's masked autoencoder (2306.00989). The networks are in ``models/video_vit`` and
``models/hiera``.

A clip's mask is a function of (seed, epoch, position): made on the CPU from the batch's columns, the same on any number
of ranks and for any micro-batch. A clip's loss is a mean over its own tokens, and the loss of a step the mean over its
clips. So as long as the weights are equal, losses are equal, bit for bit wherever a clip's forward pass does not depend
on the clips beside it (a CPU).

Shape letters: B clips, C channels, T H W frames and pixels, N tokens of a clip, n visible, m decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cliplift.configs.objectives import MaskedConfig
from cliplift.configs.runs import PretrainRun
from cliplift.configs.sections import ConfigError
from cliplift.models import create_model, list_models
from cliplift.models.hiera.decoder import HieraMaskedAutoencoder, unit_mask
from cliplift.models.hiera.model import Hiera
from cliplift.models.video_vit.blocks import TokenGroup
from cliplift.models.video_vit.decoder import MaskedAutoencoder, Reconstruction
from cliplift.models.video_vit.masks import (
    MaskDraws,
    random_mask,
    running_cell_mask,
    token_numbers,
    tube_mask,
)
from cliplift.models.video_vit.model import VideoViT
from cliplift.models.video_vit.positions import TokenGrid
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.distributed.sequence import share_clips_of
from cliplift.pipelines.engine.task import (
    NetworkStage,
    SavedModel,
    StageModule,
    data_card,
    example_clips,
    network_weights,
)
from cliplift.pipelines.engine.telemetry import training_flops
from cliplift.pipelines.evaluation.over_split import over_split, validation_loader
from cliplift.pipelines.probes.pooled import probe
from cliplift.pipelines.runs.tracking import ClipTable
from cliplift.pipelines.stages.matching import send_to_device
from cliplift.pipelines.stages.starting_weights import freeze_named, initialise_from

HEAD_WIDTH = 64  # of the decoder (all published sizes)
DECODER_DEPTH = 4  # VideoMAE v1's S and B, all sizes of v2
HIERA_DECODER = {"width": 512, "depth": 8, "heads": 16}

# How the names of the networks that can be masked begin, and the options they need for it.
MASKABLE: Mapping[str, Mapping[str, Any]] = {
    "video_vit_": {"final_norm": "tokens"},
    "hiera_": {"pretraining": True},
}

Mask = Callable[..., Tensor]  # (grid, draws, ratio=...) -> bool (B, N), True = hidden
MASKS: Mapping[str, Mask] = {"tube": tube_mask, "random": random_mask, "running_cell": running_cell_mask}


def hidden_tokens(kind: str, grid: TokenGrid, ratio: float) -> int:
    """How many of a clip's N tokens a mask of this kind hides: the released code's roundings."""
    if kind == "tube":
        return grid.frames * int(ratio * grid.tokens_of_a_frame)
    if kind == "random":
        return int(ratio * grid.tokens)
    return int(4 * ratio) * grid.tokens // 4  # of whole cells


@dataclass(frozen=True, kw_only=True)
class ClipMasks:
    """The masks of a run: which tokens (Hiera: mask units) of a clip are visible, and which are decoded.

    Raises:
        ConfigError: the grid cannot be masked like this; names the key.
    """

    config: MaskedConfig
    grid: TokenGrid
    seed: int
    units: bool = False  # of a Hiera
    section: str = "masked"  # of the config, for messages

    def __post_init__(self) -> None:
        config, grid = self.config, self.grid
        for key, kind in (("mask", config.mask), ("decoder_mask", config.decoder_mask)):
            if kind == "running_cell" and (grid.rows % 2 or grid.columns % 2):
                raise ConfigError(
                    f"needs whole cells of 2x2 tokens, and a frame has {grid.rows}x{grid.columns}",
                    key=f"{self.section}.{key}",
                    value=kind,
                    hint="change data.crop_pixels",
                )
        if not 0 < self.visible < grid.tokens:
            raise ConfigError(
                f"leaves {self.visible} of {grid.tokens} tokens visible",
                key=f"{self.section}.ratio",
                value=config.ratio,
                hint="some must be visible and some hidden: change it, or use larger clips",
            )

    @property
    def visible(self) -> int:
        """n."""
        if self.units:  # the released code rounds what is kept
            return int(self.grid.tokens * (1 - self.config.ratio))
        return self.grid.tokens - hidden_tokens(self.config.mask, self.grid, self.config.ratio)

    @property
    def decoded(self) -> int | None:
        """m where the decoder has a mask of its own; None decodes what is hidden."""
        if self.config.decoder_mask is None:
            return None
        return self.grid.tokens - hidden_tokens(
            self.config.decoder_mask, self.grid, self.config.decoder_ratio
        )

    def numbers(self, *, epochs: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """``visible`` (B, n), and ``decoded`` (B, m) where the decoder has a mask: int64 on the CPU, ascending."""
        draws = MaskDraws(self.seed, epochs, positions)
        config = self.config
        mask = unit_mask if self.units else MASKS[config.mask]
        found = {"visible": token_numbers(mask(self.grid, draws, ratio=config.ratio))[0]}
        if config.decoder_mask is not None:
            decoder = MASKS[config.decoder_mask](self.grid, draws, ratio=config.decoder_ratio)
            found["decoded"] = token_numbers(decoder)[0]
        return found


class PixelReconstruction(nn.Module):
    """The autoencoder and its loss: what is trained."""

    def __init__(self, autoencoder: MaskedAutoencoder | HieraMaskedAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``clips`` (B, C, T, H, W), ``visible`` (B, n), perhaps ``decoded`` (B, m) -> the loss, and that of each
        clip (B,)."""
        found = self.reconstruct(inputs)
        return {"loss": found.loss, "loss_of_clip": found.loss_of_clip.detach()}

    def reconstruct(self, inputs: Mapping[str, Tensor]) -> Reconstruction:
        """Prediction and target with the loss."""
        return cast(Reconstruction, self.autoencoder(**inputs))

    def deal_tokens(self, group: TokenGroup | None) -> None:
        """As the autoencoder does; one that cannot is a ModelError."""
        share_clips_of(self.autoencoder, group)


class HiddenTokensStage(NetworkStage[PretrainRun]):
    """What masked pretraining, distillation and latent prediction share: no labels, a loss of each clip, the worst of
    which are shown, and a probe that chooses the checkpoint, where the run has one: the loss does not say how useful
    features are."""

    needs_labels, needs_videos = False, 1
    without_probe: str  # the metric that chooses where the run has no probe

    def __init__(self, run: PretrainRun, *, classes: Sequence[str], topology: Topology) -> None:
        super().__init__(run, classes=classes, topology=topology)
        self._last: list[tuple[str, float]] = []  # (key, loss) of the clips of the last evaluation

    @property
    def best_metric(self) -> str:
        probed = self.run.probe
        if probed is None:
            return self.without_probe
        return f"probe_{'knn' if probed.attentive is None else 'attentive'}_accuracy"

    def clip_table(self, rows: int) -> ClipTable | None:
        """Clips of the last evaluation, those first that were predicted worst."""
        if not self._last:
            return None
        return ("key", "loss"), sorted(self._last, key=lambda clip: -clip[1])[:rows]


class MaskedStage(HiddenTokensStage):
    """Masked autoencoding as a stage. ``skill`` is 1 - loss / variance of the targets: 0 predicts their mean, 1 is
    perfect."""

    without_probe = "skill"

    def build_module(self, *, weights: bool) -> StageModule:
        run = self.run
        encoder = build_encoder(run, pretrained=run.model.pretrained if weights else None)
        if weights and run.initialise_from is not None:
            initialise_from(encoder, run.initialise_from)
        self._masks_of(encoder)  # what cannot be masked is refused here
        freeze_named(encoder, run.model.frozen)
        module = PixelReconstruction(with_decoder(encoder, run.masked))
        return StageModule(module=module, network=encoder)

    def _masks_of(self, encoder: VideoViT | Hiera) -> ClipMasks:
        size = self.run.data.sampling.frames, self.run.data.crop_pixels
        units = isinstance(encoder, Hiera)
        grid = encoder.unit_grid(*size) if isinstance(encoder, Hiera) else encoder.grid(*size)
        return ClipMasks(config=self.run.masked, grid=grid, seed=self.run.seed, units=units)

    @cached_property
    def _masks(self) -> ClipMasks:
        return self._masks_of(cast(Any, self.built.network))

    def example_inputs(self, built: StageModule, *, micro_batch: int, world_size: int) -> dict[str, Tensor]:
        run, masks = self.run, self._masks_of(cast(Any, built.network))
        clips = example_clips(run, run.data, run.model.name, micro_batch=micro_batch)
        inputs = {"clips": clips, "visible": torch.zeros(micro_batch, masks.visible, dtype=torch.int64)}
        if masks.decoded is not None:
            inputs["decoded"] = torch.zeros(micro_batch, masks.decoded, dtype=torch.int64)
        return inputs

    def inputs(self, batch: ClipBatch, *, training: bool, step: int) -> dict[str, Tensor]:
        """A micro-batch as the module's inputs; the masks are made here, on the host."""
        device = self.topology.device
        numbers = self._masks.numbers(epochs=batch.epochs, positions=batch.positions)
        clips = self.views[training](batch.to(device))
        return {"clips": clips} | {name: send_to_device(tokens, device) for name, tokens in numbers.items()}

    @torch.no_grad()
    def evaluate(self, *, topology: Topology) -> dict[str, float]:
        """Loss and skill on the validation split, every clip once, over all ranks. A clip's mask is always the same."""
        loader = validation_loader(self.run, self.run.data, topology)
        module = cast(PixelReconstruction, self.module)

        def forward(batch: ClipBatch) -> list[tuple[float, float]]:
            found = module.reconstruct(self.inputs(batch, training=False, step=0))
            rows = torch.stack([found.loss_of_clip, target_variance(found)], dim=1).double().tolist()
            return [(loss, variance) for loss, variance in rows]

        everything = over_split(loader, forward, topology)
        self._last = [(loader.dataset.facts(sample).key, loss) for sample, (loss, _) in everything]
        metrics = masked_metrics([clip for _, clip in everything])
        if self.run.probe is not None:
            metrics |= probe(self.built.network, self.run, self.run.probe, topology=topology)
        return metrics

    @cached_property
    def flops_per_clip(self) -> float | None:
        """Operations of a training step on one clip, counted on the meta device, of the tokens it computes."""
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            built = self.build_module(weights=False)
            built.module(self.example_inputs(built, micro_batch=1, world_size=1))
        return training_flops(float(counter.get_total_flops()))

    def trained_network(self, weights: Mapping[str, Tensor]) -> SavedModel:
        """The encoder alone: `initialise_from` of another run reads it."""
        with torch.device("meta"):
            encoder = build_encoder(self.run, pretrained=None)
        card = data_card(self.run, self.run.data)
        card["objective"], card["masked"] = "masked", self.run.masked.model_dump(mode="json")
        return SavedModel(
            network=encoder,
            options=encoder_options(self.run),
            card=card,
            weights=network_weights(weights, prefix="autoencoder.encoder."),
        )


def target_variance(found: Reconstruction) -> Tensor:
    """Of each clip (B,): the mean squared distance of its counted targets from their mean over tokens and values."""
    counted = found.counted[..., None].double()
    target = found.target.double()
    values = counted.sum(dim=(1, 2)).clamp(min=1) * target.shape[-1]
    mean = (target * counted).sum(dim=(1, 2)) / values
    return ((target - mean[:, None, None]).square() * counted).sum(dim=(1, 2)) / values


def masked_metrics(clips: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Means over (loss, variance of the targets) of clips. ``skill`` is missing where no target varies."""
    loss = sum(loss for loss, _ in clips) / len(clips)
    variance = sum(variance for _, variance in clips) / len(clips)
    metrics = {"loss": loss, "target_variance": variance, "samples": float(len(clips))}
    return metrics | ({"skill": 1.0 - loss / variance} if variance > 0 else {})


def encoder_options(run: PretrainRun) -> dict[str, Any]:
    """The architecture options of the run's encoder: :func:`pretraining_options` with what masking needs."""
    return pretraining_options(run, MASKABLE, what="by masking")


def pretraining_options(
    run: PretrainRun, able: Mapping[str, Mapping[str, Any]], *, what: str
) -> dict[str, Any]:
    """The architecture options of an encoder to be pretrained on tokens.

    Without drop path unless the run asks for it, as all published pretraining: it would be drawn by torch's own
    generator, and losses then depend on ranks and micro-batches.

    Args:
        able: how the names of the models begin that can be, and the options they need.
        what: ends the sentence "... cannot be pretrained".

    Raises:
        ConfigError: the model cannot be pretrained like this, or is built for another crop.
    """
    name, data = run.model.name, run.data
    needed = next((options for start, options in able.items() if name.startswith(start)), None)
    if needed is None:
        names = [known for known in list_models() if known.startswith(tuple(able))]
        raise ConfigError(
            f"{name!r} cannot be pretrained {what}",
            key="model.name",
            value=name,
            hint=f"objective {run.objective} takes {', '.join(names)}",
        )
    options = {"crop": data.crop_pixels, "drop_path": 0.0} | dict(run.model.options)
    if options["crop"] != data.crop_pixels:
        raise ConfigError(
            f"is not data.crop_pixels={data.crop_pixels}",
            key="model.options.crop",
            value=options["crop"],
            hint="leave it out",
        )
    for option, value in needed.items():
        if options.setdefault(option, value) != value:
            raise ConfigError(
                f"pretraining {what} needs {value!r}",
                key=f"model.options.{option}",
                value=options[option],
                hint="leave it out",
            )
    return options


def build_encoder(run: PretrainRun, *, pretrained: str | None) -> VideoViT | Hiera:
    """The run's network without a classifier, of tokens that can be left out.

    Raises:
        ConfigError: the model or its options are not for masked pretraining.
    """
    options = encoder_options(run)
    network = create_model(
        run.model.name, num_classes=0, in_frames=run.data.sampling.frames, pretrained=pretrained, **options
    )
    if isinstance(network, Hiera):
        _check_hiera(run.masked)
    assert isinstance(network, VideoViT | Hiera)  # encoder_options knows no others
    return network


def _check_hiera(config: MaskedConfig) -> None:
    for key, value, wanted in (
        ("mask", config.mask, "random"),
        ("decoder_mask", config.decoder_mask, None),
        ("normalise_targets", config.normalise_targets, True),
    ):
        if value != wanted:
            raise ConfigError(
                "is VideoMAE's: Hiera hides random mask units, decodes all of them and normalises their pixels",
                key=f"masked.{key}",
                value=value,
                hint=f"use {'null' if wanted is None else str(wanted).lower()}",
            )


def with_decoder(
    encoder: VideoViT | Hiera, config: MaskedConfig
) -> MaskedAutoencoder | HieraMaskedAutoencoder:
    """The encoder below a decoder of the configured size, or of the published one."""
    width, depth, heads = config.decoder_width, config.decoder_depth, config.decoder_heads
    if isinstance(encoder, Hiera):
        given = {"width": width, "depth": depth, "heads": heads}
        sizes = {name: value or HIERA_DECODER[name] for name, value in given.items()}
        return HieraMaskedAutoencoder(encoder, **sizes)
    width = width or encoder.feature_dim // 2
    return MaskedAutoencoder(
        encoder,
        width=width,
        depth=depth or DECODER_DEPTH,
        heads=heads or max(1, width // HEAD_WIDTH),
        normalise=config.normalise_targets,
    )
