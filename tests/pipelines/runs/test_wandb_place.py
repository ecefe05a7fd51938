"""Where numbers go in W&B: as the config says, else W&B's own variables, else to the campaign that a run follows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cliplift.configs.load import load_run
from cliplift.configs.runs import TRAINING
from cliplift.configs.training import TrainingRun
from cliplift.pipelines.distributed.agreement import run_facts
from cliplift.pipelines.repeats import single_runs
from cliplift.pipelines.runs.tracking import wandb_group
from cliplift.sharding.build.tracking import wandb_project


def run(repository: Path, *words: str) -> TrainingRun:
    return load_run(repository / "configs/finetune/demo.yaml", TRAINING, ["name=mine", *words]).run


def test_the_project_is_the_configs_then_the_variables_then_ours(repository: Path) -> None:
    assert wandb_project(run(repository).track.project, {}) == "cliplift"
    assert wandb_project(run(repository).track.project, {"WANDB_PROJECT": "theirs"}) == "theirs"
    named = run(repository, "track.project=named", "track.entity=team").track
    assert wandb_project(named.project, {"WANDB_PROJECT": "theirs"}) == "named"
    assert named.entity == "team"


@pytest.mark.parametrize(
    ("words", "variables", "recorded", "group"),
    [
        ((), {}, None, "mine"),
        ((), {}, {"id": "a", "group": "campaign"}, "campaign"),
        ((), {}, {"id": "a"}, "mine"),  # of an earlier version
        ((), {}, {"id": "a", "group": ["x"]}, "mine"),
        ((), {"WANDB_RUN_GROUP": "set"}, {"id": "a", "group": "campaign"}, "set"),
        (("track.group=said",), {"WANDB_RUN_GROUP": "set"}, {"id": "a", "group": "campaign"}, "said"),
    ],
)
def test_a_run_joins_the_campaign_it_starts_from(
    repository: Path,
    tmp_path: Path,
    *,
    words: tuple[str, ...],
    variables: dict[str, str],
    recorded: dict[str, object] | None,
    group: str,
) -> None:
    if recorded is not None:
        (tmp_path / "wandb.json").write_text(json.dumps(recorded))
    found = wandb_group(run(repository, f"initialise_from={tmp_path}", *words), variables)
    assert found == group


def test_seeds_join_it_together_and_hosts_need_not_agree(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another host may have neither the parent's record nor the variable; rank 0 alone tracks."""
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    (tmp_path / "wandb.json").write_text('{"id": "a", "group": "campaign"}')
    seeds = single_runs(run(repository, f"initialise_from={tmp_path}", "seeds=[0,1]"))
    assert [seed.track.group for seed in seeds] == ["campaign", "campaign"]
    alone = single_runs(run(repository, "initialise_from=null", "seeds=[0,1]"))
    assert [seed.track.group for seed in alone] == ["mine", "mine"]
    assert "track.group" not in run_facts(seeds[0])


def test_weights_in_a_store_or_none_begin_a_campaign(repository: Path) -> None:
    for source in ("s3://bucket/run", "null"):
        assert wandb_group(run(repository, f"initialise_from={source}"), {}) == "mine"
