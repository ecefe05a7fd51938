"""What a cluster has beside nodes: a network for NCCL, a queue of Kueue, Kubeflow's Trainer."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cliplift.configs.sections import ConfigError
from cliplift.launch.cli import build_parser, main
from cliplift.launch.commands.submit import run_submit
from cliplift.launch.jobs.fabric import FABRICS

VOLUME = ["--image", "reg.example/cliplift:1", "--volume", "data:/data", "--workdir", "/data/work"]
CHAIN = ["shard/demo_unlabelled", "transfer/demo"]
GPUS = ["--nodes", "2", "--gpus", "8"]
QUEUE = "kueue.x-k8s.io/queue-name"


def files_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """What ``submit --print`` shows, by file name."""
    capsys.readouterr()
    assert main(["submit", *words, "--print"]) == 0
    parts = capsys.readouterr().out.split("# ---- ")[1:]
    return {Path(part.split("\n", 1)[0]).name: part.split("\n", 1)[1] for part in parts}


def objects_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, dict[str, Any]]:
    """Every object of the manifests, by kind and name."""
    files = files_of(capsys, *words, "--to", "kubernetes", *VOLUME)
    found = [
        one for name, text in files.items() if name.endswith(".yaml") for one in yaml.safe_load_all(text)
    ]
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in found}


def test_a_slurm_script_tells_its_ranks_of_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    def exported(*words: str) -> dict[str, str]:
        text = files_of(capsys, *CHAIN, *GPUS, "--to", "slurm", *words)
        assert "FI_PROVIDER" not in text["unlabelled-build.sbatch"]
        line = next((x for x in text["demo-transfer.sbatch"].splitlines() if "network between" in x), "true")
        done = subprocess.run(
            ["bash", "-uc", f"{line}\nenv"],
            env={"FI_PROVIDER": "sockets"},
            capture_output=True,
            text=True,
            check=True,
        )
        return {name: value for name, _, value in (pair.partition("=") for pair in done.stdout.splitlines())}

    assert exported("--fabric", "ib")["NCCL_NET"] == "IB"
    assert exported("--fabric", "none")["NCCL_NET"] == "Socket"
    assert "NCCL_NET" not in exported()
    efa = exported("--fabric", "efa")
    assert efa["FI_EFA_USE_HUGE_PAGE"] == "0"
    assert efa["FI_PROVIDER"] == "sockets", "what the site or --setup has set stays"


@pytest.mark.parametrize("kind", [[], ["--pytorchjob"], ["--trainjob"]])
def test_a_pod_asks_for_the_devices_of_its_fabric(
    capsys: pytest.CaptureFixture[str], kind: list[str]
) -> None:
    found = objects_of(capsys, *CHAIN, *GPUS, *kind, "--fabric", "efa", "--fabric-devices", "32")
    (container,) = containers(training_object(found))
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "vpc.amazonaws.com/efa": "32"}
    assert {"name": "FI_PROVIDER", "value": "efa"} in container["env"]
    assert "securityContext" not in container
    (build,) = containers(found["Job/unlabelled-build"])
    assert "limits" not in build["resources"]

    found = objects_of(capsys, *CHAIN, *GPUS, *kind, "--fabric", "ib")
    (container,) = containers(training_object(found))
    assert container["resources"]["limits"]["rdma/hca_shared_devices_a"] == "1"
    assert container["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    named = ["--fabric", "ib", "--fabric-devices", "8", "--fabric-resource", "nvidia.com/mlnxnics"]
    (container,) = containers(training_object(objects_of(capsys, *CHAIN, *GPUS, *kind, *named)))
    assert container["resources"]["limits"]["nvidia.com/mlnxnics"] == "8"


def training_object(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    kinds = ("TrainingRuntime", "PyTorchJob", "Job")
    return next(found[key] for kind in kinds if (key := f"{kind}/demo-transfer") in found)


def job_template(runtime: dict[str, Any]) -> dict[str, Any]:
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["name"] == "node"
    template: dict[str, Any] = replicated["template"]
    return template


def containers(one: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of a pod of a job of any kind."""
    spec = one["spec"]
    if one["kind"] == "PyTorchJob":
        spec = spec["pytorchReplicaSpecs"]["Worker"]
    elif one["kind"] == "TrainingRuntime":
        spec = job_template(one)["spec"]
    found: list[dict[str, Any]] = spec["template"]["spec"]["containers"]
    return found


