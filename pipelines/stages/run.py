"""One way to run every training stage: folder, loader, task, tracker, engine, final evaluation, weights."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from cliplift.configs.discovery import working
from cliplift.configs.load import dump_run
from cliplift.configs.plugins import stage_plugins
from cliplift.configs.runs import FinetuneRun, PretrainRun, TransferRun
from cliplift.configs.sections import ConfigError
from cliplift.configs.training import TrainingRun
from cliplift.models.protocol import ModelError
from cliplift.models.registry import model_entry
from cliplift.pipelines.data.clip_plan import doubts_about
from cliplift.pipelines.data.loader import TrainingLoader, training_loader
from cliplift.pipelines.data.source import on_its_generations
from cliplift.pipelines.distributed.agreement import agree_on_run, agreed_data
from cliplift.pipelines.distributed.collectives import Topology, barrier, broadcast_object, start
from cliplift.pipelines.distributed.flight_recorder import record_collectives
from cliplift.pipelines.distributed.launchers import find_place
from cliplift.pipelines.distributed.sequence import require_shared
from cliplift.pipelines.engine.deepspeed_setup import batch_split, deepspeed_config, set_numerics
from cliplift.pipelines.engine.faults import STACKS, StoppedBySignalError, caught_signals, stop_together
from cliplift.pipelines.engine.loop import fit
from cliplift.pipelines.engine.optim import total_steps
from cliplift.pipelines.engine.partitioned_build import built_in_parts
from cliplift.pipelines.engine.task import FitResult, Stage, save_trained
from cliplift.pipelines.runs.folder import Record, RunFolder, metrics_of, seconds_of, sole_writer
from cliplift.pipelines.runs.leaks import leak_statements, statement_lines
from cliplift.pipelines.runs.published import PublishedRun, require_common_folder
from cliplift.pipelines.runs.results import commands_after, result_block
from cliplift.pipelines.runs.tracking import Tracker
from cliplift.pipelines.runs.trained_on import record_data
from cliplift.pipelines.stages.classification import ClassificationStage, FinetuneStage
from cliplift.pipelines.stages.distil import DistilStage
from cliplift.pipelines.stages.forecast import ForecastStage
from cliplift.pipelines.stages.latent import LatentStage
from cliplift.pipelines.stages.masked import MaskedStage
from cliplift.pipelines.stages.transfer import TransferStage

# Called with (run, classes=..., topology=...). Plug-ins bring their own, as `configs/plugins.py` finds them.
OBJECTIVES: dict[str, Callable[..., Stage]] = {
    "classification": ClassificationStage,
    "distil": DistilStage,
    "forecast": ForecastStage,
    "latent": LatentStage,
    "masked": MaskedStage,
}


def pretrain_stage(run: PretrainRun, *, classes: Sequence[str], topology: Topology) -> Stage:
    """The stage of the run's objective, of this package or of a plug-in."""
    stage = OBJECTIVES.get(run.objective)
    if stage is None:
        stage = working(stage_plugins())[run.objective].value  # type: ignore[assignment]  # checked when found
        assert stage is not None
    return stage(run, classes=classes, topology=topology)


STAGES: dict[type[TrainingRun], Callable[..., Stage]] = {
    TransferRun: TransferStage,
    PretrainRun: pretrain_stage,
    FinetuneRun: FinetuneStage,
}


def stage_of(run: TrainingRun, *, classes: Sequence[str] = (), topology: Topology | None = None) -> Stage:
    """The stage of a run: nothing is read or built yet. Without a topology, of one process on the CPU."""
    topology = topology or Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    return STAGES[type(run)](run, classes=classes, topology=topology)


@dataclass(frozen=True)
class StageResult:
    """What a stage leaves behind."""

    folder: Path
    metrics: Mapping[str, float] = field(default_factory=dict)
    finished: bool = True
    requeue: bool = False  # stopped by a signal after saving: start it again and it continues
    seconds: float = 0.0


