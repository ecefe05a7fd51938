"""``cliplift bench data|train CONFIG``: how fast a run's loader, or its training step, is on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cliplift.configs.load import LoadedRun, load_run, packaged_recipe
from cliplift.configs.runs import RUNS
from cliplift.configs.sections import ConfigError
from cliplift.configs.training import TrainingRun

SUBJECTS = ("data", "train")


def run_bench(arguments: argparse.Namespace) -> int:
    """Measure what the first word names; the second is the config, the rest are overrides."""
    if arguments.subject not in SUBJECTS:
        raise ConfigError(
            f"{arguments.subject!r} cannot be measured",
            file="command line",
            hint=f"say one of {', '.join(SUBJECTS)}, then the config",
        )
    loaded = _loaded(list(arguments.rest))
    if arguments.subject == "data":
        from cliplift.launch.commands.bench_data import bench_data

        return bench_data(
            loaded,
            batches=arguments.steps,
            warm_up=arguments.warm_up,
            gpus=arguments.gpus,
            clips_per_second_per_gpu=arguments.appetite,
            output=arguments.output,
        )
    from cliplift.launch.commands.bench_train import bench_train

    return bench_train(
        loaded,
        steps=arguments.steps,
        warm_up=arguments.warm_up,
        synthetic=arguments.synthetic,
        output=arguments.output,
    )


def _loaded(words: list[str]) -> LoadedRun[Any]:
    if not words or "=" in words[0]:
        raise ConfigError("names no config", file="command line", hint="write cliplift bench data CONFIG")
    loaded = load_run(packaged_recipe(words[0]) or Path(words[0]), RUNS, words[1:])
    if not isinstance(loaded.run, TrainingRun):
        raise ConfigError(
            f"is {loaded.run.stage!r}, which trains nothing",
            key="stage",
            file=str(loaded.file),
            hint="give a transfer, pretrain or finetune config",
        )
    return loaded
