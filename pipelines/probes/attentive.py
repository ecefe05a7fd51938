"""An attentive probe of frozen features: a grid of heads, learning rate x weight decay, trained in one pass.

Source: facebookresearch/vjepa2, evals/video_classification_frozen; V-JEPA 2, arXiv 2506.09985, section 5. The tokens of
a batch are computed once and given to every head of the grid. Heads start equal and share nothing: each has its own
loss, AdamW state and learning rate, a cosine to 0 without warm-up. The number is that of the best head on the test
clips, as published; the median head is given beside it, because the best is chosen on the clips it is judged on.

Shape letters: S heads of the grid, B clips, N tokens, D width, K classes.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.configs.data import DataConfig
from cliplift.configs.runs import PretrainRun, TransferRun
from cliplift.configs.sections import ConfigError
from cliplift.configs.supervision import AttentiveProbeConfig
from cliplift.models.protocol import GivesFeatures, ModelError, VideoNetwork
from cliplift.models.video_vit.attentive import AttentiveProbe
from cliplift.pipelines.data.augment import DeviceAugment
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.data.eval_loader import EvalLoader
from cliplift.pipelines.data.loader import ClipLoader
from cliplift.pipelines.distributed.collectives import Topology, all_reduce_mean
from cliplift.pipelines.engine.faults import beat, stop_together
from cliplift.pipelines.evaluation.over_split import over_split


class HeadGrid(nn.Module):
    """Equal probes, one for each learning rate and weight decay."""

    def __init__(self, first: AttentiveProbe, config: AttentiveProbeConfig) -> None:
        super().__init__()
        self.settings = tuple(itertools.product(config.lrs, config.weight_decays))
        self.heads = nn.ModuleList(copy.deepcopy(first) for _ in self.settings)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (S, B, K)."""
        return torch.stack([head(tokens) for head in self.heads])

    def optimizer(self) -> torch.optim.AdamW:
        """One for all heads. Biases and norms are not decayed (released code)."""
        groups = []
        for (lr, decay), head in zip(self.settings, self.heads, strict=True):
            for decayed in (True, False):
                own = [parameter for parameter in head.parameters() if (parameter.ndim > 1) == decayed]
                groups.append(
                    {"params": own, "lr": lr, "peak": lr, "weight_decay": decay if decayed else 0.0}
                )
        return torch.optim.AdamW(groups, fused=True)


