"""What the classifier saw: features at its input, collected while a split is evaluated, and their map in the plane."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from cliplift.models.protocol import NamesHead

MAX_POINTS = 2000
PERPLEXITY = 30.0


class ClassifierInputs:
    """What a network's classifier is given in each forward pass; nothing where the network names no classifier."""

    def __init__(self, network: nn.Module) -> None:
        self._seen: list[Tensor] = []
        head = network.get_submodule(network.head_name) if isinstance(network, NamesHead) else None
        self._hook = None if head is None else head.register_forward_pre_hook(self._watch)

    def _watch(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._seen.append(inputs[0].detach())

    def take(self, clips: int) -> Tensor | None:
        """(B, D) in fp32 on the CPU, of the last forward pass over B = ``clips``.

        None where it does not describe a clip: for a classifier that is called for every frame, or on a map.
        """
        seen, self._seen = self._seen, []
        if len(seen) != 1 or len(seen[0]) != clips:
            return None
        return seen[0].float().flatten(1).cpu()

    def close(self) -> None:
        """Stop watching the network."""
        if self._hook is not None:
            self._hook.remove()


def plane(features: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
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
