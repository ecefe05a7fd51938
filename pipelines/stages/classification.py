"""Supervised classification of clips: the training task shared by pretrain and finetune."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cliplift.configs.runs import ClassificationRun, FinetuneRun
from cliplift.configs.sections import ConfigError
from cliplift.models import create_model
from cliplift.pipelines.data.augment import DeviceAugment, mix_clips
from cliplift.pipelines.data.loader import ClipBatch
from cliplift.pipelines.data.source import stored_split
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.engine.telemetry import forward_flops, training_flops
from cliplift.pipelines.evaluation.clip_tables import prediction_table
from cliplift.pipelines.evaluation.evaluate import Predictions, classification_metrics, classify_split
from cliplift.pipelines.runs.folder import WEIGHTS
from cliplift.pipelines.runs.tracking import ClipTable

log = logging.getLogger(__name__)


class Classifier(nn.Module):
    """The network and its loss: what is trained. A model with a training loss of its own (``loss``) uses that."""

    def __init__(
        self,
        network: nn.Module,
        *,
        label_smoothing: float,
        multi_label: bool,
        frozen_batchnorm: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.label_smoothing, self.multi_label = network, label_smoothing, multi_label
        self.frozen_batchnorm = frozen_batchnorm

    def train(self, mode: bool = True) -> Classifier:
        """Training mode; BatchNorm that is frozen normalises with its running statistics all the same."""
        super().train(mode)
        if self.frozen_batchnorm:
            for module in batchnorms(self):
                module.eval()
        return self

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``clips`` (B, C, T, H, W) with ``labels`` (B,) or soft/multi-hot ``targets`` (B, K) -> loss, accuracy."""
        clips = inputs["clips"]
        own_loss = getattr(self.network, "loss", None)
        if own_loss is not None and (self.multi_label or "targets" not in inputs):
            return {"loss": own_loss(clips, inputs["targets" if self.multi_label else "labels"])}
        logits = self.network(clips).float()
        if self.multi_label:
            return {"loss": F.binary_cross_entropy_with_logits(logits, inputs["targets"].float())}
        target = inputs.get("targets", inputs["labels"])
        loss = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
        accuracy = (logits.argmax(dim=1) == inputs["labels"]).float().mean()
        return {"loss": loss, "accuracy": accuracy.detach()}


class ClassificationTask:
    """Classification as the engine's training task."""

    def __init__(self, run: ClassificationRun, *, classes: Sequence[str], topology: Topology) -> None:
        self.run, self.topology, self.classes = run, topology, tuple(classes)
        multi_label = run.task == "multi_label"
        self.best_metric = "mean_average_precision" if multi_label else "accuracy"
        if not self.classes:
            raise ConfigError(
                "holds no class names, so there is nothing to classify",
                key="data.shards",
                value=run.data.shards[0],
                hint="shard a labelled source",
            )
        network = build_network(run, num_classes=len(self.classes))
        if run.label_smoothing and callable(getattr(network, "loss", None)):
            raise ConfigError(
                f"does not reach the loss {run.model.name!r} has of its own",
                key="label_smoothing",
                value=run.label_smoothing,
                hint="use 0",
            )
        self.network = network
        self.module = Classifier(
            network,
            label_smoothing=run.label_smoothing,
            multi_label=multi_label,
            frozen_batchnorm=isinstance(run, FinetuneRun) and run.frozen_batchnorm,
        )
        self.clip_frames = run.data.sampling.frames
        self._views = DeviceAugment(run.data.augment, network.input_spec, training=True)
        self._last: tuple[Predictions, str] | None = None

    def inputs(self, batch: ClipBatch, *, training: bool, step: int) -> dict[str, Tensor]:
        if self.run.task == "single_label" and (batch.labels.numpy() < 0).any():  # on the host, still
            raise ConfigError(
                "has samples without a label",
                key="data.split",
                value=self.run.data.split,
                hint="classification needs labelled shards; transfer takes unlabelled ones",
            )
        batch = batch.to(self.topology.device)
        inputs = {"clips": self._views(batch), "labels": batch.labels}
        if self.run.task == "multi_label":
            assert batch.targets is not None
            inputs["targets"] = batch.targets
        augment = self.run.data.augment
        if training and (augment.mixup_alpha or augment.cutmix_alpha):
            inputs["clips"], inputs["targets"] = mix_clips(
                inputs["clips"],
                batch.labels,
                num_classes=len(self.classes),
                augment=augment,
                draws=batch.draws,
            )
        return inputs

    @cached_property
    def flops_per_clip(self) -> float | None:
        """Operations of a training step on one clip."""
        return training_flops(
            forward_flops(
                self.run.model,
                classes=len(self.classes),
                frames=self.clip_frames,
                crop_pixels=self.run.data.crop_pixels,
            )
        )

    def clip_table(self, rows: int) -> ClipTable | None:
        """Clips of the last evaluation with what was predicted, mistakes first; rank 0 keeps them."""
        if self._last is None:
            return None
        predictions, split = self._last
        return prediction_table(
            predictions, split=stored_split(self.run.data, split), fold=self.run.data.fold, rows=rows
        )

    def evaluate(self, *, topology: Topology) -> dict[str, float]:
        """Accuracy on the validation split, every sample once, over all ranks."""
        return self.evaluate_split(
            self.run.data.val_split, topology=topology, max_samples=self.run.evaluation.max_samples
        )

    def evaluate_split(
        self,
        split: str,
        *,
        topology: Topology,
        predictions_file: Path | None = None,
        max_samples: int | None = None,
    ) -> dict[str, float]:
        """Metrics of one split; writes predictions.parquet when given a path (rank 0)."""
        predictions = classify_split(
            self.network,
            self.run.data,
            split=split,
            batch=self.run.evaluation.batch,
            topology=topology,
            max_samples=max_samples,
            multi_label=self.run.task == "multi_label",
            keep_features=predictions_file is not None,
        )
        if topology.is_main:
            self._last = predictions, split
        if predictions_file is not None and topology.rank == 0:
            predictions.write(predictions_file)
        return classification_metrics(predictions)


