"""Frozen features judged on labelled data: k-NN and a linear probe.

k-NN as in instance discrimination (arXiv:1805.01978, section 3.4) and DINO: cosine similarity, the k nearest training
clips vote for their class with weight exp(similarity / temperature). Linear probe: multinomial logistic regression on
standardised features, fitted to convergence by L-BFGS, so that no learning rate decides the number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cliplift.configs.data import DataConfig, ViewsConfig
from cliplift.configs.runs import PretrainRun, TransferRun
from cliplift.configs.sections import ConfigError
from cliplift.configs.supervision import ProbeConfig
from cliplift.models.protocol import VideoNetwork
from cliplift.pipelines.data.augment import DeviceAugment
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.data.eval_loader import EvalLoader
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.evaluation.over_split import over_split
from cliplift.pipelines.probes.attentive import attentive_probe


@torch.no_grad()
def probe(
    student: VideoNetwork, run: TransferRun | PretrainRun, config: ProbeConfig, *, topology: Topology
) -> dict[str, float]:
    """``probe_knn_accuracy``, ``probe_linear_accuracy`` and ``probe_chance`` of a student's features.

    Raises:
        ConfigError: the labelled data hold unlabelled clips or one class.
    """
    # The run's clips and crop on other data: what chooses samples there is the probe's own.
    data = run.data.model_copy(
        update={
            "shards": config.shards,
            "split": config.split,
            "val_split": config.test_split,
            "fold": config.fold,
            "val_share": 0.0,
            "label_share": 1.0,
            "sequential": None,
            "views": ViewsConfig(),
        }
    )
    train, train_labels = features_of(student, data, config.split, run=run, topology=topology)
    test, test_labels = features_of(student, data, config.test_split, run=run, topology=topology)
    classes = int(train_labels.max()) + 1
    known = len(set(train_labels.tolist()))
    if int(torch.cat([train_labels, test_labels]).min()) < 0 or known < 2:
        raise ConfigError(
            "needs labelled clips of two classes or more",
            key="probe.shards",
            value=config.shards[0],
            hint="shard a labelled source",
        )
    found = {
        "probe_knn_accuracy": knn_accuracy(
            train, train_labels, test, test_labels, k=config.neighbours, temperature=config.temperature
        ),
        "probe_chance": 1.0 / known,
    }
    if config.linear_steps:
        weights, bias = fit_linear(
            train, train_labels, classes=classes, l2=config.linear_l2, steps=config.linear_steps
        )
        guesses = (test @ weights.T + bias).argmax(dim=1)
        found["probe_linear_accuracy"] = float((guesses == test_labels).double().mean())
    if config.attentive is not None:
        found |= attentive_probe(student, data, config.attentive, classes=classes, run=run, topology=topology)
    return found


def features_of(
    student: VideoNetwork, data: DataConfig, split: str, *, run: TransferRun | PretrainRun, topology: Topology
) -> tuple[Tensor, Tensor]:
    """Features (N, D) in fp64 and labels (N,) of a split, in dataset order, the same on every rank."""
    loader = EvalLoader(
        data, split=split, batch=run.evaluation.batch, rank=topology.rank, world_size=topology.world_size
    )
    views = DeviceAugment(data.augment, student.input_spec, training=False)

    def forward(batch: ClipBatch) -> list[tuple[int, Tensor]]:
        features = student(views(batch)).float().cpu()
        return [(label, row.clone()) for label, row in zip(batch.labels.tolist(), features, strict=True)]

    values = [value for _, value in over_split(loader, forward, topology)]
    return torch.stack([row for _, row in values]).double(), torch.tensor([label for label, _ in values])


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, k: int, temperature: float
) -> float:
    """Share of test rows (M, D) whose k nearest training rows (N, D) vote for the right class."""
    similarity = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T  # (M, N)
    nearest, at = similarity.topk(min(k, len(train)), dim=1)
    votes = torch.zeros(len(test), int(train_labels.max()) + 1, dtype=train.dtype)
    votes.scatter_add_(1, train_labels[at], (nearest / temperature).exp())
    return float((votes.argmax(dim=1) == test_labels).double().mean())


@torch.enable_grad()
def fit_linear(
    train: Tensor, labels: Tensor, *, classes: int, l2: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Weights (K, D) and bias (K,) on the features as they are, minimising mean cross-entropy + l2 / 2 |w|^2.

    The penalty is on the weights of standardised features; they are folded back into the raw ones.
    """
    mean, spread = train.mean(dim=0), train.std(dim=0, unbiased=False).clamp_min(1e-6)
    scaled = (train - mean) / spread
    weights = torch.zeros(classes, train.shape[1], dtype=train.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=train.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(scaled @ weights.T + bias, labels) + 0.5 * l2 * weights.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    folded = weights.detach() / spread
    return folded, bias.detach() - folded @ mean
