"""Evaluation: every sample of a split exactly once over all ranks, its views averaged, exact counts.

The result does not depend on the number of ranks or the batch size: samples are dealt to ranks without padding,
gathered, and put back in dataset order before any number is computed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cliplift.configs.data import DataConfig
from cliplift.configs.load import load_run
from cliplift.configs.runs import TRAINING, EvaluateRun
from cliplift.configs.sections import ConfigError
from cliplift.configs.training import EngineConfig
from cliplift.models.factory import from_pretrained, read_config
from cliplift.models.protocol import VideoNetwork
from cliplift.models.weight_files import has_weights
from cliplift.pipelines.data.augment import DeviceAugment
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.data.eval_loader import EvalLoader
from cliplift.pipelines.distributed.agreement import agree_on_run
from cliplift.pipelines.distributed.collectives import Topology, leave, start
from cliplift.pipelines.engine.faults import StoppedBySignalError, caught_signals
from cliplift.pipelines.engine.task import ModelCard
from cliplift.pipelines.evaluation.features import ClassifierInputs
from cliplift.pipelines.evaluation.metrics import (
    bootstrap_interval,
    confusion_matrix,
    expected_calibration_error,
    global_average_precision,
    log_loss,
    mean_average_precision,
    mean_class_accuracy,
    top_k_accuracy,
    two_class_metrics,
)
from cliplift.pipelines.evaluation.over_split import over_split
from cliplift.pipelines.runs.folder import CONFIG, WEIGHTS, RunFolder
from cliplift.pipelines.runs.leaks import LeakStatement, leak_statements, statement_lines
from cliplift.pipelines.runs.predictions import Predictions
from cliplift.pipelines.runs.results import result_block


@dataclass(frozen=True)
class _Sums:
    """Of one sample, over the views seen so far."""

    scores: Tensor  # (K,) in fp64: logits or probabilities
    views: int
    label: int
    target: npt.NDArray[np.float32] | None  # (K,)
    features: Tensor | None  # (D,)

    def plus(self, other: _Sums) -> _Sums:
        both = None
        if self.features is not None and other.features is not None:
            both = self.features + other.features
        return replace(self, scores=self.scores + other.scores, views=self.views + other.views, features=both)


@torch.no_grad()
def classify_split(
    network: VideoNetwork,
    data: DataConfig,
    *,
    split: str,
    batch: int,
    topology: Topology,
    max_samples: int | None = None,
    multi_label: bool = False,
    keep_features: bool = False,
) -> Predictions:
    """Class probabilities of every sample of a split, averaged over its views; complete on every rank.

    ``keep_features`` also keeps what the classifier saw, where the network names its classifier.

    Raises:
        StoppedBySignalError: a signal has asked the command to stop.
    """
    loader = EvalLoader(
        data,
        split=split,
        batch=batch,
        rank=topology.rank,
        world_size=topology.world_size,
        max_samples=max_samples,
    )
    views = DeviceAugment(data.augment, network.input_spec, training=False)
    inputs = ClassifierInputs(network) if keep_features else None

    def forward(clips: ClipBatch) -> list[_Sums]:
        scores = network(views(clips)).float()
        if data.views.average == "probabilities":
            scores = scores.sigmoid() if multi_label else scores.softmax(dim=1)
        features = None if inputs is None else inputs.take(len(scores))
        targets = None if clips.targets is None else clips.targets.cpu().numpy()
        return [
            _Sums(
                row.clone(),  # alone: a view would carry the whole batch along to the other ranks
                views=1,
                label=label,
                target=None if targets is None else targets[at],
                features=None if features is None else features[at].clone(),
            )
            for at, (row, label) in enumerate(
                zip(scores.cpu().double().unbind(), clips.labels.tolist(), strict=True)
            )
        ]

    was_training = network.training
    network.eval()
    try:
        rows = over_split(loader, forward, topology, merge=_Sums.plus)
    finally:
        network.train(was_training)
        if inputs is not None:
            inputs.close()
    return _predictions(rows, loader, logits=data.views.average == "logits", multi_label=multi_label)


def _predictions(
    rows: Sequence[tuple[int, _Sums]], loader: EvalLoader, *, logits: bool, multi_label: bool
) -> Predictions:
    """``rows``: samples in dataset order, each with the sums over its views."""
    means = torch.stack([sums.scores / sums.views for _, sums in rows])
    probabilities = means
    if logits:
        probabilities = means.sigmoid() if multi_label else means.softmax(dim=1)
    facts = [loader.dataset.facts(sample) for sample, _ in rows]
    targets = [sums.target for _, sums in rows if sums.target is not None]
    features = [sums.features / sums.views for _, sums in rows if sums.features is not None]
    return Predictions(
        keys=tuple(f.key for f in facts),
        video_ids=tuple(f.video_id for f in facts),
        shard_urls=tuple(loader.dataset.url_of(sample) for sample, _ in rows),
        sample_index=np.array([sample for sample, _ in rows], dtype=np.int64),
        labels=np.array([sums.label for _, sums in rows], dtype=np.int64),
        targets=np.stack(targets) if targets else None,
        probabilities=probabilities.numpy().astype(np.float32),
        classes=tuple(loader.classes),
        logits=means.numpy().astype(np.float32) if logits else None,
        features=torch.stack(features).numpy().astype(np.float16) if len(features) == len(rows) else None,
    )


def classification_metrics(predictions: Predictions) -> dict[str, float]:
    """Top-1, top-5 (where there are more than five classes), per-class mean, calibration, loss; mAP for multi-label.

    Of two classes also precision, recall, F1 and the area under the ROC curve of the second.
    """
    if predictions.targets is not None:
        return {
            "mean_average_precision": mean_average_precision(predictions.probabilities, predictions.targets),
            "global_average_precision": global_average_precision(
                predictions.probabilities, predictions.targets
            ),
            "samples": float(len(predictions.keys)),
        }
    scores, labels = predictions.probabilities, predictions.labels
    unlabelled = int((labels < 0).sum())
    if unlabelled:
        raise ConfigError(
            f"has {unlabelled} of {len(labels)} samples without a label, so its accuracy cannot be computed",
            key="split",
            hint="evaluate a labelled split; `cliplift predict` classifies unlabelled videos",
        )
    K = scores.shape[1]
    confusion = confusion_matrix(scores.argmax(axis=1), labels, num_classes=K)
    right = (scores.argmax(axis=1) == labels).astype(np.float64)
    # Whole videos are drawn: clips of one video are not independent, and the interval would be too narrow.
    low, high = bootstrap_interval(right, seed=0, groups=np.array(predictions.video_ids))
    metrics = {
        "accuracy": top_k_accuracy(scores, labels, k=1),
        "accuracy_low": low,
        "accuracy_high": high,
        "mean_class_accuracy": mean_class_accuracy(confusion),
        "calibration_error": expected_calibration_error(scores, labels),
        "chance": 1.0 / K,
        "loss": log_loss(scores, labels),
        "samples": float(len(labels)),
    }
    if K > 5:
        metrics["top5_accuracy"] = top_k_accuracy(scores, labels, k=5)
    if K == 2:
        metrics |= two_class_metrics(scores[:, 1], labels)
    return metrics


def load_network(folder: str) -> tuple[VideoNetwork, ModelCard]:
    """The network of a run or export folder, with or without a classifier, and its card.

    Raises:
        ConfigError: there are no weights.
        ModelError: its files are damaged.
    """
    path = Path(folder)
    weights = path / WEIGHTS if (path / WEIGHTS).is_dir() else path
    if not has_weights(weights):
        raise ConfigError(
            f"{folder!r} holds no weights",
            key="run",
            value=folder,
            hint="give the folder of a finished run, or an export folder",
        )
    network = from_pretrained(weights)
    # A card of another make may lack any of its keys, as the type says.
    return network, cast(ModelCard, read_config(weights).get("extra", {}))


def load_finished(folder: str) -> tuple[VideoNetwork, DataConfig | None, ModelCard]:
    """The classifier of a run or export folder, the run's data section (None for an export), and its card."""
    network, card = load_network(folder)
    if not network.num_classes:
        raise ConfigError(
            f"{folder!r} has no classifier: it is a {card.get('stage', 'feature')} model",
            key="run",
            value=folder,
            hint="finetune it first, with initialise_from",
        )
    config = Path(folder) / CONFIG
    data = load_run(config, TRAINING).run.data if config.is_file() else None
    return network, data, card


