"""A student that begins as the teacher's own network, inflated: what does transfer add? Cameras never seen.

    python benchmarks/transfer_study.py --data clips.csv --unlabelled FOLDER... --output study --methods frames
    python benchmarks/inflated_study.py --data clips.csv --study study

``efficientnet_lite0_tam`` with ImageNet weights, of which the stem and the first blocks are held and BatchNorm keeps
its statistics. So the map behind the held blocks is computed once for each of several augmented views of a clip, and
only the rest is trained, which is several times cheaper on a CPU than whole networks and otherwise the same. Methods:

* ``frames``: the frozen teacher's frames as ``transfer_study.py`` keeps them, a linear classifier
* ``inflated``: finetuned from the ImageNet weights; ``inflated; probe``: frozen, a linear classifier
* ``transfer``: before that, regression onto the cosines of the teacher's features over four parts of the clip, which
  trains the weights over time and nothing else of the student; ``transfer; probe``: frozen
* ``transfer, ridge``: the same, but the predictor starts as the ridge regression on the student's features

One JSON line for each cell in STUDY/inflated.jsonl; what is there is not done again. ``--table`` prints the table. The
learning rates were chosen on cameras of the first fold's training clips.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transfer_study import held_out_groups, table

from cliplift.configs.runs import TransferRun
from cliplift.configs.training import OptimConfig, ScheduleConfig
from cliplift.launch.commands.subject import load_as
from cliplift.models import create_model
from cliplift.pipelines.data.augment import DeviceAugment
from cliplift.pipelines.data.eval_loader import EvalLoader
from cliplift.pipelines.data.loader import ClipLoader
from cliplift.pipelines.data.source import ClipSource
from cliplift.pipelines.engine.optim import Schedule, parameter_groups
from cliplift.pipelines.probes.pooled import fit_linear
from cliplift.pipelines.stages.starting_weights import freeze_batchnorm
from cliplift.pipelines.stages.teacher import cosines, ridge

STUDENT, WEIGHTS = "efficientnet_lite0_tam", "2d:imagenet"
HELD_BLOCKS = 8  # of 16, with the stem
VIEWS = 6  # augmented views of each clip
PARTS = 4
TEACHER_PIXELS, TEACHER_SHORT_SIDE = 160, 176
TRANSFER_LR, TRANSFER_STEPS = 3e-3, 40
FINETUNE_LR, FINETUNE_STEPS, LAYER_DECAY = 1e-3, 25, 0.8
BATCH = 16
RIDGE, RIDGE_PENALTY = "transfer, ridge", 1.0  # the penalty is the option's default
METHODS = (
    "frames", "inflated; probe", "transfer; probe", f"{RIDGE}; probe", "inflated", "transfer", RIDGE,
)  # fmt: skip

Clip = tuple[str, float]  # source file, where the clip starts in it, seconds


class Rest(nn.Module):
    """The student behind its held blocks, BatchNorm in eval mode: maps (B, T, C, H, W) -> features (B, 1280)."""

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        network: Any = create_model(STUDENT, num_classes=num_classes, in_frames=8, pretrained=WEIGHTS)
        self.blocks = nn.ModuleList(network.blocks[HELD_BLOCKS:])
        self.head, self.classifier = network.head, network.classifier
        freeze_batchnorm(self)
        self.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

    def forward(self, maps: Tensor) -> Tensor:
        B, T = maps.shape[:2]
        flat = maps.float().flatten(0, 1).contiguous(memory_format=torch.channels_last)
        y = flat.reshape(B, T, *flat.shape[1:])
        for block in self.blocks:
            y = block(y)
        features: Tensor = self.head(y.flatten(0, 1)).mean(dim=(2, 3))
        return features.reshape(B, T, -1).mean(dim=1)

    def checkpoint_blocks(self) -> list[str]:
        return [f"blocks.{i}" for i in range(len(self.blocks))]


class Predicts(nn.Module):
    """The student and the linear predictor of the teacher's coefficients."""

    def __init__(self, rest: Rest) -> None:
        super().__init__()
        rest.classifier = nn.Identity()
        self.network, self.predictor = rest, nn.Linear(1280, PARTS * 1280)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, T, C, H, W) -> (B, PARTS, 1280)."""
        guess: Tensor = self.predictor(self.network(maps))
        return guess.unflatten(1, (PARTS, 1280))


@torch.no_grad()
def stored(shards: Path, split: str, words: Sequence[str]) -> dict[Clip, dict[str, Tensor]]:
    """Of every clip of a split: maps behind the held blocks in fp16, ``plain`` (T, C, H, W) and ``views``
    (VIEWS, T, C, H, W), and ``teacher`` (PARTS, 1280)."""
    network: Any = create_model(STUDENT, num_classes=0, in_frames=8, pretrained=WEIGHTS)
    network.to(memory_format=torch.channels_last).eval()
    teacher = create_model("efficientnet_lite0", num_classes=0, pretrained="imagenet").eval()

    def maps(clips: Tensor) -> Tensor:
        frames = clips.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        y = network.stem(frames)
        y = y.reshape(len(clips), -1, *y.shape[1:])
        for block in network.blocks[:HELD_BLOCKS]:
            y = block(y)
        return y.half()

    common = [f"data.shards={shards}", f"data.split={split}", "data.val_share=0", "data.val_split=train"]
    run = load_as("transfer/small", TransferRun, [*common, *words]).run
    sharp = [f"data.crop_pixels={TEACHER_PIXELS}", f"data.resize_short_side_pixels={TEACHER_SHORT_SIDE}"]
    large = load_as("transfer/small", TransferRun, [*common, *words, *sharp]).run
    views = {
        training: DeviceAugment(run.data.augment, network.input_spec, training=training)
        for training in (True, False)
    }
    samples = clips_of(ClipSource(run.data, split=split))
    found: dict[Clip, dict[str, Any]] = {clip: {"views": []} for clip in samples}
    for data, key in ((run.data, "plain"), (large.data, "teacher")):
        for batch in EvalLoader(data, split=split, batch=BATCH, rank=0, world_size=1):
            clips = views[False](batch)
            if key == "plain":
                rows = maps(clips)
            else:
                frames = teacher(clips.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(clips), PARTS, -1))
                rows = frames.mean(dim=2)
            for sample, row in zip(batch.sample_index.tolist(), rows, strict=True):
                found[samples[sample]][key] = row.clone()
    loader = ClipLoader(run.data, seed=0, global_batch=1, micro_batch=1, rank=0, world_size=1)
    for batch in loader.micro_batches(start_step=0, stop_step=VIEWS * len(samples)):
        found[samples[int(batch.sample_index)]]["views"].append(maps(views[True](batch))[0])
    return {clip: row | {"views": torch.stack(row["views"])} for clip, row in found.items()}


def clips_of(source: ClipSource) -> list[Clip]:
    """What the samples of a source are cut from."""
    tables: dict[str, dict[str, Clip]] = {}
    found = []
    for i in range(len(source)):
        folder, key = source.name_of(i).rsplit(" ", 1)
        if folder not in tables:
            rows = pq.read_table(Path(folder) / "samples.parquet").to_pydict()
            starts = zip(rows["source"], (round(s, 3) for s in rows["start_seconds"]), strict=True)
            tables[folder] = dict(zip(rows["key"], starts, strict=True))
        found.append(tables[folder][key])
    return found


@dataclass(frozen=True)
class Fold:
    """The clips of a fold by split, with their classes."""

    train: list[tuple[Clip, int]]
    test: list[tuple[Clip, int]]

    def labelled(self, share: float, *, seed: int) -> list[tuple[Clip, int]]:
        """A share of each class's training clips, one at least."""
        if share == 1:
            return self.train
        generator, found = torch.Generator().manual_seed(1000 + seed), []
        for label in sorted({label for _, label in self.train}):
            own = [row for row in self.train if row[1] == label]
            count = max(1, round(share * len(own)))
            found += [own[i] for i in torch.randperm(len(own), generator=generator)[:count].tolist()]
        return found


