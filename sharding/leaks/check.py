"""``cliplift dedupe PRETRAIN --against TEST``: clips of one dataset that show what clips of another one show.

The test clips are decoded once, in isolated processes, and looked for in the indexes of the other dataset's shards;
clips that may show the same are compared picture by picture. Memory grows with neither dataset: the test clips are
taken so many at a time, and the shards one after the other. What is found depends on the clips alone.
"""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cliplift.configs.sections import ConfigError
from cliplift.sharding.build.pool import Job, WorkerPool
from cliplift.sharding.build.worker import ClipFacts, decoding_settings, looking_task
from cliplift.sharding.leaks.embedded import SharedEmbedding, embedded_pairs, shared_embedding
from cliplift.sharding.leaks.pictures import Comparison, Film, compare_films, shared_part, small_film
from cliplift.sharding.leaks.records import LeakCheck, shards_digest
from cliplift.sharding.leaks.search import MOST_CANDIDATES, Candidate, KeyFrames, LookTable, likelihood
from cliplift.sharding.manifest import (
    Dataset,
    ManifestError,
    Sample,
    ShardFacts,
    canonical,
    index_file,
    load_index,
)
from cliplift.sharding.read.generations import open_dataset, read_removed
from cliplift.sharding.storage import Store, join
from cliplift.sharding.video.decode import VideoDecodeError

METHOD = "looks-1"  # another one finds other clips
LOOKS_PER_SECOND = 12.0
LOOKS_AT_ONCE = 1 << 20  # of test clips that are looked for in one pass over the other dataset
FILM_BYTES = 128 << 20  # of small pictures that are kept
MOST_REASONS = 5
TRAIN = "train"

Kind = Literal["content", "pictures", "still", "embedding"]
Watch = Callable[[str, int, int], None]


class LeakError(ValueError):
    """Clips cannot be read, so that it is not known whether they are in the other dataset; the message says where."""


@dataclass(frozen=True)
class Place:
    """A clip, and the dataset and the tar that hold it."""

    store: Store
    tar: str
    sample: Sample

    def read(self) -> bytes:
        """Its mp4. Raises LeakError."""
        one = self.sample
        try:
            data = self.store.read_range(self.tar, one.mp4_offset, one.mp4_bytes)
        except (OSError, ValueError) as error:
            raise LeakError(f"{self.store.url}/{self.tar}: cannot be read: {error}") from error
        if zlib.crc32(data) != one.mp4_crc32:
            raise LeakError(
                f"{self.store.url}/{self.tar}, {one.key}.mp4: crc32 differs: run `cliplift verify {self.store.url}`"
            )
        return data


@dataclass(frozen=True)
class Leak:
    """A clip of the searched dataset that shows what a test clip shows.

    Attributes:
        clip: the clip.
        of: the test clip; of several the likeliest.
        kind: ``content`` where both are cut from the same file at the same time, ``pictures`` where their pictures and
            what changes in them agree, ``still`` where nothing moves and the pictures are equal, ``embedding`` where
            the embeddings and sketches of both agree, whatever part of them.
        begins_seconds: when the part that both show begins in the clip.
        of_begins_seconds: when it does in the test clip.
        shared_seconds: how long it is; 0 where that is not known, as of embeddings.
        comparison: of pictures of both; None where they were not compared.
        likeness: of their sketches, up to 1, where they were found by embedding.
    """

    clip: Place
    of: Place
    kind: Kind
    begins_seconds: float
    of_begins_seconds: float
    shared_seconds: float
    comparison: Comparison | None
    likeness: float | None = None

    def row(self) -> dict[str, object]:
        """The leak as a row of the listing."""
        one, other, compared = self.clip.sample, self.of.sample, self.comparison
        return {
            "kind": self.kind,
            **{name: getattr(one, name) for name in ("key", "video_id", "source", "split")},
            **{f"of_{name}": getattr(other, name) for name in ("key", "video_id", "source", "split")},
            "begins_seconds": round(self.begins_seconds, 3),
            "of_begins_seconds": round(self.of_begins_seconds, 3),
            "shared_seconds": round(self.shared_seconds, 3),
            "residual_levels": None if compared is None else round(compared.residual, 2),
            "correlation": None if compared is None else round(compared.correlation, 3),
            "likeness": None if self.likeness is None else round(self.likeness, 3),
        }


