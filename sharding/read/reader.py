"""Reading samples of a shard dataset by number: offset and length from the catalog, every payload checked by crc32."""

from __future__ import annotations

import json
import os
import zlib
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
    digest,
)
from cliplift.sharding.read.catalog import Catalog, CatalogHead, mapped_catalog
from cliplift.sharding.read.columns import columns_of
from cliplift.sharding.read.fetch import HostFiles, OpenFiles, ShardCache
from cliplift.sharding.read.generations import (
    dump_removed,
    open_dataset,
    open_with_latest,
    read_samples,
    removed_since,
    rows_of_videos,
)
from cliplift.sharding.read.sample_table import SampleTable
from cliplift.sharding.read.selection import (
    ALL,
    Rows,
    rows_of_split,
    rows_where,
    score_of_rows,
    split_names,
    subset_mask,
)
from cliplift.sharding.read.shared import SharedArray
from cliplift.sharding.read.subsets import Subset
from cliplift.sharding.scores.chosen import ClipColumn, catalog_columns, score_columns
from cliplift.sharding.scores.stored import ScoreColumns, open_scores
from cliplift.sharding.storage import StorageError, Store
from cliplift.sharding.tables import open_table

if TYPE_CHECKING:
    import pyarrow as pa


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


class RemovedError(ShardReadError):
    """The sample's video was removed from the dataset after the generation that is read."""


class ClipShape(NamedTuple):
    """How long and how large a stored clip is: what sampling and cropping need to know."""

    num_frames: int
    fps: float
    height: int
    width: int


