"""Kubernetes manifests: an Indexed Job with a headless service, or a Kubeflow PyTorchJob or TrainJob.

A pod runs torchrun, which starts one rank per GPU; pod 0 is where all meet, under the name the headless service gives
it. A stage that was stopped by a drained node has saved: its pod ends with a code that Kubernetes answers by
starting the pod again, without counting it as a failure. Only a run that wrote its result has succeeded.
"""

from __future__ import annotations

import posixpath
import re
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

import yaml

from cliplift.configs.sections import ConfigError
from cliplift.launch.jobs.fabric import Fabric
from cliplift.launch.jobs.plan import Job, Resources

Manifest = dict[str, object]  # an object of Kubernetes, or a part of one
Kind = Literal["job", "pytorchjob", "trainjob"]

PORT = 29500
MOUNT = "/etc/cliplift"
CONTAINER = "cliplift"
NOT_FINISHED = 75  # EX_TEMPFAIL of sysexits.h
MAX_FAILURES = 6
QUEUE = "kueue.x-k8s.io/queue-name"  # Kueue documentation, "Run A Kubernetes Job" and its neighbours
TRAINER = "trainer.kubeflow.org"
TRAINER_NODE = (
    "node"  # the Trainer looks for a job and a container of this name (Kubeflow Trainer, "Runtime Guide")
)


@dataclass(frozen=True, kw_only=True)
class KubernetesOptions:
    """What this cluster expects in a manifest.

    ``volumes``: (claim, mount path). ``kind``: what a training job is; sharding is Indexed Jobs. ``queue``: Kueue's
    LocalQueue that the jobs wait in.
    """

    image: str
    namespace: str | None = None
    volumes: tuple[tuple[str, str], ...] = ()
    service_account: str | None = None
    environment_from_secrets: tuple[str, ...] = ()
    shared_memory_gib: int = 16
    workdir: str | None = None
    kind: Kind = "job"
    queue: str | None = None
    fabric: Fabric | None = None


def manifest(job: Job, resources: Resources, options: KubernetesOptions) -> str:
    """All objects of one job as YAML documents, to be read before they are applied."""
    objects: list[Manifest] = [_config_map(job, options)]
    if job.phase is not None:
        objects.append(_indexed_job(job, resources, options))
    elif options.kind == "pytorchjob":
        objects.append(_pytorch_job(job, resources, options))
    elif options.kind == "trainjob":
        objects += [_training_runtime(job, resources, options), _train_job(job, options)]
    else:
        objects += [_service(job, options), _indexed_job(job, resources, options)]
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=110)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, so that the script in a manifest can be read; no anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent)


def _metadata(
    job: Job, options: KubernetesOptions, *, name: str | None = None, queued: bool = False
) -> Manifest:
    space = {"namespace": options.namespace} if options.namespace else {}
    labels = {"app.kubernetes.io/name": "cliplift", "app.kubernetes.io/instance": job.name}
    if queued and options.queue:
        labels[QUEUE] = options.queue
    return {"name": name or job.name, **space, "labels": labels}


def _config_map(job: Job, options: KubernetesOptions) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, options, name=f"{job.name}-config"),
        "data": {"config.yaml": job.config, "run.sh": run_script(job, kind=options.kind)},
    }


def run_script(job: Job, *, kind: Kind) -> str:
    """What a pod runs: a shell script, mounted from the ConfigMap."""
    stage = ["cliplift.launch.cli", job.stage, f"{MOUNT}/config.yaml", *job.words]
    if job.phase is not None:
        return f"#!/bin/bash\nset -euo pipefail\nexec python -m {shlex.join(stage)}\n"
    if kind != "job":
        # Kubeflow's operators give number, rank and meeting point of the nodes as PET_ variables, which torchrun
        # reads.
        launch = "torchrun"
    else:
        launch = (
            f'torchrun --nnodes {job.nodes} --node-rank "${{JOB_COMPLETION_INDEX}}" '
            f"--nproc-per-node {job.processes_per_node} --max-restarts 3 \\\n"
            f'    --rdzv-backend c10d --rdzv-id {job.name} --rdzv-endpoint "{job.name}-0.{job.name}:{PORT}"'
        )
    return "\n".join(
        [
            "#!/bin/bash",
            "set -uo pipefail",
            "# A restarted rank must not meet the addresses of the dead ones; a save may take longer than 30 s.",
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150",
            f"{launch} \\\n    -m {shlex.join(stage)} &",
            "launcher=$!",
            "trap 'kill -TERM \"${launcher}\"' TERM",
            "status=0",
            'wait "${launcher}" || status=$?',
            "# A trapped signal ends that wait before the launcher has ended.",
            'while kill -0 "${launcher}" 2>/dev/null; do wait "${launcher}"; status=$?; done',
            f"if [[ -f {shlex.quote(job.finished_file)} ]]; then exit 0; fi",
            'if [[ "${status}" -eq 0 || "${status}" -gt 128 ]]; then',
            '    echo "stopped before the end; the next start continues from the last checkpoint"',
            f"    exit {NOT_FINISHED}",
            "fi",
            'exit "${status}"',
            "",
        ]
    )