def run_stage(run: TrainingRun, *, command: Sequence[str]) -> StageResult:
    """Run transfer, pretrain or finetune on this process's share of the ranks.

    A signal to any rank stops all of them, wherever they are: a training step, an evaluation, or before the first step.
    What was trained is saved, and the result says ``requeue``.

    Raises:
        ConfigError: the run cannot work as configured, or another process writes to its folder; names the key.
    """
    started = time.monotonic()
    check_model(run)
    with caught_signals():
        record_collectives(Path(run.output) / STACKS, os.environ)
        topology = start(run.engine)
        agree_on_run(run, topology)
        folder = RunFolder.create(run.output, writes=topology.rank == 0)
        with sole_writer(folder.path) if topology.is_main else contextlib.nullcontext():
            try:
                stop_together(topology)  # a signal from before, or from between two runs
                published = PublishedRun(run.checkpoint.url, folder.path)
                published.require_writable(topology)
                if run.checkpoint.url is None:
                    require_common_folder(folder.path, topology)
                if topology.device.type == "cuda":
                    # NCCL opens files there and makes no folders.
                    (folder.path / STACKS).mkdir(parents=True, exist_ok=True)
                if run.checkpoint.resume == "auto":
                    published.take_up(topology)
                return _run_in(folder, run, command=command, topology=topology, started=started)
            except StoppedBySignalError:
                text = "stopped by a signal; start it again to continue"
                log_main(topology, f"{run.name}: {text}")
                return StageResult(folder.path, finished=False, requeue=True)


def _run_in(
    folder: RunFolder,
    run: TrainingRun,
    *,
    command: Sequence[str],
    topology: Topology,
    started: float,
) -> StageResult:
    stage = str(run.stage)
    done = broadcast_object(folder.result(), topology)  # hosts may have folders of their own
    if done is not None and run.checkpoint.resume == "auto":
        return _finished_before(run, folder, done, topology)
    run = _on_its_generations(run, folder, topology)
    folder.write_start(run, stage=stage, name=run.name, command=command, world_size=topology.world_size)
    _seed(run, topology)
    loader = agreed_data(lambda: _loader(run, topology), lambda made: made.fingerprint, topology)
    try:
        folder.add_to_record(classes=list(loader.classes), datasets=list(run.data.urls))
        for line in record_data(run, folder) if topology.is_main else ():
            log_main(topology, f"{run.name}: {line}")
        task = _task(run, loader, topology)
        tracker = Tracker(run, stage=stage, folder=folder.path, topology=topology)
        log_main(topology, f"{run.name}: {_setting(run, task, loader, topology)}")
        for key, doubt in doubts_about(run.data, loader.classes if task.needs_labels else ()):
            log_main(topology, f"{run.name}: warning: {key} {doubt}")
        result = fit(task=task, run=run, loader=loader, topology=topology, tracker=tracker)
        if result.interrupted:
            result.release()
            tracker.finish()
            log_main(
                topology,
                f"{run.name}: stopped by a signal at step {result.steps} and saved; start it again to continue",
            )
            return StageResult(folder.path, result.metrics, finished=False, requeue=True)
        try:
            metrics = _conclude(run, task, result, folder, topology)
        except StoppedBySignalError:  # the last step is saved: the next start evaluates it again
            tracker.finish()
            raise
        finally:
            result.release()
        seconds = time.monotonic() - started
        _write_records(
            run, folder, loader, tracker, result, topology=topology, metrics=metrics, seconds=seconds
        )
        next_commands = commands_after(stage, folder.path, offline_run=tracker.offline_folder)
        tracker.finish()
    finally:
        loader.close()
    barrier(topology)
    log_main(
        topology,
        result_block(
            run.name, metrics, best_metric=task.best_metric, folder=folder.path, next_commands=next_commands
        ),
    )
    return StageResult(folder.path, metrics, seconds=seconds)


