"""Whatever a command prints, wherever it writes: one sentence and exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cliplift.launch import cli
from cliplift.launch.commands.command import Command
from cliplift.sharding.storage import whole_file

# The command line, whose command prints a name.
CODE = r"""
from cliplift.launch import cli
from cliplift.launch.commands.command import Command

def run(_):
    print("Stra\u00dfe \u4e2d \udcff")
    return 0

cli.all_commands = lambda: {"models": Command(name="models", summary="", run=run, subject="", rest="")}
raise SystemExit(cli.main(["models"]))
"""
PRINTS = [sys.executable, "-c", CODE]


def run_instead(monkeypatch: pytest.MonkeyPatch, run: Callable[[argparse.Namespace], int]) -> int:
    """The exit code of the command line when its command does ``run``."""
    command = Command(name="models", summary="", run=run, subject="", rest="")
    monkeypatch.setattr(cli, "all_commands", lambda: {"models": command})
    return cli.main(["models"])


FAULTS = {
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "full, with a name": OSError(errno.ENOSPC, "No space left on device", "/x"),
    "read-only": OSError(errno.EROFS, "Read-only file system", "/x"),
    "a file in the way": FileExistsError(errno.EEXIST, "File exists", "/x"),
    "a file above it": NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x"),
    "a folder in the way": IsADirectoryError(errno.EISDIR, "Is a directory", "/x"),
    "links in a circle": OSError(errno.ELOOP, "Too many levels of symbolic links", "/x"),
    "not there": FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"),
    "no temporary folder": FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
    "full, told by safetensors": Exception("I/O error: No space left on device (os error 28)"),
    "full, told by torch": RuntimeError("[enforce fail] . fwrite: No space left on device"),
    "too large": OSError(errno.EFBIG, "File too large"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_of_the_place_is_one_sentence(
    fault: Exception, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(_: argparse.Namespace) -> int:
        raise fault

    assert run_instead(monkeypatch, run) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("cliplift: ")


@pytest.mark.parametrize(
    "fault", [RuntimeError("a bug"), OSError(errno.EBADF, "Bad file descriptor"), KeyError("x")]
)
def test_a_mistake_of_ours_keeps_its_traceback(fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: argparse.Namespace) -> int:
        raise fault

    with pytest.raises(type(fault)):
        run_instead(monkeypatch, run)


@pytest.mark.parametrize(
    "setting", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_names_are_written_with_escapes_where_stdout_knows_ascii_alone(setting: dict[str, str]) -> None:
    done = subprocess.run(PRINTS, capture_output=True, env=os.environ | setting, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == rb"Stra\xdfe \u4e2d \udcff" + b"\n"


def test_a_full_stdout_is_one_sentence() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(PRINTS, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert "no space is left" in line


def test_a_closed_pipe_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(PRINTS, stdout=write, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def half_written(target: Path) -> None:
    with whole_file(target) as temporary:
        temporary.write_text("tw")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "page.html"
    with whole_file(target) as temporary:
        temporary.write_text("one")
    assert target.read_text() == "one"
    with pytest.raises(OSError, match="No space"):
        half_written(target)
    assert target.read_text() == "one"
    assert [path.name for path in target.parent.iterdir()] == ["page.html"]


def test_a_folder_in_the_place_of_a_file_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), whole_file(tmp_path):
        pytest.fail("the work began")
    assert list(tmp_path.parent.glob(".*.tmp")) == []