@torch.enable_grad()
def train_heads(
    grid: HeadGrid, batches: Iterable[tuple[Tensor, Tensor]], *, steps: int, topology: Topology
) -> None:
    """One step of every head for each batch of tokens (B, N, D) and labels (B,), this rank's share. Collective.

    Args:
        steps: number of batches, over which the learning rates fall to 0.
    """
    optimizer = grid.optimizer()
    for step, (tokens, labels) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        logits = grid(tokens.detach())
        # a sum over heads of means over clips: no head's gradient knows of the others
        loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="sum") / len(
            labels
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if topology.world_size > 1:
            for head in grid.heads:
                _average_gradients(head, topology)
        optimizer.step()
        beat()
        stop_together(topology)


def _average_gradients(head: nn.Module, topology: Topology) -> None:
    gradients = [parameter.grad for parameter in head.parameters() if parameter.grad is not None]
    mean = all_reduce_mean(torch.cat([gradient.flatten() for gradient in gradients]), topology)
    at = 0
    for gradient in gradients:
        gradient.copy_(mean[at : at + gradient.numel()].view_as(gradient))
        at += gradient.numel()


def attentive_probe(
    network: VideoNetwork,
    data: DataConfig,
    config: AttentiveProbeConfig,
    *,
    classes: int,
    run: TransferRun | PretrainRun,
    topology: Topology,
) -> dict[str, float]:
    """``probe_attentive_accuracy`` of the best head with its settings, and that of the median head. Collective.

    Args:
        network: frozen; anything with a map of features.
        data: the labelled set; ``split`` is trained on with the run's augmentation, ``val_split`` tested on.

    Raises:
        ConfigError: the network gives no tokens, or the probe's sizes do not fit it or the ranks; names the key.
    """
    grid = _fresh_grid(network, config, classes=classes, seed=run.seed).to(topology.device)
    loader = _loader(data, config, seed=run.seed, topology=topology)
    try:
        steps = max(1, math.ceil(config.epochs * loader.steps_per_epoch))
        augment = DeviceAugment(data.augment, network.input_spec, training=True)

        def batches() -> Iterable[tuple[Tensor, Tensor]]:
            for batch in loader.micro_batches(start_step=0, stop_step=steps):
                here = batch.to(topology.device)
                yield tokens_of(network, augment(here)), here.labels

        train_heads(grid, batches(), steps=steps, topology=topology)
    finally:
        loader.close()
    right = _right(grid, network, data, run=run, topology=topology)
    shares = right.double().mean(dim=0).tolist()
    best = max(range(len(shares)), key=shares.__getitem__)
    lr, decay = grid.settings[best]
    return {
        "probe_attentive_accuracy": shares[best],
        "probe_attentive_median_accuracy": statistics.median(shares),
        "probe_attentive_lr": lr,
        "probe_attentive_weight_decay": decay,
    }


@torch.no_grad()
def tokens_of(network: VideoNetwork, clips: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, N, D): the cells of the network's last map of features."""
    assert isinstance(network, GivesFeatures)  # _fresh_grid knows no others
    return network.forward_features(clips).float().flatten(2).transpose(1, 2)


def _fresh_grid(network: VideoNetwork, config: AttentiveProbeConfig, *, classes: int, seed: int) -> HeadGrid:
    if not isinstance(network, GivesFeatures):
        raise ConfigError(
            f"reads a map of features, and {type(network).__name__} has none",
            key="probe.attentive",
            hint="use null",
        )
    try:
        with torch.random.fork_rng(devices=()):  # training goes on with the numbers it would have drawn
            torch.manual_seed(seed)
            first = AttentiveProbe(
                int(network.feature_dim), num_classes=classes, heads=config.heads, depth=config.depth
            )
    except ModelError as error:
        raise ConfigError(
            f"no such probe: {error}", key="probe.attentive.heads", value=config.heads
        ) from None
    return HeadGrid(first, config)


def _loader(data: DataConfig, config: AttentiveProbeConfig, *, seed: int, topology: Topology) -> ClipLoader:
    each, rest = divmod(config.batch, topology.world_size)
    if rest:
        raise ConfigError(
            f"{config.batch} clips cannot be dealt evenly to {topology.world_size} ranks",
            key="probe.attentive.batch",
            value=config.batch,
            hint=f"use a multiple of {topology.world_size}",
        )
    try:
        return ClipLoader(
            data.model_copy(
                update={"clips_per_sample": 1, "class_balanced": False, "cluster_balanced": False}
            ),
            seed=seed,
            global_batch=config.batch,
            micro_batch=each,
            rank=topology.rank,
            world_size=topology.world_size,
        )
    except ConfigError as error:
        raise ConfigError(
            error.reason, key="probe.attentive.batch", value=config.batch, hint=error.hint
        ) from None


def _right(
    grid: HeadGrid,
    network: VideoNetwork,
    data: DataConfig,
    *,
    run: TransferRun | PretrainRun,
    topology: Topology,
) -> Tensor:
    """Of each test clip and head, whether the class is right: (clips, S) bool."""
    loader = EvalLoader(
        data,
        split=data.val_split,
        batch=run.evaluation.batch,
        rank=topology.rank,
        world_size=topology.world_size,
    )
    views = DeviceAugment(data.augment, network.input_spec, training=False)

    @torch.no_grad()
    def forward(batch: ClipBatch) -> list[Tensor]:
        guesses = grid(tokens_of(network, views(batch))).argmax(dim=2)  # (S, B)
        return [row.clone() for row in (guesses == batch.labels).T.cpu()]

    return torch.stack([row for _, row in over_split(loader, forward, topology)])
