"""The teacher's features of every training sample, computed once and kept in the run's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cliplift.configs.data import DataConfig, ViewsConfig
from cliplift.pipelines.data.loader import ClipBatch, EvalLoader
from cliplift.pipelines.distributed.collectives import Topology, barrier
from cliplift.pipelines.evaluation.over_split import over_split

FILE = "teacher_features.safetensors"


@torch.no_grad()
def cached_features(
    features: Callable[[ClipBatch], Tensor],
    data: DataConfig,
    *,
    batch: int,
    folder: Path,
    identity: str,
    topology: Topology,
) -> Tensor:
    """(N, D) in fp16 on the CPU, row i for sample i of the training split; the same on every rank.

    Args:
        features: (B, D) of a batch of plain middle clips.
        data: the run's data; its training split is passed over once, each rank reading its share.
        batch: clips at a time.
        folder: where the file is kept and, on a restart, found.
        identity: what the features depend on besides the data; a file of another identity is made anew.
        topology: the ranks.
    """
    loader = EvalLoader(
        data.model_copy(update={"views": ViewsConfig()}),
        split=data.split,
        batch=batch,
        rank=topology.rank,
        world_size=topology.world_size,
    )
    wanted = f"{loader.dataset.fingerprint} {identity}"
    path = folder / FILE
    kept = load_file(path) if path.is_file() else {}
    if list(kept) == [wanted]:
        return kept[wanted]

    def forward(clips: ClipBatch) -> list[Tensor]:
        return [row.clone() for row in features(clips).half().cpu()]

    table = torch.stack([row for _, row in over_split(loader, forward, topology)])
    if topology.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({wanted: table}, partial)
        partial.replace(path)
    barrier(topology)
    return table
