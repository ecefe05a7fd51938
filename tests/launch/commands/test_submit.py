"""Scripts for schedulers: read by bash and shellcheck, checked against Kubernetes' schemas, and tried with stubs."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cliplift.configs.sections import ConfigError
from cliplift.launch.cli import build_parser, main
from cliplift.launch.commands.submit import run_submit
from cliplift.launch.jobs.plan import job_name

CHAIN = ["shard/demo_unlabelled", "transfer/demo", "finetune/demo"]
VOLUME = ["--image", "reg.example/cliplift:1", "--volume", "data:/data", "--workdir", "/data/work"]


def files_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """What ``submit --print`` shows, by file name."""
    capsys.readouterr()
    assert main(["submit", *words, "--print"]) == 0
    parts = capsys.readouterr().out.split("# ---- ")[1:]
    return {Path(part.split("\n", 1)[0]).name: part.split("\n", 1)[1] for part in parts}


def checked_by_bash(text: str, tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text(text)
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        # SC1090/1091: files of the cluster's that --setup sources are not here to be followed.
        done = subprocess.run(
            ["shellcheck", "--exclude=SC1090,SC1091", str(script)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


def test_every_slurm_script_is_sound_shell(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = files_of(
        capsys, *CHAIN, "--to", "slurm", "--nodes", "2", "--gpus", "4", "--parts", "8", "--partition", "gpu",
        "--module", "cuda/12.6", "--setup", "source ~/venv/bin/activate", "--memory", "500", "--sbatch=--exclusive",
    )  # fmt: skip
    scripts = {name: text for name, text in files.items() if name.endswith((".sbatch", ".sh"))}
    assert set(scripts) == {
        "unlabelled-plan.sbatch", "unlabelled-build.sbatch", "unlabelled-finalize.sbatch",
        "unlabelled-verify.sbatch", "demo-transfer.sbatch", "demo-from-transfer.sbatch", "submit.sh",
    }  # fmt: skip
    for text in scripts.values():
        checked_by_bash(text, tmp_path)


def test_a_training_script_says_what_it_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    text = files_of(
        capsys, "transfer/demo", "engine.global_batch=64", "--to", "slurm", "--nodes", "2", "--gpus", "4",
        "--cpus", "32", "--time", "04:00:00", "--signal-seconds", "240", "--account", "vision",
    )["demo-transfer.sbatch"]  # fmt: skip
    for line in (
        "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4", "#SBATCH --gpus-per-node=4", "#SBATCH --cpus-per-task=8",
        "#SBATCH --time=04:00:00", "#SBATCH --signal=USR1@240", "#SBATCH --requeue", "#SBATCH --account=vision",
        "#SBATCH --open-mode=append",
    ):  # fmt: skip
        assert f"{line}\n" in text
    assert 'scontrol requeue "${SLURM_JOB_ID}"' in text
    assert "runs/demo/transfer/result.json" in text
    assert "--array" not in text


def test_a_shard_build_is_an_array_between_plan_and_finalize(capsys: pytest.CaptureFixture[str]) -> None:
    files = files_of(capsys, *CHAIN[:2], "--to", "slurm", "--parts", "8")
    assert "#SBATCH --array=0-7\n" in files["unlabelled-build.sbatch"]
    assert "--phase build --part auto" in files["unlabelled-build.sbatch"]
    assert "--array" not in files["unlabelled-plan.sbatch"]
    submitted = [line for line in files["submit.sh"].splitlines() if "sbatch" in line]
    assert [line.split()[-1].split("/")[-1].rstrip(")") for line in submitted] == [
        "unlabelled-plan.sbatch", "unlabelled-build.sbatch", "unlabelled-finalize.sbatch",
        "unlabelled-verify.sbatch", "demo-transfer.sbatch",
    ]  # fmt: skip
    assert "--dependency" not in submitted[0]
    for number, line in enumerate(submitted[1:], start=1):
        assert f'--dependency="afterok:${{job{number}}}"' in line


@pytest.mark.parametrize(
    ("tool", "words"), [("enroot", "--container-image=img"), ("apptainer", "apptainer exec --nv")]
)
def test_containers(capsys: pytest.CaptureFixture[str], tmp_path: Path, tool: str, words: str) -> None:
    text = files_of(
        capsys, "transfer/demo", "--to", "slurm", "--gpus", "1", "--image", "img", "--container-tool", tool,
        "--mount", "/data:/data",
    )["demo-transfer.sbatch"]  # fmt: skip
    assert words in text
    assert sys.executable not in text, "the interpreter of this machine is not the container's"
    checked_by_bash(text, tmp_path)


def fake_cluster(tmp_path: Path, *, srun: str) -> dict[str, str]:
    """A folder of stand-ins for Slurm's commands, which write down how they were called."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    for name, body in (("srun", srun), ("scontrol", f'echo "scontrol $*" >> {tmp_path}/calls')):
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
    }


