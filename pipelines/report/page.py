"""``cliplift report``: one self-contained HTML page about one or several runs.

The page needs no network and runs no script: charts are inline SVG, clips are data URLs, and its content security
policy forbids everything else. All text from runs (class names, paths, configs) is escaped.
"""

from __future__ import annotations

import json
import shlex
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import NotRequired, TypedDict

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from cliplift.configs.runs import ReportRun
from cliplift.configs.sections import ConfigError
from cliplift.pipelines.evaluation.clip_tables import OpenShards, open_shard_dataset
from cliplift.pipelines.report.campaign import campaign_of
from cliplift.pipelines.report.charts import value_strip
from cliplift.pipelines.report.clips import EmbeddedClips, SampleClips, sample_clips
from cliplift.pipelines.report.confidence import confidence
from cliplift.pipelines.report.data import filters, leaks
from cliplift.pipelines.report.hardest import hardest_clips
from cliplift.pipelines.report.retrieval import retrieval_pages
from cliplift.pipelines.report.sections import (
    Confusions,
    confusions,
    curves,
    embedding,
    lineage,
)
from cliplift.pipelines.report.sweep import SweepPage, sweep_page
from cliplift.pipelines.report.tables import duration, result_tables
from cliplift.pipelines.runs.folder import RUN, write_text
from cliplift.pipelines.runs.records import RunGroup, RunRecord, group_runs, read_run, runs_inside
from cliplift.pipelines.runs.results import percent

DEMO = "demo.json"


class DemoRow(TypedDict):
    """One method of the demo: its test accuracy over the seeds, and the folders of its runs.

    What is known without a run, such as chance, has a mean alone.
    """

    method: str
    mean: NotRequired[float | None]
    sd: NotRequired[float | None]
    values: NotRequired[list[float]]
    runs: NotRequired[list[str]]


class DemoFacts(TypedDict):
    """What the demo has measured, as its demo.json holds it."""

    table: list[DemoRow]
    transfer: NotRequired[dict[str, float]]
    seconds: NotRequired[dict[str, float]]
    cpu_seconds: NotRequired[float]


_ENVIRONMENT = {
    "cliplift_version": "cliplift",
    "torch_version": "torch",
    "deepspeed_version": "deepspeed",
    "python": "Python",
    "git_commit": "git commit",
    "world_size": "processes",
}


def run_report(run: ReportRun) -> Path:
    """The report a config asks for. Returns the path of the HTML file.

    Raises:
        ConfigError: a folder holds no run, a file of a run is damaged, or the output cannot be written.
    """
    folders: list[Path] = []
    sweeps: list[SweepPage] = []
    demo: DemoFacts | None = None
    for name in run.runs:
        sweep = sweep_page(Path(name))
        if sweep is None:
            found, table = find_runs(Path(name))
        else:  # of hundreds of trials the best are shown as runs
            found, table = [one for each in sweep.folders for one in runs_inside(each)], None
            sweeps.append(sweep)
        folders += [folder for folder in found if folder not in folders]
        demo = demo or table
    return write_report(
        runs=folders,
        output=Path(run.output),
        title=run.title,
        max_clips=run.max_clips,
        demo=demo,
        sweeps=sweeps,
    )


def find_runs(folder: Path) -> tuple[list[Path], DemoFacts | None]:
    """The run folders meant by a folder: itself, or the runs inside it, with the demo's table where it holds one.

    A folder that ``folds`` or ``seeds`` wrote stands for its runs, and so does a folder of such folders.

    Raises:
        ConfigError: there is no run in it.
    """
    inside = runs_inside(folder)
    if not inside:
        raise ConfigError(
            f"{str(folder)!r} {'holds no run' if folder.is_dir() else 'is not a folder'}",
            key="runs",
            value=str(folder),
            hint=f"give the output folder of a run (it holds {RUN}) or a folder of runs",
        )
    demo_file = folder / DEMO
    if not demo_file.is_file():
        return inside, None
    try:
        demo: DemoFacts = json.loads(demo_file.read_bytes())
        for row in demo["table"]:
            if not isinstance(row["method"], str):
                raise TypeError(f"method {row['method']!r}")
            # A demo folder may have been moved since: its runs moved with it.
            row["runs"] = [p if Path(p).is_dir() else str(folder / Path(p).name) for p in row.get("runs", ())]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{demo_file} is damaged ({error})",
            key="runs",
            value=str(folder),
            hint="remove it, or run the demo again",
        ) from None
    return inside, demo


