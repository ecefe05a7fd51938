"""The bytes of one shard, against Python's tarfile, hashlib and the published check value of CRC-32."""

from __future__ import annotations

import fcntl
import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cliplift.sharding.build.writer import ShardWriter
from cliplift.sharding.manifest import Refused, index_file, load_index
from cliplift.sharding.storage import LocalStore, open_store

DIGITS, CRC_OF_DIGITS = b"123456789", 0xCBF43926  # the check value of CRC-32/ISO-HDLC
TAR = "train/tiny-train-000003.tar"


def row(key: str) -> dict[str, Any]:
    return {
        "key": key, "video_id": key, "source": f"{key}.mp4", "split": "train", "label": 1, "labels": (1,),
        "folds": (), "group": None, "start_seconds": 0.0, "end_seconds": 1.0, "num_frames": 8, "fps": 8.0,
        "width": 32, "height": 24, "keyframes": (0,), "source_sha256": "",
    }  # fmt: skip


def writer_in(folder: Path | str) -> ShardWriter:
    return ShardWriter(open_store(str(folder)), TAR, shard=3, split="train", plan_id="plan")


def test_a_shard_is_a_tar_and_its_index_says_where_everything_lies(tmp_path: Path) -> None:
    """Members of 9 bytes, of a whole block and of a block and one byte: padded to the next block, no more."""
    writer = writer_in(tmp_path)
    clips = {"a": DIGITS, "b": bytes(range(256)) * 2, "c": b"x" * 513}
    flows = {"a": b"", "b": DIGITS, "c": b""}
    for key, clip in clips.items():
        writer.add(mp4=clip, flow=flows[key], facts={"z": 1, "ä": key}, picture_hashes=(7,), **row(key))
    refused = Refused(video_id="d", source="d.mp4", clip=0, stage="decode", reason="no frames")
    writer.refuse(refused)
    index = writer.commit()
    path = tmp_path / TAR
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == [
            "a.mp4",
            "a.json",
            "b.mp4",
            "b.json",
            "b.flow.mp4",
            "c.mp4",
            "c.json",
        ]
        assert {(m.mode, m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0o644, 0, 0, 0, "")}
        places = {m.name: (m.offset_data, m.size) for m in members}
        for sample in index.samples:
            assert (sample.mp4_offset, sample.mp4_bytes) == places[f"{sample.key}.mp4"]
            assert (sample.json_offset, sample.json_bytes) == places[f"{sample.key}.json"]
            assert data[sample.mp4_offset :][: sample.mp4_bytes] == clips[sample.key]
            # Keys sorted, letters as they are: the text alone decides the bytes.
            assert (
                data[sample.json_offset :][: sample.json_bytes] == f'{{"z": 1, "ä": "{sample.key}"}}'.encode()
            )
        flow = places["b.flow.mp4"]
    a, b, c = index.samples
    assert (a.mp4_crc32, b.flow_crc32) == (CRC_OF_DIGITS, CRC_OF_DIGITS)
    assert [(s.flow_offset, s.flow_bytes) for s in (a, b, c)] == [(0, 0), flow, (0, 0)]
    assert len(data) == index.tar_bytes
    assert data[257:265] == b"ustar\x0000", "POSIX USTAR, which every reader knows"
    # 7 headers, 1 + 1, 1 + 1 + 1 and 2 + 1 blocks, two zero blocks at the end: rounded up to a record of 20 blocks.
    assert len(data) == 20 * 512
    assert index.tar_sha256 == hashlib.sha256(data).hexdigest()
    assert (index.shard, index.split, index.plan_id, index.refused) == (3, "train", "plan", (refused,))
    assert index.picture_hashes == ((7,), (7,), (7,))
    name = index_file(TAR)
    assert load_index((tmp_path / name).read_bytes(), file=name) == index
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == sorted([path.name, Path(name).name])


def test_records_are_of_twenty_blocks(tmp_path: Path) -> None:
    """A member of 17 blocks, its header, one of JSON with its header: 20 blocks, so the end mark opens a new record."""
    writer = writer_in(tmp_path)
    writer.add(mp4=bytes(17 * 512), facts={}, picture_hashes=(), **row("a"))
    assert writer.commit().tar_bytes == 2 * 20 * 512
    full = writer_in(tmp_path)
    full.add(mp4=bytes(15 * 512), facts={}, picture_hashes=(), **row("a"))
    assert full.commit().tar_bytes == 20 * 512, "18 blocks and the two of the end mark, and not one more"
    empty = writer_in(tmp_path)
    assert empty.commit().tar_bytes == 20 * 512


def test_numbers_that_json_does_not_know_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        writer_in(tmp_path).add(mp4=DIGITS, facts={"fps": float("nan")}, picture_hashes=(), **row("a"))


def test_nothing_is_visible_before_commit_and_nothing_left_after_abandon(tmp_path: Path) -> None:
    writer = writer_in(tmp_path)
    writer.add(mp4=DIGITS, facts={}, picture_hashes=(), **row("a"))
    (unfinished,) = (tmp_path / "train").iterdir()
    assert unfinished.suffix == ".tmp"
    with unfinished.open("rb") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a second build sees that somebody writes it
    writer.abandon()
    assert not list((tmp_path / "train").iterdir())
    writer.abandon()  # after a failure nobody knows how far it came
    with pytest.raises(ValueError, match="closed file"):
        writer._write(b"x")


def test_a_full_disk_does_not_stop_abandoning(tmp_path: Path) -> None:
    """Closing writes what is buffered, and fails once more."""
    writer = writer_in(tmp_path)
    writer._file.close()
    with Path("/dev/full").open("wb") as full:
        full.write(b"x")
        writer._file = full
        writer.abandon()
        assert full.closed
    assert not list((tmp_path / "train").iterdir())


def test_left_over_files_of_this_shard_go_and_those_in_use_or_of_others_stay(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    name, index = Path(TAR).name, Path(index_file(TAR)).name
    gone = [folder / f".{name}.0123456789ab.tmp", folder / f".{index}.0123456789ab.tmp"]
    held, other = folder / f".{name}.ba9876543210.tmp", folder / ".tiny-train-000004.tar.0123456789ab.tmp"
    for path in (*gone, held, other):
        path.write_bytes(b"x")
    with held.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = writer_in(tmp_path)
    assert [path.exists() for path in (*gone, held, other)] == [False, False, True, True]
    writer.abandon()


def test_the_index_appears_after_the_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two, the shard counts as unbuilt; the other way round it would count as built."""
    seen: list[tuple[bool, bool]] = []
    write = LocalStore.write

    def watched(self: LocalStore, name: str, data: bytes) -> None:
        seen.append(((tmp_path / TAR).exists(), (tmp_path / index_file(TAR)).exists()))
        write(self, name, data)

    monkeypatch.setattr(LocalStore, "write", watched)
    writer_in(tmp_path).commit()
    assert seen == [(True, False)]


def test_a_remote_shard_has_the_same_bytes_and_leaves_no_scratch(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    near, far = writer_in(tmp_path), writer_in("memory://writer")
    scratch = far._path
    try:
        for writer in (near, far):
            writer.add(mp4=DIGITS, facts={"a": 1}, picture_hashes=(1,), **row("a"))
            writer.commit()
        assert fs.cat_file(f"/writer/{TAR}") == (tmp_path / TAR).read_bytes()
        assert json.loads(fs.cat_file(f"/writer/{index_file(TAR)}")) == json.loads(
            (tmp_path / index_file(TAR)).read_bytes()
        )
        assert not scratch.parent.exists()
    finally:
        fs.rm("/writer", recursive=True)
