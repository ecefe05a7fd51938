"""What ``cliplift submit --to slurm`` writes, run by a real Slurm: controller and two node daemons on this machine."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]

NODES = ("loop1", "loop2")
NAME, ADDRESS = "clip-slurm", "10.78.0.1"
CONFIG = """\
ClusterName=loop
SlurmctldHost={name}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ReturnToService=2
JobRequeue=1
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=preempt_send_user_signal,batch_sched_delay=1,sched_interval=2
NodeName={nodes} NodeHostname={name} NodeAddr={address} Port=[17001-17002] CPUs=2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
"""


class Slurm:
    """A cluster of one machine, in a namespace of its own: its ports, processes and host names are nobody else's."""

    def __init__(self, host: Any, folder: Path) -> None:
        self.host, self.folder = host, folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        (folder / "slurm.conf").write_text(
            CONFIG.format(name=NAME, address=ADDRESS, folder=folder, nodes="loop[1-2]")
        )
        munge = folder / "munge"
        munge.mkdir(mode=0o700)
        (munge / "key").write_bytes(secrets.token_bytes(128))
        (munge / "key").chmod(0o400)
        self.daemon(["munged", "--foreground", "--force", f"--key-file={munge}/key",
                     f"--socket={folder}/munge.socket", f"--pid-file={munge}/pid", f"--log-file={munge}/log",
                     f"--seed-file={munge}/seed"])  # fmt: skip
        wait_until((folder / "munge.socket").exists, seconds=10, what="munged")
        self.daemon(["slurmctld", "-D", "-c"])
        for node in NODES:
            self.daemon(["slurmd", "-D", "-N", node])
        wait_until(
            lambda: self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%t").split() == ["idle", "idle"],
            seconds=30,
            what="nodes",
        )

    def daemon(self, words: Sequence[str]) -> None:
        self.host.start(
            words, log=self.folder / f"{words[0]}.out", cwd=self.folder, environment=self.environment
        )

    def run(self, *words: str, cwd: Path | None = None) -> str:
        done = self.host.run(words, cwd=cwd or self.folder, environment=self.environment)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return str(done.stdout)

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        text = self.run("scontrol", "show", "job", number)
        return dict(re.findall(r"(\w+)=(\S*)", text))


@pytest.fixture
def slurm(host_of: Callable[..., Any], tmp_path: Path) -> Iterator[Slurm]:
    for tool in ("munged", "slurmctld", "slurmd", "sbatch"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (Debian: slurm-wlm, munge)")
    tmp_path.chmod(0o755)
    host = host_of(NAME, ADDRESS, aliases=NODES)
    return Slurm(host, tmp_path)


def wait_until(
    condition: Callable[[], bool], *, seconds: float, what: str, logs: Sequence[Path] = ()
) -> float:
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            tails = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs if log.exists())
            pytest.fail(f"{what}: not after {seconds:.0f} s\n{tails}")
        time.sleep(0.5)
    return time.monotonic() - began


def release(slurm: Slurm, number: str) -> None:
    """Start a requeued job before the two minutes are over that Slurm lets it wait.

    Not in the very second it ended: slurmd takes such a start for one that was overtaken by the end ("already killed,
    do not launch batch job") and the job fails.
    """
    time.sleep(3)
    slurm.run("scontrol", "update", f"JobId={number}", "StartTime=now")


def steps_saved(output: Path) -> int:
    return max(
        (int(p.name.removeprefix("step_")) for p in output.glob("checkpoints/step_????????")), default=0
    )


def losses(output: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def submit(slurm: Slurm, *words: str, cwd: Path) -> dict[str, str]:
    """Run ``cliplift submit``; returns the job numbers by name."""
    text = slurm.run(
        sys.executable, "-m", "cliplift.launch.cli", "submit", *words, "--to", "slurm", "--cpus", "1", cwd=cwd
    )
    return dict(re.findall(r"^(\S+): job (\d+)$", text, flags=re.MULTILINE))


def test_ranks_and_meeting_point_of_real_tasks(slurm: Slurm) -> None:
    """What ``find_place`` makes of the variables srun sets, and of those of the batch script around it."""
    code = (
        "import os, cliplift.pipelines.distributed.launchers as r; p = r.find_place(os.environ);"
        "print('place', p.rank, p.world_size, p.local_rank, p.launcher, p.master_address, p.master_port)"
    )
    script = slurm.folder / "places.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=2 --output=places.out\n"
        f'{sys.executable} -c "{code}"\nsrun {sys.executable} -c "{code}"\n'
    )
    slurm.run("sbatch", "--wait", str(script))
    places = [line.split()[1:] for line in (slurm.folder / "places.out").read_text().splitlines()]
    assert places[0] == ["0", "1", "0", "python", "127.0.0.1", "29500"], "the batch script is one process"
    tasks = sorted(places[1:])
    assert [(rank, world, local) for rank, world, local, *_ in tasks] == [
        ("0", "4", "0"), ("1", "4", "1"), ("2", "4", "0"), ("3", "4", "1")
    ]  # fmt: skip
    assert {tuple(place[3:5]) for place in tasks} == {("srun", "loop1")}
    assert len({place[5] for place in tasks}) == 1, "all derive the same port"


