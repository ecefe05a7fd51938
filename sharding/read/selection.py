"""Which rows of a catalog a split, a fold and a subset are: runs of neighbouring rows."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from cliplift.configs.sections import ConfigError
from cliplift.configs.where import KEY, canonical_text, check_kinds, columns_of
from cliplift.configs.where_reader import parse
from cliplift.sharding.manifest import (
    CATALOG_ROWS_FILE,
    Dataset,
    ManifestError,
    canonical,
    digest,
)
from cliplift.sharding.read.catalog import NO_SPLIT, SEVERAL_SPLITS, Catalog, CatalogHead, Ints
from cliplift.sharding.read.columns import named_groups
from cliplift.sharding.read.generations import named_generation
from cliplift.sharding.read.sample_table import SampleTable
from cliplift.sharding.read.shared import SharedArray
from cliplift.sharding.read.subsets import Draws, Mask, Subset, draws
from cliplift.sharding.scores.chosen import (
    catalog_columns,
    check_texts,
    chosen_rows,
    not_scored,
    score_columns,
)
from cliplift.sharding.scores.stored import ScoreColumns

MANY_RUNS = 1000  # above it one gather is faster than as many slices
ALL = "all"  # the one split of a dataset with folds of which none is chosen


class Rows:
    """Numbers of rows in rising order, kept as runs of neighbours; small where a split is whole shards.

    Args:
        firsts: (K,) first row of each run.
        lengths: (K,) rows of each run, at least one.
    """

    def __init__(self, firsts: Ints, lengths: Ints) -> None:
        self._share(SharedArray(np.stack([firsts, np.cumsum(lengths)]).astype(np.int64)))

    def _share(self, runs: SharedArray[np.int64]) -> None:
        self._runs = runs
        self._firsts, self._ends = runs.array[0], runs.array[1]
        self._length = int(self._ends[-1]) if len(self._ends) else 0
        # Of a few runs, lists are searched several times as fast.
        self._lists: tuple[list[int], list[int]] | None = None
        if len(self._firsts) <= MANY_RUNS:
            self._lists = self._firsts.tolist(), [0, *self._ends.tolist()]

    def __getstate__(self) -> dict[str, object]:
        return {"runs": self._runs}

    def __setstate__(self, state: dict[str, SharedArray[np.int64]]) -> None:
        self._share(state["runs"])

    @staticmethod
    def of_mask(mask: npt.NDArray[np.bool_], first: int = 0) -> tuple[Ints, Ints]:
        """Firsts and lengths of the runs of True; the mask begins at row ``first``."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
        return edges[::2] + first, edges[1::2] - edges[::2]

    def __len__(self) -> int:
        return self._length

    def row(self, i: int) -> int:
        """The i-th row."""
        if self._lists is not None:
            firsts, starts = self._lists
            run = bisect_right(starts, i) - 1
            return firsts[run] + i - starts[run]
        run = int(self._ends.searchsorted(i, side="right"))
        return int(self._firsts[run]) + i - (int(self._ends[run - 1]) if run else 0)

    def before(self, rows: Ints) -> Ints:
        """How many rows lie before each of these."""
        firsts, ends = self._firsts, self._ends
        if not len(firsts):
            return np.zeros(len(rows), dtype=np.int64)
        starts = np.concatenate([[0], ends[:-1]])
        run = np.maximum(firsts.searchsorted(rows, side="right") - 1, 0)
        found: Ints = starts[run] + np.clip(rows - firsts[run], 0, (ends - starts)[run])
        return found

    def runs(self) -> tuple[Ints, Ints]:
        """(K,) first row of each run, and (K,) the one after its last."""
        firsts, ends = self._firsts, self._ends
        return firsts, firsts + np.diff(ends, prepend=0)

    def array(self) -> Ints:
        """All of them, (N,) int64."""
        firsts, ends = self._firsts, self._ends
        starts = np.concatenate([[0], ends[:-1]])
        found: Ints = np.arange(len(self)) + np.repeat(firsts - starts, ends - starts)
        return found

    def taken(self, mask: npt.NDArray[np.bool_]) -> Rows:
        """Those of them where the mask (N,) is True."""
        rows = self.array()[mask]
        breaks = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        return Rows(rows[breaks], np.diff(breaks, append=len(rows)))

    def of(self, catalog: Catalog, name: str) -> npt.NDArray[np.generic]:
        """(N,) the values of a column in these rows."""
        firsts, stops = self.runs()
        if len(firsts) > MANY_RUNS:
            return catalog.column(name)[self.array()]
        parts = [catalog.column_of(name, int(a), int(b)) for a, b in zip(firsts, stops, strict=True)]
        return np.concatenate(parts) if parts else catalog.rows[name][:0]


def split_names(head: CatalogHead, dataset: Dataset, url: str, fold: int | None) -> dict[str, int]:
    """The splits of a dataset under a fold, sorted, and how many samples each has.

    Raises:
        ConfigError: the dataset has no such fold.
    """
    if not dataset.folds and fold is not None:
        raise ConfigError(f"{url} has a single split", key="data.fold", value=fold, hint="remove it")
    if dataset.folds and fold is None:
        return {ALL: head.rows}
    if fold is not None and fold > dataset.folds:
        raise ConfigError(
            f"{url} has {dataset.folds} folds", key="data.fold", value=fold, hint=f"use 1 to {dataset.folds}"
        )
    counts = zip(head.splits, head.counts[(fold or 1) - 1], strict=True)
    return {name: count for name, count in counts if count}