def write_report(
    *,
    runs: Sequence[Path],
    output: Path,
    title: str | None,
    max_clips: int,
    demo: DemoFacts | None = None,
    sweeps: Sequence[SweepPage] = (),
    open_shards: OpenShards = open_shard_dataset,
) -> Path:
    """Write the page about the runs.

    Args:
        runs: run folders, finished or not; runs that differ only in name, seed and output are shown as one kind.
        output: the HTML file; its folder is made.
        title: page title; None is made from the runs.
        max_clips: sample clips embedded, at most.
        demo: what the demo measured: ``table`` (method, mean, sd, values, runs), ``transfer``, ``seconds``.
        sweeps: their sections.
        open_shards: how the clips' shard datasets are opened.

    Raises:
        ConfigError: a folder holds no run, a file of a run is damaged, or the output cannot be written.
    """
    records, groups = _read(runs, demo)
    found = [c for c in map(confusions, groups) if c is not None]
    shown = _most_telling(found)
    embedded = EmbeddedClips(open_shards)
    clips = SampleClips((), ()) if shown is None else sample_clips(shown, embedded, count=max_clips)
    best = max(found, key=lambda c: c.accuracy, default=None)
    html = _render(
        title=title or _title(groups),
        summary=_summary(groups, demo),
        demo=_demo_rows(demo, groups),
        sweeps=sweeps,
        tables=result_tables(groups),
        groups=groups,
        curves=curves(groups),
        confusions=sorted(found, key=lambda c: c is not best),
        confidences=sorted(
            filter(None, map(confidence, groups)), key=lambda c: best is None or c.group is not best.group
        ),
        clips=clips,
        clips_of=shown,
        hardest=hardest_clips(groups, embedded) if max_clips else [],
        retrieval=retrieval_pages(records, pictures=max_clips > 0, open_shards=open_shards),
        embedding=None if shown is None else embedding(shown),
        campaign=campaign_of(groups),
        lineage=[(group, lineage(group, groups)) for group in groups],
        leaks=leaks(groups),
        filters=filters(groups),
        timing=_timing(records, demo),
        environment=_environment(records),
        records=[(record, _command(record), _started(record)) for record in records],
    )
    _write(Path(output), html)
    return Path(output)


def _read(runs: Sequence[Path], demo: DemoFacts | None) -> tuple[list[RunRecord], list[RunGroup]]:
    """The runs, those of the demo's table first in its order, and their kinds."""
    if not runs:
        raise ConfigError("names no run", key="runs", hint="give at least one run folder")
    records = [read_run(Path(folder)) for folder in runs]
    labels = _demo_labels(demo)
    order = {folder: at for at, folder in enumerate(labels)}
    records.sort(key=lambda record: order.get(record.folder.resolve(), len(order)))
    return records, group_runs(records, labels)


def _render(**context: object) -> str:
    here = files("cliplift.pipelines.report")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "duration": duration}
    template = environment.from_string(here.joinpath("report.html").read_text(encoding="utf-8"))
    css = Markup(here.joinpath("report.css").read_text(encoding="utf-8"))
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return template.render(css=css, now=now, version=version("cliplift"), **context)


def _write(output: Path, html: str) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, html)
    except OSError as error:
        raise ConfigError(
            f"{str(output)!r} cannot be written: {error.strerror}",
            key="output",
            value=str(output),
            hint="choose another file",
        ) from error


def _title(groups: Sequence[RunGroup]) -> str:
    names = [group.label for group in groups]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"


def _demo_labels(demo: DemoFacts | None) -> dict[Path, str]:
    rows = demo["table"] if demo else []
    return {Path(folder).resolve(): str(row["method"]) for row in rows for folder in row.get("runs", ())}


def _most_telling(found: Sequence[Confusions]) -> RunRecord | None:
    """The run whose clips are shown: of the best kind of run, its best run."""
    if not found:
        return None
    best = max(found, key=lambda c: c.accuracy)
    with_clips = [run for run in best.group.runs if run.predictions is not None]
    return max(with_clips, key=lambda run: run.metrics.get("accuracy", 0.0))


