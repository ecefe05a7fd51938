"""The plan of a build: which video goes into which shard. Made once, from source and config alone, then immutable."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, overload

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun
from cliplift.sharding.manifest import (
    LEFT_OUT_FILE,
    MISSING_FILE,
    NO_LABEL,
    PLAN_FILE,
    PLAN_FORMAT,
    PLAN_VIDEOS_FILE,
    Dataset,
    ManifestError,
    SourceVideo,
    canonical,
    digest,
    shard_file,
    whole_parquet,
)
from cliplift.sharding.scratch import scratch_folder
from cliplift.sharding.sources.dealing import DealtVideos
from cliplift.sharding.sources.files import LeftOut, LeftOutCount
from cliplift.sharding.sources.lists import Entry, Stream
from cliplift.sharding.sources.read import assign_splits, open_source, warn_of_gaps
from cliplift.sharding.storage import RangeFile, Store, open_store
from cliplift.sharding.tables import (
    ROWS_OF_A_BATCH,
    ROWS_OF_A_GROUP,
    TableFile,
    schema_of,
    videos_of,
)

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

PLAN, HEAD = PLAN_FILE.split("/")
VIDEOS = Path(PLAN_VIDEOS_FILE).name
KEPT_SETTINGS = ("name", "cut", "transcode", "flow")  # what clips of all generations have in common
VIDEOS_READ = 4096  # videos of a plan read at a time


@dataclass(frozen=True)
class PlannedShard:
    """One unit of work: rows ``start`` to ``stop`` of the plan."""

    shard: int
    split: str
    tar: str
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """Videos in shard order and the shards they make."""

    plan_id: str  # a digest of all the rest but name, root and missing
    name: str
    root: str
    classes: tuple[str, ...]
    folds: int
    missing: int
    settings: Mapping[str, object]
    shards: tuple[PlannedShard, ...]
    videos: Sequence[SourceVideo] = field(compare=False)


class PlannedVideos(Sequence[SourceVideo]):
    """The videos of a plan, read from its table as they are asked for: in rising order, each is read once.

    Args:
        store: where the plan is.
        name: its table.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self._opened: pq.ParquetFile | None = None
        self._batches: Iterator[list[SourceVideo]] | None = None
        self._videos: list[SourceVideo] = []
        self._first = 0  # number of the first of those at hand

    def __len__(self) -> int:
        return int(self._table().metadata.num_rows)

    @overload
    def __getitem__(self, place: int) -> SourceVideo: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[SourceVideo, ...]: ...
    def __getitem__(self, place: int | slice) -> SourceVideo | tuple[SourceVideo, ...]:
        if isinstance(place, int):
            if not 0 <= place < len(self):
                raise IndexError(f"video {place} of {len(self)}")
            return self[place : place + 1][0]
        start, stop, step = place.indices(len(self))
        assert step == 1, "videos are read in order"
        found: list[SourceVideo] = []
        while start < stop:
            self._go_to(start)
            part = self._videos[start - self._first : stop - self._first]
            found += part
            start += len(part)
        return tuple(found)

    def __iter__(self) -> Iterator[SourceVideo]:
        for start in range(0, len(self), VIDEOS_READ):
            yield from self[start : start + VIDEOS_READ]

    def _go_to(self, number: int) -> None:
        """Read the batch that holds a video; goes back, or over groups of rows, where it must."""
        table = self._table()
        sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        stops = list(accumulate(sizes))
        group = next(group for group, stop in enumerate(stops) if number < stop)
        begin = stops[group] - sizes[group]
        if self._batches is None or number < self._first or self._first + len(self._videos) < begin:
            self._first, self._videos = begin, []
            groups = list(range(group, len(sizes)))
            self._batches = (
                videos_of(batch)
                for batch in table.iter_batches(VIDEOS_READ, row_groups=groups, use_threads=False)
            )
        while number >= self._first + len(self._videos):
            self._first += len(self._videos)
            self._videos = next(self._batches)

    def _table(self) -> pq.ParquetFile:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> pq.ParquetFile:
        import pyarrow.parquet as pq

        path = self._store.local_path(self._name)
        with whole_parquet(self._name):
            return pq.ParquetFile(
                io.BufferedReader(RangeFile(self._store, self._name)) if path is None else path
            )


