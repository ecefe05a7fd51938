"""The columns ``cluster`` and ``near_duplicate``: clips sorted by their embeddings, and those that another repeats.

Of clips that show the same one stays: that of an evaluation split before that of ``train``, then the one with more
pixels, then the longer one, then the one that comes first in the dataset. Clips of one video are never each other's
duplicates.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cliplift.configs.sections import ConfigError
from cliplift.sharding.manifest import Dataset
from cliplift.sharding.read.catalog import NO_SPLIT, Catalog
from cliplift.sharding.read.embeddings import stored_embeddings
from cliplift.sharding.scores.stored import ColumnFacts, Values
from cliplift.sharding.scratch import scratch_folder
from cliplift.sharding.similar.dealt import nearest_clusters
from cliplift.sharding.similar.groups import group_clips
from cliplift.sharding.similar.kmeans import MOST_CLUSTERS, centroids_of, default_clusters
from cliplift.sharding.storage import Store

CLUSTER, NEAR_DUPLICATE = "cluster", "near_duplicate"
LIKENESS_VERSION = 2
SEED = 0

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Likeness:
    """How clips are sorted and compared.

    Attributes:
        embedding: which one, by the model's name or the column's; None where the dataset has one alone.
        clusters: K; None is the square root of the number of clips.
        seed: of the clusters.
    """

    embedding: str | None = None
    clusters: int | None = None
    seed: int = SEED

    def of(self, store: Store, base: Dataset) -> str:
        """What the columns are made of, in words.

        Raises:
            ConfigError: there is no such embedding, or no such number of clusters.
        """
        if self.clusters is not None and not 1 <= self.clusters <= MOST_CLUSTERS:
            raise ConfigError(
                "asks for what cannot be",
                file="command line",
                key="--clusters",
                value=self.clusters,
                hint=f"give 1 to {MOST_CLUSTERS}",
            )
        with stored_embeddings(store, base, name=self.embedding) as found:
            return f"{found.facts.name}, {self._clusters(base)} clusters, seed {self.seed}"

    def _clusters(self, base: Dataset) -> int:
        return self.clusters or default_clusters(base.samples)

    def columns(
        self, store: Store, base: Dataset, catalog: Catalog, names: Collection[str]
    ) -> Mapping[str, tuple[ColumnFacts, Values]]:
        """The columns of these names.

        Raises:
            ConfigError: there is no such embedding.
            ManifestError: the dataset's files are damaged.
        """
        of = self.of(store, base)
        with stored_embeddings(store, base, name=self.embedding) as vectors, scratch_folder() as folder:
            centroids = centroids_of(vectors, clusters=self._clusters(base), seed=self.seed)
            if NEAR_DUPLICATE in names:
                grouped = group_clips(
                    vectors, centroids, rank=ranks(catalog), video=catalog.column("video"), folder=folder
                )
                cluster, repeats = grouped.cluster, grouped.of >= 0
            else:
                cluster, repeats = nearest_clusters(vectors, centroids)[:, 0], np.zeros(0, dtype=bool)
        failed = int((cluster < 0).sum())
        number = ColumnFacts(CLUSTER, "number", LIKENESS_VERSION, failed=failed, of=of)
        numbers = np.where(cluster < 0, np.nan, cluster).astype(np.float32)
        boolean = ColumnFacts(NEAR_DUPLICATE, "boolean", LIKENESS_VERSION, failed=failed, of=of)
        made: dict[str, tuple[ColumnFacts, Values]] = {
            CLUSTER: (number, numbers),
            NEAR_DUPLICATE: (boolean, repeats.astype(np.uint8)),
        }
        return {name: made[name] for name in names}


def ranks(catalog: Catalog) -> Ints:
    """(N,) in which order the clips of a dataset are kept, 0 first."""
    names = catalog.head.splits
    codes = catalog.column("splits", fold=0)
    training = np.array([name == "train" for name in names] + [True])
    trained = training[np.where(codes == NO_SPLIT, len(names), codes)]
    pixels = catalog.column("width").astype(np.int64) * catalog.column("height").astype(np.int64)
    order = np.lexsort((-catalog.column("num_frames").astype(np.int64), -pixels, trained))
    found = np.empty(len(order), dtype=np.int64)
    found[order] = np.arange(len(order))
    return found
