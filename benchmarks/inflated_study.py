"""A student that begins as the teacher's own network, inflated: what does transfer add? Cameras never seen.

    python benchmarks/transfer_study.py --data clips.csv --unlabelled FOLDER... --output study --shards
    python benchmarks/inflated_study.py --data clips.csv --study study --student deviation

``efficientnet_lite0_tam`` with ImageNet weights, of which the stem and the first blocks are held and BatchNorm keeps
its statistics. So the map behind the held blocks is computed once for each of several augmented views of a clip, and
only the rest is trained, which is several times cheaper on a CPU than whole networks and otherwise the same.

There are two students. The features of ``mean`` are the frames' mean, it sees 80 pixels, and transfer is regression
onto the cosines of the teacher's features over four parts of the clip, of the weights over time alone. Those of
``deviation`` are the frames' mean and their deviation over the clip, it sees 160 pixels as the teacher does, and
transfer is regression onto the teacher's mean and deviation, of all that is not held. Methods:

* ``frames``: the frozen teacher's frames, averaged, a linear classifier; ``frames and spread``: with the deviation over
  the parts, which are single frames for ``deviation``
* ``inflated``: finetuned from the ImageNet weights; ``inflated; probe``: frozen, a linear classifier
* ``transfer``: finetuned after transfer; ``transfer; probe``: frozen
* ``transfer, ridge``: the same, but the predictor starts as the ridge regression on the student's features

One JSON line for each cell in STUDY/rows.jsonl, beside those of ``transfer_study.py``, whose choice of labelled clips
it is; what is there is not done again. ``--table`` prints the table. The learning rates were chosen on cameras of the
first fold's training clips, of ``deviation`` that of finetuning alone, which starts from the linear classifier of
``probe`` there.
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
from typing import Any, cast

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
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
from cliplift.pipelines.stages.teacher import cosines, over_time, ridge

STUDENT, WEIGHTS = "efficientnet_lite0_tam", "2d:imagenet"
TEACHER_PIXELS, TEACHER_SHORT_SIDE = 160, 176
FINETUNE_STEPS, LAYER_DECAY = 25, 0.8
LINEAR_L2, LINEAR_STEPS = 1e-3, 200
RIDGE, RIDGE_PENALTY = "transfer, ridge", 1.0  # the penalty is the option's default
METHODS = (
    "frames", "frames and spread", "inflated; probe", "transfer; probe", f"{RIDGE}; probe", "inflated", "transfer",
    RIDGE,
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What the student sees and gives out, how much of it is held, and how it is trained."""

    name: str  # in the rows
    pooling: str
    pixels: int
    short_side: int
    held_blocks: int  # of 16, with the stem
    views: int  # augmented ones of each labelled clip
    unlabelled_views: int
    parts: int  # of a clip, whose teacher features transfer is about
    spread: bool  # their mean and deviation are predicted, not their cosines
    time_alone: bool  # transfer trains the weights over time and nothing else
    transfer_lr: float
    transfer_steps: int
    finetune_lr: float
    linear_start: bool  # finetuning starts from the linear classifier of ``probe``
    batch: int

    @property
    def predicted(self) -> int:
        return 2 if self.spread else self.parts


SETTINGS = {
    "mean": Setting(
        name=f"{STUDENT}, stored views", pooling="mean", pixels=80, short_side=88, held_blocks=8,
        views=6, unlabelled_views=6, parts=4, spread=False, time_alone=True,
        transfer_lr=3e-3, transfer_steps=40, finetune_lr=1e-3, linear_start=False, batch=16,
    ),
    "deviation": Setting(
        name=f"{STUDENT}, deviation, stored views", pooling="mean_deviation", pixels=160, short_side=176,
        held_blocks=12, views=4, unlabelled_views=2, parts=8, spread=True, time_alone=False,
        transfer_lr=3e-4, transfer_steps=30, finetune_lr=1e-4, linear_start=True, batch=8,
    ),
}  # fmt: skip

Clip = tuple[str, float]  # source file, where the clip starts in it, seconds


class Rest(nn.Module):
    """The student behind its held blocks, BatchNorm in eval mode: maps (B, T, C, H, W) -> features (B, D)."""

    def __init__(self, setting: Setting, *, num_classes: int) -> None:
        super().__init__()
        network: Any = create_model(
            STUDENT, num_classes=num_classes, in_frames=8, pretrained=WEIGHTS, pooling=setting.pooling
        )
        self.blocks = nn.ModuleList(network.blocks[setting.held_blocks :])
        self.head, self.classifier = network.head, network.classifier
        self.spread, self.feature_dim = setting.pooling == "mean_deviation", network.feature_dim
        freeze_batchnorm(self)
        self.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

    def frames(self, maps: Tensor) -> Tensor:
        """(B, T, C, H, W) -> (B, T, 1280)."""
        B, T = maps.shape[:2]
        flat = maps.float().flatten(0, 1).contiguous(memory_format=torch.channels_last)
        y = flat.reshape(B, T, *flat.shape[1:])
        for block in self.blocks:
            y = block(y)
        features: Tensor = self.head(y.flatten(0, 1)).mean(dim=(2, 3))
        return features.reshape(B, T, -1)

    def forward(self, maps: Tensor) -> Tensor:
        return pooled(self.frames(maps), spread=self.spread)

    def checkpoint_blocks(self) -> list[str]:
        return [f"blocks.{i}" for i in range(len(self.blocks))]