def settings_of(run: ShardRun) -> dict[str, object]:
    """The part of a run that decides the bytes of the shards."""
    settings = run.model_dump(
        mode="json", include={"name", "source", "splits", "cut", "transcode", "flow", "shards", "duplicates"}
    )
    if settings["flow"] is None:  # a plan without flow is the plan it was before there was any
        del settings["flow"]
    return settings


@dataclass(frozen=True)
class Addition:
    """What a plan of further videos goes on from.

    Args:
        classes: those of the dataset, whose numbers stay.
        first: number of the first shard.
        planned: plans whose videos are there already.
        removed: ids of videos that were taken out, and stay out.
    """

    classes: tuple[str, ...]
    first: int
    planned: tuple[Plan, ...]
    removed: frozenset[str]

    @property
    def folder(self) -> str:
        """Where the plan of the addition stands."""
        return f"{Path(PLAN_FILE).parent}/{self.first:06d}"

    def labels(self, classes: tuple[str, ...], numbers: Sequence[int]) -> list[int]:
        """The dataset's numbers of classes that a source numbers. Raises ConfigError for a class it has not."""
        if new := [name for name in classes if name not in self.classes]:
            raise ConfigError(
                f"names the class {new[0]!r}, which the dataset does not have",
                key="source",
                value=new[0],
                hint="the numbers of classes stay; build a new dataset with all classes",
            )
        return [n if n == NO_LABEL else self.classes.index(classes[n]) for n in numbers]


def make_plan(
    run: ShardRun, folder: Path, *, store: Store | None = None, addition: Addition | None = None
) -> Plan:
    """Plan a build in memory that does not grow with the videos. What the source leaves out is logged.

    Args:
        run: the validated config.
        folder: an empty folder that receives the tables of the plan; :func:`save_plan` takes them from there.
        store: where to write the list of what the source leaves out; None only logs it.
        addition: plan only the videos that are new to a dataset, which may be none.

    Raises:
        ConfigError: no video, or more are missing than ``limits.max_missing_share`` allows.
        SourceError: a row is wrong, or a clip is listed twice.
    """
    stream = open_source(run)
    listed = _Listed(run, stream, folder)
    with scratch_folder() as scratch:
        dealt = DealtVideos(scratch, run.shards.seed)
        for plan in addition.planned if addition else ():
            for video in plan.videos:
                dealt.add(video, known=True)
        for video, entry in listed.videos():
            if addition is None or video.video_id not in addition.removed:
                dealt.add(video, entry.name, place=entry.place)
        listed.close(store)
        classes, labels = stream.number(list(listed.names))
        if addition is not None:
            labels = addition.labels(classes, labels)
            if classes != addition.classes and not listed.names:  # a source that numbers its videos itself
                raise ConfigError("numbers other classes than the dataset", key="source", value=stream.root)
            classes = addition.classes
        numbers = dict(zip(listed.names, labels, strict=True))
        first = addition.first if addition else 0
        labels_of_split: dict[str, Counter[int]] = {}
        shards, rows_sha256 = _write_videos(run, dealt, numbers, folder, first=first, count=labels_of_split)
    if addition is None and not stream.folds:
        warn_of_gaps(run.splits, labels_of_split, classes)
    settings = settings_of(run)
    return Plan(
        plan_id=digest(canonical([settings, classes, stream.folds, rows_sha256])),
        name=run.name,
        root=stream.root,
        classes=classes,
        folds=stream.folds,
        missing=listed.missing,
        settings=settings,
        shards=shards,
        videos=PlannedVideos(open_store(str(folder)), VIDEOS),
    )


