"""The one training loop of all stages, on ``deepspeed.initialize``: one process or many, ZeRO 0 to 3, CPU or GPU.

A step reads the micro-batches of its positions, backpropagates each, and makes one update. What the run is at is one
integer, the step; beside seed and data fingerprint it fixes every later sample and every later learning rate.

The host never waits for the device inside a step: whether a step was good is decided on the device, which leaves a
bad update out by itself, and the host learns of it one step late (``_settle``), or before anything that must know.
"""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cliplift.configs.training import TrainingRun
from cliplift.pipelines.checkpoints.saved import random_state, set_random_state
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.data.loader import TrainingLoader
from cliplift.pipelines.distributed.collectives import Topology, gather_objects
from cliplift.pipelines.distributed.slowest import ForwardClock, SlowestRank
from cliplift.pipelines.engine.batchnorm import estimate_statistics, lagging_statistics
from cliplift.pipelines.engine.deepspeed_setup import batch_split
from cliplift.pipelines.engine.ema import TeacherAverage
from cliplift.pipelines.engine.faults import (
    STACKS,
    VERDICTS,
    DivergedError,
    LossGuard,
    StoppedBySignalError,
    Verdict,
    beat,
    caught_signals,
    stacks_of_last_hang,
    stop_agreed,
    stop_requested,
    stop_together,
    watched,
)
from cliplift.pipelines.engine.late import LateValues, LoggedStep, StepOutcome
from cliplift.pipelines.engine.optim import Schedule, leave_out, peak_lr, total_steps
from cliplift.pipelines.engine.state import RunState, run_identity
from cliplift.pipelines.engine.task import HALF, OF_CLIP, FitResult, HasTeacher, RaisesAlarm, TrainingTask
from cliplift.pipelines.engine.telemetry import StepProfiler, TrainingWindow, utilisation
from cliplift.pipelines.runs.results import evaluation_line
from cliplift.pipelines.runs.tracking import Tracker

REASONS = {
    "spike": "the loss is far above those before it",
    "not finite": "loss or gradient is not finite",
    "overflow": "fp16 overflow, the loss scale is lowered",
}


def fit(
    *, task: TrainingTask, run: TrainingRun, loader: TrainingLoader, topology: Topology, tracker: Tracker
) -> FitResult:
    """Train to the end of the schedule, or to a signal.

    Resumes from the newest usable checkpoint in ``run.output/checkpoints`` unless ``checkpoint.resume`` is never.

    Raises:
        ConfigError: the checkpoint belongs to other data, another seed or another batch size.
        DivergedError: ``engine.max_bad_steps_in_row`` steps in a row had no finite loss and gradient.
    """
    return Trainer(task, run, loader, topology, tracker).train()


