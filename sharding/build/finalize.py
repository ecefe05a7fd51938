"""Finalize: check that every planned shard is there and write the dataset's table, catalog, ledger and manifest.

The catalog alone, of a dataset that was finalized before there were catalogs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import av

from cliplift.configs.sections import ConfigError
from cliplift.sharding.build.plan import Plan
from cliplift.sharding.manifest import (
    CATALOG_FILE,
    CATALOG_ROWS_FILE,
    DATASET_FILE,
    DUPLICATE,
    REFUSED_FILE,
    REMOVED_FILE,
    RETRIED_STAGES,
    SAMPLES_FILE,
    Dataset,
    Refused,
    Sample,
    ShardFacts,
    ShardIndex,
    SplitFacts,
    canonical,
    dataset_fingerprint,
    digest,
    dump_dataset,
    index_file,
    load_index,
)
from cliplift.sharding.read.catalog import dump_head
from cliplift.sharding.read.columns import write_rows
from cliplift.sharding.read.generations import (
    dump_removed,
    manifest_file,
    read_dataset,
    read_removed,
    read_samples,
)
from cliplift.sharding.scores.carried import carry_scores
from cliplift.sharding.scores.embeddings import carry_vectors
from cliplift.sharding.scratch import scratch_folder
from cliplift.sharding.storage import Store, file_sha256, open_store
from cliplift.sharding.tables import (
    TableFile,
    batches,
    conformed,
    open_table,
    schema_of,
    table_of,
    without_videos,
)

if TYPE_CHECKING:
    import pyarrow as pa


class BuildError(ValueError):
    """The dataset cannot be finalized; the message says what is missing or refused."""


def finalize(plan: Plan, store: Store, *, max_refused_share: float) -> Dataset:
    """Write ``samples.parquet``, the catalog, ``refused.jsonl`` and, last, ``dataset.json``.

    Indexes are read one after the other, so that memory does not grow with the samples.

    Raises:
        BuildError: a shard is missing or its tar has another size, no clip was made, or too many were refused.
    """
    with scratch_folder() as folder:
        ledger = _Ledger(folder / REFUSED_FILE)
        dataset = describe(
            ledger.watched(load_indexes(plan, store)),
            table=folder / SAMPLES_FILE,
            name=plan.name,
            classes=plan.classes,
            folds=plan.folds,
            missing=plan.missing,
            plan_id=plan.plan_id,
            settings=dict(plan.settings),
        )
        store.publish(ledger.path, REFUSED_FILE)
        ledger.judge(dataset.samples, max_refused_share)
        return write_tables(dataset, folder / SAMPLES_FILE, store)


class _Ledger:
    """``refused.jsonl``, written while the indexes pass, and what it counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.refused = 0
        self.first = ""
        self.reasons: Counter[str] = Counter()  # duplicates were removed and did not fail
        self.stages: Counter[str] = Counter()
        self._retried = False

    def watched(self, indexes: Iterable[ShardIndex]) -> Iterator[ShardIndex]:
        """The indexes themselves."""
        with self.path.open("wb") as file:
            for index in indexes:
                for one in index.refused:
                    file.write(canonical({"shard": index.shard, **vars(one)}) + b"\n")
                    self._count(one)
                yield index

    def _count(self, one: Refused) -> None:
        self.first = self.first or f"{one.source}: {one.reason}"
        self.refused += 1
        self.stages[one.stage] += 1
        self._retried = self._retried or one.stage in RETRIED_STAGES
        if one.stage != DUPLICATE:
            self.reasons[f"{one.stage}: {one.reason}"] += 1

    def judge(self, samples: int, max_refused_share: float) -> None:
        """Raise BuildError where no clip was made, or too many were refused."""
        if not samples:
            first = f", the first because: {self.first}" if self.first else ""
            raise BuildError(f"not one clip was made; {self.refused} were refused{first}{self._again()}")
        failed = self.reasons.total()
        if failed > max_refused_share * (samples + self.refused):
            reason, count = self.reasons.most_common(1)[0]
            raise BuildError(
                f"{failed} of {samples + self.refused} clips were refused, more than limits.max_refused_share="
                f"{max_refused_share:g} allows; {count} because of {reason!r}; see {REFUSED_FILE}{self._again()}"
            )

    def _again(self) -> str:
        """What to do where clips were refused for reasons that may be gone, as after an outage of the storage."""
        return "; if the cause is gone, add --retry-failed" if self._retried else ""


