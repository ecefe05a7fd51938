"""Supervised classification of clips, shared by pretrain and finetune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliplift.configs.runs import ClassificationRun, FinetuneRun
from cliplift.configs.sections import ConfigError
from cliplift.models import create_model
from cliplift.models.protocol import HasOwnLoss, ModelError, NamesHead, VideoNetwork
from cliplift.models.video_vit.blocks import DealsTokens, TokenGroup
from cliplift.pipelines.data.augment import mix_clips
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.data.source import ClipSource, stored_split
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.engine.task import (
    NetworkStage,
    SavedModel,
    StageModule,
    data_card,
    example_clips,
    network_weights,
)
from cliplift.pipelines.engine.telemetry import forward_flops, training_flops
from cliplift.pipelines.evaluation.clip_tables import prediction_table
from cliplift.pipelines.evaluation.evaluate import classification_metrics, classify_split
from cliplift.pipelines.evaluation.features import ClassifierInputs
from cliplift.pipelines.probes.pooled import fit_linear
from cliplift.pipelines.runs.folder import RunFolder
from cliplift.pipelines.runs.predictions import Predictions
from cliplift.pipelines.runs.tracking import ClipTable
from cliplift.pipelines.stages.starting_weights import (
    KeepsBatchNorm,
    freeze_all_but_head,
    freeze_batchnorm,
    freeze_named,
    initialise_from,
    refuse_batchnorm,
)
from cliplift.pipelines.stages.teacher import cached_features, kept_tensors

CLASSIFIER_START, START_FEATURES = "classifier_start.safetensors", "classifier_features.safetensors"
LINEAR_L2, LINEAR_STEPS = 1e-3, 200  # as probes have them


def unlabelled(run: ClassificationRun) -> ConfigError:
    """What is wrong with a training split that has clips without labels."""
    return ConfigError(
        "has samples without a label",
        key="data.split",
        value=run.data.split,
        hint="classification needs labelled shards; transfer takes unlabelled ones",
    )


class Classifier(KeepsBatchNorm):
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

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``clips`` (B, C, T, H, W) with ``labels`` (B,) or soft/multi-hot ``targets`` (B, K) -> loss, accuracy."""
        clips = inputs["clips"]
        if isinstance(self.network, HasOwnLoss) and (self.multi_label or "targets" not in inputs):
            return {"loss": self.network.loss(clips, inputs["targets" if self.multi_label else "labels"])}
        logits = self.network(clips).float()
        if self.multi_label:
            return {"loss": F.binary_cross_entropy_with_logits(logits, inputs["targets"].float())}
        target = inputs.get("targets", inputs["labels"])
        loss = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
        accuracy = (logits.argmax(dim=1) == inputs["labels"]).float().mean()
        return {"loss": loss, "accuracy": accuracy.detach()}

    def deal_tokens(self, group: TokenGroup | None) -> None:
        """As the network does; a network that cannot is a ModelError."""
        if not isinstance(self.network, DealsTokens):
            raise ModelError(
                f"{type(self.network).__name__} keeps every clip on one rank: video_vit and vjepa2 share them"
            )
        self.network.deal_tokens(group)


class ClassificationStage(NetworkStage[ClassificationRun]):
    """Classification as a stage: pretrain with labels, and finetune."""

    needs_labels, needs_videos = True, 1

    def __init__(self, run: ClassificationRun, *, classes: Sequence[str], topology: Topology) -> None:
        super().__init__(run, classes=classes, topology=topology)
        self._last: tuple[Predictions, str] | None = None

    def predicted_classes(self, classes: Sequence[str]) -> tuple[str, ...]:
        return tuple(classes)

    @property
    def best_metric(self) -> str:
        return "mean_average_precision" if self.run.task == "multi_label" else "accuracy"

    @cached_property
    def built(self) -> StageModule:
        """The module with its starting weights."""
        if not self.classes:
            raise ConfigError(
                "holds no class names, so there is nothing to classify",
                key="data.shards",
                value=self.run.data.shards[0],
                hint="shard a labelled source",
            )
        return self.build_module(weights=True)

    def build_module(self, *, weights: bool) -> StageModule:
        run = self.run
        network = self._network(pretrained=run.model.pretrained if weights else None)
        if weights and run.initialise_from is not None:
            initialise_from(network, run.initialise_from)
        self.freeze(network)
        freeze_named(network, run.model.frozen)
        if run.label_smoothing and isinstance(network, HasOwnLoss):
            raise ConfigError(
                f"does not reach the loss {run.model.name!r} has of its own",
                key="label_smoothing",
                value=run.label_smoothing,
                hint="use 0",
            )
        return StageModule(
            module=Classifier(
                network,
                label_smoothing=run.label_smoothing,
                multi_label=run.task == "multi_label",
                frozen_batchnorm=self.frozen_batchnorm,
            ),
            network=network,
        )

    def _network(self, *, pretrained: str | None) -> VideoNetwork:
        return create_model(
            self.run.model.name,
            num_classes=len(self.classes),
            in_frames=self.clip_frames,
            pretrained=pretrained,
            **self.run.model.options,
        )

    @property
    def frozen_batchnorm(self) -> bool:
        """BatchNorm normalises with its running statistics in training too."""
        return False

    def freeze(self, network: nn.Module) -> None:
        """Leave parts of the network out of training, before those that ``model.frozen`` names."""

    def example_inputs(self, built: StageModule, *, micro_batch: int, world_size: int) -> dict[str, Tensor]:
        run, B = self.run, micro_batch
        clips = example_clips(run, run.data, run.model.name, micro_batch=B)
        inputs = {"clips": clips, "labels": torch.zeros(B, dtype=torch.int64)}
        if run.task == "multi_label" or run.data.augment.mixup_alpha or run.data.augment.cutmix_alpha:
            inputs["targets"] = torch.zeros(B, len(self.classes))
        return inputs

    def inputs(self, batch: ClipBatch, *, training: bool, step: int) -> dict[str, Tensor]:
        if self.run.task == "single_label" and (batch.labels.numpy() < 0).any():  # on the host, still
            raise unlabelled(self.run)
        batch = batch.to(self.topology.device)
        inputs = {"clips": self.views[True](batch), "labels": batch.labels}
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
            self.built.network,
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

    def trained_network(self, weights: Mapping[str, Tensor]) -> SavedModel:
        with torch.device("meta"):
            network = self._network(pretrained=None)
        card = data_card(self.run, self.run.data)
        card["classes"], card["task"] = list(self.classes), self.run.task
        return SavedModel(
            network=network,
            options=dict(self.run.model.options),
            card=card,
            weights=network_weights(weights, prefix="network."),
        )


