"""A checkpoint's weights as an export folder, long after its run: tensor by tensor from slices, by one process.

The network is built on the meta device and no optimizer state is read, so any machine with room for the largest tensor
exports any checkpoint, of however many ranks.
"""

from __future__ import annotations

from pathlib import Path

import torch

from cliplift.configs.load import load_run
from cliplift.configs.runs import TRAINING, ExportRun
from cliplift.configs.sections import ConfigError
from cliplift.models.factory import save_pretrained
from cliplift.pipelines.checkpoints.folder import COMPLETE, damage
from cliplift.pipelines.checkpoints.saved import TrainedTensors, check_fits, open_checkpoint
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.evaluation.export import write_card
from cliplift.pipelines.runs.folder import CONFIG, RunFolder, classes_of
from cliplift.pipelines.stages.run import read_classes, stage_of

ALONE = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder is one complete checkpoint."""
    return (Path(folder) / COMPLETE).is_file()


def export_checkpoint(run: ExportRun) -> Path:
    """Write the weights of the checkpoint ``run.run``: averaged where it has an average, with the averaged statistics.

    Unlike a finished run's result, BatchNorm's statistics are not recomputed (``precise_batchnorm_batches``).

    Raises:
        ConfigError: the checkpoint is damaged, or is not inside its run's folder.
    """
    path = Path(run.run).resolve()
    if (problem := damage(path)) is not None:
        raise ConfigError(
            f"the checkpoint is damaged ({problem})",
            key="run",
            value=run.run,
            hint="give another one of the run",
        )
    source = RunFolder(_run_of(path, run.run))
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
    save_pretrained(
        model.network,
        output,
        name=config.model.name,
        options=dict(model.options),
        extra=dict(model.card) | {"step": saved.state["step"]},
        weights=model.weights,
    )
    result = {
        "metrics": saved.state["metrics"],
        "classes": list(classes),
        "model": config.model.name,
        "stage": record.get("stage", "?"),
    }
    write_card(source, output, result=result)
    return output


def _run_of(path: Path, given: str) -> Path:
    """The folder of the run a checkpoint belongs to: RUN/checkpoints/STEP or RUN/checkpoints/best/STEP."""
    found = next((folder for folder in path.parents[:3] if (folder / CONFIG).is_file()), None)
    if found is None:
        raise ConfigError(
            f"there is no {CONFIG} above {given!r}, so its network is unknown",
            key="run",
            value=given,
            hint="leave the checkpoint in its run's folder, or copy that folder with it",
        )
    return found