def _service(job: Job, options: KubernetesOptions) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(job, options),
        "spec": {
            "clusterIP": "None",
            # Ranks look each other up before any of them is ready.
            "publishNotReadyAddresses": True,
            "selector": {"job-name": job.name},
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }


def _indexed_job(job: Job, resources: Resources, options: KubernetesOptions) -> Manifest:
    completions = job.parts if job.phase is not None else job.nodes
    pod = _pod(job, resources, options)
    if job.phase is None:
        pod["subdomain"] = job.name
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(job, options, queued=True),
        "spec": {
            "completionMode": "Indexed",
            "completions": completions,
            "parallelism": completions,
            **_failures(CONTAINER),
            "template": {"metadata": {"labels": _metadata(job, options)["labels"]}, "spec": pod},
        },
    }


def _failures(container: str) -> Manifest:
    """Of a Job: pods of drained nodes, and those that saved and stopped, are started again without being counted."""
    drained = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    stopped = {"containerName": container, "operator": "In", "values": [NOT_FINISHED]}
    return {
        "backoffLimit": MAX_FAILURES,
        "podFailurePolicy": {"rules": [drained, {"action": "Ignore", "onExitCodes": stopped}]},
    }


def _pytorch_job(job: Job, resources: Resources, options: KubernetesOptions) -> Manifest:
    # The operator looks for a container of this name, and sets the restart policy itself.
    pod = _pod(job, resources, options, container="pytorch")
    del pod["restartPolicy"]

    def replicas(count: int) -> Manifest:
        # The container is started again in its pod, after code 75 as after a crash.
        return {"replicas": count, "restartPolicy": "OnFailure", "template": {"spec": pod}}

    specs = {"Master": replicas(1)} | ({"Worker": replicas(job.nodes - 1)} if job.nodes > 1 else {})
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(job, options, queued=True),
        "spec": {
            "nprocPerNode": str(job.processes_per_node),
            "runPolicy": {"cleanPodPolicy": "None", "backoffLimit": MAX_FAILURES},
            "pytorchReplicaSpecs": specs,
        },
    }


def _training_runtime(job: Job, resources: Resources, options: KubernetesOptions) -> Manifest:
    """What a TrainJob is made from: a job of the namespace's own, so that nothing of the cluster's has to fit it."""
    template = {
        "metadata": {"labels": {f"{TRAINER}/trainjob-ancestor-step": "trainer"}},
        "spec": {
            **_failures(TRAINER_NODE),
            "template": {
                "metadata": {"labels": _metadata(job, options)["labels"]},
                "spec": _pod(job, resources, options, container=TRAINER_NODE),
            },
        },
    }
    return {
        "apiVersion": f"{TRAINER}/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": _metadata(job, options),
        "spec": {
            "mlPolicy": {
                "numNodes": job.nodes,
                "torch": {},
            },  # PET_ variables; the TrainJob says how many processes
            "template": {"spec": {"replicatedJobs": [{"name": TRAINER_NODE, "template": template}]}},
        },
    }


def _train_job(job: Job, options: KubernetesOptions) -> Manifest:
    runtime = {"apiGroup": TRAINER, "kind": "TrainingRuntime", "name": job.name}
    trainer = {"numNodes": job.nodes, "numProcPerNode": job.processes_per_node}
    return {
        "apiVersion": f"{TRAINER}/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(job, options, queued=True),
        "spec": {"runtimeRef": runtime, "trainer": trainer},
    }


def _pod(
    job: Job, resources: Resources, options: KubernetesOptions, *, container: str = CONTAINER
) -> Manifest:
    volumes: list[Manifest] = [
        {"name": "config", "configMap": {"name": f"{job.name}-config"}},
        # Docker's 64 MiB of shared memory are too few for decoding workers.
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{options.shared_memory_gib}Gi"}},
    ]
    mounts: list[Manifest] = [
        {"name": "config", "mountPath": MOUNT, "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    for number, (claim, path) in enumerate(options.volumes):
        volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"volume-{number}", "mountPath": path})
    account = {"serviceAccountName": options.service_account} if options.service_account else {}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": resources.signal_seconds,
        **account,
        "containers": [_container(job, resources, options, mounts, name=container)],
        "volumes": volumes,
    }


