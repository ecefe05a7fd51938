"""``cliplift submit``: write what a scheduler needs into a folder, show it, and hand it over.

Everything that will run is a file one can read first: ``--print`` shows the files and does nothing else.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cliplift.launch.commands.command import Command

if TYPE_CHECKING:
    from cliplift.launch.jobs.fabric import Fabric
    from cliplift.launch.jobs.plan import Job, Resources

SUBMITTERS = {"slurm": "sbatch", "kubernetes": "kubectl", "local": "bash"}
SUBMIT_FILE = "submit.sh"
DIRECTIVES = ("partition", "account", "qos", "time")  # one word each of an #SBATCH line


def add_options(submit: argparse.ArgumentParser) -> None:
    submit.add_argument("--to", choices=("slurm", "kubernetes", "local"), required=True, help="where it runs")
    submit.add_argument("--print", action="store_true", help="show every file and do nothing")
    submit.add_argument("--folder", default=None, help="folder for the files; default: jobs/NAME")
    submit.add_argument("--nodes", type=int, default=1, help="nodes of a training job")
    submit.add_argument(
        "--gpus", type=int, default=0, help="GPUs per node, one rank each; 0 is one CPU rank per node"
    )
    submit.add_argument(
        "--cpus", type=int, default=8, help="processor cores per node, or per part of a shard build"
    )
    submit.add_argument(
        "--memory", type=int, default=None, help="memory per node, GiB; default: the cluster's"
    )
    submit.add_argument("--parts", type=int, default=16, help="tasks a shard build is divided into")
    submit.add_argument("--signal-seconds", type=int, default=180, help="time to save before a job is killed")
    submit.add_argument("--image", default=None, help="container image to run in (needed by Kubernetes)")
    submit.add_argument(
        "--fabric",
        choices=("efa", "ib", "none"),
        default=None,
        help="network between the nodes: AWS EFA, InfiniBand or RoCE, or TCP alone; default: what NCCL finds",
    )
    slurm = submit.add_argument_group("Slurm")
    slurm.add_argument(
        "--time", default="24:00:00", help="time limit of one start; it is requeued at the end"
    )
    for name in ("partition", "account", "qos"):
        slurm.add_argument(f"--{name}", default=None, help=f"#SBATCH --{name}")
    slurm.add_argument("--module", action="append", default=[], help="module to load; may be repeated")
    slurm.add_argument(
        "--setup", action="append", default=[], help="line of shell run first; may be repeated"
    )
    slurm.add_argument(
        "--sbatch", action="append", default=[], help="another #SBATCH option; may be repeated"
    )
    slurm.add_argument("--container-tool", default="enroot", help="enroot (pyxis) or apptainer")
    slurm.add_argument(
        "--mount", action="append", default=[], help="FROM:TO, into the container; may be repeated"
    )
    _add_kubernetes_options(submit.add_argument_group("Kubernetes"))


def _add_kubernetes_options(kubernetes: argparse._ArgumentGroup) -> None:
    kubernetes.add_argument("--namespace", default=None, help="namespace; default: kubectl's")
    kubernetes.add_argument("--volume", action="append", default=[], help="CLAIM:/path; may be repeated")
    kubernetes.add_argument(
        "--workdir", default=None, help="directory relative paths of the config start from"
    )
    kubernetes.add_argument(
        "--secret", action="append", default=[], help="secret whose keys become variables"
    )
    kubernetes.add_argument("--service-account", default=None, help="service account of the pods")
    kubernetes.add_argument("--queue", default=None, help="LocalQueue of Kueue that the jobs wait in")
    kubernetes.add_argument(
        "--fabric-devices",
        type=int,
        default=None,
        help="devices of the fabric per node; needed with --fabric efa",
    )
    kubernetes.add_argument(
        "--fabric-resource",
        default=None,
        help="what the device plugin calls them; default: vpc.amazonaws.com/efa, rdma/hca_shared_devices_a",
    )
    kinds = kubernetes.add_mutually_exclusive_group()
    for kind, what in (("pytorchjob", "PyTorchJob"), ("trainjob", "TrainJob (Trainer 2)")):
        kinds.add_argument(
            f"--{kind}",
            action="store_const",
            dest="kind",
            const=kind,
            default="job",
            help=f"a Kubeflow {what}, not an Indexed Job",
        )


def run_submit(arguments: argparse.Namespace) -> int:
    """Exit code of the submitter; 0 with ``--print``."""
    from cliplift.configs.sections import ConfigError
    from cliplift.launch.commands.subject import load
    from cliplift.launch.jobs.plan import plan_jobs

    _check_lines(arguments)
    words = [arguments.subject, *arguments.rest]
    configs = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    resources = _resources(arguments)
    if overrides and len(configs) > 1:
        raise ConfigError(
            f"{overrides[0]!r} does not say which of {len(configs)} configs it is for",
            file="command line",
            hint="write it into that config's file",
        )
    jobs = plan_jobs([load(config, overrides) for config in configs], resources)
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
            f"{submitter} is not installed on this machine; the files are in {folder}",
            file="command line",
            hint=f"run `bash {folder / SUBMIT_FILE}` where it is, or use --print",
        )
    print(f"{folder}: {', '.join(files)}\n+ bash {folder / SUBMIT_FILE}", flush=True)
    return subprocess.run(["bash", str(folder / SUBMIT_FILE)], check=False).returncode


def _check_lines(arguments: argparse.Namespace) -> None:
    """Every option ends in a script or a manifest: one with a line break would write further lines into it."""
    from cliplift.configs.sections import ConfigError

    for name, value in vars(arguments).items():
        for text in value if isinstance(value, list | tuple) else (value,):
            if not isinstance(text, str):
                continue
            broken = any(ord(character) < 32 or ord(character) == 127 for character in text)
            if broken or (name in DIRECTIVES and re.search(r"\s", text)):
                what = "a line break or control character" if broken else "a space"
                raise ConfigError(
                    f"{text!r} holds {what}, which would end up in the script",
                    key=f"--{name.replace('_', '-')}",
                    file="command line",
                    hint="give it without",
                )


def _resources(arguments: argparse.Namespace) -> Resources:
    from cliplift.configs.sections import ConfigError
    from cliplift.launch.jobs.plan import Resources

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


def _fabric(arguments: argparse.Namespace) -> Fabric | None:
    from cliplift.launch.jobs.fabric import choose_fabric

    return choose_fabric(
        arguments.fabric,
        gpus=arguments.gpus,
        target=arguments.to,
        devices=arguments.fabric_devices,
        resource=arguments.fabric_resource,
    )


def _write(folder: Path, files: dict[str, str]) -> None:
    from cliplift.sharding.storage import whole_file

    for name, text in files.items():
        with whole_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _slurm_files(
    jobs: list[Job], resources: Resources, arguments: argparse.Namespace, folder: Path
) -> dict[str, str]:
    from cliplift.launch.jobs import slurm

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
        fabric=_fabric(arguments),
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
    from cliplift.configs.sections import ConfigError
    from cliplift.launch.jobs import kubernetes

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
        kind=arguments.kind,
        queue=kubernetes.queue(arguments.queue),
        fabric=_fabric(arguments),
    )
    for job in jobs:
        kubernetes.check_output(job, options)
    ending = {
        job.name: ".yaml" if arguments.kind == "job" or job.phase is not None else f".{arguments.kind}.yaml"
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
    _fabric(arguments)
    lines = ["#!/bin/bash", "set -euo pipefail", "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}"]
    lines += arguments.setup
    files = {}
    for job in jobs:
        files[job.config_file] = job.config
        # One process builds all parts of a dataset here, so the words for parts of an array are left out.
        words = [word for word in job.words if word not in ("--part", "auto")]
        stage = ["-m", "cliplift.launch.cli", job.stage, str(folder / job.config_file), *words]
        if job.phase is not None:
            command = [sys.executable, *stage]
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

COMMANDS = (
    Command(
        name="submit",
        summary="write the scripts of Slurm, Kubernetes or this machine for one or several configs, and run them",
        rest="CONFIG|key=value",
        rest_help="configs that follow, each after the one before it has succeeded; overrides of a single config",
        add_options=add_options,
        run=run_submit,
    ),
)