@dataclass(frozen=True)
class LeakReport:
    """What a check found.

    Attributes:
        check: what stays of it beside the dataset.
        leaks: one for each clip, in the order of the shards.
        unread: why test clips do not decode, which therefore were not looked for; the first few.
        undecoded: how many these are.
    """

    check: LeakCheck
    leaks: tuple[Leak, ...]
    unread: tuple[str, ...] = ()
    undecoded: int = 0

    def listing(self) -> bytes:
        """The leaks as JSON, one a line."""
        return b"".join(canonical(leak.row()) + b"\n" for leak in self.leaks)


def find_leaks(
    url: str,
    against: str,
    *,
    splits: Sequence[str] = (),
    fold: int | None = None,
    workers: int = 0,
    clip_timeout_seconds: float = 60.0,
    on_progress: Watch | None = None,
) -> LeakReport:
    """Look for the clips of one dataset in another.

    Args:
        url: folder or URL of the dataset that is searched; ``URL@N`` is its generation N, the latest otherwise.
        against: folder or URL of the dataset whose clips are looked for.
        splits: its splits; empty takes all but ``train``, or ``train`` where it has no other.
        fold: its official split number, from 1; None takes all.
        workers: decoding processes; 0 is one per core.
        clip_timeout_seconds: time a clip may take to decode.
        on_progress: called with what is done, how much of it, and of how much.

    Raises:
        ConfigError: there is no such dataset, split or fold, or both are the same.
        ManifestError: their files are damaged.
        LeakError: clips cannot be read.
    """
    (store, dataset), (test_store, test_set) = open_dataset(url), open_dataset(against)
    if shards_digest(dataset) == shards_digest(test_set):
        raise ConfigError(
            f"{url} and {against} have the same shards", key="--against", value=against,
            hint="within a dataset the build looks for duplicates: `duplicates: remove`",
        )  # fmt: skip
    splits = _splits(test_set, against, splits, fold)
    watch = on_progress or (lambda what, done, of: None)
    search = _Search(store, dataset, workers=workers, timeout=clip_timeout_seconds, watch=watch)
    wanted = _clips(test_store, test_set, splits, fold)
    decoded = _decoded(wanted, workers=workers, timeout=clip_timeout_seconds)
    count, unread = _look_for_all(
        decoded, search, lambda done: watch("test clips decoded", done, test_set.samples)
    )
    leaks = list(search.confirmed())
    sides = (store, dataset), (test_store, test_set)
    shared = shared_embedding(*sides)
    if shared is not None:
        leaks = _with_embedded(leaks, sides, shared, lambda sample: _is_of(sample, splits, fold))
    check = LeakCheck(
        shards=shards_digest(dataset),
        against=test_set.name,
        against_shards=shards_digest(test_set),
        against_fingerprint=test_set.fingerprint,
        splits=tuple(splits),
        fold=fold or 0,
        method=METHOD if shared is None else f"{METHOD}, {shared.name}",
        clips=dataset.samples,
        against_clips=count - len(unread),
        videos=tuple(sorted({leak.clip.sample.video_id for leak in leaks})),
    )
    return LeakReport(check, tuple(leaks), tuple(unread[:MOST_REASONS]), len(unread))


def _look_for_all(
    decoded: Iterable[tuple[Place, ClipFacts | str]], search: _Search, watch: Callable[[int], None]
) -> tuple[int, list[str]]:
    """Search for test clips, as many at a time as memory may hold; how many there were, and why some do not decode."""
    count, unread = 0, list[str]()
    tests, looks = list[tuple[Place, ClipFacts]](), 0
    for count, (place, facts) in enumerate(decoded, start=1):
        watch(count)
        if isinstance(facts, str):
            unread.append(f"{place.tar}, {place.sample.key}: {facts}")
            continue
        tests.append((place, facts))
        looks += len(facts["looks"])
        if looks >= LOOKS_AT_ONCE:
            search.look_for(tests)
            tests, looks = [], 0
    search.look_for(tests)
    return count, unread


def _with_embedded(
    leaks: Sequence[Leak],
    sides: tuple[tuple[Store, Dataset], tuple[Store, Dataset]],
    shared: SharedEmbedding,
    wanted: Callable[[Sample], bool],
) -> list[Leak]:
    """The leaks, and those that only embeddings find, in the order of the shards."""
    first, second = sides

    def chosen() -> NDArray[np.bool_]:
        return np.array(
            [wanted(place.sample) for _, places, _ in _shards(*second) for place in places], dtype=bool
        )

    known = {(leak.clip.tar, leak.clip.sample.key): leak for leak in leaks}
    pairs = embedded_pairs(first, second, shared, chosen)
    clips = _places(*first, [pair.first for pair in pairs])
    tests = _places(*second, [pair.second for pair in pairs])
    for pair in pairs:
        clip = clips[pair.first]
        leak = Leak(clip, tests[pair.second], "embedding", 0.0, 0.0, 0.0, None, pair.likeness)
        known.setdefault((clip.tar, clip.sample.key), leak)
    order = {shard.file: number for number, shard in enumerate(first[1].shards)}
    return sorted(known.values(), key=lambda leak: (order[leak.clip.tar], leak.clip.sample.mp4_offset))


