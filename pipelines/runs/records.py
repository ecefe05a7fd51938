"""Reading finished or unfinished runs back from their folders, and putting the runs of one kind together.

A kind is one config up to name, seed, fold, output folder and tracking: the runs of one experiment.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cliplift.configs.sections import ConfigError
from cliplift.configs.yaml_text import YamlTextError, read_yaml
from cliplift.pipelines.runs.folder import (
    CONFIG,
    HISTORY,
    RESULT,
    RUN,
    Record,
    classes_of,
    is_number,
    metrics_of,
    read_json,
    seconds_of,
)
from cliplift.pipelines.runs.predictions import PREDICTIONS, Predictions, read_predictions

log = logging.getLogger(__name__)

TRANSFER = "transfer"
OWN_OF_A_RUN = (
    "name",
    "seed",
    "output",
    "track",
    "checkpoint",
)  # what differs between seeds and folds of one config
PARTS = re.compile(r"(\D*)(\d*)")  # of a name, so that fold10 comes after fold9
FOLDERS_DOWN = 3  # how far below a folder its runs may be: CAMPAIGN/NAME/fold1/seed0


@dataclass(frozen=True)
class Series:
    """One logged number over optimizer steps; a value that was not finite is NaN."""

    steps: npt.NDArray[np.float64]
    values: npt.NDArray[np.float64]


@dataclass(frozen=True)
class RunRecord:
    """Everything a run folder says about its run."""

    folder: Path
    start: Record
    config: Record
    config_text: str
    result: Record | None
    history: Mapping[str, Series]
    predictions: Predictions | None

    @property
    def stage(self) -> str:
        return str(self.start.get("stage") or self.config.get("stage") or "run")

    @property
    def name(self) -> str:
        return str(self.start.get("name") or self.folder.name)

    @property
    def metrics(self) -> Mapping[str, float]:
        """Final numbers; empty while the run has not finished. A metric without a number is absent."""
        return metrics_of(self.result or {})

    @property
    def seconds(self) -> float | None:
        seconds = seconds_of(self.start)
        return seconds_of(self.result or {}) if seconds is None else seconds

    def classes(self) -> tuple[str, ...]:
        """Class names; ``class 3`` where the run recorded none."""
        named = classes_of(self.result or {})
        known = 0 if self.predictions is None else self.predictions.probabilities.shape[1]
        return named if len(named) >= known else tuple(f"class {k}" for k in range(known))

    def setting(self, dotted: str) -> object:
        """A value of the resolved config by dotted key, or None where the run has no such key."""
        node: object = self.config
        for part in dotted.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node


@dataclass(frozen=True)
class RunGroup:
    """Runs of one kind, in the order given; ``colour`` numbers the groups of a report."""

    label: str
    colour: int
    runs: tuple[RunRecord, ...]

    @property
    def stage(self) -> str:
        return self.runs[0].stage

    def values(self, metric: str) -> list[float]:
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        ConfigError: the folder holds no run, or its config or predictions are damaged. Damaged records are logged, and
            what they say is taken as not there.
    """
    start_file = folder / RUN
    if not start_file.is_file():
        raise ConfigError(
            f"{str(folder)!r} holds no {RUN}",
            key="runs",
            value=str(folder),
            hint="give the output folder of a run",
        )
    config_file = folder / CONFIG
    config_text = config_file.read_text(encoding="utf-8", errors="replace") if config_file.is_file() else ""
    predictions_file = folder / PREDICTIONS
    return RunRecord(
        folder=folder,
        start=read_json(start_file) or {},
        config=_read_yaml(config_file, config_text),
        config_text=config_text,
        result=read_json(folder / RESULT),
        history=read_history(folder / HISTORY),
        predictions=read_predictions(predictions_file) if predictions_file.is_file() else None,
    )


def sums_up(folder: Path) -> bool:
    """Whether a folder holds the mean of runs of several folds or seeds, and no run of its own."""
    return isinstance((read_json(folder / RESULT) or {}).get("runs"), list)


def runs_inside(folder: Path, *, down: int = FOLDERS_DOWN) -> list[Path]:
    """The single runs in and below a folder, in order of folds and seeds; nothing inside a run is looked at.

    A folder that sums up runs stands for them, for itself only where they are gone.
    """
    is_run = (folder / RUN).is_file()
    if is_run and not sums_up(folder):
        return [folder]
    below = [path for path in folder.iterdir() if path.is_dir()] if down and folder.is_dir() else []
    below.sort(key=lambda path: [(text, int(number or 0)) for text, number in PARTS.findall(path.name)])
    found = [run for path in below for run in runs_inside(path, down=down - 1)]
    return found or ([folder] if is_run else [])


