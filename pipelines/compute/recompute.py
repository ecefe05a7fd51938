"""Activation checkpointing: blocks keep what goes into them, and the backward pass computes the rest again.

``selective`` keeps also what is dear to compute and small to keep, the outputs of matrix products, convolutions and
attention; what is computed again is what reads and writes memory and hardly computes: normalisation, activation
functions, sums (Korthikanti et al., arXiv:2205.05198, section 5, with the roles by cost of the operation).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cliplift.models.protocol import ModelError, VideoNetwork

Contexts = tuple[contextlib.AbstractContextManager[object], contextlib.AbstractContextManager[object]]

aten = torch.ops.aten
# By name, since some exist on one device alone or not in every version of torch.
DEAR = frozenset(
    packet
    for name in (
        "mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
    )
    if (packet := getattr(aten, name, None)) is not None
)  # fmt: skip


def recompute_blocks(network: VideoNetwork, share: float = 1.0, *, selective: bool = False) -> list[str]:
    """Recompute the activations of the first ``share`` of a network's blocks in the backward pass.

    The first blocks, because in convolutional nets they hold the largest maps. Only the forward of the named
    submodules is replaced, so parameters, state-dict keys and hooks stay as they are. BatchNorm statistics are
    left alone by the recomputation. Calling it again changes the share; 0 undoes it.

    Args:
        network: any with ``checkpoint_blocks()`` (see ``VideoModel``).
        share: of the blocks, in [0, 1]; rounded up to whole blocks.
        selective: keep the outputs of products, convolutions and attention.

    Returns:
        The names of the wrapped submodules, in forward order.

    Raises:
        ModelError: share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ModelError(f"activation checkpointing: share={share} must be in [0, 1]")
    names = network.checkpoint_blocks()
    wrapped = list(names[: math.ceil(share * len(names))])
    for name in names:
        block = network.get_submodule(name)
        block.__dict__.pop("forward", None)  # an instance attribute hides the class's forward
        if name in wrapped:
            block.__dict__["forward"] = Recomputed(block, selective=selective)
    return wrapped


class Recomputed:
    """A block's own forward, whose activations the backward pass computes again.

    ``run`` is that forward: it may be replaced by a compiled one.
    """

    def __init__(self, block: nn.Module, *, selective: bool) -> None:
        self.block = block
        self.run: Callable[..., object] = functools.partial(type(block).forward, block)
        self.counts = tracks_statistics(block)
        self.selective = selective

    def __call__(self, *inputs: object) -> object:
        if not torch.is_grad_enabled():
            return self.run(*inputs)
        if self.counts:
            contexts = functools.partial(_contexts, self.block, self.selective)
            return checkpoint(self.run, *inputs, use_reentrant=False, context_fn=contexts)
        if self.selective:
            # In this very form torch.compile reads the policy.
            chosen = functools.partial(create_selective_checkpoint_contexts, kept_or_recomputed)
            return checkpoint(self.run, *inputs, use_reentrant=False, context_fn=chosen)
        return checkpoint(self.run, *inputs, use_reentrant=False)


def tracks_statistics(block: nn.Module) -> bool:
    """Whether a forward pass changes BatchNorm's running statistics in it."""
    return any(isinstance(part, _BatchNorm) and part.track_running_stats for part in block.modules())


def kept_or_recomputed(_: object, operation: object, *arguments: object, **named: object) -> CheckpointPolicy:
    """The policy of ``selective``, by the operation alone."""
    packet = getattr(operation, "overloadpacket", operation)
    return CheckpointPolicy.MUST_SAVE if packet in DEAR else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts(block: nn.Module, selective: bool) -> Contexts:
    if not selective:
        return contextlib.nullcontext(), _held_statistics(block)
    first, again = create_selective_checkpoint_contexts(kept_or_recomputed)  # type: ignore[no-untyped-call]
    # Statistics are set aside before the policy looks on: it saw no such operation in the first pass.
    return first, _both(_held_statistics(block), again)


@contextlib.contextmanager
def _both(*contexts: contextlib.AbstractContextManager[object]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@contextlib.contextmanager
def _held_statistics(block: nn.Module) -> Iterator[None]:
    """Run BatchNorm on batch statistics without counting that batch a second time."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = [(m, m.momentum, m.num_batches_tracked) for m in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = (
            None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
        )
    try:
        yield
    finally:
        for norm, momentum, counter in before:
            norm.momentum, norm.num_batches_tracked = momentum, counter