@pytest.mark.parametrize(
    ("kind", "training"), [([], "Job"), (["--pytorchjob"], "PyTorchJob"), (["--trainjob"], "TrainJob")]
)
def test_every_job_waits_in_the_queue(
    capsys: pytest.CaptureFixture[str], kind: list[str], training: str
) -> None:
    found = objects_of(capsys, *CHAIN, *GPUS, *kind, "--queue", "video")
    queued = {key for key, one in found.items() if one["metadata"]["labels"].get(QUEUE) == "video"}
    phases = ("plan", "build", "finalize", "verify")
    assert queued == {f"{training}/demo-transfer", *(f"Job/unlabelled-{phase}" for phase in phases)}


def test_a_trainjob_and_its_runtime_belong_together(capsys: pytest.CaptureFixture[str]) -> None:
    found = objects_of(
        capsys, *CHAIN, *GPUS, "--trainjob", "--secret", "wandb", "--service-account", "trainer"
    )
    runtime, job = found["TrainingRuntime/demo-transfer"], found["TrainJob/demo-transfer"]
    assert job["apiVersion"] == runtime["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    reference = job["spec"]["runtimeRef"]
    assert reference == {
        "apiGroup": "trainer.kubeflow.org",
        "kind": "TrainingRuntime",
        "name": "demo-transfer",
    }
    assert job["spec"]["trainer"] == {"numNodes": 2, "numProcPerNode": 8}
    template = job_template(runtime)
    # How the Trainer finds the job and the container that it gives rank and meeting point.
    assert template["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    (container,) = containers(runtime)
    assert container["name"] == "node"
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]
    assert template["spec"]["template"]["spec"]["serviceAccountName"] == "trainer"
    stopped = template["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]
    assert stopped == {"containerName": "node", "operator": "In", "values": [75]}
    assert "--nnodes" not in found["ConfigMap/demo-transfer-config"]["data"]["run.sh"]
    script = files_of(capsys, "transfer/demo", "finetune/demo", "--to", "kubernetes", "--trainjob", *VOLUME)[
        "submit.sh"
    ]
    assert "wait_for trainjob/demo-transfer" in script


def test_against_the_published_schemas(capsys: pytest.CaptureFixture[str]) -> None:
    """The Trainer's objects against its own API, and what they hold of Kubernetes' against Kubernetes'."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    models = pytest.importorskip("kubeflow_trainer_api.models")
    found = objects_of(
        capsys, *CHAIN, *GPUS, "--trainjob", "--queue", "video", "--fabric", "ib", "--secret", "w"
    )
    for kind in ("TrainJob", "TrainingRuntime"):
        one = found[f"{kind}/demo-transfer"]
        read = getattr(models, f"TrainerV1alpha1{kind}").from_dict(one)
        assert read.to_dict() == one, "a field that the API does not know is lost on the way"
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
    template = job_template(found["TrainingRuntime/demo-transfer"])
    kubernetes_validate.validate({**job, "spec": template["spec"]}, "1.31", strict=True)


def test_what_does_not_fit_together_is_refused() -> None:
    def refused(*words: str, match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            run_submit(build_parser().parse_args(["submit", "transfer/demo", *words]))

    kubernetes, ib = ["--to", "kubernetes", *VOLUME], ["--fabric", "ib"]
    refused("--to", "slurm", *ib, match="on CPUs does not use NCCL")
    refused("--to", "local", "--gpus", "2", *ib, match="no network between nodes")
    refused("--to", "slurm", "--gpus", "1", *ib, "--fabric-devices", "4", match="for pods that ask")
    refused(
        *kubernetes, "--gpus", "8", "--fabric", "efa", match="how many vpc.amazonaws.com/efa does a node have"
    )
    refused(
        *kubernetes, "--gpus", "8", *ib, "--fabric-devices", "0", match="how many rdma/hca_shared_devices_a"
    )
    refused(*kubernetes, "--gpus", "8", *ib, "--fabric-resource", "hca", match="DOMAIN/NAME")
    refused(*kubernetes, "--gpus", "8", "--fabric-devices", "4", match="says nothing without --fabric")
    refused(*kubernetes, "--queue", "Team A", match="cannot name a LocalQueue")
    with pytest.raises(SystemExit):
        build_parser().parse_args(["submit", "transfer/demo", *kubernetes, "--trainjob", "--pytorchjob"])


def test_the_words_of_the_command_are_the_fabrics_there_are() -> None:
    for name in FABRICS:
        assert build_parser().parse_args(["submit", "x", "--to", "slurm", "--fabric", name]).fabric == name
