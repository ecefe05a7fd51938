"""``cliplift transfer``, ``pretrain`` and ``finetune``: train from a config."""

from __future__ import annotations

import argparse
from functools import partial

from cliplift.launch.commands.command import Command


def run_training(arguments: argparse.Namespace, *, stage: str) -> int:
    """Exit code 0 when the run is finished, or was stopped by a signal after saving."""
    from cliplift.configs.runs import TRAINING
    from cliplift.launch.commands.subject import command_words, load_stage, prepare_environment, run_located

    loaded = load_stage(arguments, TRAINING[stage])
    prepare_environment()
    from cliplift.pipelines.distributed.collectives import leave
    from cliplift.pipelines.repeats import run_all
    from cliplift.pipelines.stages.run import dry_run

    if arguments.dry_run:
        print(run_located(loaded, lambda: dry_run(loaded.run)))
        return 0
    result = run_located(loaded, lambda: run_all(loaded.run, command=command_words()))
    code = 0 if result.finished or result.requeue else 1
    leave(code)
    return code


def _command(stage: str, summary: str) -> Command:
    return Command(
        name=stage, summary=summary, schema=stage, distributed=True, run=partial(run_training, stage=stage)
    )


COMMANDS = (
    _command("transfer", "2D to 3D supervision transfer: does this frame belong to this clip?"),
    _command("pretrain", "pretrain a backbone on labels, or by predicting frames"),
    _command("finetune", "finetune on a target dataset and test"),
)
