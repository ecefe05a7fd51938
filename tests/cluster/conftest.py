"""Two hosts on one machine: network namespaces joined by a virtual cable, each with its own name and processes.

A host here has its own network, host name, process numbers, /dev/shm and /etc/hosts, and shares the kernel, the clock
and the file system (which stands for the cluster's shared one) with the other. That shows launching, meeting, dying
and resuming; it shows nothing of network speed or NCCL.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS

NAMES = ("clip-a", "clip-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "WANDB_MODE": "disabled",
    "PYTHONWARNINGS": "ignore",
    "PYTHONUNBUFFERED": "1",
}


class Host:
    """One namespace and the process that keeps it alive."""

    def __init__(self, name: str, address: str, folder: Path, *, known: Mapping[str, str]) -> None:
        self.name, self.address = name, address
        hosts = folder / f"hosts-{name}"
        lines = [f"{a} {n}" for n, a in known.items()]
        hosts.write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
        home = folder / f"ssh-{name}"
        home.mkdir(mode=0o700)
        self.ssh_folder = home
        script = (
            f"hostname {name} && mount --make-rprivate / && mount -t tmpfs tmpfs /dev/shm"
            f" && mount --bind {hosts} /etc/hosts && mkdir -p /root/.ssh && mount --bind {home} /root/.ssh"
            " && ip link set lo up && echo ready && exec sleep infinity"
        )
        isolated = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.keeper = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{name}", *isolated, "sh", "-c", script],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.keeper.stdout is not None
        assert self.keeper.stdout.readline() == "ready\n", f"{name} did not come up"
        children = Path(f"/proc/{self.keeper.pid}/task/{self.keeper.pid}/children").read_text().split()
        self.pid = int(children[0])

    def command(self, words: Sequence[str]) -> list[str]:
        return ["nsenter", "--target", str(self.pid), "--net", "--uts", "--mount", "--pid", *words]

    def start(
        self, words: Sequence[str], *, log: Path, cwd: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            return subprocess.Popen(
                self.command(["sh", "-c", f'cd "{cwd}" && exec "$@"', "sh", *words]),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | ENVIRONMENT | dict(environment or {}),
            )

    def processes(self, word: str) -> list[int]:
        """Process numbers, as the machine counts them, of this host's processes with a word in their command."""
        here = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                if (folder / "ns" / "pid").readlink() == here and word in (folder / "cmdline").read_text():
                    found.append(int(folder.name))
            except OSError:
                continue  # it has ended meanwhile
        return sorted(found)

    def kill(self, word: str) -> list[int]:
        """SIGKILL to every process of this host with a word in its command, as when the host dies."""
        killed = [pid for pid in self.processes(word) if pid != self.pid]
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        return killed

    def run(
        self, words: Sequence[str], *, cwd: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A command to its end."""
        return subprocess.run(
            self.command(["sh", "-c", f'cd "{cwd}" && exec "$@"', "sh", *words]),
            capture_output=True, text=True, timeout=120, check=False,
            env=os.environ | ENVIRONMENT | dict(environment or {}),
        )  # fmt: skip

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGKILL)  # process 1 of the namespace takes all others with it
        self.keeper.wait(timeout=20)


class TwoHosts:
    """Host a, where all meet, and host b."""

    def __init__(self, folder: Path) -> None:
        remove_namespaces()
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", "clip0", "type", "veth", "peer", "name", "clip1")
        for number, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True)):
            ip("link", "set", f"clip{number}", "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"clip{number}")
            ip("-n", name, "link", "set", f"clip{number}", "up")
        known = dict(zip(NAMES, ADDRESSES, strict=True))
        self.a, self.b = (Host(name, address, folder, known=known) for name, address in known.items())

    def cut(self) -> None:
        """Pull the cable."""
        ip("-n", NAMES[1], "link", "set", "clip1", "down")

    def join(self) -> None:
        ip("-n", NAMES[1], "link", "set", "clip1", "up")

    def stop(self) -> None:
        for host in (self.a, self.b):
            host.stop()
        remove_namespaces()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def remove_namespaces() -> None:
    for name in NAMES:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def reason_to_skip() -> str | None:
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    tried = subprocess.run(["ip", "netns", "add", "clip-try"], check=False, capture_output=True, text=True)
    if tried.returncode:
        return f"network namespaces are not allowed here: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", "clip-try"], check=True, capture_output=True)
    return None


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    reason = reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    two = TwoHosts(tmp_path)
    yield two
    two.stop()


@pytest.fixture
def host_of(tmp_path: Path) -> Iterator[Callable[..., Host]]:
    """Makes single hosts that have several names."""
    reason = reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    made: list[Host] = []

    def make(name: str, address: str, *, aliases: Sequence[str]) -> Host:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
        ip("netns", "add", name)
        # With the loopback alone the C library resolves nothing: it needs a cable, if only to itself.
        ip("-n", name, "link", "add", "clip0", "type", "veth", "peer", "name", "clip1")
        ip("-n", name, "address", "add", f"{address}/24", "dev", "clip0")
        for end in ("clip0", "clip1"):
            ip("-n", name, "link", "set", end, "up")
        made.append(Host(name, address, tmp_path, known=dict.fromkeys((name, *aliases), address)))
        return made[-1]

    yield make
    for host in made:
        host.stop()
        subprocess.run(["ip", "netns", "delete", host.name], check=False, capture_output=True)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """Unlabelled demo clips for transfer."""
    from cliplift.sharding.build.run import run_shard
    from cliplift.sharding.demo.synthetic import write_demo_videos

    folder = tmp_path_factory.mktemp("cluster-data")
    write_demo_videos(
        folder / "videos", seed=1, train_per_class=1, val_per_class=1, test_per_class=1, unlabelled=24,
        size_pixels=80,
    )  # fmt: skip
    words = [f"source.root={folder}/videos/unlabelled", f"output={folder}/shards", "workers=2"]
    run_shard(load_run(repository / "configs" / "shard" / "demo_unlabelled.yaml", RUNS, words).run)
    return folder / "shards"


@pytest.fixture(scope="session")
def one_host(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unbroken run to compare with: one host, two processes."""
    output = tmp_path_factory.mktemp("one-host") / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "cliplift.launch.cli", *demo_words(shards, output)],
        env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return output


@pytest.fixture(scope="session")
def words() -> object:
    """The function that gives the command of the demo run."""
    return demo_words


def demo_words(shards: Path, output: Path) -> list[str]:
    """The demo's transfer YAML, shortened; a checkpoint every second step, every step logged."""
    return [
        "transfer", "transfer/demo", f"data.shards={shards}", f"output={output}", "schedule.steps=16",
        "engine.global_batch=16", "checkpoint.every_steps=2", "track.every_steps=1", "track.wandb=disabled",
        "engine.collective_timeout_seconds=20",
    ]  # fmt: skip
