"""The Ray engine on real local clusters: the same bytes as without it, also when its processes are killed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun
from cliplift.sharding.build import ray_engine
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.manifest import BUILD_FILE

MakeRun = Callable[..., ShardRun]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
CPUS = 3


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != BUILD_FILE
    }


@contextlib.contextmanager
def ray_head(*, port: int, **settings: str) -> Iterator[str]:
    """A Ray head of its own with three cores and these settings in its environment; the address.

    Its sockets need a short path.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    env = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"} | settings
    command = [
        *ray,
        "start",
        "--head",
        f"--port={port}",
        f"--num-cpus={CPUS}",
        f"--temp-dir={folder}",
        "--block",
    ]
    command += ["--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=80000000"]
    head = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    address = f"127.0.0.1:{port}"
    check = f"import ray; ray.init(address={address!r}, log_to_driver=False)"
    said = ""
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            asked = subprocess.run(
                [sys.executable, "-c", check], env=env, capture_output=True, text=True, check=False
            )
            if asked.returncode == 0:
                break
            said = asked.stderr
            time.sleep(1)
        else:
            pytest.fail(f"the Ray head did not start: {said[-2000:]}")
        yield address
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A head that asks for no token, also where a Ray that ran before left one in the home folder."""
    with ray_head(port=20000 + os.getpid() % 20000, RAY_AUTH_MODE="disabled") as address:
        yield address


def start(run: ShardRun, **settings: str) -> subprocess.Popen[str]:
    """The build in a driver of its own, so that it can be killed as well."""
    script = (
        "import sys; from cliplift.configs.sharding import ShardRun; "
        "from cliplift.sharding.build.run import run_shard; "
        "report = run_shard(ShardRun.model_validate_json(sys.argv[1])); print(report.shards_built)"
    )
    command = [sys.executable, "-c", script, run.model_dump_json()]
    return subprocess.Popen(
        command,
        env=os.environ | settings,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def ray_workers_at_work(output: Path) -> set[int]:
    """Ray processes on this machine that hold an unfinished shard below ``output`` open."""
    found = set()
    for process in Path("/proc").iterdir():
        try:
            if not (process / "cmdline").read_bytes().startswith(b"ray::"):
                continue
            links = [str(link.readlink()) for link in (process / "fd").iterdir()]
        except OSError:
            continue
        if any(link.startswith(str(output)) and link.endswith(".tmp") for link in links):
            found.add(int(process.name))
    return found


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@needs_ray
@pytest.mark.slow
def test_ray_makes_the_same_bytes_also_when_a_worker_is_killed(
    cluster: str, built: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = start(make_run(output, engine="ray", ray={"address": cluster}))
    seen: set[int] = set()

    def two_at_work() -> bool:
        seen.update(ray_workers_at_work(output))
        return len(seen) >= 2

    wait_for(two_at_work, process)
    wait_for(lambda: ray_workers_at_work(output), process)
    victim = ray_workers_at_work(output) or seen
    os.kill(next(iter(victim)), signal.SIGKILL)
    said, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert said.split()[-1] == "8"
    assert contents(output) == contents(built)


@needs_ray
@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_killed_driver_is_resumed_ten_times_to_the_same_bytes(
    cluster: str, built: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    import random

    output = tmp_path / "out"
    run = make_run(output, engine="ray", ray={"address": cluster})
    draw = random.Random(3)
    hits = 0
    for _ in range(10):
        process = start(run)
        before = len(list(output.rglob("*.index.json")))
        while process.poll() is None and not (
            ray_workers_at_work(output) or len(list(output.rglob("*.index.json"))) > before
        ):
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            hits += 1
        process.communicate()
    last = start(run)
    _, errors = last.communicate(timeout=200)
    assert last.returncode == 0, errors
    assert hits >= 3
    assert contents(output) == contents(built)


@needs_ray
@pytest.mark.slow
def test_mistakes_are_one_sentence(cluster: str, make_run: MakeRun, tmp_path: Path) -> None:
    process = start(
        make_run(tmp_path / "out", engine="ray", ray={"address": cluster, "cpus_per_shard": CPUS + 1})
    )
    _, errors = process.communicate(timeout=100)
    assert "ConfigError: ray.cpus_per_shard: the largest node of the cluster has 3 cores" in errors
    process = start(make_run(tmp_path / "out", engine="ray", ray={"address": "127.0.0.1:1"}))
    _, errors = process.communicate(timeout=100)
    assert "ConfigError: ray.address: no Ray cluster answers" in errors


@needs_ray
@pytest.mark.slow
def test_a_cluster_that_asks_for_a_token_says_so(make_run: MakeRun, tmp_path: Path) -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    with ray_head(port=20001 + os.getpid() % 20000, **token) as address:
        for own in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}):
            process = start(make_run(tmp_path / "out", engine="ray", ray={"address": address}), **own)
            _, errors = process.communicate(timeout=200)
            assert "ConfigError: ray.address: the Ray cluster asks for a token" in errors
            assert token["RAY_AUTH_TOKEN"] not in errors
        process = start(make_run(tmp_path / "out", engine="ray", ray={"address": address}), **token)
        said, errors = process.communicate(timeout=200)
        assert said.split()[-1:] == ["8"], errors


def test_without_ray_the_engine_says_what_to_install(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"engine: Ray is not installed; pip install 'cliplift\[ray\]'"):
        run_shard(make_run(tmp_path / "out", engine="ray"))


class _AskedError(Exception):
    """Ends a build where it asks Ray for a task."""


@pytest.mark.parametrize(("named", "wanted"), [("my_sources", {"CLIPLIFT_PLUGINS": "my_sources"}), ("", {})])
def test_tasks_know_what_plugin_names(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, named: str, wanted: dict[str, str]
) -> None:
    """The processes of a node were started by the cluster: of the driver's environment they know what Ray is given."""
    monkeypatch.setenv("CLIPLIFT_PLUGINS", named)
    asked: dict[str, object] = {}

    class Ray:
        def nodes(self) -> list[dict[str, object]]:
            return []

        def remote(self, **options: object) -> None:
            asked.update(options)
            raise _AskedError

    with pytest.raises(_AskedError):
        ray_engine._map(Ray(), make_run("out"), None, [], progress=None, on_progress=None)  # type: ignore[arg-type]
    assert asked["runtime_env"] == {"env_vars": wanted}