def pooled(frames: Tensor, *, spread: bool) -> Tensor:
    """(B, T, D) -> (B, D), the mean over time, or (B, 2 D), with the deviation."""
    mean = frames.mean(dim=1)
    return torch.cat([mean, frames.std(dim=1, correction=0)], dim=1) if spread else mean


class Predicts(nn.Module):
    """The student and the linear predictor of the teacher's coefficients."""

    def __init__(self, rest: Rest, predicted: int) -> None:
        super().__init__()
        rest.classifier = nn.Identity()
        self.network, self.predicted = rest, predicted
        self.predictor = nn.Linear(rest.feature_dim, predicted * 1280)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, T, C, H, W) -> (B, predicted, 1280)."""
        guess: Tensor = self.predictor(self.network(maps))
        return guess.unflatten(1, (self.predicted, 1280))


class Held(nn.Module):
    """The stem and the held blocks, with BatchNorm folded into the convolutions: clips (B, C, T, H, W) -> maps
    (B, T, C', H', W') in fp16."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        network: Any = create_model(STUDENT, num_classes=0, in_frames=8, pretrained=WEIGHTS)
        network.eval()
        self.input_spec = network.input_spec
        self.stem, self.blocks = network.stem, network.blocks[: setting.held_blocks]
        for layers in (self.stem, *(block.layers for block in self.blocks)):
            for i in range(1, len(layers)):
                if isinstance(layers[i], nn.BatchNorm2d):
                    layers[i - 1], layers[i] = fuse_conv_bn_eval(layers[i - 1], layers[i]), nn.Identity()
        self.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

    def forward(self, clips: Tensor) -> Tensor:
        y = self.stem(clips.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last))
        y = y.reshape(len(clips), -1, *y.shape[1:])
        for block in self.blocks:
            y = block(y)
        return cast(Tensor, y).half()


@torch.no_grad()
def stored(setting: Setting, shards: Path, split: str, *, views: int) -> dict[Clip, dict[str, Tensor]]:
    """Of every clip of a split: maps behind the held blocks in fp16, ``plain`` (T, C, H, W) and ``views``
    (views, T, C, H, W), and ``teacher`` (parts, 1280)."""
    held = Held(setting)
    words = [f"data.shards={shards}", f"data.split={split}", "data.val_share=0", "data.val_split=train"]
    words.append("data.cache_decoded_mib=3000")
    run, large = (
        load_as(
            "transfer/small",
            TransferRun,
            [*words, f"data.crop_pixels={side}", f"data.resize_short_side_pixels={short}"],
        ).run
        for side, short in (
            (setting.pixels, setting.short_side),
            (TEACHER_PIXELS, TEACHER_SHORT_SIDE),
        )
    )
    augment = {
        training: DeviceAugment(run.data.augment, held.input_spec, training=training)
        for training in (True, False)
    }
    samples = clips_of(ClipSource(run.data, split=split))
    found: dict[Clip, dict[str, Any]] = {clip: {"views": []} for clip in samples}
    for batch in EvalLoader(run.data, split=split, batch=16, rank=0, world_size=1):
        for sample, row in zip(batch.sample_index.tolist(), held(augment[False](batch)), strict=True):
            found[samples[sample]]["plain"] = row.clone()
    teacher = create_model("efficientnet_lite0", num_classes=0, pretrained="imagenet").eval()
    rest = Rest(setting, num_classes=0)  # it starts as the teacher on every frame
    if setting.pixels == TEACHER_PIXELS:
        for row in found.values():
            row["teacher"] = of_parts(rest.frames(row["plain"][None]), setting.parts)[0]
    else:
        for batch in EvalLoader(large.data, split=split, batch=16, rank=0, world_size=1):
            clips = augment[False](batch)
            frames = teacher(clips.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(clips), -1))
            for sample, row in zip(batch.sample_index.tolist(), of_parts(frames, setting.parts), strict=True):
                found[samples[sample]]["teacher"] = row.clone()
    loader = ClipLoader(run.data, seed=0, global_batch=1, micro_batch=1, rank=0, world_size=1)
    for batch in loader.micro_batches(start_step=0, stop_step=views * len(samples)):
        found[samples[int(batch.sample_index)]]["views"].append(held(augment[True](batch))[0])
    return {clip: row | {"views": torch.stack(row["views"])} for clip, row in found.items()}


