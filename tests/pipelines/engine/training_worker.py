"""Run by torchrun: one training case with a small network and fixed data; prints losses as JSON from rank 0.

Not a test itself. The cases are compared by test_engine.py.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cliplift.configs.runs import PretrainRun
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.distributed.collectives import Topology, leave, start
from cliplift.pipelines.engine.loop import fit
from cliplift.pipelines.engine.partitioned_build import built_in_parts
from cliplift.pipelines.runs.tracking import Tracker

CLASSES, SAMPLES, FRAMES, SIDE = 3, 48, 4, 8


def sample(index: int) -> Tensor:
    return torch.randint(
        0, 256, (FRAMES, SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index)
    )


class FixedLoader:
    """The engine's loader interface over numbers made from the sample's index."""

    fingerprint = "fixed"
    classes = ("a", "b", "c")
    slow_seconds = 0.0

    def __init__(self, run: PretrainRun, topology: Topology) -> None:
        self.G, self.topology = run.engine.global_batch, topology
        self.micro = run.engine.micro_batch or self.G // topology.world_size
        self.steps_per_epoch = SAMPLES // self.G
        self.seen = Path(run.output) / f"seen-{topology.rank}-of-{topology.world_size}.txt"

    def micro_batches(self, *, start_step: int, stop_step: int, final: bool = False) -> Iterator[ClipBatch]:
        for step in range(start_step, stop_step):
            time.sleep(self.slow_seconds)  # so that a stop finds the run before its end
            mine = range(step * self.G + self.topology.rank, (step + 1) * self.G, self.topology.world_size)
            for at in range(0, len(mine), self.micro):
                index = torch.tensor([p % SAMPLES for p in mine[at : at + self.micro]])
                with self.seen.open("a") as file:
                    file.write(f"{step} {' '.join(map(str, mine[at : at + self.micro]))}\n")
                yield ClipBatch(
                    clips=torch.stack([sample(int(i)) for i in index]),
                    labels=index % CLASSES,
                    sample_index=index,
                    video_index=index,
                    views=torch.zeros_like(index),
                    draws=torch.zeros(len(index), 24),
                    epochs=torch.zeros_like(index),
                    positions=index,
                )


class Net(nn.Module):
    """Convolution, GroupNorm and two layers: no statistics over the batch, so that batches can be split."""

    def __init__(self, poison_step: int | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv3d(8, 8, 2), nn.Flatten()
        )
        self.head = nn.Linear(8 * 5 * 5, CLASSES)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.poison_step = poison_step

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = self.head(self.body(inputs["clips"]))
        loss = nn.functional.cross_entropy(logits.float(), inputs["labels"])
        if self.training:
            if self.poison_step is not None and int(self.calls) == self.poison_step:
                loss = loss * float("nan")
            self.calls += 1
        return {"loss": loss}


class Task:
    best_metric = "accuracy"
    clip_frames = FRAMES

    def __init__(self, poison_step: int | None = None, *, run: PretrainRun | None = None) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = Net(poison_step)
        if run is not None:
            torch.manual_seed(0)
            self.module = built_in_parts(lambda: Net(poison_step), run.engine, start(run.engine))
        self.evaluated = 0

    def inputs(self, batch: ClipBatch, *, training: bool, step: int) -> dict[str, Tensor]:
        return {"clips": batch.clips.permute(0, 4, 1, 2, 3).float() / 255, "labels": batch.labels}

    flops_per_clip = None

    def clip_table(self, rows: int) -> None:
        return None

    def evaluate(self, *, topology: Topology) -> dict[str, float]:
        self.evaluated += 1
        return {"accuracy": 1.0 / self.evaluated}


def run_config(output: str, **changes: Any) -> PretrainRun:
    tree: dict[str, Any] = {
        "stage": "pretrain",
        "name": "case",
        "output": output,
        "data": {"shards": "unused"},
        "model": {"name": "t3d_tiny"},
        "schedule": {"steps": 8, "name": "cosine"},
        "optim": {"lr": 0.01},
        "engine": {"device": "cpu", "global_batch": 8},
        "track": {"wandb": "disabled", "every_steps": 1},
        "checkpoint": {"every_steps": 4},
    }
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        if leaf:
            tree[section] = {**tree[section], leaf: value}
        else:
            tree[section] = value
    return PretrainRun.model_validate(tree)


def train(run: PretrainRun, *, poison_step: int | None = None) -> dict[str, Any]:
    """Train one case; the numbers tests compare."""
    topology = start(run.engine)
    Path(run.output).mkdir(parents=True, exist_ok=True)
    task = Task(poison_step, run=run)
    tracker = Tracker(run, stage="pretrain", folder=Path(run.output), topology=topology)
    result = fit(task=task, run=run, loader=FixedLoader(run, topology), topology=topology, tracker=tracker)  # type: ignore[arg-type]
    checksum = magnitudes(engine_tensors(result.engine).values())
    if not result.interrupted:
        assert magnitudes(result.weights.values()) == checksum, "what is saved is what the engine holds"
    result.release()
    tracker.finish()
    return {
        "losses": losses(Path(run.output)) if topology.is_main else [],
        "checksum": checksum,
        "interrupted": result.interrupted,
        "skipped": result.skipped_steps,
        "steps": result.steps,
    }


def engine_tensors(engine: Any) -> dict[str, Tensor]:
    """Every parameter (fp32: the masters where there are any) and persistent buffer of an engine, whole.

    Gathered by DeepSpeed's own functions, whatever checkpoints do.
    """
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    module = engine.module
    kept = module.state_dict().keys()
    found = {name: buffer.clone() for name, buffer in module.named_buffers() if name in kept}
    for name, parameter in module.named_parameters():
        master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if master is None:
            with GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
                master = parameter.detach().float().clone()
        found[name] = master.detach()
    return found


def magnitudes(tensors: Iterable[Tensor]) -> float:
    """A sum that does not depend on the tensors' order."""
    return math.fsum(float(tensor.double().abs().sum()) for tensor in tensors)


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def main(results: Path, cases: list[dict[str, Any]]) -> None:
    """Train the cases one after the other, on every rank; rank 0 writes what they gave. Ends a process among others."""
    for case in cases:
        case["output"] = case["output"].replace("{rank}", os.environ.get("RANK", "0"))
    FixedLoader.slow_seconds = max(case.pop("slow_seconds", 0.0) for case in cases)
    found = [train(run_config(**case)) for case in cases]
    import torch.distributed as dist

    if dist.get_rank() == 0:
        results.write_text(json.dumps(found))
    leave(0)


if __name__ == "__main__":
    # argv: results file, then one JSON object of config changes per case; an output may name the {rank}.
    main(Path(sys.argv[1]), [json.loads(case) for case in sys.argv[2:]])
