"""The YAML files that `cliplift start` writes: each complete, each choice with its reason in a line above it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cliplift.launch.start.looks import Looks
from cliplift.launch.start.numbers import Chosen, Numbers
from cliplift.launch.start.splits import Division
from cliplift.launch.start.videos import FoundVideos

ENOUGH_FOR_TRANSFER = 32  # training clips; the recipe's batch
REFUSED = 0.05  # share of clips that a build may refuse by default
COLUMNS = 118


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that the files say.

    ``held_out`` is the validation part cut from training, where the videos come with splits that have none.
    """

    name: str
    folder: str
    found: FoundVideos
    looks: Looks
    numbers: Numbers
    division: Division | None
    groups_said: str
    held_out: bool
    test_split: str

    @property
    def transfers(self) -> bool:
        """Whether there are enough clips to learn from a teacher."""
        return self.numbers.clips >= ENOUGH_FOR_TRANSFER


def yaml_files(plan: Plan) -> dict[str, str]:
    """The text of every file by its name, in the order in which they are used."""
    files = {"shards": _shards(plan)}
    if plan.found.labelled:
        files |= {"frames": _frames(plan), "3d": _clips(plan)}
    if plan.transfers:
        files["transfer"] = _transfer(plan)
        if plan.found.labelled:
            files["from_transfer"] = _from_transfer(plan)
    return {f"{plan.name}_{key}.yaml": "\n".join(lines) + "\n" for key, lines in files.items()}


