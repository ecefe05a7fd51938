"""BatchNorm in training runs: refused where precision breaks it, and its statistics recomputed for evaluation.

Running statistics lag behind the weights and were gathered by each rank from its own small batches. "Rethinking
'Batch' in BatchNorm" (arXiv:2105.07576, section 3) evaluates with the statistics of a set of training batches under
fixed weights instead, "precise BN".
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cliplift.configs.sections import ConfigError
from cliplift.configs.training import TrainingRun
from cliplift.pipelines.distributed.collectives import Topology, all_reduce_mean

B = TypeVar("B")

PASSES_PER_AVERAGE = 10  # a run shorter than this many averaging times ends on statistics of its beginning


def refuse_half_batchnorm(module: nn.Module, run: TrainingRun) -> None:
    """DeepSpeed casts parameters and leaves buffers fp32: BatchNorm then mixes the two and torch refuses."""
    half = run.engine.precision in ("bf16", "fp16")
    if half and any(isinstance(m, _BatchNorm) for m in module.modules()):
        raise ConfigError(
            "casts weights, which BatchNorm does not survive",
            key="engine.precision",
            value=run.engine.precision,
            hint="use autocast_bf16, which keeps BatchNorm in fp32",
        )


def lagging_statistics(module: nn.Module, *, forward_passes: int) -> str | None:
    """A warning where running statistics cannot keep up with a run this short; None where they can.

    They are an average over about 1 / momentum forward passes. EfficientNet's momentum, TensorFlow's 0.99, is for
    long runs: after 400 steps from random weights a student was at chance in evaluation, and at an AUC of 0.85 with
    the same weights and precise statistics.
    """
    momenta = [m.momentum for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    slowest = min((m for m in momenta if m), default=None)
    if slowest is None or forward_passes >= PASSES_PER_AVERAGE / slowest:
        return None
    return (
        f"BatchNorm averages its statistics over {1 / slowest:.0f} forward passes and the run has {forward_passes}: "
        "evaluation may see stale ones; set evaluation.precise_batchnorm_batches, for example to 16"
    )


@torch.no_grad()
def estimate_statistics(
    module: nn.Module, batches: Iterable[B], *, forward: Callable[[B], object], topology: Topology
) -> None:
    """Set every trained BatchNorm's running statistics to those of all batches of all ranks under the current weights.

    Each layer's mean is the mean over batches of the batch means, its variance E[x^2] - mean^2, which is exact for
    batches of equal size. Layers that training holds in eval mode keep their statistics.

    Args:
        module: in training mode; random state and all other buffers are left as they were.
        batches: what ``forward`` takes.
        forward: one forward pass of the module in training mode.
        topology: the ranks whose batches count together.
    """
    layers = [
        m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats
    ]
    if not layers:
        return
    sums = [_Sums(layer) for layer in layers]
    try:
        with _unchanged_buffers(module, except_of=layers), torch.random.fork_rng():
            for batch in batches:
                for layer in layers:
                    layer.momentum = 1.0  # the running statistics become the batch's
                forward(batch)
                for part in sums:
                    part.add()
    except BaseException:
        # A signal, or an unreadable batch. Whoever goes on from here must not do so with the statistics of one batch.
        for part in sums:
            part.restore()
        raise
    for part in sums:
        part.finish(topology)


class _Sums:
    """Sums of one layer's batch means and batch second moments."""

    def __init__(self, layer: _BatchNorm) -> None:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        self.layer, self.momentum, self.batches = layer, layer.momentum, 0
        self._before = layer.running_mean.clone(), layer.running_var.clone()
        self.count = 0
        self.mean = torch.zeros_like(layer.running_mean, dtype=torch.float64)
        self.square = torch.zeros_like(self.mean)
        self._hook = layer.register_forward_pre_hook(self._count)

    def _count(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.count = inputs[0].numel() // inputs[0].shape[1]

    def add(self) -> None:
        assert self.layer.running_mean is not None
        assert self.layer.running_var is not None
        mean = self.layer.running_mean.double()
        # torch keeps the unbiased variance; the layer itself normalises with the biased one.
        biased = self.layer.running_var.double() * (self.count - 1) / self.count
        self.mean += mean
        self.square += biased + mean**2
        self.batches += 1

    def restore(self) -> None:
        """The layer as it was."""
        assert self.layer.running_mean is not None
        assert self.layer.running_var is not None
        self.layer.running_mean.copy_(self._before[0])
        self.layer.running_var.copy_(self._before[1])
        self._release()

    def _release(self) -> None:
        self.layer.momentum = self.momentum
        self._hook.remove()

    def finish(self, topology: Topology) -> None:
        assert self.layer.running_mean is not None
        assert self.layer.running_var is not None
        both = all_reduce_mean(torch.stack([self.mean, self.square]) / self.batches, topology)
        self.layer.running_mean.copy_(both[0])
        self.layer.running_var.copy_(both[1] - both[0] ** 2)
        self._release()


@contextlib.contextmanager
def _unchanged_buffers(module: nn.Module, *, except_of: Iterable[_BatchNorm]) -> Iterator[None]:
    free = {id(buffer) for layer in except_of for buffer in (layer.running_mean, layer.running_var)}
    kept = [(buffer, buffer.clone()) for buffer in module.buffers() if id(buffer) not in free]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
