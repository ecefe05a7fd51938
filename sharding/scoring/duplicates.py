"""The column ``duplicate``: whether the build found that another video already gave a clip (``duplicates.jsonl``)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cliplift.configs.sections import ConfigError
from cliplift.sharding.manifest import DUPLICATES_FILE, SAMPLES_FILE, Dataset, ManifestError, generation_file
from cliplift.sharding.storage import Store
from cliplift.sharding.tables import batches, open_table

DUPLICATE_COLUMN, DUPLICATE_VERSION = "duplicate", 1


def duplicate_rows(store: Store, dataset: Dataset, table: Path) -> NDArray[np.uint8]:
    """(N,) 1 for every clip that the listings name, of this and all earlier generations.

    Args:
        store: where the dataset is.
        dataset: its manifest.
        table: its table of samples, as a local file.

    Raises:
        ConfigError: there is no listing: the tars were not built but indexed.
        ManifestError: a listing is damaged.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    keys = pa.array(sorted(_listed(store, dataset)), type=pa.string())
    found = [np.zeros(0, dtype=np.uint8)]
    for batch in batches(open_table(table, file=SAMPLES_FILE), file=SAMPLES_FILE, columns=["key"]):
        named = pc.is_in(batch.column("key"), value_set=keys)
        found.append(named.to_numpy().astype(np.uint8))
    return np.concatenate(found)


def _listed(store: Store, dataset: Dataset) -> set[str]:
    keys: set[str] = set()
    files = 0
    for generation in range(1, dataset.generation + 1):
        name = DUPLICATES_FILE if generation == 1 else generation_file(generation, DUPLICATES_FILE)
        if store.size(name) is None:
            continue
        files += 1
        try:
            keys.update(str(json.loads(line)["key"]) for line in store.read(name).decode().splitlines())
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ManifestError(f"{store.url}/{name}: a line names no clip: {error}") from error
    if not files:
        raise ConfigError(
            f"{store.url} has no {DUPLICATES_FILE}",
            key="duplicate",
            hint="only a dataset that `cliplift shard` built has looked for duplicates",
        )
    return keys
