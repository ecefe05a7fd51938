"""W&B of a scored dataset: how each column is spread, and clips with their values, in the build's own run."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cliplift.sharding.build.tracking import quiet_settings, wandb_mode, wandb_project
from cliplift.sharding.manifest import Dataset, canonical
from cliplift.sharding.read.reader import ShardDataset
from cliplift.sharding.scores.carried import stored_scores
from cliplift.sharding.scoring.histogram import QUANTILES, Histogram, histogram
from cliplift.sharding.scoring.sheet import spread_over
from cliplift.sharding.storage import Store, without_secrets

if TYPE_CHECKING:
    import wandb

ID_FILE = "wandb.json"
MOST_CLIPS = 200  # of the table, evenly spread over each column
SCORE_COLUMNS = ("score", "version", "clips", "unscored", "failed", *QUANTILES)
CLIP_COLUMNS = ("key", "split", "class")


def track_scores(store: Store, dataset: Dataset, *, asked: str = "auto") -> bool:
    """Log the columns of a generation.

    Args:
        store: where the dataset is.
        dataset: the generation, which has scores.
        asked: ``auto`` logs where the build was logged, as that was; ``online``, ``offline`` and ``disabled`` say it.

    Returns:
        Whether something was logged.

    Raises:
        ManifestError: the dataset's files are damaged.
    """
    tracked = store.size(ID_FILE) is not None
    mode = wandb_mode(asked, os.environ)
    if mode == "disabled" or (asked == "auto" and not tracked):
        return False
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    local = store.local_path("")
    folder = "." if local is None else str(local)
    Path(folder).mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        id=_run_id(store), resume="allow", mode=mode, dir=folder, project=wandb_project(None, os.environ),
        name=dataset.name, group=os.environ.get("WANDB_RUN_GROUP") or dataset.name, job_type="shard",
        settings=quiet_settings(),
    )  # fmt: skip
    try:
        log_scores(run, store, dataset)
    finally:
        run.finish()
    return True


def log_scores(run: wandb.Run, store: Store, dataset: Dataset) -> None:
    """The tables ``scores`` and ``scored_clips``, and a histogram of each column, into a W&B run."""
    import wandb

    with stored_scores(store, dataset) as columns:
        spread = {name: histogram(name, columns.column(name)) for name in columns.facts}
        rows = [
            [name, facts.version, spread[name].clips, facts.unscored, facts.failed, *_quantiles(spread[name])]
            for name, facts in columns.facts.items()
        ]
        logged: dict[str, object] = {"scores": wandb.Table(columns=list(SCORE_COLUMNS), data=rows)}
        for name, found in spread.items():
            if found.counts:
                np_histogram = (np.array(found.counts), np.array(found.edges))
                logged[f"scores/{name}"] = wandb.Histogram(np_histogram=np_histogram)
        share = max(1, MOST_CLIPS // len(columns.facts))
        shown = np.unique(
            np.concatenate([spread_over(columns.column(name), share) for name in columns.facts])
        )
        values = {name: columns.column(name)[shown].astype(float) for name in columns.facts}
    # All samples of the generation, so that sample and row are one; what was removed since is none of its clips.
    clips = ShardDataset(f"{store.url}@{dataset.generation}", keep_numbers=True)
    table = [
        [
            *_facts(clips, int(row)),
            *(None if np.isnan(values[name][at]) else float(values[name][at]) for name in values),
        ]
        for at, row in enumerate(shown.tolist())
    ]
    logged["scored_clips"] = wandb.Table(columns=[*CLIP_COLUMNS, *values], data=table)
    run.log(logged)
    run.summary.update(
        {
            "generation": dataset.generation,
            "fingerprint": dataset.fingerprint,
            "url": without_secrets(store.url),
        }
    )


def _quantiles(found: Histogram) -> list[float | None]:
    return [found.quantiles.get(name) for name in QUANTILES]


def _facts(clips: ShardDataset, i: int) -> list[str]:
    facts = clips.facts(i)
    names = (
        [clips.classes[label] for label in facts.labels]
        if facts.label is None
        else [clips.classes[facts.label]]
    )
    return [facts.key, facts.split, ", ".join(names)]


def _run_id(store: Store) -> str:
    """The id of the build's run; a new one, kept beside the shards, where it has none."""
    try:
        return str(json.loads(store.read(ID_FILE))["id"])
    except FileNotFoundError:
        run_id = secrets.token_hex(4)
        store.write(ID_FILE, canonical({"id": run_id}) + b"\n")
        return run_id
