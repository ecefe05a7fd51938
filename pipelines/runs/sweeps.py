"""What a sweep has found so far, as its folder's ``sweep.json`` holds it: read by reports, written by the sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cliplift.configs.sections import ConfigError
from cliplift.pipelines.runs.folder import is_number, read_json, write_json

SWEEP = "sweep.json"


@dataclass(frozen=True)
class TrialRecord:
    """One run of a trial.

    Attributes:
        trial: its number.
        values: dotted key -> value.
        steps: optimizer steps, None where the config says epochs.
        folder: of the run, relative to the sweep's.
        value: the metric on validation data; None where there is none yet, or never will be.
        failed: why it has none; empty.
    """

    trial: int
    values: Mapping[str, object]
    steps: int | None
    folder: str
    value: float | None
    failed: str = ""


@dataclass(frozen=True)
class SweepRecord:
    """All runs of a sweep that are known of, in the order they are made."""

    name: str
    method: str
    metric: str
    maximise: bool
    runs: tuple[TrialRecord, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key for run in self.runs for key in run.values))

    def best_first(self) -> list[TrialRecord]:
        """Of every trial its longest run; those with the most steps first, and of them the best.

        Runs of other lengths are not compared: a short one may look good early.
        """
        longest: dict[int, TrialRecord] = {}
        for run in self.runs:
            if run.value is not None:
                longest[run.trial] = run  # rungs come in order of their steps
        return sorted(longest.values(), key=self._place)

    def _place(self, run: TrialRecord) -> tuple[int, float, int]:
        assert run.value is not None
        return -(run.steps or 0), -run.value if self.maximise else run.value, run.trial


def write_sweep(folder: Path, record: SweepRecord) -> None:
    write_json(folder / SWEEP, asdict(record))


def read_sweep(folder: Path) -> SweepRecord | None:
    """A folder's sweep; None where it holds none.

    Raises:
        ConfigError: its record is damaged.
    """
    if not (folder / SWEEP).is_file():
        return None
    tree = read_json(folder / SWEEP) or {}
    try:
        rows = tree["runs"]
        assert isinstance(rows, list)
        return SweepRecord(
            name=str(tree["name"]),
            method=str(tree["method"]),
            metric=str(tree["metric"]),
            maximise=bool(tree["maximise"]),
            runs=tuple(_run(row) for row in rows),
        )
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"{folder / SWEEP} is damaged ({type(error).__name__})",
            key="runs",
            value=str(folder),
            hint="start the sweep again: it writes it anew",
        ) from None


def _run(row: Mapping[str, object]) -> TrialRecord:
    values, steps, value, trial = row["values"], row["steps"], row["value"], row["trial"]
    assert isinstance(values, dict)
    assert isinstance(trial, int)
    folder = str(row["folder"])
    if Path(folder).is_absolute() or ".." in Path(folder).parts:
        raise ValueError(folder)
    return TrialRecord(
        trial=trial,
        values={str(key): each for key, each in values.items()},
        steps=int(steps) if is_number(steps) else None,
        folder=folder,
        value=float(value) if is_number(value) else None,
        failed=str(row.get("failed") or ""),
    )


def shown_value(value: object) -> str:
    """A parameter's value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(shown_value, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
