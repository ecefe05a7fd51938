"""How much memory one rank of a training run will need, before anything is allocated.

Activations are not estimated but measured: the stage's own module runs one forward and backward pass on fake tensors
(which have shapes and no memory), and every storage it makes is followed from its birth to its death. What is alive
at the worst moment is the peak; with activation checkpointing the recomputation happens, and counts, too.
Model states follow from the ZeRO stage: which rank keeps which parameters, gradients, fp32 masters and moments
(ZeRO, arXiv:1910.02054, figure 1, and what DeepSpeed's stages allocate beyond it).
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cliplift.configs.runs import ClassificationRun, FinetuneRun, TransferRun
from cliplift.models import create_model
from cliplift.models.correspondence import CorrespondenceHead
from cliplift.models.layers import checkpoint_blocks
from cliplift.models.registry import model_entry
from cliplift.pipelines.classification import Classifier, freeze_all_but_head
from cliplift.pipelines.deepspeed_config import batch_split, deepspeed_config
from cliplift.pipelines.transfer import SupervisionTransfer

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
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
class ActivationMeasure:
    """One forward and backward pass of one micro-batch.

    ``saved_bytes``: what autograd keeps from forward to backward. ``timeline``: (activations, parameter gradients)
    alive, in bytes, whenever something was allocated.
    """

    saved_bytes: int
    input_bytes: int
    timeline: tuple[tuple[int, int], ...]

    def peak(self, *, gradient_share: float, gradients_before: int = 0) -> int:
        """Largest sum of activations and the share of gradients this rank keeps.

        ``gradients_before`` are gradients of earlier micro-batches, which lie there from the start.
        """
        return max(
            activations + max(gradients_before, int(gradient_share * gradients))
            for activations, gradients in self.timeline
        )


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on one rank: what always lies there, and the three moments of a step one of which is the peak."""

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


def plan_memory(
    run: TransferRun | ClassificationRun, *, classes: int, world_size: int, on_gpu: bool
) -> tuple[MemoryPlan, Sizes]:
    """The plan of a run on this many ranks.

    Args:
        run: the run.
        classes: K, number of classes of its data.
        world_size: N, number of ranks.
        on_gpu: DeepSpeed's buckets and the caching allocator take what they are given there; on a CPU a page that
            is never written costs nothing.

    Raises:
        ModelError: the model cannot be built with these options.
        RuntimeError: its shapes do not fit together.
    """
    micro_batch, accumulation = batch_split(run, world_size=world_size)
    with torch.device("meta"):
        module, frozen = build_module(run, classes=classes)
    teacher = 0 if frozen is None else sum(_bytes(t) for t in (*frozen.parameters(), *frozen.buffers()))
    with FakeTensorMode():
        make_fake(module)
        inputs = stage_inputs(
            run,
            classes=classes,
            teacher_dim=0 if frozen is None else cast(Any, frozen).feature_dim,
            micro_batch=micro_batch,
            world_size=world_size,
        )
        sizes = measure_sizes(module)
        measured = measure_activations(module, inputs, run)
    return _plan(
        run, sizes, measured, teacher, world_size=world_size, accumulation=accumulation, on_gpu=on_gpu
    ), sizes


