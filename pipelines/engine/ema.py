"""Exponential moving average (EMA) of the weights, kept where the optimizer keeps its masters.

Each rank averages the fp32 tensors it updates itself, so at ZeRO stages 1 to 3 the average is partitioned like the
optimizer's state. Floating-point buffers (BatchNorm statistics) are averaged too, as in timm's ``ModelEmaV2``. The
decay starts low and rises to its set value, min(decay, (1 + n) / (10 + n)) after n updates, as in TensorFlow's
``ExponentialMovingAverage``, so that the first weights are soon forgotten.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cliplift.pipelines.engine.zero_state import (
    gathered_parameters,
    local_masters,
    put_masters,
    put_parameters,
)


class WeightAverage:
    """The average of one engine's weights. Methods that gather or put whole tensors are collective."""

    def __init__(self, engine: Any, *, decay: float) -> None:
        self.engine, self.decay, self.updates = engine, decay, 0
        self.values = [master.detach().float().clone() for master in local_masters(engine)]
        self.buffers = {name: buffer.detach().clone() for name, buffer in _averaged_buffers(engine)}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of one optimizer step in."""
        self.updates += 1
        weight = 1.0 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, local_masters(self.engine), weight)
        for name, buffer in _averaged_buffers(self.engine):
            self.buffers[name].lerp_(buffer, weight)

    def gathered(self) -> dict[str, Tensor]:
        """The averaged parameters (frozen ones as they are) by name, whole, and the averaged buffers; on the CPU."""
        with self._in_masters():
            parameters = gathered_parameters(self.engine, from_masters=True)
        return parameters | {name: buffer.cpu().clone() for name, buffer in self.buffers.items()}

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor], *, updates: int) -> None:
        """Take a saved average over, whatever stage and number of ranks it was saved at."""
        self.updates = updates
        masters = local_masters(self.engine)
        before = [master.clone() for master in masters]
        if self.engine.zero_optimization_stage() == 0:
            named = [n for n, p in self.engine.module.named_parameters() if p.requires_grad]
            for master, name in zip(masters, named, strict=True):
                master.copy_(saved[name])
        put_masters(self.engine, saved)
        self.values = [master.detach().clone() for master in local_masters(self.engine)]
        for master, value in zip(masters, before, strict=True):
            master.copy_(value)
        for name, buffer in self.buffers.items():
            buffer.copy_(saved[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The module computes with the averaged weights inside, and with its own again afterwards."""
        own = gathered_parameters(self.engine, from_masters=True)
        own |= {name: buffer.detach().cpu().clone() for name, buffer in _averaged_buffers(self.engine)}
        self.take()
        try:
            yield
        finally:
            _put(self.engine, own)

    def take(self) -> None:
        """Replace the engine's weights by the average, for good."""
        _put(self.engine, self.gathered())

    @contextlib.contextmanager
    def _in_masters(self) -> Iterator[None]:
        masters = local_masters(self.engine)
        own = [master.clone() for master in masters]
        with torch.no_grad():
            for master, value in zip(masters, self.values, strict=True):
                master.copy_(value)
            try:
                yield
            finally:
                for master, value in zip(masters, own, strict=True):
                    master.copy_(value)


def _averaged_buffers(engine: Any) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in engine.module.named_buffers():
        if buffer.is_floating_point():
            yield name, buffer


def _put(engine: Any, values: Mapping[str, Tensor]) -> None:
    put_parameters(engine, values)
    with torch.no_grad():
        for name, buffer in _averaged_buffers(engine):
            buffer.copy_(values[name])
