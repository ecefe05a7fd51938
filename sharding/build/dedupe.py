"""Clips that another video already gave: found over all shards, reported, or removed from the finished shards.

What is kept depends on the clips alone, not on the order of the work: evaluation splits go before ``train``, then the
order of the plan. A clip is compared with the kept ones only, so doing it again changes nothing. Windows of one video
are never each other's duplicates.

Clips are many and duplicates few: a first pass over the indexes, in memory that does not grow with the clips, finds
those that may be like another video's clip (``likeness``), and only they are held and compared.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal, cast

import numpy as np

from cliplift.sharding.build.finalize import BuildError, load_indexes
from cliplift.sharding.build.plan import Plan
from cliplift.sharding.build.writer import ShardWriter
from cliplift.sharding.manifest import (
    DUPLICATE,
    DUPLICATES_FILE,
    Refused,
    Sample,
    SampleRow,
    ShardIndex,
    canonical,
    index_file,
)
from cliplift.sharding.scratch import local_copy, scratch_folder
from cliplift.sharding.storage import Store
from cliplift.sharding.video.likeness import Ints, SharedKeys, SharedLooks
from cliplift.sharding.video.picture_hash import alike, bands

Action = Literal["report", "remove_exact", "remove"]
Kind = Literal["exact", "look"]
REASONS: dict[Kind, str] = {"exact": "same content as", "look": "looks like"}
OTHER_SPLIT, OTHER_LABEL = ", in another split", ", under another label"


@dataclass(frozen=True)
class Duplicate:
    """Sample number ``number`` repeats number ``of``, counted over all shards."""

    number: int
    of: int
    kind: Kind


@dataclass(frozen=True)
class DuplicateCounts:
    """What ``build.json`` says of duplicates."""

    action: Action
    exact: int = 0
    look: int = 0
    removed: int = 0
    across_splits: int = 0
    across_labels: int = 0


def find_duplicates(samples: Sequence[Sample], hashes: Sequence[Sequence[int]]) -> list[Duplicate]:
    """Every sample that repeats a kept one of another video, by content or by look.

    Args:
        samples: all samples, in plan order.
        hashes: picture hashes of their key frames; an empty one is compared by content only.
    """
    # Evaluation splits first, so that of a video in both the copy in training is the one removed.
    order = sorted(range(len(samples)), key=lambda i: (samples[i].split == "train", i))
    by_content: dict[tuple[object, ...], list[int]] = defaultdict(list)
    by_look: dict[tuple[int, int], list[int]] = defaultdict(list)
    found = []
    for number in order:
        sample, pictures = samples[number], hashes[number]
        contents = _contents(sample)
        same = {other for content in contents for other in by_content[content]}
        like = {other for band in bands(pictures) for other in by_look[band]}
        first = _first(samples, number, same)
        kind: Kind = "exact"
        if first is None:
            kind = "look"
            first = _first(samples, number, {other for other in like if alike(hashes[other], pictures)})
        if first is not None:
            found.append(Duplicate(number, first, kind))
            continue
        # Only kept samples are compared with: a chain of near-duplicates must not remove what resembles none of them.
        for content in contents:
            by_content[content].append(number)
        for band in bands(pictures):
            by_look[band].append(number)
    return sorted(found, key=lambda duplicate: duplicate.number)


def _contents(sample: Sample) -> tuple[tuple[object, ...], ...]:
    """What tells that two clips are the same: one file under two names, or streams that encode to the same bytes."""
    return (
        (sample.source_sha256, sample.start_seconds, sample.end_seconds),
        (sample.mp4_crc32, sample.mp4_bytes, sample.num_frames),
    )


def _first(samples: Sequence[Sample], number: int, others: set[int]) -> int | None:
    strangers = [other for other in others if samples[other].video_id != samples[number].video_id]
    return min(strangers, default=None)


def settle_duplicates(
    plan: Plan, store: Store, action: Action, *, listing: str = DUPLICATES_FILE
) -> DuplicateCounts:
    """Find duplicates in finished shards; list them in ``duplicates.jsonl``, or remove them.

    A shard that loses clips is written again without them, bytes of the others unchanged; the ledger names each
    removed clip and the one that stays.

    Args:
        plan: whose shards are compared with each other.
        store: where they are.
        action: what to do about duplicates.
        listing: the file that lists those that stay.

    Raises:
        BuildError: a shard is missing, or a member is damaged.
    """
    with scratch_folder() as folder:
        survey = _Survey(folder)
        for index in load_indexes(plan, store):
            survey.add(index)
        numbers = survey.possible()
    samples, hashes = _taken(plan, store, numbers, survey.ends)
    found = [
        replace(d, number=int(numbers[d.number]), of=int(numbers[d.of]))
        for d in find_duplicates(list(samples.values()), hashes)
    ]
    gone = [d for d in found if action == "remove" or (action == "remove_exact" and d.kind == "exact")]
    words = Counter(_describe(samples[d.number], samples[d.of], d.kind) for d in found)
    removed = set(gone)
    stay = [d for d in found if d not in removed]
    store.write(listing, b"".join(_row(samples[d.number], samples[d.of], d.kind) + b"\n" for d in stay))
    for index, mine in _by_shard(plan, store, gone, survey.ends):
        _rewrite(index, mine, samples, store)
    words += survey.before
    return DuplicateCounts(
        action=action,
        exact=sum(n for w, n in words.items() if w.startswith(REASONS["exact"])),
        look=sum(n for w, n in words.items() if w.startswith(REASONS["look"])),
        removed=len(gone) + survey.before.total(),
        across_splits=sum(n for w, n in words.items() if OTHER_SPLIT in w.rpartition(")")[2]),
        across_labels=sum(n for w, n in words.items() if OTHER_LABEL in w.rpartition(")")[2]),
    )


class _Survey:
    """All clips of finished shards, of which only those are held that another video's clip may be like."""

    def __init__(self, folder: Path) -> None:
        self._contents, self._looks = SharedKeys(folder / "contents"), SharedLooks(folder / "looks")
        self._ends: list[int] = []
        # Those removed by an earlier call are in the ledger, in the same words.
        self.before: Counter[str] = Counter()

    def add(self, index: ShardIndex) -> None:
        number = self._ends[-1] if self._ends else 0
        for sample, pictures in zip(index.samples, _pictures(index), strict=True):
            for content in _contents(sample):
                self._contents.add(number, content, sample.video_id)
            self._looks.add(number, pictures, sample.video_id)
            number += 1
        self._ends.append(number)
        self.before.update(r.reason for r in index.refused if r.stage == DUPLICATE)

    @property
    def ends(self) -> Ints:
        """(shards,) the number after the last clip of each."""
        return np.array(self._ends, dtype=np.int64)

    def possible(self) -> Ints:
        """The numbers, rising, of all clips that repeat another video's clip or are repeated by one."""
        return np.union1d(self._contents.shared(), self._looks.shared())


