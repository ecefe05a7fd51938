"""``cliplift bench data CONFIG``: clips a second of the run's loader, where its time goes, and cores for GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cliplift.configs.load import LoadedRun
from cliplift.configs.sections import ConfigError


def bench_data(
    loaded: LoadedRun[Any],
    *,
    batches: int,
    warm_up: int,
    gpus: int,
    clips_per_second_per_gpu: float | None,
    output: str | None,
) -> int:
    """Measure the loader of one rank, print the numbers, and write ``output`` as JSON where given."""
    import torch

    from cliplift.pipelines.cost.loading_speed import measure_loading
    from cliplift.pipelines.engine.deepspeed_config import batch_split

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
        f"{run.data.crop_pixels} pixels, {micro_batch} clips a batch"
    )
    print(speed.table())
    facts = json.loads(speed.json())
    if clips_per_second_per_gpu is not None:
        cores = speed.cores_for(gpus=gpus, clips_per_second_per_gpu=clips_per_second_per_gpu)
        print(
            f"{gpus} GPUs that take {clips_per_second_per_gpu:g} clips/s each need {cores} cores to decode: "
            f"data.workers={-(-cores // gpus)} a rank"
        )
        facts |= {"gpus": gpus, "clips_per_second_per_gpu": clips_per_second_per_gpu, "cores": cores}
    else:
        print("with --gpus N --appetite CLIPS_PER_SECOND it says how many cores feed N GPUs")
    if output is not None:
        Path(output).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0
