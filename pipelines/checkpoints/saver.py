"""Checkpoints written by all ranks together, each rank its own part; none holds or gathers the whole.

``checkpoints/step_00000040/`` (format 3) holds, of each rank, ``parameters-rankR.safetensors``, ``optimizer-rankR``
and with a moving average ``average-rankR``, all in slices (``slices.py``), and whole ``buffers-rankR``,
``average-buffers-rankR`` and ``random-rankR``; beside them ``state.json`` (step, schedule, fingerprints). When all
ranks have written theirs, rank 0 seals the folder with ``COMPLETE.json`` and renames it into place.

Slices are named by parameter, in fp32, so a checkpoint knows neither ranks nor ZeRO stages. DeepSpeed's own files are
not used: they refuse another world size and another stage.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from cliplift.models.weight_files import WrittenFile
from cliplift.pipelines.checkpoints.folder import Folder
from cliplift.pipelines.checkpoints.slices import CheckpointError, Slice, write_slices
from cliplift.pipelines.checkpoints.targets import Target, target_of
from cliplift.pipelines.distributed.collectives import Topology, gather_objects
from cliplift.sharding.storage import StorageError

log = logging.getLogger(__name__)

FAILURES = (OSError, SafetensorError, StorageError)  # of a disk or a store


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds of the training state: of the ranks' shared tensors what this rank writes.

    Tensors may be views of the living state, on any device.
    """

    parameters: Mapping[str, Slice]
    optimizer: Mapping[str, Slice]  # "parameter name|state name"
    buffers: Mapping[str, Tensor]  # this rank's
    random_state: Mapping[str, Tensor]  # this rank's
    state: Mapping[str, Any]
    average: Mapping[str, Slice] = field(
        default_factory=dict
    )  # of the trainable parameters; empty without EMA
    average_buffers: Mapping[str, Tensor] = field(default_factory=dict)  # this rank's

    def files(self, rank: int) -> dict[str, Mapping[str, Slice]]:
        """File name -> what this rank writes into it."""
        kinds = {
            "parameters": self.parameters,
            "optimizer": self.optimizer,
            "buffers": _whole(self.buffers),
            "random": _whole(self.random_state),
        }
        if self.average:
            kinds |= {"average": self.average, "average-buffers": _whole(self.average_buffers)}
        return {f"{kind}-rank{rank}.safetensors": slices for kind, slices in kinds.items()}

    def copied(self) -> Snapshot:
        """The same in host memory of its own, so that training may go on while it is written.

        From a GPU into pinned memory, all tensors at once: the host waits for the last of them alone.
        """
        copied = replace(
            self,
            parameters=_copied_slices(self.parameters),
            optimizer=_copied_slices(self.optimizer),
            average=_copied_slices(self.average),
            buffers={name: _copied(tensor) for name, tensor in self.buffers.items()},
            random_state={name: _copied(tensor) for name, tensor in self.random_state.items()},
            average_buffers={name: _copied(tensor) for name, tensor in self.average_buffers.items()},
        )
        if any(part.values.is_cuda for part in self.parameters.values()):
            torch.cuda.current_stream().synchronize()
        return copied


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Slice]:
    return {name: Slice.whole(tensor) for name, tensor in tensors.items()}


def _copied_slices(slices: Mapping[str, Slice]) -> dict[str, Slice]:
    return {name: replace(part, values=_copied(part.values)) for name, part in slices.items()}


def _copied(tensor: Tensor) -> Tensor:
    far = tensor.is_cuda
    copy = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format, pin_memory=far)
    return copy.copy_(tensor, non_blocking=far)


