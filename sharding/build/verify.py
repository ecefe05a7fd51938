"""Verify a shard dataset: every byte against its checksum, index against tar, table against indexes.

Memory does not grow with the clips: what is looked for among all of them is first narrowed down on disk (``likeness``).
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cliplift.sharding.build.pool import Job, VideoResult, WorkerPool
from cliplift.sharding.build.worker import decoding_settings, decoding_task
from cliplift.sharding.manifest import (
    CATALOG_FILE,
    CATALOG_ROWS_FILE,
    DATASET_FILE,
    FOREIGN,
    MEMBERS,
    SAMPLES_FILE,
    SCORES_FILE,
    VECTORS_FILE,
    Dataset,
    ManifestError,
    Sample,
    ShardFacts,
    ShardIndex,
    check_columns,
    index_file,
    load_index,
    whole_parquet,
)
from cliplift.sharding.read.catalog import load_head, open_catalog
from cliplift.sharding.read.columns import write_rows
from cliplift.sharding.read.embeddings import damage_of_embeddings
from cliplift.sharding.read.generations import open_dataset, read_removed, read_samples
from cliplift.sharding.scores.carried import damage_of_scores
from cliplift.sharding.scratch import local_copy, scratch_folder
from cliplift.sharding.storage import TEMPORARY_SUFFIX, StorageError, Store, file_sha256, join
from cliplift.sharding.tables import batches, conformed, open_table, schema_of, table_of
from cliplift.sharding.video.likeness import HashLists, Ints, SharedKeys, SharedLooks
from cliplift.sharding.video.picture_hash import near_duplicates

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


DecodeExtent = Literal["none", "sample", "full"]
SAMPLE_EVERY = 50  # "sample" decodes the first clip of every shard and one in fifty of the others


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. ``error`` makes the verification fail; a warning is for the reader to judge."""

    kind: str
    file: str
    detail: str
    error: bool = True


