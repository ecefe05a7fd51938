"""Does masked pretraining pay? A small video ViT on cameras never seen, beside scratch and supervision transfer.

    python benchmarks/masked_study.py --data clips.csv --unlabelled FOLDER... --output study

``clips.csv``, the folds of whole groups (cameras) and the shards are those of ``transfer_study.py``; a folder that it
has begun may be given. What is learned without labels is learned from the training cameras' clips and the unlabelled
folders, for as many steps of as many clips by either objective; every classifier has the same steps, batch and peak
learning rate, none of which was tuned on the tested cameras, and what is tested is its last step. Methods:

* ``scratch``: finetuned from random weights; ``random; probe``: random weights, frozen, a linear classifier
* ``masked``: finetuned after masked pretraining; ``masked; probe``: its frozen mean token with a linear classifier,
  fitted to convergence; ``masked; attentive``: its frozen tokens with an attentive head
* ``transfer``: finetuned after transfer (regression of the teacher's features); ``transfer; probe``: frozen

One JSON line for each finished cell in OUTPUT/masked.jsonl; a study that was stopped goes on where it was. ``--table``
prints the table of what is there.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transfer_study import (
    OBJECTIVES,
    PLAIN_FINETUNE,
    PLAIN_TRANSFER,
    Cell,
    cells,
    features,
    last_of_each,
    make_shards,
    measure_all,
    names,
    rows_of,
    run,
    table,
)

METHODS = (
    "scratch", "masked", "transfer", "random; probe", "masked; probe", "transfer; probe", "masked; attentive",
)  # fmt: skip
# Of all: 8 frames of the whole clip, 64 pixels, so 4 x 8 x 8 tokens of tubelets of 2 frames.
CLIPS = (
    "data.sampling={frames: 8, stride: 1, mode: segments}", "data.crop_pixels=64", "data.resize_short_side_pixels=72",
)  # fmt: skip
NO_BATCHNORM = ("evaluation.precise_batchnorm_batches=0", "engine.channels_last=false")  # in a ViT


@dataclass(frozen=True)
class MaskedStudy:
    """Where everything lies, as in ``transfer_study.Study``, and how long is trained."""

    output: Path
    folds: int
    pretrain_steps: int  # of either objective without labels
    pretrain_batch: int
    finetune_steps: int
    finetune_batch: int
    ratio: float  # of the tokens that are hidden

    def shards(self, fold: int) -> Path:
        return self.output / "shards" / f"fold{fold}"

    def folder(self, *words: object) -> Path:
        return self.output / "runs" / "-".join(str(w).replace("; ", "-") for w in words)


def pretrained(study: MaskedStudy, cell: Cell, objective: str) -> tuple[Path, float]:
    """The folder of the run without labels that a cell starts from, run where it is not there, and its seconds."""
    folder = study.folder("without-labels", objective, cell.student, f"fold{cell.fold}", f"seed{cell.seed}")
    shards = [str(study.shards(cell.fold))]
    shards += [str(path) for path in sorted((study.output / "shards").glob("unlabelled*"))]
    words = [
        f"seed={cell.seed}", f"data.shards={json.dumps(shards)}", "data.val_split=held_out", "data.val_share=0.05",
        "data.order=global", f"model.name={cell.student}", f"schedule.steps={study.pretrain_steps}",
        f"engine.global_batch={study.pretrain_batch}", "evaluation.every_steps=null", *CLIPS,
    ]  # fmt: skip
    if objective == "masked":
        recipe = "pretrain/masked_demo"
        words += [f"masked.ratio={study.ratio}"]
    else:
        recipe = "transfer/small"
        words = [*PLAIN_TRANSFER, *words, *NO_BATCHNORM, *OBJECTIVES["regression"]]
    return folder, float(run(recipe, folder, words)["seconds"])


def finetuned(study: MaskedStudy, cell: Cell, start: Path | None, *, head: bool) -> dict[str, Any]:
    """Accuracy after finetuning from a run folder or from random weights; of an attentive head alone, with ``head``."""
    folder = study.folder("classifier", *asdict(cell).values())
    words = [
        *PLAIN_FINETUNE, f"seed={cell.seed}", f"data.shards={study.shards(cell.fold)}", f"model.name={cell.student}",
        f"schedule.steps={study.finetune_steps}", f"engine.global_batch={study.finetune_batch}",
        f"data.label_share={cell.share}", f"data.subset_seed={cell.seed}",
        # Evaluated once, after the last step: the tested cameras choose nothing.
        "data.val_share=0", "data.val_split=test", *CLIPS, *NO_BATCHNORM,
        f"initialise_from={'null' if start is None else start}",
    ]  # fmt: skip
    if head:
        words += ["train_part=head", "model.options={head: attentive, final_norm: tokens}"]
    found = run("finetune/small", folder, words)
    return {"accuracy": found["metrics"]["accuracy"], "finetune_seconds": round(found["seconds"], 1)}


def probed(study: MaskedStudy, cell: Cell, start: Path | None) -> dict[str, Any]:
    """Accuracy of a linear classifier on the frozen mean token of a run's encoder, or of one of random weights."""
    import torch

    from cliplift.configs.runs import TransferRun
    from cliplift.launch.commands.subject import load_as
    from cliplift.models import create_model, from_pretrained
    from cliplift.pipelines.data.source import ClipSource
    from cliplift.pipelines.probes.pooled import fit_linear

    words = [f"data.shards={study.shards(cell.fold)}", "data.val_share=0", "data.cache_decoded_mib=3000"]
    loaded = load_as("transfer/small", TransferRun, last_of_each([*PLAIN_TRANSFER, *words, *CLIPS])).run
    kept = (start or study.output) / f"tokens-fold{cell.fold}-seed{cell.seed}.pt"
    if not kept.is_file():
        torch.manual_seed(cell.seed)
        network = (
            from_pretrained(start / "weights")
            if start
            else create_model(cell.student, num_classes=0, in_frames=8)
        )
        torch.save(features(loaded, network), kept)
    (train, labels), (test, truth) = torch.load(kept, weights_only=True)
    subset = {"label_share": cell.share, "subset_seed": cell.seed}
    used = set(names(ClipSource(loaded.data.model_copy(update=subset), split="train")))
    rows = [i for i, name in enumerate(names(ClipSource(loaded.data, split="train"))) if name in used]
    classes = int(torch.cat([labels, truth]).max()) + 1
    weight, bias = fit_linear(train[rows], labels[rows], classes=classes, l2=1e-3, steps=200)
    right = ((test @ weight.T + bias).argmax(dim=1) == truth).double()
    return {"accuracy": float(right.mean()), "labelled_clips": len(rows)}


