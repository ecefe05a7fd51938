"""Some of the videos looked at, each in a process of its own: sizes, rates, lengths, and which of them are alike."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cliplift.launch.start.videos import FoundVideos
from cliplift.sharding.build.pool import Job, WorkerPool
from cliplift.sharding.build.worker import decoding_settings, glance_task
from cliplift.sharding.manifest import SourceVideo
from cliplift.sharding.video.glance import Glance
from cliplift.sharding.video.picture_hash import near_duplicates

SECONDS_A_VIDEO = 20.0
MEMORY_MIB = 4096
HASHED_BYTES = 4 << 30  # read to tell whether files of one size are the same


@dataclass(frozen=True)
class Looks:
    """What was seen.

    ``seen`` holds (number of the video, what was seen), ``unreadable`` (number, reason); ``same`` pairs of numbers of
    files with the same bytes, ``alike`` pairs of different files that look alike. ``stopped``: the time was up.
    """

    seen: tuple[tuple[int, Glance], ...]
    unreadable: tuple[tuple[int, str], ...]
    same: tuple[tuple[int, int], ...]
    alike: tuple[tuple[int, int], ...]
    asked: int
    stopped: bool
    all_hashed: bool

    def median(self, key: str, default: float) -> float:
        """The median of ``seconds``, ``fps`` or ``brightness`` where it is known."""
        values = [
            float(value) for _, g in self.seen if isinstance(value := g.get(key), (int, float)) and value
        ]
        return statistics.median(values) if values else default

    @property
    def short_side(self) -> int:
        """The median short side, pixels."""
        return int(statistics.median([min(g["width"], g["height"]) for _, g in self.seen] or [0]))

    @property
    def fewest_frames(self) -> int:
        """Frames of a short video: nine of ten have more. 0 where lengths are not known."""
        counts = sorted(g["seconds"] * g["fps"] for _, g in self.seen if g["seconds"] and g["fps"])
        return int(counts[len(counts) // 10]) if counts else 0

    @property
    def longest_seconds(self) -> float:
        """The longest stated length."""
        return max((g["seconds"] for _, g in self.seen), default=0.0)


def look_at(
    found: FoundVideos,
    *,
    most: int,
    seconds: float,
    workers: int,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> Looks:
    """Look at some videos of every class, in bounded time.

    Args:
        found: the videos.
        most: looked at, as many of each class; 0 is all.
        seconds: after which no further ones are looked at.
        workers: processes.
        on_progress: called after each with how many are done, and of how many.
    """
    chosen = choose(found.videos, most)
    seen: list[tuple[int, Glance]] = []
    unreadable: list[tuple[int, str]] = []
    until = time.monotonic() + seconds
    stopped = False
    jobs = (Job(glance_task(found.url(found.videos[number])), number) for number in chosen)
    with WorkerPool[int](
        workers=max(1, min(workers, len(chosen))),
        settings=decoding_settings(memory_mib=MEMORY_MIB),
        clip_timeout_seconds=SECONDS_A_VIDEO,
        attempts=1,
    ) as pool:
        for job, result in pool.run(jobs):
            if result.refused:
                unreadable.append((job.context, result.refused[0][2]))
            else:
                seen.append((job.context, result.clips[0][0]["glance"]))
            on_progress(len(seen) + len(unreadable), len(chosen))
            if time.monotonic() > until:
                stopped = len(seen) + len(unreadable) < len(chosen)
                break
    same, all_hashed = same_files(found)
    return Looks(
        seen=tuple(seen),
        unreadable=tuple(unreadable),
        same=same,
        alike=_alike(seen, set(same)),
        asked=len(chosen),
        stopped=stopped,
        all_hashed=all_hashed,
    )


def choose(videos: Sequence[SourceVideo], most: int) -> list[int]:
    """Numbers of videos to look at, of all classes in turn, each class in the order of a hash of its paths."""
    of_class: dict[int, list[int]] = defaultdict(list)
    order = sorted(range(len(videos)), key=lambda n: hashlib.sha256(videos[n].source.encode()).digest())
    for number in order:
        of_class[videos[number].label].append(number)
    turns = [
        members[turn]
        for turn in range(max(map(len, of_class.values()), default=0))
        for members in of_class.values()
        if turn < len(members)
    ]
    return turns[:most] if most else turns


def _alike(seen: Sequence[tuple[int, Glance]], same: set[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Pairs of videos whose four pictures are alike, and whose bytes are not the same."""
    looks = [g["picture_hashes"] for _, g in seen]
    pairs = ((seen[a][0], seen[b][0]) for a, b in near_duplicates(looks))
    ordered = sorted((min(pair), max(pair)) for pair in pairs)
    return tuple(pair for pair in ordered if pair not in same)


def same_files(found: FoundVideos) -> tuple[tuple[tuple[int, int], ...], bool]:
    """Pairs of local files with the same bytes, each with the first of its kind; and whether all were compared."""
    by_size: dict[int, list[int]] = defaultdict(list)
    paths: dict[int, Path] = {}
    for number, video in enumerate(found.videos):
        path = Path(found.url(video))
        if path.is_file():
            paths[number] = path
            by_size[path.stat().st_size].append(number)
    left = HASHED_BYTES
    pairs: list[tuple[int, int]] = []
    whole = True
    for size, numbers in sorted(by_size.items()):
        if len(numbers) < 2:
            continue
        if left < size * len(numbers):
            whole = False
            continue
        left -= size * len(numbers)
        pairs += _same_bytes(numbers, paths)
    return tuple(sorted(pairs)), whole


def _same_bytes(numbers: Sequence[int], paths: dict[int, Path]) -> Iterator[tuple[int, int]]:
    first: dict[bytes, int] = {}
    for number in numbers:
        with paths[number].open("rb") as file:
            key = hashlib.file_digest(file, "sha256").digest()
        if key in first:
            yield first[key], number
        else:
            first[key] = number


def told(values: Sequence[str]) -> str:
    """Different values with how often each is there, the most frequent first, three at most."""
    counts = Counter(values).most_common()
    shown = ", ".join(f"{value} ({count})" for value, count in counts[:3])
    return f"{shown} and {len(counts) - 3} more kinds" if len(counts) > 3 else shown
