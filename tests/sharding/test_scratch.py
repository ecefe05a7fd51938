"""Temporary files: none is left by a build that ends, and those of a killed one are gone after the next."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from cliplift.configs.sharding import ShardRun
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.build.verify import verify
from cliplift.sharding.scratch import scratch_folder, sweep

MakeRun = Callable[..., ShardRun]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that stands for /tmp, here and in child processes."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_a_build_leaves_no_temporary_files(temporary: Path, make_run: MakeRun, tmp_path: Path) -> None:
    run_shard(make_run(tmp_path / "out", verify_decode="sample"))
    assert list(temporary.iterdir()) == []


def test_a_build_to_an_object_store_leaves_no_temporary_files(temporary: Path, make_run: MakeRun) -> None:
    run_shard(make_run("memory://scratch/out"))
    verify("memory://scratch/out", decode="none")
    fsspec.filesystem("memory").rm("scratch", recursive=True)
    assert list(temporary.iterdir()) == []


def test_what_a_killed_build_left_is_removed_by_the_next(
    temporary: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "out")
    script = (
        "import sys; from cliplift.configs.sharding import ShardRun; "
        "from cliplift.sharding.build.run import run_shard; "
        "run_shard(ShardRun.model_validate_json(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, run.model_dump_json()])
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").rglob("*.tar")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert list(temporary.iterdir())
    assert run_shard(run).dataset is not None
    assert list(temporary.iterdir()) == []


def test_a_folder_in_use_is_not_swept(temporary: Path) -> None:
    with scratch_folder() as mine:
        (mine / "file").write_bytes(b"work")
        script = "from cliplift.sharding.scratch import scratch_folder\nwith scratch_folder(): pass"
        subprocess.run([sys.executable, "-c", script], check=True, env=os.environ)
        sweep(temporary)
        assert (mine / "file").read_bytes() == b"work"
    assert list(temporary.iterdir()) == []
