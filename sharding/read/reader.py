"""Reading samples of a shard dataset by number: offset and length from the index, every payload checked by crc32."""

from __future__ import annotations

import bisect
import itertools
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cliplift.configs.sections import ConfigError
from cliplift.sharding.manifest import (
    DATASET_FILE,
    MEMBERS,
    NO_LABEL,
    SAMPLES_FILE,
    Dataset,
    ManifestError,
    ShardFacts,
    canonical,
    check_samples,
    digest,
    load_dataset,
    read_table,
)
from cliplift.sharding.read.fetch import OpenFiles, ShardCache
from cliplift.sharding.read.subsets import Subset
from cliplift.sharding.storage import StorageError, Store, open_store

if TYPE_CHECKING:
    import pyarrow as pa

UNUSED = ""


class ShardReadError(ValueError):
    """A sample cannot be read: which file, which member, and why."""

    def __init__(self, file: str, member: str, reason: str) -> None:
        self.file, self.member, self.reason = file, member, reason
        super().__init__(f"{file}, {member}: {reason}")

    def __reduce__(self) -> tuple[type[ShardReadError], tuple[str, str, str]]:
        return type(self), (self.file, self.member, self.reason)


@dataclass(frozen=True)
class SampleFacts:
    """What the index says of one clip."""

    key: str
    shard: int
    label: int | None
    labels: tuple[int, ...]
    split: str
    video_id: str
    group: str | None
    num_frames: int
    fps: float
    width: int
    height: int
    keyframes: tuple[int, ...]
    span_seconds: tuple[float, float]
    source: str


class ClipShape(NamedTuple):
    """How long and how large a stored clip is: what sampling and cropping need to know."""

    num_frames: int
    fps: float
    height: int
    width: int