def run_evaluate(run: EvaluateRun, *, command: Sequence[str]) -> dict[str, float]:
    """``cliplift evaluate``: predictions.parquet, result.json and the numbers printed.

    Raises:
        StoppedBySignalError: a signal has stopped it; nothing was written but the start of the folder. Among several
            ranks the process ends instead, with the signal's exit status.
    """
    topology = start(EngineConfig(device=run.device, zero_stage=0))
    with caught_signals():
        try:
            return _evaluate(run, command=command, topology=topology)
        except StoppedBySignalError as stopped:
            if topology.world_size > 1 and topology.is_main:
                print(f"cliplift: {stopped}: the evaluation has no result", file=sys.stderr, flush=True)
            leave(stopped.exit_status)
            raise


def _evaluate(run: EvaluateRun, *, command: Sequence[str], topology: Topology) -> dict[str, float]:
    started = time.monotonic()
    agree_on_run(run, topology)
    network, own_data, card = load_finished(run.run)
    data = run.data or own_data
    if data is None:
        raise ConfigError("is missing", key="data", hint="an export folder carries no data section: give one")
    if run.views is not None:
        data = data.model_copy(update={"views": run.views})
    folder = RunFolder.create(run.output, writes=topology.rank == 0)
    folder.write_start(
        run, stage="evaluate", name=Path(run.run).name, command=command, world_size=topology.world_size
    )
    network = network.to(topology.device)
    predictions = classify_split(
        network,
        data,
        split=run.split,
        batch=run.batch,
        topology=topology,
        multi_label=card.get("task") == "multi_label",
        keep_features=True,
    )
    _check_classes(card, predictions, run)
    metrics = classification_metrics(predictions)
    leaks: list[LeakStatement] = []
    if topology.rank == 0:
        leaks = leak_statements(Path(run.run), data.urls, split=run.split, fold=data.fold)
        predictions.write(folder.predictions)
        best_metric = "accuracy" if "accuracy" in metrics else "mean_average_precision"
        print(
            result_block(
                f"{Path(run.run).name} on {run.split}", metrics, best_metric=best_metric, folder=folder.path
            )
        )
        print(statement_lines(leaks))
    folder.write_result(
        stage="evaluate",
        metrics=metrics,
        seconds=time.monotonic() - started,
        classes=predictions.classes,
        split=run.split,
        evaluated=run.run,
        leaks=[asdict(one) for one in leaks],
    )
    return metrics


def _check_classes(card: ModelCard, predictions: Predictions, run: EvaluateRun) -> None:
    trained = tuple(card.get("classes", ()))
    if trained and predictions.classes and trained != predictions.classes:
        raise ConfigError(
            f"the shards' {len(predictions.classes)} classes are not the {len(trained)} the model was trained on",
            key="data.shards",
            value=run.run,
            hint="evaluate on shards built with the same class list",
        )
