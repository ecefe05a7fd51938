"""Embeddings of a dataset opened with the catalog that says which clips a generation has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cliplift.configs.sections import ConfigError
from cliplift.sharding.manifest import CATALOG_FILE, CATALOG_ROWS_FILE, Dataset, ManifestError
from cliplift.sharding.read.catalog import Catalog, load_head, open_catalog
from cliplift.sharding.scores.embeddings import Embeddings, VectorColumn, read_vectors_head
from cliplift.sharding.scratch import local_copy
from cliplift.sharding.storage import Store


@contextmanager
def stored_catalog(store: Store, dataset: Dataset) -> Iterator[Catalog]:
    """The catalog of a generation, mapped for as long as it is needed.

    Raises:
        ManifestError: it is missing or damaged.
    """
    names = dataset.file(CATALOG_FILE), dataset.file(CATALOG_ROWS_FILE)
    try:
        head = load_head(store.read(names[0]), dataset, file=f"{store.url}/{names[0]}")
        with local_copy(store, names[1]) as path:
            yield open_catalog(path, head, dataset, file=f"{store.url}/{names[1]}")
    except FileNotFoundError as error:
        raise ManifestError(
            f"{store.url}/{names[0]}: it, or its rows, do not exist; copy them too"
        ) from error


@contextmanager
def stored_embeddings(
    store: Store, dataset: Dataset, *, name: str | None = None, facts_digest: str | None = None
) -> Iterator[Embeddings]:
    """The embeddings of a generation, opened file by file while they are read.

    ``with stored_embeddings(*open_dataset(url)) as found: ...`` gives the only embedding that a dataset has.

    Args:
        store: where the dataset is.
        dataset: the generation.
        name: which embedding, by the model's name or the column's; None where there is one alone.
        facts_digest: of ``EmbeddingFacts`` instead, such as those of another dataset that it is compared with.

    Raises:
        ConfigError: there is none of that name, or several, or some clips have none.
        ManifestError: the dataset's files are damaged.
    """
    column = _chosen(store, dataset, name, facts_digest)
    lacking = {shard.shard for shard in dataset.shards if shard.samples} - {s.shard for s in column.shards}
    if lacking:
        raise ConfigError(
            f"the clips of {len(lacking)} shards of {store.url} have no embedding by {column.facts.model}",
            key="embedding",
            value=column.facts.name,
            hint=f"run `cliplift score {store.url} embedding:{column.facts.model}` again",
        )
    with ExitStack() as held:
        catalog = held.enter_context(stored_catalog(store, dataset))
        yield held.enter_context(Embeddings(store, dataset, column, partial(_offsets, catalog)))


def damage_of_embeddings(store: Store, dataset: Dataset) -> str:
    """What is wrong with a generation's embeddings; "" where nothing is, or there are none."""
    try:
        for column in read_vectors_head(store, dataset).columns:
            known = {one.shard for one in column.shards}
            with stored_catalog(store, dataset) as catalog:
                found = Embeddings(store, dataset, column, partial(_offsets, catalog))
                with found:
                    found.check_everything(known)
    except ManifestError as error:
        return str(error)
    return ""


def _chosen(store: Store, dataset: Dataset, name: str | None, facts_digest: str | None) -> VectorColumn:
    columns = read_vectors_head(store, dataset).columns
    if facts_digest is not None:
        fitting = [column for column in columns if column.facts.digest == facts_digest]
    else:
        fitting = [c for c in columns if name in (None, c.facts.name, c.facts.model)]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(column.facts.name for column in columns)
    if fitting:
        what, hint = f"{store.url} has several embeddings", f"name one of {names}"
    elif columns and facts_digest is not None:
        what, hint = f"{store.url} has no embedding by the same model and weights", f"it has {names}"
    elif columns:
        what, hint = f"{store.url} has no embedding {name!r}", f"it has {names}"
    else:
        what, hint = f"{store.url} has no embeddings", f"run `cliplift score {store.url} embedding` first"
    raise ConfigError(what, key="embedding", value=name, hint=hint)


def _offsets(catalog: Catalog, first: int, stop: int) -> NDArray[np.int64]:
    return catalog.column_of("mp4_offset", first, stop).astype(np.int64)
