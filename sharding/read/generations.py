"""The generations of a dataset: clips added to a finished one, or videos taken out, while the shards stay as they are.

``dataset.json`` at the root is the latest generation. From the second on each has its own table, catalog and manifest
in ``generations/NNNNNN``, with the ids of all videos removed so far; the first one's manifest is kept beside them when
the second is made. ``URL@N`` names a generation; without a number the latest is meant. What was removed later is
returned by no generation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cliplift.configs.sections import ConfigError
from cliplift.sharding.manifest import (
    DATASET_FILE,
    REMOVED_FILE,
    SAMPLES_FILE,
    Dataset,
    ManifestError,
    digest,
    generation_file,
    load_dataset,
)
from cliplift.sharding.read.sample_table import SampleTable
from cliplift.sharding.scratch import local_copy
from cliplift.sharding.storage import Store, file_sha256, open_store

NAMED = re.compile(r"(?P<url>.+)@(?P<generation>[1-9][0-9]{0,5})")


def named_generation(url: str) -> tuple[str, int | None]:
    """The dataset and the generation that ``URL@N`` names; None where it names none.

    A local folder whose own name ends in ``@N`` and that holds a dataset is that dataset. Of remote places nothing is
    asked: there ``@N`` always names a generation.

    Raises:
        ConfigError: there is such a folder and such a generation of another one.
    """
    match = NAMED.fullmatch(url)
    if match is None:
        return url, None
    root, generation = match["url"], int(match["generation"])
    if not _is_local_dataset(url):
        return root, generation
    numbered = generation == 1 or open_store(root).size(manifest_file(generation)) is not None
    if numbered and _is_local_dataset(root):
        raise ConfigError(
            f"is a folder of that name and generation {generation} of {root}",
            key="url",
            value=url,
            hint=f"rename the folder, or name a generation of its own as {url}@1",
        )
    return url, None


def _is_local_dataset(url: str) -> bool:
    store = open_store(url)
    return store.local_path("") is not None and store.size(DATASET_FILE) is not None


def generation_url(url: str, generation: int) -> str:
    """How a generation of a dataset is named."""
    return f"{named_generation(url)[0]}@{generation}"


def manifest_file(generation: int | None) -> str:
    """The manifest of a generation, below the dataset's root; the latest one's for None."""
    return DATASET_FILE if generation is None else generation_file(generation, DATASET_FILE)


def open_dataset(url: str) -> tuple[Store, Dataset]:
    """The store of a dataset, and the manifest of the generation that the URL names, or of the latest.

    Raises:
        ConfigError: there is no finalized dataset at this place, or no such generation.
        ManifestError: its manifest is damaged.
    """
    store, dataset, _ = open_with_latest(url)
    return store, dataset


def open_with_latest(url: str) -> tuple[Store, Dataset, Dataset]:
    """The same, and beside it the manifest of the latest generation, which says what was removed since.

    Of many shards a manifest takes longer to read than all else; where both are the same it is read once.
    """
    root, generation = named_generation(url)
    store = open_store(root)
    latest = read_dataset(store)
    if generation is None or generation == latest.generation:
        return store, latest, latest
    name = manifest_file(generation)
    try:
        dataset = load_dataset(store.read(name), file=f"{root}/{name}")
    except FileNotFoundError:
        raise ConfigError(
            f"{root} has no generation {generation}",
            key="url",
            value=url,
            hint=f"it has 1 to {latest.generation}",
        ) from None
    if dataset.generation != generation:
        raise ManifestError(f"{root}/{name}: is the manifest of generation {dataset.generation}")
    return store, dataset, latest


def read_dataset(store: Store) -> Dataset:
    """The manifest of the latest generation of a dataset.

    Raises:
        ConfigError: there is no finalized dataset at this place.
        ManifestError: its manifest is damaged.
    """
    try:
        data = store.read(DATASET_FILE)
    except FileNotFoundError:
        raise ConfigError(
            f"holds no {DATASET_FILE}",
            key="url",
            value=store.url,
            hint=f"is {store.url} a finalized shard dataset?",
        ) from None
    return load_dataset(data, file=f"{store.url}/{DATASET_FILE}")


def refuse_generations(store: Store, *, hint: str) -> None:
    """Raise ConfigError where a dataset has several generations: its shards and its manifest are not made anew."""
    try:
        found = read_dataset(store)
    except ConfigError:  # not finalized
        return
    except ManifestError:
        if store.size(manifest_file(1)) is None:  # it is written anew
            return
        raise
    if found.generation > 1:
        raise ConfigError(
            f"has {found.generation} generations, whose shards stay as they are",
            key="output",
            value=store.url,
            hint=hint,
        )


@contextmanager
def read_samples(store: Store, dataset: Dataset, url: str) -> Iterator[Path]:
    """The table of samples of a dataset as a local file: itself, or a copy that is removed at the end.

    Raises:
        ManifestError: it does not exist, or is not the one that the manifest describes.
    """
    name = dataset.file(SAMPLES_FILE)
    file = f"{url}/{name}"
    with ExitStack() as held:
        try:
            path = held.enter_context(local_copy(store, name))
            found = file_sha256(path)
        except FileNotFoundError:
            raise ManifestError(f"{file}: does not exist; copy it too, or finalize its build again") from None
        if found != dataset.samples_sha256:
            raise ManifestError(f"{file}: does not belong to {DATASET_FILE}; finalize its build again")
        yield path


def read_removed(store: Store, dataset: Dataset) -> frozenset[str]:
    """The ids of all videos that were removed up to a generation.

    Raises:
        ManifestError: the list does not exist, or is not the manifest's.
    """
    if not dataset.removed_sha256:
        return frozenset()
    name = dataset.file(REMOVED_FILE)
    try:
        data = store.read(name)
    except FileNotFoundError:
        raise ManifestError(f"{store.url}/{name}: does not exist; copy it too") from None
    if digest(data) != dataset.removed_sha256:
        raise ManifestError(f"{store.url}/{name}: does not belong to {DATASET_FILE}; copy it again")
    return frozenset(data.decode().splitlines())


def dump_removed(ids: frozenset[str]) -> bytes:
    """A list of removed videos as bytes: sorted, an id a line."""
    return "".join(f"{one}\n" for one in sorted(ids)).encode()


def removed_since(store: Store, dataset: Dataset, latest: Dataset) -> frozenset[str]:
    """The videos that later generations than this one removed, up to the latest."""
    if latest.generation <= dataset.generation:
        return frozenset()
    return read_removed(store, latest) - read_removed(store, dataset)


def rows_of_videos(table: SampleTable, ids: frozenset[str]) -> npt.NDArray[np.int64]:
    """The rows of the clips of some videos, in rising order."""
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = pa.array(sorted(ids), type=pa.string())
    found, first = [np.zeros(0, dtype=np.int64)], 0
    for batch in table.batches("video_id"):
        mask = pc.is_in(batch.column("video_id"), value_set=wanted).to_numpy(zero_copy_only=False)
        found.append(np.flatnonzero(mask) + first)
        first += batch.num_rows
    return np.concatenate(found)
