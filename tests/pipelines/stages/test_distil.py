"""Distillation, end to end on unlabelled shards: what the teacher is asked, which tokens are learned, that neither
ranks nor micro-batches change a loss, and that the teacher stays what and where it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cliplift.configs.sections import ConfigError
from cliplift.models import create_model, from_pretrained
from cliplift.pipelines.checkpoints.saved import open_checkpoint
from cliplift.pipelines.cost.memory_plan import plan_memory
from cliplift.pipelines.data.eval_loader import EvalLoader
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.stages.distil import DistilStage
from cliplift.pipelines.stages.run import OBJECTIVES, run_stage
from cliplift.pipelines.stages.starting_weights import initialise_from

ONE_RANK = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
TINY = {"patch": 8, "width": 48, "depth": 3, "heads": 4, "hidden": 96}
SMALL_VIT = {"patch": 8, "width": 32, "depth": 3, "heads": 2, "crop": 32}
VIT = [f"teacher={json.dumps({'name': 'image_vit_base_16', 'options': SMALL_VIT, 'pretrained': None})}"]
CNN = ["teacher={name: efficientnet_lite0, pretrained: null, resize_pixels: 64}"]
HIDDEN = ["distil.tokens=hidden", "distil.mask=tube", "distil.decoder_width=24", "distil.decoder_heads=2"]
SIX = ["distil.layers=2"]
STILL = ["optim.lr=1e-30", "optim.weight_decay=0", "schedule.steps=4", "track.every_steps=2"]
Read = Callable[..., Any]


def words(place: Path, output: str, *more: str) -> list[str]:
    model = {"name": "video_vit_tiny_8", "options": TINY}
    return [
        "objective=distil", "label_smoothing=0", f"data.shards={place}/shards/unlabelled",
        f"output={place}/distil/{output}", "track.wandb=disabled", "data.sampling.frames=8", "data.sampling.stride=1",
        "data.crop_pixels=32", "data.resize_short_side_pixels=36", f"model={json.dumps(model)}", "distil.ratio=0.75",
        "engine.global_batch=4", "engine.channels_last=false", "optim.name=adamw", "optim.lr=0.001",
        "evaluation.every_steps=null", "schedule.steps=4", "track.every_steps=1", *VIT, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def read(load: Read, place: Path) -> Read:
    """``read(output, *words)``: a small run of distillation."""
    return lambda output, *more: load("pretrain/demo", output, *words(place, output, *more))


def stage_of(read: Read, *more: str) -> DistilStage:
    torch.manual_seed(0)
    return DistilStage(read("unused", *more), classes=(), topology=ONE_RANK)


def logged(folder: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.fixture(scope="module")
def pretrained(read: Read) -> Path:
    result = run_stage(read("pretrained", "schedule.steps=15", "optim.lr=0.003", *SIX), command=["cliplift"])
    assert result.finished
    return result.folder


@pytest.mark.slow
def test_it_learns_without_labels_and_leaves_the_encoder_alone(pretrained: Path) -> None:
    metrics = json.loads((pretrained / "result.json").read_text())["metrics"]
    assert metrics.keys() == {"loss", "feature_cosine", "samples"}
    assert metrics["loss"] == pytest.approx(2 - 2 * metrics["feature_cosine"], rel=1e-5)
    losses = logged(pretrained, "train/loss")
    assert len(losses) == 15
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    card = json.loads((pretrained / "weights/config.json").read_text())["extra"]
    assert card["objective"] == "distil"
    assert card["distil"]["layers"] == 2
    saved = open_checkpoint(pretrained / "checkpoints/step_00000015", topology=ONE_RANK).parameters
    assert {name.split(".")[1] for name in saved} == {"encoder", "aligners"}, "no teacher in a checkpoint"
    classifier = create_model("video_vit_tiny_8", num_classes=3, in_frames=8, crop=32, **TINY)
    initialise_from(classifier, str(pretrained))
    before, after = from_pretrained(pretrained / "weights").state_dict(), classifier.state_dict()
    body = [key for key in after if key.startswith(("patch_embed.", "blocks."))]
    assert len(body) == len(after) - 4, "all but the fresh LN and the head"
    assert all(torch.equal(after[key], before[key]) for key in body)


@pytest.mark.slow
def test_the_teacher_is_frozen_and_in_eval_mode(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """BatchNorm statistics included, after a run that trained."""
    stages: list[DistilStage] = []

    def made(run: Any, **found: Any) -> DistilStage:
        stages.append(DistilStage(run, **found))
        return stages[-1]

    monkeypatch.setitem(OBJECTIVES, "distil", made)
    run_stage(read("frozen", *CNN, "schedule.steps=2"), command=[])
    teachers = next(stage.built.frozen for stage in stages if "built" in vars(stage))
    assert teachers is not None
    assert not any(module.training for module in teachers.modules())
    assert not any(p.requires_grad for p in teachers.parameters())
    norms = {name: buffer for name, buffer in teachers.named_buffers() if "running" in name}
    assert norms
    for name, buffer in norms.items():
        assert torch.equal(buffer, torch.full_like(buffer, float("var" in name))), name


@pytest.mark.parametrize("more", [[], HIDDEN], ids=["visible", "hidden"])
def test_targets_are_the_teachers_map_of_a_tubelets_first_frame(more: list[str], read: Read) -> None:
    """By plain arithmetic from the frames as they are stored: a CNN's map of 2 x 2 places on 4 x 4 tokens."""
    stage = stage_of(read, *CNN, "data.augment={crop: centre, flip: false}", "distil.mask=tube", *more)
    batch = next(iter(EvalLoader(stage.run.data, split="val", batch=3, rank=0, world_size=1)))
    inputs = stage.inputs(batch, training=False, step=0)
    network = stage.built.frozen.networks[0]  # type: ignore[union-attr, index]
    B, places = len(batch.clips), inputs["visible"]
    if more:
        places = torch.tensor([[n for n in range(64) if n not in row] for row in places.tolist()])
    for b in range(B):
        frames = batch.clips[b, ::2].permute(0, 3, 1, 2).float() / 255
        frames = torch.nn.functional.interpolate(frames, size=(64, 64), mode="bilinear", align_corners=False)
        with torch.no_grad():
            maps = network.forward_features((frames - 0.5) / 0.5)
        assert maps.shape == (4, 1280, 2, 2)
        weight = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
        grid = np.einsum("tdhw,rh,cw->trcd", maps.double().numpy(), weight, weight).reshape(64, 1280)
        found = inputs["targets"][b, 0].double().numpy()
        assert found == pytest.approx(grid[places[b].numpy()], abs=1e-4 * np.abs(grid).max())