class _Listed:
    """What a source lists, while it passes: what is missing or left out goes into files of ``folder``."""

    def __init__(self, run: ShardRun, stream: Stream, folder: Path) -> None:
        self._run, self._stream, self._folder = run, stream, folder
        self._entry: Entry | None = None
        self._left_out = LeftOutCount()
        self.present = self.missing = 0
        self._first_missing = ""
        # A class is one of the list's, downloaded or not: else every later label would shift.
        self.names: dict[str, None] = {}

    def videos(self) -> Iterator[tuple[SourceVideo, Entry]]:
        """The videos that exist, with their splits."""
        run, folds = self._run, self._stream.folds
        for video in assign_splits(self._present(), run.splits, folds=folds):
            assert self._entry is not None
            yield video, self._entry

    def _present(self) -> Iterator[SourceVideo]:
        with (
            (self._folder / MISSING_FILE).open("wb") as missing,
            (self._folder / LEFT_OUT_FILE).open("wb") as left_out,
        ):
            for item in self._stream.entries:
                if isinstance(item, LeftOut):
                    self._left_out.add(item)
                    left_out.write(canonical(dataclasses.asdict(item)) + b"\n")
                    continue
                if item.name is not None:
                    self.names.setdefault(item.name)
                if item.missing:
                    self.missing += 1
                    video = item.video
                    self._first_missing = self._first_missing or video.source
                    row = {"video_id": video.video_id, "source": video.source, "split": video.split}
                    missing.write(canonical(row) + b"\n")
                    continue
                self.present += 1
                self._entry = item
                yield item.video

    def close(self, store: Store | None) -> None:
        """Say what is left out. Raises ConfigError where there are no videos, or too many are missing."""
        file = f"{self._run.output}/{LEFT_OUT_FILE}" if store is not None else ""
        self._left_out.warn(self._stream.root, file=file)
        if store is not None and (self._folder / LEFT_OUT_FILE).stat().st_size:
            store.publish(self._folder / LEFT_OUT_FILE, LEFT_OUT_FILE)
        if not self.present:
            raise ConfigError(
                "no video was found",
                key="source",
                value=self._stream.root,
                hint=f"{self.missing} are missing",
            )
        listed = self.present + self.missing
        share = self.missing / listed
        if share > self._run.limits.max_missing_share:
            raise ConfigError(
                f"{self.missing} of {listed} listed videos do not exist, e.g. {self._first_missing!r}",
                key="limits.max_missing_share",
                value=self._run.limits.max_missing_share,
                hint=f"fix the source's folder, or allow {share:.2f}",
            )


def _write_videos(
    run: ShardRun,
    dealt: DealtVideos,
    numbers: Mapping[str, int],
    folder: Path,
    *,
    first: int,
    count: dict[str, Counter[int]],
) -> tuple[tuple[PlannedShard, ...], str]:
    """Write the plan's videos; the shards they make, and the sha256 of the rows as JSON.

    ``count`` is given the labels of each split, and how many videos have them.
    """
    counts = dealt.deal()
    # Beyond one row group of pyarrow's, groups are small: a part of the work reads few rows that are not its own.
    group_rows = ROWS_OF_A_GROUP if sum(counts.values()) <= ROWS_OF_A_GROUP else ROWS_OF_A_BATCH
    schema = schema_of(SourceVideo)
    table = TableFile(folder / VIDEOS, schema, group_rows=group_rows)
    rows = hashlib.sha256(b"[")
    separator = b""
    shards: list[PlannedShard] = []
    for split, number in counts.items():
        begin = shards[-1].stop if shards else 0
        for start in range(begin, begin + number, run.shards.videos_per_shard):
            stop = min(start + run.shards.videos_per_shard, begin + number)
            tar = shard_file(run.name, split, first + len(shards))
            shards.append(
                PlannedShard(shard=first + len(shards), split=split, tar=tar, start=start, stop=stop)
            )
        for videos in dealt.of_split(split, numbers):
            table.add(videos)
            count.setdefault(split, Counter()).update(videos.column("label").to_pylist())
            for part in videos.to_batches(VIDEOS_READ):
                rows.update(separator + _as_json(part))
                separator = b","
    table.close()
    rows.update(b"]")
    return tuple(shards), rows.hexdigest()


def _as_json(videos: pa.RecordBatch) -> bytes:
    """Rows as the identity of a plan takes them in: lists of their values, with commas between them."""
    rows = zip(*(column.to_pylist() for column in videos.columns), strict=True)
    return canonical(list(rows))[1:-1]


