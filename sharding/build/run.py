"""``plan -> build -> finalize -> verify``: raw videos to a shard dataset, resumable at any point.

One shard is one unit of work and a pure function of the plan, so any number of workers, parts or interruptions
gives the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun
from cliplift.sharding.build.dedupe import DuplicateCounts, settle_duplicates
from cliplift.sharding.build.finalize import add_shards, finalize
from cliplift.sharding.build.plan import Plan, PlannedShard, plan_addition, plan_once
from cliplift.sharding.build.ray_engine import build_on_ray
from cliplift.sharding.build.unit import BuiltShard, Progress, build_shards, local_workers
from cliplift.sharding.build.verify import VerifyReport, verify
from cliplift.sharding.manifest import (
    BUILD_FILE,
    DUPLICATE,
    DUPLICATES_FILE,
    RETRIED_STAGES,
    Dataset,
    ManifestError,
    ShardIndex,
    canonical,
    generation_file,
    index_file,
    load_index,
)
from cliplift.sharding.read.generations import read_dataset, read_removed, refuse_generations
from cliplift.sharding.redirects import allow_private_redirects
from cliplift.sharding.storage import Store, file_sha256, open_store
from cliplift.sharding.video.cuts import require_cutter
from cliplift.sharding.video.encode import require_encoder
from cliplift.sharding.video.flow import require_flow

Phase = Literal["plan", "build", "finalize", "verify"]
PHASES: tuple[Phase, ...] = ("plan", "build", "finalize", "verify")


@dataclass(frozen=True)
class BuildReport:
    """What a call of :func:`run_shard` did."""

    url: str
    plan_id: str
    shards_total: int
    shards_built: int
    shards_kept: int
    clips_written: int
    bytes_written: int
    refused: dict[str, int]
    missing: int
    seconds: float
    copied: int = 0
    not_copied: dict[str, int] = field(default_factory=dict)
    duplicates: DuplicateCounts | None = None
    dataset: Dataset | None = None
    verified: VerifyReport | None = None


def run_shard(
    run: ShardRun,
    *,
    phases: Sequence[Phase] = PHASES,
    part: tuple[int, int] | None = None,
    retry_failed: bool = False,
    add: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> BuildReport:
    """Run phases of a build; each continues what earlier calls left.

    Args:
        run: the validated config.
        phases: which of plan, build, finalize and verify to run, in that order.
        part: (I, N) builds the shards whose number is I modulo N, I from 0; nothing is finalized until all are there,
            and duplicates are only removed by a call without a part, so that no two processes rewrite a shard.
        retry_failed: build again the shards that hold clips refused for reading, time or a crash.
        add: add the videos that are new to a finished dataset, as its next generation; its shards stay as they are.
        on_progress: called after every video.

    Raises:
        ConfigError: the config cannot be used with this source or this output.
        BuildError: shards are missing, or more clips were refused than allowed.
    """
    started = time.monotonic()
    store = _open_output(run)
    plan, base = _planned(run, store, add=add, phases=phases)
    phases = phases if plan.shards else [phase for phase in phases if phase == "verify"]  # nothing is new
    progress, built, kept = Progress(shards_total=len(plan.shards)), list[BuiltShard](), 0
    if "build" in phases:
        mine = _my_part(plan, part)
        todo = _unfinished(plan, mine, store, retry_failed=retry_failed)
        kept = len(mine) - len(todo)
        progress.shards_total, progress.shards_done = len(mine), kept
        built = _run_units(run, plan, todo, store, progress=progress, on_progress=on_progress)
    dataset = duplicates = None
    whole = part is None or (run.duplicates == "report" and _all_built(plan, store))
    if "finalize" in phases and whole:
        duplicates, dataset = _finalize(run, plan, store, base)
    report = BuildReport(
        url=run.output,
        plan_id=plan.plan_id,
        shards_total=len(plan.shards),
        shards_built=len(built),
        shards_kept=kept,
        clips_written=sum(shard.clips for shard in built),
        bytes_written=sum(shard.tar_bytes for shard in built),
        refused=dict(dataset.refused) if dataset else dict(progress.refused),
        missing=plan.missing,
        seconds=round(time.monotonic() - started, 3),
        copied=progress.copied,
        not_copied=dict(sorted(progress.not_copied.items())),
        duplicates=duplicates,
        dataset=dataset,
    )
    if "verify" in phases and whole:  # after the clock has stopped: the recorded seconds are the build's
        report = replace(report, verified=_verified(run))
    if dataset is not None:
        _write_build_record(report, store)
    return report


def _verified(run: ShardRun) -> VerifyReport:
    return verify(run.output, decode=run.verify_decode, workers=local_workers(run))


def _finalize(
    run: ShardRun, plan: Plan, store: Store, base: Dataset | None
) -> tuple[DuplicateCounts, Dataset]:
    share = run.limits.max_refused_share
    if base is None:
        duplicates = settle_duplicates(plan, store, run.duplicates)
        return duplicates, finalize(plan, store, max_refused_share=share)
    listing = generation_file(base.generation + 1, DUPLICATES_FILE)
    duplicates = settle_duplicates(plan, store, run.duplicates, listing=listing)
    return duplicates, add_shards(plan, store, base, max_refused_share=share)


def _planned(
    run: ShardRun, store: Store, *, add: bool, phases: Sequence[Phase]
) -> tuple[Plan, Dataset | None]:
    """The plan, and the dataset that its videos are added to; None builds one.

    Raises:
        ConfigError: there is nothing to add to, or a dataset whose shards must stay.
    """
    if add:
        base = read_dataset(store)
        return plan_addition(run, base, read_removed(store, base), store), base
    if set(phases) != {"verify"}:
        refuse_generations(store, hint="--add adds the videos that are new; --phase verify checks it")
    return plan_once(run, store), None


def _open_output(run: ShardRun) -> Store:
    if run.limits.private_redirects:
        allow_private_redirects()
    return open_store(run.output)


def _all_built(plan: Plan, store: Store) -> bool:
    return {index_file(s.tar) for s in plan.shards} <= set(store.list())


def _run_units(
    run: ShardRun,
    plan: Plan,
    shards: Sequence[PlannedShard],
    store: Store,
    *,
    progress: Progress,
    on_progress: Callable[[Progress], None] | None,
) -> list[BuiltShard]:
    require_cutter(run.cut)
    require_encoder(run.transcode)
    if run.flow is not None:
        require_flow(run.flow)
    progress.videos_total = sum(s.stop - s.start for s in shards)
    if run.engine == "ray":
        return build_on_ray(run, plan, shards, progress=progress, on_progress=on_progress)
    return build_shards(
        run, plan, shards, store, workers=local_workers(run), progress=progress, on_progress=on_progress
    )


def _my_part(plan: Plan, part: tuple[int, int] | None) -> list[PlannedShard]:
    if part is None:
        return list(plan.shards)
    number, parts = part
    if not 0 <= number < parts:
        raise ConfigError(
            f"part {number} of {parts} does not exist", key="part", value=part, hint="count from 0"
        )
    return [shard for shard in plan.shards if shard.shard % parts == number]


def _unfinished(
    plan: Plan, shards: Sequence[PlannedShard], store: Store, *, retry_failed: bool
) -> list[PlannedShard]:
    """The shards that are not already there and whole."""
    todo = []
    present = set(store.list())
    for shard in shards:
        if index_file(shard.tar) not in present:
            todo.append(shard)
            continue
        index = _committed(plan, shard, store)
        # A clip that arrives now may change which of its duplicates is the one that stays.
        failed = index is not None and any(r.stage in (*RETRIED_STAGES, DUPLICATE) for r in index.refused)
        if index is None or (retry_failed and failed):
            # The commit mark goes first: it must never lie beside a tar it does not describe.
            store.remove(index_file(shard.tar))
            todo.append(shard)
    return todo


def _committed(plan: Plan, shard: PlannedShard, store: Store) -> ShardIndex | None:
    """The shard's index if the shard stands whole and belongs to this plan. Local tars are hashed again."""
    name = index_file(shard.tar)
    try:
        index = load_index(store.read(name), file=name)
    except (FileNotFoundError, ManifestError):
        return None
    if index.plan_id != plan.plan_id or index.tar != shard.tar or store.size(shard.tar) != index.tar_bytes:
        return None
    path = store.local_path(shard.tar)
    return index if path is None or file_sha256(path) == index.tar_sha256 else None


def _write_build_record(report: BuildReport, store: Store) -> None:
    record = {
        "plan_id": report.plan_id,
        "shards_built": report.shards_built,
        "shards_kept": report.shards_kept,
        "clips_written": report.clips_written,
        "bytes_written": report.bytes_written,
        "refused": report.refused,
        "missing": report.missing,
        "copied": report.copied,
        "not_copied": report.not_copied,
        "duplicates": asdict(report.duplicates) if report.duplicates else None,
        "seconds": report.seconds,
        "clips_per_second": round(report.clips_written / report.seconds, 3) if report.seconds else 0.0,
        "verified": report.verified.ok if report.verified else None,
    }
    store.write(BUILD_FILE, canonical(record) + b"\n")
