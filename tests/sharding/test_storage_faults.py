"""Places that cannot be written, locks that are not there, and two builds at one place."""

from __future__ import annotations

import errno
import fcntl
import logging
from pathlib import Path
from typing import Any

import pytest

from cliplift.launch import cli
from cliplift.sharding.build.plan import load_plan
from cliplift.sharding.build.writer import ShardWriter
from cliplift.sharding.storage import (
    LocalStore,
    StorageError,
    _describe_failure,
    hold,
    open_store,
    temporary_beside,
    without_secrets,
)

TAR = "train/x-train-000000.tar"


def writer(folder: Path) -> ShardWriter:
    return ShardWriter(open_store(str(folder)), TAR, shard=0, split="train", plan_id="p")


def unfinished(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.tmp")]


def test_two_builds_of_one_shard_both_end_and_give_the_same_bytes(tmp_path: Path) -> None:
    first = writer(tmp_path)
    second = writer(tmp_path)
    assert len(unfinished(tmp_path)) == 2, "the second did not remove the living first one's file"
    first.commit()
    bytes_of_first = (tmp_path / TAR).read_bytes()
    second.commit()
    assert (tmp_path / TAR).read_bytes() == bytes_of_first
    assert not unfinished(tmp_path)


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    left = temporary_beside(tmp_path / TAR)
    left.write_bytes(b"half a tar")
    writer(tmp_path).abandon()
    assert not left.exists()


def test_without_locks_nothing_is_removed_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / "train").mkdir()
    left = temporary_beside(tmp_path / TAR)
    left.write_bytes(b"perhaps somebody's")
    with caplog.at_level(logging.WARNING):
        writer(tmp_path).commit()
    assert left.exists()
    assert "has no locks" in caplog.text


def test_a_held_file_is_not_held_twice(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"")
    with path.open("rb") as one, path.open("rb") as two:
        assert hold(one)
        assert not hold(two)


class Full:
    """A file on a full disk: neither a write nor the write that closing makes goes through."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        self.file.close()
        raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_full_disk_keeps_no_unfinished_tar(tmp_path: Path) -> None:
    full = writer(tmp_path)
    full._file = Full(full._file)  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left"):
        full.commit()
    full.abandon()
    assert not unfinished(tmp_path)


def test_a_full_disk_keeps_no_unfinished_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        LocalStore(str(tmp_path)).write("a/b.json", b"{}")
    assert not unfinished(tmp_path)
    assert not (tmp_path / "a" / "b.json").exists()


def test_a_refused_read_is_told_as_what_it_is() -> None:
    class Refusing:
        def read(self, name: str) -> bytes:
            raise StorageError(f"s3://bucket/{name}: cannot read: Forbidden")

    with pytest.raises(StorageError, match="Forbidden"):
        load_plan(Refusing())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only file system", "/out/x"),
        PermissionError(errno.EACCES, "Permission denied", "/out/x"),
        NotADirectoryError(errno.ENOTDIR, "Not a directory", "/out/x"),
        OSError(errno.ENAMETOOLONG, "File name too long", "/out/x"),
    ],
    ids=lambda error: errno.errorcode[error.errno],
)
def test_a_place_that_cannot_be_used_is_one_sentence(
    error: OSError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("cliplift.sharding.build.verify.verify", fail)
    assert cli.main(["verify", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("cliplift: ")
    assert told.count("\n") == 1
    assert error.filename is None or error.filename in told


def test_output_below_a_file_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "v" / "a").mkdir(parents=True)
    (tmp_path / "v" / "a" / "x.mp4").write_bytes(b"x")
    (tmp_path / "file").write_text("")
    (tmp_path / "c.yaml").write_text(
        f"stage: shard\nname: t\noutput: {tmp_path}/file/o\nsource: {{kind: folder, root: {tmp_path}/v}}\n"
        "track: {wandb: disabled}\n"
    )
    assert cli.main(["shard", str(tmp_path / "c.yaml")]) == 2
    assert "is a file where a folder is needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:secret@host.org/a/b.mp4?X-Amz-Signature=abc#t", "https://host.org/a/b.mp4"),
        ("https://host.org?token=abc", "https://host.org"),
        ("s3://key:secret@bucket/a?b.mp4", "s3://bucket/a?b.mp4"),
        ("s3://bucket/a@b.mp4", "s3://bucket/a@b.mp4"),
        ("/data/me:you@home?/x#1.mp4", "/data/me:you@home?/x#1.mp4"),
        ("videos/x.mp4", "videos/x.mp4"),
    ],
)
def test_secrets_of_urls_are_not_shown(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError("Forbidden"), "cannot read: Forbidden; check the credentials"),
        (PermissionError("The provided token has expired."), "the credentials may have expired"),
        (OSError(22, "Bad Request"), "the credentials may have expired"),
        (PermissionError("s3://k:secret@b/x: Access Denied"), "check the credentials"),
    ],
)
def test_a_refusal_of_the_service_says_what_to_do(error: Exception, told: str) -> None:
    sentence = _describe_failure("s3://k:secret@b", "x", "read", error)
    assert sentence.startswith("s3://b/x: cannot read: ")
    assert told in sentence
    assert "secret" not in sentence


@pytest.mark.parametrize("root", ["https://me:secret@host/videos", "https://host/v?X-Amz-Signature=abc"])
def test_a_config_holds_no_password(root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(
        f'stage: shard\nname: t\noutput: {tmp_path}/o\nsource: {{kind: folder, root: "{root}"}}\n'
    )
    assert cli.main(["shard", str(tmp_path / "c.yaml"), "--dry-run"]) == 2
    assert "holds a password or a signature" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--partition", "a\n#SBATCH --wrap=x"],
        ["--account", "a --wrap=x"],
        ["--image", "x\ny"],
        ["--folder", "a\nb"],
        ["--time", "1:00:00\n#SBATCH --uid=0"],
    ],
    ids=lambda words: words[0],
)
def test_submit_takes_no_option_that_writes_lines_of_its_own(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["submit", "transfer/demo", "--to", "slurm", "--print", *words]) == 2
    told = capsys.readouterr()
    assert words[0] in told.err
    assert "SBATCH" not in told.out
