"""What the classifier saw: features at its input, collected while a split is evaluated, and their map in the plane."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cliplift.models.protocol import NamesHead
from cliplift.pipelines.distributed.collectives import Topology, gather_objects

FEATURES = "features.npy"
MAX_POINTS = 2000
PERPLEXITY = 30.0


class FeatureSums:
    """Sums of the classifier's inputs over the views of each sample; nothing where the network names no classifier."""

    def __init__(self, network: nn.Module) -> None:
        self.sums: dict[int, tuple[Tensor, int]] = {}
        self._seen: list[Tensor] = []
        head = network.get_submodule(network.head_name) if isinstance(network, NamesHead) else None
        self._hook = None if head is None else head.register_forward_pre_hook(self._watch)

    def _watch(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._seen.append(inputs[0].detach())

    def add(self, samples: list[int]) -> None:
        """Take the last forward pass, whose rows are views of these samples."""
        seen, self._seen = self._seen, []
        # A classifier called per frame, or on a map, says nothing about one clip.
        if len(seen) != 1 or len(seen[0]) != len(samples):
            return
        for row, sample in zip(seen[0].float().flatten(1).cpu(), samples, strict=True):
            total, count = self.sums.get(sample, (torch.zeros_like(row), 0))
            self.sums[sample] = total + row, count + 1

    def gathered(self, topology: Topology) -> npt.NDArray[np.float16] | None:
        """(N, D) in dataset order, the same on every rank; None where there are none. Ends the collecting."""
        if self._hook is not None:
            self._hook.remove()
        rows = [(sample, (total / count).numpy()) for sample, (total, count) in self.sums.items()]
        everything = sorted(gather_objects(rows, topology), key=lambda row: row[0])
        return np.stack([row[1] for row in everything]).astype(np.float16) if everything else None


def plane(features: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(N, D) -> (N, 2) by t-SNE (van der Maaten, Hinton 2008) from a PCA start, the same every time.

    Raises:
        ImportError: scikit-learn, the extra ``tsne``, is not installed.
    """
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    found = TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=0).fit_transform(
        np.asarray(features, dtype=np.float32)
    )
    return np.asarray(found, dtype=np.float64)


def read_features(folder: Path, *, rows: int) -> npt.NDArray[Any] | None:
    """A run's features; None where it has none, or they are of another evaluation."""
    path = folder / FEATURES
    if not path.is_file():
        return None
    found: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    return found if len(found) == rows and rows >= 5 else None
