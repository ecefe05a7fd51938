"""Memory of one forward and backward pass, measured on fake tensors, which have shapes and no memory.

Every storage the pass makes is followed from its birth to its death. What is alive at the worst moment is the peak;
with activation checkpointing the recomputation happens, and counts, too.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
        parameters = list(part.named_parameters(recurse=False, remove_duplicate=False))
        buffers = list(part.named_buffers(recurse=False, remove_duplicate=False))
        for name, tensor in (*parameters, *buffers):
            setattr(part, name, fake(tensor))


def measure_activations(
    module: nn.Module, inputs: Mapping[str, Tensor], *, autocast: bool
) -> ActivationMeasure:
    """Follow every storage of one forward and backward pass. Call under ``FakeTensorMode``, with a fake module."""
    known = [*module.parameters(), *module.buffers(), *inputs.values()]
    saved = _SavedBytes(known)
    live = _LiveBytes(known)
    hooks = [
        p.register_post_accumulate_grad_hook(live.is_gradient)  # type: ignore[no-untyped-call]
        for p in module.parameters()
        if p.requires_grad
    ]
    with live:
        with saved.hooks(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = module(dict(inputs))
        outputs["loss"].backward()
    for hook in hooks:
        hook.remove()
    module.zero_grad(set_to_none=True)
    return ActivationMeasure(
        saved_bytes=saved.bytes,
        input_bytes=sum(storage_bytes(t) for t in inputs.values()),
        timeline=tuple(live.timeline),
    )


class _SavedBytes:
    """Bytes of the distinct storages autograd saves, parameters and inputs left out."""

    def __init__(self, known: list[Tensor]) -> None:
        self.seen = {_identity(t) for t in known}
        self.bytes = 0
        self.kept: list[Tensor] = []  # while they are held here, an identity cannot be given out again

    def hooks(self) -> contextlib.AbstractContextManager[object]:
        def pack(tensor: Tensor) -> Tensor:
            if _identity(tensor) not in self.seen:
                self.seen.add(_identity(tensor))
                self.bytes += storage_bytes(tensor)
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes of all storages made inside and still alive, at every moment something is made."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}
        self.known = {_identity(t) for t in known}
        self.gradients: set[int] = set()
        self.now = self.gradients_now = 0
        self.timeline: list[tuple[int, int]] = [(0, 0)]

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._record_storage(leaf)
        return out

    def _record_storage(self, tensor: Tensor) -> None:
        identity = _identity(tensor)
        if identity in self.sizes or identity in self.known:
            return
        storage = tensor.untyped_storage()
        self.sizes[identity] = storage.nbytes()
        self.now += storage.nbytes()
        weakref.finalize(storage, self._forget_storage, identity)
        self.timeline.append((self.now, self.gradients_now))

    def _forget_storage(self, identity: int) -> None:
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


def storage_bytes(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().nbytes())