class Trainer:
    """One call of :func:`fit`."""

    def __init__(
        self,
        task: TrainingTask,
        run: TrainingRun,
        loader: TrainingLoader,
        topology: Topology,
        tracker: Tracker,
    ) -> None:
        self.task, self.run, self.loader, self.topology, self.tracker = task, run, loader, topology, tracker
        self.total = total_steps(run.schedule, steps_per_epoch=loader.steps_per_epoch)
        self.schedule = Schedule(run.schedule, total_steps=self.total, weight_decay=run.optim.weight_decay)
        self.lr = peak_lr(run.optim, global_batch=run.engine.global_batch)
        self.accumulation = batch_split(run, world_size=topology.world_size)[1]
        self.bad_in_row = 0
        self.guard = LossGuard(run.engine, topology)
        self.unread: StepOutcome | None = None
        self.stop_asked = False
        self.window = TrainingWindow()
        self.forward_clock = ForwardClock(topology.device)
        self.slowest = SlowestRank(gather_objects([socket.gethostname()], topology))
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
            say=self._log_main,
        )
        self.engine = self.state.engine
        self.teacher = (
            TeacherAverage(self.engine, task.moving_teacher, total_steps=self.total)
            if isinstance(task, HasTeacher)
            else None
        )
        self.tracker.resume_at(self.state.step, data_offset=self.state.data_offset)
        self.batches = self._batches()

    def _batches(self) -> Iterator[ClipBatch]:
        state = self.state
        return self.loader.micro_batches(
            start_step=state.data_step, stop_step=self.total + state.data_offset, final=True
        )

    def train(self) -> FitResult:
        """To the end of the schedule, or to a signal."""
        started, first_step = time.monotonic(), self.state.step
        self.tracker.start(step=self.state.step, total=self.total)
        stacks = Path(self.run.output) / STACKS
        for path in stacks_of_last_hang(stacks) if self.topology.is_main else ():
            self._log_main(f"an earlier start hung and was ended; where it stood is in {path}")
        lag = lagging_statistics(self.engine.module.train(), forward_passes=self.total * self.accumulation)
        if lag is not None and not self.run.evaluation.precise_batchnorm_batches:
            self._log_main(lag)
        hang_seconds = self.run.engine.hang_seconds
        with (
            caught_signals(),
            watched(seconds=hang_seconds, folder=stacks, rank=self.topology.rank),
        ):
            interrupted = stop_agreed(self.topology) or not self._evaluation_caught_up()
            while self.state.step < self.total and not interrupted:
                interrupted = self._advance()
            self.state.saver.wait()
            weights: Mapping[str, Tensor] = {}
            if not interrupted:
                try:
                    weights = self.state.take_result(refresh_statistics=self._precise_batchnorm)
                except StoppedBySignalError:
                    interrupted = True  # the last step is saved: the next start comes here again
        seconds = time.monotonic() - started
        self._log_profile(self.profiler.close())
        clips = (self.state.step - first_step) * self.run.engine.global_batch
        return FitResult(
            steps=self.state.step,
            metrics=self.state.metrics,
            interrupted=interrupted,
            seconds=seconds,
            clips_per_second=clips / seconds if seconds else 0.0,
            skipped_steps=self.state.skipped,
            weights=weights,
            engine=self.engine,
        )

    def _advance(self) -> bool:
        """One step with what is due after it. True when a signal ended the run here."""
        self.profiler.before(self.state.step + 1)
        stepped = self._train_step()
        self._log_profile(self.profiler.after(self.state.step))
        beat()
        self.tracker.heartbeat(self.state.step, self.total)
        if not stepped:
            return False  # rewound: what was due after that step is due again
        last = self.state.step == self.total
        evaluate = last or self._due(self.run.evaluation.every_steps)
        save = last or self._due(self.run.checkpoint.every_steps)
        # Weights of a step that turns out to be bad must be neither evaluated nor saved, so here the host waits.
        if (evaluate or save or self.stop_asked) and not self._settle():
            return False
        if evaluate and not self._evaluate():
            self.state.save(self.tracker.run_id)
            return True
        if save:
            self.state.save(self.tracker.run_id)
        if evaluate or save:  # these may take long enough for a signal to arrive in them
            self.stop_asked |= stop_agreed(self.topology)
        if last or not self.stop_asked:
            return False
        if not save:
            self.state.save(self.tracker.run_id)
        return True

    def _due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0

    def _train_step(self) -> bool:
        """One optimizer step over its micro-batches; False when the one before it was bad and the run went back."""
        self.engine.train()
        begun = time.monotonic()
        waited = 0.0
        sums: dict[str, Tensor] = {}
        clip_sums: dict[str, Tensor] = {}
        judged: Tensor | None = None
        for turn in range(self.accumulation):
            asked = time.monotonic()
            batch = next(self.batches)
            waited += time.monotonic() - asked
            inputs = self._cast(self.task.inputs(batch, training=True, step=self.state.step))
            with self.forward_clock.measured():
                outputs = self.engine(inputs)
            for name, value in outputs.items():
                # Summed on the device: a number read here would make the host wait for this forward pass.
                if value.ndim:
                    own, part = name.removesuffix(OF_CLIP), value.detach().double().sum()
                    clip_sums[own] = clip_sums[own] + part if own in clip_sums else part
                else:
                    part = value.detach().float() / self.accumulation
                    sums[name] = sums[name] + part if name in sums else part
            loss = outputs["loss"]
            last = turn + 1 == self.accumulation
            if last and self.guard.factor is not None:
                # A spike must be known before the last backward pass, whose gradients go into the update.
                judged = self.guard.judge(sums["loss"], signalled=stop_requested())
                # Every ZeRO stage leaves out an update that is not finite.
                loss = loss * torch.ones_like(loss).masked_fill(judged[0] > 0, math.nan)
            self.engine.backward(loss)
            self.window.failed += len(batch.failed)
            if not last:
                self.engine.step()  # DeepSpeed counts micro-batches here; the last call, in _update, is the update
        if judged is None:
            # Without a spike limit the update is left out for a gradient that is not finite; judging may come late.
            judged = self.guard.judge(sums["loss"], signalled=stop_requested())
        # Set anew for every step from the step alone: a run that resumes or rewinds is on its schedule at once.
        lr = self.schedule.apply(self.engine.optimizer, self.state.step, self.lr)
        judged, norm, overflow = self._update(judged)
        if self.state.average is not None:
            self.state.average.update()
        if self.teacher is not None:
            self.teacher.update(self.state.step)
        outcome = StepOutcome(step=self.state.step, judged=LateValues(judged), overflow=overflow)
        self.state.step += 1
        self.window.add(
            sums,
            clip_sums=clip_sums,
            clips=self.run.engine.global_batch,
            seconds=time.monotonic() - begun,
            waited=waited,
        )
        if self.state.step % self.run.track.every_steps == 0 or self.state.step == self.total:
            outcome.log = self._summary(lr, norm)
        # The step before this one is done by now, or nearly: while the host reads it, the device has this one to do.
        before, self.unread = self.unread, outcome
        return before is None or self._read(before)

    def _cast(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Clips in the layout and precision asked for; labels and indices stay as they are.

        Only the input is channels-last: convolutions follow it, while ZeRO needs the weights contiguous.
        """
        dtype = HALF.get(self.run.engine.precision)
        if dtype is not None:
            inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        if self.run.engine.channels_last:
            inputs["clips"] = inputs["clips"].contiguous(memory_format=torch.channels_last_3d)
        return inputs

    def _update(self, judged: Tensor) -> tuple[Tensor, Tensor | float | None, bool]:
        """The optimizer update, unless loss or gradient is not finite on any rank.

        Returns what was found of the step, its gradient norm, and whether DeepSpeed found an overflow, which it does
        on the host at stages 1 to 3.
        """
        if self.engine.zero_optimization_stage() > 0:
            before = self.engine.skipped_steps
            self.engine.step()
            return judged, self.engine.get_global_grad_norm(), self.engine.skipped_steps != before
        # At stage 0 DeepSpeed would look for an overflow on the host; norm, verdict and clipping stay on the device.
        parameters = [p for p in self.engine.module.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        unbounded = (judged[0] == 0) & ~total.isfinite()
        verdict = judged[0].masked_fill(unbounded, float(VERDICTS.index("not finite")))
        if self.run.optim.clip_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.run.optim.clip_grad_norm, total)
        leave_out(self.engine.optimizer, verdict > 0)
        self.engine.step()
        return torch.stack([verdict, judged[1]]), total, False

    def _settle(self) -> bool:
        """Read what the device found of the last step; False when it was bad and the run went back."""
        outcome, self.unread = self.unread, None
        return outcome is None or self._read(outcome)

    def _read(self, outcome: StepOutcome) -> bool:
        verdict, signalled = outcome.read()
        self.stop_asked |= signalled
        if verdict == "fine" and outcome.overflow:
            # fp16's dynamic loss scale finds its range by overflowing: no fault of the run.
            verdict = "overflow" if self.run.engine.precision == "fp16" else "not finite"
        if not self._accept(verdict, outcome.step):
            return False
        if outcome.log is not None:
            self._log(outcome.log)
        return True

    def _accept(self, verdict: Verdict, step: int) -> bool:
        """True when the run goes on; False after going back to a checkpoint. ``step`` is the one judged."""
        if verdict == "fine":
            self.bad_in_row = 0
            return True
        self.state.skipped += 1
        self.bad_in_row += 1
        reason = REASONS[verdict]
        limit = self.run.engine.max_bad_steps_in_row
        action = "skip" if verdict == "overflow" else self.run.engine.on_bad_step
        # Good steps follow a rewind and reset the count of bad ones, so rewinds are limited by a count of their own.
        over = self.state.rewinds >= limit if action == "rewind" else self.bad_in_row >= limit
        if action == "stop" or over:
            raise DivergedError(
                f"{self.run.name}: step {step}: {reason}, {self.bad_in_row} bad steps in a row, "
                f"{self.state.rewinds} rewinds: lower optim.lr, set optim.clip_grad_norm, or use engine.precision=fp32"
            )
        position = step + self.state.data_offset
        if action == "rewind" and self._rewind(step):
            self._log_main(
                f"data position {position}: {reason}; back to step {self.state.step}, "
                f"which goes on with data position {position + 1}"
            )
            return False
        self._log_main(f"step {step}: {reason}; the update was skipped")
        return True

    def _rewind(self, step: int) -> bool:
        """Back to the last checkpoint, and on with the data after the bad ``step``'s; False where there is none."""
        # The verdict is one step old, so the run has already passed the bad step: its data are what is left out.
        ahead, self.state.step = self.state.step, step
        if not self.state.rewind():
            self.state.step = ahead
            return False
        # The window knows losses of weights that are gone, which were higher or lower than those to come.
        self.guard.forget()
        self.window, self.unread = TrainingWindow(), None
        self.tracker.resume_at(self.state.step, data_offset=self.state.data_offset)
        self.batches = self._batches()
        return True

    def _summary(self, lr: float, norm: Tensor | float | None) -> LoggedStep:
        """What is logged of the steps since the last line; the means are still on the device."""
        window, self.window = self.window, TrainingWindow()
        names, means, ranks = window.means(self.topology, forward_seconds=self.forward_clock.taken())
        if isinstance(norm, Tensor):
            names, means = [*names, "grad_norm"], torch.cat([means, _on(norm, means)])
        groups = self.engine.optimizer.param_groups
        numbers: dict[str, float | None] = window.numbers(
            self.run, self.topology, frames=self.task.clip_frames
        ) | {
            "train/lr": lr,
            "train/grad_norm": None if isinstance(norm, Tensor) else norm,
            "train/epoch": self.state.data_step / self.loader.steps_per_epoch,
        }
        if len({group["lr_factor"] for group in groups}) > 1:
            numbers |= {f"lr/factor_{group['lr_factor']:.4g}": float(group["lr"]) for group in groups}
        return LoggedStep(
            step=self.state.step,
            names=names,
            means=LateValues(means),
            ranks=LateValues(ranks),
            numbers=numbers,
        )

    def _log(self, logged: LoggedStep) -> None:
        numbers = logged.read()
        norm = numbers["train/grad_norm"]
        if norm is not None and not norm >= 0 and self.engine.zero_optimization_stage() > 0:
            numbers["train/grad_norm"] = None  # DeepSpeed says -1 for an overflow
        numbers |= {
            "train/skipped_steps": float(self.state.skipped),
            "train/rewinds": float(self.state.rewinds),
        }
        numbers |= utilisation(
            self.run, self.topology, self.task, clips_per_second=numbers["speed/clips_per_second"] or 0.0
        )
        self.tracker.log(logged.step, numbers)
        self._warn(logged.step, numbers)
        slow = self.slowest.look(logged.ranks.read(), step_seconds=numbers["speed/step_seconds"] or 0.0)
        if slow is not None:
            self._log_main(f"step {logged.step}: {slow}")
        left = (self.total - logged.step) * (numbers["speed/step_seconds"] or 0.0)
        self.tracker.progress(
            logged.step,
            self.total,
            f"loss {numbers['train/loss']:.4f}  lr {numbers['train/lr']:.2e}"
            f"  {numbers['speed/clips_per_second']:.1f} clips/s"
            f"  data {100 * (numbers['speed/data_wait_share'] or 0):.0f} %  left {left:.0f} s",
        )

    def _warn(self, step: int, numbers: Mapping[str, float | None]) -> None:
        text = self.task.alarm(numbers) if isinstance(self.task, RaisesAlarm) else None
        if text is not None:
            self._log_main(f"step {step}: {text}")

    def _evaluation_caught_up(self) -> bool:
        """Make the evaluation that a signal stopped before this start; False when another signal stops it again."""
        if not self.state.evaluation_due:
            return True
        if not self._evaluate():
            return False  # the checkpoint this start came from already says that it is due
        self.state.save(self.tracker.run_id)
        return True

    def _evaluate(self) -> bool:
        """Evaluate, with what follows from the result. False when a signal stopped it: it is due again then.

        The random state from before is put back in that case, so that a continued run draws what an unbroken one does.
        """
        before = random_state(self.topology.device)
        self.state.evaluation_due = True
        try:
            metrics = self._measured()
        except StoppedBySignalError:
            set_random_state(before, self.topology.device)
            return False
        finally:
            self.engine.train()
        self.state.evaluation_due = False
        self._take_metrics(metrics)
        return True

    def _measured(self) -> dict[str, float]:
        with self.state.average.in_place() if self.state.average is not None else contextlib.nullcontext():
            self._precise_batchnorm()
            self.engine.eval()
            with torch.no_grad():
                return self.task.evaluate(topology=self.topology)

    def _take_metrics(self, metrics: dict[str, float]) -> None:
        """Log them, lower the learning rate where they have stopped improving, keep the best weights."""
        self.state.metrics = metrics
        logged = {f"eval/{name}": value for name, value in metrics.items()}
        self.tracker.log(self.state.step, logged)
        self._warn(self.state.step, logged)
        if self.tracker.shows_clips:
            self.tracker.log_clips(self.state.step, self.task.clip_table(self.run.track.clip_table_rows))
        best_metric, before = self.task.best_metric, self.state.best
        line = evaluation_line(self.state.step, metrics, best_metric=best_metric, before=before)
        if line is not None:
            self._log_main(line)
        found = metrics.get(best_metric)
        if found is None:
            return
        if self.schedule.observe(found):
            self._log_main(f"step {self.state.step}: no improvement, learning rate lowered")
        if self.state.best is None or found > self.state.best:
            self.state.best = found
            if self.run.checkpoint.keep_best and self.run.evaluation.every_steps is not None:
                self.state.save(self.tracker.run_id, best=True)

    def _precise_batchnorm(self) -> None:
        """Recompute BatchNorm's statistics over the training data that comes next."""
        count = self.run.evaluation.precise_batchnorm_batches
        if not count:
            return
        self.engine.train()
        # Batches are a function of their position: drawing the coming ones here does not change the steps to come.
        start = self.state.data_step
        steps = math.ceil(count / self.accumulation)
        ahead = self.loader.micro_batches(start_step=start, stop_step=start + steps)
        estimate_statistics(
            self.engine.module,
            self._watched(ahead, count),
            forward=lambda batch: self.engine.module(
                self._cast(self.task.inputs(batch, training=True, step=self.state.step))
            ),
            topology=self.topology,
        )

    def _watched(self, batches: Iterator[ClipBatch], count: int) -> Iterator[ClipBatch]:
        """The first ``count`` batches, with a beat and a look for signals after each has been used.

        The pass for BatchNorm may take longer than ``engine.hang_seconds``, and all ranks make it together: a signal
        to one of them stops all after the same batch.
        """
        for _ in range(count):
            yield next(batches)
            beat()
            stop_together(self.topology)

    def _log_profile(self, path: Path | None) -> None:
        if path is not None:
            self._log_main(f"profile written to {path}")

    def _log_main(self, text: str) -> None:
        self.tracker.say(text)


def _on(value: Tensor, like: Tensor) -> Tensor:
    """A scalar as one more element for ``like``."""
    return value.detach().to(device=like.device, dtype=like.dtype, non_blocking=True).reshape(1)