def write_tables(dataset: Dataset, table: Path, store: Store, *, publish: bool = True) -> Dataset:
    """Publish the table of samples, write the catalog made of it and, last, the manifest, which is returned.

    Args:
        dataset: the manifest without a catalog.
        table: ``samples.parquet`` as a local file.
        store: where the dataset is.
        publish: False where the table is there already.
    """
    with scratch_folder() as folder:
        rows = folder / CATALOG_ROWS_FILE
        head = write_rows(
            open_table(table, file=SAMPLES_FILE), dataset, rows, samples_bytes=table.stat().st_size
        )
        if publish:
            store.publish(table, dataset.file(SAMPLES_FILE))
        store.publish(rows, dataset.file(CATALOG_ROWS_FILE))
    data = dump_head(head)
    store.write(dataset.file(CATALOG_FILE), data)
    dataset = replace(dataset, catalog_sha256=digest(data))
    if dataset.generation > 1:
        store.write(manifest_file(dataset.generation), dump_dataset(dataset))
    store.write(DATASET_FILE, dump_dataset(dataset))
    return dataset


def add_shards(plan: Plan, store: Store, base: Dataset, *, max_refused_share: float) -> Dataset:
    """The next generation of a dataset: with the shards of a plan of new videos. Raises as :func:`finalize` does."""
    removed = read_removed(store, base)
    with scratch_folder() as folder:
        ledger = _Ledger(folder / REFUSED_FILE)
        indexes = ledger.watched(load_indexes(plan, store))
        dataset = _grown(base, store, folder / SAMPLES_FILE, indexes=indexes, removed=removed)
        counts = Counter(dict(base.refused)) + Counter(ledger.stages)
        dataset = replace(
            dataset, refused=dict(sorted(counts.items())), missing=plan.missing, settings=dict(plan.settings)
        )
        store.publish(ledger.path, dataset.file(REFUSED_FILE))
        ledger.judge(dataset.samples - base.samples, max_refused_share)
        return _write_generation(base, dataset, folder / SAMPLES_FILE, removed, store)


def remove_videos(url: str, ids: Iterable[str]) -> tuple[Dataset, Dataset]:
    """The generation of a dataset, and the next one, which lacks all clips of some videos; no shard is touched.

    Args:
        url: folder or URL of a finalized dataset.
        ids: of the videos. Those that the dataset does not have are kept out when videos are added.

    Returns:
        The latest generation before and after; the same where all these videos were removed before.

    Raises:
        ConfigError: there is no dataset, or nothing would be left of it.
        ManifestError: its files are damaged.
    """
    store = open_store(url)
    base = read_dataset(store)
    before = read_removed(store, base)
    removed = before | frozenset(ids)
    if removed == before:
        return base, base
    with scratch_folder() as folder:
        dataset = _grown(base, store, folder / SAMPLES_FILE, indexes=(), removed=removed)
        if not dataset.samples:
            raise ConfigError(
                "would have no clip left", key="url", value=url, hint="remove the dataset's folder instead"
            )
        return base, _write_generation(base, dataset, folder / SAMPLES_FILE, removed, store)


def _grown(
    base: Dataset, store: Store, table: Path, *, indexes: Iterable[ShardIndex], removed: frozenset[str]
) -> Dataset:
    """The next generation: the clips of ``base`` and of further shards, but for those of removed videos."""
    written = _Samples(table, base.shards, removed=removed)
    with read_samples(store, base, store.url) as path:
        for rows in batches(open_table(path, file=SAMPLES_FILE), file=SAMPLES_FILE):
            written.add(rows)
    for index in indexes:
        written.add_shard(index)
    return replace(
        written.described(base),
        catalog_sha256="",
        generation=base.generation + 1,
        removed_sha256=digest(dump_removed(removed)) if removed else "",
    )


class _Samples:
    """The table of a dataset's samples while it is written, and what the manifest says of it.

    Args:
        path: the file of the table.
        shards: of which rows will be added beside those of :meth:`add_shard`.
        removed: ids of videos whose clips are left out.
    """

    def __init__(
        self, path: Path, shards: Iterable[ShardFacts] = (), *, removed: frozenset[str] = frozenset()
    ) -> None:
        self._path, self._removed = path, removed
        self._schema = schema_of(Sample, "shard")
        self._file = TableFile(path, self._schema)
        self._shards = list(shards)
        self._counts: Counter[int] = Counter()
        self._splits: dict[str, SplitFacts] = {}

    def add_shard(self, index: ShardIndex) -> None:
        """Append the clips of one more shard."""
        self._shards.append(facts_of(index))
        numbers = [index.shard] * len(index.samples)
        self.add(table_of(index.samples, self._schema, extra={"shard": numbers}))

    def add(self, rows: pa.Table) -> None:
        """Append rows of a table of samples."""
        rows = conformed(rows, self._schema)
        if self._removed:
            rows = without_videos(rows, self._removed)
        self._file.add(rows)
        self._counts.update(rows.column("shard").to_pylist())
        lengths = rows.column("num_frames").to_numpy() / rows.column("fps").to_numpy()
        for split, seconds in zip(rows.column("split").to_pylist(), lengths.tolist(), strict=True):
            entry = self._splits.setdefault(split, {"samples": 0, "seconds": 0.0})
            entry["samples"] += 1
            entry["seconds"] = round(entry["seconds"] + seconds, 3)

    def described(self, dataset: Dataset) -> Dataset:
        """End the table; the manifest with what it says of shards, splits and samples."""
        self._file.close()
        shards = tuple(replace(shard, samples=self._counts[shard.shard]) for shard in self._shards)
        for shard in shards:
            if shard.split in self._splits:
                self._splits[shard.split]["shards"] = self._splits[shard.split].get("shards", 0) + 1
        samples_sha256 = file_sha256(self._path)
        return replace(
            dataset,
            shards=shards,
            samples=self._counts.total(),
            samples_sha256=samples_sha256,
            splits=dict(sorted(self._splits.items())),
            fingerprint=dataset_fingerprint(dataset.name, dataset.classes, shards, samples_sha256),
        )