def test_preempted_requeued_resumed(
    slurm: Slurm, shards: Path, one_host: Path, words: Callable[..., list[str]], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    config, *overrides = words(shards, output)[1:]
    jobs = submit(slurm, config, *overrides, "--nodes", "2", "--partition", "low", cwd=tmp_path)
    (number,) = jobs.values()
    log = tmp_path / "jobs" / "demo-transfer" / f"demo-transfer-{number}.out"
    wait_until(lambda: steps_saved(output) >= 4, seconds=300, what="four steps", logs=[log])
    slurm.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--wrap", "sleep 3")
    began = time.monotonic()
    wait_until(lambda: slurm.job(number)["Restarts"] == "1", seconds=300, what="requeued", logs=[log])
    requeued, at = time.monotonic() - began, steps_saved(output)
    assert not (output / "result.json").exists(), "the run was over before it could be preempted"
    release(slurm, number)
    wait_until((output / "result.json").exists, seconds=300, what="the result", logs=[log])
    wait_until(
        lambda: slurm.job(number)["JobState"] == "COMPLETED", seconds=300, what="completed", logs=[log]
    )
    text = log.read_text()
    assert f"continues from step {at}" in text, text
    assert losses(output) == losses(one_host), "as if it had never been stopped"
    print(
        f"[slurm] preempted: saved at step {at} and requeued in {requeued:.1f} s, continued from step {at}, "
        f"losses bit-identical to the unbroken run; log:\n{text}",
        flush=True,
    )


def test_signalled_before_the_time_limit_requeues_itself(
    slurm: Slurm, shards: Path, one_host: Path, words: Callable[..., list[str]], tmp_path: Path
) -> None:
    """SIGUSR1, as Slurm sends it ``--signal`` seconds before the end of the time limit, to the ranks alone."""
    output = tmp_path / "run"
    config, *overrides = words(shards, output)[1:]
    (number,) = submit(slurm, config, *overrides, "--nodes", "2", cwd=tmp_path).values()
    log = tmp_path / "jobs" / "demo-transfer" / f"demo-transfer-{number}.out"
    wait_until(lambda: steps_saved(output) >= 4, seconds=300, what="four steps", logs=[log])
    slurm.run("scancel", "--signal=USR1", number)
    wait_until(lambda: slurm.job(number)["Restarts"] == "1", seconds=300, what="requeued", logs=[log])
    assert "saved after a signal" in log.read_text()
    release(slurm, number)
    wait_until((output / "result.json").exists, seconds=300, what="the result", logs=[log])
    assert losses(output) == losses(one_host)
    print(f"[slurm] USR1: {log.read_text()}", flush=True)


def test_a_chain_from_videos_to_a_trained_student(
    slurm: Slurm, words: Callable[..., list[str]], tmp_path: Path
) -> None:
    """shard (plan, an array of two parts, finalize, verify), then transfer: five jobs, each after the one before."""
    from cliplift.sharding.demo.synthetic import write_demo_videos

    write_demo_videos(
        tmp_path / "videos", seed=1, train_per_class=1, val_per_class=1, test_per_class=1, unlabelled=16,
        size_pixels=64,
    )  # fmt: skip
    (tmp_path / "shard.yaml").write_text(
        f"base: shard/demo_unlabelled\nname: chain\noutput: {tmp_path}/shards\nworkers: 1\n"
        f"source: {{root: {tmp_path}/videos/unlabelled}}\nshards: {{videos_per_shard: 4}}\n"
    )
    (tmp_path / "transfer.yaml").write_text(
        f"base: transfer/demo\nname: chain-transfer\noutput: {tmp_path}/run\ndata: {{shards: {tmp_path}/shards}}\n"
        "schedule: {steps: 3}\nengine: {global_batch: 12}\ntrack: {wandb: disabled}\n"
    )
    jobs = submit(slurm, "shard.yaml", "transfer.yaml", "--nodes", "2", "--parts", "2", cwd=tmp_path)
    assert list(jobs) == ["chain-plan", "chain-build", "chain-finalize", "chain-verify", "chain-transfer"]
    logs = sorted((tmp_path / "jobs" / "chain-transfer").glob("*.out"))
    wait_until((tmp_path / "run" / "result.json").exists, seconds=300, what="the result", logs=logs)
    logs = sorted((tmp_path / "jobs" / "chain-transfer").glob("chain-build-*.out"))
    assert len(logs) == 2, "one log a part"
    built = [int(re.findall(r"(\d+) shards built", log.read_text())[0]) for log in logs]
    assert min(built) >= 1, "both parts of the array did something"
    print(f"[slurm] chain {jobs}: parts built {built} shards", flush=True)
