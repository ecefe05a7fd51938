"""sbatch scripts: what a person would write, with requeueing that works.

Every task of ``srun`` is one rank and runs cliplift itself, which reads its rank from Slurm's variables; so the
signals of Slurm reach the ranks without a launcher in between. A rank that gets SIGUSR1 or SIGTERM makes all of them
save and stop; the script then puts the same job back into the queue, under the same id, so that jobs waiting for it
go on waiting.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from cliplift.configs.sections import ConfigError
from cliplift.launch.jobs.fabric import Fabric
from cliplift.launch.jobs.plan import Job, Resources

MAX_REQUEUES = 100
CONTAINERS = ("enroot", "apptainer")


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What this cluster expects in a script."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    container: str | None = None
    container_tool: str = "enroot"
    mounts: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()  # more #SBATCH options, as written
    python: str = "python"
    logs: str = "logs"
    workdir: str = "."
    fabric: Fabric | None = None


def sbatch_script(job: Job, resources: Resources, options: SlurmOptions, *, config_path: str) -> str:
    """The whole script of one job.

    Args:
        job: what to run.
        resources: what it may use.
        options: what this cluster expects.
        config_path: where the job's resolved YAML lies.
    """
    parts = [
        "#!/bin/bash",
        *_directives(job, resources, options),
        "",
        "set -eo pipefail",
        f"cd {shlex.quote(options.workdir)}",
        *(f"module load {shlex.quote(name)}" for name in options.modules),
        *options.setup,
        "set -u  # only now: modules and environments read variables that may not be set",
        "export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}",
        *_fabric_lines(job, options),
        "",
        f'echo "$(date -u +%FT%TZ) {job.name}: job ${{SLURM_JOB_ID}}, start ${{SLURM_RESTART_COUNT:-0}}, '
        'nodes ${SLURM_JOB_NODELIST}"',
        *(
            _training(job, options, config_path)
            if job.phase is None
            else _sharding(job, options, config_path)
        ),
    ]
    return "\n".join(parts) + "\n"


def _fabric_lines(job: Job, options: SlurmOptions) -> list[str]:
    if options.fabric is None or job.phase is not None:
        return []
    set_anew = (f'{name}="${{{name}:-{value}}}"' for name, value in options.fabric.environment.items())
    return [f"export {' '.join(set_anew)}  # the network between nodes"]


def _directives(job: Job, resources: Resources, options: SlurmOptions) -> list[str]:
    cpus = resources.cpus if job.phase is not None else max(1, resources.cpus // job.processes_per_node)
    asked = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.processes_per_node}",
        f"--cpus-per-task={cpus}",
        f"--gpus-per-node={job.gpus}" if job.gpus else None,
        f"--mem={resources.memory_gib}G" if resources.memory_gib else None,
        f"--time={resources.time}",
        f"--partition={options.partition}" if options.partition else None,
        f"--account={options.account}" if options.account else None,
        f"--qos={options.qos}" if options.qos else None,
        f"--output={options.logs}/%x-%A_%a.out"
        if job.phase == "build"
        else f"--output={options.logs}/%x-%j.out",
        "--open-mode=append",
        "--requeue",
        # To the tasks, not to this script: they save and end, and the script goes on after srun.
        f"--signal=USR1@{resources.signal_seconds}" if job.phase is None else None,
        f"--array=0-{job.parts - 1}" if job.phase == "build" else None,
        *options.extra,
    ]
    return [f"#SBATCH {option}" for option in asked if option]


def _srun(job: Job, options: SlurmOptions, config_path: str) -> str:
    words = ["srun", "--kill-on-bad-exit=1"]
    command = [options.python, "-m", "cliplift.launch.cli", job.stage, config_path, *job.words]
    if options.container and options.container_tool == "enroot":
        words += [f"--container-image={options.container}", f"--container-workdir={options.workdir}"]
        words += [f"--container-mounts={','.join((options.workdir, *options.mounts))}"]
    elif options.container:
        binds = [word for mount in options.mounts for word in ("--bind", mount)]
        gpu = ["--nv"] if job.gpus else []
        command = ["apptainer", "exec", *gpu, "--pwd", options.workdir, *binds, options.container, *command]
    lines = [" ".join(shlex.quote(word) for word in words), " ".join(shlex.quote(word) for word in command)]
    return " \\\n    ".join(lines)


def _sharding(job: Job, options: SlurmOptions, config_path: str) -> list[str]:
    return [_srun(job, options, config_path)]


def _training(job: Job, options: SlurmOptions, config_path: str) -> list[str]:
    return [
        "",
        "# The script outlives the signal of a preemption; the ranks save and end.",
        "trap : TERM USR1",
        "status=0",
        f"{_srun(job, options, config_path)} || status=$?",
        "",
        "requeue() {",
        f"    if (( ${{SLURM_RESTART_COUNT:-0}} >= {MAX_REQUEUES} )); then",
        '        echo "started again ${SLURM_RESTART_COUNT} times: given up" >&2',
        "        exit 1",
        "    fi",
        '    echo "stopped before the end ($1): back into the queue, to continue from the last checkpoint"',
        '    scontrol requeue "${SLURM_JOB_ID}"',
        "    exit 0",
        "}",
        "",
        f"if [[ -f {shlex.quote(job.finished_file)} ]]; then",
        "    exit 0",
        "fi",
        "case ${status} in",
        '    0) requeue "saved after a signal" ;;',
        '    138 | 143) requeue "signalled before it could save" ;;',
        "    *) exit ${status} ;;",
        "esac",
    ]


def submit_script(jobs: list[Job], *, scripts: dict[str, str]) -> str:
    """A shell script that submits the jobs, each after the one before it has succeeded.

    Args:
        jobs: in order.
        scripts: job name -> path of its sbatch script.
    """
    lines = ["#!/bin/bash", "set -euo pipefail"]
    after = ""
    for number, job in enumerate(jobs, start=1):
        variable = f"job{number}"
        lines.append(f"{variable}=$(sbatch --parsable{after} {shlex.quote(scripts[job.name])})")
        lines.append(f'echo "{job.name}: job ${{{variable}}}"')
        # A part that failed leaves the rest useless: jobs that can no longer start are removed.
        after = f' --kill-on-invalid-dep=yes --dependency="afterok:${{{variable}}}"'
    return "\n".join(lines) + "\n"


def check_options(options: SlurmOptions) -> None:
    """Raise ConfigError for what would break the script."""
    if options.container_tool not in CONTAINERS:
        raise ConfigError(
            f"{options.container_tool!r} is not known",
            file="command line",
            hint=f"use {' or '.join(CONTAINERS)}",
        )
    for line in (*options.setup, *options.modules, *options.extra):
        if "\n" in line:
            raise ConfigError(f"{line!r} holds a line break", file="command line", hint="give one line each")
