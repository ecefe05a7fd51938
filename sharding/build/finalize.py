"""Finalize: check that every planned shard is there and write the dataset's table, catalog, ledger and manifest.

The catalog alone, of a dataset that was finalized before there were catalogs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

import av
import numpy as np

from cliplift.sharding.build.plan import Plan
from cliplift.sharding.manifest import (
    CATALOG_FILE,
    CATALOG_ROWS_FILE,
    DATASET_FILE,
    DUPLICATE,
    REFUSED_FILE,
    RETRIED_STAGES,
    SAMPLES_FILE,
    Dataset,
    ManifestError,
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
    read_table,
    rows_to_parquet,
)
from cliplift.sharding.read.catalog import checksums_of, dump_head
from cliplift.sharding.read.columns import columns_of
from cliplift.sharding.read.reader import read_dataset
from cliplift.sharding.scratch import scratch_folder
from cliplift.sharding.storage import Store, open_store


class BuildError(ValueError):
    """The dataset cannot be finalized; the message says what is missing or refused."""


def _again(refused: Sequence[Refused]) -> str:
    """What to do where clips were refused for reasons that may be gone, as after an outage of the storage."""
    if not any(one.stage in RETRIED_STAGES for one in refused):
        return ""
    return "; if the cause is gone, add --retry-failed"


def finalize(plan: Plan, store: Store, *, max_refused_share: float) -> Dataset:
    """Write ``samples.parquet``, the catalog, ``refused.jsonl`` and, last, ``dataset.json``.

    Raises:
        BuildError: a shard is missing or its tar has another size, no clip was made, or too many were refused.
    """
    indexes = load_indexes(plan, store)
    samples = sum(len(index.samples) for index in indexes)
    refused = [r for index in indexes for r in index.refused]
    store.write(
        REFUSED_FILE,
        b"".join(canonical({"shard": i.shard, **vars(r)}) + b"\n" for i in indexes for r in i.refused),
    )
    if not samples:
        first = f", the first because: {refused[0].source}: {refused[0].reason}" if refused else ""
        raise BuildError(f"not one clip was made; {len(refused)} were refused{first}{_again(refused)}")
    failed = [r for r in refused if r.stage != DUPLICATE]
    if len(failed) > max_refused_share * (samples + len(refused)):
        reason, count = Counter(f"{r.stage}: {r.reason}" for r in failed).most_common(1)[0]
        raise BuildError(
            f"{len(failed)} of {samples + len(refused)} clips were refused, more than limits.max_refused_share="
            f"{max_refused_share:g} allows; {count} because of {reason!r}; see {REFUSED_FILE}{_again(failed)}"
        )
    dataset, table = describe(
        indexes,
        name=plan.name,
        classes=plan.classes,
        folds=plan.folds,
        missing=plan.missing,
        plan_id=plan.plan_id,
        settings=dict(plan.settings),
    )
    return write_tables(dataset, table, store)


def write_tables(dataset: Dataset, table: bytes, store: Store) -> Dataset:
    """Write the table of samples, the catalog made of it and, last, the manifest, which is returned."""
    store.write(SAMPLES_FILE, table)
    return _write_catalog(dataset, table, store)


def add_catalog(url: str) -> Dataset:
    """Write the catalog of a finalized dataset, and the manifest that names it; the same bytes each time.

    The fingerprint stays: a run goes on with what it began.

    Raises:
        ConfigError: there is no finalized dataset at this place.
        ManifestError: its manifest or its table is damaged.
    """
    store = open_store(url)
    dataset = read_dataset(store)
    table = store.read(SAMPLES_FILE)
    if digest(table) != dataset.samples_sha256:
        raise ManifestError(
            f"{url}/{SAMPLES_FILE}: does not belong to {DATASET_FILE}; finalize its build again"
        )
    return _write_catalog(dataset, table, store)


def _write_catalog(dataset: Dataset, table: bytes, store: Store) -> Dataset:
    columns = columns_of(read_table(table, file=SAMPLES_FILE), dataset, samples_bytes=len(table))
    checksums = checksums_of(columns.head, columns.rows, columns.labels)
    with scratch_folder() as folder:
        rows = folder / CATALOG_ROWS_FILE
        with rows.open("wb") as file:
            for part in (columns.rows, columns.labels, checksums):
                file.write(part.view(np.uint8).data)
        store.publish(rows, CATALOG_ROWS_FILE)
    head = dump_head(replace(columns.head, checksums_sha256=digest(checksums.tobytes())))
    store.write(CATALOG_FILE, head)
    dataset = replace(dataset, catalog_sha256=digest(head))
    store.write(DATASET_FILE, dump_dataset(dataset))
    return dataset


def load_indexes(plan: Plan, store: Store) -> list[ShardIndex]:
    """The indexes of all shards of a plan.

    Raises:
        BuildError: a shard is missing or its tar has another size.
    """
    return [_index(plan, number, store) for number in range(len(plan.shards))]


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
    indexes: list[ShardIndex],
    *,
    name: str,
    classes: tuple[str, ...],
    folds: int,
    missing: int,
    plan_id: str,
    settings: Mapping[str, object],
) -> tuple[Dataset, bytes]:
    """``dataset.json`` and ``samples.parquet`` for finished shards."""
    rows = [sample for index in indexes for sample in index.samples]
    shard_numbers = [index.shard for index in indexes for _ in index.samples]
    table = rows_to_parquet(rows, Sample, extra={"shard": shard_numbers})
    shards = tuple(
        ShardFacts(
            shard=i.shard,
            file=i.tar,
            split=i.split,
            samples=len(i.samples),
            bytes=i.tar_bytes,
            sha256=i.tar_sha256,
        )
        for i in indexes
    )
    splits: dict[str, SplitFacts] = {}
    for row in rows:
        entry = splits.setdefault(row.split, {"samples": 0, "seconds": 0.0})
        entry["samples"] += 1
        entry["seconds"] = round(entry["seconds"] + row.num_frames / row.fps, 3)
    for facts in shards:
        if facts.split in splits:
            splits[facts.split]["shards"] = splits[facts.split].get("shards", 0) + 1
    cut = settings.get("cut")
    dataset = Dataset(
        name=name,
        classes=classes,
        shards=shards,
        samples=len(rows),
        samples_sha256=digest(table),
        splits=splits,
        folds=folds,
        refused=dict(sorted(Counter(r.stage for index in indexes for r in index.refused).items())),
        missing=missing,
        plan_id=plan_id,
        settings=settings,
        versions=versions(shots=isinstance(cut, Mapping) and cut.get("kind") == "shots"),
        fingerprint=dataset_fingerprint(name, classes, shards, digest(table)),
    )
    return dataset, table


def versions(*, shots: bool = False) -> dict[str, str]:
    """The libraries that decide the bytes of a clip, and with ``shots`` those that decide where it is cut."""
    libraries = {name: ".".join(map(str, number)) for name, number in av.library_versions.items()}
    return {
        "av": av.__version__,
        **{n: libraries[n] for n in ("libavcodec", "libavfilter", "libavformat", "libswscale")},
        **{n: import_module(n).__version__ for n in ("scenedetect", "cv2") if shots and find_spec(n)},
    }
