"""Does transfer pay? Accuracy on cameras never seen, by method, share of the labels, fold and seed.

    python benchmarks/transfer_study.py --data clips.csv --unlabelled FOLDER... --output study

``clips.csv`` has the columns path, label and group; whole groups (cameras) are held out, so that every clip is tested
once. What is learned without labels is learned from the training cameras' clips and the unlabelled folders. Methods:

* ``frames``: the frozen teacher on every frame, averaged, a linear classifier (fitted to convergence by L-BFGS)
* ``frames and spread``: with the deviation of every feature over the frames beside its mean
* ``scratch``: the student from random weights; ``inflated``: from its 2D counterpart's ImageNet weights
* ``differences; probe``: frozen, the same with a quarter of the channels as what changes from frame to frame
* ``OBJECTIVE``: the student from transfer with that objective, all of it finetuned
* ``OBJECTIVE; probe``, ``inflated; probe``: its frozen features with the linear classifier of ``frames``

Students are models of ``cliplift models``, or those of ``STUDENTS``: ``efficientnet_lite0_tam, deviation`` gives out
the deviation over time of its features beside their mean. A student that has a 2D counterpart starts transfer as that
network and learns in it only what ``STARTS_AS_2D`` leaves free; from 2D weights and from transfer alike it is finetuned
as that says. ``inflated_study.py`` runs these students on stored maps, at a fraction of the price. Every finetuning has
the same steps, batch and peak learning rate, none of which was tuned on the tested cameras, and what is tested is its
last step. One JSON line for each finished cell in OUTPUT/rows.jsonl; cells come in order of their worth, and a study
that was stopped goes on where it was. ``--table`` prints the table of what is there.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cliplift.configs.training import ModelConfig

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

SHARES = (1.0, 0.25, 0.1)
OBJECTIVES: Mapping[str, tuple[str, ...]] = {
    "regression": ("correspondence.objective=regression", "correspondence.time_steps=1"),
    "regression, 4 parts": ("correspondence.objective=regression", "correspondence.time_steps=4"),
    "regression, 4 cosines": (
        "correspondence.objective=regression", "correspondence.time_steps=4", "correspondence.time_basis=cosines",
    ),
    "transfer, ridge": (
        "correspondence.objective=regression", "correspondence.time_steps=8", "correspondence.time_basis=spread",
        "correspondence.predictor_start=ridge",
    ),
    "bank": ("correspondence.objective=bank", "correspondence.time_steps=1"),
    "bank, 4 parts and orders": (
        "correspondence.objective=bank", "correspondence.time_steps=4", "correspondence.order_negatives=3",
    ),
    "infonce": ("correspondence.objective=infonce", "correspondence.time_steps=1"),
    "paper": (
        "correspondence.objective=paper", "correspondence.time_steps=1", "correspondence.negatives_per_clip=8",
        "correspondence.normalise_features=true",
    ),
}  # fmt: skip
# Of every run, whatever the recipes say; what differs between students follows.
PLAIN = (
    "model.pretrained=null", "model.options={}", "model.frozen=[]", "frozen_batchnorm=false", "data.crop_pixels=80",
    "data.resize_short_side_pixels=88", "evaluation.precise_batchnorm_batches=8",
)  # fmt: skip
PLAIN_TRANSFER = (
    *PLAIN, "optim.lr=2e-3", "correspondence.time_basis=parts", "correspondence.predictor_start=random",
)  # fmt: skip
PLAIN_FINETUNE = (*PLAIN, "optim.lr=1e-3", "optim.layer_decay=1.0", "classifier_start=random")
HELD_FINETUNE = ("frozen_batchnorm=true", "optim.layer_decay=0.8", "evaluation.precise_batchnorm_batches=0")
DEVIATION = "efficientnet_lite0_tam, deviation"
STUDENTS: Mapping[str, tuple[str, ...]] = {
    DEVIATION: (
        "model.name=efficientnet_lite0_tam", "model.options={pooling: mean_deviation}", "data.crop_pixels=160",
        "data.resize_short_side_pixels=176",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class StartsAs2D:
    """How a student is trained that starts as its 2D counterpart: what sees edges and textures stays as it is, and
    BatchNorm keeps the statistics of a million pictures, which batches of a few scenes would spoil."""

    transfer: tuple[str, ...]
    finetune: tuple[str, ...]


STARTS_AS_2D: Mapping[str, StartsAs2D] = {
    # Transfer teaches it time alone: the weights that mix a frame with its neighbours.
    "efficientnet_lite0_tam": StartsAs2D(
        transfer=('model.frozen=["stem.*","blocks.*.layers.*","head.*","blocks.[0-7].*"]', "optim.lr=3e-3"),
        finetune=(*HELD_FINETUNE, 'model.frozen=["stem.*","blocks.[0-7].*"]'),
    ),
    DEVIATION: StartsAs2D(
        transfer=('model.frozen=["stem.*","blocks.?.*","blocks.1[01].*"]', "optim.lr=3e-4"),
        finetune=(
            *HELD_FINETUNE, 'model.frozen=["stem.*","blocks.?.*","blocks.1[01].*"]', "classifier_start=linear",
            "optim.lr=1e-4",
        ),
    ),
}  # fmt: skip
FRAMES = {
    "frames": "",
    "frames and spread": "spread-",
}  # the teacher's, and how the files of their features begin
WITHOUT_TRANSFER: Mapping[str, Mapping[str, float]] = {  # frozen, with these options
    "inflated; probe": {}, "differences; probe": {"difference_share": 0.25},
}  # fmt: skip
NEED_2D = ("inflated", "differences", "transfer, ridge")  # methods, by how they begin


@dataclass(frozen=True)
class Cell:
    """One number of the study."""

    method: str
    student: str
    share: float  # of the labels
    fold: int
    seed: int

    @property
    def name(self) -> str:
        return " ".join(str(value) for value in asdict(self).values())


@dataclass(frozen=True)
class Study:
    """Where everything lies, and how long is trained."""

    output: Path
    folds: int
    transfer_steps: int
    finetune_steps: int
    transfer_batch: int
    finetune_batch: int

    def shards(self, fold: int) -> Path:
        return self.output / "shards" / f"fold{fold}"

    def folder(self, *words: object) -> Path:
        return self.output / "runs" / "-".join(str(w).replace(" ", "_").replace(",", "") for w in words)


def cells(
    *,
    students: Sequence[str],
    methods: Sequence[str],
    shares: Sequence[float],
    folds: int,
    seeds: Sequence[int],
) -> Iterator[Cell]:
    """All cells, the most telling first: a cut study has whole folds, in which every method can be compared."""
    for seed, share, student, fold, method in itertools.product(
        seeds, shares, students, range(folds), methods
    ):
        if not method.startswith(NEED_2D) or student in STARTS_AS_2D:
            yield Cell(method, student, share, fold, seed)


def words_of(student: str) -> tuple[str, ...]:
    """What a run says of its student and of what that sees."""
    return STUDENTS.get(student, (f"model.name={student}",))


def last_of_each(words: Sequence[str]) -> list[str]:
    """Of several words for one key the last."""
    return list({word.partition("=")[0]: word for word in words}.values())


def held_out_groups(rows: Sequence[Mapping[str, str]], folds: int) -> list[set[str]]:
    """Groups of each fold: the largest first, each to the fold with the fewest clips so far."""
    sizes = Counter(row["group"] for row in rows)
    found: list[set[str]] = [set() for _ in range(folds)]
    for group, _ in sizes.most_common():
        min(found, key=lambda fold: sum(sizes[g] for g in fold)).add(group)
    return found


def make_shards(study: Study, data: Path, unlabelled: Sequence[Path]) -> None:
    """One data set for each fold, split by group, and one of the unlabelled folders; what is there is kept."""
    from cliplift.configs.sharding import ShardRun
    from cliplift.launch.commands.subject import load_tree
    from cliplift.sharding.build.run import run_shard

    rows = list(csv.DictReader(data.open()))
    classes = sorted({row["label"] for row in rows})
    transcode = {"short_side_pixels": 160, "max_fps": 4}
    trees: list[tuple[Path, dict[str, Any], dict[str, Any]]] = []
    for fold, held_out in enumerate(held_out_groups(rows, study.folds)):
        listing = study.output / f"fold{fold}.csv"
        with listing.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "group", "split"])
            for row in rows:
                split = "test" if row["group"] in held_out else "train"
                path = data.parent.absolute() / row["path"]
                writer.writerow([path, row["label"], row["group"], split])
        source: dict[str, Any] = {
            "kind": "csv",
            "file": str(listing),
            "split_column": "split",
            "group_column": "group",
        }
        trees.append((study.shards(fold), source, {}))
    for number, folder in enumerate(unlabelled):
        # Unlabelled, but of the same classes as what they are read together with.
        source = {"kind": "folder", "root": str(folder), "layout": "flat", "classes": classes}
        cut = {"kind": "windows", "length_seconds": 10.0, "max_per_video": 2}
        trees.append(
            (
                study.output / "shards" / f"unlabelled{number}",
                source,
                {"cut": cut, "limits": {"max_refused_share": 0.5}},
            )
        )
    for output, source, more in trees:
        if not (output / "dataset.json").is_file():
            tree = {
                "stage": "shard",
                "name": output.name,
                "output": str(output),
                "source": source,
                "transcode": transcode,
            } | more
            run_shard(load_tree(tree, ShardRun, ["workers=1"]).run)


def transferred(study: Study, cell: Cell, objective: str) -> tuple[Path, float]:
    """The run folder of the transfer a cell starts from, run where it is not there, and the seconds it took."""
    folder = study.folder("transfer", objective, cell.student, f"fold{cell.fold}", f"seed{cell.seed}")
    shards = [str(study.shards(cell.fold))]
    shards += [str(path) for path in sorted((study.output / "shards").glob("unlabelled*"))]
    words = [
        *PLAIN_TRANSFER, f"seed={cell.seed}", f"data.shards={json.dumps(shards)}", *words_of(cell.student),
        f"schedule.steps={study.transfer_steps}", f"engine.global_batch={study.transfer_batch}",
        *OBJECTIVES[objective],
    ]  # fmt: skip
    if cell.student in STARTS_AS_2D:
        words += [
            "model.pretrained=2d:imagenet",
            "frozen_batchnorm=true",
            "evaluation.precise_batchnorm_batches=0",
        ]
        words += STARTS_AS_2D[cell.student].transfer
    return folder, run("transfer/small", folder, words)["seconds"]


def run(recipe: str, folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """Run a recipe with these changes, or find it run; its result."""
    from cliplift.launch.commands.subject import load_training
    from cliplift.pipelines.stages.run import run_stage

    common = [f"output={folder}", "track.wandb=disabled", "data.cache_decoded_mib=3000"]
    result = run_stage(load_training(recipe, last_of_each([*words, *common])).run, command=["study"])
    if not result.finished:
        raise SystemExit("stopped by a signal; start it again to continue")
    return {"metrics": dict(result.metrics), "seconds": result.seconds}


def finetuned(study: Study, cell: Cell, start: Path | None) -> dict[str, Any]:
    """Accuracy after finetuning from a run folder, or from random or 2D weights."""
    folder = study.folder("finetune", *asdict(cell).values())
    words = [
        *PLAIN_FINETUNE, f"seed={cell.seed}", f"data.shards={study.shards(cell.fold)}", *words_of(cell.student),
        f"schedule.steps={study.finetune_steps}", f"engine.global_batch={study.finetune_batch}",
        f"data.label_share={cell.share}", f"data.subset_seed={cell.seed}",
        # Evaluated once, after the last step: the tested cameras choose nothing.
        "data.val_share=0", "data.val_split=test",
        f"initialise_from={'null' if start is None else start}",
    ]  # fmt: skip
    if cell.student in STARTS_AS_2D and cell.method != "scratch":
        words += STARTS_AS_2D[cell.student].finetune
    if cell.method == "inflated":
        words.append("model.pretrained=2d:imagenet")
    found = run("finetune/small", folder, words)
    return {"accuracy": found["metrics"]["accuracy"], "finetune_seconds": round(found["seconds"], 1)}


def probed(study: Study, cell: Cell, weights: Path | None) -> dict[str, Any]:
    """Accuracy of a linear classifier on frozen features: of a run's student, of the student as its 2D counterpart, or
    of the teacher's frames."""
    import torch

    from cliplift.configs.runs import TransferRun
    from cliplift.launch.commands.subject import load_as
    from cliplift.models import from_pretrained
    from cliplift.pipelines.data.source import ClipSource
    from cliplift.pipelines.probes.pooled import fit_linear

    words = [
        *PLAIN_TRANSFER,
        f"data.shards={study.shards(cell.fold)}",
        "data.val_share=0",
        *words_of(cell.student),
    ]
    words.append("data.cache_decoded_mib=3000")
    if cell.method in FRAMES:  # as large as the teacher sees them in transfer
        words += ["data.crop_pixels=160", "data.resize_short_side_pixels=176"]
    run: TransferRun = load_as("transfer/small", TransferRun, last_of_each(words)).run
    prefix = FRAMES.get(cell.method, "")
    if cell.method in WITHOUT_TRANSFER:
        prefix = f"{cell.method.removesuffix('; probe')}-{run.model.options.get('pooling', 'mean')}-"
    kept = (weights or study.output) / f"{prefix}features-fold{cell.fold}.pt"
    if not kept.is_file():
        network = from_pretrained(weights / "weights") if weights else image_network(cell, run.model)
        torch.save(features(run, network), kept)
    (train, labels), (test, truth) = torch.load(kept, weights_only=True)
    subset = {"label_share": cell.share, "subset_seed": cell.seed}
    used = set(names(ClipSource(run.data.model_copy(update=subset), split="train")))
    rows = [i for i, name in enumerate(names(ClipSource(run.data, split="train"))) if name in used]
    classes = int(torch.cat([labels, truth]).max()) + 1
    weight, bias = fit_linear(train[rows], labels[rows], classes=classes, l2=1e-3, steps=200)
    right = ((test @ weight.T + bias).argmax(dim=1) == truth).double()
    return {"accuracy": float(right.mean()), "labelled_clips": len(rows)}