@pytest.mark.parametrize(
    ("srun", "restarts", "ends"),
    [
        ("mkdir -p OUT; touch OUT/result.json", 0, (0, False)),  # finished
        ("exit 0", 0, (0, True)),  # a signal; the ranks have saved
        ("exit 138", 0, (0, True)),  # SIGUSR1 before the handlers were there
        ("exit 143", 0, (0, True)),
        ("exit 1", 0, (1, False)),  # a crash must not be repeated for ever
        ("exit 137", 0, (137, False)),  # out of memory
        ("exit 0", 100, (1, False)),  # it has been round often enough
    ],
)
def test_what_a_script_does_when_its_ranks_have_ended(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, srun: str, restarts: int, ends: tuple[int, bool]
) -> None:
    code, requeued = ends
    output = tmp_path / "run"
    text = files_of(capsys, "transfer/demo", f"output={output}", "--to", "slurm")["demo-transfer.sbatch"]
    script = tmp_path / "job.sh"
    script.write_text(text)
    environment = fake_cluster(tmp_path, srun=srun.replace("OUT", str(output)))
    environment["SLURM_RESTART_COUNT"] = str(restarts)
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert (tmp_path / "calls").exists() is requeued
    if requeued:
        assert (tmp_path / "calls").read_text() == "scontrol requeue 7\n"


