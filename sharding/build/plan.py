"""The plan of a build: which video goes into which shard. Made once, from source and config alone, then immutable."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun
from cliplift.sharding.manifest import (
    LEFT_OUT_FILE,
    MISSING_FILE,
    PLAN_FILE,
    PLAN_FORMAT,
    PLAN_VIDEOS_FILE,
    ManifestError,
    SourceVideo,
    canonical,
    digest,
    rows_from_parquet,
    rows_to_parquet,
    shard_file,
)
from cliplift.sharding.sources.files import warn_left_out
from cliplift.sharding.sources.read import listing_digest, read_source
from cliplift.sharding.storage import Store


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

    plan_id: str
    name: str
    root: str
    classes: tuple[str, ...]
    folds: int
    missing: int
    settings: Mapping[str, object]
    shards: tuple[PlannedShard, ...]
    videos: tuple[SourceVideo, ...]


def settings_of(run: ShardRun) -> dict[str, object]:
    """The part of a run that decides the bytes of the shards."""
    settings = run.model_dump(
        mode="json", include={"name", "source", "splits", "cut", "transcode", "flow", "shards", "duplicates"}
    )
    if settings["flow"] is None:  # a plan without flow is the plan it was before there was any
        del settings["flow"]
    return settings


def make_plan(run: ShardRun, *, store: Store | None = None) -> tuple[Plan, tuple[SourceVideo, ...]]:
    """Plan a build; also the listed videos that do not exist. What the source leaves out is logged.

    Args:
        run: the validated config.
        store: where to write the list of what the source leaves out; None only logs it.

    Raises:
        ConfigError: no video, or more are missing than ``limits.max_missing_share`` allows.
    """
    listing = read_source(run)
    warn_left_out(listing.root, listing.left_out, file=f"{run.output}/{LEFT_OUT_FILE}" if store else "")
    if store is not None and listing.left_out:
        lines = [canonical(dataclasses.asdict(item)) + b"\n" for item in listing.left_out]
        store.write(LEFT_OUT_FILE, b"".join(lines))
    listed = len(listing.videos) + len(listing.missing)
    share = len(listing.missing) / listed
    if share > run.limits.max_missing_share:
        raise ConfigError(
            f"{len(listing.missing)} of {listed} listed videos do not exist, e.g. {listing.missing[0].source!r}",
            key="limits.max_missing_share",
            value=run.limits.max_missing_share,
            hint=f"fix the source's folder, or allow {share:.2f}",
        )
    # Shuffled by hash, so that every shard is a fair draw of its split and nothing depends on the listing's order.
    order = sorted(
        listing.videos, key=lambda v: (v.split, _deal(v, run.shards.seed), v.source, v.start_seconds or 0.0)
    )
    shards: list[PlannedShard] = []
    start = 0
    while start < len(order):
        split = order[start].split
        stop = start
        while stop < len(order) and order[stop].split == split and stop - start < run.shards.videos_per_shard:
            stop += 1
        tar = shard_file(run.name, split, len(shards))
        shards.append(PlannedShard(shard=len(shards), split=split, tar=tar, start=start, stop=stop))
        start = stop
    settings = settings_of(run)
    plan = Plan(
        plan_id=digest(canonical([settings, listing.classes, listing.folds, listing_digest(order)])),
        name=run.name,
        root=listing.root,
        classes=listing.classes,
        folds=listing.folds,
        missing=len(listing.missing),
        settings=settings,
        shards=tuple(shards),
        videos=tuple(order),
    )
    return plan, listing.missing


def _deal(video: SourceVideo, seed: int) -> str:
    return digest(f"{seed}:{video.source}:{video.start_seconds}".encode())


def save_plan(plan: Plan, missing: tuple[SourceVideo, ...], store: Store) -> None:
    """Write the plan; ``plan.json`` last, as it says that the rest is there."""
    store.write(PLAN_VIDEOS_FILE, rows_to_parquet(plan.videos, SourceVideo))
    lines = [
        canonical({"video_id": v.video_id, "source": v.source, "split": v.split}) + b"\n" for v in missing
    ]
    store.write(MISSING_FILE, b"".join(lines))
    head = {
        f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name not in ("videos", "shards")
    }
    head |= {"format": PLAN_FORMAT, "shards": [dataclasses.asdict(s) for s in plan.shards]}
    store.write(PLAN_FILE, (json.dumps(head, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode())


def load_plan(store: Store) -> Plan | None:
    """The plan written before, or None.

    Raises:
        ManifestError: the plan is damaged or of another format.
    """
    try:
        text = store.read(PLAN_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        head = json.loads(text)
    except ValueError as error:
        raise ManifestError(f"{PLAN_FILE}: not whole JSON: {error}") from error
    if head.pop("format", None) != PLAN_FORMAT:
        raise ManifestError(f"{PLAN_FILE}: not a plan of this version")
    shards = tuple(PlannedShard(**s) for s in head.pop("shards"))
    videos = tuple(rows_from_parquet(store.read(PLAN_VIDEOS_FILE), SourceVideo, file=PLAN_VIDEOS_FILE))
    return Plan(**head | {"classes": tuple(head["classes"])}, shards=shards, videos=videos)


def plan_once(run: ShardRun, store: Store) -> Plan:
    """The run's plan: the one already written if it was made with the same settings, else a new one.

    Raises:
        ConfigError: the output holds a plan made with other settings.
    """
    found = load_plan(store)
    if found is None:
        plan, missing = make_plan(run, store=store)
        save_plan(plan, missing, store)
        return plan
    # Read through today's schema: a setting that came later has its default in an older plan.
    then = ShardRun.model_validate({"output": run.output, **found.settings})
    key, before, now = _first_difference(settings_of(then), settings_of(run), "")
    if key:
        raise ConfigError(
            f"{now!r} here, but the shards in {run.output} were planned with {before!r}",
            key=key,
            value=now,
            hint="choose another output, or remove that folder",
        )
    return found


def _first_difference(before: object, now: object, key: str) -> tuple[str, object, object]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in sorted({*before, *now}):
            path = f"{key}.{name}" if key else name
            found = _first_difference(before.get(name), now.get(name), path)
            if found[0]:
                return found
        return "", None, None
    return (key, before, now) if before != now else ("", None, None)
