"""``cliplift score``: scores of all clips of a dataset, shard by shard, as columns of its next generation.

A shard is one unit of work; its scores are a function of its tar alone, so any number of workers, parts of an array job
or interruptions gives the same bytes. The tars are read and never written.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches

import numpy as np
from numpy.typing import NDArray

from cliplift.configs.sections import ConfigError
from cliplift.sharding.build.pool import Job, VideoResult, WorkerPool
from cliplift.sharding.build.worker import decoding_settings
from cliplift.sharding.manifest import (
    Dataset,
    ShardFacts,
)
from cliplift.sharding.read.catalog import Catalog
from cliplift.sharding.read.embeddings import stored_catalog
from cliplift.sharding.read.generations import named_generation, open_dataset
from cliplift.sharding.scores.carried import stored_scores
from cliplift.sharding.scores.measures import SCORES
from cliplift.sharding.scores.stored import SCORE_NAMES, ColumnFacts
from cliplift.sharding.scoring.generation import is_whole, next_generation
from cliplift.sharding.scoring.likeness import CLUSTER, NEAR_DUPLICATE, Likeness
from cliplift.sharding.scoring.parts import read_part, write_part
from cliplift.sharding.storage import Store, join

MOST_REASONS = 5
ATTEMPTS = 3  # times a clip is scored whose worker died or was too slow


class ScoreError(ValueError):
    """The clips of a shard cannot be read, so that their scores are not known; the message says where."""


@dataclass
class ScoreProgress:
    """How far scoring is, for whoever watches it."""

    clips_done: int = 0
    clips_total: int = 0
    shards_done: int = 0
    shards_total: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class ScoreReport:
    """What a call of :func:`score_dataset` did.

    Attributes:
        dataset: the latest generation; the one there was where nothing was left to do, or a part alone was scored.
        scored: clips that were decoded.
        columns: the columns of the latest generation.
        reasons: of clips that do not decode, the first few.
        new: whether there is a new generation.
    """

    dataset: Dataset
    scored: int
    columns: tuple[ColumnFacts, ...] = ()
    reasons: tuple[str, ...] = field(default=())
    new: bool = False


@dataclass(frozen=True)
class _Unit:
    """A shard, the scores it lacks, and the rows of its clips in the catalog."""

    shard: ShardFacts
    names: tuple[str, ...]
    first: int
    stop: int

    @property
    def clips(self) -> int:
        return self.stop - self.first


def score_dataset(
    url: str,
    names: Sequence[str],
    *,
    workers: int = 0,
    part: tuple[int, int] | None = None,
    clip_timeout_seconds: float = 60.0,
    likeness: Likeness | None = None,
    on_progress: Callable[[ScoreProgress], None] | None = None,
) -> ScoreReport:
    """Score all clips of a dataset; what earlier calls computed is not computed again.

    Args:
        url: folder or URL of a finalized dataset, without a generation.
        names: scores, of ``measures.SCORES`` and those that are made without decoding.
        workers: processes; 0 is one per core.
        part: (I, N) scores the shards whose number is I modulo N, from 0, and makes no generation.
        clip_timeout_seconds: time a clip may take.
        likeness: how ``cluster`` and ``near_duplicate`` are made; None is the default way.
        on_progress: called after every clip.

    Raises:
        ConfigError: there is no such dataset or score.
        ManifestError: the dataset's files are damaged.
        ScoreError: a clip cannot be read, or its worker died.
    """
    names = _checked(names)
    store, base = scorable(url)
    with ExitStack() as held:
        catalog = held.enter_context(stored_catalog(store, base))
        kept = dict(held.enter_context(stored_scores(store, base)).facts) if base.scores_sha256 else {}
        likeness = likeness or Likeness()
        of = {name: likeness.of(store, base) for name in (CLUSTER, NEAR_DUPLICATE) if name in names}
        wanted = [name for name in names if not is_whole(kept.get(name), name, of.get(name, ""))]
        made = [name for name in wanted if name in SCORES]
        units = list(_units(store, base, catalog, made, part))
        reasons = _score(
            store,
            units,
            catalog,
            workers=workers,
            clip_timeout_seconds=clip_timeout_seconds,
            on_progress=on_progress,
        )
        scored = sum(unit.clips for unit in units)
        if part is not None or not wanted:
            return ScoreReport(base, scored, tuple(kept.values()), tuple(reasons))
        alike_names = [name for name in wanted if name in of]
        alike = likeness.columns(store, base, catalog, alike_names) if alike_names else {}
        dataset, columns = next_generation(store, base, catalog, wanted, made=alike)
    return ScoreReport(dataset, scored, columns, tuple(reasons), new=True)


def lacking_shards(url: str, names: Sequence[str]) -> dict[int, int]:
    """The shards that lack one of these scores, which decoding makes, and how many clips each has.

    Raises:
        ConfigError, ManifestError: as :func:`score_dataset` does.
    """
    names = _checked(names)
    store, base = scorable(url)
    with ExitStack() as held:
        catalog = held.enter_context(stored_catalog(store, base))
        kept = dict(held.enter_context(stored_scores(store, base)).facts) if base.scores_sha256 else {}
        made = [name for name in names if name in SCORES and not is_whole(kept.get(name), name, "")]
        return {unit.shard.shard: unit.clips for unit in _units(store, base, catalog, made, None)}


def scorable(url: str) -> tuple[Store, Dataset]:
    """A dataset's store and its latest generation, which gets columns in the next.

    Raises:
        ConfigError: there is none, the URL names a generation, or it has no catalog.
    """
    root, generation = named_generation(url)
    if generation is not None:
        hint = f"name {root}: the columns belong to the generation that comes next"
        raise ConfigError(
            "names a generation, and those that there are stay as they are", key="url", value=url, hint=hint
        )
    store, base = open_dataset(url)
    if not base.catalog_sha256:
        raise ConfigError(
            f"{url} has no catalog", key="url", value=url, hint=f"run `cliplift finalize {url}` first"
        )
    return store, base


def _checked(names: Sequence[str]) -> list[str]:
    if not names:
        raise ConfigError("names no score", file="command line", hint=f"there are {', '.join(SCORE_NAMES)}")
    for name in names:
        if name not in SCORE_NAMES:
            near = get_close_matches(name, SCORE_NAMES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SCORE_NAMES)}"
            raise ConfigError(f"there is no score {name!r}", file="command line", value=name, hint=hint)
    return list(dict.fromkeys(names))


def _units(
    store: Store, base: Dataset, catalog: Catalog, names: Sequence[str], part: tuple[int, int] | None
) -> Iterator[_Unit]:
    """The shards of this part that lack scores."""
    number, parts = part or (0, 1)
    for shard, stop in zip(base.shards, catalog.shard_ends.tolist(), strict=True):
        first = stop - shard.samples
        if not names or not shard.samples or shard.shard % parts != number:
            continue
        offsets = catalog.column_of("mp4_offset", first, stop).astype(np.int64)
        lacking = tuple(name for name in names if read_part(store, shard, name, offsets) is None)
        if lacking:
            yield _Unit(shard, lacking, first, stop)


def _jobs(store: Store, units: Sequence[_Unit], catalog: Catalog) -> Iterator[Job[tuple[_Unit, int]]]:
    for unit in units:
        for row in range(unit.first, unit.stop):
            offset, size, crc32 = map(int, catalog.values(row, "mp4_offset", "mp4_bytes", "mp4_crc32"))
            task = {
                "score": unit.names,
                "url": join(store.url, unit.shard.file),
                "offset": offset,
                "bytes": size,
            }
            yield Job(message={**task, "crc32": crc32}, context=(unit, row - unit.first))


def _score(
    store: Store,
    units: Sequence[_Unit],
    catalog: Catalog,
    *,
    workers: int,
    clip_timeout_seconds: float,
    on_progress: Callable[[ScoreProgress], None] | None,
) -> list[str]:
    """Score the clips of some shards and store each shard's when its last clip is done; why clips did not decode."""
    if not units:
        return []
    progress = ScoreProgress(clips_total=sum(u.clips for u in units), shards_total=len(units))
    started = time.monotonic()
    count = min(workers or len(os.sched_getaffinity(0)), progress.clips_total)
    reasons: list[str] = []
    with WorkerPool[tuple[_Unit, int]](
        workers=count,
        settings=decoding_settings(),
        clip_timeout_seconds=clip_timeout_seconds,
        attempts=ATTEMPTS,
    ) as pool:
        values: dict[str, NDArray[np.float32]] = {}
        for job, result in pool.run(_jobs(store, units, catalog)):
            unit, row = job.context
            if not row:
                values = {name: np.full(unit.clips, np.nan, dtype=np.float32) for name in unit.names}
            if result.refused:
                reasons += _why(unit, job.message, result)[: MOST_REASONS - len(reasons)]
            else:
                for name, value in result.clips[0][0]["scores"].items():
                    values[name][row] = value
            progress.clips_done += 1
            if row + 1 == unit.clips:  # results come in order, so that the last clip ends its shard
                offsets = catalog.column_of("mp4_offset", unit.first, unit.stop).astype(np.int64)
                for name in unit.names:
                    write_part(store, unit.shard, name, offsets, values[name])
                progress.shards_done += 1
            progress.seconds = time.monotonic() - started
            if on_progress is not None:
                on_progress(progress)
    return reasons


def _why(unit: _Unit, task: Mapping[str, object], result: VideoResult) -> list[str]:
    """Why a clip has no scores. Raises ScoreError where it may have some when it is tried again."""
    _, stage, reason = result.refused[0]
    where = f"{unit.shard.file}, byte {task['offset']}: {reason}"
    if stage == "decode":
        return [where]
    hint = "the shards that are done are kept; repair the cause and call it again, or `cliplift remove` the video"
    raise ScoreError(f"{where}; {hint}")
