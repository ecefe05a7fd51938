"""``cliplift bench data|train CONFIG``: how fast a run's loader, or its training step, is on this machine.

``cliplift bench gpu --minutes 7 --output FILE``: the whole table of docs/performance.md, from a checkout.

``cliplift bench data CONFIG``: clips per second of the run's loader, where its time goes, and cores for GPUs.

``cliplift bench train CONFIG``: where a training step's time goes, on the run's own data or a synthetic batch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cliplift.launch.commands.command import Command

if TYPE_CHECKING:
    from cliplift.configs.load import LoadedRun
    from cliplift.configs.training import TrainingRun

SUBJECTS = ("data", "train", "gpu")


def add_options(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--steps", type=int, default=50, help="batches, or training steps, that are timed")
    bench.add_argument("--warm-up", type=int, default=10, help="batches or steps before")
    bench.add_argument("--minutes", type=float, default=7.0, help="gpu: rows run until they are over")
    bench.add_argument("--output", default=None, help="JSON file for the numbers")
    bench.add_argument("--gpus", type=int, default=1, help="data: ranks that share the global batch")
    bench.add_argument(
        "--appetite",
        type=float,
        default=None,
        help="data: clips/s one GPU takes; says how many cores feed --gpus",
    )
    bench.add_argument(
        "--synthetic", action="store_true", help="train: one batch made up and used again, no loader"
    )


def bench_data(
    loaded: LoadedRun[TrainingRun],
    *,
    batches: int,
    warm_up: int,
    gpus: int,
    clips_per_second_per_gpu: float | None,
    output: str | None,
) -> int:
    """Measure the loader of one rank, print the numbers, and write ``output`` as JSON where given."""
    import torch

    from cliplift.configs.sections import ConfigError
    from cliplift.pipelines.cost.loading_speed import measure_loading
    from cliplift.pipelines.engine.deepspeed_setup import batch_split

    run = loaded.run
    torch.set_num_threads(max(1, torch.get_num_threads() if run.data.workers == 0 else 1))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        micro_batch, _ = batch_split(run, world_size=gpus)
        speed = measure_loading(
            run.data,
            seed=run.seed,
            micro_batch=micro_batch,
            batches=batches,
            warm_up=warm_up,
            device=device,
        )
    except ConfigError as error:
        raise loaded.locate(error) from None
    print(
        f"{run.name}: {', '.join(run.data.urls)}, {run.data.decoder}, {run.data.sampling.frames} frames of "
        f"{run.data.crop_pixels} pixels, {micro_batch} clips per batch"
    )
    print(speed.table())
    facts = json.loads(speed.json())
    if clips_per_second_per_gpu is not None:
        cores = speed.cores_for(gpus=gpus, clips_per_second_per_gpu=clips_per_second_per_gpu)
        print(
            f"{gpus} GPUs that take {clips_per_second_per_gpu:g} clips/s each need {cores} cores to decode: "
            f"data.workers={-(-cores // gpus)} per rank"
        )
        facts |= {"gpus": gpus, "clips_per_second_per_gpu": clips_per_second_per_gpu, "cores": cores}
    else:
        print("with --gpus N --appetite CLIPS_PER_SECOND it says how many cores feed N GPUs")
    if output is not None:
        from cliplift.pipelines.runs.folder import write_json

        write_json(Path(output), facts)
    return 0


def bench_train(
    loaded: LoadedRun[TrainingRun],
    *,
    steps: int,
    warm_up: int,
    synthetic: bool,
    output: str | None,
) -> int:
    """Time a run's steps, print a table, and write ``output`` as JSON where given."""
    from cliplift.configs.sections import ConfigError
    from cliplift.pipelines.cost.step_timing import time_steps
    from cliplift.pipelines.distributed.collectives import leave
    from cliplift.pipelines.runs.folder import write_text

    try:
        timing, topology = time_steps(loaded.run, steps=steps, warm_up=warm_up, synthetic=synthetic)
    except ConfigError as error:
        raise loaded.locate(error) from None
    if topology.is_main:
        data = "a synthetic batch" if synthetic else "the run's data"
        engine = loaded.run.engine
        print(
            f"{loaded.run.name}: {loaded.run.model.name}, {topology.world_size} x {topology.device.type}, "
            f"ZeRO {engine.zero_stage}, {engine.precision}, {engine.global_batch} clips per step, {data}"
        )
        print(timing.table())
        if output is not None:
            write_text(Path(output), timing.json() + "\n")
    leave(0)
    return 0


def bench_gpu(*, minutes: float, output: str | None) -> int:
    """Run ``benchmarks/gpu`` of the checkout this package lies in, in a process of its own.

    Raises:
        ConfigError: the package was installed without its benchmarks.
    """
    from cliplift.configs.sections import ConfigError

    program = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"
    if not (program / "__main__.py").exists():
        raise ConfigError(
            "is not part of an installed package",
            file=str(program),
            hint="run it from a checkout of the repository",
        )
    words = [sys.executable, str(program), "--minutes", str(minutes), "--output", output or "gpu.json"]
    return subprocess.run(words, check=False).returncode


def run_bench(arguments: argparse.Namespace) -> int:
    """Measure what the first word names; the second is the config, the rest are overrides."""
    from cliplift.configs.sections import ConfigError

    if arguments.subject not in SUBJECTS:
        raise ConfigError(
            f"{arguments.subject!r} cannot be measured",
            file="command line",
            hint=f"say one of {', '.join(SUBJECTS)}, then the config",
        )
    if arguments.subject == "gpu":
        return bench_gpu(minutes=arguments.minutes, output=arguments.output)
    loaded = _load(list(arguments.rest))
    if arguments.subject == "data":
        return bench_data(
            loaded,
            batches=arguments.steps,
            warm_up=arguments.warm_up,
            gpus=arguments.gpus,
            clips_per_second_per_gpu=arguments.appetite,
            output=arguments.output,
        )

    return bench_train(
        loaded,
        steps=arguments.steps,
        warm_up=arguments.warm_up,
        synthetic=arguments.synthetic,
        output=arguments.output,
    )


def _load(words: list[str]) -> LoadedRun[TrainingRun]:
    from cliplift.configs.sections import ConfigError
    from cliplift.launch.commands.subject import load_training

    if not words or "=" in words[0]:
        raise ConfigError("names no config", file="command line", hint="write cliplift bench data CONFIG")
    return load_training(words[0], words[1:])


COMMANDS = (
    Command(
        name="bench",
        summary="measure on this machine: a run's loader (data), its training step (train), or a GPU (gpu, no CONFIG)",
        subject="data|train|gpu",
        subject_help="what is measured",
        rest="CONFIG|key=value",
        rest_help="YAML file or packaged recipe of a training run, then overrides",
        distributed=True,
        add_options=add_options,
        run=run_bench,
    ),
)
