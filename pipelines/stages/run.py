"""One way to run every training stage: folder, loader, task, tracker, engine, final evaluation, weights."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cliplift.configs.load import dump_run
from cliplift.configs.runs import ClassificationRun, FinetuneRun, PretrainRun, TransferRun
from cliplift.configs.sections import ConfigError
from cliplift.models import create_model
from cliplift.models.factory import save_pretrained
from cliplift.models.registry import ModelError, model_entry
from cliplift.pipelines.data.loader import TrainingLoader, training_loader
from cliplift.pipelines.distributed.agreement import agree_on_run, agreed_data
from cliplift.pipelines.distributed.collectives import Topology, barrier, start
from cliplift.pipelines.distributed.launchers import find_place
from cliplift.pipelines.engine.deepspeed_setup import batch_split, deepspeed_config, set_numerics
from cliplift.pipelines.engine.loop import fit
from cliplift.pipelines.engine.task import FitResult
from cliplift.pipelines.runs.folder import RunFolder, sole_writer
from cliplift.pipelines.runs.tracking import Tracker
from cliplift.pipelines.stages import transfer
from cliplift.pipelines.stages.classification import ClassificationTask
from cliplift.pipelines.stages.forecast import ForecastTask, build_forecaster, forecaster_options


@dataclass(frozen=True)
class StageResult:
    """What a stage leaves behind."""

    folder: Path
    metrics: Mapping[str, float] = field(default_factory=dict)
    finished: bool = True
    requeue: bool = False  # stopped by a signal after saving: start it again and it continues
    seconds: float = 0.0


def run_stage(run: TransferRun | ClassificationRun, *, command: Sequence[str]) -> StageResult:
    """Run transfer, pretrain or finetune on this process's share of the ranks.

    Raises:
        ConfigError: the run cannot work as configured, or another process writes to its folder; names the key.
    """
    started = time.monotonic()
    check_model(run)
    topology = start(run.engine)
    agree_on_run(run, topology)
    folder = RunFolder.create(run.output, writes=topology.rank == 0)
    with sole_writer(folder.path) if topology.is_main else contextlib.nullcontext():
        return _run_in(folder, run, command=command, topology=topology, started=started)


def _run_in(
    folder: RunFolder,
    run: TransferRun | ClassificationRun,
    *,
    command: Sequence[str],
    topology: Topology,
    started: float,
) -> StageResult:
    stage = str(run.stage)
    done = folder.result()
    if done is not None and run.checkpoint.resume == "auto":
        _say(
            topology,
            f"{run.name}: already finished in {folder.path}; use another output, or checkpoint.resume=never",
        )
        return StageResult(folder.path, done["metrics"], seconds=done["seconds"])
    folder.write_start(run, stage=stage, name=run.name, command=command, world_size=topology.world_size)
    _seed(run, topology)
    loader = agreed_data(lambda: _loader(run, topology), lambda made: made.fingerprint, topology)
    try:
        task = _task(run, loader, topology)
        tracker = Tracker(run, stage=stage, folder=folder.path, topology=topology)
        result = fit(task=task, run=run, loader=loader, topology=topology, tracker=tracker)
        if result.interrupted:
            result.release()
            tracker.finish()
            _say(
                topology,
                f"{run.name}: stopped by a signal at step {result.steps} and saved; start it again to continue",
            )
            return StageResult(folder.path, result.metrics, finished=False, requeue=True)
        metrics = _conclude(_Ended(run, task, result), folder, topology)
        result.release()
        seconds = time.monotonic() - started
        folder.write_result(
            stage=stage,
            metrics=metrics,
            seconds=seconds,
            classes=loader.classes,
            steps=result.steps,
            clips_per_second=result.clips_per_second,
            skipped_steps=result.skipped_steps,
            data_fingerprint=loader.fingerprint,
            model=run.model.name,
        )
        tracker.summary(metrics)
        tracker.artifacts(shards=_shard_urls(run), fingerprint=loader.fingerprint, weights=folder.weights)
        tracker.finish()
    finally:
        loader.close()
    barrier(topology)
    return StageResult(folder.path, metrics, seconds=seconds)


@dataclass(frozen=True)
class Prepared:
    """A stage ready to train. The caller closes the loader."""

    topology: Topology
    loader: TrainingLoader
    task: Any


def prepare(run: TransferRun | ClassificationRun) -> Prepared:
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


def _seed(run: TransferRun | ClassificationRun, topology: Topology) -> None:
    torch.manual_seed(run.seed)
    set_numerics(run.engine, topology.device)


@dataclass(frozen=True)
class _Ended:
    """A run whose training is over."""

    run: TransferRun | ClassificationRun
    task: Any
    result: FitResult


def dry_run(run: TransferRun | ClassificationRun) -> str:
    """The resolved config and the DeepSpeed dictionary derived from it, as text."""
    check_model(run)
    world_size = find_place(os.environ).world_size
    derived = deepspeed_config(run, world_size=world_size)
    processes = "1 process" if world_size == 1 else f"{world_size} processes"
    return f"{dump_run(run)}\n# DeepSpeed, derived for {processes}:\n{json.dumps(derived, indent=2)}"


def check_model(run: TransferRun | ClassificationRun) -> None:
    """Raise ConfigError for an unknown model before anything else is started."""
    keys = {"model.name": run.model.name}
    if isinstance(run, TransferRun):
        keys["teacher.name"] = run.teacher.name
    for key, name in keys.items():
        try:
            model_entry(name)
        except ModelError as error:
            raise ConfigError(str(error), key=key, value=name) from None


def _loader(run: TransferRun | ClassificationRun, topology: Topology) -> TrainingLoader:
    micro_batch, _ = batch_split(run, world_size=topology.world_size)
    return training_loader(
        run.data,
        seed=run.seed,
        global_batch=run.engine.global_batch,
        micro_batch=micro_batch,
        rank=topology.rank,
        world_size=topology.world_size,
    )


def require_splits(run: TransferRun | ClassificationRun, splits: Sequence[str]) -> None:
    """Refuse a run whose shards, of these splits, lack one it will evaluate: after the training would be late.

    Raises:
        ConfigError: names data.val_split or test_split.
    """
    wanted = {} if run.data.val_share else {"data.val_split": run.data.val_split}
    if isinstance(run, FinetuneRun) and not (run.data.val_share and run.test_split == run.data.val_split):
        wanted["test_split"] = run.test_split
    for key, split in wanted.items():
        if split not in splits:
            raise ConfigError(
                f"the shards have no split {split!r} to evaluate",
                key=key,
                value=split,
                hint=f"they have {', '.join(splits)}"
                + ("; data.val_share cuts one from the training split" if key == "data.val_split" else ""),
            )


def _task(run: TransferRun | ClassificationRun, loader: TrainingLoader, topology: Topology) -> Any:
    task: Any
    try:
        if isinstance(run, TransferRun):
            task = transfer.TransferTask(run, topology=topology)
        elif isinstance(run, PretrainRun) and run.objective == "forecast":
            task = ForecastTask(run, topology=topology)
        else:
            task = ClassificationTask(run, classes=loader.classes, topology=topology)
    except ModelError as error:
        raise ConfigError(str(error), key="model", value=run.model.name) from None
    require_splits(run, loader.splits)
    return task


def _conclude(ended: _Ended, folder: RunFolder, topology: Topology) -> dict[str, float]:
    """Final evaluation and weights."""
    run, task = ended.run, ended.task
    metrics = dict(ended.result.metrics)
    if isinstance(run, FinetuneRun):
        ended.result.engine.eval()
        test = task.evaluate_split(run.test_split, topology=topology, predictions_file=folder.predictions)
        metrics = {f"val_{name}": value for name, value in metrics.items()} | test
    weights = ended.result.weights()
    if topology.is_main:
        _save_weights(run, task, weights, folder)
    if isinstance(run, TransferRun):
        _judge_transfer(run, metrics, topology)
    return metrics


def _shard_urls(run: TransferRun | ClassificationRun) -> list[str]:
    return [shards if isinstance(shards, str) else shards.url for shards in run.data.shards]


def _save_weights(
    run: TransferRun | ClassificationRun, task: Any, weights: Mapping[str, Tensor], folder: RunFolder
) -> None:
    """The trained network alone, without loss and matching head, from whole fp32 tensors."""
    prefix = "student." if isinstance(run, TransferRun) else "network."
    network, options = _untrained(run, task)
    network.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    extra: dict[str, Any] = {
        "stage": run.stage,
        "run": run.name,
        "sampling": run.data.sampling.model_dump(mode="json"),
        "crop_pixels": run.data.crop_pixels,
        "resize_short_side_pixels": run.data.resize_short_side_pixels,
        "normalize_brightness": run.data.augment.normalize_brightness,
    }
    if isinstance(task, ForecastTask):
        extra |= {"objective": "forecast", "forecast": task.run.forecast.model_dump(mode="json")}
    elif isinstance(run, ClassificationRun):
        extra |= {"classes": list(task.classes), "task": run.task}
    save_pretrained(network, folder.weights, name=run.model.name, options=options, extra=extra)


def _untrained(run: TransferRun | ClassificationRun, task: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network's architecture, and the options it is built with."""
    if isinstance(task, ForecastTask):
        return build_forecaster(task.run, pretrained=None), forecaster_options(task.run)
    options = dict[str, Any](run.model.options)
    network = create_model(
        run.model.name,
        num_classes=len(task.classes) if isinstance(run, ClassificationRun) else 0,
        in_frames=run.data.sampling.frames,
        **options,
    )
    return network, options


def _judge_transfer(run: TransferRun, metrics: Mapping[str, float], topology: Topology) -> None:
    """A matching accuracy that a coin could have reached is a failure, and is said."""
    accuracy, sigmas = metrics["matching_accuracy"], metrics["above_chance_sigmas"]
    verdict = "above chance" if sigmas > 3 else "NOT above chance: the transfer has failed"
    _say(
        topology, f"{run.name}: matching accuracy {accuracy:.3f} on held-out videos, prior 0.500 ({verdict})"
    )


def _say(topology: Topology, text: str) -> None:
    if topology.rank == 0:
        print(text, flush=True)
