"""The subcommands: what each does, what its words are, and which module runs it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Command:
    """One subcommand: what it does, what its first word is, and the extra options it takes.

    An empty ``subject`` means that there is none.
    ``handled_by`` is the module of ``cliplift.launch`` whose ``run_COMMAND`` does it.
    """

    summary: str
    subject: str = "CONFIG"
    subject_help: str = "YAML file, or the name of a packaged recipe such as transfer/demo"
    subject_required: bool = True
    rest: str = "key=value"
    rest_help: str = "overrides of config keys, such as optim.lr=3e-4"
    schema: str | None = None
    distributed: bool = False
    handled_by: str = "commands.train"


RUN_OR_CONFIG = "run or export folder, or a YAML file"
COMMANDS: dict[str, Command] = {
    "shard": Command(summary="pack videos into WebDataset shards", schema="shard"),
    "verify": Command(
        summary="check a shard dataset: checksums, index against tar, decodability",
        subject="URL",
        subject_help="folder or URL of a shard dataset",
        rest="",
    ),
    "show": Command(
        summary="write an HTML contact sheet and statistics of a shard dataset",
        subject="URL",
        subject_help="folder or URL of a shard dataset",
        rest="",
    ),
    "index": Command(
        summary="index WebDataset tars made by other tools, so that training can read them exactly",
        subject="URL",
        subject_help="folder or URL of the tars; the folder a tar lies in is its split",
        rest="",
    ),
    "transfer": Command(
        summary="2D to 3D supervision transfer: does this frame belong to this clip?",
        schema="transfer",
        distributed=True,
    ),
    "pretrain": Command(
        summary="pretrain a backbone on labels, or by predicting frames", schema="pretrain", distributed=True
    ),
    "finetune": Command(summary="finetune on a target dataset and test", schema="finetune", distributed=True),
    "evaluate": Command(
        summary="evaluate a run on a split",
        subject="RUN|CONFIG",
        subject_help=RUN_OR_CONFIG,
        schema="evaluate",
        distributed=True,
    ),
    "fuse": Command(
        summary="fuse the predictions of several runs, such as an RGB and a flow stream",
        subject="RUN|CONFIG",
        subject_help="run that was evaluated, its evaluation, or a YAML file",
        rest="RUN|key=value",
        rest_help="the other runs, and overrides of config keys such as weights=[1,1.5]",
        schema="fuse",
    ),
    "predict": Command(
        summary="classify video files",
        subject="RUN|CONFIG",
        subject_help=RUN_OR_CONFIG,
        rest="VIDEO|key=value",
        rest_help="videos (files or folders) and overrides of config keys",
        schema="predict",
    ),
    "explain": Command(
        summary="heat maps over videos: where the evidence for a class lies",
        subject="RUN|CONFIG",
        subject_help=RUN_OR_CONFIG,
        rest="VIDEO|key=value",
        rest_help="videos (files or folders) and overrides of config keys",
        schema="explain",
    ),
    "report": Command(
        summary="one self-contained HTML page about runs",
        subject="RUN|CONFIG",
        subject_help="run or demo folder, or a YAML file",
        rest="RUN|key=value",
        rest_help="more run folders, and overrides of config keys",
        schema="report",
    ),
    "export": Command(
        summary="write a run's weights as safetensors + config.json",
        subject="RUN|CONFIG",
        subject_help="run folder, or a YAML file",
        rest="FOLDER|key=value",
        rest_help="folder to write, and overrides of config keys",
        schema="export",
    ),
    "import-weights": Command(
        summary="turn another project's weights file into an export folder of one of our models",
        subject="SOURCE",
        subject_help="weights file (.safetensors, .pth, .pyth, .bin), export folder, or 2d: and a 2D network's file",
        rest="",
        handled_by="commands.models",
    ),
    "models": Command(
        summary="list the models, with parameters and GMACs measured",
        subject="PATTERN",
        subject_help="shell pattern of names, such as 't3d*'",
        subject_required=False,
        rest="",
    ),
    "check": Command(
        summary="will it work, fit and end in time? a run's data, shapes, memory and hours, before it is queued",
        handled_by="check.fit",
    ),
    "submit": Command(
        summary="write the scripts of Slurm, Kubernetes or this machine for one or several configs, and run them",
        rest="CONFIG|key=value",
        rest_help="configs that follow, each after the one before it has succeeded; overrides of a single config",
        handled_by="commands.submit",
    ),
    "bench": Command(
        summary="measure on this machine: a run's loader (data), its training step (train), or a GPU (gpu, no CONFIG)",
        subject="data|train|gpu",
        subject_help="what is measured",
        rest="CONFIG|key=value",
        rest_help="YAML file or packaged recipe of a training run, then overrides",
        distributed=True,
        handled_by="commands.bench",
    ),
    "doctor": Command(
        summary="what this machine has: versions, GPUs, decoders, limits",
        subject="",
        rest="",
        handled_by="check.doctor",
    ),
    "demo": Command(
        summary="the whole chain on clips made on the spot, on a CPU in minutes",
        subject_required=False,
        subject_help="YAML file; none is needed",
        schema="demo",
    ),
}
