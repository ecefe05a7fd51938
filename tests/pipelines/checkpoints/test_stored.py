"""Checkpoints in a store: what goes up in which order, what is read, and what faults and half uploads leave."""

from __future__ import annotations

import json
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import pytest
import torch
from safetensors.torch import save_file

from cliplift.pipelines.checkpoints import targets
from cliplift.pipelines.checkpoints.folder import newest_usable, start_afresh
from cliplift.pipelines.checkpoints.saved import open_checkpoint
from cliplift.pipelines.checkpoints.saver import Saver, Snapshot
from cliplift.pipelines.checkpoints.slices import CheckpointError, Slice, SliceReader, write_slices
from cliplift.pipelines.checkpoints.stored import StoredFolder
from cliplift.pipelines.checkpoints.tensor_file import StoredFile
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.sharding import storage
from cliplift.sharding.storage import StorageError, open_store

ALONE = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
FILES = [f"{kind}-rank0.safetensors" for kind in ("parameters", "optimizer", "buffers", "random")]


@pytest.fixture(scope="module")
def s3(failing_s3: ModuleType) -> Iterator[Any]:
    with failing_s3.served("bucket") as faults:
        yield faults


@pytest.fixture
def folder(tmp_path: Path) -> StoredFolder:
    """In fsspec's memory, which answers at once and never fails."""
    return StoredFolder(f"memory://{uuid4().hex}/checkpoints", tmp_path / "rank0")


@pytest.fixture
def on_s3(s3: Any, tmp_path: Path) -> Iterator[StoredFolder]:
    yield StoredFolder(f"s3://bucket/{uuid4().hex}/checkpoints", tmp_path / "rank0")
    s3.calm()


def snapshot(step: int, size: int = 6) -> Snapshot:
    return Snapshot(
        parameters={"w": Slice.whole(torch.full((size,), float(step)))},
        optimizer={"w|exp_avg": Slice.whole(torch.full((size,), 0.5))},
        buffers={"mean": torch.arange(3.0)},
        random_state={"cpu": torch.arange(4, dtype=torch.uint8)},
        state={"step": step},
    )


def saved_value(folder: StoredFolder, say: Callable[[str], None] = print) -> float | None:
    """The value that the newest usable checkpoint holds."""
    found = newest_usable(folder, topology=ALONE, say=say)
    return None if found is None else float(open_checkpoint(found, topology=ALONE).parameters.whole("w")[0])