def _plan(
    run: TransferRun | ClassificationRun,
    sizes: Sizes,
    measured: ActivationMeasure,
    teacher_bytes: int,
    *,
    world_size: int,
    accumulation: int,
    on_gpu: bool,
) -> MemoryPlan:
    stage, engine, trained = run.engine.zero_stage, run.engine, sizes.trained
    wide = 2 if engine.precision in HALF else 4  # bytes of a weight and of its gradient
    own = math.ceil(trained / world_size)
    moments = 2 if run.optim.name != "sgd" else int(run.optim.momentum > 0)
    kept = trained if stage == 0 else own
    offloaded = engine.offload != "none"
    bucket = _bucket(run, world_size=world_size)
    filled = min(trained, bucket)
    # torch.empty of the whole bucket is memory on a GPU; on a CPU only what is written counts.
    held = bucket if on_gpu and stage else filled
    inputs = measured.input_bytes
    buffers = 0
    if stage == 3:
        # Parameters are gathered from the other ranks ahead of their use, into one flat piece and from there.
        gathered = min(sizes.parameters, STAGE3_LIVE) if world_size > 1 else 0
        ahead = min(gathered, STAGE3_PREFETCH)
        buffers = wide * (own + held)  # gradients of this rank's part, and the bucket, which stays
        backward = measured.peak(gradient_share=0.0) + wide * (gathered + ahead)
        reduction = wide * (gathered + filled + own)
    elif stage == 2 and on_gpu:
        backward = measured.peak(gradient_share=0.0) + wide * held
        reduction = wide * (filled + held + own)
    else:
        before = wide * trained if accumulation > 1 and stage <= 1 else 0
        share = 1.0 if stage <= 1 else filled / max(trained, 1)
        backward = measured.peak(gradient_share=share, gradients_before=before)
        backward += wide * held if on_gpu and stage == 1 else 0
        reduction = wide * ((trained if stage <= 1 else filled) + held)
        reduction += wide * own if stage == 2 and trained > bucket else 0
    return MemoryPlan(
        weights=wide * (own if stage == 3 else trained)
        + wide * (sizes.parameters - trained)
        + sizes.buffer_bytes
        + teacher_bytes,
        masters=0 if offloaded or (stage == 0 and wide == 4) else 4 * kept,
        optimizer=0 if offloaded else 4 * (moments + bool(run.optim.average_decay)) * kept,
        gradient_buffers=buffers,
        backward=inputs + backward,
        reduction=inputs + reduction,
        update=inputs + _update_bytes(run, sizes, wide=wide, world_size=world_size, on_gpu=on_gpu),
        saved_activations=measured.saved_bytes,
    )


def _update_bytes(
    run: TransferRun | ClassificationRun, sizes: Sizes, *, wide: int, world_size: int, on_gpu: bool
) -> int:
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


def _bucket(run: TransferRun | ClassificationRun, *, world_size: int) -> int:
    zero = deepspeed_config(run, world_size=world_size)["zero_optimization"]
    return int(float(zero.get("reduce_bucket_size", DEEPSPEED_BUCKET)))


def build_module(run: TransferRun | ClassificationRun, *, classes: int) -> tuple[nn.Module, nn.Module | None]:
    """The module a stage trains, and its frozen teacher, without weights from files."""
    options = dict[str, Any](run.model.options)
    frames = run.data.sampling.frames
    if isinstance(run, ClassificationRun):
        network = create_model(run.model.name, num_classes=classes, in_frames=frames, **options)
        if isinstance(run, FinetuneRun) and run.train_part == "head":
            freeze_all_but_head(network)
        multi_label = run.task == "multi_label"
        module: nn.Module = Classifier(network, label_smoothing=run.label_smoothing, multi_label=multi_label)
        return _prepared(module, network, run), None
    student: Any = create_model(run.model.name, num_classes=0, in_frames=frames, **options)
    teacher: Any = create_model(run.teacher.name, num_classes=0, **dict[str, Any](run.teacher.options))
    matching = run.correspondence
    head = CorrespondenceHead(
        student.feature_dim,
        cast(int, teacher.feature_dim),
        embed_dim=matching.feature_dim,
        hidden=matching.hidden,
        normalise=matching.normalise_features,
        dropout=matching.dropout,
    )
    return _prepared(SupervisionTransfer(student, head, matching), student, run), teacher


def _prepared(module: nn.Module, network: nn.Module, run: TransferRun | ClassificationRun) -> nn.Module:
    """As the engine prepares it: weights cast, blocks recomputed."""
    dtype = HALF.get(run.engine.precision)
    if dtype is not None:
        module = module.to(dtype)
    if run.engine.checkpoint_blocks_share:
        checkpoint_blocks(network, run.engine.checkpoint_blocks_share)
    return module.train()


def make_fake(module: nn.Module) -> None:
    """Replace a meta module's parameters and buffers by fake CPU ones. Call under ``FakeTensorMode``.

    On fake CPU tensors operators choose the kernels they choose on real ones; on the meta device attention, for one,
    would be measured with the kernel that keeps the whole matrix.
    """
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:  # tied weights stay one
            empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)