def _finished_before(run: TrainingRun, folder: RunFolder, done: Record, topology: Topology) -> StageResult:
    PublishedRun(run.checkpoint.url, folder.path).publish_result(topology)
    log_main(
        topology,
        f"{run.name}: already finished in {folder.path}; use another output, or checkpoint.resume=never",
    )
    return StageResult(folder.path, metrics_of(done), seconds=seconds_of(done) or 0.0)


def _on_its_generations(run: TrainingRun, folder: RunFolder, topology: Topology) -> TrainingRun:
    """The run with the generations of its datasets that it began with, or the latest where it begins."""
    data = run.data
    record = folder.start_record() if topology.is_main and run.checkpoint.resume == "auto" else None
    with contextlib.suppress(
        ValueError, OSError
    ):  # the loader says what is wrong with a dataset, on every rank
        earlier = None if record is None else record.get("datasets", list(data.urls))
        data = on_its_generations(data, [str(url) for url in earlier] if isinstance(earlier, list) else None)
    return run.model_copy(update={"data": broadcast_object(data, topology)})


def _write_records(
    run: TrainingRun,
    folder: RunFolder,
    loader: TrainingLoader,
    tracker: Tracker,
    result: FitResult,
    *,
    topology: Topology,
    metrics: Mapping[str, float],
    seconds: float,
) -> None:
    """The finished run's numbers into its folder and the tracker."""
    split = stage_of(run).splits().get("test_split")
    leaks = (
        leak_statements(folder.path, run.data.urls, split=split, fold=run.data.fold)
        if split is not None and topology.is_main
        else []
    )
    folder.write_result(
        stage=run.stage,
        metrics=metrics,
        seconds=seconds,
        classes=loader.classes,
        steps=result.steps,
        clips_per_second=result.clips_per_second,
        skipped_steps=result.skipped_steps,
        data_fingerprint=loader.fingerprint,
        model=run.model.name,
        leaks=[asdict(one) for one in leaks],
    )
    if leaks:
        log_main(topology, statement_lines(leaks))
    tracker.summary(metrics)
    published = PublishedRun(run.checkpoint.url, folder.path)
    published.publish_result(topology)
    weights = published.place_of(folder.weights)
    tracker.artifacts(shards=_shard_urls(run), fingerprint=loader.fingerprint, weights=weights)


@dataclass(frozen=True)
class Prepared:
    """A stage ready to train. The caller closes the loader."""

    topology: Topology
    loader: TrainingLoader
    task: Stage


def prepare(run: TrainingRun) -> Prepared:
    """Everything of a stage but its folder, tracker and training loop.

    Raises:
        ConfigError: the run cannot work as configured; the error names the key.
    """
    check_model(run)
    topology = start(run.engine)
    _seed(run, topology)
    loader = agreed_data(lambda: _loader(run, topology), lambda made: made.fingerprint, topology)
    try:
        return Prepared(topology, loader, _task(run, loader, topology))
    except BaseException:
        loader.close()
        raise


def _seed(run: TrainingRun, topology: Topology) -> None:
    torch.manual_seed(run.seed)
    set_numerics(run.engine, topology.device)


def dry_run(run: TrainingRun) -> str:
    """The resolved config and the DeepSpeed dictionary derived from it, as text."""
    check_model(run)
    world_size = find_place(os.environ).world_size
    derived = deepspeed_config(run, world_size=world_size)
    processes = "1 process" if world_size == 1 else f"{world_size} processes"
    return f"{dump_run(run)}\n# DeepSpeed, derived for {processes}:\n{json.dumps(derived, indent=2)}"


