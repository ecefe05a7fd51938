"""Clips that show the same by their embeddings, where both datasets have those of one network: mirrored, cropped or
played at another speed, which no hash of a picture finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cliplift.sharding.manifest import Dataset
from cliplift.sharding.read.embeddings import stored_embeddings
from cliplift.sharding.scores.embeddings import Embeddings, VectorColumn, read_vectors_head
from cliplift.sharding.similar.groups import SameClips, same_clips
from cliplift.sharding.storage import Store

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class SharedEmbedding:
    """An embedding that all clips of two datasets have.

    Attributes:
        name: of the column.
        digest: of all that decides its values.
    """

    name: str
    digest: str


def shared_embedding(first: tuple[Store, Dataset], second: tuple[Store, Dataset]) -> SharedEmbedding | None:
    """The first by name; None where there is none. Raises ManifestError."""
    one, other = (_whole(*each) for each in (first, second))
    both = sorted((column.facts.name, digest) for digest, column in one.items() if digest in other)
    return SharedEmbedding(*both[0]) if both else None


def _whole(store: Store, dataset: Dataset) -> Mapping[str, VectorColumn]:
    """The embeddings that all shards have, by the digest of what they are."""
    needed = {shard.shard for shard in dataset.shards if shard.samples}
    columns = read_vectors_head(store, dataset).columns
    return {c.facts.digest: c for c in columns if needed <= {one.shard for one in c.shards}}


class _Chosen:
    """The embeddings of some rows; the others count as clips that have none."""

    def __init__(self, whole: Embeddings, chosen: Mask) -> None:
        self.rows, self.width = whole.rows, whole.width
        self._whole, self._chosen = whole, chosen

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float16]]]:
        for first, values in self._whole.blocks():
            kept = self._chosen[first : first + len(values), None]
            yield first, np.where(kept, values, np.float16(np.nan))

    def sketch(self, row: int) -> tuple[float, NDArray[np.float32]]:
        return self._whole.sketch(row)


def embedded_pairs(
    first: tuple[Store, Dataset],
    second: tuple[Store, Dataset],
    shared: SharedEmbedding,
    chosen: Callable[[], Mask],
) -> list[SameClips]:
    """The clips of one dataset that show what one of the chosen clips of another shows; for each the most alike.

    Args:
        first: the dataset that is searched.
        second: the one whose clips are looked for.
        shared: the embedding that both have.
        chosen: gives (N,) which rows of the second are looked for.

    Raises:
        ManifestError: embeddings are missing or damaged.
    """
    with (
        stored_embeddings(*first, facts_digest=shared.digest) as one,
        stored_embeddings(*second, facts_digest=shared.digest) as other,
    ):
        return list(same_clips(one, _Chosen(other, chosen())))
