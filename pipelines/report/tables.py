"""Result tables of a report: one line per run, and one with mean and spread for the runs of one kind."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cliplift.pipelines.runs.records import TRANSFER, RunGroup, RunRecord
from cliplift.pipelines.runs.results import percent


def duration(seconds: float) -> str:
    """4.2 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _decimal(value: float) -> str:
    return f"{value:.3f}"


def _count(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


@dataclass(frozen=True)
class Column:
    """A metric shown in a result table."""

    metric: str
    title: str
    text: Callable[[float], str] = percent
    averaged: bool = True  # whether a mean over runs says anything


CLASSIFICATION = (
    Column("accuracy", "Accuracy"),
    Column("mean_class_accuracy", "Class mean"),
    Column("top5_accuracy", "Top-5"),
    Column("mean_average_precision", "mAP"),
    Column("global_average_precision", "GAP"),
    Column("calibration_error", "Calibration error"),
    Column("val_accuracy", "Validation accuracy"),
    Column("chance", "Chance", averaged=False),
    Column("samples", "Clips", _count, averaged=False),
)
MATCHING = (
    Column("matching_accuracy", "Matching accuracy"),
    Column("matching_prior", "Prior", averaged=False),
    Column("auc", "AUC", _decimal),
    Column("recall_at_1", "R@1"),
    Column("recall_at_5", "R@5"),
    Column("held_out_clips", "Clips", _count, averaged=False),
)


@dataclass(frozen=True)
class Cell:
    """A number of a table; empty text where there is none."""

    text: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a result table: a run, or the mean of a group of runs."""

    label: str
    colour: int
    model: str
    seed: str
    cells: tuple[Cell, ...]
    time: str
    mean_of: int = 0  # runs averaged; 0 for a run's own line
    member: bool = False  # a run below its group's mean


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


def result_tables(groups: Sequence[RunGroup]) -> list[Table]:
    """Classification and matching results; columns that no run has are left out, missing numbers stay empty."""
    matching = [g for g in groups if g.stage == TRANSFER]
    others = [g for g in groups if g.stage != TRANSFER]
    tables = []
    for title, members, columns in (
        ("Classification", others, CLASSIFICATION),
        ("Supervision transfer", matching, MATCHING),
    ):
        used = tuple(c for c in columns if any(g.values(c.metric) for g in members))
        rows = tuple(row for group in members for row in _rows(group, used))
        if rows:
            tables.append(Table(title, used, rows))
    return tables


def _rows(group: RunGroup, columns: Sequence[Column]) -> list[Row]:
    several = len(group.runs) > 1
    rows = [
        Row(
            label=run.name if several else group.label,
            colour=group.colour,
            model=str(run.setting("model.name") or ""),
            seed="" if run.setting("seed") is None else str(run.setting("seed")),
            cells=tuple(_cell(run, c) for c in columns),
            time="unfinished"
            if run.result is None
            else duration(run.seconds)
            if run.seconds is not None
            else "",
            member=several,
        )
        for run in group.runs
    ]
    if not several:
        return rows
    mean = Row(
        label=group.label,
        colour=group.colour,
        model=rows[0].model,
        seed="",
        cells=tuple(_mean_cell(group, c) for c in columns),
        time="",
        mean_of=len(group.runs),
    )
    return [mean, *rows]


def _cell(run: RunRecord, column: Column) -> Cell:
    value = run.metrics.get(column.metric)
    if value is None:
        return Cell()
    spread = run.metrics.get(f"{column.metric}_sd")  # of a folder that sums up runs
    if spread is not None and column.averaged:
        return Cell(column.text(value), _plus_minus(column, spread))
    low, high = (run.metrics.get(f"{column.metric}_{end}") for end in ("low", "high"))
    interval = f"{100 * low:.1f}–{100 * high:.1f}" if low is not None and high is not None else ""
    return Cell(column.text(value), interval)


def _mean_cell(group: RunGroup, column: Column) -> Cell:
    values = group.values(column.metric)
    if len(values) < len(group.runs):  # a mean of some of the runs would pass for the mean of all
        return Cell()
    if not column.averaged:
        return Cell(column.text(values[0])) if len(set(values)) == 1 else Cell()
    return Cell(column.text(statistics.fmean(values)), _plus_minus(column, statistics.stdev(values)))


def _plus_minus(column: Column, spread: float) -> str:
    return f"± {_decimal(spread) if column.text is _decimal else f'{100 * spread:.1f}'}"