def _summary(groups: Sequence[RunGroup], demo: DemoFacts | None) -> str:
    """One sentence with what came out, whatever it is."""
    parts = [part for part in (_classification_result(groups, demo), _matching_result(groups)) if part]
    if not parts:
        unfinished = sum(run.result is None for group in groups for run in group.runs)
        parts = [
            f"{unfinished} of the runs below have not finished" if unfinished else "No result was recorded"
        ]
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _classification_result(groups: Sequence[RunGroup], demo: DemoFacts | None) -> str:
    tested = [group for group in groups if group.values("accuracy")]
    if not tested:
        return ""
    order = {label: at for at, label in enumerate(_methods(demo))}
    tested.sort(key=lambda g: (order.get(g.label, len(order)), -statistics.fmean(g.values("accuracy"))))
    words = [f"{group.label} {_spread(group.values('accuracy'))}" for group in tested[:4]]
    first = tested[0].runs[0].metrics
    samples = f" on {first['samples']:.0f} clips" if "samples" in first else ""
    chance = f" (chance {percent(first['chance'])})" if "chance" in first else ""
    return f"accuracy{samples}{chance}: {', '.join(words)}"


def _matching_result(groups: Sequence[RunGroup]) -> str:
    matched = [group for group in groups if group.values("matching_accuracy")]
    if not matched:
        return ""
    words = [_matched(group, named=len(matched) > 1) for group in matched[:4]]
    return f"transfer matches frames to clips of held-out videos with {', '.join(words)}"


def _matched(group: RunGroup, *, named: bool) -> str:
    metrics = group.runs[0].metrics
    sigmas = group.values("above_chance_sigmas")
    verdict = ", which is not above chance" if sigmas and statistics.fmean(sigmas) <= 3 else ""
    prior = f" against a prior of {percent(metrics['matching_prior'])}" if "matching_prior" in metrics else ""
    name = f"{group.label} " if named else ""
    return f"{name}{_spread(group.values('matching_accuracy'))}{prior}{verdict}"


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return percent(values[0])
    return f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values):.1f} %"


def _methods(demo: DemoFacts | None) -> list[str]:
    return [str(row["method"]) for row in demo["table"]] if demo else []


def _demo_rows(demo: DemoFacts | None, groups: Sequence[RunGroup]) -> list[dict[str, object]]:
    """The demo's table with one strip chart per row; a missing number is an empty cell."""
    by_label = {group.label: group for group in groups}
    rows = []
    for at, row in enumerate(demo["table"] if demo else []):
        group = by_label.get(str(row["method"]))
        chance = next(iter(group.values("chance")), None) if group else None
        colour = group.colour if group else at
        mean, sd, values = row.get("mean"), row.get("sd"), list(row.get("values", ()))
        rows.append(
            {
                "method": str(row["method"]),
                "colour": colour,
                "mean": "" if mean is None else percent(mean),
                "sd": "" if sd is None else f"± {100 * sd:.1f}",
                "each": ", ".join(f"{100 * value:.1f}" for value in values),
                "strip": value_strip(values, mean=mean, sd=sd, chance=chance, colour=colour),
            }
        )
    return rows


def _timing(records: Sequence[RunRecord], demo: DemoFacts | None) -> list[tuple[str, float, float]]:
    """(what, seconds, share of the longest)."""
    known = {record.name: record.seconds for record in records if record.seconds is not None}
    if len(known) < len(records):
        known = {record.folder.name: record.seconds for record in records if record.seconds is not None}
    if demo and demo.get("seconds"):
        known = {str(name): float(value) for name, value in demo["seconds"].items()}
    longest = max(known.values(), default=0.0) or 1.0
    return [(name, seconds, seconds / longest) for name, seconds in known.items()]


def _environment(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """(what, value); runs that differ show all their values."""
    rows = []
    for key, title in _ENVIRONMENT.items():
        values = dict.fromkeys(str(r.start[key]) for r in records if r.start.get(key) is not None)
        if values:
            rows.append((title, ", ".join(values)))
    return rows


def _command(record: RunRecord) -> str:
    line, command = record.start.get("command_line"), record.start.get("command")
    return str(line) if line else shlex.join(map(str, command if isinstance(command, list) else ()))


def _started(record: RunRecord) -> str:
    """The start that the run's config, command and versions are of: the last one."""
    starts = record.start.get("starts")
    if not isinstance(starts, list) or not starts:
        return ""
    return str(starts[-1]) + (f", start {len(starts)}" if len(starts) > 1 else "")