def rows_of_split(catalog: Catalog, dataset: Dataset, fold: int | None, split: str | None) -> Rows:
    """The rows of a split, or of all splits; those that the fold leaves out are in none.

    Shards whose samples are of one split are taken or left as they are; of others the rows are looked at.
    """
    head = catalog.head
    number = (fold or 1) - 1
    if (dataset.folds and fold is None) or (split is None and sum(head.counts[number]) == head.rows):
        return Rows(np.array([0]), np.array([head.rows]))
    wanted = None if split is None else head.splits.index(split)
    firsts, lengths = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    shard = 0
    for code, shards in head.shard_splits[number]:
        first = int(catalog.shard_ends[shard - 1]) if shard else 0
        shard += shards
        stop = int(catalog.shard_ends[shard - 1])
        if code == SEVERAL_SPLITS:
            codes = catalog.column_of("splits", first, stop, fold=number)
            found = Rows.of_mask(codes != NO_SPLIT if wanted is None else codes == wanted, first)
            firsts.append(found[0])
            lengths.append(found[1])
        elif first < stop and code != NO_SPLIT and wanted in (None, code):
            firsts.append(np.array([first]))
            lengths.append(np.array([stop - first]))
    return Rows(np.concatenate(firsts), np.concatenate(lengths))


class NothingLeftError(ConfigError):
    """An expression of ``data.where`` leaves no clip."""


def rows_where(
    where: str,
    rows: Rows,
    catalog: Catalog,
    scores: ScoreColumns | None,
    *,
    classes: tuple[str, ...],
    url: str,
) -> tuple[Rows, str]:
    """The rows that an expression leaves, and a digest that changes with the expression or with these rows.

    Args:
        where: the expression.
        rows: those it chooses from.
        catalog: whose columns it may use.
        scores: further columns; None where the dataset has none.
        classes: names of the labels.
        url: the dataset, for messages.

    Raises:
        ConfigError: it is none, uses what the dataset has not, or leaves no sample.
    """
    expression = parse(where)
    columns = catalog_columns(catalog.column_of, classes)
    columns |= score_columns(scores)
    check_kinds(expression, {name: one.kind for name, one in columns.items()}, hints=not_scored(url, columns))
    check_texts(expression, columns)
    for name in columns_of(expression):
        if (unscored := columns[name].unscored) > 0:
            hint = f"run `cliplift score {named_generation(url)[0]} {name}`"
            raise ConfigError(
                f"{name}: {unscored} clips of {url} are not scored", key=KEY, value=where, hint=hint
            )
    firsts, lengths = chosen_rows(expression, columns, *rows.runs())
    if not len(firsts):
        raise NothingLeftError(
            f"{where!r} leaves none of the {len(rows)} clips", key=KEY, value=where, hint="relax it"
        )
    chosen = digest(np.stack([firsts, lengths]).astype("<i8").tobytes())
    return Rows(firsts, lengths), digest(canonical([canonical_text(expression), chosen]))


def score_of_rows(name: str, rows: Rows, scores: ScoreColumns | None, *, url: str) -> NDArray[np.float64]:
    """(N,) a score of these rows, NaN where a clip has none.

    Raises:
        ConfigError: the dataset has no such column, or it lacks clips that were added since.
        ManifestError: the column is damaged.
    """
    facts = None if scores is None else scores.facts.get(name)
    if scores is None or facts is None or facts.unscored:
        lacks = "no column" if facts is None else f"{facts.unscored} clips without a value in the column"
        hint = (
            f"run `cliplift score {named_generation(url)[0]} {name}`, and read the generation that it makes"
        )
        raise ConfigError(f"{url} has {lacks} {name!r}", key="data.shards", value=url, hint=hint)
    found: NDArray[np.float64] = scores.column(name)[rows.array()].astype(np.float64)
    return found


def subset_mask(subset: Subset, rows: Rows, catalog: Catalog, table: SampleTable) -> Mask:
    """Which of the rows a subset takes, (N,).

    Raises:
        ConfigError: there are too few groups to hold any out.
    """
    labels, groups, videos = (rows.of(catalog, name).astype(np.int64) for name in ("label", "group", "video"))
    none = np.zeros((0, 2), dtype=np.uint64)
    return subset.mask_of_numbers(
        labels=labels,
        groups=groups,
        videos=videos,
        group_draws=_draws(subset, "group", groups, catalog, table) if subset.held_out_share else none,
        video_draws=_draws(subset, "video", videos, catalog, table) if subset.label_share < 1 else none,
    )


def _draws(subset: Subset, kind: str, used: Ints, catalog: Catalog, table: SampleTable) -> Draws:
    """(numbers, 2) the draws of the names that have these numbers; names are read a few thousand rows at a time.

    Raises:
        ManifestError: the catalog does not number names in order of appearance.
    """
    import pyarrow as pa

    count = catalog.head.groups if kind == "group" else catalog.head.videos
    wanted = np.zeros(count, dtype=bool)
    wanted[used] = True
    found = np.zeros((count, 2), dtype=np.uint64)
    first = seen = 0
    for batch in table.batches("video_id", "group"):
        numbers = catalog.column_of(kind, first, first + batch.num_rows).astype(np.int64)
        new = numbers > np.maximum.accumulate(np.concatenate([[seen - 1], numbers[:-1]]))
        if not np.array_equal(numbers[new], np.arange(seen, seen + int(new.sum()))):
            raise ManifestError(
                f"{CATALOG_ROWS_FILE}: row {first}: its {kind}s are not numbered as they appear"
            )
        taken = new & wanted[numbers]
        names = named_groups(batch) if kind == "group" else batch.column("video_id")
        found[numbers[taken]] = draws(names.filter(pa.array(taken)).to_pylist(), subset.seed)
        first, seen = first + batch.num_rows, seen + int(new.sum())
    return found