def decode_clips(
    dataset: Dataset,
    store: Store,
    removed: frozenset[str],
    *,
    extent: DecodeExtent,
    workers: int,
    timeout: float,
) -> tuple[list[Problem], int]:
    """Decode stored clips in isolated processes; what is wrong, and how many were decoded.

    Args:
        dataset: the manifest.
        store: where the dataset is; shards whose index cannot be read are passed over.
        removed: ids of videos whose clips are no longer part of it.
        extent: all clips, or one in :data:`SAMPLE_EVERY` of every shard.
        workers: processes; 0 is one per core.
        timeout: a clip not decoded in this time is an error, seconds.
    """
    every = 1 if extent == "full" else SAMPLE_EVERY
    most = sum(-(-shard.samples // every) for shard in dataset.shards)
    count = min(workers or len(os.sched_getaffinity(0)), max(1, most))
    problems: list[Problem] = []
    decoded = 0
    with scratch_folder() as folder:
        looks = SharedLooks(folder / "looks")
        with HashLists(folder / "hashes") as hashes:
            with WorkerPool[tuple[ShardFacts, Sample]](
                workers=count, settings=decoding_settings(), clip_timeout_seconds=timeout, attempts=1
            ) as pool:
                for job, result in pool.run(_jobs(dataset, store, removed, every)):
                    seen = result.clips[0][0]["picture_hashes"] if result.clips else []
                    looks.add(decoded, seen, job.context[1].video_id)
                    hashes.add(seen)
                    problems += _wrong(*job.context, result)
                    decoded += 1
            alike = looks.shared().tolist()
            samples = _numbered((job.context[1] for job in _jobs(dataset, store, removed, every)), alike)
            problems += _look_alikes(samples, [hashes.of(number) for number in alike])
    return problems, decoded


def _jobs(
    dataset: Dataset, store: Store, removed: frozenset[str], every: int
) -> Iterator[Job[tuple[ShardFacts, Sample]]]:
    for shard in dataset.shards:
        try:
            index = _index(shard, store)
        except (FileNotFoundError, ManifestError):
            continue
        for sample in _left(index, removed)[::every]:
            yield Job(decoding_task(sample, join(store.url, shard.file)), (shard, sample))


def _index(shard: ShardFacts, store: Store) -> ShardIndex:
    """The index of a shard. Raises FileNotFoundError, or ManifestError where it is damaged."""
    name = index_file(shard.file)
    return load_index(store.read(name), file=name)


def _left(index: ShardIndex, removed: frozenset[str]) -> list[Sample]:
    """The clips of a shard that are part of the dataset."""
    return [sample for sample in index.samples if sample.video_id not in removed]


def _numbered(samples: Iterable[Sample], numbers: Sequence[int]) -> list[Sample]:
    """Those of the samples that have these numbers, which rise."""
    wanted = set(numbers)
    return [sample for number, sample in enumerate(samples) if number in wanted] if wanted else []


def _wrong(shard: ShardFacts, sample: Sample, result: VideoResult) -> Iterator[Problem]:
    """What a full decode of one clip contradicts."""
    member = f"{sample.key}.mp4"
    for _, _, reason in result.refused:
        yield Problem("decode", shard.file, f"{member}: {reason}")
    for facts, _ in result.clips:
        expected = {name: getattr(sample, name) for name in ("num_frames", "width", "height")}
        expected["keyframes"] = list(sample.keyframes)
        decoded = dict(facts)
        wrong = [name for name, value in expected.items() if decoded[name] != value]
        if wrong:
            detail = f"{member}: {wrong[0]} is {decoded[wrong[0]]}, the index says {expected[wrong[0]]}"
            yield Problem("decode", shard.file, detail)


def _look_alikes(samples: Sequence[Sample], hashes: Sequence[Sequence[int]]) -> Iterator[Problem]:
    """Clips of different videos that look alike, as warnings: a hash of few bits is a hint, not a proof."""
    for first, second in near_duplicates(hashes):
        a, b = samples[first], samples[second]
        if a.video_id == b.video_id or a.source_sha256 == b.source_sha256:
            continue  # windows of one video, or exact copies, which are reported as such
        where = ", in another split" if (a.split, a.folds) != (b.split, b.folds) else ""
        yield Problem("near-duplicate", a.source, f"looks like {b.source}{where}", error=False)


@dataclass(frozen=True)
class VerifyReport:
    """The result of :func:`verify`; ``ok`` is False when any error was found."""

    url: str
    problems: tuple[Problem, ...]
    shards: int
    samples: int
    decoded: int
    labels: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not any(problem.error for problem in self.problems)

    def summary(self) -> str:
        """A few lines for a terminal."""
        lines = [f"{self.url}: {self.shards} shards, {self.samples} samples, {self.decoded} decoded in full"]
        lines += [
            f"  {'ERROR' if p.error else 'warning'} {p.kind}: {p.file}: {p.detail}" for p in self.problems
        ]
        return "\n".join([*lines, "ok" if self.ok else "FAILED"])


def verify(
    url: str, *, decode: DecodeExtent = "sample", workers: int = 0, clip_timeout_seconds: float = 60.0
) -> VerifyReport:
    """Check a dataset without changing it.

    Args:
        url: folder or URL of a finalized dataset.
        decode: which clips are decoded in full, in isolated processes.
        workers: processes that decode; 0 is one per core.
        clip_timeout_seconds: a clip not decoded in this time is an error.

    Raises:
        ConfigError: there is no dataset at ``url``.
        ManifestError: ``dataset.json`` is damaged, so nothing else can be trusted.
    """
    store, dataset = open_dataset(url)
    removed = read_removed(store, dataset)
    problems: list[Problem] = []
    with scratch_folder() as folder, _table(dataset, store, problems) as table:
        content = _Content(dataset, folder)
        for shard in dataset.shards:
            index, found = _shard(dataset, shard, store, removed)
            problems += found
            samples = _left(index, removed) if index else []
            content.add(samples)
            if table is not None:
                table.compare(samples)
        if table is not None:
            problems += table.found()
        for file, damage_of in ((SCORES_FILE, damage_of_scores), (VECTORS_FILE, damage_of_embeddings)):
            if damage := damage_of(store, dataset):
                problems.append(Problem("damaged", file, damage))
        problems += _orphans(dataset, store)
        problems += _duplicates(_numbered(_indexed(dataset, store, removed), content.repeated().tolist()))
        problems += _cut_groups(_numbered(_indexed(dataset, store, removed), content.cut().tolist()))
    decoded = 0
    if decode != "none":
        damaged, decoded = decode_clips(
            dataset, store, removed, extent=decode, workers=workers, timeout=clip_timeout_seconds
        )
        problems += damaged
    return VerifyReport(
        url=url,
        problems=tuple(problems),
        shards=len(dataset.shards),
        samples=dataset.samples,
        decoded=decoded,
        labels=content.balance(),
    )


def _indexed(dataset: Dataset, store: Store, removed: frozenset[str]) -> Iterator[Sample]:
    """All clips by the indexes; shards whose index cannot be read are passed over."""
    for shard in dataset.shards:
        with suppress(FileNotFoundError, ManifestError):
            yield from _left(_index(shard, store), removed)


class _Content:
    """What the clips show, while they pass: in memory that does not grow with them."""

    def __init__(self, dataset: Dataset, folder: Path) -> None:
        self._classes, self._number = dataset.classes, 0
        self._repeated, self._cut = SharedKeys(folder / "repeated"), SharedKeys(folder / "cut")
        self._labels: dict[str, Counter[str]] = defaultdict(Counter)

    def add(self, samples: Iterable[Sample]) -> None:
        for sample in samples:
            self._repeated.add(self._number, _content(sample), sample.source)
            if sample.group is not None:
                self._cut.add(self._number, sample.group, _where(sample))
            for label in sample.labels or ((sample.label,) if sample.label >= 0 else ()):
                self._labels[sample.split][self._classes[label]] += 1
            self._number += 1

    def repeated(self) -> Ints:
        """The numbers of clips whose content another source gives too, rising."""
        return self._repeated.shared()

    def cut(self) -> Ints:
        """The numbers of clips whose group stands in several splits, rising."""
        return self._cut.shared()

    def balance(self) -> dict[str, dict[str, int]]:
        """How many clips of each class every split has."""
        return {split: dict(sorted(counter.items())) for split, counter in sorted(self._labels.items())}


class _Table:
    """The table of samples, compared with the clips of the indexes as they pass."""

    def __init__(self, opened: pq.ParquetFile) -> None:
        self._schema = schema_of(Sample)
        self._batches = batches(opened, file=SAMPLES_FILE)
        self._rest = self._schema.empty_table()
        self._problem: Problem | None = None

    def compare(self, samples: Sequence[Sample]) -> None:
        """The next rows must be these clips."""
        if self._problem is not None:
            return
        try:
            rows = self._next(len(samples))
        except ManifestError as error:
            self._problem = Problem("damaged", SAMPLES_FILE, str(error))
            return
        if not rows.equals(table_of(samples, self._schema)):
            self._problem = _DIFFERENT

    def found(self) -> list[Problem]:
        """What is wrong; there must be no further rows."""
        if self._problem is None and self._next(1).num_rows:
            self._problem = _DIFFERENT
        return [] if self._problem is None else [self._problem]

    def _next(self, count: int) -> pa.Table:
        import pyarrow as pa

        while self._rest.num_rows < count and (batch := next(self._batches, None)) is not None:
            with whole_parquet(SAMPLES_FILE):
                self._rest = pa.concat_tables([self._rest, conformed(batch, self._schema)])
        rows = self._rest.slice(0, count)
        self._rest = self._rest.slice(count)
        return rows


_DIFFERENT = Problem("table", SAMPLES_FILE, "differs from the shards' indexes: finalize again")


@contextmanager
def _table(dataset: Dataset, store: Store, problems: list[Problem]) -> Iterator[_Table | None]:
    """The table of samples; the catalog is compared with it. What is wrong is added to the problems."""
    table: _Table | None = None
    with ExitStack() as held:
        try:
            path = held.enter_context(read_samples(store, dataset, store.url))
        except ManifestError as error:
            kind = "missing" if store.size(dataset.file(SAMPLES_FILE)) is None else "checksum"
            problems += [Problem(kind, SAMPLES_FILE, str(error)), *_catalog(dataset, store, None)]
        else:
            try:
                problems += _catalog(dataset, store, path)
                opened = open_table(path, file=SAMPLES_FILE)
                check_columns(opened.schema_arrow, file=SAMPLES_FILE)
                table = _Table(opened)
            except ManifestError as error:
                problems.append(Problem("damaged", SAMPLES_FILE, str(error)))
        yield table


def _catalog(dataset: Dataset, store: Store, table: Path | None) -> Iterator[Problem]:
    """What is wrong with the catalog: every block, and whether it says what the table of samples says."""
    if not dataset.catalog_sha256:
        return
    try:
        head = load_head(store.read(dataset.file(CATALOG_FILE)), dataset, file=CATALOG_FILE)
        with local_copy(store, dataset.file(CATALOG_ROWS_FILE)) as path:
            open_catalog(path, head, dataset, file=CATALOG_ROWS_FILE).check_everything()
    except FileNotFoundError as error:
        yield Problem("missing", CATALOG_FILE, f"the catalog, or its rows, do not exist: {error}")
        return
    except ManifestError as error:
        yield Problem("damaged", CATALOG_FILE, str(error))
        return
    if table is None:  # the table is what is damaged
        return
    with scratch_folder() as folder:
        opened = open_table(table, file=SAMPLES_FILE)
        size = table.stat().st_size
        if write_rows(opened, dataset, folder / CATALOG_ROWS_FILE, samples_bytes=size) != head:
            yield Problem("catalog", CATALOG_FILE, f"differs from {SAMPLES_FILE}: finalize again")


def _shard(
    dataset: Dataset, shard: ShardFacts, store: Store, removed: frozenset[str]
) -> tuple[ShardIndex | None, list[Problem]]:
    """Check one shard: index, size, checksum, and every member the index names."""
    name = index_file(shard.file)
    try:
        index = _index(shard, store)
    except FileNotFoundError:
        return None, [Problem("missing", name, "the shard has no index: it was never finished")]
    except ManifestError as error:
        return None, [Problem("damaged", name, str(error))]
    problems = []
    if (
        # Shards of several generations are of several plans.
        (dataset.generation == 1 and index.plan_id != dataset.plan_id)
        or len(_left(index, removed)) != shard.samples
        or index.tar_sha256 != shard.sha256
    ):
        problems.append(Problem("mismatch", name, f"does not describe the shard that {DATASET_FILE} lists"))
    try:
        with local_copy(store, shard.file) as path:
            size = path.stat().st_size
            if size != index.tar_bytes:
                problems.append(
                    Problem("size", shard.file, f"{index.tar_bytes} bytes expected, {size} found")
                )
            if file_sha256(path) != index.tar_sha256:
                problems.append(Problem("checksum", shard.file, "sha256 differs from its index"))
                problems += _damaged_members(index, path)
            problems += _tar_agrees(index, path)
    except FileNotFoundError:
        problems.append(
            Problem(
                "missing", shard.file, f"the tar does not exist; its {len(index.samples)} samples are lost"
            )
        )
    except StorageError as error:
        problems.append(Problem("read", shard.file, str(error)))
    return index, problems


def _damaged_members(index: ShardIndex, path: Path) -> Iterator[Problem]:
    """Which samples of a damaged tar are lost; the others can still be read by offset."""
    with path.open("rb") as file:
        for sample in index.samples:
            for kind in _kinds(sample):
                offset, length = getattr(sample, f"{kind}_offset"), getattr(sample, f"{kind}_bytes")
                data = os.pread(file.fileno(), length, offset)
                if len(data) != length:
                    yield Problem(
                        "lost",
                        index.tar,
                        f"{sample.key}.{MEMBERS[kind]}: {length} bytes expected, {len(data)} found",
                    )
                elif zlib.crc32(data) != getattr(sample, f"{kind}_crc32"):
                    yield Problem("lost", index.tar, f"{sample.key}.{MEMBERS[kind]}: crc32 differs")


def _kinds(sample: Sample) -> list[str]:
    return [kind for kind in MEMBERS if kind != "flow" or sample.flow_bytes]


def _tar_agrees(index: ShardIndex, path: Path) -> Iterator[Problem]:
    """Read the tar's own headers: they must name the members where the index says they are."""
    expected = [
        (f"{s.key}.{MEMBERS[kind]}", getattr(s, f"{kind}_offset"), getattr(s, f"{kind}_bytes"))
        for s in index.samples
        for kind in _kinds(s)
    ]
    try:
        with tarfile.open(path, "r:") as tar:
            found = [(m.name, m.offset_data, m.size) for m in tar]
    except (tarfile.TarError, OSError) as error:
        yield Problem("headers", index.tar, f"the tar's headers are damaged: {error}")
        return
    if index.plan_id.startswith(FOREIGN):  # other people's tars hold other members and names as well
        places = {(offset, size) for _, offset, size in found}
        absent = [name for name, offset, size in expected if size and (offset, size) not in places]
        if absent:
            yield Problem("headers", index.tar, f"{absent[0]} is not where the index says")
        return
    if found != expected:
        at = next(
            (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
            min(len(found), len(expected)),
        )
        yield Problem(
            "headers",
            index.tar,
            f"{len(expected)} members expected, {len(found)} found; they differ from member {at} on",
        )


def _orphans(dataset: Dataset, store: Store) -> Iterator[Problem]:
    known = {shard.file for shard in dataset.shards}
    known |= {index_file(file) for file in known}
    for name in store.list():
        if name.endswith(TEMPORARY_SUFFIX):
            yield Problem("orphan", name, "left by an interrupted build; remove it", error=False)
        elif name.endswith((".tar", ".index.json")) and name not in known:
            yield Problem("orphan", name, f"is not in {DATASET_FILE}", error=False)


def _content(sample: Sample) -> tuple[str, float]:
    return sample.source_sha256, sample.start_seconds


def _where(sample: Sample) -> str:
    """The split of a clip, or its splits in all folds."""
    return "/".join(sample.folds) or sample.split


def _duplicates(samples: Sequence[Sample]) -> Iterator[Problem]:
    """The same bytes of source video under several names; across splits or groups it spoils every number measured."""
    seen: dict[tuple[str, float], list[Sample]] = defaultdict(list)
    for sample in samples:
        seen[_content(sample)].append(sample)
    for same in seen.values():
        names = sorted({s.source for s in same})
        if len(names) < 2:
            continue
        detail = f"has the same content as {', '.join(names[1:4])}"
        if len({s.split for s in same}) > 1 or len({s.folds for s in same}) > 1:
            yield Problem("leak", names[0], f"{detail}, in another split")
        elif len({s.label for s in same}) > 1:
            yield Problem("duplicate", names[0], f"{detail}, under another label", error=False)
        else:
            yield Problem("duplicate", names[0], detail, error=False)


def _cut_groups(samples: Sequence[Sample]) -> Iterator[Problem]:
    """Groups that stand in several splits."""
    groups: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        if sample.group is not None:
            groups[sample.group].add(_where(sample))
    for group, splits in sorted(groups.items()):
        if len(splits) > 1:
            yield Problem("leak", f"group {group}", f"stands in the splits {', '.join(sorted(splits))}")