def build_network(run: ClassificationRun, *, num_classes: int) -> nn.Module:
    """The run's network with its starting weights and frozen parts. Raises ConfigError with the key at fault."""
    network = create_model(
        run.model.name,
        num_classes=num_classes,
        in_frames=run.data.sampling.frames,
        pretrained=run.model.pretrained,
        **run.model.options,
    )
    if run.initialise_from is not None:
        initialise_from(network, run.initialise_from)
    if isinstance(run, FinetuneRun) and run.train_part == "head":
        freeze_all_but_head(network)
    if isinstance(run, FinetuneRun) and run.frozen_batchnorm:
        for module in batchnorms(network):
            module.requires_grad_(False)
    freeze_named(network, run.model.frozen)
    return network


def batchnorms(module: nn.Module) -> list[nn.Module]:
    """Every BatchNorm layer inside."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


def freeze_named(network: nn.Module, patterns: Sequence[str]) -> None:
    """Leave the parameters out of training whose names match a shell pattern.

    Raises:
        ConfigError: a pattern matches none.
    """
    names = dict(network.named_parameters())
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise ConfigError(
                f"{pattern!r} matches no parameter of the model",
                key="model.frozen",
                value=pattern,
                hint=f"its parameters are named like {', '.join(list(names)[:3])}",
            )
        for name in matched:
            names[name].requires_grad_(False)


def initialise_from(network: nn.Module, source: str) -> None:
    """Load the backbone of a run folder, an export folder or a weights file into a network, head excepted."""
    from cliplift.models.factory import load_pretrained

    folder = Path(source) / WEIGHTS
    path = folder if folder.is_dir() else Path(source)
    if not path.exists():
        raise ConfigError(
            f"{source!r} does not exist",
            key="initialise_from",
            value=source,
            hint="give a finished run's folder, an export folder or a weights file",
        )
    if Path(source).is_dir() and not folder.is_dir() and not (path / "model.safetensors").exists():
        raise ConfigError(
            f"{source!r} holds no weights",
            key="initialise_from",
            value=source,
            hint="the run has not finished; start it again and it continues",
        )
    load_pretrained(network, str(path))
    log.info("backbone starts from %s", source)


def freeze_all_but_head(network: nn.Module) -> None:
    """Leave only the classifier trainable: the parameters a fresh ``reset_classifier`` makes."""
    before = {id(parameter) for parameter in network.parameters()}
    network.reset_classifier(int(network.num_classes))  # type: ignore[operator, arg-type]
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) not in before)
