"""The values that the trials of a sweep have: a grid's combinations, or draws that are functions of (seed, trial)."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping

import numpy as np

from cliplift.configs.sections import ConfigError
from cliplift.configs.sweeps import Choice, Range, SweepRun

Values = Mapping[str, Choice]
MOST_TRIALS = 10_000


def grid(parameters: Mapping[str, tuple[Choice, ...] | Range]) -> list[Values]:
    """Every combination, the last parameter changing fastest.

    Raises:
        ConfigError: more combinations than anybody runs.
    """
    columns = {
        key: values if isinstance(values, tuple) else grid_values(values)
        for key, values in parameters.items()
    }
    total = int(np.prod([len(values) for values in columns.values()], dtype=object))
    if total > MOST_TRIALS:
        raise ConfigError(
            f"have {total:,} combinations", key="parameters", hint="use method: random, or fewer values"
        )
    return [dict(zip(columns, values, strict=True)) for values in itertools.product(*columns.values())]


def grid_values(values: Range) -> tuple[Choice, ...]:
    """``points`` numbers evenly spaced on the scale, both bounds among them; of whole numbers each once."""
    assert values.points is not None
    spaced = np.geomspace if values.scale == "log" else np.linspace
    numbers = [_as_written(float(x), values) for x in spaced(values.low, values.high, values.points)]
    return tuple(dict.fromkeys(numbers))


def draw(run: SweepRun, trial: int) -> Values:
    """The values of one trial: a function of the sweep's seed, the trial's number and the parameter's name alone.

    So another parameter, or more trials, changes nothing of those that were drawn.
    """
    found: dict[str, Choice] = {}
    for key, values in run.parameters.items():
        chance = np.random.default_rng([run.seed, trial, zlib.crc32(key.encode())]).random()
        found[key] = (
            values[int(chance * len(values))] if isinstance(values, tuple) else _between(values, chance)
        )
    return found


def _between(values: Range, chance: float) -> Choice:
    low, high = values.low, values.high
    if (
        values.whole
    ):  # each of them equally often, also the bounds (on a logarithmic scale: as it measures them)
        low, high = max(low - 0.5, low / 2 if values.scale == "log" else low - 0.5), high + 0.5
    number = low * (high / low) ** chance if values.scale == "log" else low + (high - low) * chance
    return _as_written(number, values)


def _as_written(number: float, values: Range) -> int | float:
    """Four digits are enough to tell trials apart, and can be typed; never beyond the bounds."""
    if values.whole:
        return int(min(max(round(number), np.ceil(values.low)), np.floor(values.high)))
    return min(max(float(f"{number:.4g}"), values.low), values.high)


def described(values: Values) -> str:
    """``optim.lr=0.003 optim.weight_decay=0.05``."""
    return " ".join(f"{key}={_word(value)}" for key, value in values.items())


def _word(value: Choice) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(_word, value))}]" if isinstance(value, list) else str(value)