def stage_inputs(
    run: TransferRun | ClassificationRun,
    *,
    classes: int,
    teacher_dim: int,
    micro_batch: int,
    world_size: int,
) -> dict[str, Tensor]:
    """A micro-batch of the shapes the stage's module gets; ``teacher_dim`` is the width of the teacher's features."""
    B, T, side = micro_batch, run.data.sampling.frames, run.data.crop_pixels
    dtype = HALF.get(run.engine.precision, torch.float32)
    clips = torch.zeros(B, 3, T, side, side, dtype=dtype)
    if run.engine.channels_last:
        clips = clips.contiguous(memory_format=torch.channels_last_3d)
    if model_entry(run.model.name).dims == "2d":
        clips = clips[:, :, 0]
    if isinstance(run, ClassificationRun):
        inputs = {"clips": clips, "labels": torch.zeros(B, dtype=torch.int64)}
        if run.task == "multi_label" or run.data.augment.mixup_alpha or run.data.augment.cutmix_alpha:
            inputs["targets"] = torch.zeros(B, classes)
        return inputs
    G, k = B * world_size, run.correspondence.negatives_per_clip
    pairs = torch.zeros(B, 1 + k, dtype=torch.int64)
    videos = torch.zeros(B, dtype=torch.int64)
    return {
        "clips": clips,
        "frame_features": torch.zeros(G, teacher_dim, dtype=dtype),
        "pairs": pairs,
        "targets": torch.zeros_like(pairs),
        "clip_videos": videos,
        "frame_videos": torch.zeros(G, dtype=torch.int64),
    }


def measure_sizes(module: nn.Module) -> Sizes:
    """Parameter counts of a module, by what ZeRO does with them."""
    sizes = [p.numel() for p in module.parameters() if p.requires_grad]
    wide = sum(p.numel() for p in module.parameters() if p.requires_grad and p.ndim > 1)
    return Sizes(
        parameters=sum(p.numel() for p in module.parameters()),
        trained=sum(sizes),
        largest_group=max(wide, sum(sizes) - wide),
        largest_tensor=max(sizes, default=0),
        buffer_bytes=sum(_bytes(b) for b in module.buffers()),
    )


def measure_activations(
    module: nn.Module, inputs: Mapping[str, Tensor], run: TransferRun | ClassificationRun
) -> ActivationMeasure:
    """Follow every storage of one forward and backward pass. Call under ``FakeTensorMode``, with a fake module."""
    known = [*module.parameters(), *module.buffers(), *inputs.values()]
    saved = _SavedBytes(known)
    live = _LiveBytes(known)
    hooks = [
        p.register_post_accumulate_grad_hook(live.is_gradient) for p in module.parameters() if p.requires_grad
    ]
    autocast = run.engine.precision == "autocast_bf16"
    with live:
        with saved.hooks(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = module(dict(inputs))
        outputs["loss"].backward()
    for hook in hooks:
        hook.remove()
    module.zero_grad(set_to_none=True)
    return ActivationMeasure(
        saved_bytes=saved.bytes,
        input_bytes=sum(_bytes(t) for t in inputs.values()),
        timeline=tuple(live.timeline),
    )


class _SavedBytes:
    """Bytes of the distinct storages autograd saves, parameters and inputs left out."""

    def __init__(self, known: list[Tensor]) -> None:
        self.seen = {_identity(t) for t in known}
        self.bytes = 0
        self.kept: list[Tensor] = []  # while they are held here, an identity cannot be given out again

    def hooks(self) -> contextlib.AbstractContextManager[Any]:
        def pack(tensor: Tensor) -> Tensor:
            if _identity(tensor) not in self.seen:
                self.seen.add(_identity(tensor))
                self.bytes += _bytes(tensor)
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


class _LiveBytes(TorchDispatchMode):
    """The bytes of all storages made inside and still alive, at every moment something is made."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.known = {_identity(t) for t in known}
        self.gradients: set[int] = set()
        self.now = self.gradients_now = 0
        self.timeline: list[tuple[int, int]] = [(0, 0)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._made(leaf)
        return out

    def _made(self, tensor: Tensor) -> None:
        identity = _identity(tensor)
        if identity in self.sizes or identity in self.known:
            return
        storage = tensor.untyped_storage()
        self.sizes[identity] = storage.nbytes()
        self.now += storage.nbytes()
        weakref.finalize(storage, self._gone, identity)
        self.timeline.append((self.now, self.gradients_now))

    def _gone(self, identity: int) -> None:
        size = self.sizes.pop(identity)
        if identity in self.gradients:
            self.gradients.discard(identity)
            self.gradients_now -= size
        else:
            self.now -= size

    def is_gradient(self, parameter: Tensor) -> None:
        """A gradient has been put where it stays: from now on it is not an activation."""
        assert parameter.grad is not None
        identity = _identity(parameter.grad)
        if identity in self.sizes and identity not in self.gradients:
            self.gradients.add(identity)
            self.now -= self.sizes[identity]
            self.gradients_now += self.sizes[identity]


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().nbytes())


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
