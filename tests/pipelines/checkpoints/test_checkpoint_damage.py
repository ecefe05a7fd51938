"""A damaged checkpoint is passed over with a sentence, whatever the damage; it never stops a run with a traceback."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import pytest
import torch

from cliplift.pipelines.checkpoints import saver as saving
from cliplift.pipelines.checkpoints import targets
from cliplift.pipelines.checkpoints.folder import newest_usable
from cliplift.pipelines.checkpoints.slices import Slice
from cliplift.pipelines.distributed.collectives import Topology

ALONE = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def write_checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"step_{step:08d}"
    path.mkdir()
    (path / "state.json").write_bytes(b"{}")
    facts = {"bytes": 2, "crc32": zlib.crc32(b"{}")}
    (path / "COMPLETE.json").write_text(json.dumps({"format": 2, "files": {"state.json": facts}}, indent=2))
    return path


def test_any_flipped_bit_of_the_seal_is_passed_over(tmp_path: Path) -> None:
    older, newer = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    seal = newer / "COMPLETE.json"
    whole = seal.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        seal.write_bytes(flipped)
        said: list[str] = []
        found = newest_usable(tmp_path, topology=ALONE, say=said.append)
        # A flip that leaves the seal's meaning alone (in white space, format 2 -> another readable one) may pass.
        assert found == (older if said else newer)


@pytest.mark.parametrize(
    "seal",
    [
        "", "null", "[]", "{}", "3", '"x"', "[" * 100_000, '{"format": 2}', '{"format": [2], "files": {}}',
        '{"format": true, "files": {}}', '{"format": 2, "files": {}}', '{"format": 2, "files": []}',
        '{"format": 2, "files": {"state.json": []}}', '{"format": 2, "files": {"state.json": {"bytes": "2"}}}',
        '{"format": 2, "files": {"state.json": {"bytes": 2, "crc32": null}}}',
        '{"format": 2, "files": {"state.json": {"bytes": 2, "crc32": 2745614147}, "../x": {"bytes": 0, "crc32": 0}}}',
        '{"format": 2, "files": {"state.json": {"bytes": 2, "crc32": 2745614147}, "a\\u0000": {}}}',
    ],
)  # fmt: skip
def test_a_malformed_seal_is_damage(tmp_path: Path, seal: str) -> None:
    older, newer = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    (newer / "COMPLETE.json").write_text(seal)
    said: list[str] = []
    assert newest_usable(tmp_path, topology=ALONE, say=said.append) == older
    assert len(said) == 1
    assert said[0].startswith("checkpoint step_00000002 is damaged (COMPLETE.json: ")


def test_it_is_on_the_disk_and_named_before_older_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is synced while unnamed; then the rename, the sync of the folder, the removal of the old one."""
    events: list[str] = []
    sync, replace, remove = os.fsync, Path.replace, targets.shutil.rmtree  # type: ignore[attr-defined]

    def synced(descriptor: int) -> None:
        events.append("sync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    def replaced(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            events.append(f"rename {self.name} {Path(target).name}")
        return replace(self, target)

    def removed(path: Path, ignore_errors: bool = False) -> None:
        if Path(path).exists():
            events.append(f"remove {Path(path).name}")
        remove(path, ignore_errors=ignore_errors)

    saver = saving.Saver(ALONE, asynchronous=False)
    values = {"w": Slice.whole(torch.ones(2))}
    saver.save(tmp_path, saving.Snapshot(values, {}, {}, {}, {"step": 1}), keep_last=1)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    monkeypatch.setattr(targets.shutil, "rmtree", removed)  # type: ignore[attr-defined]
    saver.save(tmp_path, saving.Snapshot(values, {}, {}, {}, {"step": 2}), keep_last=1)
    named = events.index("rename step_00000002.partial step_00000002")
    files = {path.name for path in (tmp_path / "step_00000002").iterdir()}
    assert {f"sync {name}" for name in (*files, "step_00000002.partial")} == set(events[:named])
    assert events[named + 1 :] == [f"sync {tmp_path.name}", "remove step_00000001"]