class ShardDataset:
    """The samples of one split, in shard order. Picklable, opens files per process, needs no torch.

    Opening reads the manifest and the head of the catalog, whatever the number of samples; the catalog's rows are
    mapped into memory. Of a dataset without a catalog (version 1 of the format) the rows are made from its table, which
    is read whole. A process that is sent a dataset opens it anew and shares what the sender has made.

    Threads may read side by side.

    Args:
        url: folder or URL of a finalized dataset; ``URL@N`` is its generation N, the latest otherwise.
        split: samples of this split only; None takes all.
        fold: official split number, from 1, for datasets that have several (UCF101, HMDB51).
        subset: which samples of the split; None takes all.
        cache_folder: local folder that keeps whole remote shards; None reads byte ranges.
        cache_gib: upper bound of that folder, GiB.
        where: what samples of ``subset`` must meet, such as ``motion > 0.02``; None takes all.
        keep_numbers: of an earlier generation, number the samples as they were, so that a run goes on with its
            sequence: those of videos that were removed since are not read. Otherwise they are not among the samples.

    Raises:
        ConfigError: no such dataset, split, fold or column.
        ManifestError: the dataset's own files are damaged.
    """

    classes: tuple[str, ...]
    dataset_fingerprint: str  # of all that the dataset holds
    fingerprint: str  # of the samples that are taken of it
    shards: tuple[ShardFacts, ...]
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
        keep_numbers: bool = False,
        where: str | None = None,
    ) -> None:
        self.url, self.split, self.fold, self.subset = url, split, fold, subset
        self.where, self._left_by = where, ""
        self.keep_numbers = keep_numbers
        self.cache_folder, self.cache_gib = cache_folder, cache_gib
        dataset, latest = self._open_files()
        self._open_rows(dataset, None)
        counts = split_names(self._catalog.head, dataset, url, fold)
        self.splits = tuple(counts)
        if split is not None and split not in counts:
            raise ConfigError(
                f"{url} has no split {split!r}",
                key="data.split",
                value=split,
                hint=f"it has {', '.join(f'{name} ({count})' for name, count in counts.items())}",
            )
        rows = rows_of_split(self._catalog, dataset, fold, split)
        if subset is not None:
            rows = rows.taken(subset_mask(subset, rows, self._catalog, self._table))
        if where is not None:
            found = self._scores(dataset)
            rows, self._left_by = rows_where(
                where, rows, self._catalog, found, classes=dataset.classes, url=url
            )
        self._choose(dataset, self._without_removed(rows, dataset, latest))

    def __getstate__(self) -> dict[str, object]:
        arguments = ("url", "split", "fold", "subset", "cache_folder", "cache_gib", "keep_numbers", "where")
        kept = ("splits", "_rows", "_made", "dataset_fingerprint", "_removed", "_left_out", "_left_by")
        return {name: self.__dict__[name] for name in (*arguments, *kept)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        dataset, _ = self._open_files()
        if dataset.fingerprint != self.dataset_fingerprint:
            raise ManifestError(
                f"{self.url}/{DATASET_FILE}: was written anew since the run began; start it again"
            )
        self._open_rows(dataset, self._made)
        self._choose(dataset, self._rows)

    def _open_files(self) -> tuple[Dataset, Dataset]:
        """The manifest, the latest one, and what is needed to read files, none of which is open yet."""
        self._store, dataset, latest = open_with_latest(self.url)
        self._dataset = dataset
        self._files = OpenFiles()
        folder = Path(self.cache_folder) if self.cache_folder else None
        self._cache = ShardCache(folder, self.cache_gib) if folder and "://" in self.url else None
        self._host_files = HostFiles(folder)
        return dataset, latest

    def _open_rows(self, dataset: Dataset, made: _MadeRows | None) -> None:
        """Map the catalog, or make its rows, or take those that another process made."""
        self._made, self.dataset_fingerprint = made, dataset.fingerprint
        if made is None and dataset.catalog_sha256:
            self._catalog = mapped_catalog(self._store, self._host_files, dataset, self.url)
        else:
            made = self._made = made or _made_rows(self._store, dataset, self.url)
            self._catalog = Catalog(made.head, made.rows.array, made.labels.array, dataset)
        self._table = SampleTable(
            self._store,
            self._host_files,
            dataset,
            size=self._catalog.head.samples_bytes,
            file=f"{self.url}/{SAMPLES_FILE}",
        )

    def _without_removed(self, rows: Rows, dataset: Dataset, latest: Dataset) -> Rows:
        """The rows without the clips of videos that later generations removed."""
        self._removed = SharedArray(np.zeros(0, dtype=np.int64))
        self._left_out = ""
        ids = removed_since(self._store, dataset, latest)
        if not ids:
            return rows
        removed = rows_of_videos(self._table, ids)
        if self.keep_numbers:
            self._removed = SharedArray(removed)
            return rows
        self._left_out = digest(dump_removed(ids))  # the samples have other numbers
        return rows.taken(~np.isin(rows.array(), removed))

    def _scores(self, dataset: Dataset) -> ScoreColumns | None:
        """The columns of scores of this generation, mapped; None where it has none."""
        if not dataset.scores_sha256:
            return None

        def place(name: str, size: int) -> Path:
            return self._host_files.path(self._store, name, identity=dataset.scores_sha256, size=size)

        return open_scores(self._store, dataset, place)

    def filter_columns(self) -> dict[str, ClipColumn]:
        """The columns that ``where`` may name, by row of the catalog. Raises ManifestError."""
        columns = catalog_columns(self._catalog.column_of, self.classes)
        return columns | score_columns(self._scores(self._dataset))

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """(N,) the row of every sample in the catalog, rising."""
        return self._rows.array()

    def _choose(self, dataset: Dataset, rows: Rows) -> None:
        """Take these rows of the catalog, and the shards that hold one of them."""
        self._rows, self._length = rows, len(rows)
        self._ends = rows.before(self._catalog.shard_ends)
        held = np.flatnonzero(np.diff(self._ends, prepend=0))
        self.shards = tuple(dataset.shards[number] for number in held.tolist())
        self._ends = self._ends[held]
        self.classes = dataset.classes
        # Another split, fold or subset of the same shards is another training set.
        part_of: list[object] = [self.split, self.fold]
        part_of += [] if self.subset is None else [asdict(self.subset)]
        part_of += ["without", self._left_out] if self._left_out else []
        part_of += ["where", self._left_by] if self._left_by else []
        self.fingerprint = digest(canonical([dataset.fingerprint, *part_of]))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shard_ranges(self) -> list[tuple[int, int]]:
        """The first sample of every one of :attr:`shards`, and the one after its last."""
        stops = self._ends.tolist()
        return list(zip([0, *stops[:-1]], stops, strict=True))

    def facts(self, i: int) -> SampleFacts:
        """What is known of sample ``i``; reads the table of samples."""
        number = self.row(i)
        row = self._table.row(number)
        split = ALL
        if self.fold is not None or not self._catalog.head.folded:
            split = self._catalog.split(number, (self.fold or 1) - 1)
        return SampleFacts(
            key=row["key"],
            shard=row["shard"],
            label=None if row["label"] == NO_LABEL else row["label"],
            labels=tuple(row["labels"]),
            split=split,
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

    def row(self, i: int) -> int:
        """The row of sample ``i`` in the catalog, which is the same in every split, fold and subset."""
        return self._rows.row(self._checked(i))

    def shape(self, i: int) -> ClipShape:
        """Frames, rate and size of sample ``i``."""
        frames, fps, height, width = self._catalog.values(self.row(i), "num_frames", "fps", "height", "width")
        return ClipShape(int(frames), float(fps), int(height), int(width))

    def label(self, i: int) -> int:
        """The label of sample ``i``; NO_LABEL where it has none."""
        return int(self._catalog.values(self.row(i), "label")[0])

    def label_set(self, i: int) -> tuple[int, ...]:
        """The list of labels of sample ``i``; empty where it has one label alone."""
        return self._catalog.label_set(self.row(i))

    def video(self, i: int) -> int:
        """The number of the source video of sample ``i``, below :attr:`num_videos`."""
        return int(self._catalog.values(self.row(i), "video")[0])

    @property
    def num_videos(self) -> int:
        """Source videos of the whole dataset."""
        return self._catalog.head.videos

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """(N,) the label of every sample; looks at all of them."""
        return self._rows.of(self._catalog, "label").astype(np.int64)

    @property
    def videos(self) -> npt.NDArray[np.int64]:
        """(N,) the number of every sample's source video; looks at all of them."""
        return self._rows.of(self._catalog, "video").astype(np.int64)

    def score(self, name: str) -> npt.NDArray[np.float64]:
        """(N,) a score of every sample, NaN where a clip has none; looks at all of them. Raises ConfigError."""
        return score_of_rows(name, self._rows, self._scores(self._dataset), url=self.url)

    def key(self, i: int) -> str:
        """The key of sample ``i``; reads the table of samples."""
        return str(self._table.row(self.row(i), "key")["key"])

    def column(self, name: str) -> list[Any]:
        """One column of the table of samples, e.g. ``video_id`` or ``num_frames``, in sample order."""
        values: list[Any] = self._table_column(name).to_pylist()
        return values

    def encoded(self, name: str) -> tuple[list[str], npt.NDArray[np.int32]]:
        """The different values of a column in order of appearance, and the place of every sample's among them."""
        coded = self._table_column(name).combine_chunks().dictionary_encode()
        return coded.dictionary.to_pylist(), coded.indices.to_numpy()

    def _table_column(self, name: str) -> pa.ChunkedArray:
        return self._table.columns(name).column(name).take(self._rows.array())

    @property
    def most_labels(self) -> int:
        """Labels of the sample that has most."""
        head = self._catalog.head
        if self.subset is not None:
            counts = self._rows.of(self._catalog, "labels_count") if head.label_values else np.zeros(0)
            return int(counts.max(initial=0))
        if head.folded and self.fold is None:
            return head.most_labels
        most = dict(zip(head.splits, head.split_labels[(self.fold or 1) - 1], strict=True))
        return max(most.values(), default=0) if self.split is None else most[self.split]

    def shard_of(self, i: int) -> int:
        """Position in :attr:`shards` of the shard that holds sample ``i``."""
        return int(self._ends.searchsorted(self._checked(i), side="right"))

    def read(self, i: int) -> bytes:
        """The mp4 of sample ``i``.

        Raises:
            ShardReadError: the file is gone, too short, or its bytes are not those that were written.
        """
        return self._member(i, "mp4")

    @property
    def has_flow(self) -> bool:
        """Whether optical flow is stored beside the clips."""
        return self._catalog.head.flow

    def read_flow(self, i: int) -> bytes:
        """The flow video of sample ``i``, which ``flow.decode_flow`` decodes; raises as :meth:`read` does."""
        return self._member(i, "flow")

    def announce(self, i: int, kind: str = "mp4") -> bool:
        """Let the system fetch sample ``i`` into memory while other work is done; False where it cannot (remote)."""
        shard = self.shards[self.shard_of(i)]
        path = self._store.local_path(shard.file)
        if path is None or not hasattr(os, "posix_fadvise"):
            return False
        offset, length, _ = self._place(i, kind)
        self._files.announce(path, offset, length)
        return True

    def read_json(self, i: int) -> dict[str, object]:
        """The JSON member of sample ``i``; raises as :meth:`read` does."""
        tree: dict[str, object] = json.loads(self._member(i, "json"))
        return tree

    def close(self) -> None:
        """Close the files this process has open, but for the catalog; reading opens them again."""
        self._files.close()
        self._table.close()

    def _is_removed(self, i: int) -> bool:
        rows = self._removed.array
        if not len(rows):
            return False
        row = self.row(i)
        place = int(rows.searchsorted(row))
        return place < len(rows) and int(rows[place]) == row

    def _checked(self, i: int) -> int:
        if not 0 <= i < self._length:
            raise IndexError(f"sample {i} of {len(self)}")
        return int(i)

    def _member(self, i: int, kind: str) -> bytes:
        shard = self.shards[self.shard_of(i)]
        if self._is_removed(i):
            raise RemovedError(shard.file, f"row {self.row(i)}", "its video was removed from the dataset")
        offset, length, crc32 = self._place(i, kind)
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

    def _place(self, i: int, kind: str) -> tuple[int, int, int]:
        """Offset, length and CRC-32 of a member; length 0 where there is none."""
        names = [f"{kind}_{what}" for what in ("offset", "bytes", "crc32")]
        if kind == "json":  # training reads none, so the catalog has it not
            row = self._table.row(self.row(i), *names)
            offset, length, crc32 = (int(row[name]) for name in names)
            return offset, length, crc32
        if kind == "flow" and not self.has_flow:
            return 0, 0, 0
        offset, length, crc32 = map(int, self._catalog.values(self.row(i), *names))
        return offset, length, crc32

    def _failure(self, i: int, kind: str, reason: str) -> ShardReadError:
        try:
            name = self.key(i)
        except (ManifestError, StorageError, OSError):  # what made the read fail may hide the names too
            name = f"row {self.row(i)}"
        return ShardReadError(self.shards[self.shard_of(i)].file, f"{name}.{MEMBERS[kind]}", reason)

    def _bytes(self, shard: ShardFacts, offset: int, length: int) -> bytes:
        path = self._store.local_path(shard.file)
        if path is None and self._cache is None:
            return self._store.read_range(shard.file, offset, length)
        if path is None:
            assert self._cache is not None
            return self._cache.read(self._store, shard, offset, length)
        return self._files.read(path, offset, length)


def fold_count(url: str) -> int:
    """How many official splits a dataset has; 0 where it has one only."""
    return open_dataset(url)[1].folds


class _MadeRows(NamedTuple):
    """The rows of a dataset without a catalog, made once and shared with the processes that the dataset is sent to."""

    head: CatalogHead
    rows: SharedArray[np.void]
    labels: SharedArray[np.int32]


def _made_rows(store: Store, dataset: Dataset, url: str) -> _MadeRows:
    with read_samples(store, dataset, url) as path:
        file = f"{url}/{SAMPLES_FILE}"
        size = path.stat().st_size
        head, rows, labels = columns_of(open_table(path, file=file), dataset, samples_bytes=size, file=file)
    return _MadeRows(head, SharedArray(rows), SharedArray(labels))
