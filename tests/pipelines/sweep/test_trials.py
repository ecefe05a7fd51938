"""What the trials of a sweep are, and who goes on: published tables, arithmetic by hand, and the laws of the draws."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from cliplift.configs.sections import ConfigError
from cliplift.configs.sweeps import Range, SweepRun
from cliplift.pipelines.sweep.brackets import halving, hyperband, survivors, total_steps
from cliplift.pipelines.sweep.trials import described, draw, grid, grid_values


def sweep(**parameters: object) -> SweepRun:
    tree = {"name": "s", "output": "o", "run": "r", "method": "random", "trials": 3, "parameters": parameters}
    return SweepRun.model_validate(tree)


def test_hyperband_has_the_brackets_of_the_paper() -> None:
    """Table 1 of arXiv 1603.06560: R = 81, eta = 3; here in steps of at least 1."""
    table = [
        ((81, 1), (27, 3), (9, 9), (3, 27), (1, 81)),
        ((27, 3), (9, 9), (3, 27), (1, 81)),
        ((9, 9), (3, 27), (1, 81)),
        ((6, 27), (2, 81)),
        ((5, 81),),
    ]
    found = hyperband(longest=81, least=1, factor=3)
    assert [bracket.rungs for bracket in found] == table
    assert [bracket.trials[0] for bracket in found] == [0, 81, 108, 117, 123]
    assert total_steps(found) == sum(n * r for rungs in table for n, r in rungs)


def test_halving_by_hand() -> None:
    (bracket,) = halving(trials=27, longest=90, least=10, factor=3)
    assert bracket.rungs == ((27, 10), (9, 30), (3, 90))
    (few,) = halving(trials=5, longest=90, least=10, factor=3)
    assert few.rungs == ((5, 30), (1, 90))  # a third rung would have no trial
    (uneven,) = halving(trials=8, longest=100, least=30, factor=2)
    assert uneven.rungs == ((8, 50), (4, 100))


def test_the_best_go_on_and_equals_by_number() -> None:
    results = {4: 0.5, 1: 0.7, 2: None, 3: 0.5, 0: 0.1}
    assert survivors(results, count=2, maximise=True) == (1, 3)
    assert survivors(results, count=2, maximise=False) == (0, 3)
    assert survivors(results, count=9, maximise=True) == (0, 1, 3, 4)


def test_a_grid_has_every_combination_once() -> None:
    run = sweep(lr={"low": 1e-4, "high": 0.1, "scale": "log", "points": 4}, flip=[True, False])
    found = [(values["lr"], values["flip"]) for values in grid(run.parameters)]
    assert found == [(lr, flip) for lr in (1e-4, 1e-3, 1e-2, 0.1) for flip in (True, False)]
    assert grid_values(Range(low=1, high=4, whole=True, points=9)) == (1, 2, 3, 4)
    huge = {f"p{k}": Range(low=0, high=1, points=50) for k in range(4)}
    with pytest.raises(ConfigError, match="6,250,000 combinations"):
        grid(huge)


def test_a_draw_is_a_function_of_seed_trial_and_name() -> None:
    lr, decay = {"low": 1e-4, "high": 0.1, "scale": "log"}, [0.0, 0.05]
    one, both = sweep(lr=lr), sweep(decay=decay, lr=lr)
    for trial in range(20):
        assert draw(one, trial)["lr"] == draw(both, trial)["lr"]
    other = one.model_copy(update={"seed": 1})
    assert draw(one, 0) != draw(other, 0)
    assert draw(one, 0) != draw(one, 1)


def test_draws_are_uniform_on_their_scale() -> None:
    N = 600
    run = sweep(
        lr={"low": 1e-4, "high": 1e-2, "scale": "log"},
        share={"low": 0.2, "high": 0.6},
        depth={"low": 2, "high": 4, "whole": True},
        kind=["a", "b"],
    )
    drawn = [draw(run, trial) for trial in range(N)]

    def mean_is(values: list[float], *, low: float, high: float) -> None:
        assert low <= min(values) <= max(values) <= high
        error = (high - low) / math.sqrt(12 * N)
        assert abs(sum(values) / N - (low + high) / 2) < 4 * error

    mean_is([math.log10(float(values["lr"])) for values in drawn], low=-4, high=-2)  # type: ignore[arg-type]
    mean_is([float(values["share"]) for values in drawn], low=0.2, high=0.6)  # type: ignore[arg-type]
    for key, choices in (("depth", (2, 3, 4)), ("kind", ("a", "b"))):
        counts = Counter(values[key] for values in drawn)
        assert set(counts) == set(choices)
        expected = N / len(choices)
        assert all(abs(count - expected) < 4 * math.sqrt(expected) for count in counts.values())


def test_whole_numbers_on_a_logarithmic_scale_stay_within_their_bounds() -> None:
    run = sweep(width={"low": 1, "high": 8, "scale": "log", "whole": True})
    assert {draw(run, trial)["width"] for trial in range(300)} == set(range(1, 9))


def test_values_as_they_are_typed() -> None:
    values = {
        "optim.lr": 3e-4,
        "data.augment.flip": False,
        "model.pretrained": None,
        "optim.betas": [0.9, 0.95],
    }
    assert (
        described(values)
        == "optim.lr=0.0003 data.augment.flip=false model.pretrained=null optim.betas=[0.9,0.95]"
    )


@pytest.mark.parametrize(
    ("change", "key", "said"),
    [
        ({"parameters": {}}, "parameters", "at least 1"),
        ({"parameters": {"optim.lr": []}}, "parameters.optim.lr", "names no value"),
        ({"parameters": {"output": ["a"]}}, "parameters.output", "folders apart"),
        ({"parameters": {"lr": 0.1}}, "parameters.lr", "no choice of values"),
        ({"parameters": {"lr": {"low": 1}}}, "parameters.lr.high", "is missing"),
        ({"parameters": {"lr": {"low": 1, "hihg": 2}}}, "parameters.lr.hihg", "unknown key"),
        ({"parameters": {"lr": {"low": 2, "high": 1}}}, "parameters.lr.high", "not above"),
        ({"parameters": {"lr": {"low": 0, "high": 1, "scale": "log"}}}, "parameters.lr.low", "logarithm"),
        ({"method": "grid", "trials": None}, "parameters.lr.points", "points: 4"),
        ({"trials": None}, "trials", "say how many"),
        ({"method": "hyperband", "least_steps": 5}, "trials", "leave it out"),
        ({"method": "halving"}, "least_steps", "shortest runs"),
        ({"least_steps": 5}, "least_steps", "leave it out"),
    ],
)
def test_what_makes_no_sweep_is_one_sentence(change: dict[str, object], key: str, said: str) -> None:
    from cliplift.configs.load import validate

    tree: dict[str, object] = {"name": "s", "output": "o", "run": "r", "method": "random", "trials": 3}
    tree["parameters"] = {"lr": {"low": 0.1, "high": 1}}
    with pytest.raises(ConfigError, match=said) as error:
        validate(tree | change, SweepRun, {}, "sweep.yaml")
    assert key in str(error.value)
