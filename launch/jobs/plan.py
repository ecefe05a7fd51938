"""What a submission consists of: the jobs of one or several configs, in the order they depend on each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cliplift.configs.discovery import named_modules
from cliplift.configs.load import LoadedRun, dump_run
from cliplift.configs.runs import TRAINING, EvaluateRun, stage_name
from cliplift.configs.sections import ConfigError, Section
from cliplift.configs.sharding import ShardRun
from cliplift.configs.training import TrainingRun
from cliplift.pipelines.runs.folder import RESULT


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What each job may use. ``gpus`` are per node; 0 trains on CPUs with one process per node."""

    nodes: int
    gpus: int
    cpus: int
    memory_gib: int | None
    time: str
    parts: int
    signal_seconds: int

    @property
    def processes_per_node(self) -> int:
        return max(1, self.gpus)

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job: a stage, or one phase of sharding."""

    name: str
    stage: str
    config: str  # the resolved YAML
    config_file: str  # its name beside the scripts
    output: str
    nodes: int
    processes_per_node: int
    gpus: int
    phase: str | None = None  # of sharding
    parts: int = 1  # tasks of an array
    plugins: tuple[str, ...] = ()  # modules that --plugin names: a job starts in an environment of its own

    @property
    def words(self) -> tuple[str, ...]:
        """What follows ``cliplift``, the stage and the config's path."""
        plugins = tuple(word for module in self.plugins for word in ("--plugin", module))
        if self.phase is None:
            return plugins
        part = ("--part", "auto") if self.phase == "build" else ()
        return ("--phase", self.phase, *part, *plugins)

    @property
    def finished_file(self) -> str:
        """The file that says that a training run is over, not merely stopped."""
        return f"{self.output.rstrip('/')}/{RESULT}"


def plan_jobs(configs: Sequence[LoadedRun[Section]], resources: Resources) -> list[Job]:
    """The jobs of these configs; each needs the ones before it to have succeeded.

    Raises:
        ConfigError: a config that cannot be submitted, a batch that does not fit the ranks, names that collide.
    """
    jobs = [job for config in configs for job in _jobs_of(config, resources)]
    names = [job.name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two configs are named {name!r}", key="name", value=name, hint="rename one")
    return jobs


def _jobs_of(loaded: LoadedRun[Section], resources: Resources) -> list[Job]:
    stage = stage_name(type(loaded.run))
    try:
        if stage not in PLANNERS:
            raise ConfigError(
                "is not run on a cluster", key="stage", value=stage, hint=f"use {', '.join(PLANNERS)}"
            )
        return PLANNERS[stage](loaded.run, resources)
    except ConfigError as error:
        raise loaded.locate(error) from None


def _training_jobs(run: TrainingRun, resources: Resources) -> list[Job]:
    _check_training(run, resources)
    return [_stage_job(run, resources, name=run.name, output=run.output)]


def _evaluation_jobs(run: EvaluateRun, resources: Resources) -> list[Job]:
    return [_stage_job(run, resources, name=f"evaluate-{Path(run.run).name}", output=run.output)]


def _stage_job(run: Section, resources: Resources, *, name: str, output: str) -> Job:
    return Job(
        name=job_name(name),
        stage=stage_name(type(run)),
        config=dump_run(run),
        config_file=f"{job_name(name)}.yaml",
        output=output,
        nodes=resources.nodes,
        processes_per_node=resources.processes_per_node,
        gpus=resources.gpus,
        plugins=named_modules(),
    )


def _check_training(run: TrainingRun, resources: Resources) -> None:
    """Refuse now what would otherwise fail after a night in the queue."""
    from cliplift.pipelines.engine.deepspeed_setup import batch_split

    batch_split(run, world_size=resources.world_size)
    if run.checkpoint.resume == "never":
        raise ConfigError(
            "would start afresh after every preemption",
            key="checkpoint.resume",
            value="never",
            hint="use auto, and a new output for a run that should start from the beginning",
        )


def _shard_jobs(run: ShardRun, resources: Resources) -> list[Job]:
    """plan, then an array that builds its parts, then finalize and verify."""
    config = dump_run(run)
    phases = (("plan", 1), ("build", resources.parts), ("finalize", 1), ("verify", 1))
    return [
        Job(
            name=job_name(f"{run.name}-{phase}"),
            stage="shard",
            config=config,
            config_file=f"{job_name(run.name)}.yaml",
            output=run.output,
            nodes=1,
            processes_per_node=1,
            gpus=0,
            phase=phase,
            parts=parts,
            plugins=named_modules(),
        )
        for phase, parts in phases
    ]


# Stage -> how its run becomes jobs. What is not here is not submitted.
PLANNERS: dict[str, Callable[..., list[Job]]] = {
    "shard": _shard_jobs,
    **dict.fromkeys(TRAINING, _training_jobs),
    "evaluate": _evaluation_jobs,
}


def job_name(text: str) -> str:
    """A name every scheduler and DNS accepts: small letters, digits and dashes, at most 52 of them."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:52].strip("-")
    if not name:
        raise ConfigError(
            f"{text!r} cannot name a job", key="name", value=text, hint="use letters and digits"
        )
    return name if name[0].isalpha() else f"run-{name}"[:52].strip("-")
