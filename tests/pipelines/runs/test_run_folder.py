"""The run folder: what was asked, how it was started, what came out."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS, ExportRun
from cliplift.configs.sections import ConfigError
from cliplift.pipelines.runs.folder import RunFolder, sole_writer, write_text

RUN = ExportRun(run="somewhere", output="out")


def test_a_restart_keeps_the_first_start_and_adds_its_own(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", writes=True)
    folder.write_start(RUN, stage="export", name="x", command=["cliplift", "export", "a b"], world_size=1)
    first = json.loads((folder.path / "run.json").read_text())
    folder.write_start(RUN, stage="export", name="x", command=["cliplift", "export", "again"], world_size=2)
    second = json.loads((folder.path / "run.json").read_text())
    assert first["command"] == ["cliplift", "export", "a b"]
    assert first["command_line"] == "cliplift export 'a b'"
    assert second["started_utc"] == first["started_utc"]
    assert len(second["starts"]) == 2
    assert second["world_size"] == 2
    assert second["command"] == ["cliplift", "export", "again"]  # both of the start that the config is of
    assert second["command_line"] == "cliplift export again"


def test_the_config_in_the_folder_loads_to_an_equal_run(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", writes=True)
    folder.write_start(RUN, stage="export", name="x", command=["cliplift"], world_size=1)
    assert load_run(folder.path / "config.yaml", RUNS).run == RUN


def test_results_are_read_back_and_nan_is_refused(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", writes=True)
    assert folder.result() is None
    folder.write_result(stage="s", metrics={"accuracy": 0.5}, seconds=1.23456, classes=["a"], steps=3)
    result = folder.result()
    assert result == {
        "stage": "s",
        "metrics": {"accuracy": 0.5},
        "seconds": 1.235,
        "classes": ["a"],
        "steps": 3,
    }
    with pytest.raises(ValueError, match="Out of range"):
        folder.write_result(stage="s", metrics={"accuracy": float("nan")}, seconds=1.0)
    assert folder.result() == result, "the refused write must leave the old file whole"


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", writes=False)
    folder.write_start(RUN, stage="export", name="x", command=["cliplift"], world_size=2)
    folder.write_result(stage="s", metrics={}, seconds=1.0)
    assert not (tmp_path / "run").exists()


def test_an_unwritable_output_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        RunFolder.create(tmp_path / "file" / "run", writes=True)
    assert caught.value.key == "output"


def test_writing_replaces_a_file_at_once(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "old")
    write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


HOLDER = """
import sys, time
from pathlib import Path
from cliplift.pipelines.runs.folder import sole_writer

with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "held\n"
            with (
                pytest.raises(ConfigError, match=rf"written by process {first.pid} on ") as caught,
                sole_writer(tmp_path, wait_seconds=0.3),
            ):
                pass
            assert caught.value.key == "output"
        finally:
            first.kill()
    with sole_writer(tmp_path, wait_seconds=5):
        assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_file_system_without_locks_is_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with sole_writer(tmp_path):
        pass
    assert "cannot be locked (No locks available)" in caplog.text


@pytest.mark.parametrize("damage", [b"", b'{"starts": [', b"\xff\xfe\x00", b"[]", b"[" * 100_000])
def test_a_damaged_start_record_does_not_block_a_restart(tmp_path: Path, damage: bytes) -> None:
    folder = RunFolder.create(tmp_path / "run", writes=True)
    (folder.path / "run.json").write_bytes(damage)
    folder.write_start(RUN, stage="export", name="x", command=["cliplift"], world_size=1)
    assert len(json.loads((folder.path / "run.json").read_text())["starts"]) == 1