def _places(store: Store, dataset: Dataset, rows: Iterable[int]) -> dict[int, Place]:
    """The clips of some rows of the catalog, which has them in the order of the shards."""
    wanted, found, first = set(rows), dict[int, Place](), 0
    for _, places, _ in _shards(store, dataset) if wanted else ():
        found |= {first + at: place for at, place in enumerate(places) if first + at in wanted}
        first += len(places)
    return found


def _splits(dataset: Dataset, url: str, asked: Sequence[str], fold: int | None) -> tuple[str, ...]:
    if fold is not None and not 1 <= fold <= dataset.folds:
        hint = f"it has 1 to {dataset.folds}" if dataset.folds else "it has one split alone: leave --fold out"
        raise ConfigError(f"{url} has no official split {fold}", key="--fold", value=fold, hint=hint)
    there = sorted(dataset.splits)
    if dataset.folds:  # the shards stand in one folder, and the clips say themselves which split they are of
        return tuple(sorted(set(asked))) or ("test",)
    for split in asked:
        if split not in there:
            raise ConfigError(
                f"{url} has no split {split!r}", key="--split", value=split, hint=f"it has {', '.join(there)}"
            )
    return tuple(sorted(set(asked))) or tuple(split for split in there if split != TRAIN) or tuple(there)


def _is_of(sample: Sample, splits: Sequence[str], fold: int | None) -> bool:
    if not sample.folds:
        return sample.split in splits
    return any(split in splits for split in (sample.folds if fold is None else sample.folds[fold - 1 : fold]))


def _clips(store: Store, dataset: Dataset, splits: Sequence[str], fold: int | None) -> Iterator[Place]:
    for _, places, _ in _shards(store, dataset):
        yield from (place for place in places if _is_of(place.sample, splits, fold))


def _shards(
    store: Store, dataset: Dataset
) -> Iterator[tuple[ShardFacts, list[Place], list[Sequence[int]] | None]]:
    """Every shard, its clips, and the hashes of their key frames; None where these were never made."""
    removed = read_removed(store, dataset)
    for shard in dataset.shards:
        name = index_file(shard.file)
        try:
            index = load_index(store.read(name), file=f"{store.url}/{name}")
        except FileNotFoundError:
            raise ManifestError(f"{store.url}/{name}: does not exist; copy the shards' indexes too") from None
        if index.tar_sha256 != shard.sha256:
            raise ManifestError(
                f"{store.url}/{name}: is of another shard than dataset.json lists; copy it again"
            )
        kept = [i for i, sample in enumerate(index.samples) if sample.video_id not in removed]
        places = [Place(store, shard.file, index.samples[i]) for i in kept]
        hashes: list[Sequence[int]] = [index.picture_hashes[i] for i in kept] if index.picture_hashes else []
        yield shard, places, hashes if index.picture_hashes else None


def _decoded(
    places: Iterator[Place], *, workers: int, timeout: float, looks_per_second: float = LOOKS_PER_SECOND
) -> Iterator[tuple[Place, ClipFacts | str]]:
    """Every clip, decoded in full, with the hashes of its pictures; or why it does not decode.

    Raises:
        LeakError: a clip's worker died or was too slow.
    """

    def jobs() -> Iterator[Job[Place]]:
        for place in places:
            url = join(place.store.url, place.tar)
            yield Job(looking_task(place.sample, url, looks_per_second=looks_per_second), place)

    count = workers or len(os.sched_getaffinity(0))
    with WorkerPool[Place](
        workers=count, settings=decoding_settings(), clip_timeout_seconds=timeout, attempts=2
    ) as pool:
        for job, result in pool.run(jobs()):
            if not result.refused:
                yield job.context, result.clips[0][0]
                continue
            _, stage, reason = result.refused[0]
            if stage != "decode":
                where = f"{job.context.store.url}/{job.context.tar}, {job.context.sample.key}"
                raise LeakError(f"{where}: {reason}; repair the cause and call it again")
            yield job.context, reason