def image_network(cell: Cell, student: ModelConfig) -> Any:
    """The teacher on every frame, or the student as the network it begins as."""
    from cliplift.models import create_model

    if cell.method == "frames":
        return create_model(
            "frame_average", num_classes=0, in_frames=8, encoder="efficientnet_lite0", pretrained="imagenet"
        )
    if cell.method in FRAMES:
        return mean_and_spread(create_model("efficientnet_lite0", num_classes=0, pretrained="imagenet"))
    options = {**student.options, **WITHOUT_TRANSFER[cell.method]}
    return create_model(student.name, num_classes=0, in_frames=8, pretrained="2d:imagenet", **options)


def mean_and_spread(encoder: Any) -> Any:
    """A network of clips (B, C, T, H, W): the mean and the deviation over the frames of an image network's features."""
    import torch

    class Spread(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.input_spec = encoder, encoder.input_spec

        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            frames = self.encoder(clips.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(clips), -1))
            return torch.cat([frames.mean(dim=1), frames.std(dim=1, correction=0)], dim=1)

    return Spread()


def features(run: Any, network: Any) -> list[tuple[Any, Any]]:
    """Features (N, D) and labels (N,) of the training and the test split."""
    import torch

    from cliplift.pipelines.distributed.collectives import Topology
    from cliplift.pipelines.probes.pooled import features_of

    one = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    with torch.no_grad():
        return [
            features_of(network.eval(), run.data, split, run=run, topology=one) for split in ("train", "test")
        ]


