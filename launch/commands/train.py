"""``cliplift transfer``, ``pretrain`` and ``finetune``: train from a config; ``sweep``: many runs of one config."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cliplift.launch.commands.command import Command, add_json_option, for_programs, print_json

if TYPE_CHECKING:
    from cliplift.configs.load import LoadedRun
    from cliplift.configs.sweeps import SweepRun
    from cliplift.configs.training import TrainingRun
    from cliplift.pipelines.runs.sweeps import SweepRecord
    from cliplift.pipelines.sweep.run import Sweep, SweepResult


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


def add_sweep_options(sweep: argparse.ArgumentParser) -> None:
    sweep.add_argument(
        "--part",
        metavar="I/N",
        help="run part I of N of each rung, from 0, for array jobs; auto reads the scheduler's index",
    )
    sweep.add_argument(
        "--wandb", metavar="FILE", help="write the sweep as a file for `wandb sweep`, and run nothing"
    )
    add_json_option(sweep)


def run_sweep(arguments: argparse.Namespace) -> int:
    """Exit code 0 also where a signal stopped it after saving, or other parts have to finish first."""
    from cliplift.configs.sweeps import SweepRun
    from cliplift.launch.commands.shard import which_part
    from cliplift.launch.commands.subject import command_words, load_stage, prepare_environment, run_located

    loaded = load_stage(arguments, SweepRun)
    part = which_part(arguments.part, os.environ)
    prepare_environment()
    from cliplift.pipelines.sweep import run as sweeping

    sweep = run_located(loaded, lambda: sweeping.plan_sweep(loaded.run, partial(_base_run, loaded)))
    if arguments.dry_run:
        print(_planned(sweep))
        return 0
    if arguments.wandb is not None:
        return _write_wandb(arguments.wandb, loaded, sweep)
    with for_programs(arguments.json):
        result = run_located(
            loaded,
            lambda: sweeping.run_sweep(
                sweep, command=command_words(), part=part, say=partial(print, flush=True)
            ),
        )
    return _say_sweep(result, Path(loaded.run.output), as_json=arguments.json)


def _say_sweep(result: SweepResult, output: Path, *, as_json: bool) -> int:
    from dataclasses import asdict

    from cliplift.pipelines.distributed.collectives import leave
    from cliplift.pipelines.distributed.launchers import find_place

    if find_place(os.environ).rank == 0:
        found = asdict(result.record) | {"finished": result.finished, "output": str(output)}
        if as_json:
            print_json(found)
        else:
            print(sweep_table(result.record, output), flush=True)
        if not result.finished and not as_json:
            why = "stopped by a signal" if result.requeue else "waits for other parts"
            print(f"{result.record.name}: {why}; start it again to go on", flush=True)
    leave(0)
    return 0


def _base_run(loaded: LoadedRun[SweepRun], words: Sequence[str]) -> TrainingRun:
    """The sweep's training config with these words; an error in one of them names the sweep's file."""
    from cliplift.configs.load import COMMAND_LINE
    from cliplift.configs.sections import ConfigError
    from cliplift.launch.commands.subject import load_training

    name = loaded.run.run
    beside = loaded.file.parent / name
    try:
        return load_training(str(beside) if beside.is_file() and not Path(name).exists() else name, words).run
    except ConfigError as error:
        raise error.at(str(loaded.file)) if error.file == COMMAND_LINE else error from None


def _planned(sweep: Sweep) -> str:
    """The resolved config and every trial, as ``--dry-run`` shows them."""
    from cliplift.configs.load import dump_run
    from cliplift.pipelines.sweep.trials import described

    lines = [dump_run(sweep.config), f"# chosen by validation {sweep.metric}, {_end(sweep.maximise)} first"]
    for bracket in sweep.brackets:
        for count, steps in bracket.rungs:
            of_steps = f", {steps} steps each" if steps else ""
            lines.append(f"# {count} of trials {bracket.trials[0]} to {bracket.trials[-1]}{of_steps}")
    lines += [f"# trial {number}: {described(values)}" for number, values in enumerate(sweep.trials)]
    return "\n".join(lines)


def _end(maximise: bool) -> str:
    return "largest" if maximise else "smallest"


def _write_wandb(file: str, loaded: LoadedRun[SweepRun], sweep: Sweep) -> int:
    from cliplift.launch.commands.subject import run_located
    from cliplift.pipelines.sweep.wandb_file import wandb_sweep
    from cliplift.sharding.storage import whole_file

    base = _base_run(loaded, loaded.run.overrides)
    text = run_located(loaded, lambda: wandb_sweep(sweep, base, config_file=loaded.run.run))
    with whole_file(Path(file)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{file}\nnext: wandb sweep {file}")
    return 0


def sweep_table(record: SweepRecord, output: Path) -> str:
    """The trials with a number, best first, and what to do with the best one."""
    from cliplift.pipelines.runs.results import formatted, metric_name
    from cliplift.pipelines.runs.sweeps import shown_value

    ranked = record.best_first()
    heads = ["trial", metric_name(record.metric), "steps", *record.parameters]
    rows = [
        [
            str(run.trial),
            formatted(record.metric, run.value or 0.0),
            "" if run.steps is None else str(run.steps),
            *(shown_value(run.values.get(key)) for key in record.parameters),
        ]
        for run in ranked
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in (heads, *rows)
    ]
    lines += [f"trial {run.trial} has no number: {run.failed}" for run in record.runs if run.failed]
    if ranked:
        best = output / ranked[0].folder
        lines += [
            f"best, on validation data: {best}",
            f"next: cliplift report {output}",
            f"      cliplift evaluate {best}",
        ]
    return "\n".join(lines)


def _command(stage: str, summary: str) -> Command:
    return Command(
        name=stage, summary=summary, schema=stage, distributed=True, run=partial(run_training, stage=stage)
    )


COMMANDS = (
    _command("transfer", "2D to 3D supervision transfer: does this frame belong to this clip?"),
    _command("pretrain", "pretrain a backbone on labels, or by predicting frames"),
    _command("finetune", "finetune on a target dataset and test"),
    Command(
        name="sweep",
        summary="many runs of one config: grid, random draws, halving or hyperband, chosen by validation",
        subject_help="YAML file of the sweep: run, parameters, method",
        schema="sweep",
        distributed=True,
        add_options=add_sweep_options,
        run=run_sweep,
    ),
)