class _Search:
    """The clips of the searched dataset that may show what a test clip shows, with the likeliest of these."""

    def __init__(self, store: Store, dataset: Dataset, *, workers: int, timeout: float, watch: Watch) -> None:
        self._store, self._dataset = store, dataset
        self._workers, self._timeout, self._watch = workers, timeout, watch
        # By shard and place in it. Few clips may show the same, so this stays small.
        self._found: dict[tuple[int, int], tuple[Place, list[tuple[Candidate, Place]]]] = {}

    def look_for(self, tests: Sequence[tuple[Place, ClipFacts]]) -> None:
        """One pass over all clips, for some of the test clips."""
        if not tests:
            return
        table = LookTable(
            [facts["looks"] for _, facts in tests],
            [facts["look_step"] / place.sample.fps for place, facts in tests],
        )
        contents: dict[str, list[int]] = {}
        for number, (place, _) in enumerate(tests):
            contents.setdefault(place.sample.source_sha256, []).append(number)
        done = 0
        for shard, places, stored in _shards(self._store, self._dataset):
            hashes = self._hashed(places) if stored is None else stored
            for number, (place, looks) in enumerate(zip(places, hashes, strict=True)):
                seconds = np.asarray(place.sample.keyframes, dtype=np.float64) / place.sample.fps
                keys = KeyFrames(seconds[: len(looks)], np.array(looks, dtype=np.uint64))
                same = [
                    (Candidate(test, (offset,), -1.0, len(looks)), tests[test][0])
                    for test in contents.get(place.sample.source_sha256, ())
                    if (offset := _same_span(place.sample, tests[test][0].sample)) is not None
                ]
                near = [(one, tests[one.clip][0]) for one in table.candidates(keys)] if len(looks) else []
                self._keep((shard.shard, number), place, [*same, *near])
            done += len(places)
            self._watch("clips searched", done, self._dataset.samples)

    def _hashed(self, places: Sequence[Place]) -> list[Sequence[int]]:
        """The hashes of the key frames of clips whose index has none, as that of tars that others made."""
        decoded = _decoded(iter(places), workers=self._workers, timeout=self._timeout)
        return [() if isinstance(facts, str) else facts["picture_hashes"] for _, facts in decoded]

    def _keep(self, at: tuple[int, int], place: Place, found: Sequence[tuple[Candidate, Place]]) -> None:
        if not found:
            return
        _, before = self._found.get(at, (place, []))
        both = sorted([*before, *found], key=lambda one: likelihood(one[0]))
        self._found[at] = place, both[:MOST_CANDIDATES]

    def confirmed(self) -> Iterator[Leak]:
        """Those whose pictures agree, in the order of the shards."""
        films = _Films()
        for number, at in enumerate(sorted(self._found), start=1):
            place, candidates = self._found[at]
            self._watch("clips compared", number, len(self._found))
            leak = _first_leak(place, candidates, films)
            if leak is not None:
                yield leak


def _same_span(sample: Sample, other: Sample) -> float | None:
    """How much later the test clip begins in the file that both are cut from; None where they share no part of it."""
    if min(sample.end_seconds, other.end_seconds) <= max(sample.start_seconds, other.start_seconds):
        return None
    return other.start_seconds - sample.start_seconds


class _Films:
    """Small pictures of the clips that were last asked for: many clips may look like the same few test clips."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], Film] = OrderedDict()
        self._bytes = 0

    def of(self, place: Place) -> Film:
        """The pictures of a clip. Raises LeakError."""
        key = place.tar, place.sample.key
        if key not in self._kept:
            try:
                self._kept[key] = small_film(place.read(), place.sample.fps)
            except VideoDecodeError as error:
                raise LeakError(
                    f"{place.store.url}/{place.tar}, {place.sample.key}: {error}: run `cliplift verify"
                    f" {place.store.url}`"
                ) from error
            self._bytes += self._kept[key].pictures.nbytes
        self._kept.move_to_end(key)
        while self._bytes > FILM_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].pictures.nbytes
        return self._kept[key]


def _first_leak(place: Place, candidates: Sequence[tuple[Candidate, Place]], films: _Films) -> Leak | None:
    clip = films.of(place)
    for candidate, other in candidates:
        test = films.of(other)
        compared = compare_films(clip, test, candidate.offsets_seconds)
        content = candidate.bits < 0
        if not content and (compared is None or not compared.same):
            continue
        offset = candidate.offsets_seconds[0] if content or compared is None else compared.offset_seconds
        begin, end = shared_part(clip, test, offset)
        moves = compared is None or not compared.still
        kind: Kind = "content" if content else "pictures" if moves else "still"
        return Leak(place, other, kind, begin, begin - offset, end - begin, compared)
    return None
