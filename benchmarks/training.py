"""Time the engine's loop against a hand-written PyTorch loop: same model, same batches, same optimizer and schedule.

Both loops run in one process in turns; a step is timed from one request for a batch to the next, so everything the
loop does is in it. Also measured: seconds from starting Python to the first step, and of a further run.

    python benchmarks/training.py --steps 60 --rounds 4
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from cliplift.configs.runs import PretrainRun
from cliplift.models import create_model
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.distributed.collectives import Topology, start
from cliplift.pipelines.engine.loop import fit
from cliplift.pipelines.engine.optim import Schedule
from cliplift.pipelines.runs.tracking import Tracker
from cliplift.pipelines.stages.classification import Classifier

CLASSES, WARM_UP_STEPS = 8, 5
Shape = tuple[int, int, int, int]  # B, T, H, W


class TimedLoader:
    """One prepared batch, over and over; notes when each step asked for it."""

    fingerprint, steps_per_epoch = "benchmark", 1000

    def __init__(self, shape: Shape, clock: Callable[[], float]) -> None:
        self.clock = clock
        B, T, H, W = shape
        generator = torch.Generator().manual_seed(0)
        index = torch.arange(B)
        self.batch = ClipBatch(
            clips=torch.randint(0, 256, (B, T, H, W, 3), dtype=torch.uint8, generator=generator),
            labels=index % CLASSES,
            sample_index=index,
            video_index=index,
            views=torch.zeros_like(index),
            draws=torch.zeros(B, 24),
            epochs=torch.zeros_like(index),
            positions=index,
        )
        self.asked: list[float] = []

    def micro_batches(self, *, start_step: int, stop_step: int, final: bool = False) -> Iterator[ClipBatch]:
        for _ in range(start_step, stop_step):
            self.asked.append(self.clock())
            yield self.batch

    def step_seconds(self) -> list[float]:
        """Seconds of each step but the first few and the last, which ends with a checkpoint."""
        return [b - a for a, b in zip(self.asked, self.asked[1:], strict=False)][WARM_UP_STEPS:]


def prepared(batch: ClipBatch, device: torch.device) -> dict[str, Tensor]:
    batch = batch.to(device)
    return {"clips": batch.clips.permute(0, 4, 1, 2, 3).float() / 255, "labels": batch.labels}


class Task:
    """Classification without data or augmentation cost."""

    best_metric, flops_per_clip = "none", None

    def __init__(self, model: str, shape: Shape, device: torch.device) -> None:
        self.module, self.clip_frames, self.device = network(model, shape), shape[1], device

    def inputs(self, batch: ClipBatch, *, training: bool, step: int) -> dict[str, Tensor]:
        return prepared(batch, self.device)

    def clip_table(self, rows: int) -> None:
        return None

    def evaluate(self, *, topology: Topology) -> dict[str, float]:
        return {}


def network(model: str, shape: Shape) -> nn.Module:
    torch.manual_seed(0)
    net = create_model(model, num_classes=CLASSES, in_frames=shape[1])
    return Classifier(net, label_smoothing=0.0, multi_label=False)


def config(output: str, *, model: str, batch: int, steps: int, stage: int, device: str) -> PretrainRun:
    return PretrainRun.model_validate(
        {
            "stage": "pretrain",
            "name": "benchmark",
            "output": output,
            "data": {"shards": "unused"},
            "model": {"name": model},
            "schedule": {"steps": steps},
            "optim": {"lr": 1e-3, "clip_grad_norm": 1.0},
            "engine": {"device": device, "global_batch": batch, "zero_stage": stage},
            "track": {"wandb": "disabled"},
            "checkpoint": {"every_steps": steps, "keep_best": False},
        }
    )


def engine_loop(
    run: PretrainRun, shape: Shape, topology: Topology, clock: Callable[[], float]
) -> TimedLoader:
    Path(run.output).mkdir(parents=True, exist_ok=True)
    tracker = Tracker(run, stage="pretrain", folder=Path(run.output), topology=topology)
    loader = TimedLoader(shape, clock)
    task = Task(run.model.name, shape, topology.device)
    fit(task=task, run=run, loader=loader, topology=topology, tracker=tracker).release()
    tracker.finish()
    return loader


def plain_loop(
    run: PretrainRun, shape: Shape, device: torch.device, clock: Callable[[], float]
) -> TimedLoader:
    """What one would write by hand: accumulate the loss for the log, clip, step, set the learning rate."""
    module, loader = network(run.model.name, shape).to(device).train(), TimedLoader(shape, clock)
    assert run.schedule.steps is not None
    decay = [p for p in module.parameters() if p.ndim > 1]
    rest = [p for p in module.parameters() if p.ndim <= 1]
    groups = [
        {"params": decay, "weight_decay": run.optim.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=run.optim.lr, fused=device.type == "cuda")
    schedule = Schedule(run.schedule, total_steps=run.schedule.steps)
    losses = 0.0
    for step, batch in enumerate(loader.micro_batches(start_step=0, stop_step=run.schedule.steps)):
        for group in optimizer.param_groups:
            group["lr"] = run.optim.lr * schedule.factor(step)
        optimizer.zero_grad()
        loss = module(prepared(batch, device))["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), run.optim.clip_grad_norm)
        optimizer.step()
        losses += loss.item()
    return loader


def compare(arguments: argparse.Namespace, *, stage: int, topology: Topology) -> dict[str, object]:
    """Medians over all steps of all rounds; which loop goes first alternates."""
    ours: list[float] = []
    plain: list[float] = []
    shape: Shape = tuple(arguments.shape)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(arguments.rounds):
            run = config(f"{folder}/{stage}-{turn}", model=arguments.model, batch=shape[0],
                         steps=arguments.steps, stage=stage, device=arguments.device)  # fmt: skip
            sides = [
                lambda run=run: ours.extend(engine_loop(run, shape, topology, clock).step_seconds()),
                lambda run=run: plain.extend(plain_loop(run, shape, topology.device, clock).step_seconds()),
            ]
            for side in sides if turn % 2 else reversed(sides):
                side()
    a, b = statistics.median(ours), statistics.median(plain)
    return {
        "zero_stage": stage,
        "engine_ms": a * 1e3,
        "plain_ms": b * 1e3,
        "ratio": a / b,
        "steps": len(ours),
    }


def start_up(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds from starting a fresh Python to its first step, and from a second run's call to its first step."""
    done = subprocess.run(
        [sys.executable, __file__, "--only-start", str(time.time()), "--device", arguments.device],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def only_start(launched: float, device: str) -> None:
    shape: Shape = (2, 8, 32, 32)
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name in ("first_run_seconds", "second_run_seconds"):
            begun = time.time()
            run = config(f"{folder}/{name}", model="t3d_tiny", batch=2, steps=2, stage=1, device=device)
            loader = engine_loop(run, shape, start(run.engine), time.time)
            found[name] = loader.asked[1] - (launched if name == "first_run_seconds" else begun)
    print(json.dumps(found))


def main() -> int:
    """Print a table; exit code 1 when a stage's ratio or the start-up is above its limit."""
    parser = argparse.ArgumentParser(description="engine loop against a hand-written PyTorch loop")
    parser.add_argument("--model", default="t3d_tiny")
    parser.add_argument("--shape", type=int, nargs=4, default=(4, 8, 64, 64), metavar=("B", "T", "H", "W"))
    parser.add_argument("--stages", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall",
                        help="cpu: seconds of this process, for a machine others use too")  # fmt: skip
    parser.add_argument("--limit", type=float, default=1.03)
    parser.add_argument("--start-limit", type=float, default=15.0, help="seconds to the first step")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--only-start", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.only_start is not None:
        only_start(arguments.only_start, arguments.device)
        return 0
    started = start_up(arguments)
    topology = start(config("unused", model=arguments.model, batch=arguments.shape[0], steps=1, stage=0,
                            device=arguments.device).engine)  # fmt: skip
    results = [compare(arguments, stage=stage, topology=topology) for stage in arguments.stages]
    print(f"torch {torch.__version__}, {platform.machine()}, {arguments.threads} threads, {arguments.device}")
    print(f"{arguments.clock} time, {arguments.model}, {'x'.join(map(str, arguments.shape))} (B T H W)")
    print("| ZeRO stage | engine ms | plain ms | ratio | steps |\n| ---: | ---: | ---: | ---: | ---: |")
    for r in results:
        print(
            f"| {r['zero_stage']} | {r['engine_ms']:.1f} | {r['plain_ms']:.1f} | {r['ratio']:.3f} | {r['steps']} |"
        )
    print(f"first step after {started['first_run_seconds']:.1f} s; "
          f"of a second run in the same process after {started['second_run_seconds']:.2f} s")  # fmt: skip
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"steps": results, "start_up": started}, indent=2))
    slow = [r for r in results if r["ratio"] > arguments.limit]
    return 1 if slow or started["first_run_seconds"] > arguments.start_limit else 0


if __name__ == "__main__":
    sys.exit(main())
