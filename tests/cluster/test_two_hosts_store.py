"""Two hosts without a common folder: each sees an empty disk of its own where the run is, and a served S3 holds it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2400)]

PORT = 9200
WORDS = ["checkpoint.url=s3://runs/two"]
# Lists the store, and makes its bucket first where there is none.
LIST = """
import fsspec, json
store = fsspec.filesystem("s3")
if not store.exists("runs"):
    store.mkdir("runs")
print(json.dumps(store.find("runs")))
"""


@pytest.fixture(scope="module")
def two(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """How the other tests over two hosts start and wait."""
    return load_module(Path(__file__).with_name("test_two_hosts.py"))


class Store:
    """An S3 API that host a serves, and both hosts reach over the cable."""

    def __init__(self, hosts: Any, folder: Path) -> None:
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://{hosts.a.address}:{PORT}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.host, self.folder = hosts.a, folder
        serve = [sys.executable, "-m", "moto.server", "-H", hosts.a.address, "-p", str(PORT)]
        hosts.a.start(serve, log=folder / "s3.log", cwd=folder)

    def answers(self) -> bool:
        return self._list().returncode == 0

    def names(self) -> list[str]:
        """What it holds."""
        return list(json.loads(self._list().stdout))

    def _list(self) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", LIST]
        done: subprocess.CompletedProcess[str] = self.host.run(
            words, cwd=self.folder, environment=self.environment
        )
        return done

    def last_step(self) -> int:
        """Of the newest complete checkpoint; 0 before the first."""
        sealed = [name for name in self.names() if name.endswith("COMPLETE.json") and "/best/" not in name]
        return max((int(name.split("/")[-2][5:13]) for name in sealed), default=0)


@pytest.fixture
def store(hosts: Any, two: ModuleType, tmp_path: Path) -> Store:
    """The served store, when it answers."""
    made = Store(hosts, tmp_path)
    two.wait_until(made.answers, seconds=two.PATIENCE_SECONDS, what="the store", logs=[tmp_path / "s3.log"])
    return made


@pytest.fixture
def command(hosts: Any, shards: Path, words: Any, two: ModuleType, tmp_path: Path) -> list[str]:
    """What both hosts start: the same ``output``, which is on a disk of each."""
    (tmp_path / "disk").mkdir()
    started: list[str] = two.torchrun(hosts, [*words(shards, tmp_path / "disk/run"), *WORDS])
    return started


def give_disks(hosts: Any, place: Path) -> None:
    """An empty file system at the same path on each host, which the other and this process do not see."""
    for host in (hosts.a, hosts.b):
        done = host.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], cwd=place.parent)
        assert done.returncode == 0, done.stderr


def files_on(host: Any, place: Path) -> list[str]:
    found = host.run(["find", str(place), "-type", "f"], cwd=place.parent)
    return sorted(found.stdout.split())


def test_hosts_without_a_common_folder_die_and_go_on_from_the_store(
    hosts: Any, store: Store, command: list[str], one_host: Path, two: ModuleType
) -> None:
    """Both hosts die and come back with empty disks; the losses are those of one host that was never stopped."""
    tmp_path, place = store.folder, store.folder / "disk"
    give_disks(hosts, place)
    logs = [tmp_path / "a.log", tmp_path / "b.log"]

    def start() -> list[Any]:
        return [
            host.start(command, log=log, cwd=tmp_path, environment=two.QUICK | store.environment)
            for host, log in zip((hosts.a, hosts.b), logs, strict=True)
        ]

    children = start()
    two.wait_until(lambda: store.last_step() >= 4, seconds=two.PATIENCE_SECONDS, what="four steps", logs=logs)
    for host in (hosts.a, hosts.b):
        assert host.kill("cliplift.launch.cli")
    for child in children:
        child.wait(timeout=20)
    at = store.last_step()
    assert 4 <= at < 16, "they died before the end"
    assert not list(place.rglob("*")), "nothing of it is where all could see it"
    own = [files_on(host, place) for host in (hosts.a, hosts.b)]
    assert [path for path in own[0] if path.endswith("metrics.jsonl")], "the records are on host a"
    assert not [path for path in own[1] if path.endswith("metrics.jsonl")], "and not on host b"
    give_disks(hosts, place)
    assert [files_on(host, place) for host in (hosts.a, hosts.b)] == [[], []]
    two.finish(start(), seconds=two.PATIENCE_SECONDS, logs=logs)
    assert f"continues from step {at}" in logs[0].read_text()
    history = hosts.a.run(["cat", str(place / "run/metrics.jsonl")], cwd=tmp_path).stdout
    (tmp_path / "found").mkdir()
    (tmp_path / "found/metrics.jsonl").write_text(history)
    two.same_losses(tmp_path / "found", one_host)
    names = store.names()
    for kept in ("result.json", "weights/model.safetensors", "checkpoints/step_00000016/COMPLETE.json"):
        assert f"runs/two/{kept}" in names
    two.say(
        f"no common folder: both killed after step {at}, resumed from the store on empty disks, same losses"
    )
