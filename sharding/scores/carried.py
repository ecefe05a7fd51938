"""Columns of scores taken over by the next generation of a dataset: those of the clips that both have.

A clip is told by its shard and its place in it, which no generation changes. What was added has no score until
``cliplift score`` is called again, and no filter takes a column for whole that is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cliplift.sharding.manifest import (
    SAMPLES_FILE,
    SCORES_FILE,
    SCORES_VALUES_FILE,
    Dataset,
    ManifestError,
    digest,
)
from cliplift.sharding.scores.stored import (
    BLOCK_ROWS,
    TYPES,
    ColumnFacts,
    ScoreColumns,
    ScoresHead,
    Values,
    dump_scores_head,
    open_scores,
    write_columns,
)
from cliplift.sharding.scratch import local_copy, scratch_folder
from cliplift.sharding.storage import Store
from cliplift.sharding.tables import batches, open_table

Ints = NDArray[np.int64]


@contextmanager
def stored_scores(store: Store, dataset: Dataset) -> Iterator[ScoreColumns]:
    """The columns of a generation that has some, for as long as they are needed.

    Raises:
        ManifestError: they are missing or damaged.
    """
    with ExitStack() as held:
        yield open_scores(store, dataset, lambda name, _: held.enter_context(local_copy(store, name)))


def damage_of_scores(store: Store, dataset: Dataset) -> str:
    """What is wrong with a generation's columns; "" where nothing is, or there are none."""
    if not dataset.scores_sha256:
        return ""
    try:
        with stored_scores(store, dataset) as columns:
            columns.check_everything()
    except ManifestError as error:
        return str(error)
    return ""


def publish_scores(
    store: Store, dataset: Dataset, columns: Mapping[str, tuple[ColumnFacts, Values]], folder: Path
) -> Dataset:
    """Write the columns of a generation, the values first; the manifest that names them is returned and not written.

    Args:
        store: where the dataset is.
        dataset: the generation, with the checksum of its table of samples.
        columns: by name, each with its (N,) values.
        folder: for the unfinished file.
    """
    facts = tuple(columns[name][0] for name in sorted(columns))
    head = ScoresHead(dataset.samples_sha256, rows=dataset.samples, block_rows=BLOCK_ROWS, columns=facts)
    path = folder / SCORES_VALUES_FILE
    head = write_columns(path, head, [columns[one.name][1] for one in facts])
    store.publish(path, dataset.file(SCORES_VALUES_FILE))
    data = dump_scores_head(head)
    store.write(dataset.file(SCORES_FILE), data)
    return replace(dataset, scores_sha256=digest(data))


def carry_scores(store: Store, base: Dataset, dataset: Dataset, table: Path) -> Dataset:
    """Write the scores of the next generation's clips that the last one has; returns the manifest that names them.

    Args:
        store: where the dataset is.
        base: the last generation.
        dataset: the next one, whose files are being written.
        table: its table of samples, as a local file.

    Raises:
        ManifestError: the scores of the last generation are missing or damaged.
    """
    dataset = replace(dataset, scores_sha256="")
    if not base.scores_sha256:
        return dataset
    with stored_scores(store, base) as before, scratch_folder() as folder:
        with local_copy(store, base.file(SAMPLES_FILE)) as old:
            places = np.memmap(folder / "places", dtype=np.int64, mode="w+", shape=(base.samples,))
            for first, _, offsets in _places(old):
                places[first : first + len(offsets)] = offsets
        carried = {
            name: np.memmap(folder / name, dtype=TYPES[facts.kind], mode="w+", shape=(dataset.samples,))
            for name, facts in before.facts.items()
        }
        starts = _starts(base)
        added = 0
        for first, shards, offsets in _places(table):
            rows = _rows(shards, offsets, starts, places)
            known = rows >= 0
            added += int((~known).sum())
            for name, values in carried.items():
                part = np.full(len(rows), np.nan if values.dtype.kind == "f" else 0, dtype=values.dtype)
                part[known] = before.column(name)[rows[known]]
                values[first : first + len(rows)] = part
        columns = {
            name: (_facts(before.facts[name], values, added), values) for name, values in carried.items()
        }
        return publish_scores(store, dataset, columns, folder)


def _facts(before: ColumnFacts, values: Values, added: int) -> ColumnFacts:
    """What is said of a column after it was carried over; of those without a value, the rest failed."""
    if before.kind == "boolean":
        return replace(before, unscored=min(len(values), before.unscored + added))
    missing = int(np.isnan(values).sum())
    # Clips that were not scored before may be among those that are gone; the column is not whole either way.
    unscored = min(missing, before.unscored + added)
    return replace(before, unscored=unscored, failed=missing - unscored)


def _places(table: Path) -> Iterator[tuple[int, Ints, Ints]]:
    """The first row of each batch of a table, and the shard and place of every clip."""
    first = 0
    opened = open_table(table, file=SAMPLES_FILE)
    for batch in batches(opened, file=SAMPLES_FILE, columns=["shard", "mp4_offset"]):
        yield first, batch.column("shard").to_numpy(), batch.column("mp4_offset").to_numpy()
        first += batch.num_rows


def _starts(base: Dataset) -> dict[int, tuple[int, int]]:
    """The first row of every shard, and the one after its last."""
    ends = np.cumsum([shard.samples for shard in base.shards]).tolist()
    return {shard.shard: (end - shard.samples, end) for shard, end in zip(base.shards, ends, strict=True)}


def _rows(shards: Ints, offsets: Ints, starts: Mapping[int, tuple[int, int]], places: Ints) -> Ints:
    """The row that each clip had before, -1 where it is new."""
    rows = np.full(len(shards), -1, dtype=np.int64)
    for shard in np.unique(shards).tolist():
        first, stop = starts.get(shard, (0, 0))
        mine, known = shards == shard, np.asarray(places[first:stop])
        if not len(known):
            continue
        found = np.minimum(known.searchsorted(offsets[mine]), len(known) - 1)
        rows[mine] = np.where(known[found] == offsets[mine], found + first, -1)
    return rows