def test_the_average_of_a_tubelets_frames_can_be_the_target(read: Read) -> None:
    first, mean = (
        stage_of(read, "distil.mask=tube", f"distil.teacher_frames={kind}", "teacher.options.depth=1")
        for kind in ("first", "mean")
    )
    batch = next(iter(EvalLoader(first.run.data, split="val", batch=2, rank=0, world_size=1)))
    clips = first.views[False](batch)
    first._teachers.teachers = mean._teachers.teachers
    spec = mean.built.network.input_spec
    averaged, _ = mean._teachers(clips, spec)
    one, _ = first._teachers(clips, spec)
    other, _ = first._teachers(clips.roll(-1, dims=2), spec)
    torch.testing.assert_close(averaged, (one + other) / 2)


def test_masks_by_attention_are_of_the_clip(read: Read) -> None:
    """As many tokens of each frame; the same for a clip alone; what is looked at most is seen most."""
    stage = stage_of(read, *SIX)
    batch = next(iter(EvalLoader(stage.run.data, split="val", batch=2, rank=0, world_size=1)))
    inputs = stage.inputs(batch, training=False, step=0)
    assert inputs["visible"].shape == (2, 16)
    assert inputs["targets"].shape == (2, 2, 16, 32)
    assert (torch.bincount((inputs["visible"] // 16).flatten(), minlength=4) == 8).all()
    for i in range(2):
        alone = stage.inputs(batch.at(i), training=False, step=0)
        assert all(torch.equal(alone[name][0], inputs[name][i]) for name in ("visible", "targets"))


@pytest.mark.parametrize(
    ("more", "two_ranks"),
    [
        pytest.param(SIX, False, id="visible"),
        pytest.param([*HIDDEN, *CNN], False, marks=pytest.mark.slow, id="hidden"),
        pytest.param(SIX, True, marks=pytest.mark.slow, id="visible on two ranks"),
    ],
)
def test_losses_are_equal_bit_for_bit_for_any_micro_batch_and_two_ranks(
    more: list[str], two_ranks: bool, read: Read, place: Path, repository: Path
) -> None:
    """Real engines over 4 steps with weights that do not move: logged and evaluated."""

    def losses(folder: Path) -> list[float]:
        found = logged(folder, "train/loss") + logged(folder, "eval/loss")
        assert len(found) == 3, "two lines of two steps each, and the evaluation"
        return found

    expected = None
    for batch in (4, 1):
        sizes = [f"engine.micro_batch={batch}", f"evaluation.batch={batch}"]
        name = f"still{len(more)}-{two_ranks}-{batch}"
        found = losses(run_stage(read(name, *STILL, *more, *sizes), command=[]).folder)
        expected = expected or found
        assert found == expected
    if not two_ranks:
        return
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    recipe = str(repository / "configs" / "pretrain" / "demo.yaml")
    said = words(place, "still-ranks", *STILL, *more, "engine.micro_batch=1")
    done = subprocess.run(
        [*launch, "-m", "cliplift.launch.cli", "pretrain", recipe, *said],
        capture_output=True, text=True, timeout=280, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(place / "distil/still-ranks") == expected


@pytest.mark.slow
@pytest.mark.parametrize("model", [SIX, HIDDEN], ids=["visible", "hidden"])
def test_recomputation_and_zero_3_change_nothing(model: list[str], read: Read) -> None:
    metrics = []
    for at, more in enumerate(([], ["engine.checkpoint_blocks_share=1"], ["engine.zero_stage=3"])):
        run = read(f"same{len(model)}-{at}", *model, "schedule.steps=2", *more)
        metrics.append(dict(run_stage(run, command=[]).metrics))
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5)
    assert metrics[2] == pytest.approx(metrics[0], rel=1e-4)


def test_evaluation_is_the_mean_over_clips(read: Read) -> None:
    stage = stage_of(read, *HIDDEN)
    stage.module.eval()
    losses: list[float] = []
    for batch in EvalLoader(stage.run.data, split="val", batch=3, rank=0, world_size=1):
        with torch.no_grad():
            losses += stage.module(stage.inputs(batch, training=False, step=0))["loss_of_clip"].tolist()
    metrics = stage.evaluate(topology=ONE_RANK)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert metrics["samples"] == len(losses) > 1
    columns, rows = stage.clip_table(1)  # type: ignore[misc]
    assert columns == ("key", "loss")
    assert rows[0][1] == pytest.approx(max(losses), rel=1e-6)


def test_the_memory_plan_and_the_operations_count_the_teacher(read: Read) -> None:
    run = read("planned", *SIX)
    plan, sizes = plan_memory(run, classes=0, world_size=1, on_gpu=False)
    stage = stage_of(read, *SIX)
    trained = sum(p.numel() for p in stage.module.parameters() if p.requires_grad)
    teacher = sum(p.numel() for p in stage.built.frozen.parameters())  # type: ignore[union-attr]
    assert sizes.trained == trained
    assert plan.weights == 4 * (trained + teacher)
    assert plan.optimizer == 2 * 4 * trained
    # Products of both nets' Linears, and of attention, written out; 16 of 64 tokens are visible.
    linears = lambda n, width, hidden: n * width * (4 * width + 2 * hidden) + 2 * n * n * width  # noqa: E731
    student = 64 * 2 * 64 * 3 * 48 + 3 * linears(16, 48, 96) + 2 * 16 * 48 * 32
    frame = 16 * 64 * 3 * 32 + 3 * linears(17, 32, 128)
    assert stage.flops_per_clip == pytest.approx(2 * (3 * student + 4 * frame), rel=1e-6)


@pytest.mark.parametrize(
    ("more", "key", "said"),
    [
        (["data.augment.mixup_alpha=0.2"], "data.augment.mixup_alpha", "distillation has none"),
        (["data.modality=flow", "data.augment={}"], "data.modality", "no frames for a teacher"),
        (["engine.precision=bf16"], "engine.precision", "rounds the features"),
        (["teacher.cache_features=true"], "teacher.cache_features", "a target of its own"),
        (["teacher.frames=2"], "teacher.frames", "a target of its own"),
        (["distil.tokens=hidden", "distil.layers=2"], "distil.layers", "the last map alone"),
        (["distil.mask=running_cell", "distil.ratio=0.2"], "distil.ratio", "less than 1"),
        (["distil.mask=cells"], "distil.mask", "attention"),
    ],
)
def test_an_impossible_config_names_its_key(more: list[str], key: str, said: str, read: Read) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read("refused", *more)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("more", "key", "said"),
    [
        (["model={name: t3d_tiny}"], "model.name", "cannot be pretrained by distillation"),
        (["model.options.final_norm=pooled"], "model.options.final_norm", "needs 'tokens'"),
        (["distil.ratio=0.01"], "distil.ratio", "leaves 64 of 64 tokens visible"),
        (["distil.mask=running_cell", "data.crop_pixels=24"], "distil.mask", "has 3x3"),
        (["distil.layers=4"], "teacher.name", "layers=4 of a network of 3 blocks"),
        ([*CNN, "distil.layers=2"], "teacher.name", "last layer alone"),
        ([*CNN, "teacher.resize_pixels=32"], "teacher.resize_pixels", "1x1 places says too little of 4x4"),
        ([*HIDDEN, "distil.decoder_heads=5"], "distil.decoder_width", "do not go together"),
        (["teacher={name: t3d_tiny}"], "teacher.name", "is not a 2D model"),
    ],
)
def test_what_cannot_be_distilled_is_refused_in_one_sentence(
    more: list[str], key: str, said: str, read: Read
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        stage_of(read, *more).build_module(weights=False)
    assert caught.value.key == key
