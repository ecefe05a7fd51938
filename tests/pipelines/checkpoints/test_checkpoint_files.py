"""What a checkpoint's folder holds, file by file, and what is read back; sizes and sums by zlib and safetensors."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cliplift.configs.sections import ConfigError
from cliplift.pipelines.checkpoints import folder as folders
from cliplift.pipelines.checkpoints import saved as opened
from cliplift.pipelines.checkpoints import saver as saving
from cliplift.pipelines.checkpoints import targets
from cliplift.pipelines.checkpoints.saver import Saver, Snapshot
from cliplift.pipelines.checkpoints.slices import CheckpointError, Slice, SliceReader
from cliplift.pipelines.distributed.collectives import Topology

CPU = torch.device("cpu")
ALONE = Topology(rank=0, world_size=1, local_rank=0, device=CPU)


def cut(tensors: dict[str, Tensor]) -> dict[str, Slice]:
    return {name: Slice.whole(tensor) for name, tensor in tensors.items()}


def read(path: Path) -> dict[str, Tensor]:
    """Tensors as safetensors reads them, in the shapes that the header tells."""
    reader = SliceReader([path])
    return {name: load_file(path)[name].reshape(reader.shape(name)) for name in reader}


def snapshot(step: int, **changes: Any) -> Snapshot:
    fields: dict[str, Any] = {
        "parameters": cut({"w": torch.full((2, 3), float(step)), "b": torch.ones(3)}),
        "optimizer": cut({"w|exp_avg": torch.full((2, 3), 0.5), "w|step": torch.tensor(float(step))}),
        "buffers": {"mean": torch.arange(3.0)},
        "random_state": {"cpu": torch.arange(4, dtype=torch.uint8)},
        "state": {"step": step, "schedule": "cosine"},
    }
    return Snapshot(**fields | changes)


def assert_same(found: Any, expected: Any) -> None:
    assert set(found) == set(expected)
    for name in found:
        one, other = (of.whole(name) if isinstance(of, SliceReader) else of[name] for of in (found, expected))
        wanted = other.values.reshape(other.shape) if isinstance(other, Slice) else other
        assert torch.equal(one, wanted), name


@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_file_is_there_with_its_size_and_sum(tmp_path: Path, asynchronous: bool) -> None:
    saver, saved = Saver(ALONE, asynchronous=asynchronous), snapshot(7)
    path = saver.save(tmp_path, saved, keep_last=2).place
    saver.wait()
    saver.wait()  # there is nothing left to wait for
    assert path == tmp_path / "step_00000007"
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000007"]
    assert_same(read(path / "parameters-rank0.safetensors"), saved.parameters)
    assert_same(read(path / "optimizer-rank0.safetensors"), saved.optimizer)
    assert_same(read(path / "buffers-rank0.safetensors"), saved.buffers)
    assert_same(read(path / "random-rank0.safetensors"), saved.random_state)
    state = json.loads((path / "state.json").read_text())
    assert state == {"format": 3, "world_size": 1, "step": 7, "schedule": "cosine"}
    complete = json.loads((path / "COMPLETE.json").read_text())
    files = {p.name: p.read_bytes() for p in path.iterdir() if p.name != "COMPLETE.json"}
    assert complete == {
        "format": 3,
        "files": {name: {"bytes": len(data), "crc32": zlib.crc32(data)} for name, data in files.items()},
    }
    assert len(files) == 5, "no average was given"
    assert folders.damage(path) is None


def test_the_moving_average_is_a_file_of_its_own(tmp_path: Path) -> None:
    average = cut({"w": torch.full((2, 3), 0.25)})
    path = Saver(ALONE, asynchronous=False).save(tmp_path, snapshot(1, average=average), keep_last=1).place
    assert_same(read(path / "average-rank0.safetensors"), average)
    assert_same(opened.open_checkpoint(path, topology=ALONE).average, average)


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep_last: int) -> None:
    saver = Saver(ALONE, asynchronous=False)
    for step in (5, 10, 15, 100):
        saver.save(tmp_path, snapshot(step), keep_last=keep_last)
    kept = [f"step_{step:08d}" for step in (5, 10, 15, 100)[-keep_last:]]
    assert [p.name for p in folders.complete_checkpoints(tmp_path)] == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == kept


def test_only_folders_with_a_seal_count(tmp_path: Path) -> None:
    for name in (
        "step_00000001",
        "step_00000010",
        "step_00000002",
        "step_00000003.partial",
        "best",
        "step_1",
    ):
        (tmp_path / name).mkdir()
        if name != "step_00000010":
            (tmp_path / name / "COMPLETE.json").write_text("{}")
    assert [p.name for p in folders.complete_checkpoints(tmp_path)] == ["step_00000001", "step_00000002"]


def test_what_a_killed_save_left_is_replaced(tmp_path: Path) -> None:
    """A half-written folder of the same step, and a whole one: nothing of them is in the new checkpoint."""
    for name in ("step_00000002.partial", "step_00000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old.safetensors").write_bytes(b"old")
    path = Saver(ALONE, asynchronous=False).save(tmp_path, snapshot(2), keep_last=1).place
    assert not (path / "old.safetensors").exists()
    assert not path.with_name("step_00000002.partial").exists()
    assert folders.damage(path) is None


def test_the_name_is_given_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at the rename, everything lies in the partial folder and nothing under the final name."""

    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Saver(ALONE, asynchronous=False).save(tmp_path, snapshot(3), keep_last=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000003.partial"]
    assert folders.newest_usable(tmp_path, topology=ALONE, say=print) is None


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_told_and_the_checkpoints_before_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    saver = Saver(ALONE, asynchronous=asynchronous)
    first = saver.save(tmp_path, snapshot(1), keep_last=1).place
    saver.wait()
    real = saving.write_slices

    def full(path: Path, tensors: dict[str, Slice]) -> Any:
        if path.name == "optimizer-rank0.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, tensors)

    monkeypatch.setattr(saving, "write_slices", full)
    if asynchronous:
        saver.save(tmp_path, snapshot(2), keep_last=1)  # the failure is in a thread, and told later
    told = r"step_00000002 could not be written \(rank 0: \[Errno 28\] No space"
    with pytest.raises(CheckpointError, match=told):
        saver.wait() if asynchronous else saver.save(tmp_path, snapshot(2), keep_last=1)
    assert [p.name for p in tmp_path.iterdir()] == [first.name]
    monkeypatch.setattr(saving, "write_slices", real)
    saver.save(tmp_path, snapshot(3), keep_last=1)
    saver.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000003"]


def test_another_rank_writes_its_own_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 makes the folder, seals it and gives the name; the others wait, tell what they wrote, hear of failures."""
    second = Topology(rank=1, world_size=2, local_rank=1, device=CPU)
    heard: list[list[Any]] = []

    def gathered(items: list[Any], topology: Topology, *, group: Any) -> list[Any]:
        assert topology is second
        assert group is None, "that of the training"
        heard.append(items)
        return items

    monkeypatch.setattr(saving, "gather_objects", gathered)
    partial = tmp_path / "step_00000004.partial"
    partial.mkdir()
    saver = Saver(second, asynchronous=False)
    saver.save(tmp_path, snapshot(4), keep_last=1)
    saver.wait()
    names = sorted(f"{kind}-rank1.safetensors" for kind in ("buffers", "optimizer", "parameters", "random"))
    assert sorted(p.name for p in partial.iterdir()) == names
    folder_made, own_folder, files_written, facts, sealed = heard
    assert folder_made == own_folder == files_written == sealed == [], "no failure at any of the four"
    assert sorted(name for name, _ in facts) == names
    monkeypatch.setattr(saving, "gather_objects", lambda *_, **__: ["rank 0: No space left"])
    with pytest.raises(CheckpointError, match="rank 0: No space left"):
        saver.save(tmp_path, snapshot(4), keep_last=1)
    assert partial.exists(), "rank 0 removes it"


def test_of_several_failures_the_first_rank_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = ["rank 1: No space left", "rank 3: Input/output error"]
    monkeypatch.setattr(saving, "gather_objects", lambda *_, **__: failures)
    with pytest.raises(CheckpointError, match=r"could not be written \(rank 1: No space left\)"):
        Saver(ALONE, asynchronous=False).save(tmp_path, snapshot(1), keep_last=1)


def test_flipped_cut_and_missing_files_are_damage(tmp_path: Path) -> None:
    """Larger than the blocks that are read at once: a flip in the last byte counts as one in the first."""
    large = snapshot(1, parameters=cut({"w": torch.arange(600_000, dtype=torch.float32)}))
    path = Saver(ALONE, asynchronous=False).save(tmp_path, large, keep_last=1).place
    file = path / "parameters-rank0.safetensors"
    whole = file.read_bytes()
    assert len(whole) > 2 * 2**20
    assert folders.damage(path) is None
    for place in (0, 2**20 - 1, 2**20, len(whole) - 1):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert folders.damage(path) == "parameters-rank0.safetensors differs from what was written"
    file.write_bytes(whole[:-1])
    assert folders.damage(path) == "parameters-rank0.safetensors differs from what was written"
    file.unlink()
    assert folders.damage(path) == "parameters-rank0.safetensors is missing"
    file.mkdir()
    assert folders.damage(path) == "parameters-rank0.safetensors is missing"


def test_an_empty_file_is_whole(tmp_path: Path) -> None:
    """No bytes, whose crc32 is 0."""
    (tmp_path / "state.json").touch()
    seal = {"format": 2, "files": {"state.json": {"bytes": 0, "crc32": 0}}}
    (tmp_path / "COMPLETE.json").write_text(json.dumps(seal))
    assert folders.damage(tmp_path) is None


def test_the_newest_whole_one_is_used_and_each_passed_over_is_named(tmp_path: Path) -> None:
    saver = Saver(ALONE, asynchronous=False)
    for step in (1, 2, 3):
        saver.save(tmp_path, snapshot(step), keep_last=3)
    said: list[str] = []
    assert folders.newest_usable(tmp_path, topology=ALONE, say=said.append) == tmp_path / "step_00000003"
    assert said == []
    for step in (2, 3):
        (tmp_path / f"step_{step:08d}" / "state.json").write_text("{}")
    assert folders.newest_usable(tmp_path, topology=ALONE, say=said.append) == tmp_path / "step_00000001"
    assert [line.split(" is damaged")[0] for line in said] == [
        "checkpoint step_00000003",
        "checkpoint step_00000002",
    ]


@pytest.mark.parametrize(("rank", "world", "own"), [(0, 1, True), (0, 2, False), (1, 2, False)])
def test_random_state_is_taken_up_by_as_many_ranks_as_wrote_it(
    tmp_path: Path, rank: int, world: int, own: bool
) -> None:
    path = Saver(ALONE, asynchronous=False).save(tmp_path, snapshot(1), keep_last=1).place
    found = opened.open_checkpoint(
        path, topology=Topology(rank=rank, world_size=world, local_rank=0, device=CPU)
    )
    assert_same(found.parameters, snapshot(1).parameters)
    assert_same(found.optimizer, snapshot(1).optimizer)
    assert_same(dict(found.buffers), snapshot(1).buffers)
    assert_same(dict(found.random_state), snapshot(1).random_state if own else {})
    assert set(found.average) == set()


def test_each_rank_of_a_world_takes_its_own_files(tmp_path: Path) -> None:
    path = Saver(ALONE, asynchronous=False).save(tmp_path, snapshot(1), keep_last=1).place
    for kind in ("buffers", "random"):
        shutil.copy(path / f"{kind}-rank0.safetensors", path / f"{kind}-rank1.safetensors")
    from safetensors.torch import save_file

    save_file({"mean": torch.full((3,), 9.0)}, path / "buffers-rank1.safetensors")
    state = json.loads((path / "state.json").read_text()) | {"world_size": 2}
    (path / "state.json").write_text(json.dumps(state))
    seal = json.loads((path / "COMPLETE.json").read_text())
    seal["files"] |= {f"{kind}-rank1.safetensors": {"bytes": 0, "crc32": 0} for kind in ("buffers", "random")}
    (path / "COMPLETE.json").write_text(json.dumps(seal))
    for rank, first in ((0, 0.0), (1, 9.0)):
        found = opened.open_checkpoint(
            path, topology=Topology(rank=rank, world_size=2, local_rank=0, device=CPU)
        )
        assert found.buffers["mean"][0] == first
        assert found.random_state.keys() == {"cpu"}


def test_what_an_older_format_lacks_is_nothing(tmp_path: Path) -> None:
    """And what a checkpoint does say of it counts."""
    saver = Saver(ALONE, asynchronous=False)
    found = opened.open_checkpoint(saver.save(tmp_path, snapshot(1), keep_last=1).place, topology=ALONE).state
    assert (found["data_offset"], found["rewinds"], found["average_updates"]) == (0, 0, 0)
    later = {"step": 2, "data_offset": 3, "rewinds": 1, "average_updates": 2}
    found = opened.open_checkpoint(
        saver.save(tmp_path, snapshot(2, state=later), keep_last=1).place, topology=ALONE
    ).state
    assert {key: found[key] for key in later} == later


def test_torchs_generator_goes_on_where_it_was() -> None:
    states = opened.random_state(CPU)
    assert states.keys() == {"cpu"}
    expected = torch.rand(5)
    opened.set_random_state({}, CPU)
    assert not torch.equal(torch.rand(5), expected), "without a state nothing is set"
    opened.set_random_state(states, CPU)
    assert torch.equal(torch.rand(5), expected)
    opened.set_random_state({**states, "cuda": states["cpu"]}, CPU)  # from a GPU, onto a CPU
    assert torch.equal(torch.rand(5), expected)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def test_buffers_are_copied_by_name() -> None:
    module = net()
    values = {n: torch.full_like(b, 5) for n, b in module.named_buffers()}
    before = {n: p.clone() for n, p in module.named_parameters()}
    opened.load_buffers(module, values)
    assert_same(dict(module.named_buffers()), values)
    assert_same(dict(module.named_parameters()), before)


def test_the_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    module = net()
    buffers = dict(module.named_buffers())
    own = {n: p.detach() for n, p in module.named_parameters()}
    fewer = {n: v for n, v in own.items() if n != "0.bias"}
    narrow = {**own, "0.bias": torch.zeros(4), "0.weight": torch.zeros(3, 3)}
    more = {**own, "2.weight": torch.zeros(1), "3.weight": torch.zeros(1)}
    for step, (parameters, said) in enumerate(
        ((fewer, "1 differences, first 0.bias"), (more, "2 differences, first 2.weight"),
         (narrow, "2 differences, first 0.weight"), (own, None))
    ):  # fmt: skip
        saved = snapshot(step, parameters=cut(parameters), buffers=buffers)
        path = Saver(ALONE, asynchronous=False).save(tmp_path, saved, keep_last=1).place
        found = opened.open_checkpoint(path, topology=ALONE)
        if said is None:
            opened.check_fits(module, found)
            continue
        with pytest.raises(ConfigError, match=said) as caught:
            opened.check_fits(module, found)
        assert caught.value.key == "model"


def test_checkpoints_of_the_run_before_are_set_aside(tmp_path: Path) -> None:
    folder, said = tmp_path / "checkpoints", []
    folders.set_aside(folder, say=said.append)
    assert said == []
    for number in (1, 2, 3):
        folder.mkdir()
        (folder / str(number)).touch()
        folders.set_aside(folder, say=said.append)
        assert said[-1].endswith(f"are in checkpoints.before-{number}")
    assert {p.name: [f.name for f in p.iterdir()] for p in tmp_path.iterdir()} == {
        f"checkpoints.before-{number}": [str(number)] for number in (1, 2, 3)
    }


class Usage(NamedTuple):
    free: int


@pytest.mark.parametrize(
    ("numbers", "floats"),
    [
        ({"parameters": 1000, "trainable": 1000, "moments": 2}, 3000),
        ({"parameters": 1000, "trainable": 10, "moments": 1}, 1010),
        ({"parameters": 1000, "trainable": 1000, "moments": 2, "averaged": True}, 4000),
        ({"parameters": 5, "trainable": 0, "moments": 0}, 5),
    ],
)
def test_a_checkpoint_needs_four_bytes_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: dict[str, Any], floats: int
) -> None:
    asked: list[Path] = []
    free = 4 * floats

    def usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(free)

    monkeypatch.setattr(folders.shutil, "disk_usage", usage)  # type: ignore[attr-defined]
    folder = tmp_path / "not" / "there" / "yet"
    folders.check_space(folder, **numbers)
    free -= 1
    with pytest.raises(ConfigError, match=r"one checkpoint takes 0\.00 GiB and 0\.00 GiB are free") as caught:
        folders.check_space(folder, **numbers)
    assert (caught.value.key, caught.value.value) == ("output", str(folder.parent))
    assert set(asked) == {tmp_path}, "the nearest folder that exists"


def test_sizes_are_told_in_gibibytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: Usage(2**29))  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"takes 1\.50 GiB and 0\.50 GiB are free"):
        folders.check_space(tmp_path, parameters=2**27, trainable=2**27, moments=2)


@pytest.mark.parametrize(
    ("number", "raised"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)]
)
def test_a_folder_that_cannot_be_synced_is_no_failure_and_a_disk_that_fails_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, raised: bool
) -> None:
    descriptors: list[int] = []

    def sync(descriptor: int) -> None:
        descriptors.append(descriptor)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", sync)
    if raised:
        with pytest.raises(OSError, match="Input/output"):
            targets.to_disk(tmp_path)
    else:
        targets.to_disk(tmp_path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptors[0])
