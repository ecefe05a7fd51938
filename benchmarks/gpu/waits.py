"""Where the host waits for the GPU inside a training step: every place, counted."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from engine import CLASSES, RepeatingLoader, Task, demo_run, device_words
from measure import Numbers, Row, Setting

from cliplift.models import create_model
from cliplift.pipelines.distributed.collectives import start
from cliplift.pipelines.engine import loop
from cliplift.pipelines.engine.deepspeed_setup import set_numerics
from cliplift.pipelines.runs.tracking import Tracker
from cliplift.pipelines.stages.classification import Classifier


@contextlib.contextmanager
def noted_waits(found: list[warnings.WarningMessage]) -> Iterator[None]:
    """Collects a warning for every call inside that makes the host wait for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [w for w in caught if "synchronizing CUDA operation" in str(w.message)]


def host_waits(setting: Setting) -> Numbers:
    """Places where the host waits for the device inside a step, by ZeRO stage and precision, with their counts."""
    found: Numbers = {}
    cases = [
        (0, "tf32"),
        (0, "autocast_bf16"),
        (1, "autocast_bf16"),
        (1, "bf16"),
        (1, "fp16"),
        (2, "bf16"),
        (3, "bf16"),
    ]
    for stage, precision in cases:
        if setting.device.type == "cpu" and precision == "fp16":
            continue
        name = "resnet3d_18" if precision in ("tf32", "autocast_bf16") else "timesformer_small"
        found[f"zero {stage} {precision}"] = count_waits(setting, stage, precision, name)
    return found


def count_waits(setting: Setting, stage: int, precision: str, name: str) -> Numbers:
    side = setting.size(64 if name == "resnet3d_18" else 224, 32)
    words = [
        *device_words(setting), f"engine.zero_stage={stage}", f"engine.precision={precision}",
        "engine.global_batch=2", f"model.name={name}", "data.sampling.frames=8", f"data.crop_pixels={side}",
        f"data.resize_short_side_pixels={side}", "optim.name=adamw", "optim.lr=0.0001", "optim.clip_grad_norm=1.0",
        "schedule.steps=6", "checkpoint.every_steps=100", "engine.channels_last=false", "track.every_steps=2",
    ]  # fmt: skip
    run = demo_run(setting.folder / f"waits-{stage}-{precision}", *words)
    topology = start(run.engine)
    caught: list[warnings.WarningMessage] = []
    shape = (2, 8, side, side)
    Path(run.output).mkdir(parents=True, exist_ok=True)
    tracker = Tracker(run, stage="pretrain", folder=Path(run.output), topology=topology)
    options = {"crop": side} if name.startswith("timesformer") else {}
    net = create_model(name, num_classes=CLASSES, in_frames=8, **options)
    task = Task(Classifier(net, label_smoothing=0.0, multi_label=False), 8, topology.device)
    set_numerics(run.engine, topology.device)
    fitting = loop.Trainer(task, run, RepeatingLoader(shape), topology, tracker)  # type: ignore[arg-type]
    watched_steps = 2
    for step in range(2 + watched_steps):
        if step >= 2 and setting.device.type == "cuda":
            with noted_waits(caught):
                fitting._train_step()
        else:
            fitting._train_step()
    fitting._settle()
    fitting.engine.destroy()
    tracker.finish()
    places = Counter(f"{short_place(w.filename)}:{w.lineno}" for w in caught)
    ours = sum(n for place, n in places.items() if place.startswith("cliplift"))
    return {"per_step": len(caught) / watched_steps, "ours_per_step": ours / watched_steps,
            "places": dict(places.most_common(12))}  # fmt: skip


def short_place(filename: str) -> str:
    for mark in ("deepspeed/", "torch/", "cliplift/", "pipelines/", "models/"):
        at = filename.rfind(mark)
        if at >= 0:
            return ("cliplift/" if mark in ("pipelines/", "models/") else "") + filename[at:]
    return filename


WAITS = Row("waits inside a step", "none of ours", host_waits, 90.0)
