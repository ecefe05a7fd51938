"""What a run writes about its data when it starts: test clips that were looked for in it, and what a filter leaves."""

from __future__ import annotations

from cliplift.configs.data import DataConfig
from cliplift.configs.training import TrainingRun
from cliplift.pipelines.runs.folder import Record, RunFolder
from cliplift.pipelines.runs.leaks import LEAK_CHECKS, leak_record, lines_at_start
from cliplift.sharding.scoring.census import census
from cliplift.sharding.storage import without_secrets

FILTERED = "filtered"  # key of run.json


def record_data(run: TrainingRun, folder: RunFolder) -> list[str]:
    """Write what is known of a run's datasets to run.json, and return the lines to say.

    A run that goes on keeps what was known when it began, for that is what it was trained on.
    """
    before = (folder.start_record() or {}).get(LEAK_CHECKS) if run.checkpoint.resume == "auto" else None
    known = before if isinstance(before, list) else leak_record(run.data.urls)
    left = filter_record(run.data)
    folder.add_to_record(**{LEAK_CHECKS: known, FILTERED: left})
    return [*lines_at_start(known), *(_line(run.data, row) for row in left)]


def filter_record(data: DataConfig) -> list[Record]:
    """What ``data.where`` leaves of the training split of each dataset, by class: clips that are left, and all.

    A dataset named twice is counted once. Empty without a filter.
    """
    if data.where is None:
        return []
    return [
        {
            "dataset": without_secrets(url),
            "split": split.split,
            "left": split.left,
            "clips": split.clips,
            "classes": {name: list(counts) for name, counts in split.classes.items()},
        }
        for url in dict.fromkeys(data.urls)
        for split in census(url, data.where, fold=data.fold)
        if split.split == data.split
    ]


def _line(data: DataConfig, row: Record) -> str:
    return f"{row['dataset']}: {data.where!r} leaves {row['left']} of {row['clips']} clips of {row['split']}"
