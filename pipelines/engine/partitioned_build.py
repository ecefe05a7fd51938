"""Networks that start large: at ZeRO stage 3 each rank keeps its own part of a network while it is being built.

Constructors run on every rank as they always do, from the same generator, so every weight is drawn whole and has the
bits it has without this, whatever the number of ranks. But when a module is given to its parent, each rank keeps only
its own elements of that module's parameters, cut as DeepSpeed cuts them, and the parameter becomes a tensor of the same
shape that takes no memory. What a constructor still does to it later (other first values, weights from a file) finds it
whole: it is gathered before and cut again afterwards. A tensor copied over it, as weights from a file are, is read
only where this rank keeps it.

Not DeepSpeed's ``zero.Init``: that cuts a module when its constructor returns and leaves an empty tensor, on which
later initialisation does nothing, without a word; it loses the shapes, and sends every tensor from rank 0.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode

from cliplift.configs.training import EngineConfig
from cliplift.pipelines.distributed.collectives import Topology, all_gather_tensor

ATTRIBUTE = "cliplift_part"  # of a parameter that is built and not yet DeepSpeed's
SEEN = "cliplift_parameter"  # of ``parameter.detach()`` and ``parameter.data``: the parameter
# Raw DeepSpeed keys with which parameters are cut a second time, from whole ones.
CUT_AGAIN = ("zero_hpz_partition_size", "mics_shard_size")

# What asks a parameter for its shape or type, and not for its values.
_ATTRIBUTES = (
    "shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "layout", "is_meta", "is_cpu", "is_cuda",
    "is_sparse", "is_quantized", "itemsize", "nbytes", "grad", "grad_fn",
)  # fmt: skip
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "requires_grad_", "is_floating_point",
    "is_complex", "__len__",
)  # fmt: skip
SHAPE_ONLY = frozenset(
    [getattr(Tensor, name).__get__ for name in _ATTRIBUTES]
    + [Tensor.requires_grad.__set__]  # type: ignore[attr-defined]
    + [getattr(Tensor, name) for name in _METHODS]
    + [torch.is_floating_point, torch.is_complex, torch.numel]
)


# What gives another tensor with the parameter's memory: a state dict is made of these, often for its names alone.
SAME_MEMORY = (Tensor.detach, Tensor.data.__get__)  # type: ignore[attr-defined]


@dataclass
class Part:
    """This rank's elements of a parameter: ``values`` (length,), from element ``start`` of it flattened."""

    parameter: weakref.ref[nn.Parameter]  # one that the network lets go is not kept alive
    start: int
    values: Tensor


def built_in_parts(build: Callable[[], nn.Module], engine: EngineConfig, topology: Topology) -> nn.Module:
    """What ``build`` returns; at ZeRO stage 3 with this rank's part of each of its parameters. Collective.

    Parameters that ``build`` makes beside the module, those of a frozen teacher, are whole in the end.
    """
    zero = engine.deepspeed.get("zero_optimization")
    cut_again = isinstance(zero, Mapping) and any(key in zero for key in CUT_AGAIN)
    if engine.zero_stage != 3 or cut_again:
        return build()
    with BuildInParts(topology) as parts:
        module = build()
    parts.finish(module)
    return module


def part_of(parameter: nn.Parameter) -> Part | None:
    """This rank's part of a parameter that was built in parts; None for one that is whole, or DeepSpeed's."""
    return parameter.__dict__.get(ATTRIBUTE)


def is_in_parts(module: nn.Module) -> bool:
    return any(part_of(parameter) is not None for parameter in module.parameters())


