"""The one training loop of all stages, on ``deepspeed.initialize``: one process or many, ZeRO 0 to 3, CPU or GPU.

A step reads the micro-batches of its positions, backpropagates each, and makes one update. What the run is at is one
integer, the step; beside seed and data fingerprint it fixes every later sample and every later learning rate.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cliplift.configs.training import TrainingRun
from cliplift.pipelines.data.loader import ClipBatch
from cliplift.pipelines.distributed.collectives import Topology, all_reduce_max, all_reduce_mean
from cliplift.pipelines.engine.batchnorm import estimate_statistics, lagging_statistics
from cliplift.pipelines.engine.deepspeed_setup import batch_split
from cliplift.pipelines.engine.faults import (
    DivergedError,
    LossGuard,
    Verdict,
    beat,
    caught_signals,
    stacks_of_last_hang,
    watched,
)
from cliplift.pipelines.engine.optim import Schedule, peak_lr, total_steps
from cliplift.pipelines.engine.state import RunState, run_identity
from cliplift.pipelines.engine.task import FitResult, Loader, TrainingTask
from cliplift.pipelines.engine.telemetry import StepProfiler, TrainingWindow, peak_tflops
from cliplift.pipelines.runs.tracking import Tracker

SAID = {
    "spike": "the loss is far above those before it",
    "not finite": "loss or gradient is not finite",
    "overflow": "fp16 overflow, the loss scale is lowered",
}


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
        self.total = total_steps(run.schedule, steps_per_epoch=loader.steps_per_epoch)
        self.schedule = Schedule(run.schedule, total_steps=self.total)
        self.lr = peak_lr(run.optim, global_batch=run.engine.global_batch)
        self.accumulation = batch_split(run, world_size=topology.world_size)[1]
        self.bad_in_row = 0
        self.guard = LossGuard(run.engine)
        self.stop_asked = False
        self.caught: list[int] = []
        self.window = TrainingWindow()
        self.profiler = StepProfiler(
            run.track.profile_steps,
            folder=Path(run.output) / "profile",
            rank=topology.rank,
            device=topology.device,
        )
        self.state = RunState(
            task.module,
            run,
            schedule=self.schedule,
            identity=run_identity(run, data_fingerprint=loader.fingerprint, total_steps=self.total),
            topology=topology,
            say=self._say,
        )
        self.engine = self.state.engine
        self.tracker.resume_at(self.state.step, data_offset=self.state.data_offset)
        self.batches = self._batches()

    def _batches(self) -> Iterator[ClipBatch]:
        state = self.state
        return self.loader.micro_batches(start_step=state.data_step, stop_step=self.total + state.data_offset)

    def run_to_end(self) -> FitResult:
        started, first_step = time.monotonic(), self.state.step
        self.tracker.start(step=self.state.step, total=self.total)
        stacks = Path(self.run.output) / "stacks"
        for path in stacks_of_last_hang(stacks) if self.topology.is_main else ():
            self._say(f"an earlier start hung and was ended; its stacks are in {path}")
        lag = lagging_statistics(self.engine.module.train(), forward_passes=self.total * self.accumulation)
        if lag is not None and not self.run.evaluation.precise_batchnorm_batches:
            self._say(lag)
        interrupted = False
        seconds = self.run.engine.hang_seconds
        with (
            caught_signals() as self.caught,
            watched(seconds=seconds, folder=stacks, rank=self.topology.rank),
        ):
            while self.state.step < self.total and not interrupted:
                interrupted = self._advance()
            self.state.saver.wait()
            if not interrupted:
                self.state.take_result(refresh_statistics=self._precise_batchnorm)
        seconds = time.monotonic() - started
        self._say_profile(self.profiler.close())
        clips = (self.state.step - first_step) * self.run.engine.global_batch
        return FitResult(
            steps=self.state.step,
            metrics=self.state.metrics,
            interrupted=interrupted,
            seconds=seconds,
            clips_per_second=clips / seconds if seconds else 0.0,
            skipped_steps=self.state.skipped,
            engine=self.engine,
        )

    def _advance(self) -> bool:
        """One step with what is due after it. True when a signal ended the run here."""
        self.profiler.before(self.state.step + 1)
        stepped = self._train_step()
        self._say_profile(self.profiler.after(self.state.step))
        beat()
        if not stepped:
            return False  # rewound: what was due after that step is due again
        last = self.state.step == self.total
        evaluate = last or self._due(self.run.evaluation.every_steps)
        save = last or self._due(self.run.checkpoint.every_steps)
        if evaluate:
            self._evaluate()
        if save:
            self.state.save(self.tracker.run_id)
        if evaluate or save:  # these may take long enough for a signal to arrive in them
            self.stop_asked |= all_reduce_max(float(bool(self.caught)), self.topology) > 0
        if last or not self.stop_asked:
            return False
        if not save:
            self.state.save(self.tracker.run_id)
        return True

    def _due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0

    def _train_step(self) -> bool:
        """One optimizer step over its micro-batches; False when it was bad and the run went back."""
        self.engine.train()
        begun = time.monotonic()
        waited = 0.0
        sums: dict[str, Any] = {}
        verdict: Verdict | None = None
        for turn in range(self.accumulation):
            asked = time.monotonic()
            batch = next(self.batches)
            waited += time.monotonic() - asked
            outputs = self.engine(self._cast(self.task.inputs(batch, training=True, step=self.state.step)))
            for name, value in outputs.items():
                sums[name] = sums.get(name, 0.0) + value.detach().float() / self.accumulation
            loss = outputs["loss"]
            last = turn + 1 == self.accumulation
            if last and self.guard.factor is not None:
                verdict = self._judge(sums["loss"])
                if verdict == "spike":
                    loss = loss * math.nan  # every ZeRO stage leaves out an update that is not finite
            self.engine.backward(loss)
            self.window.failed += len(batch.failed)
            if not last:
                self.engine.step()
        verdict = verdict or self._judge(sums["loss"])
        lr = self.schedule.apply(self.engine.optimizer, self.state.step, self.lr)
        norm, finite = self._update(verdict)
        if verdict == "fine" and not finite:
            # fp16's dynamic loss scale finds its range by overflowing: no fault of the run.
            verdict = "overflow" if self.run.engine.precision == "fp16" else "not finite"
        if not self._accept(verdict):
            return False
        if self.state.average is not None:
            self.state.average.update()
        self.state.step += 1
        self.window.add(sums, seconds=time.monotonic() - begun, waited=waited)
        if self.state.step % self.run.track.every_steps == 0 or self.state.step == self.total:
            self._log(lr, norm)
        return True

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

    def _judge(self, loss: Tensor) -> Verdict:
        """All ranks judge the mean loss, and learn of a signal that reached any of them, in one exchange."""
        both = torch.stack([loss.detach().double(), loss.new_tensor(float(bool(self.caught))).double()])
        mean, caught = all_reduce_mean(both, self.topology).tolist()
        self.stop_asked |= caught > 0
        return self.guard.judge(mean)

    def _update(self, verdict: Verdict) -> tuple[float | None, bool]:
        """The optimizer update, unless loss or gradient is not finite on any rank: (gradient norm, updated)."""
        if self.engine.zero_optimization_stage() > 0:
            before = self.engine.skipped_steps
            self.engine.step()
            # Stages 1 to 3 find the overflow themselves, on all ranks.
            return _norm(self.engine.get_global_grad_norm()), self.engine.skipped_steps == before
        parameters = [p for p in self.engine.module.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = float(total)
        finite = verdict == "fine" and math.isfinite(norm)
        if not finite:
            for parameter in parameters:
                parameter.grad = None  # torch optimizers pass over parameters without a gradient
        elif self.run.optim.clip_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.run.optim.clip_grad_norm, total)
        self.engine.step()
        return norm, finite

    def _accept(self, verdict: Verdict) -> bool:
        """True when the run goes on with its next step; False after going back to a checkpoint."""
        if verdict == "fine":
            self.bad_in_row = 0
            return True
        self.state.skipped += 1
        self.bad_in_row += 1
        said = SAID[verdict]
        limit = self.run.engine.max_bad_steps_in_row
        action = "skip" if verdict == "overflow" else self.run.engine.on_bad_step
        over = self.state.rewinds >= limit if action == "rewind" else self.bad_in_row >= limit
        if action == "stop" or over:
            raise DivergedError(
                f"{self.run.name}: step {self.state.step}: {said}, {self.bad_in_row} bad steps in a row, "
                f"{self.state.rewinds} rewinds: lower optim.lr, set optim.clip_grad_norm, or use engine.precision=fp32"
            )
        position = self.state.data_step
        if action == "rewind" and self.state.rewind():
            self._restart_data()
            self._say(
                f"data position {position}: {said}; back to step {self.state.step}, "
                f"which goes on with data position {position + 1}"
            )
            return False
        self._say(f"step {self.state.step}: {said}; the update was skipped")
        return True

    def _restart_data(self) -> None:
        """After a rewind: forget the losses since, and read on from the new data position."""
        self.guard.recent.clear()
        self.window = TrainingWindow()
        self.tracker.resume_at(self.state.step, data_offset=self.state.data_offset)
        self.batches = self._batches()

    def _log(self, lr: float, norm: float | None) -> None:
        window, self.window = self.window, TrainingWindow()
        numbers: dict[str, float | None] = window.numbers(
            self.run, self.topology, frames=self.task.clip_frames
        )
        numbers |= {
            "train/lr": lr,
            "train/grad_norm": norm,
            "train/epoch": self.state.data_step / self.loader.steps_per_epoch,
            "train/skipped_steps": float(self.state.skipped),
            "train/rewinds": float(self.state.rewinds),
        }
        groups = self.engine.optimizer.param_groups
        if len({group["lr_factor"] for group in groups}) > 1:
            numbers |= {f"lr/factor_{group['lr_factor']:.4g}": float(group["lr"]) for group in groups}
        numbers |= self._utilisation(numbers["speed/clips_per_second"] or 0.0)
        self.tracker.log(self.state.step, numbers)
        left = (self.total - self.state.step) * (numbers["speed/step_seconds"] or 0.0)
        self.tracker.progress(
            self.state.step,
            self.total,
            f"loss {numbers['train/loss']:.4f}  lr {lr:.2e}  {numbers['speed/clips_per_second']:.1f} clips/s"
            f"  data {100 * (numbers['speed/data_wait_share'] or 0):.0f} %  left {left:.0f} s",
        )

    def _utilisation(self, clips_per_second: float) -> dict[str, float]:
        """Model FLOPs utilisation where the device's peak is known."""
        peak = peak_tflops(self.run, self.topology.device)
        flops = self.task.flops_per_clip if peak is not None else None
        if peak is None or flops is None:
            return {}
        each = clips_per_second * flops / self.topology.world_size / 1e12
        return {"speed/tflops_per_device": each, "speed/mfu": each / peak}

    def _evaluate(self) -> None:
        with self.state.average.in_place() if self.state.average is not None else contextlib.nullcontext():
            self._precise_batchnorm()
            self.engine.eval()
            with torch.no_grad():
                metrics = self.task.evaluate(topology=self.topology)
        self.engine.train()
        self.state.metrics = metrics
        self.tracker.log(self.state.step, {f"eval/{name}": value for name, value in metrics.items()})
        if self.tracker.shows_clips:
            self.tracker.log_clips(self.state.step, self.task.clip_table(self.run.track.clip_table_rows))
        found = metrics.get(self.task.best_metric)
        if found is None:
            return
        if self.schedule.observe(found):
            self._say(f"step {self.state.step}: no improvement, learning rate lowered")
        if self.state.best is None or found > self.state.best:
            self.state.best = found
            if self.run.checkpoint.keep_best and self.run.evaluation.every_steps is not None:
                self.state.save(self.tracker.run_id, best=True)

    def _precise_batchnorm(self) -> None:
        """BatchNorm's statistics anew, over the training data that comes next."""
        count = self.run.evaluation.precise_batchnorm_batches
        if not count:
            return
        self.engine.train()
        start = self.state.data_step
        steps = math.ceil(count / self.accumulation)
        ahead = self.loader.micro_batches(start_step=start, stop_step=start + steps)
        estimate_statistics(
            self.engine.module,
            (next(ahead) for _ in range(count)),
            forward=lambda batch: self.engine.module(
                self._cast(self.task.inputs(batch, training=True, step=self.state.step))
            ),
            topology=self.topology,
        )

    def _say_profile(self, path: Path | None) -> None:
        if path is not None:
            self._say(f"profile written to {path}")

    def _say(self, text: str) -> None:
        if self.topology.is_main:
            print(f"{self.run.name}: {text}", flush=True)


def _norm(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    return number if number >= 0 else None  # DeepSpeed says -1 for an overflow