def test_mistakes_are_found_before_the_queue(tmp_path: Path) -> None:
    def refused(*words: str, match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            run_submit(parsed(*words))

    refused("transfer/demo", "--to", "slurm", "--nodes", "5", match="multiple of 5")
    refused("transfer/demo", "--to", "slurm", "--nodes", "0", match="--nodes 0")
    refused("report/x", "--to", "slurm", match="no such config file")
    refused(
        "transfer/demo", "checkpoint.resume=never", "--to", "slurm", match="afresh after every preemption"
    )
    refused("transfer/demo", "finetune/demo", "optim.lr=1", "--to", "slurm", match="which of 2 configs")
    refused("transfer/demo", "transfer/demo", "--to", "slurm", match="two configs are named")
    refused("transfer/demo", "--to", "local", "--nodes", "2", match="this machine alone")
    refused("transfer/demo", "--to", "kubernetes", match="runs images")
    refused("transfer/demo", "--to", "kubernetes", "--image", "i", match="on no volume")
    refused("transfer/demo", "--to", "kubernetes", "--image", "i", "--volume", "data", match="CLAIM:/path")
    refused("transfer/demo", "--to", "slurm", "--setup", "a\nb", match="line break")
    refused("transfer/demo", "--to", "slurm", "--container-tool", "docker", match="enroot or apptainer")


def parsed(*words: str) -> argparse.Namespace:
    return build_parser().parse_args(["submit", *words])


def test_print_leaves_nothing_behind(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files_of(capsys, "transfer/demo", "--to", "slurm")
    assert not list(tmp_path.iterdir())


def test_without_the_scheduler_the_files_stay_and_the_remedy_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"bash jobs/demo-transfer/submit\.sh"):
        run_submit(parsed("transfer/demo", "--to", "slurm"))
    assert (tmp_path / "jobs" / "demo-transfer" / "demo-transfer.sbatch").is_file()


def test_local_runs_the_chain_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    """Really run: a chain that stops at its first stage, whose videos are not there, starts no second one."""
    monkeypatch.chdir(tmp_path)
    code = run_submit(parsed("shard/demo_unlabelled", "transfer/demo", "--to", "local"))
    assert code == 2
    script = (tmp_path / "jobs" / "demo-transfer" / "submit.sh").read_text()
    checked_by_bash(script, tmp_path)
    assert script.index("--phase plan") < script.index("--phase build") < script.index("cli transfer")
    assert not (tmp_path / "runs").exists() or not (tmp_path / "runs" / "demo" / "transfer").exists()


def manifests(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, list[dict[str, Any]]]:
    files = files_of(capsys, *words, "--to", "kubernetes", *VOLUME)
    return {name: list(yaml.safe_load_all(text)) for name, text in files.items() if name.endswith(".yaml")}


def test_kubernetes_objects_belong_together(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = manifests(capsys, "transfer/demo", "--nodes", "2", "--gpus", "8", "--secret", "wandb")
    config, service, job = found["demo-transfer.yaml"]
    assert [o["kind"] for o in (config, service, job)] == ["ConfigMap", "Service", "Job"]
    assert service["spec"]["clusterIP"] == "None"
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    # Pod 0 is found as NAME-0.SUBDOMAIN: the service must carry the subdomain's name and select the job's pods.
    assert pod["subdomain"] == service["metadata"]["name"] == "demo-transfer"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert "demo-transfer-0.demo-transfer:29500" in config["data"]["run.sh"]
    container = pod["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]
    named = {v["name"] for v in pod["volumes"]}
    assert {m["name"] for m in container["volumeMounts"]} == named == {"config", "shm", "volume-0"}
    assert pod["volumes"][0]["configMap"]["name"] == config["metadata"]["name"]
    assert yaml.safe_load(config["data"]["config.yaml"])["name"] == "demo-transfer"
    checked_by_bash(config["data"]["run.sh"], tmp_path)


def test_a_kubernetes_shard_build_knows_its_parts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = manifests(capsys, *CHAIN[:2], "--parts", "8")
    config, job = found["unlabelled-build.yaml"]
    assert job["spec"]["completions"] == 8
    environment = {e["name"]: e["value"] for e in job["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert environment["JOB_COMPLETIONS"] == "8"
    assert "--phase build --part auto" in config["data"]["run.sh"]
    script = files_of(capsys, *CHAIN[:2], "--to", "kubernetes", *VOLUME)["submit.sh"]
    checked_by_bash(script, tmp_path)
    assert script.count("wait_for job/") == 4, "each of the four jobs of sharding before the next"


@pytest.mark.parametrize(
    ("torchrun", "code"),
    [("mkdir -p OUT; touch OUT/result.json", 0), ("exit 0", 75), ("kill -TERM $$", 75), ("exit 3", 3)],
)
def test_a_pod_succeeds_only_with_a_result(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, torchrun: str, code: int
) -> None:
    """A rank that saved and ended with 0 after a drained node must come back, or the others wait for it in vain."""
    files = files_of(
        capsys, "transfer/demo", f"output={tmp_path}/out", "--to", "kubernetes", "--image", "i", "--volume",
        f"d:{tmp_path}",
    )  # fmt: skip
    config = next(yaml.safe_load_all(files["demo-transfer.yaml"]))
    (tmp_path / "run.sh").write_text(config["data"]["run.sh"])
    (tmp_path / "torchrun").write_text(f"#!/bin/bash\n{torchrun.replace('OUT', str(tmp_path / 'out'))}\n")
    (tmp_path / "torchrun").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "0"}
    done = subprocess.run(
        ["bash", str(tmp_path / "run.sh")], env=environment, capture_output=True, check=False
    )
    assert done.returncode == code, done.stderr


@pytest.mark.parametrize("extra", [[], ["--pytorchjob"]])
def test_against_the_published_schemas(capsys: pytest.CaptureFixture[str], extra: list[str]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    found = manifests(
        capsys, *CHAIN, "--nodes", "2", "--gpus", "8", "--secret", "w", "--service-account", "s", *extra
    )
    checked = 0
    for objects in found.values():
        for one in objects:
            if one["kind"] == "PyTorchJob":  # a custom resource; what it holds of Kubernetes' own is the pod
                for replicas in one["spec"]["pytorchReplicaSpecs"].values():
                    pod = {
                        "apiVersion": "v1",
                        "kind": "Pod",
                        "metadata": {"name": "x"},
                        **replicas["template"],
                    }
                    kubernetes_validate.validate(pod, "1.31", strict=True)
                continue
            kubernetes_validate.validate(one, "1.31", strict=True)
            checked += 1
    assert checked >= 9


def test_a_pytorchjob_leaves_the_topology_to_the_operator(capsys: pytest.CaptureFixture[str]) -> None:
    found = manifests(capsys, "transfer/demo", "--nodes", "4", "--gpus", "8", "--pytorchjob")
    config, job = found["demo-transfer.pytorchjob.yaml"]
    specs = job["spec"]["pytorchReplicaSpecs"]
    assert (specs["Master"]["replicas"], specs["Worker"]["replicas"]) == (1, 3)
    assert job["spec"]["nprocPerNode"] == "8"
    assert specs["Master"]["template"]["spec"]["containers"][0]["name"] == "pytorch"
    assert "--nnodes" not in config["data"]["run.sh"]


@pytest.mark.parametrize(
    ("text", "name"), [("Demo_Transfer v2", "demo-transfer-v2"), ("7days", "run-7days"), ("a" * 80, "a" * 52)]
)
def test_job_names_suit_dns(text: str, name: str) -> None:
    assert job_name(text) == name
    with pytest.raises(ConfigError, match="cannot name a job"):
        job_name("---")


@pytest.mark.parametrize("target", [["--to", "slurm"], ["--to", "local"], ["--to", "kubernetes", *VOLUME]])
def test_scripts_name_the_plugins_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, target: list[str]
) -> None:
    """A job starts in an environment of its own, which knows nothing of the one it was submitted from."""
    monkeypatch.setenv("CLIPLIFT_PLUGINS", "my_plugins")
    shard = files_of(capsys, "shard/demo_actions", "output=/data/out", *target)
    train = files_of(capsys, "finetune/demo", "output=/data/run", *target)
    lines = [line for text in (*shard.values(), *train.values()) for line in text.splitlines()]
    started = [line for line in lines if "cliplift.launch.cli" in line]
    assert len(started) >= 5
    for line in started:
        assert "--plugin my_plugins" in line, line
