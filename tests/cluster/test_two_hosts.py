"""The demo over two hosts: the same losses as on one, and a host or the network between them may die."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2400)]

Words = Callable[[Path, Path], list[str]]
CLI = ["-m", "cliplift.launch.cli"]
# Ends a wait that would not end. On a busy machine the ranks need minutes to start.
PATIENCE_SECONDS = 600
# Quick to notice a lost agent; and restarted workers must not meet the addresses of the dead ones.
QUICK = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
RENDEZVOUS = (
    "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=600,read_timeout=20"
)


def torchrun(hosts: Any, words: Sequence[str], *, restarts: int = 0) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts.a.address}:29400", "--rdzv-id", "cliplift",
        "--rdzv-conf", RENDEZVOUS, "--max-restarts", str(restarts), "--monitor-interval", "1", *CLI, *words,
    ]  # fmt: skip


def losses(output: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def steps_saved(output: Path) -> int:
    return max(
        (int(p.name.removeprefix("step_")) for p in output.glob("checkpoints/step_????????")), default=0
    )


def wait_until(
    condition: Callable[[], bool], *, seconds: float, what: str, logs: Sequence[Path] = ()
) -> float:
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            tails = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)
            pytest.fail(f"{what}: not after {seconds:.0f} s\n{tails}")
        time.sleep(0.2)
    return time.monotonic() - began


def finish(children: Sequence[subprocess.Popen[bytes]], *, seconds: float, logs: Sequence[Path]) -> None:
    wait_until(
        lambda: all(c.poll() is not None for c in children), seconds=seconds, what="the end", logs=logs
    )
    tails = "\n".join(log.read_text()[-3000:] for log in logs)
    assert [child.returncode for child in children] == [0] * len(children), tails


def same_losses(output: Path, reference: Path) -> None:
    """Bit for bit: the sums of two ranks have one order, wherever the ranks are."""
    assert losses(output) == losses(reference)
    assert sorted(losses(output)) == list(range(1, 17))


def say(text: str) -> None:
    print(f"[two hosts] {text}", flush=True)


def test_torchrun_over_two_hosts_equals_one_host(
    hosts: Any, shards: Path, one_host: Path, words: Words, tmp_path: Path
) -> None:
    command = torchrun(hosts, words(shards, tmp_path / "run"))
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    began = time.monotonic()
    children = [
        host.start(command, log=log, cwd=tmp_path) for host, log in zip((hosts.a, hosts.b), logs, strict=True)
    ]
    wait_until(
        lambda: steps_saved(tmp_path / "run") > 0,
        seconds=PATIENCE_SECONDS,
        what="a first checkpoint",
        logs=logs,
    )
    # Really one rank each, and each told apart by its name.
    assert len(hosts.a.processes("cliplift.launch.cli")) == len(hosts.b.processes("cliplift.launch.cli")) >= 1
    finish(children, seconds=PATIENCE_SECONDS, logs=logs)
    same_losses(tmp_path / "run", one_host)
    say(
        f"torchrun --nnodes 2: 16 steps in {time.monotonic() - began:.1f} s, losses bit-identical to one host"
    )


def test_another_config_on_one_host_is_named_within_a_minute(
    hosts: Any, shards: Path, words: Words, tmp_path: Path
) -> None:
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    began = time.monotonic()
    children = [
        host.start(
            torchrun(hosts, [*words(shards, tmp_path / "run"), *extra]), log=log, cwd=tmp_path
        )
        for host, log, extra in zip((hosts.a, hosts.b), logs, ([], ["optim.lr=0.5"]), strict=True)
    ]  # fmt: skip
    wait_until(lambda: all(c.poll() is not None for c in children), seconds=60, what="both stop", logs=logs)
    seconds = time.monotonic() - began
    for log in logs:
        assert "optim.lr: rank 1 on clip-" in log.read_text()
    say(f"another config on one host: both stopped after {seconds:.1f} s")


def test_deepspeed_with_a_hostfile_over_ssh_equals_one_host(
    hosts: Any, shards: Path, one_host: Path, words: Words, tmp_path: Path
) -> None:
    for tool in ("sshd", "pdsh", "ssh-keygen"):
        if subprocess.run(["sh", "-c", f"command -v {tool}"], capture_output=True, check=False).returncode:
            pytest.skip(f"{tool} is not installed")
    start_ssh_servers(hosts, tmp_path)
    (tmp_path / "hostfile").write_text("clip-a slots=1\nclip-b slots=1\n")
    # The launcher sends these to the other hosts; everything else there is a fresh login.
    names = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "WANDB_MODE", "PYTHONWARNINGS")
    values = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "WANDB_MODE": "disabled",
        "PYTHONWARNINGS": "ignore",
    }
    (tmp_path / ".deepspeed_env").write_text("".join(f"{name}={values[name]}\n" for name in names))
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [
        str(launcher), "--hostfile", "hostfile", "--ssh_port", "2222", "--launcher", "pdsh",
        "--master_addr", hosts.a.address, "--master_port", "29501", "--module", "cliplift.launch.cli",
        *words(shards, tmp_path / "run"),
    ]  # fmt: skip
    log, began = tmp_path / "deepspeed.log", time.monotonic()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    child = hosts.a.start(command, log=log, cwd=tmp_path, environment={"PATH": path, "PDSH_RCMD_TYPE": "ssh"})
    wait_until(
        lambda: child.poll() is not None or steps_saved(tmp_path / "run") > 0,
        seconds=PATIENCE_SECONDS,
        what="steps",
        logs=[log],
    )
    assert len(hosts.b.processes("cliplift.launch.cli")) >= 1, log.read_text()[-3000:]
    finish([child], seconds=PATIENCE_SECONDS, logs=[log])
    same_losses(tmp_path / "run", one_host)
    say(
        f"deepspeed --hostfile (pdsh over ssh): {time.monotonic() - began:.1f} s, losses bit-identical to one host"
    )


def start_ssh_servers(hosts: Any, folder: Path) -> None:
    """One sshd a host, with keys made on the spot, that lets root of the other host in."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    public = (folder / "user.pub").read_text()
    config = (
        "Host clip-a clip-b\n  Port 2222\n  User root\n  IdentityFile ~/.ssh/id_ed25519\n"
        "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    for host in (hosts.a, hosts.b):
        key = host.ssh_folder / "id_ed25519"
        key.write_bytes((folder / "user").read_bytes())
        (host.ssh_folder / "config").write_text(config)
        (host.ssh_folder / "authorized_keys").write_text(public)
        for file in host.ssh_folder.iterdir():
            file.chmod(0o600)
        options = [
            "-p", "2222", "-h", str(folder / "host"), "-o", f"PidFile={folder}/sshd-{host.name}.pid",
            "-o", "AuthorizedKeysFile=/root/.ssh/authorized_keys", "-o", "PermitRootLogin=prohibit-password",
            "-o", "StrictModes=no", "-o", "UsePAM=no",
        ]  # fmt: skip
        script = 'mkdir -p /run/sshd && exec /usr/sbin/sshd -D -e "$@"'
        host.start(["sh", "-c", script, "sh", *options], log=folder / f"sshd-{host.name}.log", cwd=folder)
    reach = hosts.a.command(["ssh", "clip-b", "hostname"])
    wait_until(
        lambda: subprocess.run(reach, capture_output=True, text=True, check=False).stdout == "clip-b\n",
        seconds=20, what="ssh to the other host", logs=[folder / "sshd-clip-b.log"],
    )  # fmt: skip


def test_a_killed_worker_is_restarted_and_the_run_resumes_exactly(
    hosts: Any, shards: Path, one_host: Path, words: Words, tmp_path: Path
) -> None:
    command = torchrun(hosts, words(shards, tmp_path / "run"), restarts=3)
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    children = [
        host.start(command, log=log, cwd=tmp_path, environment=QUICK)
        for host, log in zip((hosts.a, hosts.b), logs, strict=True)
    ]
    wait_until(
        lambda: steps_saved(tmp_path / "run") >= 4, seconds=PATIENCE_SECONDS, what="four steps", logs=logs
    )
    workers = [
        p for p in hosts.b.processes("cliplift.launch.cli") if p not in hosts.b.processes("torch.distributed")
    ]
    for pid in workers:
        os.kill(pid, 9)
    at, began = steps_saved(tmp_path / "run"), time.monotonic()
    seconds = wait_until(
        lambda: "continues from step" in logs[0].read_text(),
        seconds=PATIENCE_SECONDS,
        what="a resumed run",
        logs=logs,
    )
    finish(children, seconds=PATIENCE_SECONDS, logs=logs)
    same_losses(tmp_path / "run", one_host)
    say(
        f"worker of host b killed after step {at}: resumed {seconds:.1f} s later by torchrun, "
        f"finished after {time.monotonic() - began:.1f} s, losses bit-identical"
    )


def test_a_dead_host_is_noticed_and_rejoins(
    hosts: Any, shards: Path, one_host: Path, words: Words, tmp_path: Path
) -> None:
    """Everything on host b dies; the scheduler, played by the test, starts its job there again."""
    command = torchrun(hosts, words(shards, tmp_path / "run"), restarts=3)
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    children = [
        host.start(command, log=log, cwd=tmp_path, environment=QUICK)
        for host, log in zip((hosts.a, hosts.b), logs, strict=True)
    ]
    wait_until(
        lambda: steps_saved(tmp_path / "run") >= 4, seconds=PATIENCE_SECONDS, what="four steps", logs=logs
    )
    before = len(logs[0].read_text())
    assert hosts.b.kill("cliplift.launch.cli")
    began = time.monotonic()
    noticed = wait_until(
        lambda: re.search("onnection (closed|reset) by peer", logs[0].read_text()[before:]) is not None,
        seconds=60, what="noticed", logs=logs,
    )  # fmt: skip
    children[1].wait(timeout=20)
    children[1] = hosts.b.start(command, log=logs[1], cwd=tmp_path, environment=QUICK)
    resumed = wait_until(
        lambda: "continues from step" in "".join(log.read_text() for log in logs),
        seconds=PATIENCE_SECONDS, what="a resumed run", logs=logs,
    )  # fmt: skip
    finish(children, seconds=PATIENCE_SECONDS, logs=logs)
    same_losses(tmp_path / "run", one_host)
    say(
        f"host b killed: noticed by host a in {noticed:.1f} s, resumed {resumed:.1f} s after its restart, "
        f"{time.monotonic() - began:.1f} s in all, losses bit-identical"
    )


def test_a_cut_cable_stops_the_run_in_the_configured_time_and_it_resumes(
    hosts: Any, shards: Path, one_host: Path, words: Words, tmp_path: Path
) -> None:
    """Nobody closes a connection when a cable is pulled: the collective's time limit is what notices."""
    command = torchrun(hosts, words(shards, tmp_path / "run"))
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    children = [
        host.start(command, log=log, cwd=tmp_path, environment=QUICK)
        for host, log in zip((hosts.a, hosts.b), logs, strict=True)
    ]
    wait_until(
        lambda: steps_saved(tmp_path / "run") >= 4, seconds=PATIENCE_SECONDS, what="four steps", logs=logs
    )
    hosts.cut()
    at = steps_saved(tmp_path / "run")
    # 20 s by the config, and what torchrun takes to end its workers.
    noticed = wait_until(lambda: children[0].poll() is not None, seconds=90, what="host a stops", logs=logs)
    alone = wait_until(lambda: "imed out" in logs[1].read_text(), seconds=60, what="host b stops", logs=logs)
    assert children[0].returncode != 0
    assert "imed out" in logs[0].read_text(), logs[0].read_text()[-3000:]
    hosts.join()
    # Cut off from where all meet, the launcher of host b cannot learn that the job is over; a scheduler ends it.
    hosts.b.kill("torch.distributed.run")
    children[1].wait(timeout=20)
    again = [
        host.start(command, log=log, cwd=tmp_path, environment=QUICK)
        for host, log in zip((hosts.a, hosts.b), logs, strict=True)
    ]
    finish(again, seconds=PATIENCE_SECONDS, logs=logs)
    same_losses(tmp_path / "run", one_host)
    say(
        f"cable cut after step {at}: host a stopped {noticed:.1f} s later, host b's rank by {noticed + alone:.1f} s "
        "(limit 20 s); started again when it was back: losses bit-identical"
    )
