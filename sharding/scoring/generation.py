"""The next generation of a dataset: the same clips, with further columns of scores, or embeddings.

Table and catalog are copied, so that a generation goes on to stand for itself; the data's fingerprint stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from cliplift.sharding.manifest import (
    CATALOG_FILE,
    CATALOG_ROWS_FILE,
    DATASET_FILE,
    REMOVED_FILE,
    SAMPLES_FILE,
    Dataset,
    ManifestError,
    dump_dataset,
)
from cliplift.sharding.read.catalog import Catalog
from cliplift.sharding.read.generations import manifest_file, read_samples
from cliplift.sharding.scores.carried import publish_scores, stored_scores
from cliplift.sharding.scores.embeddings import VectorColumn, publish_vectors, read_vectors_head
from cliplift.sharding.scores.measures import SCORES
from cliplift.sharding.scores.stored import TYPES, ColumnFacts, Values
from cliplift.sharding.scoring.duplicates import DUPLICATE_COLUMN, DUPLICATE_VERSION, duplicate_rows
from cliplift.sharding.scoring.likeness import CLUSTER, LIKENESS_VERSION, NEAR_DUPLICATE
from cliplift.sharding.scoring.parts import part_file, read_part
from cliplift.sharding.scratch import scratch_folder
from cliplift.sharding.storage import Store

VERSIONS = {DUPLICATE_COLUMN: DUPLICATE_VERSION, CLUSTER: LIKENESS_VERSION, NEAR_DUPLICATE: LIKENESS_VERSION}
COPIED = (SAMPLES_FILE, CATALOG_FILE, CATALOG_ROWS_FILE)


def is_whole(facts: ColumnFacts | None, name: str, of: str = "") -> bool:
    """Whether a column holds this version of a score for every clip, made of the same."""
    version = SCORES[name].version if name in SCORES else VERSIONS[name]
    return facts is not None and not facts.unscored and (facts.version, facts.of) == (version, of)


def next_generation(
    store: Store,
    base: Dataset,
    catalog: Catalog,
    names: Sequence[str],
    *,
    made: Mapping[str, tuple[ColumnFacts, Values]] = {},
    vectors: tuple[VectorColumn, ...] | None = None,
) -> tuple[Dataset, tuple[ColumnFacts, ...]]:
    """Write the generation that has the columns of the last one and these, whose shards are all scored.

    Args:
        store: where the dataset is.
        base: its latest generation.
        catalog: of that generation.
        names: the new columns.
        made: those of them that are at hand, by name.
        vectors: all its embeddings; None keeps those of the last.

    Returns:
        The new generation, and its columns.

    Raises:
        ConfigError: ``duplicate`` is asked for and nothing looked for duplicates.
        ManifestError: the dataset's files are damaged.
    """
    dataset = replace(base, generation=base.generation + 1, scores_sha256="")
    columns: dict[str, tuple[ColumnFacts, Values]] = {}
    with ExitStack() as held:
        folder = held.enter_context(scratch_folder())
        if base.scores_sha256:
            before = held.enter_context(stored_scores(store, base))
            columns = {name: (facts, before.column(name)) for name, facts in before.facts.items()}
        for name in names:
            if name == DUPLICATE_COLUMN:
                table = held.enter_context(read_samples(store, base, store.url))
                columns[name] = (
                    ColumnFacts(name, "boolean", DUPLICATE_VERSION),
                    duplicate_rows(store, base, table),
                )
            elif name in made:
                columns[name] = made[name]
            else:
                columns[name] = _assembled(store, base, catalog, name, folder)
        _copy_tables(store, base, dataset, folder)
        if columns:
            dataset = publish_scores(store, dataset, columns, folder)
        kept = read_vectors_head(store, base).columns if vectors is None else vectors
        dataset = publish_vectors(store, dataset, kept)
        store.write(manifest_file(base.generation), dump_dataset(base))
        store.write(manifest_file(dataset.generation), dump_dataset(dataset))
        store.write(DATASET_FILE, dump_dataset(dataset))
    return dataset, tuple(columns[name][0] for name in sorted(columns))


def _assembled(
    store: Store, base: Dataset, catalog: Catalog, name: str, folder: Path
) -> tuple[ColumnFacts, Values]:
    """A column made of the scores of all shards, mapped from a file."""
    values = np.memmap(folder / name, dtype=TYPES["number"], mode="w+", shape=(base.samples,))
    failed = 0
    for shard, stop in zip(base.shards, catalog.shard_ends.tolist(), strict=True):
        first = stop - shard.samples
        if not shard.samples:
            continue
        offsets = catalog.column_of("mp4_offset", first, stop).astype(np.int64)
        found = read_part(store, shard, name, offsets)
        if found is None:
            raise ManifestError(f"{store.url}/{part_file(shard, name)}: is gone again; score once more")
        values[first:stop] = found
        failed += int(np.isnan(found).sum())
    return ColumnFacts(name, "number", SCORES[name].version, failed=failed), values


def _copy_tables(store: Store, base: Dataset, dataset: Dataset, folder: Path) -> None:
    for name in (*COPIED, *((REMOVED_FILE,) if base.removed_sha256 else ())):
        copy = folder / name
        store.fetch(base.file(name), copy)
        store.publish(copy, dataset.file(name))