def of_parts(frames: Tensor, parts: int) -> Tensor:
    """(B, T, D) -> (B, parts, D), the means over the frames of each part."""
    return frames.unflatten(1, (parts, -1)).mean(dim=2)


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


def batches(
    clips: Sequence[Tensor], *, steps: int, batch: int, seed: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers of clips, pass by pass in a new order, and one of the views (V, ...) of each."""
    generator, order = torch.Generator().manual_seed(seed), list[int]()
    for _ in range(steps):
        rows: list[int] = []
        while len(rows) < min(batch, len(clips)):
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
    batch: int,
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
    for step, (rows, maps) in enumerate(batches(clips, steps=steps, batch=batch, seed=seed)):
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

    def __init__(self, folder: Path, data: Path, setting: Setting, *, folds: int) -> None:
        self.folder, self.log, self.setting = folder, folder / "rows.jsonl", setting
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
        setting, shards = self.setting, self.folder / "shards"
        kept = self.folder / f"maps-{setting.pixels}-pixels-{setting.held_blocks}-blocks.pt"
        if not kept.is_file():
            found: dict[Clip, dict[str, Tensor]] = {}
            for split in ("train", "test"):
                found |= stored(setting, shards / "fold0", split, views=setting.views)
            for folder in sorted(shards.glob("unlabelled*")):
                found |= stored(setting, folder, "train", views=setting.unlabelled_views)
            torch.save(found, kept)
        loaded: dict[Clip, dict[str, Tensor]] = torch.load(kept, weights_only=True)
        return loaded

    def transferred(self, kind: str, fold: int, seed: int) -> dict[str, Tensor]:
        """The student's weights after transfer on the fold's training clips and the unlabelled ones."""
        name = "ridge" if kind == RIDGE else "transfer"
        kept = self.folder / f"{self.setting.pooling}-{name}-fold{fold}-seed{seed}.pt"
        if not kept.is_file():
            labelled = {clip for part in (self.folds[0].train, self.folds[0].test) for clip, _ in part}
            training = {clip for clip, _ in self.folds[fold].train}
            clips = [row for clip, row in self.clips.items() if clip in training or clip not in labelled]
            began = time.process_time()
            weights, loss = transfer(self.setting, clips, seed=seed, ridge_start=kind == RIDGE)
            torch.save(weights, kept)
            spent = round(time.process_time() - began, 1)
            kept.with_suffix(".json").write_text(json.dumps({"loss": loss, "cpu_seconds": spent}) + "\n")
        state: dict[str, Tensor] = torch.load(kept, weights_only=True)
        return state

    def measure(self, method: str, share: float, fold: int, seed: int) -> None:
        """Write the row of a cell."""
        kind, _, probe = method.partition("; ")
        rows: list[Rows] = [
            [(self.clips[clip], label) for clip, label in part]
            for part in (self.labelled(fold, share, seed), self.folds[fold].test)
        ]
        loss = None
        if kind.startswith("frames"):
            began = time.process_time()
            accuracy = probed(lambda row: pooled(row["teacher"][None], spread="spread" in kind)[0], *rows)
        else:
            start = {} if kind == "inflated" else self.transferred(kind, fold, seed)
            began = time.process_time()
            torch.manual_seed(seed)
            network = Rest(self.setting, num_classes=1 + max(label for _, label in self.folds[fold].test))
            network.load_state_dict(start, strict=False)
            if probe:
                accuracy = probed(lambda row: features(network, row["plain"][None])[0], *rows)
            else:
                accuracy, loss = finetuned(self.setting, network, *rows, seed=seed)
        self.write(
            method=method, share=share, fold=fold, seed=seed, accuracy=accuracy, loss=loss, began=began,
            labelled_clips=len(rows[0]),
        )  # fmt: skip

    def labelled(self, fold: int, share: float, seed: int) -> list[tuple[Clip, int]]:
        """A share of the training clips with labels, the clips that a run with this seed would choose."""
        words = [f"data.shards={self.folder}/shards/fold{fold}", "data.val_share=0"]
        data = load_as("transfer/small", TransferRun, words).run.data
        subset = data.model_copy(update={"label_share": share, "subset_seed": seed})
        chosen = set(clips_of(ClipSource(subset, split="train")))
        return [row for row in self.folds[fold].train if row[0] in chosen]

    def write(self, *, began: float, **row: Any) -> None:
        row |= {"student": self.setting.name, "cpu_seconds": round(time.process_time() - began, 1)}
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    @property
    def finished(self) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines() if self.log.is_file() else []
        return [json.loads(line) for line in lines]


def transfer(
    setting: Setting, clips: Sequence[dict[str, Tensor]], *, seed: int, ridge_start: bool
) -> tuple[dict[str, Tensor], float]:
    """Regression onto what the teacher says of the parts, standardised; weights and loss."""
    torch.manual_seed(seed + 77)
    module = Predicts(Rest(setting, num_classes=0), setting.predicted)
    parts = torch.stack([row["teacher"] for row in clips]).float()
    coefficients = over_time(parts, cosines(setting.parts).float(), spread=setting.spread)
    targets = (coefficients - coefficients.mean(dim=0)) / (coefficients.std(dim=0) + 1e-6)
    if ridge_start:
        seen = features(module.network, torch.stack([row["plain"] for row in clips]))
        weight, bias = ridge([(seen, targets.flatten(1))], penalty=RIDGE_PENALTY)
        module.predictor.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    if setting.time_alone:
        for name, parameter in module.network.named_parameters():
            parameter.requires_grad_("temporal" in name)

    def loss(rows: list[int], maps: Tensor) -> Tensor:
        return (1 - F.cosine_similarity(module(maps), targets[rows], dim=-1)).mean()

    last = fit(
        module, loss, [row["views"] for row in clips], steps=setting.transfer_steps, batch=setting.batch, seed=seed,
        optim=OptimConfig(lr=setting.transfer_lr, weight_decay=0.05),
    )  # fmt: skip
    return module.network.state_dict(), last


Rows = Sequence[tuple[dict[str, Tensor], int]]


def finetuned(setting: Setting, network: Rest, train: Rows, test: Rows, *, seed: int) -> tuple[float, float]:
    """Accuracy after the last step, and the loss of training."""
    labels = torch.tensor([label for _, label in train])
    if setting.linear_start:
        seen = features(network, torch.stack([row["plain"] for row, _ in train])).double()
        weight, bias = fit_linear(
            seen, labels, classes=len(network.classifier.bias), l2=LINEAR_L2, steps=LINEAR_STEPS
        )
        network.classifier.load_state_dict({"weight": weight.float(), "bias": bias.float()})

    def loss(rows: list[int], maps: Tensor) -> Tensor:
        return F.cross_entropy(network.classifier(network(maps)), labels[rows])

    last = fit(
        network, loss, [row["views"] for row, _ in train], steps=FINETUNE_STEPS, batch=setting.batch,
        seed=seed, optim=OptimConfig(lr=setting.finetune_lr, layer_decay=LAYER_DECAY, weight_decay=0.05),
    )  # fmt: skip
    with torch.no_grad():
        seen = features(network, torch.stack([row["plain"] for row, _ in test]))
        guesses = network.classifier(seen).argmax(dim=1)
    return float((guesses == torch.tensor([label for _, label in test])).double().mean()), last


def probed(features_of: Callable[[dict[str, Tensor]], Tensor], train: Rows, test: Rows) -> float:
    """Test accuracy of a linear classifier, fitted to convergence, on a clip's features (D,)."""
    labels = [torch.tensor([label for _, label in part]) for part in (train, test)]
    seen = [torch.stack([features_of(row) for row, _ in part]).double() for part in (train, test)]
    classes = 1 + int(torch.cat(labels).max())
    weight, bias = fit_linear(seen[0], labels[0], classes=classes, l2=LINEAR_L2, steps=LINEAR_STEPS)
    return float(((seen[1] @ weight.T + bias).argmax(dim=1) == labels[1]).double().mean())


@torch.no_grad()
def features(network: Rest, maps: Tensor) -> Tensor:
    """Maps (N, T, C, H, W) -> (N, D)."""
    return torch.cat([network(rows) for rows in torch.split(maps, 32)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="CSV: path, label, group")
    parser.add_argument("--study", type=Path, required=True, help="the output folder of transfer_study.py")
    parser.add_argument("--student", choices=SETTINGS, default="mean")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--shares", type=float, nargs="+", default=(1.0, 0.25), help="shares of the labels")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print the table of finished cells and stop")
    arguments = parser.parse_args()
    setting = SETTINGS[arguments.student]
    study = Study(arguments.study.absolute(), arguments.data, setting, folds=arguments.folds)
    if arguments.table:
        print(table(study.finished, folds=arguments.folds))
        return
    done = {
        (row["method"], row["share"], row["fold"], row["seed"])
        for row in study.finished
        if row["student"] == setting.name
    }
    for seed in arguments.seeds:
        for share in arguments.shares:
            for fold in range(arguments.folds):
                for method in arguments.methods:
                    if (method, share, fold, seed) not in done:
                        study.measure(method, share, fold, seed)


if __name__ == "__main__":
    main()