def measure(study: MaskedStudy, cell: Cell) -> dict[str, Any]:
    """The row of a cell."""
    start_name, _, what = cell.method.partition("; ")
    start, more = None, {}
    if start_name in ("masked", "transfer"):
        start, seconds = pretrained(study, cell, start_name)
        clips = study.pretrain_batch * study.pretrain_steps
        more = {"without_labels_seconds": round(seconds, 1), "without_labels_clips": clips}
    if what == "probe":
        return probed(study, cell, start) | more
    return finetuned(study, cell, start, head=what == "attentive") | more


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="CSV: path, label, group")
    parser.add_argument("--unlabelled", type=Path, nargs="*", default=[], help="folders of further videos")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--student", default="video_vit_tiny_8", help="a video_vit_* that takes 64 pixels")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0], help="shares of the labels")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--only-folds", type=int, nargs="+", help="of these, those that are measured")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretrain-steps", type=int, default=240, help="of either objective without labels")
    parser.add_argument("--pretrain-batch", type=int, default=32)
    parser.add_argument("--finetune-steps", type=int, default=150)
    parser.add_argument("--finetune-batch", type=int, default=16)
    parser.add_argument("--ratio", type=float, default=0.9, help="share of the tokens that is hidden")
    parser.add_argument("--table", action="store_true", help="print the table of finished cells and stop")
    arguments = parser.parse_args()
    study = MaskedStudy(
        output=arguments.output.absolute(), folds=arguments.folds, pretrain_steps=arguments.pretrain_steps,
        pretrain_batch=arguments.pretrain_batch, finetune_steps=arguments.finetune_steps,
        finetune_batch=arguments.finetune_batch, ratio=arguments.ratio,
    )  # fmt: skip
    study.output.mkdir(parents=True, exist_ok=True)
    log = study.output / "masked.jsonl"
    if arguments.table:
        rows = rows_of(log)
        print(table(rows, folds=study.folds))
        return
    make_shards(study, arguments.data, arguments.unlabelled)
    plan = cells(
        students=[arguments.student],
        methods=arguments.methods,
        shares=arguments.shares,
        folds=study.folds,
        seeds=arguments.seeds,
    )
    wanted = arguments.only_folds or range(study.folds)
    measure_all(log, [cell for cell in plan if cell.fold in wanted], lambda cell: measure(study, cell))


if __name__ == "__main__":
    main()