def _write_generation(
    base: Dataset, dataset: Dataset, table: Path, removed: frozenset[str], store: Store
) -> Dataset:
    """Write the files of a generation into its folder; last the manifest at the root, which makes it the latest."""
    if removed:
        store.write(dataset.file(REMOVED_FILE), dump_removed(removed))
    store.write(manifest_file(base.generation), dump_dataset(base))
    dataset = carry_vectors(store, base, carry_scores(store, base, dataset, table))
    return write_tables(dataset, table, store)


def add_catalog(url: str) -> Dataset:
    """Write the catalog of a finalized dataset, and the manifest that names it; the same bytes each time.

    The fingerprint stays: a run goes on with what it began.

    Raises:
        ConfigError: there is no finalized dataset at this place.
        ManifestError: its manifest or its table is damaged.
    """
    store = open_store(url)
    dataset = read_dataset(store)
    with read_samples(store, dataset, url) as table:
        return write_tables(dataset, table, store, publish=False)


def load_indexes(plan: Plan, store: Store, places: Iterable[int] | None = None) -> Iterator[ShardIndex]:
    """The indexes of the shards at these places of a plan, or of all, one after the other.

    Raises:
        BuildError: a shard is missing or its tar has another size.
    """
    return (_index(plan, place, store) for place in (range(len(plan.shards)) if places is None else places))


def _index(plan: Plan, number: int, store: Store) -> ShardIndex:
    shard = plan.shards[number]
    name = index_file(shard.tar)
    try:
        index = load_index(store.read(name), file=name)
    except FileNotFoundError:
        missing = [s.shard for s in plan.shards if store.size(index_file(s.tar)) is None]
        listed = ", ".join(map(str, missing[:20])) + (" ..." if len(missing) > 20 else "")
        raise BuildError(f"{len(missing)} of {len(plan.shards)} shards are not built: {listed}") from None
    if index.plan_id != plan.plan_id:
        raise BuildError(f"{name} belongs to another plan; build again")
    if store.size(shard.tar) != index.tar_bytes:
        raise BuildError(
            f"{shard.tar} has {store.size(shard.tar)} bytes, its index says {index.tar_bytes}; build again"
        )
    return index


def describe(
    indexes: Iterable[ShardIndex],
    *,
    table: Path,
    name: str,
    classes: tuple[str, ...],
    folds: int,
    missing: int,
    plan_id: str,
    settings: Mapping[str, object],
) -> Dataset:
    """The manifest of finished shards; their samples are written to ``table``, the file of ``samples.parquet``."""
    written = _Samples(table)
    refused: Counter[str] = Counter()
    for index in indexes:
        written.add_shard(index)
        refused.update(one.stage for one in index.refused)
    cut = settings.get("cut")
    return written.described(
        Dataset(
            name=name,
            classes=classes,
            shards=(),
            samples=0,
            samples_sha256="",
            splits={},
            folds=folds,
            refused=dict(sorted(refused.items())),
            missing=missing,
            plan_id=plan_id,
            settings=settings,
            versions=versions(shots=isinstance(cut, Mapping) and cut.get("kind") == "shots"),
            fingerprint="",
        )
    )


def facts_of(index: ShardIndex) -> ShardFacts:
    """A shard as the manifest lists it."""
    return ShardFacts(
        shard=index.shard,
        file=index.tar,
        split=index.split,
        samples=len(index.samples),
        bytes=index.tar_bytes,
        sha256=index.tar_sha256,
    )


def versions(*, shots: bool = False) -> dict[str, str]:
    """The libraries that decide the bytes of a clip, and with ``shots`` those that decide where it is cut."""
    libraries = {name: ".".join(map(str, number)) for name, number in av.library_versions.items()}
    return {
        "av": av.__version__,
        **{n: libraries[n] for n in ("libavcodec", "libavfilter", "libavformat", "libswscale")},
        **{n: import_module(n).__version__ for n in ("scenedetect", "cv2") if shots and find_spec(n)},
    }
