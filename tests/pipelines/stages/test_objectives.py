"""The names `objective:` takes and the stages behind them."""

from __future__ import annotations

import pytest

from cliplift.configs.load import load_run, packaged_recipe
from cliplift.configs.plugins import OBJECTIVES as NAMES
from cliplift.configs.runs import RUNS, PretrainRun
from cliplift.configs.sections import ConfigError
from cliplift.pipelines.stages.run import OBJECTIVES, stage_of


def test_every_name_has_a_stage_and_every_stage_a_name() -> None:
    assert set(OBJECTIVES) == NAMES


def test_a_wrong_name_is_one_sentence_with_the_nearest() -> None:
    recipe = packaged_recipe("pretrain/demo")
    assert recipe is not None
    with pytest.raises(ConfigError, match=r"command line: objective: 'forcast' .* did you mean 'forecast'\?"):
        load_run(recipe, RUNS, ["objective=forcast"])


@pytest.mark.parametrize(
    ("recipe", "alone"),
    [("masked_demo", "skill"), ("distil_demo", "feature_cosine"), ("latent_demo", "probe_knn_accuracy")],
)
def test_a_probe_chooses_the_checkpoint(recipe: str, alone: str) -> None:
    """Without labels no loss says which features are useful; of latent prediction none chooses at all."""
    path = packaged_recipe(f"pretrain/{recipe}")
    assert path is not None

    def chosen(*words: str) -> str:
        run = load_run(path, RUNS, words).run
        assert isinstance(run, PretrainRun)
        return stage_of(run).best_metric

    assert chosen() == alone
    assert chosen("probe={shards: shards/mine}") == "probe_knn_accuracy"
    assert chosen("probe={shards: shards/mine, attentive: {}}") == "probe_attentive_accuracy"