def _container(
    job: Job, resources: Resources, options: KubernetesOptions, mounts: list[Manifest], *, name: str
) -> Manifest:
    environment = [{"name": "PYTHONUNBUFFERED", "value": "1"}, {"name": "OMP_NUM_THREADS", "value": "1"}]
    if job.phase == "build":
        environment.append({"name": "JOB_COMPLETIONS", "value": str(job.parts)})  # --part auto reads I and N
    secrets = [{"secretRef": {"name": name}} for name in options.environment_from_secrets]
    asked: Manifest = {"cpu": str(resources.cpus)}
    if resources.memory_gib:
        asked["memory"] = f"{resources.memory_gib}Gi"
    limits = {k: v for k, v in asked.items() if k == "memory"}
    if job.gpus:
        limits["nvidia.com/gpu"] = str(job.gpus)
    fabric = options.fabric if job.phase is None else None
    secured: Manifest = {}
    if fabric is not None:
        environment += [{"name": key, "value": value} for key, value in fabric.environment.items()]
        if fabric.resource:
            limits[fabric.resource] = str(fabric.devices)
        if fabric.locks_memory:
            secured = {"securityContext": {"capabilities": {"add": ["IPC_LOCK"]}}}
    return {
        "name": name,
        "image": options.image,
        "command": ["/bin/bash", f"{MOUNT}/run.sh"],
        **({"workingDir": options.workdir} if options.workdir else {}),
        "env": environment,
        **({"envFrom": secrets} if secrets else {}),
        "resources": {"requests": asked, **({"limits": limits} if limits else {})},
        **secured,
        "volumeMounts": mounts,
    }


def submit_script(jobs: list[Job], *, files: dict[str, str], namespace: str | None) -> str:
    """A shell script that applies the manifests; with several jobs it waits for each before the next."""
    kubectl = f"kubectl --namespace {shlex.quote(namespace)}" if namespace else "kubectl"
    lines = ["#!/bin/bash", "set -euo pipefail"]
    if len(jobs) > 1:
        lines += [
            "# Kubernetes knows no order between jobs: this script waits, and has to stay.",
            "wait_for() {",
            "    local state=''",
            "    until [[ ${state} == *Complete* || ${state} == *Succeeded* || ${state} == *Failed* ]]; do",
            "        sleep 15",
            f'        state=$({kubectl} get "$1" -o jsonpath=\'{{.status.conditions[?(@.status=="True")].type}}\')',
            "    done",
            '    echo "$1: ${state}"',
            "    [[ ${state} != *Failed* ]]",
            "}",
        ]
    for number, job in enumerate(jobs, start=1):
        lines.append(f"{kubectl} apply -f {shlex.quote(files[job.name])}")
        if number < len(jobs):
            lines.append(f"wait_for {kind_of(files, job)}/{job.name}")
    return "\n".join(lines) + "\n"


def kind_of(files: dict[str, str], job: Job) -> str:
    """What ``kubectl`` calls the job in its file: NAME.yaml, or NAME.KIND.yaml for a training job of Kubeflow."""
    kind, *ending = PurePosixPath(files[job.name]).suffixes
    return kind.removeprefix(".") if ending else "job"


def check_output(job: Job, options: KubernetesOptions) -> None:
    """Raise ConfigError where a job would write to a disk that is deleted with its pod."""
    if "://" in job.output:
        return
    place = posixpath.normpath(posixpath.join(options.workdir or "/", job.output))
    if not any(posixpath.commonpath([place, path]) == path.rstrip("/") for _, path in options.volumes):
        raise ConfigError(
            f"{place} of {job.name} is on no volume, so it is lost with its pod",
            key="output",
            value=job.output,
            hint="mount one with --volume CLAIM:/path and put output or --workdir there",
        )


def volume(text: str) -> tuple[str, str]:
    """``CLAIM:/path`` as its two parts."""
    claim, colon, path = text.partition(":")
    if not (claim and colon and path.startswith("/")):
        raise ConfigError(
            f"--volume {text!r} is not CLAIM:/path", file="command line", hint="such as data:/data"
        )
    return claim, path


def queue(text: str | None) -> str | None:
    """The name of a LocalQueue: as the value of a label and the name of an object, a DNS label."""
    if text is not None and re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", text) is None:
        raise ConfigError(
            f"--queue {text!r} cannot name a LocalQueue",
            file="command line",
            hint="`kubectl get localqueues` lists those of the namespace",
        )
    return text
