"""Small shards, a transfer run and a run that is finetuned from it: made once for the tests of whole stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.pipelines.stages.run import run_stage
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.demo.synthetic import write_demo_videos


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """Small videos of every class, packed with the demo's recipes."""
    folder = tmp_path_factory.mktemp("stages")
    write_demo_videos(
        folder / "videos",
        seed=1,
        train_per_class=4,
        val_per_class=1,
        test_per_class=2,
        unlabelled=20,
        size_pixels=64,
    )
    for name, source in (("actions", "labelled"), ("unlabelled", "unlabelled")):
        words = [f"source.root={folder}/videos/{source}", f"output={folder}/shards/{name}", "workers=2"]
        run_shard(load_run(repository / "configs" / "shard" / f"demo_{name}.yaml", RUNS, words).run)
    return folder


@pytest.fixture(scope="session")
def load(repository: Path, place: Path) -> Callable[..., Any]:
    """``load(recipe, output, *words)``: the run of a recipe over the small shards, as the command line reads it."""

    def read(recipe: str, output: str, *words: str) -> Any:
        shards = "unlabelled" if recipe.startswith("transfer") else "actions"
        more = [
            f"data.shards={place}/shards/{shards}",
            f"output={place}/{output}",
            "track.wandb=disabled",
            *words,
        ]
        return load_run(repository / "configs" / f"{recipe}.yaml", RUNS, more).run

    return read


@pytest.fixture(scope="session")
def transferred(load: Callable[..., Any]) -> Path:
    run = load(
        "transfer/demo",
        "transfer",
        "schedule.steps=6",
        "engine.global_batch=8",
        "correspondence.negatives_per_clip=2",
        "track.wandb=offline",
    )
    result = run_stage(run, command=["cliplift", "transfer", "transfer/demo"])
    assert result.finished
    return result.folder


@pytest.fixture(scope="session")
def finetuned(load: Callable[..., Any], transferred: Path) -> Path:
    run = load("finetune/demo", "finetune", "schedule.steps=6", f"initialise_from={transferred}",
               "evaluation.every_steps=3", "track.wandb=offline", "track.tensorboard=true",
               "track.clip_table_rows=3")  # fmt: skip
    return run_stage(run, command=["cliplift", "finetune", "finetune/demo"]).folder
