"""Pretraining without labels: read the first frames of a clip, predict the others.

Objective ``forecast`` of the pretrain stage (Shi et al., arXiv 1506.04214, section 4.1, on any video): every model that
offers a forecaster can be trained, on any shards. The baseline to beat needs no
learning: the last frame read, held still.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cliplift.configs.objectives import ForecastConfig
from cliplift.configs.runs import PretrainRun
from cliplift.configs.sections import ConfigError
from cliplift.models import create_model, list_models, model_options
from cliplift.models.convrnn.forecaster import EncoderForecaster, forecast_error
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.distributed.collectives import Topology
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
from cliplift.pipelines.runs.tracking import ClipTable
from cliplift.pipelines.stages.starting_weights import freeze_named, initialise_from

OPTION = "forecaster"  # what a model that can predict frames is built with


class Forecasting(nn.Module):
    """The network and its loss: what is trained."""

    def __init__(self, network: EncoderForecaster, config: ForecastConfig) -> None:
        super().__init__()
        self.network, self.config = network, config

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``clips`` (B, C, T, H, W) in [0, 1] -> the loss, and the squared error beside that of the last frame."""
        errors = self.errors(inputs["clips"])
        return {
            name: error.mean() if name == "loss" else error.mean().detach() for name, error in errors.items()
        }

    def errors(self, clips: Tensor) -> dict[str, Tensor]:
        """Of every clip (B,): ``loss``, ``mse`` of the predicted pixels, ``mse_copy_last`` of the last frame read."""
        read = self.config.input_frames
        logits = self.network.forecast_logits(clips[:, :, :read], clips.shape[2] - read)
        pixels = self.network.pixels(clips)
        future, last = pixels[:, :, read:].float(), pixels[:, :, read - 1 : read].float()
        return {
            "loss": forecast_error(logits, future, loss=self.config.loss),
            "mse": forecast_error(logits.detach(), future, loss="mse"),
            "mse_copy_last": (last - future).square().flatten(1).mean(dim=1),
        }


class ForecastStage(NetworkStage[PretrainRun]):
    """Forecasting as a stage. ``skill`` is 1 - mse / mse_copy_last: 0 holds still, 1 is perfect."""

    best_metric = "skill"
    needs_labels, needs_videos = False, 1

    def __init__(self, run: PretrainRun, *, classes: Sequence[str], topology: Topology) -> None:
        super().__init__(run, classes=classes, topology=topology)
        self._last: list[tuple[str, float, float]] = []

    def build_module(self, *, weights: bool) -> StageModule:
        run = self.run
        network = build_forecaster(run, pretrained=run.model.pretrained if weights else None)
        if weights and run.initialise_from is not None:
            initialise_from(network, run.initialise_from)
        freeze_named(network, run.model.frozen)
        return StageModule(module=Forecasting(network, run.forecast), network=network)

    def example_inputs(self, built: StageModule, *, micro_batch: int, world_size: int) -> dict[str, Tensor]:
        run = self.run
        return {"clips": example_clips(run, run.data, run.model.name, micro_batch=micro_batch)}

    def inputs(self, batch: ClipBatch, *, training: bool, step: int) -> dict[str, Tensor]:
        return {"clips": self.views[training](batch.to(self.topology.device))}

    @torch.no_grad()
    def evaluate(self, *, topology: Topology) -> dict[str, float]:
        """Errors on the validation split, every clip once, over all ranks; the same for any number of them."""
        loader = validation_loader(self.run, self.run.data, topology)

        def forward(batch: ClipBatch) -> list[dict[str, float]]:
            clips = self.inputs(batch, training=False, step=0)["clips"]
            errors = cast(Forecasting, self.module).errors(clips)
            return [
                {name: float(error[row]) for name, error in errors.items()}
                for row in range(len(batch.sample_index))
            ]

        everything = over_split(loader, forward, topology)
        self._last = [
            (loader.dataset.facts(sample).key, errors["mse"], errors["mse_copy_last"])
            for sample, errors in everything
        ]
        return forecast_metrics([errors for _, errors in everything])

    def clip_table(self, rows: int) -> ClipTable | None:
        """Clips of the last evaluation, those first that were forecast worst against their last frame."""
        if not self._last:
            return None
        worst = sorted(self._last, key=lambda clip: clip[2] - clip[1])
        return ("key", "mse", "mse_copy_last"), worst[:rows]

    @cached_property
    def flops_per_clip(self) -> float | None:
        """Operations of a training step on one clip, counted on the meta device."""
        side, read = self.run.data.crop_pixels, self.run.forecast.input_frames
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            network = build_forecaster(self.run, pretrained=None)
            network.forecast_logits(torch.empty(1, 3, read, side, side), self.clip_frames - read)
        return training_flops(float(counter.get_total_flops()))

    def trained_network(self, weights: Mapping[str, Tensor]) -> SavedModel:
        with torch.device("meta"):
            network = build_forecaster(self.run, pretrained=None)
        card = data_card(self.run, self.run.data)
        card["objective"], card["forecast"] = "forecast", self.run.forecast.model_dump(mode="json")
        return SavedModel(
            network=network,
            options=forecaster_options(self.run),
            card=card,
            weights=network_weights(weights, prefix="network."),
        )


def forecast_metrics(clips: list[dict[str, float]]) -> dict[str, float]:
    """Means over clips. ``skill`` is missing where no clip moves: there is nothing to be better than."""
    metrics = {name: sum(clip[name] for clip in clips) / len(clips) for name in clips[0]}
    if metrics["mse_copy_last"] > 0:
        metrics["skill"] = 1.0 - metrics["mse"] / metrics["mse_copy_last"]
    return metrics | {"samples": float(len(clips))}


def forecaster_options(run: PretrainRun) -> dict[str, object]:
    """The architecture options of the run's network, forecaster included."""
    return {**run.model.options, OPTION: True}


def build_forecaster(run: PretrainRun, *, pretrained: str | None) -> EncoderForecaster:
    """The run's network with its forecaster and without a classifier.

    Raises:
        ConfigError: the model cannot predict frames.
    """
    if OPTION not in model_options(run.model.name):
        able = [name for name in list_models() if OPTION in model_options(name)]
        raise ConfigError(
            f"{run.model.name!r} cannot predict frames",
            key="model.name",
            value=run.model.name,
            hint=f"objective forecast takes {', '.join(able)}",
        )
    network = create_model(
        run.model.name,
        num_classes=0,
        in_frames=run.forecast.input_frames,
        pretrained=pretrained,
        **forecaster_options(run),
    )
    return cast(EncoderForecaster, network)
