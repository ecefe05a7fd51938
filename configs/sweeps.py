"""A sweep: one training config, and the parameters that its trials try."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from cliplift.configs.sections import ConfigError, Location, Output, Section

Choice = bool | int | float | str | None | list[bool | int | float | str | None]


class Range(Section):
    """Numbers between two bounds."""

    low: float = Field(description="smallest value")
    high: float = Field(description="largest value")
    scale: Literal["linear", "log"] = Field(
        "linear", description="log: as many between 1 and 10 as 10 and 100"
    )
    whole: bool = Field(False, description="whole numbers alone")
    points: int | None = Field(None, ge=2, description="values of a grid, evenly spaced on the scale")

    @model_validator(mode="after")
    def _possible(self) -> Range:
        if self.high <= self.low:
            raise ConfigError(f"{self.high:g} is not above low={self.low:g}", key="high", value=self.high)
        if self.scale == "log" and self.low <= 0:
            raise ConfigError("has no logarithm", key="low", value=self.low, hint="use a number above 0")
        return self


def values_of(key: str, given: object) -> object:
    """The values of a parameter; an error in a range names its own key."""
    hint = "give a list of values, or {low: ..., high: ...}"
    if isinstance(given, Range):
        return given
    if isinstance(given, list | tuple) and not any(isinstance(value, Mapping) for value in given):
        return given
    if not isinstance(given, Mapping):
        raise ConfigError(f"{given!r} is no choice of values", key=key, value=given, hint=hint)
    try:
        return Range.model_validate(given)
    except ValidationError as errors:
        # An unknown key explains the missing one beside it.
        first = sorted(errors.errors(), key=lambda e: e["type"] != "extra_forbidden")[0]
        inner = first.get("ctx", {}).get("error")
        place = ".".join(map(str, first["loc"]))
        if isinstance(inner, ConfigError):
            place, reason, hint = inner.key, inner.reason, inner.hint or hint
        elif first["type"] in ("extra_forbidden", "missing"):
            reason = "unknown key" if first["type"] == "extra_forbidden" else "is missing"
        else:
            reason = f"{first['input']!r} {first['msg'].removeprefix('Input ')}"
        raise ConfigError(reason, key=f"{key}.{place}", hint=hint) from None


class SweepRun(Section):
    """Runs of one config that differ in some parameters; validation metrics alone choose among them."""

    stage: Literal["sweep"] = "sweep"
    name: str = Field(description="name of the sweep; its trials are NAME-trial000 and so on")
    output: Output = Field(description="folder of the sweep; each trial has its own below it")
    run: Location = Field(description="YAML file or packaged recipe that every trial starts from")
    overrides: tuple[str, ...] = Field((), description="key.path=value words that hold for all trials")
    parameters: dict[str, tuple[Choice, ...] | Range] = Field(
        min_length=1,
        description="dotted key of the config -> list of values, or {low, high, scale: linear|log, whole, points}",
    )
    method: Literal["grid", "random", "halving", "hyperband"] = Field(
        "grid",
        description="grid: every combination; random: draws; halving: draws that start with few steps, of which the "
        "best go on; hyperband: several halvings that start with more and more steps",
    )
    trials: int | None = Field(
        None, ge=1, description="draws of random and halving; hyperband has its own number"
    )
    seed: int = Field(0, ge=0, description="seed of the draws; trial k is a function of it and of k")
    factor: int = Field(
        3, ge=2, description="halving, hyperband: one in so many trials goes on, with so many times the steps"
    )
    least_steps: int | None = Field(
        None, ge=1, description="halving, hyperband: optimizer steps of the shortest runs, at least"
    )
    metric: str | None = Field(
        None,
        description="validation metric that chooses, such as accuracy; None is the one that the stage keeps weights by",
    )
    goal: Literal["maximise", "minimise"] | None = Field(
        None,
        description="which end of the metric is better; None goes by its name (losses and errors: minimise)",
    )

    @field_validator("parameters", mode="before")
    @classmethod
    def _values(cls, parameters: object) -> object:
        if not isinstance(parameters, Mapping):
            return parameters
        return {key: values_of(str(key), given) for key, given in parameters.items()}

    @field_validator("parameters")
    @classmethod
    def _not_empty(
        cls, parameters: dict[str, tuple[Choice, ...] | Range]
    ) -> dict[str, tuple[Choice, ...] | Range]:
        for key, values in parameters.items():
            if isinstance(values, tuple) and not values:
                raise ConfigError(
                    "names no value", key=key, hint="give a list of values, or {low: ..., high: ...}"
                )
            if key.partition(".")[0] in OF_THE_SWEEP:
                raise ConfigError(
                    "is what tells the trials' folders apart",
                    key=key,
                    hint=f"a sweep sets {', '.join(OF_THE_SWEEP)}",
                )
        return parameters

    @model_validator(mode="after")
    def _possible(self) -> SweepRun:
        if self.method == "grid":
            for key, values in self.parameters.items():
                if isinstance(values, Range) and values.points is None:
                    raise ConfigError(
                        "says no number of values",
                        key=f"parameters.{key}.points",
                        hint="a grid needs points: 4",
                    )
        for key, value, methods, missing in (
            ("trials", self.trials, ("random", "halving"), "say how many"),
            (
                "least_steps",
                self.least_steps,
                ("halving", "hyperband"),
                "say with how many the shortest runs do",
            ),
        ):
            if (value is None) == (self.method in methods):
                raise ConfigError(
                    f"goes with {' and '.join(methods)}, and this is {self.method}",
                    key=key,
                    value=value,
                    hint=missing if value is None else "leave it out",
                )
        return self


# What a sweep sets for each trial.
OF_THE_SWEEP = ("name", "output", "checkpoint", "stage", "test_split")
