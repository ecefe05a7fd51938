"""The one training loop of all stages, on ``deepspeed.initialize``: one process or many, ZeRO 0 to 3, CPU or GPU.

A step reads the micro-batches of its positions, backpropagates each, and makes one update. What the run is at is one
integer, the step; beside seed and data fingerprint it fixes every later sample and every later learning rate.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cliplift.configs.sections import ConfigError
from cliplift.configs.training import TrainingRun
from cliplift.models.layers import checkpoint_blocks
from cliplift.pipelines import checkpoint
from cliplift.pipelines.clips import ClipBatch
from cliplift.pipelines.deepspeed_config import batch_split, deepspeed_config
from cliplift.pipelines.distributed import Topology, all_reduce_max, all_reduce_mean, broadcast_object
from cliplift.pipelines.optim import (
    Schedule,
    build_optimizer,
    network_with_blocks,
    peak_lr,
    total_steps,
)
from cliplift.pipelines.sharded_state import (
    gathered_optimizer,
    gathered_parameters,
    put_parameters,
    restore_master_weights,
    restore_optimizer,
)
from cliplift.pipelines.signals import caught_signals
from cliplift.pipelines.tracking import Tracker
from cliplift.pipelines.training_task import FitResult, Loader, TrainingTask
from cliplift.pipelines.training_window import TrainingWindow

CHECKPOINTS = "checkpoints"
BEST = "best"


class DivergedError(ValueError):
    """The loss or its gradient was not finite for too many steps in a row."""


def fit(
    *, task: TrainingTask, run: TrainingRun, loader: Loader, topology: Topology, tracker: Tracker
) -> FitResult:
    """Train to the end of the schedule, or to a signal.

    Resumes from the newest usable checkpoint in ``run.output/checkpoints`` unless ``checkpoint.resume`` is never.

    Raises:
        ConfigError: the checkpoint belongs to other data, another seed or another batch size.
        DivergedError: ``engine.max_bad_steps_in_row`` steps in a row had no finite loss and gradient.
    """
    return _Fit(task, run, loader, topology, tracker).run_to_end()


class _Fit:
    """One call of :func:`fit`."""

    def __init__(
        self, task: TrainingTask, run: TrainingRun, loader: Loader, topology: Topology, tracker: Tracker
    ) -> None:
        self.task, self.run, self.loader, self.topology, self.tracker = task, run, loader, topology, tracker
        self.folder = Path(run.output) / CHECKPOINTS
        self.total = total_steps(run.schedule, steps_per_epoch=loader.steps_per_epoch)
        self.schedule = Schedule(run.schedule, total_steps=self.total)
        self.lr = peak_lr(run.optim, global_batch=run.engine.global_batch)
        self.accumulation = batch_split(run, world_size=topology.world_size)[1]
        self.step, self.skipped, self.bad_in_row = 0, 0, 0
        self.best: float | None = None
        self.metrics: dict[str, float] = {}
        self.window = TrainingWindow()
        self.engine = self._engine()

    def _engine(self) -> Any:
        """The DeepSpeed engine over the module, with the newest checkpoint's state in it."""
        import deepspeed

        saved = self._newest()
        engine_config = self.run.engine
        module = self.task.module.to(self.topology.device)
        _refuse_half_batchnorm(module, self.run)
        if engine_config.sync_batchnorm:
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        if saved is not None:
            checkpoint.load_module(module, saved)
        if engine_config.checkpoint_blocks_share:
            _, network = network_with_blocks(module, key="engine.checkpoint_blocks_share")
            checkpoint_blocks(network, engine_config.checkpoint_blocks_share)
        optimizer = build_optimizer(
            module, self.run.optim, global_batch=engine_config.global_batch, device=self.topology.device
        )
        if self.topology.is_main:
            _check_space(self.folder, module, self.run)
        config = deepspeed_config(self.run, world_size=self.topology.world_size)
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
        if saved is not None:
            restore_master_weights(engine, saved.parameters)
            restore_optimizer(engine, saved.optimizer)
            checkpoint.set_random_state(saved.random_state, self.topology.device)
            self.schedule.load(saved.state["schedule"])
            self.step, self.skipped = saved.state["step"], saved.state["skipped_steps"]
            self.best, self.metrics = saved.state["best"], dict(saved.state["metrics"])
            self._say(f"continues from step {self.step}")
        self.tracker.resume_at(self.step)
        if engine_config.compile:
            engine.compile()
        return engine

    def _newest(self) -> checkpoint.Snapshot | None:
        """Rank 0 chooses the checkpoint, so that no rank resumes from another one than the rest."""
        path = None
        if self.topology.is_main and self.run.checkpoint.resume == "never":
            checkpoint.set_aside(self.folder, say=self._say)
        elif self.topology.is_main:
            path = checkpoint.newest_usable(self.folder, say=self._say)
        path = broadcast_object(path, self.topology)
        if path is None:
            return None
        saved = checkpoint.load(path, topology=self.topology)
        for key, now in self._identity().items():
            if saved.state["identity"][key] != now:
                raise ConfigError(
                    f"the checkpoint {path} was made with {saved.state['identity'][key]!r}, this run has {now!r}",
                    key=key,
                    value=now,
                    hint="use another output, or checkpoint.resume=never",
                )
        return saved

    def _identity(self) -> dict[str, Any]:
        """What must not change between stop and resume for the run to be the same run."""
        return {
            "data.shards": self.loader.fingerprint,
            "seed": self.run.seed,
            "engine.global_batch": self.run.engine.global_batch,
            "optim.name": self.run.optim.name,
            "schedule": self.total,
        }

    def run_to_end(self) -> FitResult:
        started, first_step = time.monotonic(), self.step
        self.tracker.start(step=self.step, total=self.total)
        interrupted = False
        with caught_signals() as caught:
            batches = self.loader.micro_batches(start_step=self.step, stop_step=self.total)
            while self.step < self.total:
                self._train_step(batches)
                last = self.step == self.total
                if last or self._due(self.run.evaluation.every_steps):
                    self._evaluate()
                if last or self._due(self.run.checkpoint.every_steps):
                    self._save()
                if not last and self._agreed(bool(caught)):
                    interrupted = True
                    self._save()
                    break
        seconds = time.monotonic() - started
        clips = (self.step - first_step) * self.run.engine.global_batch
        if not interrupted:
            self._take_best()
        return FitResult(
            steps=self.step,
            metrics=self.metrics,
            interrupted=interrupted,
            seconds=seconds,
            clips_per_second=clips / seconds if seconds else 0.0,
            skipped_steps=self.skipped,
            engine=self.engine,
        )

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _train_step(self, batches: Iterator[ClipBatch]) -> None:
        """One optimizer step over its micro-batches."""
        self.engine.train()
        begun = time.monotonic()
        waited = 0.0
        sums: dict[str, Any] = {}
        for _ in range(self.accumulation):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            inputs = self._cast(self.task.inputs(batch, training=True, step=self.step))
            outputs = self.engine(inputs)
            self.engine.backward(outputs["loss"])
            for name, value in outputs.items():
                sums[name] = sums.get(name, 0.0) + value.detach().float() / self.accumulation
            self.window.failed += len(batch.failed)
            if not self.engine.is_gradient_accumulation_boundary():
                self.engine.step()
        lr = self.schedule.apply(self.engine.optimizer, self.step, self.lr)
        norm = self._update(sums["loss"])
        self.step += 1
        self.window.add(sums, seconds=time.monotonic() - begun, waited=waited)
        if self.step % self.run.track.every_steps == 0 or self.step == self.total:
            self._log(lr, norm)

    def _cast(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Clips in the layout and precision asked for; labels and indices stay as they are.

        Only the input is channels-last: convolutions follow it, while ZeRO needs the weights contiguous.
        """
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.run.engine.precision)
        if dtype is not None:
            inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        if self.run.engine.channels_last:
            inputs["clips"] = inputs["clips"].contiguous(memory_format=torch.channels_last_3d)
        return inputs

    def _update(self, loss: Tensor) -> float | None:
        """The optimizer update, unless loss or gradient is not finite on any rank. Returns the gradient norm."""
        finite = all_reduce_max(float(not bool(torch.isfinite(loss))), self.topology) == 0.0
        norm: float | None = None
        if self.engine.zero_optimization_stage() == 0:
            gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            finite = finite and math.isfinite(norm)
            if not finite:
                for parameter in self.engine.module.parameters():
                    parameter.grad = None  # torch optimizers pass over parameters without a gradient
            self.engine.step()
        else:
            before = self.engine.skipped_steps
            self.engine.step()
            norm = _norm(self.engine.get_global_grad_norm())
            # Stages 1 to 3 find the overflow themselves, on all ranks.
            finite = finite and self.engine.skipped_steps == before
        self._count_bad(finite)
        return norm

    def _count_bad(self, finite: bool) -> None:
        if finite:
            self.bad_in_row = 0
            return
        self.skipped += 1
        self.bad_in_row += 1
        self._say(f"step {self.step}: loss or gradient is not finite; the update was skipped")
        if self.bad_in_row >= self.run.engine.max_bad_steps_in_row:
            raise DivergedError(
                f"{self.run.name}: {self.bad_in_row} steps in a row without a finite loss and gradient, last step "
                f"{self.step}: lower optim.lr, set optim.clip_grad_norm, or use engine.precision=fp32"
            )

    def _log(self, lr: float, norm: float | None) -> None:
        window, self.window = self.window, TrainingWindow()
        names = sorted(window.sums)
        means = all_reduce_mean(
            torch.stack([window.sums[n] / window.steps for n in names]), self.topology
        ).tolist()
        clips_per_second = window.steps * self.run.engine.global_batch / window.seconds
        numbers: dict[str, float | None] = {f"train/{n}": v for n, v in zip(names, means, strict=True)}
        numbers |= {
            "train/lr": lr,
            "train/grad_norm": norm,
            "train/epoch": self.step / self.loader.steps_per_epoch,
            "speed/clips_per_second": clips_per_second,
            "speed/frames_per_second": clips_per_second * self.task.clip_frames,
            "speed/step_seconds": window.seconds / window.steps,
            "speed/data_wait_share": all_reduce_max(window.waited / window.seconds, self.topology),
            "memory/process_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "memory/gpu_gib": _gpu_gib(self.topology),
            "data/failed_samples": float(window.failed),
            "train/skipped_steps": float(self.skipped),
        }
        self.tracker.log(self.step, numbers)
        left = (self.total - self.step) * window.seconds / window.steps
        self.tracker.progress(
            self.step,
            self.total,
            f"loss {numbers['train/loss']:.4f}  lr {lr:.2e}  {clips_per_second:.1f} clips/s"
            f"  data {100 * (numbers['speed/data_wait_share'] or 0):.0f} %  left {left:.0f} s",
        )

    def _evaluate(self) -> None:
        self.engine.eval()
        with torch.no_grad():
            metrics = self.task.evaluate(topology=self.topology)
        self.engine.train()
        self.metrics = metrics
        self.tracker.log(self.step, {f"eval/{name}": value for name, value in metrics.items()})
        found = metrics.get(self.task.best_metric)
        if found is None:
            return
        if self.schedule.observe(found):
            self._say(f"step {self.step}: no improvement, learning rate lowered")
        if self.best is None or found > self.best:
            self.best = found
            if self.run.checkpoint.keep_best and self.run.evaluation.every_steps is not None:
                self._save(self.folder / BEST, keep_last=1)

    def _save(self, folder: Path | None = None, *, keep_last: int | None = None) -> None:
        module = self.engine.module
        snapshot = checkpoint.Snapshot(
            parameters=gathered_parameters(self.engine),
            optimizer=gathered_optimizer(self.engine),
            buffers=dict(module.named_buffers()),
            random_state=checkpoint.random_state(self.topology.device),
            state={
                "step": self.step,
                "skipped_steps": self.skipped,
                "best": self.best,
                "metrics": self.metrics,
                "schedule": self.schedule.state(),
                "identity": self._identity(),
                "tracker_id": self.tracker.run_id,
            },
        )
        keep = keep_last or self.run.checkpoint.keep_last
        checkpoint.save(folder or self.folder, snapshot, topology=self.topology, keep_last=keep)

    def _take_best(self) -> None:
        """Put the best evaluated weights into the module where they are kept and are not the last ones."""
        path = None
        if self.topology.is_main and self.run.checkpoint.keep_best:
            path = checkpoint.newest_usable(self.folder / BEST, say=self._say)
        path = broadcast_object(path, self.topology)
        if path is None:
            return
        saved = checkpoint.load(path, topology=self.topology)
        if saved.state["step"] != self.step:
            self._say(f"takes the best weights, of step {saved.state['step']}")
            put_parameters(self.engine, saved.parameters)
            checkpoint.load_buffers(self.engine.module, saved)
            self.metrics = dict(saved.state["metrics"])

    def _agreed(self, caught: bool) -> bool:
        """All ranks stop at the same step when a signal reached any of them."""
        return all_reduce_max(float(caught), self.topology) > 0

    def _say(self, text: str) -> None:
        if self.topology.is_main:
            print(f"{self.run.name}: {text}", flush=True)


def _check_space(folder: Path, module: nn.Module, run: TrainingRun) -> None:
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    checkpoint.check_space(
        folder,
        parameters=sum(n for n, _ in sizes),
        trainable=sum(n for n, trained in sizes if trained),
        moments=2 if run.optim.name == "adamw" else int(run.optim.momentum > 0),
    )


def _refuse_half_batchnorm(module: nn.Module, run: TrainingRun) -> None:
    """DeepSpeed casts parameters and leaves buffers fp32: BatchNorm then mixes the two and torch refuses."""
    half = run.engine.precision in ("bf16", "fp16")
    if half and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
        raise ConfigError(
            "casts weights, which BatchNorm does not survive",
            key="engine.precision",
            value=run.engine.precision,
            hint="use autocast_bf16, which keeps BatchNorm in fp32",
        )


def _norm(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    return number if number >= 0 else None  # DeepSpeed says -1 for an overflow


def _gpu_gib(topology: Topology) -> float | None:
    if topology.device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(topology.device) / 2**30