def test_the_seal_goes_up_after_everything_else(
    folder: StoredFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for verb in ("publish", "write", "remove"):
        real = getattr(storage.RemoteStore, verb)

        def noted(self: Any, *given: Any, real: Any = real, verb: str = verb) -> Any:
            name = given[1] if verb == "publish" else given[0]
            order.append(f"{verb} {self.url.rpartition('/')[2]}/{name}")
            return real(self, *given)

        monkeypatch.setattr(storage.RemoteStore, verb, noted)
    saver = Saver(ALONE, asynchronous=False, records=lambda: order.append("records"))
    saver.save(folder, snapshot(1), keep_last=1)
    first = "step_00000001"
    assert order == [*(f"publish {first}/{name}" for name in FILES), f"write {first}/state.json", "records",
                     f"write {first}/COMPLETE.json"]  # fmt: skip
    order.clear()
    saver.save(folder, snapshot(2), keep_last=1)
    removed = order[order.index("write step_00000002/COMPLETE.json") + 1 :]
    assert removed[0] == f"remove {first}/COMPLETE.json", "what is half removed does not count"
    assert sorted(removed) == sorted(
        f"remove {first}/{name}" for name in (*FILES, "state.json", "COMPLETE.json")
    )
    assert not folder.local.exists(), "nothing of it stays on this machine"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_newest_are_kept_and_read_back(folder: StoredFolder, asynchronous: bool) -> None:
    saver = Saver(ALONE, asynchronous=asynchronous)
    for step in (5, 10, 15, 100):
        saver.save(folder, snapshot(step), keep_last=2)
    saver.wait()
    assert [found.name for found in folder.checkpoints()[0]] == ["step_00000015", "step_00000100"]
    assert saved_value(folder) == 100
    found = open_checkpoint(folder / "step_00000015", topology=ALONE)  # not fetched: by ranges
    assert torch.equal(found.parameters.whole("w"), torch.full((6,), 15.0))
    assert torch.equal(found.buffers["mean"], torch.arange(3.0))
    assert torch.equal(found.optimizer.read("w|exp_avg", 2, 3), torch.full((3,), 0.5))


def test_a_step_that_is_saved_again_leaves_the_first_until_it_is_whole(
    folder: StoredFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(ALONE, asynchronous=False)
    saver.save(folder, snapshot(4), keep_last=1)
    again = Snapshot(**{**vars(snapshot(4)), "parameters": {"w": Slice.whole(torch.full((6,), 9.0))}})
    real = storage.RemoteStore.write

    def failing(self: storage.RemoteStore, name: str, data: bytes) -> None:
        if name == "COMPLETE.json":
            raise StorageError("no answer")
        real(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage.RemoteStore, "write", failing)
        with pytest.raises(CheckpointError, match=r"no answer.*start again when the store can be written"):
            saver.save(folder, again, keep_last=1)
    assert saved_value(folder) == 4
    place = saver.save(folder, again, keep_last=1).place
    assert place.name == "step_00000004.1"
    assert [found.name for found in folder.checkpoints()[0]] == ["step_00000004.1"]
    assert saved_value(folder) == 9
    saver.save(folder, snapshot(5), keep_last=2)
    assert [found.name for found in folder.checkpoints()[0]] == ["step_00000004.1", "step_00000005"]


@pytest.mark.parametrize("damaged", ["flipped", "cut", "missing", "no seal"])
def test_a_damaged_or_half_uploaded_one_is_passed_over(folder: StoredFolder, damaged: str) -> None:
    saver = Saver(ALONE, asynchronous=False)
    for step in (1, 2):
        saver.save(folder, snapshot(step), keep_last=3)
    store, name = (folder / "step_00000002").store, "optimizer-rank0.safetensors"
    data = store.read(name)
    if damaged == "flipped":
        store.write(name, data[:-1] + bytes([data[-1] ^ 1]))
    elif damaged == "cut":
        store.write(name, data[:-1])
    else:
        store.remove(name if damaged == "missing" else "COMPLETE.json")
    said: list[str] = []
    assert saved_value(folder, said.append) == 1
    why = {"missing": "is missing", "no seal": "was not uploaded to its end"}.get(
        damaged, "differs from what"
    )
    assert len(said) == 1
    assert why in said[0]
    saver.save(folder, snapshot(3), keep_last=3)
    left = [name for name in folder.store.list() if name.startswith("step_00000002/")]
    assert bool(left) == (damaged != "no seal"), "the next save removes what has no seal"


@pytest.mark.parametrize(
    "kind",
    [
        "503",
        "half upload",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("reset", "lost answer", "half answer", "stall")
        ),
    ],
)
def test_every_kind_of_fault_is_survived(on_s3: StoredFolder, s3: Any, kind: str) -> None:
    s3.kinds, s3.share, s3.seen = (kind,), 1.0, Counter()
    s3.left = 1 if kind == "stall" else 3
    Saver(ALONE, asynchronous=False).save(on_s3, snapshot(7, size=10_000), keep_last=1)
    s3.left = 1 if kind == "stall" else 3
    assert saved_value(on_s3) == 7
    assert s3.seen[kind] == (2 if kind == "stall" else 6)


@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_outage_in_a_save_is_told_with_the_stores_code_and_costs_nothing_else(
    on_s3: StoredFolder, s3: Any, asynchronous: bool
) -> None:
    saver = Saver(ALONE, asynchronous=asynchronous)
    saver.save(on_s3, snapshot(1), keep_last=1)
    saver.wait()
    s3.share, s3.kinds, s3.only = 1.0, ("503",), "PUT /bucket"
    if asynchronous:
        saver.save(on_s3, snapshot(2), keep_last=1)
    told = r"rank 0: s3://bucket.*parameters-rank0.*cannot write: .*Service Unavailable \(503\)"
    with pytest.raises(CheckpointError, match=told):
        saver.wait() if asynchronous else saver.save(on_s3, snapshot(2), keep_last=1)
    s3.calm()
    assert saved_value(on_s3) == 1
    saver.save(on_s3, snapshot(3), keep_last=1)
    saver.wait()
    assert [found.name for found in on_s3.checkpoints()[0]] == ["step_00000003"]
    assert all(name.startswith("step_00000003/") for name in on_s3.store.list())


@pytest.mark.parametrize(("verb", "told"), [("fetch", "read"), ("list", "listed")])
def test_an_outage_in_reading_is_no_damage(
    folder: StoredFolder, monkeypatch: pytest.MonkeyPatch, verb: str, told: str
) -> None:
    """To go on from an older checkpoint would throw away what the newer one holds."""
    saver = Saver(ALONE, asynchronous=False)
    for step in (1, 2):
        saver.save(folder, snapshot(step), keep_last=2)

    def failing(*_: object) -> None:
        raise StorageError("memory://x: no answer")

    with monkeypatch.context() as patch:
        patch.setattr(storage.RemoteStore, verb, failing)
        with pytest.raises(CheckpointError, match=f"the checkpoints cannot be {told}: memory://x: no answer"):
            saved_value(folder)
    assert saved_value(folder) == 2


def test_a_fresh_start_in_a_used_place_is_refused(folder: StoredFolder) -> None:
    start_afresh(folder, topology=ALONE, say=print)
    Saver(ALONE, asynchronous=False).save(folder / "best", snapshot(1), keep_last=1)
    with pytest.raises(ValueError, match=r"checkpoint\.url: .* holds checkpoints of an earlier run"):
        start_afresh(folder, topology=ALONE, say=print)


class Ranges:
    """A store that notes what is read of it."""

    def __init__(self, folder: Path) -> None:
        self._store = open_store(str(folder))
        self.url, self.bytes = self._store.url, 0

    def size(self, name: str) -> int | None:
        return self._store.size(name)

    def read_range(self, name: str, start: int, length: int) -> bytes:
        data = self._store.read_range(name, start, length)
        self.bytes += len(data)
        return data


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_of_a_stored_file_the_header_and_the_wanted_elements_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """In requests of a bounded size; the header may be longer than the first request."""
    monkeypatch.setattr("cliplift.pipelines.checkpoints.tensor_file.HEADER_GUESS_BYTES", 64)
    monkeypatch.setattr("cliplift.pipelines.checkpoints.tensor_file.RANGE_BYTES", 1 << 10)
    values = torch.arange(5000).remainder(250).to(dtype)
    write_slices(
        tmp_path / "x.safetensors", {"w": Slice(values, 7, (60, 100)), "s": Slice(values[:1], 0, ())}
    )
    store = Ranges(tmp_path)
    reader = SliceReader([StoredFile(store, "x.safetensors")])  # type: ignore[arg-type]
    header = 8 + struct.unpack("<Q", (tmp_path / "x.safetensors").read_bytes()[:8])[0]
    assert store.bytes == header
    assert reader.shape("w") == (60, 100)
    generator, wanted = random.Random(0), 0
    for _ in range(20):
        start, stop = sorted(generator.randint(7, 5007) for _ in range(2))
        assert torch.equal(reader.read("w", start, stop - start), values[start - 7 : stop - 7])
        wanted += (stop - start) * dtype.itemsize
    assert torch.equal(reader.whole("s"), values[0])
    assert store.bytes == header + wanted + dtype.itemsize


def header_of(facts: object, data: bytes = b"\0" * 16) -> bytes:
    text = facts if isinstance(facts, bytes) else json.dumps(facts).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\1\0\0", struct.pack("<Q", 1 << 40) + b"{}", header_of(b"{"), header_of(b"[" * 100_000), header_of([]),
        header_of({"w": 3}), header_of({"w": {"dtype": "F33", "shape": [4], "data_offsets": [0, 16]}}),
        header_of({"w": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}),
        header_of({"w": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}),
        header_of({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}),
        header_of({"w": {"dtype": "F32", "shape": [-4], "data_offsets": [16, 0]}}),
        header_of({"w": {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}}),
        header_of({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0]}}),
        header_of({"w": {"dtype": "F32", "shape": [True, 4], "data_offsets": [0, 16]}}),
        header_of({"__metadata__": {"slices": 3}, "w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
        header_of({"__metadata__": {"slices": "{}"}, "w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
    ],
)  # fmt: skip
def test_a_malformed_stored_file_is_an_error_with_its_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: not a file of slices"):
        SliceReader([StoredFile(open_store(str(tmp_path)), "x.safetensors")])


def test_whole_tensors_of_any_shape_are_read_from_a_store(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4, 5), "b": torch.tensor(2.0), "c": torch.zeros(0, 4), "d": torch.randn(7)}
    save_file(tensors, tmp_path / "x.safetensors")
    reader = SliceReader([StoredFile(open_store(str(tmp_path)), "x.safetensors")])
    for name, tensor in tensors.items():
        assert torch.equal(reader.whole(name), tensor)
    with pytest.raises(StorageError, match="is not there"):
        SliceReader([StoredFile(open_store(str(tmp_path)), "y.safetensors")])


def test_ranks_agree_on_the_name_before_anything_goes_up(
    folder: StoredFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second save of a step has another name, which only rank 0 found out."""
    order: list[str] = []
    publish = storage.RemoteStore.publish

    def told(name: str, topology: Topology, *, group: Any) -> str:
        order.append(f"agreed on {name}")
        return name

    def noted(self: Any, path: Path, name: str) -> None:
        order.append("up")
        publish(self, path, name)

    saver = Saver(ALONE, asynchronous=False)
    saver.save(folder, snapshot(4), keep_last=1)
    monkeypatch.setattr(targets, "broadcast_object", told)
    monkeypatch.setattr(storage.RemoteStore, "publish", noted)
    saver.save(folder, snapshot(4), keep_last=1)
    assert order[0] == "agreed on step_00000004.1"
    assert set(order[1:]) == {"up"}


def test_a_snapshot_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        snapshot(1).state = {}  # type: ignore[misc]