def save_plan(plan: Plan, folder: Path, store: Store, *, place: str = PLAN) -> None:
    """Publish a plan that was made in ``folder``; ``plan.json`` last, as it says that the rest is there."""
    store.publish(folder / VIDEOS, f"{place}/{VIDEOS}")
    store.publish(folder / MISSING_FILE, MISSING_FILE if place == PLAN else f"{place}/{MISSING_FILE}")
    head = {
        f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name not in ("videos", "shards")
    }
    head |= {"format": PLAN_FORMAT, "shards": [dataclasses.asdict(s) for s in plan.shards]}
    text = json.dumps(head, indent=1, ensure_ascii=False, sort_keys=True)
    store.write(f"{place}/{HEAD}", f"{text}\n".encode())


def load_plan(store: Store, *, place: str = PLAN) -> Plan | None:
    """The plan written before, or None.

    Raises:
        ManifestError: the plan is damaged or of another format.
    """
    try:
        text = store.read(f"{place}/{HEAD}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        head = json.loads(text)
    except ValueError as error:
        raise ManifestError(f"{PLAN_FILE}: not whole JSON: {error}") from error
    if head.pop("format", None) != PLAN_FORMAT:
        raise ManifestError(f"{PLAN_FILE}: not a plan of this version")
    shards = tuple(PlannedShard(**s) for s in head.pop("shards"))
    videos = PlannedVideos(store, f"{place}/{VIDEOS}")
    return Plan(**head | {"classes": tuple(head["classes"])}, shards=shards, videos=videos)


def plan_once(run: ShardRun, store: Store) -> Plan:
    """The run's plan: the one already written if it was made with the same settings, else a new one.

    Raises:
        ConfigError: the output holds a plan made with other settings.
    """
    found = load_plan(store)
    if found is None:
        with scratch_folder() as folder:
            plan = make_plan(run, folder, store=store)
            save_plan(plan, folder, store)
        return dataclasses.replace(plan, videos=PlannedVideos(store, PLAN_VIDEOS_FILE))
    _require_settings(found, run)
    return found


def plan_addition(run: ShardRun, dataset: Dataset, removed: frozenset[str], store: Store) -> Plan:
    """The plan of the videos that a dataset does not have yet: the one of an addition under way, else a new one.

    Raises:
        ConfigError: the dataset was not built here, or with settings that its clips would show.
    """
    places = sorted({name.rpartition("/")[0] for name in store.list() if name.endswith(f"/{HEAD}")} - {PLAN})
    first = 1 + max(shard.shard for shard in dataset.shards)
    earlier = [load_plan(store, place=place) for place in (PLAN, *places) if place != f"{PLAN}/{first:06d}"]
    planned = tuple(plan for plan in earlier if plan is not None)
    if not planned:
        raise ConfigError(
            f"holds no {PLAN_FILE}",
            key="output",
            value=run.output,
            hint="videos are added where it was built",
        )
    _require_settings(planned[0], run, KEPT_SETTINGS)
    addition = Addition(dataset.classes, first, planned, removed)
    found = load_plan(store, place=addition.folder)
    if found is not None:
        _require_settings(found, run)
        return found
    with scratch_folder() as folder:
        plan = make_plan(run, folder, store=store, addition=addition)
        if not plan.shards:
            return dataclasses.replace(plan, videos=())
        save_plan(plan, folder, store, place=addition.folder)
    return dataclasses.replace(plan, videos=PlannedVideos(store, f"{addition.folder}/{VIDEOS}"))


def _require_settings(plan: Plan, run: ShardRun, names: Sequence[str] = ()) -> None:
    """Raise ConfigError, with the key, where settings, or those of these names, are not those of a plan."""
    # Read through today's schema: a setting that came later has its default in an older plan.
    then = settings_of(ShardRun.model_validate({"output": run.output, **plan.settings}))
    now_set = settings_of(run)
    if names:
        then, now_set = ({name: one.get(name) for name in names} for one in (then, now_set))
    key, before, now = _first_difference(then, now_set, "")
    if key:
        raise ConfigError(
            f"{now!r} here, but the shards in {run.output} were planned with {before!r}",
            key=key,
            value=now,
            hint="choose another output, or remove that folder",
        )


def _first_difference(before: object, now: object, key: str) -> tuple[str, object, object]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in sorted({*before, *now}):
            path = f"{key}.{name}" if key else name
            found = _first_difference(before.get(name), now.get(name), path)
            if found[0]:
                return found
        return "", None, None
    return (key, before, now) if before != now else ("", None, None)