def batches(clips: Sequence[Tensor], *, steps: int, seed: int) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers of clips, pass by pass in a new order, and one of the views (VIEWS, ...) of each."""
    generator, order = torch.Generator().manual_seed(seed), list[int]()
    for _ in range(steps):
        rows: list[int] = []
        while len(rows) < min(BATCH, len(clips)):
            if not order:
                order = torch.randperm(len(clips), generator=generator).tolist()
            rows.append(order.pop())
        views = [clips[row] for row in rows]
        chosen = [v[int(torch.randint(len(v), (1,), generator=generator))] for v in views]
        yield rows, torch.stack(chosen)


def fit(
    module: nn.Module,
    loss_of: Callable[[list[int], Tensor], Tensor],
    clips: Sequence[Tensor],
    *,
    steps: int,
    seed: int,
    optim: OptimConfig,
) -> float:
    """Train a module; the mean loss of the last five steps."""
    groups: list[dict[str, Any]] = [
        {**group, "lr": optim.lr * group["lr_factor"]} for group in parameter_groups(module, optim)
    ]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, fused=True)
    schedule = Schedule(ScheduleConfig(name="cosine", steps=steps, warmup_share=0.1), total_steps=steps)
    trained, losses = [p for p in module.parameters() if p.requires_grad], []
    for step, (rows, maps) in enumerate(batches(clips, steps=steps, seed=seed)):
        schedule.apply(optimizer, step, optim.lr)
        loss = loss_of(rows, maps)
        loss.backward()
        losses.append(loss.item())
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return sum(losses[-5:]) / len(losses[-5:])


class Study:
    """The clips, folds and finished cells of a study folder."""

    def __init__(self, folder: Path, data: Path, *, folds: int) -> None:
        self.folder, self.log = folder, folder / "inflated.jsonl"
        rows = list(csv.DictReader(data.open()))
        classes = sorted({row["label"] for row in rows})
        self.folds = []
        for held_out in held_out_groups(rows, folds):
            split: dict[bool, list[tuple[Clip, int]]] = {True: [], False: []}
            for row in rows:
                clip = str(data.parent.absolute() / row["path"]), 0.0
                split[row["group"] in held_out].append((clip, classes.index(row["label"])))
            self.folds.append(Fold(train=split[False], test=split[True]))

    @cached_property
    def clips(self) -> dict[Clip, dict[str, Tensor]]:
        """Everything stored of every clip, made where it is not there."""
        kept = self.folder / f"maps-{HELD_BLOCKS}-blocks.pt"
        if not kept.is_file():
            words, shards = ["data.cache_decoded_mib=3000"], self.folder / "shards"
            found = stored(shards / "fold0", "train", words) | stored(shards / "fold0", "test", words)
            for folder in sorted(shards.glob("unlabelled*")):
                found |= stored(folder, "train", words)
            torch.save(found, kept)
        loaded: dict[Clip, dict[str, Tensor]] = torch.load(kept, weights_only=True)
        return loaded

    def transferred(self, kind: str, fold: int, seed: int) -> dict[str, Tensor]:
        """The student's weights after transfer on the fold's training clips and the unlabelled ones."""
        name = "ridge" if kind == RIDGE else "transfer"
        kept = self.folder / f"inflated-{name}-fold{fold}-seed{seed}.pt"
        if not kept.is_file():
            labelled = {clip for part in (self.folds[0].train, self.folds[0].test) for clip, _ in part}
            training = {clip for clip, _ in self.folds[fold].train}
            clips = [row for clip, row in self.clips.items() if clip in training or clip not in labelled]
            began = time.process_time()
            weights, loss = transfer(clips, seed=seed, ridge_start=kind == RIDGE)
            torch.save(weights, kept)
            self.write(kind=kind, fold=fold, seed=seed, loss=loss, began=began)
        state: dict[str, Tensor] = torch.load(kept, weights_only=True)
        return state

    def measure(self, method: str, share: float, fold: int, seed: int) -> None:
        """Write the row of a cell."""
        kind, _, probe = method.partition("; ")
        train, test = self.folds[fold].labelled(share, seed=seed), self.folds[fold].test
        if kind == "frames":
            began = time.process_time()
            accuracy, loss = self._frames(fold, train), None
        else:
            start = {} if kind == "inflated" else self.transferred(kind, fold, seed)
            rows = [[(self.clips[clip], label) for clip, label in part] for part in (train, test)]
            began = time.process_time()
            torch.manual_seed(seed)
            network = Rest(num_classes=1 + max(label for _, label in test))
            network.load_state_dict(start, strict=False)
            accuracy, loss = (probed if probe else finetuned)(network, *rows, seed=seed)
        self.write(
            method=method, share=share, fold=fold, seed=seed, accuracy=accuracy, loss=loss, began=began
        )

    def _frames(self, fold: int, train: Sequence[tuple[Clip, int]]) -> float:
        kept = torch.load(self.folder / f"features-fold{fold}.pt", weights_only=True)
        (features, labels), (test, truth) = kept
        words = [f"data.shards={self.folder}/shards/fold{fold}", "data.val_share=0"]
        run = load_as("transfer/small", TransferRun, words).run
        at = {clip: i for i, clip in enumerate(clips_of(ClipSource(run.data, split="train")))}
        rows = [at[clip] for clip, _ in train]
        return linear(features[rows], labels[rows], test, truth)

    def write(self, *, began: float, **row: Any) -> None:
        row |= {"student": STUDENT, "cpu_seconds": round(time.process_time() - began, 1)}
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    @property
    def finished(self) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines() if self.log.is_file() else []
        return [row for row in map(json.loads, lines) if "method" in row]


def transfer(
    clips: Sequence[dict[str, Tensor]], *, seed: int, ridge_start: bool
) -> tuple[dict[str, Tensor], float]:
    """Regression onto the standardised coefficients over the parts, of the weights over time; weights and loss."""
    torch.manual_seed(seed + 77)
    module = Predicts(Rest(num_classes=0))
    parts = torch.stack([row["teacher"] for row in clips]).float()
    coefficients = torch.einsum("ks,nsd->nkd", cosines(PARTS).float(), parts)
    targets = (coefficients - coefficients.mean(dim=0)) / (coefficients.std(dim=0) + 1e-6)
    if ridge_start:
        seen = features(module.network, [(row, 0) for row in clips])
        weight, bias = ridge([(seen, targets.flatten(1))], penalty=RIDGE_PENALTY)
        module.predictor.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    for name, parameter in module.network.named_parameters():
        parameter.requires_grad_("temporal" in name)

    def loss(rows: list[int], maps: Tensor) -> Tensor:
        return (1 - F.cosine_similarity(module(maps), targets[rows], dim=-1)).mean()

    optim = OptimConfig(lr=TRANSFER_LR, weight_decay=0.05)
    last = fit(module, loss, [row["views"] for row in clips], steps=TRANSFER_STEPS, seed=seed, optim=optim)
    return module.network.state_dict(), last


Rows = Sequence[tuple[dict[str, Tensor], int]]


def finetuned(network: Rest, train: Rows, test: Rows, *, seed: int) -> tuple[float, float]:
    """Accuracy after the last step, and the loss of training."""
    labels = torch.tensor([label for _, label in train])

    def loss(rows: list[int], maps: Tensor) -> Tensor:
        return F.cross_entropy(network.classifier(network(maps)), labels[rows])

    optim = OptimConfig(lr=FINETUNE_LR, layer_decay=LAYER_DECAY, weight_decay=0.05)
    last = fit(
        network, loss, [row["views"] for row, _ in train], steps=FINETUNE_STEPS, seed=seed, optim=optim
    )
    with torch.no_grad():
        guesses = network.classifier(features(network, test)).argmax(dim=1)
    return float((guesses == torch.tensor([label for _, label in test])).double().mean()), last


def probed(network: Rest, train: Rows, test: Rows, *, seed: int) -> tuple[float, None]:
    """Accuracy of a linear classifier on frozen features of plain views; the seed has chosen the clips already."""
    labels = [torch.tensor([label for _, label in part]) for part in (train, test)]
    seen = [features(network, part).double() for part in (train, test)]
    return linear(seen[0], labels[0], seen[1], labels[1]), None


def linear(features: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> float:
    """Test accuracy of the linear classifier fitted to convergence."""
    classes = 1 + int(torch.cat([labels, truth]).max())
    weight, bias = fit_linear(features, labels, classes=classes, l2=1e-3, steps=200)
    return float(((test @ weight.T + bias).argmax(dim=1) == truth).double().mean())


@torch.no_grad()
def features(network: Rest, rows: Rows) -> Tensor:
    """(N, 1280) of plain views."""
    maps = [row["plain"] for row, _ in rows]
    return torch.cat([network(torch.stack(maps[i : i + 32])) for i in range(0, len(maps), 32)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="CSV: path, label, group")
    parser.add_argument("--study", type=Path, required=True, help="the output folder of transfer_study.py")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--shares", type=float, nargs="+", default=(1.0, 0.25), help="shares of the labels")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print the table of finished cells and stop")
    arguments = parser.parse_args()
    study = Study(arguments.study.absolute(), arguments.data, folds=arguments.folds)
    if arguments.table:
        print(table(study.finished, folds=arguments.folds))
        return
    done = {(row["method"], row["share"], row["fold"], row["seed"]) for row in study.finished}
    for seed in arguments.seeds:
        for share in arguments.shares:
            for fold in range(arguments.folds):
                for method in arguments.methods:
                    if (method, share, fold, seed) not in done:
                        study.measure(method, share, fold, seed)


if __name__ == "__main__":
    main()