class ShardDataset:
    """The samples of one split, in shard order. Map-style, picklable, opens files per process, needs no torch.

    Threads may read side by side.

    Args:
        url: folder or URL of a finalized dataset.
        split: samples of this split only; None takes all.
        fold: official split number, from 1, for datasets that have several (UCF101, HMDB51).
        subset: which samples of the split; None takes all.
        cache_folder: local folder that keeps whole remote shards; None reads byte ranges.
        cache_gib: upper bound of that folder, GiB.

    Raises:
        ConfigError: no such dataset, split or fold.
        ManifestError: the dataset's own files are damaged.
    """

    classes: tuple[str, ...]
    fingerprint: str
    shards: tuple[ShardFacts, ...]
    shard_ranges: list[tuple[int, int]]
    splits: tuple[str, ...]

    def __init__(
        self,
        url: str,
        *,
        split: str | None = None,
        fold: int | None = None,
        subset: Subset | None = None,
        cache_folder: str | None = None,
        cache_gib: float = 50.0,
    ) -> None:
        self.url, self.split, self.fold, self.subset = url, split, fold, subset
        self.cache_folder, self.cache_gib = cache_folder, cache_gib
        self._store: Store = open_store(url)
        self._files = OpenFiles()
        self._cache = ShardCache(Path(cache_folder), cache_gib) if cache_folder and "://" in url else None
        dataset = read_dataset(self._store)
        data = self._store.read(SAMPLES_FILE)
        if digest(data) != dataset.samples_sha256:
            raise ManifestError(f"{url}/{SAMPLES_FILE}: does not belong to {DATASET_FILE}; finalize again")
        table = read_table(data, file=SAMPLES_FILE)
        check_samples(table, dataset, file=f"{url}/{SAMPLES_FILE}")
        self._load(dataset, table)

    def _load(self, dataset: Dataset, table: pa.Table) -> None:
        splits = _resolved_splits(dataset, table, self.url, self.fold)
        names, counts = np.unique(splits, return_counts=True)
        self.splits = tuple(str(name) for name in names if name != UNUSED)
        if self.split is not None and self.split not in names:
            have = ", ".join(f"{n} ({c})" for n, c in zip(names, counts, strict=True) if n != UNUSED)
            raise ConfigError(
                f"{self.url} has no split {self.split!r}",
                key="data.split",
                value=self.split,
                hint=f"it has {have}",
            )
        chosen = np.flatnonzero(splits == self.split if self.split is not None else splits != UNUSED)
        if self.subset is not None:
            part = table.take(chosen)
            labels, groups, videos = (part.column(c).to_pylist() for c in ("label", "group", "video_id"))
            chosen = chosen[self.subset.mask(labels=labels, groups=groups, video_ids=videos)]
        self._table = table.take(chosen)
        self._splits = splits[chosen]
        shard_numbers = self._table.column("shard").to_numpy()
        by_number = {facts.shard: facts for facts in dataset.shards}
        numbers = [int(n) for n in dict.fromkeys(shard_numbers.tolist())]
        self.shards = tuple(by_number[n] for n in numbers)
        stops = list(itertools.accumulate(int((shard_numbers == n).sum()) for n in numbers))
        self.shard_ranges = list(zip([0, *stops[:-1]], stops, strict=True))
        self._starts = [start for start, _ in self.shard_ranges]
        self._places = {
            kind: np.stack(
                [self._table.column(f"{kind}_{what}").to_numpy() for what in ("offset", "bytes", "crc32")]
            )
            for kind in MEMBERS
            if f"{kind}_bytes" in self._table.column_names
        }
        self._shapes = [
            self._table.column(name).to_numpy() for name in ("num_frames", "fps", "height", "width")
        ]
        self.labels = self._table.column("label").to_numpy()
        self.classes = dataset.classes
        # Another split, fold or subset of the same shards is another training set.
        part_of = [self.split, self.fold] + ([] if self.subset is None else [asdict(self.subset)])
        self.fingerprint = digest(canonical([dataset.fingerprint, *part_of]))

    def __len__(self) -> int:
        return len(self._splits)

    def facts(self, i: int) -> SampleFacts:
        """What the index says of sample ``i``."""
        row = self._table.slice(self._checked(i), 1).to_pylist()[0]
        return SampleFacts(
            key=row["key"],
            shard=row["shard"],
            label=None if row["label"] == NO_LABEL else row["label"],
            labels=tuple(row["labels"]),
            split=str(self._splits[i]),
            video_id=row["video_id"],
            group=row["group"],
            num_frames=row["num_frames"],
            fps=row["fps"],
            width=row["width"],
            height=row["height"],
            keyframes=tuple(row["keyframes"]),
            span_seconds=(row["start_seconds"], row["end_seconds"]),
            source=row["source"],
        )

    def shape(self, i: int) -> ClipShape:
        """Frames, rate and size of sample ``i``; a hundred times faster than :meth:`facts`."""
        frames, fps, height, width = (values[self._checked(i)] for values in self._shapes)
        return ClipShape(int(frames), float(fps), int(height), int(width))

    def key(self, i: int) -> str:
        """The key of sample ``i``."""
        key: str = self._table.column("key")[self._checked(i)].as_py()
        return key

    def column(self, name: str) -> list[Any]:
        """One column of the samples' table, e.g. ``video_id`` or ``num_frames``, in sample order."""
        values: list[Any] = self._table.column(name).to_pylist()
        return values

    def encoded(self, name: str) -> tuple[list[str], npt.NDArray[np.int32]]:
        """The different values of a column in order of appearance, and the place of every sample's among them."""
        coded = self._table.column(name).combine_chunks().dictionary_encode()
        return coded.dictionary.to_pylist(), coded.indices.to_numpy()

    @property
    def most_labels(self) -> int:
        """Labels of the sample that has most."""
        lengths = self._table.column("labels").combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
        return int(lengths.max()) if len(lengths) else 0

    def shard_of(self, i: int) -> int:
        """Position in :attr:`shards` of the shard that holds sample ``i``."""
        return bisect.bisect_right(self._starts, self._checked(i)) - 1

    def read(self, i: int) -> bytes:
        """The mp4 of sample ``i``.

        Raises:
            ShardReadError: the file is gone, too short, or its bytes are not those that were written.
        """
        return self._member(i, "mp4")

    @property
    def has_flow(self) -> bool:
        """Whether optical flow is stored beside the clips."""
        return "flow" in self._places

    def read_flow(self, i: int) -> bytes:
        """The flow video of sample ``i``, which ``flow.decode_flow`` decodes; raises as :meth:`read` does."""
        return self._member(i, "flow")

    def announce(self, i: int, kind: str = "mp4") -> bool:
        """Let the system fetch sample ``i`` into memory while other work is done; False where it cannot (remote)."""
        shard = self.shards[self.shard_of(i)]
        path = self._store.local_path(shard.file)
        if path is None or not hasattr(os, "posix_fadvise"):
            return False
        offset, length, _ = (int(v) for v in self._places[kind][:, i])
        self._files.announce(path, offset, length)
        return True

    def read_json(self, i: int) -> dict[str, object]:
        """The JSON member of sample ``i``; raises as :meth:`read` does."""
        tree: dict[str, object] = json.loads(self._member(i, "json"))
        return tree

    def close(self) -> None:
        """Close the files this process has open; reading opens them again."""
        self._files.close()

    def _checked(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return int(i)

    def _member(self, i: int, kind: str) -> bytes:
        shard = self.shards[self.shard_of(i)]
        places = self._places.get(kind)
        offset, length, crc32 = (0, 0, 0) if places is None else (int(v) for v in places[:, i])
        if not length:
            raise self._failure(i, kind, "the sample has no such member")
        try:
            data = self._bytes(shard, offset, length)
        except FileNotFoundError:
            raise self._failure(i, kind, "the shard does not exist") from None
        except (OSError, StorageError) as error:
            raise self._failure(i, kind, f"cannot be read: {error}") from error
        if len(data) != length:
            raise self._failure(
                i, kind, f"{length} bytes expected, {len(data)} found: the shard is cut short"
            )
        if zlib.crc32(data) != crc32:
            raise self._failure(i, kind, "crc32 differs: the bytes are damaged")
        return data

    def _failure(self, i: int, kind: str, reason: str) -> ShardReadError:
        return ShardReadError(self.shards[self.shard_of(i)].file, f"{self.key(i)}.{MEMBERS[kind]}", reason)

    def _bytes(self, shard: ShardFacts, offset: int, length: int) -> bytes:
        path = self._store.local_path(shard.file)
        if path is None and self._cache is None:
            return self._store.read_range(shard.file, offset, length)
        if path is None:
            assert self._cache is not None
            return self._cache.read(self._store, shard, offset, length)
        return self._files.read(path, offset, length)


def read_dataset(store: Store) -> Dataset:
    """The manifest of a dataset.

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


def fold_count(url: str) -> int:
    """How many official splits a dataset has; 0 where it has one only."""
    return read_dataset(open_store(url)).folds


def _resolved_splits(
    dataset: Dataset, table: pa.Table, url: str, fold: int | None
) -> npt.NDArray[np.object_]:
    """The split of every sample under a fold; :data:`UNUSED` where the fold leaves it out."""
    if not dataset.folds:
        if fold is not None:
            raise ConfigError(f"{url} has a single split", key="data.fold", value=fold, hint="remove it")
        return np.asarray(table.column("split").to_pylist(), dtype=object)
    if fold is None:
        return np.full(table.num_rows, "all", dtype=object)
    if fold > dataset.folds:
        raise ConfigError(
            f"{url} has {dataset.folds} folds", key="data.fold", value=fold, hint=f"use 1 to {dataset.folds}"
        )
    folds: Sequence[Sequence[str]] = table.column("folds").to_pylist()
    return np.asarray([row[fold - 1] for row in folds], dtype=object)