def read_history(path: Path) -> dict[str, Series]:
    """Series by name from a metrics.jsonl; empty when the run logged nothing.

    A restarted run logs some steps again: the last line of a step counts. Lines that cannot be read, as a kill or a
    full disk leaves them, are left out and counted in the log: one of them does not hide the others.
    """
    if not path.is_file():
        return {}
    found: dict[str, dict[float, float]] = {}
    damaged: list[int] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            step, values = logged_numbers(line)
        except (ValueError, OverflowError, RecursionError):
            damaged.append(number)
            continue
        for name, value in values.items():
            found.setdefault(name, {})[step] = value
    if damaged:
        log.warning(
            "%s: %d lines cannot be read and are left out, the first is line %d",
            path,
            len(damaged),
            damaged[0],
        )
    return {name: _series(points) for name, points in found.items()}


def logged_numbers(line: bytes) -> tuple[float, dict[str, float]]:
    """Step and numbers of a line of metrics.jsonl; no numbers where it names no step. Raises ValueError and others."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("no object")
    step = row.get("step")
    if not is_number(step):
        return 0.0, {}
    numbers = {
        name: float(value)
        for name, value in row.items()
        if name not in ("step", "time") and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    return float(step), numbers


def group_runs(records: Sequence[RunRecord], labels: Mapping[Path, str] | None = None) -> list[RunGroup]:
    """Put the runs of one kind together, in order of appearance.

    Args:
        records: the runs.
        labels: resolved run folder -> name of its kind, where the caller knows it (the demo's table does).
    """
    labels = labels or {}
    kinds: dict[str, list[RunRecord]] = {}
    known: dict[Path, str] = {}
    for record in records:
        folder = record.folder.resolve()
        kind = f"label:{labels[folder]}" if folder in labels else _kind(record, known)
        known[folder] = kind
        kinds.setdefault(kind, []).append(record)
    names = [
        kind.removeprefix("label:") if kind.startswith("label:") else _stem([run.name for run in runs])
        for kind, runs in kinds.items()
    ]
    shared = {name for name in names if names.count(name) > 1}
    for at, runs in enumerate(kinds.values()):
        if names[at] in shared:
            names[at] = f"{names[at]} ({_stem([run.folder.name for run in runs])})"
    return [
        RunGroup(name, colour, tuple(runs))
        for colour, (name, runs) in enumerate(zip(names, kinds.values(), strict=True))
    ]


def _kind(record: RunRecord, known: Mapping[Path, str]) -> str:
    """What must agree for two runs to be seeds of one experiment, as text."""
    kept = {k: v for k, v in record.config.items() if k not in OWN_OF_A_RUN}
    data = kept.get("data")
    if isinstance(data, Mapping):
        kept["data"] = {k: v for k, v in data.items() if k != "fold"}
    for key in ("initialise_from", "run"):  # seeds of a chain each start from their own seed's parent
        source = kept.get(key)
        if isinstance(source, str):
            kept[key] = known.get(Path(source).resolve(), source)
    if not kept:
        return f"folder:{record.folder.resolve()}"
    return json.dumps([record.stage, kept], sort_keys=True, default=str)


def _stem(names: Sequence[str]) -> str:
    """What the names share, without trailing numbers of fold and seed: ``net-fold1-seed0`` -> ``net``."""
    ending = r"([-_ .]+fold\d+)?[-_ .]+(seed|run|s)?[-_ .]*\d+$|[-_ .]+fold\d+$"
    stems = {re.sub(ending, "", name) or name for name in names}
    return stems.pop() if len(stems) == 1 else f"{names[0]} and {len(names) - 1} more"


def _series(points: Mapping[float, float]) -> Series:
    steps = sorted(points)
    values = [points[step] if math.isfinite(points[step]) else math.nan for step in steps]
    return Series(np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64))


def _read_yaml(path: Path, text: str) -> Record:
    try:
        value = read_yaml(text)
    except YamlTextError as error:
        raise ConfigError(
            f"{path} is not YAML: {str(error).splitlines()[0]}", key="runs", value=str(path)
        ) from None
    return value if isinstance(value, dict) else {}
