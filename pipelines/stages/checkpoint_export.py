"""A checkpoint's weights as an export folder, long after its run: tensor by tensor from slices, by one process.

The network is built on the meta device and no optimizer state is read, so any machine with room for the largest tensor
exports any checkpoint, of however many ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from cliplift.configs.load import load_run
from cliplift.configs.runs import TRAINING, ExportRun
from cliplift.configs.sections import ConfigError
from cliplift.pipelines.checkpoints.folder import Folder, damage
from cliplift.pipelines.checkpoints.saved import TrainedTensors, check_fits, open_checkpoint
from cliplift.pipelines.checkpoints.stored import COMPLETE, StoredFolder
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.engine.task import save_trained
from cliplift.pipelines.evaluation.export import write_card
from cliplift.pipelines.runs.folder import CONFIG, RUN, RunFolder, classes_of
from cliplift.pipelines.stages.run import read_classes, stage_of
from cliplift.sharding.scratch import scratch_folder
from cliplift.sharding.storage import open_store, without_secrets

ALONE = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder, on a disk or in a store, is one complete checkpoint."""
    return open_store(str(folder)).size(COMPLETE) is not None


def export_checkpoint(run: ExportRun) -> Path:
    """Write the weights of the checkpoint ``run.run``: averaged where it has an average, with the averaged statistics.

    Unlike a finished run's result, BatchNorm's statistics are not recomputed (``precise_batchnorm_batches``).

    Raises:
        ConfigError: the checkpoint is damaged, or is not inside its run's folder.
    """
    if "://" not in run.run:
        path = Path(run.run).resolve()
        return _export(run, path, lambda: RunFolder(_run_of(path, run.run)))
    with scratch_folder() as scratch:
        stored = StoredFolder(run.run.rstrip("/"), scratch / "checkpoint")
        return _export(run, stored, lambda: _fetched_run(stored.url, scratch / "run"))


def _export(run: ExportRun, path: Folder, run_folder: Callable[[], RunFolder]) -> Path:
    if (problem := damage(path, unread="optimizer")) is not None:
        raise ConfigError(
            f"the checkpoint is damaged ({problem})",
            key="run",
            value=run.run,
            hint="give another one of the run",
        )
    source = run_folder()
    config = load_run(source.path / CONFIG, TRAINING).run
    record = source.start_record() or {}
    classes = classes_of(record) if "classes" in record else read_classes(config)
    stage = stage_of(config, classes=classes)
    # Names and shapes are enough: the tensors are read from the checkpoint one by one as they are written.
    with torch.device("meta"):
        module = stage.build_module(weights=False).module
    saved = open_checkpoint(path, topology=ALONE)
    check_fits(module, saved)
    kept = module.state_dict().keys()
    buffers = {n: b for n, b in {**saved.buffers, **saved.average_buffers}.items() if n in kept}
    model = stage.trained_network(TrainedTensors(saved, buffers=buffers, averaged=True))
    output = RunFolder.create(run.output, writes=True).path
    save_trained(model, output, run=config, step=saved.state["step"])
    result = {
        "metrics": saved.state["metrics"],
        "classes": list(classes),
        "model": config.model.name,
        "stage": record.get("stage", "?"),
    }
    write_card(source, output, result=result)
    return output


def _fetched_run(url: str, folder: Path) -> RunFolder:
    """Config and record of the run that a stored checkpoint belongs to, in a folder."""
    above = [url.rsplit("/", levels)[0] for levels in (1, 2, 3)]
    found = next((place for place in above if open_store(place).size(CONFIG) is not None), None)
    if found is None:
        raise _homeless(url)
    store = open_store(found)
    folder.mkdir()
    for name in (CONFIG, RUN):
        if store.size(name) is not None:
            store.fetch(name, folder / name)
    return RunFolder(folder)


def _homeless(given: str) -> ConfigError:
    return ConfigError(
        f"there is no {CONFIG} above {without_secrets(given)!r}, so its network is unknown",
        key="run",
        value=given,
        hint="leave the checkpoint in its run's folder, or copy that folder with it",
    )


def _run_of(path: Path, given: str) -> Path:
    """The folder of the run a checkpoint belongs to: RUN/checkpoints/STEP or RUN/checkpoints/best/STEP."""
    found = next((folder for folder in path.parents[:3] if (folder / CONFIG).is_file()), None)
    if found is None:
        raise _homeless(given)
    return found
