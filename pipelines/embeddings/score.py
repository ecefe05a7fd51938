"""``cliplift score`` with embeddings: the networks of its words computed for ``sharding``, which knows none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cliplift.configs.sections import ConfigError
from cliplift.pipelines.embeddings.embed import NetworkEmbedder
from cliplift.pipelines.embeddings.networks import frozen_network
from cliplift.sharding.scoring.embed import EmbedReport, embed_dataset
from cliplift.sharding.scoring.run import ScoreProgress, scorable


def score_embeddings(
    url: str,
    words: Sequence[str],
    *,
    device: str,
    workers: int,
    part: tuple[int, int] | None,
    printer: Callable[[], Callable[[ScoreProgress], None]],
) -> list[str]:
    """Embed a dataset by each of these networks; the closing lines.

    Raises:
        ConfigError: a word names no network, or there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        hint = "use cpu, or cuda where there is a GPU"
        raise ConfigError(
            "is no device of this machine", file="command line", key="--device", value=device, hint=hint
        )
    scorable(url)  # before any weights are read
    networks = [frozen_network(word) for word in words]
    lines = []
    for network in networks:
        embedder = NetworkEmbedder(network, device=torch.device(device), workers=workers)
        report = embed_dataset(url, embedder, part=part, on_progress=printer())
        lines += _summary(url, network.facts.name, report, part)
    return lines


def _summary(url: str, name: str, report: EmbedReport, part: tuple[int, int] | None) -> list[str]:
    if part is not None:
        told = f"part {part[0]} of {part[1]}: {report.embedded} clips embedded; without --part a generation names them"
    elif report.new:
        told = f"generation {report.dataset.generation} has the embedding {name}; {report.embedded} clips embedded"
    else:
        told = f"embedded before; generation {report.dataset.generation} stays, with {name}"
    lines = [f"{url}: {told}"]
    if report.column is not None and report.column.failed:
        lines.append(f"  {report.column.failed} clips do not decode and have no embedding")
    return [*lines, *(f"  {reason}" for reason in report.reasons)]
