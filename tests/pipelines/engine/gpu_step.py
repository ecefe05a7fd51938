"""Run on a GPU by test_host_waits.py: whole steps while every wait of the host is an error, DeepSpeed's own aside."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cliplift.configs.data import AugmentConfig
from cliplift.models import create_model
from cliplift.pipelines.data.augment import DeviceAugment, mix_clips
from cliplift.pipelines.data.batch import NUM_DRAWS, ClipBatch
from cliplift.pipelines.distributed.collectives import start
from cliplift.pipelines.engine import loop
from cliplift.pipelines.engine.deepspeed_setup import set_numerics
from cliplift.pipelines.runs.tracking import Tracker
from cliplift.pipelines.stages.classification import Classifier

spec = importlib.util.spec_from_file_location("worker", Path(__file__).with_name("training_worker.py"))
assert spec is not None
assert spec.loader is not None
worker: Any = importlib.util.module_from_spec(spec)
sys.modules["worker"] = worker
spec.loader.exec_module(worker)

AUGMENT = AugmentConfig.model_validate(
    {"flip": True, "contrast": 0.2, "rand_augment_ops": 4, "erase_probability": 0.5, "mixup_alpha": 0.8}
)


class Repeating:
    """One batch in pinned memory, as a worker hands it over."""

    fingerprint, steps_per_epoch = "fixed", 100

    def __init__(self) -> None:
        index = torch.arange(4)
        self.batch = ClipBatch(
            clips=torch.randint(0, 256, (4, 8, 32, 32, 3), dtype=torch.uint8),
            labels=index % 3,
            sample_index=index,
            video_index=index,
            views=index,
            draws=torch.rand(4, NUM_DRAWS),
            epochs=torch.zeros_like(index),
            positions=index,
        ).pin_memory()

    def micro_batches(self, *, start_step: int, stop_step: int, final: bool = False) -> Any:
        return (self.batch for _ in range(start_step, stop_step))


class Task(worker.Task):  # type: ignore[misc, name-defined]
    """A network with augmentation and mixing, all on the device."""

    def __init__(self, name: str, device: torch.device) -> None:
        torch.manual_seed(0)
        options = {"crop": 32} if name.startswith("timesformer") else {}
        net: Any = create_model(name, num_classes=3, in_frames=8, **options)
        self.module = Classifier(net, label_smoothing=0.1, multi_label=False)
        self.device, self.views = device, DeviceAugment(AUGMENT, net.input_spec, training=True)

    def inputs(self, batch: ClipBatch, *, training: bool, step: int) -> dict[str, torch.Tensor]:
        batch = batch.to(self.device)
        clips, targets = mix_clips(
            self.views(batch), batch.labels, num_classes=3, augment=AUGMENT, draws=batch.draws
        )
        return {"clips": clips, "labels": batch.labels, "targets": targets}


def outside(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call of DeepSpeed's, in which waiting is its own affair."""

    def allowed(*args: Any, **words: Any) -> Any:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            return call(*args, **words)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return allowed


def main(folder: Path, stage: int, precision: str) -> None:
    name = "timesformer_small" if precision == "bf16" else "t3d_tiny"
    run = worker.run_config(
        str(folder),
        engine={"device": "cuda", "global_batch": 8, "micro_batch": 4, "zero_stage": stage,
                "precision": precision, "loss_spike_factor": 5.0},
        optim={"name": "adamw", "lr": 1e-4, "clip_grad_norm": 1.0, "average_decay": 0.9},
        track={"wandb": "disabled", "every_steps": 1},
    )  # fmt: skip
    topology = start(run.engine)
    set_numerics(run.engine, topology.device)
    tracker = Tracker(run, stage="pretrain", folder=folder, topology=topology)
    fit: Any = loop.Trainer(Task(name, topology.device), run, Repeating(), topology, tracker)  # type: ignore[arg-type]
    fit.engine.step, fit.engine.backward = outside(fit.engine.step), outside(fit.engine.backward)
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")  # the first steps build tables
        assert fit._train_step()
    torch.cuda.set_sync_debug_mode("default")
    assert fit._settle()
    print("steps done:", fit.state.step, "skipped:", fit.state.skipped)
    assert fit.state.skipped == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
