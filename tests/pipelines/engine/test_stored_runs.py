"""Runs whose checkpoints lie in a store: stopped, killed in an upload, and resumed on machines with other folders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import pytest

from cliplift.sharding.storage import open_store

WORKER = Path(__file__).with_name("training_worker.py")
CHANGES: dict[str, Any] = {"optim__average_decay": 0.9, "evaluation": {"every_steps": 4}}


@pytest.fixture(scope="module")
def s3(failing_s3: ModuleType) -> Iterator[Any]:
    with failing_s3.served("bucket") as faults:
        yield faults


@pytest.fixture(autouse=True)
def _calm(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "s3" in request.fixturenames:
        request.getfixturevalue("s3").calm()


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 3))])
def test_a_run_goes_on_from_a_store_in_an_empty_folder(
    worker: ModuleType, tmp_path: Path, stage: int
) -> None:
    """Losses, weights and best metric are those of a run on a disk, to the last bit."""
    changes = CHANGES | {"engine__zero_stage": stage}
    whole = worker.train(worker.run_config(str(tmp_path / "disk"), **changes))
    url = f"memory://{uuid4().hex}"
    stored = worker.train(worker.run_config(str(tmp_path / "first"), checkpoint__url=url, **changes))
    assert stored == whole
    store = open_store(url)
    kept = {name.rpartition("/")[0] for name in store.list() if name.endswith("COMPLETE.json")}
    steps = {"checkpoints/step_00000004", "checkpoints/step_00000008"}
    assert kept == steps | {"checkpoints/best/step_00000004"}
    history = [json.loads(line)["step"] for line in store.read("metrics.jsonl").decode().splitlines()]
    assert max(history) == 8
    for name in store.list():
        if name.startswith("checkpoints/step_00000008/"):
            store.remove(name)
    again = worker.train(worker.run_config(str(tmp_path / "second"), checkpoint__url=url, **changes))
    assert again["losses"] == whole["losses"][4:]
    assert again["checksum"] == whole["checksum"]
    left = [path for path in (tmp_path / "second/checkpoints").rglob("*") if path.is_file()]
    assert left == [], "nothing of it stays on this machine"


def launch(results: Path, case: dict[str, Any], ranks: int = 2) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [*words, str(WORKER), str(results), json.dumps(case)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "FSSPEC_S3": json.dumps({"config_kwargs": {"read_timeout": 2}})},
    )


def finish(process: subprocess.Popen[str], results: Path) -> dict[str, Any]:
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said[-4000:]
    (found,) = json.loads(results.read_text())
    result: dict[str, Any] = found
    return result


def kill_9(process: subprocess.Popen[str]) -> None:
    """The launcher first, so that it restarts nothing, then its ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("stage", "asynchronous"), [(0, False), (1, True), (2, False), (3, False)])
def test_two_hosts_without_a_common_folder_killed_in_an_upload_go_on(
    tmp_path: Path, s3: Any, stage: int, asynchronous: bool
) -> None:
    """``kill -9`` in the middle of rank 1's upload of step 8; the start after it has new folders and one rank more."""
    url = f"s3://bucket/{uuid4().hex}"
    case = CHANGES | {"engine__zero_stage": stage, "schedule": {"steps": 12, "name": "cosine"}}
    case |= {"checkpoint": {"every_steps": 4, "asynchronous": asynchronous}}
    whole = finish(
        launch(tmp_path / "whole.json", case | {"output": str(tmp_path / "whole")}), tmp_path / "whole.json"
    )
    stored = case | {"checkpoint": case["checkpoint"] | {"url": url}}
    s3.share, s3.kinds, s3.only = 1.0, ("slow upload",), "/checkpoints/step_00000008/optimizer-rank1"
    s3.uploading.clear()
    killed = launch(tmp_path / "killed.json", stored | {"output": str(tmp_path / "host{rank}")})
    assert s3.uploading.wait(timeout=200)
    kill_9(killed)
    s3.calm()
    names = open_store(url).list()
    assert "checkpoints/step_00000004/COMPLETE.json" in names
    assert [name for name in names if "/step_00000008/" in name], "some of it is there"
    assert "checkpoints/step_00000008/COMPLETE.json" not in names
    for rank in (0, 1):
        assert not list((tmp_path / f"host{rank}").rglob(f"*-rank{1 - rank}.*")), "a folder of its own"
    again = launch(tmp_path / "again.json", stored | {"output": str(tmp_path / "other{rank}")})
    found = finish(again, tmp_path / "again.json")
    assert found["losses"] == whole["losses"][4:]
    assert found["checksum"] == whole["checksum"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_through_faults_is_the_same_run(tmp_path: Path, s3: Any) -> None:
    """Every tenth request fails: 5xx, resets, cut up- and downloads, lost answers, stalls."""
    case = CHANGES | {"engine__zero_stage": 2, "output": str(tmp_path / "whole")}
    whole = finish(launch(tmp_path / "whole.json", case), tmp_path / "whole.json")
    s3.share = 0.1
    stored = case | {
        "output": str(tmp_path / "host{rank}"),
        "checkpoint__url": f"s3://bucket/{uuid4().hex}",
    }
    found = finish(launch(tmp_path / "stored.json", stored), tmp_path / "stored.json")
    s3.calm()
    assert found == whole
    assert len(s3.seen) >= 5, "most kinds of fault happened"
    store = open_store(stored["checkpoint__url"])
    for name in [name for name in store.list() if "/step_00000008/" in name]:
        store.remove(name)
    s3.share = 0.1
    again = finish(
        launch(tmp_path / "a.json", stored | {"output": str(tmp_path / "new{rank}")}), tmp_path / "a.json"
    )
    assert (again["losses"], again["checksum"]) == (whole["losses"][4:], whole["checksum"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 4])
def test_another_number_of_hosts_goes_on_by_ranges(tmp_path: Path, s3: Any, ranks: int) -> None:
    url = f"s3://bucket/{uuid4().hex}"
    case = CHANGES | {"engine__zero_stage": 3, "checkpoint__url": url}
    whole = finish(
        launch(tmp_path / "2.json", case | {"output": str(tmp_path / "two{rank}")}), tmp_path / "2.json"
    )
    store = open_store(url)
    for name in [name for name in store.list() if "/step_00000008/" in name]:
        store.remove(name)
    again = launch(tmp_path / "n.json", case | {"output": str(tmp_path / "n{rank}")}, ranks)
    found = finish(again, tmp_path / "n.json")
    assert found["losses"] == pytest.approx(whole["losses"][4:], abs=2e-6)
    assert found["checksum"] == pytest.approx(whole["checksum"], rel=1e-5)
