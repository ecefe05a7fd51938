"""The names `objective:` takes and the stages behind them."""

from __future__ import annotations

import pytest

from cliplift.configs.load import load_run, packaged_recipe
from cliplift.configs.plugins import OBJECTIVES as NAMES
from cliplift.configs.runs import RUNS
from cliplift.configs.sections import ConfigError
from cliplift.pipelines.stages.run import OBJECTIVES


def test_every_name_has_a_stage_and_every_stage_a_name() -> None:
    assert set(OBJECTIVES) == NAMES


def test_a_wrong_name_is_one_sentence_with_the_nearest() -> None:
    recipe = packaged_recipe("pretrain/demo")
    assert recipe is not None
    with pytest.raises(ConfigError, match=r"command line: objective: 'forcast' .* did you mean 'forecast'\?"):
        load_run(recipe, RUNS, ["objective=forcast"])
