"""Saves that a thread writes: what the training waits for, and how failures in the threads are told to all ranks."""

from __future__ import annotations

import contextlib
import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cliplift.models.weight_files import WrittenFile
from cliplift.pipelines.checkpoints import folder as folders
from cliplift.pipelines.checkpoints import saver as saving
from cliplift.pipelines.checkpoints import targets
from cliplift.pipelines.checkpoints.saved import open_checkpoint
from cliplift.pipelines.checkpoints.saver import Saver, Snapshot
from cliplift.pipelines.checkpoints.slices import CheckpointError, Slice
from cliplift.pipelines.distributed.collectives import Topology

CPU = torch.device("cpu")
ALONE = Topology(rank=0, world_size=1, local_rank=0, device=CPU)


def cut(tensors: dict[str, Tensor]) -> dict[str, Slice]:
    return {name: Slice.whole(tensor) for name, tensor in tensors.items()}


def snapshot(step: int, **changes: Any) -> Snapshot:
    fields: dict[str, Any] = {
        "parameters": cut({"w": torch.full((2, 3), float(step))}),
        "optimizer": cut({"w|exp_avg": torch.full((2, 3), 0.5)}),
        "buffers": {"mean": torch.arange(3.0)},
        "random_state": {"cpu": torch.arange(4, dtype=torch.uint8)},
        "state": {"step": step},
    }
    return Snapshot(**fields | changes)


def test_an_asynchronous_failure_is_raised_by_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: dict[str, Tensor], path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    saver = Saver(ALONE, asynchronous=True)
    with monkeypatch.context() as patched:
        patched.setattr(saving, "_write_own", lambda *_, **__: full({}, tmp_path))
        saver.save(tmp_path, snapshot(1), keep_last=1)
        with pytest.raises(CheckpointError, match="step_00000001"):
            saver.save(tmp_path, snapshot(2), keep_last=1)
    saver.save(tmp_path, snapshot(2), keep_last=1)
    saver.wait()
    assert folders.newest_usable(tmp_path, topology=ALONE, say=print) == tmp_path / "step_00000002"


def test_any_fault_of_the_thread_is_told_by_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Raised by one rank alone it would leave the others waiting; the trace is in the log."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error")

    saver = Saver(ALONE, asynchronous=True)
    monkeypatch.setattr(saving, "_write_own", broken)
    saver.save(tmp_path, snapshot(1), keep_last=1)
    with pytest.raises(
        CheckpointError, match=r"step_00000001 could not be written \(rank 0: RuntimeError: CUDA"
    ):
        saver.save(tmp_path, snapshot(2), keep_last=1)
    assert "Traceback" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_what_a_thread_writes_does_not_change_with_the_training(tmp_path: Path) -> None:
    """The snapshot is a view of the living state; the copy is not."""
    living = {"w": torch.zeros(1000), "b": torch.zeros(3, 4).t()}
    copy = snapshot(1, parameters=cut(living), buffers=living, average=cut(living)).copied()
    for tensor in living.values():
        tensor.fill_(9)
    copies = [part.values for part in (*copy.parameters.values(), *copy.average.values())]
    assert all(bool((values == 0).all()) for values in [*copies, *copy.buffers.values()])


@pytest.mark.parametrize("second_wrote", [True, False])
def test_the_threads_of_two_ranks_seal_what_both_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second_wrote: bool
) -> None:
    """Rank 0, and a second rank that is played: its thread sends what it wrote, or why it wrote nothing."""
    second = {"parameters-rank1.safetensors": WrittenFile(size_bytes=8, crc32=9)}
    turns = iter([[], [], [] if second_wrote else ["rank 1: No space left"], list(second.items()), []])

    def gathered(items: list[Any], _: Topology, *, group: Any = None) -> list[Any]:
        if threading.current_thread() is threading.main_thread():
            assert group is None
            return items
        assert group == "the threads'"
        return [*items, *next(turns)]

    monkeypatch.setattr(saving.dist, "new_group", lambda **_: "the threads'")
    monkeypatch.setattr(saving, "gather_objects", gathered)
    saver = Saver(Topology(rank=0, world_size=2, local_rank=0, device=CPU), asynchronous=True)
    path = saver.save(tmp_path, snapshot(5), keep_last=1).place
    with (
        contextlib.nullcontext() if second_wrote else pytest.raises(CheckpointError, match="rank 1: No space")
    ):
        saver.wait()
    assert isinstance(path, Path)
    assert path.exists() == second_wrote
    if second_wrote:
        listed = json.loads((path / "COMPLETE.json").read_text())["files"]
        own = {f"{kind}-rank0.safetensors" for kind in ("buffers", "optimizer", "parameters", "random")}
        assert set(listed) == {*own, *second, "state.json"}


def test_the_training_stands_still_for_the_copy_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for the other ranks nor for a slow disk: the thread that makes the folder waits here for the training."""
    went_on, asked = threading.Event(), list[str]()

    def clear(target: Any, real: Any = targets._OnDisk.clear) -> None:
        assert went_on.wait(timeout=30)
        real(target)

    def gathered(items: list[Any], _: Topology, *, group: Any = None) -> list[Any]:
        asked.append(threading.current_thread().name)
        return items

    monkeypatch.setattr(targets._OnDisk, "clear", clear)
    monkeypatch.setattr(saving, "gather_objects", gathered)
    saver = Saver(ALONE, asynchronous=True)
    living = torch.zeros(6)
    place = saver.save(tmp_path, snapshot(1, parameters=cut({"w": living})), keep_last=1).place
    assert asked == []
    living.fill_(9)
    went_on.set()
    saver.wait()
    found = open_checkpoint(place, topology=ALONE)
    assert torch.equal(found.parameters.whole("w"), torch.zeros(6))
    assert all(name.startswith("checkpoint") for name in asked[:-1])
    assert asked[-1] == threading.current_thread().name


def test_threads_that_lose_each_other_are_told_by_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A rank that died, or a cable: the other threads' collective fails, and that of the training still speaks."""

    def gathered(items: list[Any], _: Topology, *, group: Any = None) -> list[Any]:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("Connection closed by peer")
        return items

    saver = Saver(ALONE, asynchronous=True)
    monkeypatch.setattr(saving, "gather_objects", gathered)
    saver.save(tmp_path, snapshot(1), keep_last=1)
    told = r"step_00000001 could not be written \(rank 0: RuntimeError: Connection closed"
    with pytest.raises(CheckpointError, match=told):
        saver.wait()
    assert "Traceback" in caplog.text
    assert list(tmp_path.iterdir()) == []