def check_model(run: TrainingRun) -> None:
    """Raise ConfigError for an unknown model, or one whose clips cannot be shared, before anything else is started."""
    for key, name in stage_of(run).networks().items():
        try:
            model_entry(name)
        except ModelError as error:
            raise ConfigError(str(error), key=key, value=name) from None
    if run.engine.sequence_parallel > 1:
        with torch.device("meta"):
            module = stage_of(run, classes=("one",)).build_module(weights=False).module
        require_shared(module, run.engine)


def _loader(run: TrainingRun, topology: Topology) -> TrainingLoader:
    micro_batch, _ = batch_split(run, world_size=topology.world_size)
    return training_loader(
        run.data,
        seed=run.seed,
        global_batch=run.engine.global_batch,
        micro_batch=micro_batch,
        rank=topology.data_rank,
        world_size=topology.data_ranks,
    )


def _setting(run: TrainingRun, task: Stage, loader: TrainingLoader, topology: Topology) -> str:
    """What is trained, on what, for how long, where to: said before the first step."""
    parameters = sum(p.numel() for p in task.module.parameters())
    trained = sum(p.numel() for p in task.module.parameters() if p.requires_grad)
    steps = total_steps(run.schedule, steps_per_epoch=loader.steps_per_epoch)
    ranks = "1 process" if topology.world_size == 1 else f"{topology.world_size} processes"
    if topology.sequence_parallel > 1:
        ranks += f", {topology.sequence_parallel} of them for each clip"
    device = (
        torch.cuda.get_device_name(topology.device)
        if topology.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    classes = f", {len(loader.classes)} classes" if loader.classes else ""
    return (
        f"{run.model.name}, {parameters / 1e6:,.2f} M parameters ({trained / 1e6:,.2f} M trained), on {device}, "
        f"{ranks}; {loader.num_samples:,} samples of split {run.data.split}{classes}; "
        f"{steps:,} steps of {run.engine.global_batch} clips; into {run.output}"
    )


def read_classes(run: TrainingRun) -> tuple[str, ...]:
    """The class names of a run, from its data."""
    alone = run.model_copy(update={"engine": run.engine.model_copy(update={"sequence_parallel": 1})})
    loader = _loader(alone, Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu")))
    try:
        return tuple(loader.classes)
    finally:
        loader.close()


def require_splits(run: TrainingRun, splits: Sequence[str]) -> None:
    """Refuse a run whose shards, of these splits, lack one it will evaluate: after the training would be late.

    Raises:
        ConfigError: names data.val_split or test_split.
    """
    for key, split in stage_of(run).splits().items():
        if split not in splits:
            raise ConfigError(
                f"the shards have no split {split!r} to evaluate",
                key=key,
                value=split,
                hint=f"they have {', '.join(splits)}"
                + ("; data.val_share cuts one from the training split" if key == "data.val_split" else ""),
            )


def _task(run: TrainingRun, loader: TrainingLoader, topology: Topology) -> Stage:
    """The stage with its module built, so that what is wrong with it is found before the engine is set up."""
    stage = stage_of(run, classes=loader.classes, topology=topology)
    try:
        built_in_parts(lambda: stage.module, run.engine, topology)
    except ModelError as error:
        raise ConfigError(str(error), key="model", value=run.model.name) from None
    require_splits(run, loader.splits)
    return stage


def _conclude(
    run: TrainingRun,
    stage: Stage,
    result: FitResult,
    folder: RunFolder,
    topology: Topology,
) -> dict[str, float]:
    """Final evaluation and weights."""
    assert result.engine is not None  # alive until it is released
    result.engine.eval()
    metrics = stage.finish(result.metrics, topology=topology, folder=folder)
    if topology.is_main:
        save_trained(stage.trained_network(result.weights), folder.weights, run=run)
    return metrics


def _shard_urls(run: TrainingRun) -> list[str]:
    return [shards if isinstance(shards, str) else shards.url for shards in run.data.shards]


def log_main(topology: Topology, text: str) -> None:
    """A line on the main rank's standard output."""
    if topology.rank == 0:
        print(text, flush=True)