class BuildInParts(TorchFunctionMode):
    """Inside the block, parameters are cut as modules are given to their parents, and gathered where they are used."""

    def __init__(self, topology: Topology) -> None:
        super().__init__()
        self.topology = topology
        self._at_work = False  # outside __torch_function__ what is done here would come back to it
        self.gathered = 0  # how often a parameter was made whole again
        self._parts: dict[int, Part] = {}
        self._whole: dict[int, nn.Parameter] = {}  # to be cut as soon as no other tensor shares their memory

    def __enter__(self) -> BuildInParts:
        self._hook = register_module_module_registration_hook(self._given_to_parent)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        self._hook.remove()

    def _given_to_parent(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        for parameter in () if child is None else child.parameters():
            if id(parameter) not in self._parts and parameter.device.type != "meta":
                self._whole[id(parameter)] = parameter
        self._at_work = True
        self._cut_what_is_free()
        self._at_work = False

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = kwargs or {}
        used = [t for t in _tensors((args, given)) if self._is_cut(t)]
        if not used or func in SHAPE_ONLY or self._at_work:
            return func(*args, **given)
        if func in SAME_MEMORY:
            seen = func(*args, **given)
            assert isinstance(seen, Tensor)
            seen.__dict__[SEEN] = used[0].__dict__.get(SEEN, used[0])
            return seen
        if func is Tensor.copy_ and self._copied_over(*args, **given):
            return args[0]
        self._cut_what_is_free()
        for tensor in used:
            self._make_whole(tensor)
        return func(*args, **given)

    def _is_cut(self, tensor: Tensor) -> bool:
        """Whether it is a parameter without its memory, or was made of one."""
        return id(tensor) in self._parts or SEEN in tensor.__dict__

    def _make_whole(self, tensor: Tensor) -> None:
        parameter: nn.Parameter = tensor.__dict__.pop(SEEN, tensor)
        self._gather(parameter)
        if parameter is not tensor:
            tensor.data = parameter.data

    def _copied_over(self, target: object, source: object = None, *_: object, **__: object) -> bool:
        """Copy this rank's elements of a tensor over its part; False where that is not all there is to it."""
        part = self._parts.get(id(target))
        if part is None or not isinstance(source, Tensor) or self._is_cut(source):
            return False
        assert isinstance(target, Tensor)
        if source.shape != target.shape or (torch.is_grad_enabled() and target.requires_grad):
            return False  # torch knows what to do, or what to say
        part.values.copy_(source.detach().reshape(-1)[part.start : part.start + part.values.numel()])
        return True

    def _cut_what_is_free(self) -> None:
        for parameter in [p for p in self._whole.values() if not _shares_memory(p)]:
            self._cut(parameter)

    def _cut(self, parameter: nn.Parameter) -> None:
        self._whole.pop(id(parameter), None)
        size = math.ceil(parameter.numel() / self.topology.world_size)
        start = min(self.topology.rank * size, parameter.numel())
        values = parameter.detach().reshape(-1)[start : start + size].clone()
        key = id(parameter)
        self._parts[key] = Part(weakref.ref(parameter, lambda _: self._parts.pop(key, None)), start, values)
        parameter.data = _without_memory(parameter, parameter.device)

    def _gather(self, parameter: nn.Parameter) -> None:
        part = self._parts.pop(id(parameter), None)
        if part is None:
            return  # whole already
        size = math.ceil(parameter.numel() / self.topology.world_size)
        own = torch.zeros(size, dtype=parameter.dtype, device=self.topology.device)
        own[: part.values.numel()].copy_(part.values)
        whole = all_gather_tensor(own, self.topology)[: parameter.numel()]
        parameter.data = whole.reshape(parameter.shape).to(parameter.device)
        self._whole[id(parameter)] = parameter
        self.gathered += 1

    def finish(self, module: nn.Module) -> None:
        """After the block: all parameters of ``module`` are cut, and all others whole. Collective."""
        kept = {id(parameter): parameter for parameter in module.parameters()}
        for key, parameter in kept.items():
            if key not in self._parts:
                self._cut(parameter)
            parameter.__dict__[ATTRIBUTE] = self._parts[key]
        gc.collect()  # what the network has let go is then gone on all ranks, and no rank gathers it alone
        for key in [key for key in self._parts if key not in kept]:
            beside = self._parts[key].parameter()
            assert beside is not None
            self._gather(beside)
        self._parts, self._whole = {}, {}


def _tensors(given: object) -> Iterator[Tensor]:
    """The tensors among a call's arguments, and in their lists and tuples."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, list | tuple):
        for item in given:
            yield from _tensors(item)
    elif isinstance(given, Mapping):
        yield from _tensors(list(given.values()))


def _shares_memory(parameter: nn.Parameter) -> bool:
    """Whether another tensor has the parameter's memory (``parameter.data``, a view), and may yet write into it."""
    return _references(parameter) > _references(nn.Parameter(torch.empty(1)))


def _references(tensor: Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def _without_memory(parameter: Tensor, device: torch.device) -> Tensor:
    """One number, seen as a tensor of the parameter's shape. It is NaN, so that no result can be built on it."""
    fill = math.nan if parameter.is_floating_point() else 0
    return torch.full((), fill, dtype=parameter.dtype, device=device).expand(parameter.shape)


def move_to(module: nn.Module, device: torch.device) -> nn.Module:
    """``module.to(device)``; of what is built in parts, the buffers, for its parts go there as DeepSpeed's."""
    if not is_in_parts(module):
        return module.to(device)
    for parameter in module.parameters():
        parameter.data = _without_memory(parameter, device)
    for inner in module.modules():
        for name, buffer in inner._buffers.items():
            if buffer is not None:
                inner._buffers[name] = buffer.to(device)
    return module


def hand_over(module: nn.Module, config: Mapping[str, object], *, dtype: torch.dtype | None) -> None:
    """Make DeepSpeed's partitioned parameters of the parts, one after the other; a module that is whole stays as it is.

    Args:
        module: what :func:`built_in_parts` gave.
        config: of DeepSpeed.
        dtype: to cast the parameters to; None keeps theirs.
    """
    if not is_in_parts(module):
        return
    from deepspeed.runtime.zero.partition_parameters import Init

    # With a module, even an empty one, it also puts its memory-saving linear layer in place, as for a whole network.
    init = Init(module=nn.Module(), config_dict_or_path=dict(config))
    for parameter in module.parameters():
        part: Part = parameter.__dict__.pop(ATTRIBUTE)
        # Most writing is refused by torch, since all elements are one; filling them with one number is not.
        assert not parameter.is_floating_point() or parameter.isnan().all(), "changed after it was built"
        # Memory that is never written takes none, and DeepSpeed copies this rank's elements out of it and no others.
        kept_as = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
        whole = torch.empty(parameter.shape, dtype=kept_as, device=init.local_device)
        whole.view(-1)[part.start : part.start + part.values.numel()].copy_(part.values)
        parameter.data = whole
        del whole
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]
        kept = parameter.ds_tensor.ds_numel * init.rank  # type: ignore[attr-defined]
        assert min(kept, parameter.ds_numel) == part.start, "DeepSpeed cuts another way"  # type: ignore[attr-defined]