class Saver:
    """Writes checkpoints, all ranks together; with ``asynchronous`` a thread of each rank does while training goes on.

    The next save and :meth:`wait` are where a failure in a thread is raised, on all ranks. ``timeout_seconds`` is how
    long the threads wait for one another. ``records`` publishes a run's small files: called on rank 0 before a
    checkpoint in a store is sealed.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        asynchronous: bool,
        timeout_seconds: float = 1800.0,
        records: Callable[[], None] = lambda: None,
    ) -> None:
        self.topology, self._records = topology, records
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        if self._thread is not None:
            self._thread.submit(int)  # it starts here, so that the first save does not wait for it
        self._group: dist.ProcessGroup | None = None
        if asynchronous and topology.world_size > 1:
            # The threads agree in a group of their own: collectives of the training must not mix with theirs.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self._unfinished: tuple[Target, Future[None]] | None = None

    @property
    def asynchronous(self) -> bool:
        """Whether a thread writes."""
        return self._thread is not None

    def save(self, folder: Folder, snapshot: Snapshot, *, keep_last: int) -> Target:
        """Write one checkpoint; older ones beyond ``keep_last`` are removed after it is complete. Collective.

        With ``asynchronous`` the training stands still for the copy of this rank's part and for nothing else: folders,
        names and what the ranks must agree on are the thread's business too.

        Returns:
            whose ``place`` says where it is, or with ``asynchronous`` will be after :meth:`wait`.

        Raises:
            CheckpointError: this one or, with ``asynchronous``, the one before could not be written.
        """
        self.wait()
        target = target_of(
            folder, step=int(snapshot.state["step"]), topology=self.topology, records=self._records
        )
        if self._thread is None:
            self._write(target, snapshot, keep_last)
        else:
            writing = self._thread.submit(self._write, target, snapshot.copied(), keep_last)
            self._unfinished = target, writing
        return target

    def _write(self, target: Target, snapshot: Snapshot, keep_last: int) -> None:
        """Make room, write this rank's files, hear of the others', and seal. Collective, in the threads' own group."""
        with self._agreed_failure(target):
            target.clear()
        target.agree(self._group)
        with self._agreed_failure(target):
            target.partial.mkdir(parents=True, exist_ok=True)  # a rank on a host without a common disk
        written: dict[str, WrittenFile] = {}
        with self._agreed_failure(target):
            written = _write_own(target, snapshot, rank=self.topology.rank)
        files = dict(gather_objects(list(written.items()), self.topology, group=self._group))
        with self._agreed_failure(target):
            if self.topology.is_main:
                target.seal(files, {"world_size": self.topology.world_size, **snapshot.state})
                target.prune(keep_last=keep_last)

    @contextlib.contextmanager
    def _agreed_failure(self, target: Target) -> Iterator[None]:
        """All ranks wait for each other at the end; where one could not write, all raise, and none waits in vain."""
        problem: list[str] = []
        try:
            yield
        except FAILURES as error:
            problem.append(f"rank {self.topology.rank}: {error}")
        except Exception as error:
            if self._thread is None:
                raise
            # A fault of ours in a thread: the others' threads must hear of it, and nobody else would log its trace.
            log.exception("the thread that writes %s failed", target.partial.stem)
            problem.append(f"rank {self.topology.rank}: {type(error).__name__}: {error}")
        problems = gather_objects(problem, self.topology, group=self._group)
        if problems:
            target.discard()
            raise _not_written(target, problems[0])

    def wait(self) -> None:
        """Until the last checkpoint is complete. Collective; raises CheckpointError where it could not be written."""
        if self._unfinished is None:
            return
        (target, writing), self._unfinished = self._unfinished, None
        problem: list[CheckpointError] = []
        try:
            writing.result()
        except CheckpointError as error:  # the threads have agreed on it
            problem.append(error)
        except Exception as error:  # they could not speak to each other
            target.discard()
            log.exception("the thread that writes %s failed", target.partial.stem)
            problem.append(
                _not_written(target, f"rank {self.topology.rank}: {type(error).__name__}: {error}")
            )
        problems = gather_objects(problem, self.topology)
        if problems:
            raise problems[0]


def _write_own(target: Target, snapshot: Snapshot, *, rank: int) -> dict[str, WrittenFile]:
    """This rank's files, one after the other, and what was written."""
    written: dict[str, WrittenFile] = {}
    for name, slices in snapshot.files(rank).items():
        written[name] = write_slices(target.partial / name, slices)
        target.take(target.partial / name)
    target.leave()
    return written


def _not_written(target: Target, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{target.where}: the checkpoint {target.partial.stem} could not be written ({problem}); "
        f"the ones before it are untouched: {target.advice}"
    )