def text(value: object) -> str:
    """A value as YAML on one line; any name survives."""
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9_./-]*", value) and value.lower() not in (
            "null", "true", "false", "yes", "no", "on", "off", "y", "n",
        )  # fmt: skip
        return value if plain else json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{text(k)}: {text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(text(item) for item in value) + "]"
    return "null" if value is None else json.dumps(value)


def comment(words: str, indent: str = "") -> str:
    """One line of comment, without what would end it."""
    line = f"{indent}# {' '.join(words.split())}"
    return line if len(line) <= 2 * COLUMNS else line[: 2 * COLUMNS - 3] + "..."


def _reasoned(key: str, chosen: Chosen | None, indent: str = "  ") -> list[str]:
    if chosen is None:
        return []
    return [comment(chosen.why, indent), f"{indent}{key}: {chosen.yaml}"]


def _head(plan: Plan, what: str, stage: str, key: str) -> list[str]:
    return [
        comment(f"{what} Written by `cliplift start`; change what you know better."),
        f"stage: {stage}",
        f"name: {text(f'{plan.name}-{key}')}",
        f"output: {text(f'runs/{plan.name}-{key}')}",
    ]


def _shards(plan: Plan) -> list[str]:
    found, numbers = plan.found, plan.numbers
    classes = f" of {len(found.classes)} classes" if found.labelled else ", without labels"
    lines = [
        comment(f"{len(found.videos)} videos{classes}, from {plan.folder}. Written by `cliplift start`."),
        "stage: shard",
        f"name: {text(plan.name)}",
        f"output: {text(f'shards/{plan.name}')}",
        "source:",
        comment(found.said, "  "),
        *(f"  {key}: {text(value)}" for key, value in found.source.items()),
        *_splits(plan),
    ]
    if numbers.window is not None:
        lines += [comment(numbers.window.why), f"cut: {numbers.window.yaml}"]
    lines += [
        "transcode:",
        comment(
            f"as large as the networks below look at it; the videos have {plan.looks.short_side} pixels", "  "
        ),
        f"  short_side_pixels: {numbers.stored_pixels}",
    ]
    if 0 < plan.looks.fewest_frames < 8:
        lines += [comment("some videos are shorter than 8 frames, the usual limit", "  "), "  min_frames: 2"]
    videos = len(found.videos)
    lines += ["shards:", comment("some shards for each split, so that they are read side by side", "  ")]
    lines.append(f"  videos_per_shard: {min(512, max(8, -(-videos // 16)))}")
    return [*lines, *_losses(plan), *_duplicates(plan)]


def _splits(plan: Plan) -> Iterator[str]:
    yield "splits:"
    if plan.division is None:
        yield comment("the videos come with their splits; other names of ours:", "  ")
        yield f"  rename: {text(dict(plan.found.rename))}"
        return
    section = plan.division.section
    if "group_pattern" in section:
        yield comment(f"groups by the names: {plan.groups_said}; null: each video alone", "  ")
        yield f"  group_pattern: {text(section['group_pattern'])}"
    yield comment(plan.division.why, "  ")
    groups = section.get("groups")
    if isinstance(groups, Mapping):
        yield "  groups:"
        yield from (f"    {split}: {text(names)}" for split, names in groups.items())
    yield f"  shares: {text(section['shares'])}"
    if "seed" in section:
        yield f"  seed: {text(section['seed'])}"


def _losses(plan: Plan) -> Iterator[str]:
    bad, looked = len(plan.looks.unreadable), len(plan.looks.seen) + len(plan.looks.unreadable)
    missing, listed = len(plan.found.missing), len(plan.found.missing) + len(plan.found.videos)
    if not bad and not missing:
        return
    yield "limits:"
    if bad:
        share = min(1.0, max(REFUSED, round(1.5 * bad / looked + 0.01, 2)))
        yield comment(
            f"{bad} of {looked} videos looked at cannot be read; they are refused, with a reason", "  "
        )
        yield f"  max_refused_share: {share:g}"
    if missing:
        share = min(1.0, max(REFUSED, round(missing / listed + 0.01, 2)))
        yield comment(f"{missing} of {listed} videos of the list are not there", "  ")
        yield f"  max_missing_share: {share:g}"


def _duplicates(plan: Plan) -> Iterator[str]:
    if plan.looks.same:
        yield comment(
            f"{len(plan.looks.same)} files are copies of another; a copy is left out of training first"
        )
        yield "duplicates: remove_exact"


def _data(plan: Plan, crop: tuple[int, int], *, labels: bool = True) -> list[str]:
    numbers = plan.numbers
    lines = ["data:", f"  shards: {text(f'shards/{plan.name}')}"]
    if plan.held_out:
        lines += [
            comment("there is no validation split: whole groups of the training split are held out", "  "),
            "  val_split: held_out",
            "  val_share: 0.15",
        ]
    lines += _reasoned("sampling", numbers.sampling)
    if numbers.test_clips > 1:
        lines.append(f"  views: {{clips: {numbers.test_clips}}}")
    lines += [
        comment(numbers.crop_why, "  "),
        f"  crop_pixels: {crop[0]}",
        f"  resize_short_side_pixels: {crop[1]}",
        comment(numbers.feeding.why, "  "),
        f"  {numbers.feeding.yaml}",
        "  order: global",
    ]
    if labels:
        lines += _reasoned("class_balanced", numbers.balanced)
    lines += [
        "  augment:",
        *_reasoned("flip", numbers.flip, "    "),
        comment(
            "crops of half the picture or more, some light and contrast: changes that keep the class", "    "
        ),
        "    scale: [0.5, 1.0]",
        "    brightness: 0.2",
        "    contrast: 0.2",
        *_reasoned("normalize_brightness", numbers.dark, "    "),
    ]
    return lines


def _training(
    plan: Plan, steps: int, *, lr: str, more: Sequence[str] = (), batchnorm: bool = False
) -> list[str]:
    numbers = plan.numbers
    every = max(1, steps // 5)
    evaluation = f"every_steps: {every}, batch: {max(8, 2 * int(numbers.batch.yaml))}"
    if batchnorm:
        evaluation += ", precise_batchnorm_batches: 8"
    return [
        f"optim: {{{', '.join(['name: adamw', f'lr: {lr}', 'weight_decay: 0.05', 'clip_grad_norm: 1.0', *more])}}}",
        comment(f"{steps} steps are {steps * numbers.passes:.1f} passes over the training clips"),
        f"schedule: {{name: cosine, steps: {steps}, warmup_share: 0.1}}",
        "engine:",
        *_reasoned("global_batch", numbers.batch),
        *_reasoned("micro_batch", numbers.micro_batch),
        *_reasoned("precision", numbers.precision),
        "  zero_stage: 1",
        "  channels_last: true",
        f"checkpoint: {{every_steps: {every}}}",
        f"evaluation: {{{evaluation}}}",
        f"track: {{every_steps: {max(1, steps // 20)}, group: {text(plan.name)}}}",
    ]


def _test(plan: Plan) -> list[str]:
    return [] if plan.test_split == "test" else [f"test_split: {text(plan.test_split)}"]


def _frames(plan: Plan) -> list[str]:
    return [
        *_head(plan, "Minutes: a frozen image network on every frame, averaged, a linear classifier. What it scores is"
               " what a picture alone tells.", "finetune", "frames"),
        *_data(plan, plan.numbers.frame_crop),
        comment("ImageNet weights from the extra `teachers`, nothing is downloaded; only the classifier learns"),
        "model:",
        "  name: frame_average",
        "  pretrained: imagenet",
        "  options: {encoder: efficientnet_lite0, train_encoder: false}",
        "train_part: head",
        *_test(plan),
        *_training(plan, plan.numbers.frame_steps, lr="3e-3"),
    ]  # fmt: skip


def _clips(plan: Plan) -> list[str]:
    return [
        *_head(plan, "A network over time that starts as the image network on every frame.", "finetune", "3d"),
        *_data(plan, plan.numbers.clip_crop),
        comment("ImageNet weights from the extra `teachers`; the stem and the first eight blocks stay as they are"),
        "model:",
        "  name: efficientnet_lite0_tam",
        "  pretrained: 2d:imagenet",
        '  frozen: ["stem.*", "blocks.[0-7].*"]',
        comment("statistics of a million pictures, which small batches of few scenes would spoil"),
        "frozen_batchnorm: true",
        *_test(plan),
        comment("lower blocks learn more slowly"),
        *_training(plan, plan.numbers.clip_steps, lr="1e-3", more=["layer_decay: 0.8"]),
    ]  # fmt: skip


def _transfer(plan: Plan) -> list[str]:
    return [
        *_head(plan, "Without labels: a small 3D network learns what the image network says of a clip's parts.",
               "transfer", "transfer"),
        *_data(plan, plan.numbers.clip_crop, labels=False),
        "model: {name: t3d_tiny}",
        comment("the teacher's features of every clip are computed once and kept"),
        f"teacher: {{name: efficientnet_lite0, cache_features: true, resize_pixels: {plan.numbers.frame_crop[0]}}}",
        *_objective(plan),
        *_training(plan, plan.numbers.transfer_steps, lr="2e-3", batchnorm=True),
    ]  # fmt: skip


def _objective(plan: Plan) -> list[str]:
    """Features of the four parts of a clip, where every clip spans its whole video and can be cut into them."""
    if plan.numbers.test_clips == 1 and plan.numbers.frames % 4 == 0:
        return ["correspondence: {objective: regression, time_steps: 4}"]
    words = "one target a clip: it is a part of its video, or not to be cut into four"
    return [comment(words), "correspondence: {objective: regression, time_steps: 1}"]


def _from_transfer(plan: Plan) -> list[str]:
    return [
        *_head(plan, "The network from transfer, finetuned on labels; `initialise_from=null` is from scratch.",
               "finetune", "from-transfer"),
        f"initialise_from: {text(f'runs/{plan.name}-transfer')}",
        *_data(plan, plan.numbers.clip_crop),
        "model: {name: t3d_tiny}",
        *_test(plan),
        *_training(plan, plan.numbers.transfer_steps, lr="1e-3", batchnorm=True),
    ]  # fmt: skip