def names(source: Any) -> list[str]:
    """The name of every sample of a source."""
    return [source.name_of(i) for i in range(len(source))]


def measure(study: Study, cell: Cell) -> dict[str, Any]:
    """The row of a cell."""
    if cell.method in FRAMES or cell.method in WITHOUT_TRANSFER:
        return probed(study, cell, None)
    if cell.method in ("scratch", "inflated"):
        return finetuned(study, cell, None)
    objective, _, probe = cell.method.partition("; ")
    start, seconds = transferred(study, cell, objective)
    found = probed(study, cell, start) if probe else finetuned(study, cell, start)
    clips = study.transfer_batch * study.transfer_steps
    return found | {"transfer_seconds": round(seconds, 1), "transfer_clips": clips}


def table(rows: Sequence[Mapping[str, Any]], *, folds: int) -> str:
    """Mean over the folds of each seed, then mean and sample deviation over seeds, as Markdown."""
    found: dict[tuple[str, str, float], dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        found[row["student"], row["method"], row["share"]][row["seed"]][row["fold"]] = row["accuracy"]
    lines = [
        "| student | method | labels | accuracy | seeds | by fold |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (student, method, share), seeds in found.items():
        whole = [statistics.fmean(by.values()) for by in seeds.values() if len(by) == folds]
        if not whole:
            continue
        spread = f" ± {statistics.stdev(whole):.2f}" if len(whole) > 1 else ""
        by_fold = " ".join(
            f"{statistics.fmean(by[fold] for by in seeds.values() if len(by) == folds):.2f}"
            for fold in range(folds)
        )
        lines.append(
            f"| {student} | {method} | {share:g} | {statistics.fmean(whole):.2f}{spread} | {len(whole)} | {by_fold} |"
        )
    return "\n".join(lines)


def rows_of(log: Path) -> list[dict[str, Any]]:
    """The finished cells of a study."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


def measure_all(log: Path, plan: Iterable[Cell], measured: Callable[[Cell], dict[str, Any]]) -> None:
    """Every cell of the plan that the log does not have, in its order, each written when it is done."""
    keys = ("method", "student", "share", "fold", "seed")
    finished = {Cell(**{key: row[key] for key in keys}) for row in rows_of(log)}
    for cell in plan:
        if cell in finished:
            continue
        began, cpu = time.monotonic(), time.process_time()
        row = asdict(cell) | measured(cell)
        row |= {
            "wall_seconds": round(time.monotonic() - began, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
        }
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="CSV: path, label, group")
    parser.add_argument("--unlabelled", type=Path, nargs="*", default=[], help="folders of further videos")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--students", nargs="+", default=["t3d_tiny"])
    both = [m for name in OBJECTIVES for m in (name, f"{name}; probe")]
    parser.add_argument(
        "--methods", nargs="+", default=[*FRAMES, "scratch", "inflated", *WITHOUT_TRANSFER, *both]
    )
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="shares of the labels")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--transfer-steps", type=int, default=240)
    parser.add_argument("--transfer-batch", type=int, default=32)
    parser.add_argument("--finetune-steps", type=int, default=150)
    parser.add_argument("--finetune-batch", type=int, default=16)
    parser.add_argument(
        "--shards", action="store_true", help="make the shards, for inflated_study.py, and stop"
    )
    parser.add_argument("--table", action="store_true", help="print the table of finished cells and stop")
    arguments = parser.parse_args()
    study = Study(
        output=arguments.output.absolute(), folds=arguments.folds,
        transfer_steps=arguments.transfer_steps, finetune_steps=arguments.finetune_steps,
        transfer_batch=arguments.transfer_batch, finetune_batch=arguments.finetune_batch,
    )  # fmt: skip
    study.output.mkdir(parents=True, exist_ok=True)
    log = study.output / "rows.jsonl"
    if arguments.table:
        print(table(rows_of(log), folds=study.folds))
        return
    make_shards(study, arguments.data, arguments.unlabelled)
    if arguments.shards:
        return
    plan = cells(
        students=arguments.students,
        methods=arguments.methods,
        shares=arguments.shares,
        folds=study.folds,
        seeds=arguments.seeds,
    )
    measure_all(log, plan, lambda cell: measure(study, cell))


if __name__ == "__main__":
    main()