def _pictures(index: ShardIndex) -> Sequence[Sequence[int]]:
    return index.picture_hashes or ((),) * len(index.samples)


def _taken(
    plan: Plan, store: Store, numbers: Ints, ends: Ints
) -> tuple[dict[int, Sample], list[Sequence[int]]]:
    """The clips of these numbers, counted over all shards, and the picture hashes of their key frames."""
    samples: dict[int, Sample] = {}
    hashes: list[Sequence[int]] = []
    for place, index in _holding(plan, store, numbers, ends):
        pictures = _pictures(index)
        first = int(ends[place]) - len(index.samples)
        mine = numbers[slice(*np.searchsorted(numbers, [first, ends[place]]).tolist())].tolist()
        samples |= {number: index.samples[number - first] for number in mine}
        hashes += [pictures[number - first] for number in mine]
    return samples, hashes


def _holding(plan: Plan, store: Store, numbers: Ints, ends: Ints) -> Iterator[tuple[int, ShardIndex]]:
    """The shards that hold clips of these numbers, and their places in the plan."""
    places = np.unique(np.searchsorted(ends, numbers, side="right")).tolist()
    return zip(places, load_indexes(plan, store, places), strict=True)


def _describe(sample: Sample, of: Sample, kind: Kind) -> str:
    split = OTHER_SPLIT if (sample.split, sample.folds) != (of.split, of.folds) else ""
    label = OTHER_LABEL if (sample.label, sample.labels) != (of.label, of.labels) else ""
    return f"{REASONS[kind]} {of.source} ({of.key}){split}{label}"


def _row(sample: Sample, of: Sample, kind: Kind) -> bytes:
    return canonical(
        {
            "key": sample.key,
            "source": sample.source,
            "split": sample.split,
            "kind": kind,
            "of": of.key,
            "detail": _describe(sample, of, kind),
        }
    )


def _by_shard(
    plan: Plan, store: Store, found: Sequence[Duplicate], ends: Ints
) -> Iterator[tuple[ShardIndex, dict[int, Duplicate]]]:
    """Shards that lose samples, and which, counted within the shard."""
    by_number = {duplicate.number: duplicate for duplicate in found}
    for place, index in _holding(plan, store, np.array(sorted(by_number), dtype=np.int64), ends):
        first = int(ends[place]) - len(index.samples)
        numbers = range(first, int(ends[place]))
        yield index, {number - first: by_number[number] for number in numbers if number in by_number}


def _rewrite(
    index: ShardIndex, removed: dict[int, Duplicate], samples: Mapping[int, Sample], store: Store
) -> None:
    with local_copy(store, index.tar) as path, path.open("rb") as file:
        # The commit mark goes first: killed in between, the shard is built again from its sources.
        store.remove(index_file(index.tar))
        writer = ShardWriter(store, index.tar, shard=index.shard, split=index.split, plan_id=index.plan_id)
        try:
            for refused in index.refused:
                writer.refuse(refused)
            for i, sample in enumerate(index.samples):
                if i in removed:
                    writer.refuse(_removed(sample, samples[removed[i].of], removed[i].kind))
                    continue
                row = {k: v for k, v in vars(sample).items() if k in SampleRow.__annotations__}
                writer.add_members(
                    mp4=_member(file, sample, "mp4", index.tar),
                    payload=_member(file, sample, "json", index.tar),
                    flow=_member(file, sample, "flow", index.tar),
                    picture_hashes=index.picture_hashes[i] if index.picture_hashes else (),
                    **cast(SampleRow, row),
                )
            writer.commit()
        except BaseException:
            writer.abandon()
            raise


def _removed(sample: Sample, of: Sample, kind: Kind) -> Refused:
    clip = int(sample.key.rsplit("-", maxsplit=1)[-1])
    reason = _describe(sample, of, kind)
    return Refused(video_id=sample.video_id, source=sample.source, clip=clip, stage=DUPLICATE, reason=reason)


def _member(file: BinaryIO, sample: Sample, kind: str, tar: str) -> bytes:
    facts = asdict(sample)
    file.seek(facts[f"{kind}_offset"])
    data = file.read(facts[f"{kind}_bytes"])
    if zlib.crc32(data) != facts[f"{kind}_crc32"]:
        raise BuildError(f"{tar}, {sample.key}.{kind}: crc32 differs; build again")
    return data
