"""``cliplift submit``: write what a scheduler needs into a folder, show it, and hand it over.

Everything that will run is a file one can read first: ``--print`` shows the files and does nothing else.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from cliplift.configs.sections import ConfigError
from cliplift.launch.jobs import kubernetes, slurm
from cliplift.launch.jobs.plan import Job, Resources, plan_jobs

SUBMITTERS = {"slurm": "sbatch", "kubernetes": "kubectl", "local": "bash"}
SUBMIT_FILE = "submit.sh"


def run_submit(arguments: argparse.Namespace) -> int:
    words = [arguments.subject, *arguments.rest]
    configs = [word for word in words if "=" not in word]
    resources = _resources(arguments)
    jobs = plan_jobs(configs, [word for word in words if "=" in word], resources)
    folder = Path(arguments.folder) if arguments.folder else Path("jobs") / jobs[-1].name
    files = _FILES[arguments.to](jobs, resources, arguments, folder)
    if arguments.print:
        for name, text in files.items():
            print(f"# ---- {folder / name}\n{text}")
        return 0
    _write(folder, files)
    submitter = SUBMITTERS[arguments.to]
    if shutil.which(submitter) is None:
        raise ConfigError(
            f"{submitter} is not on this machine; the files are in {folder}",
            file="command line",
            hint=f"run `bash {folder / SUBMIT_FILE}` where it is, or use --print",
        )
    print(f"{folder}: {', '.join(files)}\n+ bash {folder / SUBMIT_FILE}", flush=True)
    return subprocess.run(["bash", str(folder / SUBMIT_FILE)], check=False).returncode


def _resources(arguments: argparse.Namespace) -> Resources:
    for name in ("nodes", "cpus", "parts"):
        if getattr(arguments, name) < 1:
            raise ConfigError(
                f"--{name} {getattr(arguments, name)} is below 1", file="command line", hint="use 1 or more"
            )
    if arguments.gpus < 0:
        raise ConfigError(f"--gpus {arguments.gpus} is below 0", file="command line", hint="0 is a CPU job")
    if arguments.to == "local" and arguments.nodes > 1:
        raise ConfigError(
            "--to local runs on this machine alone", key="--nodes", file="command line", hint="use --nodes 1"
        )
    return Resources(
        nodes=arguments.nodes,
        gpus=arguments.gpus,
        cpus=arguments.cpus,
        memory_gib=arguments.memory,
        time=arguments.time,
        parts=arguments.parts,
        signal_seconds=arguments.signal_seconds,
    )


def _write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _slurm_files(
    jobs: list[Job], resources: Resources, arguments: argparse.Namespace, folder: Path
) -> dict[str, str]:
    options = slurm.SlurmOptions(
        partition=arguments.partition,
        account=arguments.account,
        qos=arguments.qos,
        modules=tuple(arguments.module),
        setup=tuple(arguments.setup),
        container=arguments.image,
        container_tool=arguments.container_tool,
        mounts=tuple(arguments.mount),
        extra=tuple(arguments.sbatch),
        # Inside a container the path of this machine's interpreter means nothing.
        python="python" if arguments.image else sys.executable,
        logs=str(folder.absolute()),
        workdir=str(Path.cwd()),
    )
    slurm.check_options(options)
    files = {}
    for job in jobs:
        files[job.config_file] = job.config
        config_path = str((folder / job.config_file).absolute())
        files[f"{job.name}.sbatch"] = slurm.sbatch_script(job, resources, options, config_path=config_path)
    scripts = {job.name: str(folder / f"{job.name}.sbatch") for job in jobs}
    return files | {SUBMIT_FILE: slurm.submit_script(jobs, scripts=scripts)}


def _kubernetes_files(
    jobs: list[Job], resources: Resources, arguments: argparse.Namespace, folder: Path
) -> dict[str, str]:
    if not arguments.image:
        raise ConfigError(
            "Kubernetes runs images",
            key="--image",
            file="command line",
            hint="build launch/docker/gpu.Dockerfile",
        )
    options = kubernetes.KubernetesOptions(
        image=arguments.image,
        namespace=arguments.namespace,
        volumes=tuple(kubernetes.volume(text) for text in arguments.volume),
        service_account=arguments.service_account,
        environment_from_secrets=tuple(arguments.secret),
        workdir=arguments.workdir,
        pytorchjob=arguments.pytorchjob,
    )
    for job in jobs:
        kubernetes.check_output(job, options)
    ending = {
        job.name: ".pytorchjob.yaml" if arguments.pytorchjob and job.phase is None else ".yaml"
        for job in jobs
    }
    files = {f"{job.name}{ending[job.name]}": kubernetes.manifest(job, resources, options) for job in jobs}
    paths = {job.name: str(folder / f"{job.name}{ending[job.name]}") for job in jobs}
    script = kubernetes.submit_script(jobs, files=paths, namespace=options.namespace)
    return files | {SUBMIT_FILE: script}


def _local_files(
    jobs: list[Job], resources: Resources, arguments: argparse.Namespace, folder: Path
) -> dict[str, str]:
    """One after the other on this machine, the training stages under torchrun where there are several ranks."""
    lines = ["#!/bin/bash", "set -euo pipefail", "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}"]
    lines += arguments.setup
    files = {}
    for job in jobs:
        files[job.config_file] = job.config
        stage = ["-m", "cliplift.launch.cli", job.stage, str(folder / job.config_file)]
        if job.phase is not None:
            command = [sys.executable, *stage, "--phase", job.phase]
        elif resources.processes_per_node > 1:
            count = str(resources.processes_per_node)
            torchrun = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                count,
            ]
            command = [*torchrun, "--max-restarts", "3", *stage]
        else:
            command = [sys.executable, *stage]
        lines.append(f'echo "+ {job.name}"')
        lines.append(shlex.join(command))
    return files | {SUBMIT_FILE: "\n".join(lines) + "\n"}


_FILES = {"slurm": _slurm_files, "kubernetes": _kubernetes_files, "local": _local_files}