class FinetuneStage(ClassificationStage):
    """Classification that starts from a backbone and ends with the test split."""

    def __init__(self, run: FinetuneRun, *, classes: Sequence[str], topology: Topology) -> None:
        super().__init__(run, classes=classes, topology=topology)
        self.finetune = run

    @property
    def frozen_batchnorm(self) -> bool:
        return self.finetune.frozen_batchnorm

    @cached_property
    def module(self) -> nn.Module:
        if self.finetune.classifier_start == "linear":
            self._start_classifier()
        return self.built.module

    @torch.no_grad()
    def _start_classifier(self) -> None:
        """First weights of the classifier: the linear one of the training clips' features. Collective.

        Raises:
            ConfigError: the network's classifier is not one linear layer on a clip's features, or its BatchNorm will
                make other features in training.
        """
        run, network = self.finetune, self.built.network
        head = network.get_submodule(network.head_name) if isinstance(network, NamesHead) else None
        if not isinstance(head, nn.Linear) or isinstance(network, HasOwnLoss):
            raise ConfigError(
                f"needs a model whose classifier is one linear layer, and that of {run.model.name} is not",
                key="classifier_start",
                value="linear",
                hint="use random",
            )
        if not run.frozen_batchnorm:
            refuse_batchnorm(network, key="classifier_start", value="linear")
        head.load_state_dict(self._linear_classifier(network.to(self.topology.device).eval()))
        self.built.module.train()

    def _linear_classifier(self, network: VideoNetwork) -> dict[str, Tensor]:
        """``weight`` (K, D) and ``bias`` (K,), kept in the run's folder; the same on any number of ranks."""
        run, seen = self.finetune, ClassifierInputs(network)
        source = ClipSource(run.data, split=run.data.split)
        labels = torch.from_numpy(source.labels).long()
        if (labels < 0).any():
            raise unlabelled(run)
        words = (run.model, run.initialise_from, run.seed, run.data.sampling, run.data.crop_pixels)
        identity = " ".join(map(str, (*words, run.data.resize_short_side_pixels)))

        def features(batch: ClipBatch) -> Tensor:
            network(self.views[False](batch.to(self.topology.device)))
            found = seen.take(len(batch.clips))
            assert found is not None
            return found

        def fit() -> dict[str, Tensor]:
            table = cached_features(
                features, run.data, batch=run.evaluation.batch, folder=Path(run.output), identity=identity,
                topology=self.topology, file=START_FEATURES,
            )  # fmt: skip
            if not self.topology.is_main:
                return {}
            weight, bias = fit_linear(
                table.double(), labels, classes=len(self.classes), l2=LINEAR_L2, steps=LINEAR_STEPS
            )
            return {"weight": weight.float().contiguous(), "bias": bias.float()}

        try:
            path = Path(run.output) / CLASSIFIER_START
            return kept_tensors(path, f"{source.fingerprint} {identity}", fit, self.topology)
        finally:
            seen.close()

    def splits(self) -> dict[str, str]:
        run = self.finetune
        within_training = bool(run.data.val_share) and run.test_split == run.data.val_split
        return super().splits() | ({} if within_training else {"test_split": run.test_split})

    def freeze(self, network: nn.Module) -> None:
        if self.finetune.train_part == "head":
            freeze_all_but_head(network)
        if self.finetune.frozen_batchnorm:
            freeze_batchnorm(network)

    def finish(
        self, metrics: Mapping[str, float], *, topology: Topology, folder: RunFolder
    ) -> dict[str, float]:
        """The test split, evaluated once, beside the validation metrics, which get the prefix ``val_``."""
        test = self.evaluate_split(
            self.finetune.test_split, topology=topology, predictions_file=folder.predictions
        )
        return {f"val_{name}": value for name, value in metrics.items()} | test
