"""How much memory one rank of a training run will need, before anything is allocated.

Activations are measured (``activation_memory``). Model states follow from the ZeRO stage: which rank keeps which
parameters, gradients, fp32 masters and moments (ZeRO, arXiv:1910.02054, figure 1), and what DeepSpeed's stages allocate
beyond that, found by reading and measuring DeepSpeed 0.19.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cliplift.configs.training import TrainingRun
from cliplift.pipelines.cost.activation_memory import (
    ActivationMeasure,
    make_fake,
    measure_activations,
    storage_bytes,
)
from cliplift.pipelines.distributed.sequence import require_shared
from cliplift.pipelines.engine.deepspeed_setup import batch_split, deepspeed_config
from cliplift.pipelines.engine.optim import optimizer_moments
from cliplift.pipelines.engine.task import HALF, as_trained
from cliplift.pipelines.stages.run import stage_of

DEEPSPEED_BUCKET = 500_000_000  # elements: the default of reduce_bucket_size
STAGE3_LIVE = 1_000_000_000  # elements: the default of stage3_max_live_parameters
STAGE3_PREFETCH = 50_000_000  # elements: the default of stage3_prefetch_bucket_size


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of values: all parameters, the trained ones, the largest trained group and tensor, and buffer bytes."""

    parameters: int
    trained: int
    largest_group: int
    largest_tensor: int
    buffer_bytes: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on one rank: what is always there, and the three moments of a step, one of which is the peak."""

    weights: int  # with buffers, frozen parts and the teacher
    masters: int
    optimizer: int
    gradient_buffers: int  # stage 3 keeps its part of the gradients and its bucket for good
    backward: int  # inputs, activations and gradients at the worst moment of forward and backward
    reduction: int  # gradients and DeepSpeed's bucket at the end of backward
    update: int  # gradients and what the optimizer's step needs beside them
    saved_activations: int

    @property
    def standing(self) -> int:
        return self.weights + self.masters + self.optimizer + self.gradient_buffers

    @property
    def total(self) -> int:
        return self.standing + max(self.backward, self.reduction, self.update)


def plan_memory(run: TrainingRun, *, classes: int, world_size: int, on_gpu: bool) -> tuple[MemoryPlan, Sizes]:
    """The plan of a run on this many ranks.

    Args:
        run: the run.
        classes: K, number of classes of its data.
        world_size: N, number of ranks.
        on_gpu: on a GPU, DeepSpeed's buckets and the caching allocator hold whatever they allocate; on a CPU, a page
            that is never written takes no memory.

    Raises:
        ConfigError: the run cannot work as configured; the error names the key.
        ModelError: the model cannot be built with these options.
        RuntimeError: its shapes do not fit together.
    """
    micro_batch, _ = batch_split(run, world_size=world_size)
    stage = stage_of(run, classes=[str(label) for label in range(classes)])
    with torch.device("meta"):
        built = stage.build_module(weights=False)
        module, frozen = as_trained(built, run), built.frozen
    require_shared(module, run.engine)  # and measured as the first rank of a group, which has the most tokens
    teacher = (
        0 if frozen is None else sum(storage_bytes(t) for t in (*frozen.parameters(), *frozen.buffers()))
    )
    # On fake tensors every storage of a step is seen being made and let go, and none takes memory.
    with FakeTensorMode():
        make_fake(module)
        inputs = stage.example_inputs(built, micro_batch=micro_batch, world_size=world_size)
        sizes = measure_sizes(module)
        measured = measure_activations(module, inputs, autocast=run.engine.precision == "autocast_bf16")
    return _plan(run, sizes, measured, teacher, world_size=world_size, on_gpu=on_gpu), sizes


@dataclass(frozen=True, kw_only=True)
class _Moments:
    """Bytes beside the standing ones in backward and at its end, and the ones stage 3 adds for good."""

    backward: int
    reduction: int
    standing: int = 0


def _moments(
    run: TrainingRun,
    sizes: Sizes,
    measured: ActivationMeasure,
    *,
    world_size: int,
    on_gpu: bool,
) -> _Moments:
    """What gradients, buckets and gathered parameters add to the activations."""
    stage, trained = run.engine.zero_stage, sizes.trained
    wide, own = _bytes_of_a_weight(run), math.ceil(trained / world_size)
    bucket = _bucket(run, world_size=world_size)
    filled = min(trained, bucket)
    # torch.empty of the whole bucket is memory on a GPU; on a CPU only what is written counts.
    held = bucket if on_gpu and stage else filled
    if stage == 3:
        # Parameters are gathered from the other ranks ahead of their use, into one flat piece and from there.
        gathered = min(sizes.parameters, STAGE3_LIVE) if world_size > 1 else 0
        ahead = min(gathered, STAGE3_PREFETCH)
        return _Moments(
            backward=measured.peak(gradient_share=0.0) + wide * (gathered + ahead),
            reduction=wide * (gathered + filled + own),
            standing=wide * (own + held),  # gradients of this rank's part, and the bucket
        )
    if stage == 2 and on_gpu:
        in_bucket = measured.peak(gradient_share=0.0) + wide * held
        return _Moments(backward=in_bucket, reduction=wide * (filled + held + own))
    several = batch_split(run, world_size=world_size)[1] > 1
    share = 1.0 if stage <= 1 else filled / max(trained, 1)
    before = wide * trained if several and stage <= 1 else 0
    backward = measured.peak(gradient_share=share, gradients_before=before)
    if on_gpu and stage == 1:
        backward += wide * held
    gradients = trained if stage <= 1 else filled + (own if trained > bucket else 0)
    return _Moments(backward=backward, reduction=wide * (gradients + held))


def _plan(
    run: TrainingRun,
    sizes: Sizes,
    measured: ActivationMeasure,
    teacher_bytes: int,
    *,
    world_size: int,
    on_gpu: bool,
) -> MemoryPlan:
    stage, trained, wide = run.engine.zero_stage, sizes.trained, _bytes_of_a_weight(run)
    own = math.ceil(trained / world_size)
    kept = trained if stage == 0 else own  # values whose masters and moments this rank keeps
    states = optimizer_moments(run.optim) + bool(run.optim.average_decay)
    on_host = run.engine.offload != "none"
    moments = _moments(run, sizes, measured, world_size=world_size, on_gpu=on_gpu)
    own_weights = own if stage == 3 else trained
    weights = wide * (own_weights + sizes.parameters - trained) + sizes.buffer_bytes + teacher_bytes
    inputs = measured.input_bytes
    return MemoryPlan(
        weights=weights,
        masters=0 if on_host or (stage == 0 and wide == 4) else 4 * kept,
        optimizer=0 if on_host else 4 * states * kept,
        gradient_buffers=moments.standing,
        backward=inputs + moments.backward,
        reduction=inputs + moments.reduction,
        update=inputs + _update_bytes(run, sizes, wide=wide, world_size=world_size, on_gpu=on_gpu),
        saved_activations=measured.saved_bytes,
    )


def _bytes_of_a_weight(run: TrainingRun) -> int:
    return 2 if run.engine.precision in HALF else 4


def _update_bytes(run: TrainingRun, sizes: Sizes, *, wide: int, world_size: int, on_gpu: bool) -> int:
    """Gradients of this rank's part, their flat fp32 copy, and the temporaries of the optimizer.

    Fused AdamW has none. SGD adds weight decay and then momentum to a copy of the gradients of one group (its
    multi-tensor form on a GPU, or any form on a flat partition) or of one parameter.
    """
    stage = run.engine.zero_stage
    own = math.ceil(sizes.trained / world_size)
    group = math.ceil(sizes.largest_group / world_size)
    if stage == 0:
        gradients, unit = wide * sizes.trained, sizes.largest_group if on_gpu else sizes.largest_tensor
    else:
        gradients, unit = (4 * group if stage == 3 else wide * own + 4 * group), group
    temporaries = 0
    if run.optim.name == "sgd":
        temporaries = bool(run.optim.weight_decay) + bool(run.optim.nesterov and run.optim.momentum)
    elif run.optim.name == "lamb":
        temporaries = 3
    return gradients + 4 * unit * temporaries


def _bucket(run: TrainingRun, *, world_size: int) -> int:
    zero = deepspeed_config(run, world_size=world_size)["zero_optimization"]
    assert isinstance(zero, dict)
    return int(float(zero.get("reduce_bucket_size", DEEPSPEED_BUCKET)))


def measure_sizes(module: nn.Module) -> Sizes:
    """Parameter counts of a module, by what ZeRO does with them."""
    sizes = [p.numel() for p in module.parameters() if p.requires_grad]
    wide = sum(p.numel() for p in module.parameters() if p.requires_grad and p.ndim > 1)
    return Sizes(
        parameters=sum(p.numel() for p in module.parameters()),
        trained=sum(sizes),
        largest_group=max(wide, sum(sizes) - wide),
        largest_tensor=max(sizes, default=0),
        buffer_bytes=sum(storage_bytes(b) for b in module.buffers()),
    )


def parts(plan: MemoryPlan) -> Iterator[tuple[str, int]]:
    """What the peak is made of, for people."""
    yield "weights", plan.weights
    yield "masters", plan.masters
    yield "optimizer", plan.optimizer
    yield "gradient buffers", plan.gradient_buffers
    moments = {
        "activations and gradients": plan.backward,
        "gradients and bucket": plan.reduction,
        "gradients and update": plan.update,
    }
    yield max(moments.items(), key=lambda item: item[1])
