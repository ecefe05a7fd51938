"""One rank that trains two steps of a config on random clips and says how much memory that took.

Run by ``torch.distributed.run``; prints one JSON line on rank 0: the largest growth of any rank, in bytes. A tiny
engine of the same ZeRO stage trains first, so that modules imported late and thread pools are in the baseline.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.pipelines.distributed.collectives import all_reduce_max, leave, start
from cliplift.pipelines.engine.deepspeed_setup import batch_split, deepspeed_config
from cliplift.pipelines.engine.optim import build_optimizer
from cliplift.pipelines.engine.task import as_trained
from cliplift.pipelines.stages.run import stage_of

RECIPE = Path(__file__).resolve().parents[3] / "configs" / "pretrain" / "demo.yaml"
TINY = [
    "model.name=t3d_tiny",
    "data.sampling.frames=8",
    "data.crop_pixels=32",
    "data.resize_short_side_pixels=32",
]


def status_bytes(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def train(words: list[str], classes: int) -> None:
    import deepspeed

    run = load_run(RECIPE, RUNS, words).run
    topology = start(run.engine)
    micro_batch, accumulation = batch_split(run, world_size=topology.world_size)
    stage = stage_of(run, classes=[str(k) for k in range(classes)])
    built = stage.build_module(weights=False)
    module = as_trained(built, run)
    optimizer = build_optimizer(
        module, run.optim, global_batch=run.engine.global_batch, device=topology.device
    )
    config = deepspeed_config(run, world_size=topology.world_size)
    engine: Any = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )[0]
    del module, optimizer
    for _ in range(2):
        for _ in range(accumulation):
            inputs = stage.example_inputs(built, micro_batch=micro_batch, world_size=topology.world_size)
            inputs["clips"].uniform_()
            engine.backward(engine(inputs)["loss"])
            if not engine.is_gradient_accumulation_boundary():
                engine.step()
        engine.step()
    engine.destroy()


def main() -> None:
    words, classes = json.loads(sys.argv[1]), int(sys.argv[2])
    engine_words = [w for w in words if w.startswith(("engine.", "optim."))]
    train([*engine_words, *TINY], classes)
    gc.collect()
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    train(words, classes)
    topology = start(load_run(RECIPE, RUNS, words).run.engine)
    grown = all_reduce_max(float(status_bytes("VmHWM") - before), topology)
    if topology.is_main:
        print(json.dumps({"grown_bytes": int(grown), "baseline_bytes": before}))
    leave(0)


if __name__ == "__main__":
    main()
