"""Exponential moving averages (EMA) of the weights: one to be evaluated and saved, and a teacher to learn from.

:class:`WeightAverage` is kept where the optimizer keeps its masters. Each rank averages the fp32 tensors it updates
itself, so at ZeRO stages 1 to 3 the average is partitioned like the optimizer's state. Floating-point buffers
(BatchNorm statistics) are averaged too, as in timm's ``ModelEmaV2``. The decay starts low and rises to its set value,
min(decay, (1 + n) / (10 + n)) after n updates, as in TensorFlow's ``ExponentialMovingAverage``, so that the first
weights are soon forgotten.

A teacher computes in every step, so it lies where weights lie: its parameters are frozen ones of the module, whole on
every rank at stages 0 to 2 and partitioned at stage 3, and a checkpoint has them among its parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from cliplift.pipelines.checkpoints.slices import Slice
from cliplift.pipelines.engine.task import MovingTeacher, TrainingEngine
from cliplift.pipelines.engine.zero_state import (
    Slices,
    exchange,
    fill,
    forget_gathered,
    local_masters,
    slices_to_write,
    weights_from_masters,
)


class WeightAverage:
    """The average of one engine's weights; no rank ever has more of it than of the masters.

    ``values`` are laid out like the masters (``zero_state.local_masters``), ``buffers`` are by name.
    """

    def __init__(self, engine: TrainingEngine, *, decay: float) -> None:
        self.engine, self.decay, self.updates = engine, decay, 0
        self.values = [master.detach().float().clone() for master in local_masters(engine)]
        self.buffers = {name: buffer.detach().clone() for name, buffer in _averaged_buffers(engine)}

    @torch.no_grad()
    def update(self) -> None:
        """Include the weights of one optimizer step."""
        self.updates += 1
        # Early averages forget fast: of few weights the first, untrained ones would otherwise make up most.
        weight = 1.0 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, local_masters(self.engine), weight)
        for name, buffer in _averaged_buffers(self.engine):
            self.buffers[name].lerp_(buffer, weight)

    def slices(self) -> dict[str, Slice]:
        """This rank's share of the averaged trainable parameters, to be saved."""
        return slices_to_write(self.engine, self.values)

    @torch.no_grad()
    def restore(self, saved: Slices, buffers: Mapping[str, Tensor], *, updates: int) -> None:
        """Restore this rank's elements of a saved average, whatever the stage and number of ranks it was saved at."""
        self.updates = updates
        fill(self.engine, self.values, saved)
        for name, buffer in self.buffers.items():
            buffer.copy_(buffers[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The module computes with the averaged weights inside, and with its own again afterwards. Collective.

        Masters and average change places meanwhile, so that no weights are copied. Buffers are copied: what is done to
        them inside is forgotten.
        """
        # Collective at stages 1 to 3: what changes places is this rank's part, and the weights are gathered from all.
        own = {name: buffer.clone() for name, buffer in _averaged_buffers(self.engine)}
        self._change_places()
        self._put_buffers(self.buffers)
        try:
            yield
        finally:
            self._change_places()
            self._put_buffers(own)

    @torch.no_grad()
    def replace_weights(self) -> None:
        """Replace the engine's weights by the average, for good. Collective."""
        for master, value in zip(local_masters(self.engine), self.values, strict=True):
            master.copy_(value)
        weights_from_masters(self.engine)
        self._put_buffers(self.buffers)

    def _change_places(self) -> None:
        exchange(local_masters(self.engine), self.values)
        weights_from_masters(self.engine)

    @torch.no_grad()
    def _put_buffers(self, values: Mapping[str, Tensor]) -> None:
        for name, buffer in _averaged_buffers(self.engine):
            buffer.copy_(values[name])


class TeacherAverage:
    """Moves the teacher of one engine's module. Its buffers, if there are any, stay as they are."""

    def __init__(self, engine: TrainingEngine, rule: MovingTeacher, *, total_steps: int) -> None:
        self.engine, self.rule, self.total_steps = engine, rule, total_steps
        parameters = dict(engine.module.named_parameters())
        names = [name.removeprefix(rule.teacher) for name in parameters if name.startswith(rule.teacher)]
        assert names, f"the module has no parameters below {rule.teacher!r}"
        self._teacher = [parameters[rule.teacher + name] for name in names]
        self._student = [parameters[rule.student + name] for name in names]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the ``step``-th update (from 0) of the weights. Nothing is sent: every rank has what it averages."""
        weight = 1.0 - self.rule.at(step, total_steps=self.total_steps)
        partitioned = self.engine.zero_optimization_stage() == 3
        teacher, student = (_held(each, partitioned=partitioned) for each in (self._teacher, self._student))
        torch._foreach_lerp_(teacher, student, weight)
        for parameter in self._teacher if partitioned else ():
            forget_gathered(parameter)


def _held(parameters: list[nn.Parameter], *, partitioned: bool) -> list[Tensor]:
    """What this rank holds of each: at stage 3 its part, which begins and ends alike for equal shapes."""
    return [p.ds_tensor if partitioned else p.data for p in parameters]  # type: ignore[attr-defined]


def _averaged_buffers(engine: TrainingEngine) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in engine.module.named_buffers():
        if buffer.is_floating_point():
            yield name, buffer
