"""Reading finished or unfinished runs back from their folders, and putting the runs of one kind together.

A kind is one config up to name, seed, output folder and tracking: the seeds of one experiment.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cliplift.configs.sections import ConfigError
from cliplift.configs.yaml_text import YamlTextError, read_yaml
from cliplift.pipelines.runs.folder import CONFIG, PREDICTIONS, RESULT, RUN, read_json

log = logging.getLogger(__name__)

HISTORY = "metrics.jsonl"
TRANSFER = "transfer"
_PREDICTION_COLUMNS = (
    "key",
    "video_id",
    "shard_url",
    "sample_index",
    "label",
    "predicted",
    "probabilities",
)


@dataclass(frozen=True)
class Series:
    """One logged number over optimizer steps; a value that was not finite is NaN."""

    steps: npt.NDArray[np.float64]
    values: npt.NDArray[np.float64]


@dataclass(frozen=True)
class PredictionTable:
    """The rows of predictions.parquet: N samples, K classes."""

    keys: tuple[str, ...]
    video_ids: tuple[str, ...]
    shard_urls: tuple[str, ...]
    sample_index: npt.NDArray[np.int64]  # (N,)
    labels: npt.NDArray[np.int64]  # (N,), -1 where unlabelled
    predicted: npt.NDArray[np.int64]  # (N,)
    probabilities: npt.NDArray[np.float32]  # (N, K)

    @property
    def labelled(self) -> npt.NDArray[np.bool_]:
        """(N,) whether each sample has a single true class."""
        return self.labels >= 0


@dataclass(frozen=True)
class RunRecord:
    """Everything a run folder says about its run."""

    folder: Path
    start: Mapping[str, Any]
    config: Mapping[str, Any]
    config_text: str
    result: Mapping[str, Any] | None
    history: Mapping[str, Series]
    predictions: PredictionTable | None

    @property
    def stage(self) -> str:
        return str(self.start.get("stage") or self.config.get("stage") or "run")

    @property
    def name(self) -> str:
        return str(self.start.get("name") or self.folder.name)

    @property
    def metrics(self) -> Mapping[str, float]:
        """Final numbers; empty while the run has not finished. A metric without a number is absent."""
        found = (self.result or {}).get("metrics")
        if not isinstance(found, Mapping):
            return {}
        return {name: float(value) for name, value in found.items() if _is_number(value)}

    @property
    def seconds(self) -> float | None:
        value = self.start.get("seconds", (self.result or {}).get("seconds"))
        return float(value) if _is_number(value) else None

    def classes(self) -> tuple[str, ...]:
        """Class names; ``class 3`` where the run recorded none."""
        listed = (self.result or {}).get("classes")
        named = tuple(str(c) for c in listed) if isinstance(listed, list) else ()
        known = 0 if self.predictions is None else self.predictions.probabilities.shape[1]
        return named if len(named) >= known else tuple(f"class {k}" for k in range(known))

    def setting(self, dotted: str) -> Any:
        """A value of the resolved config by dotted key, or None where the run has no such key."""
        node: Any = self.config
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
            step, values = _logged(line)
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


def _logged(line: bytes) -> tuple[float, dict[str, float]]:
    """Step and numbers of a line of metrics.jsonl; no numbers where it names no step. Raises ValueError and others."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("no object")
    step: Any = row.get("step")
    if not _is_number(step):
        return 0.0, {}
    numbers = {
        name: float(value)
        for name, value in row.items()
        if name not in ("step", "time") and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    return float(step), numbers


def read_predictions(path: Path) -> PredictionTable:
    """Read a predictions.parquet; raises :class:`ConfigError` for a file that is not one."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise ConfigError(f"{path} cannot be read: {error}", key="runs", value=str(path)) from None
    missing = [name for name in _PREDICTION_COLUMNS if name not in table.column_names]
    if missing:
        raise ConfigError(f"{path} lacks the columns {', '.join(missing)}", key="runs", value=str(path))
    widths = pc.unique(pc.list_value_length(table["probabilities"])).to_pylist()
    if len(widths) > 1:
        raise ConfigError(f"{path} has rows of {sorted(widths)} probabilities", key="runs", value=str(path))
    flat = pc.list_flatten(table["probabilities"]).to_numpy().astype(np.float32)
    return PredictionTable(
        keys=tuple(table["key"].to_pylist()),
        video_ids=tuple(table["video_id"].to_pylist()),
        shard_urls=tuple(table["shard_url"].to_pylist()),
        sample_index=table["sample_index"].to_numpy().astype(np.int64),
        labels=table["label"].to_numpy().astype(np.int64),
        predicted=table["predicted"].to_numpy().astype(np.int64),
        probabilities=flat.reshape(table.num_rows, widths[0] if widths else 0),
    )


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
    kept = {k: v for k, v in record.config.items() if k not in ("name", "seed", "output", "track")}
    for key in ("initialise_from", "run"):  # seeds of a chain each start from their own seed's parent
        source = kept.get(key)
        if isinstance(source, str):
            kept[key] = known.get(Path(source).resolve(), source)
    if not kept:
        return f"folder:{record.folder.resolve()}"
    return json.dumps([record.stage, kept], sort_keys=True, default=str)


def _stem(names: Sequence[str]) -> str:
    """What the names share, without a trailing seed number: ``scratch-seed0``, ``scratch-seed1`` -> ``scratch``."""
    stems = {re.sub(r"[-_ .]+(seed|run|s)?[-_ .]*\d+$", "", name) or name for name in names}
    return stems.pop() if len(stems) == 1 else f"{names[0]} and {len(names) - 1} more"


def _series(points: Mapping[float, float]) -> Series:
    steps = sorted(points)
    values = [points[step] if math.isfinite(points[step]) else math.nan for step in steps]
    return Series(np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64))


def _read_yaml(path: Path, text: str) -> dict[str, Any]:
    try:
        value = read_yaml(text)
    except YamlTextError as error:
        raise ConfigError(
            f"{path} is not YAML: {str(error).splitlines()[0]}", key="runs", value=str(path)
        ) from None
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
