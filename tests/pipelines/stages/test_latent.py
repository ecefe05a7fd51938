"""Latent prediction, end to end on unlabelled shards: its teacher, its masks, and that neither ranks nor micro-batches
nor a resumed run on other ranks change what is learned."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cliplift.configs.objectives import LatentConfig
from cliplift.configs.sections import ConfigError
from cliplift.models import create_model, from_pretrained
from cliplift.models.factory import save_pretrained
from cliplift.models.video_vit.latent import LatentPrediction
from cliplift.models.video_vit.positions import TokenGrid
from cliplift.pipelines.checkpoints.saved import open_checkpoint
from cliplift.pipelines.cost.memory_plan import plan_memory
from cliplift.pipelines.data.eval_loader import EvalLoader
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.engine.task import MovingTeacher
from cliplift.pipelines.stages.latent import LatentMasks, LatentStage, context_weight
from cliplift.pipelines.stages.run import run_stage
from cliplift.pipelines.stages.starting_weights import initialise_from

ONE_RANK = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
TINY = {"patch": 8, "width": 48, "depth": 2, "heads": 2, "hidden": 96}
MODEL = {"name": "vjepa2_large_16", "options": TINY}
PREDICTOR = ["latent.predictor_width=36", "latent.predictor_depth=1", "latent.predictor_heads=3"]
DENSE = [f"model={json.dumps({'name': 'vjepa21_base_16', 'options': TINY | {'depth': 12}})}", "latent.dense=true",
         "latent.context_ramp_steps=[1, 3]"]  # fmt: skip
STILL = ["optim.lr=1e-30", "optim.weight_decay=0", "schedule.steps=4", "track.every_steps=2"]
Read = Callable[..., Any]


def words(place: Path, output: str, *more: str) -> list[str]:
    return [
        "objective=latent", "label_smoothing=0", f"data.shards={place}/shards/unlabelled",
        f"output={place}/latent/{output}", "track.wandb=disabled", "data.sampling.frames=8", "data.sampling.stride=1",
        "data.crop_pixels=32", "data.resize_short_side_pixels=36", f"model={json.dumps(MODEL)}", *PREDICTOR,
        "engine.global_batch=4", "engine.channels_last=false", "optim.name=adamw", "optim.lr=0.001",
        "evaluation.every_steps=null", "schedule.steps=4", "track.every_steps=1", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def read(load: Read, place: Path) -> Read:
    """``read(output, *words)``: a small run of latent prediction."""
    return lambda output, *more: load("pretrain/demo", output, *words(place, output, *more))


def stage_of(read: Read, *more: str) -> LatentStage:
    torch.manual_seed(0)
    return LatentStage(read("unused", *more), classes=(), topology=ONE_RANK)


def logged(folder: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def parts_at(folder: Path, step: int) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """Encoder and teacher of a checkpoint, by the names they share."""
    saved = open_checkpoint(folder / f"checkpoints/step_{step:08d}", topology=ONE_RANK).parameters
    found: dict[str, dict[str, np.ndarray[Any, Any]]] = {"encoder": {}, "teacher": {}}
    for name in saved:
        part, _, rest = name.removeprefix("prediction.").partition(".")
        if part in found:
            found[part][rest] = saved.whole(name).double().numpy()
    return found


@pytest.fixture(scope="module")
def pretrained(read: Read) -> Path:
    more = ["schedule.steps=12", "optim.lr=0.002", "latent.teacher_momentum=0.9", "checkpoint.every_steps=6"]
    result = run_stage(read("pretrained", *more), command=["cliplift", "pretrain"])
    assert result.finished
    return result.folder


@pytest.mark.slow
def test_it_learns_without_labels_and_leaves_the_teacher(pretrained: Path) -> None:
    metrics = json.loads((pretrained / "result.json").read_text())["metrics"]
    assert metrics.keys() == {"loss", "samples", "feature_std", "effective_rank"}
    losses = logged(pretrained, "train/loss")
    assert len(losses) == 12
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    saved, parts = from_pretrained(pretrained / "weights").state_dict(), parts_at(pretrained, 12)
    assert saved.keys() == parts["teacher"].keys()
    assert all(
        np.array_equal(saved[name].double().numpy(), value) for name, value in parts["teacher"].items()
    )
    assert any(not np.array_equal(parts["encoder"][name], value) for name, value in parts["teacher"].items())


def test_the_alarm_sounds_for_a_constant_encoder_and_for_no_other(
    read: Read, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it sees, an encoder whose last LN has no weights gives its biases."""
    said = []
    for scale in (0.0, 1.0):
        torch.manual_seed(3)
        encoder = create_model("vjepa2_large_16", num_classes=0, in_frames=8, crop=32, **TINY)
        with torch.no_grad():
            encoder.norm.weight.mul_(scale)  # type: ignore[union-attr, operator]
            encoder.norm.bias.normal_()  # type: ignore[union-attr, operator]
        options = TINY | {"crop": 32}
        save_pretrained(encoder, tmp_path / f"{scale}", name="vjepa2_large_16", options=options, extra={})
        run = read(
            f"constant{scale}", f"initialise_from={tmp_path}/{scale}", "optim.lr=1e-30", "schedule.steps=2"
        )
        folder = run_stage(run, command=[]).folder
        said.append([line for line in capsys.readouterr().out.splitlines() if "may have collapsed" in line])
        stds = logged(folder, "train/feature_std") + logged(folder, "eval/feature_std")
        assert len(stds) == 3
        assert max(stds) < 1e-5 if scale == 0 else min(stds) > 0.05
    constant, healthy = said
    assert [line.split(": ")[1] for line in constant] == ["step 1", "step 2"], "in training, and evaluated"
    assert "train/feature_std is" in constant[0]
    assert "eval/feature_std is" in constant[1]
    assert "raise latent.teacher_momentum" in constant[0]
    assert healthy == []


@pytest.mark.slow
def test_a_classifier_starts_from_the_runs_teacher(pretrained: Path) -> None:
    classifier = create_model("vjepa2_large_16", num_classes=3, in_frames=8, crop=32, probe_heads=2, **TINY)
    initialise_from(classifier, str(pretrained))
    before, after = from_pretrained(pretrained / "weights").state_dict(), classifier.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_the_teacher_is_the_closed_form_of_the_students(zero_stage: int, read: Read) -> None:
    """t_n = prod(m) t_1 + sum of (1 - m_i) s_i over the later steps, m rising as V-JEPA 1's does: to 1 in 1.25 runs."""
    steps = 4
    more = ["latent.teacher_momentum=0.6", "latent.final_teacher_momentum=1", "schedule.stretch=1.25", "optim.lr=0.01",
            "checkpoint.every_steps=1", f"checkpoint.keep_last={steps}", f"engine.zero_stage={zero_stage}"]  # fmt: skip
    folder = run_stage(read(f"closed{zero_stage}", *more), command=[]).folder
    parts = [parts_at(folder, step + 1) for step in range(steps)]
    moved = 0.0
    for name, teacher in parts[0]["teacher"].items():
        expected = teacher
        for step in range(1, steps):
            momentum = 0.6 + step * 0.4 / (1.25 * steps)
            expected = momentum * expected + (1 - momentum) * parts[step]["encoder"][name]
        assert parts[-1]["teacher"][name] == pytest.approx(expected, abs=2e-7), name
        moved = max(moved, float(np.abs(expected - teacher).max()))
    assert moved > 1e-3, "the teacher has to move for this to say anything"


def test_momentum_is_a_function_of_the_step() -> None:
    rule = MovingTeacher(student="a.", teacher="b.", momentum=0.998, final_momentum=1.0, stretch=1.25)
    assert rule.at(0, total_steps=100) == pytest.approx(0.998)
    assert rule.at(50, total_steps=100) == pytest.approx(0.998 + 50 * 0.002 / 125)
    constant = MovingTeacher(student="a.", teacher="b.", momentum=0.99925, final_momentum=0.99925)
    assert constant.at(77, total_steps=100) == 0.99925


def launch(read_words: list[str], repository: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    recipe = str(repository / "configs" / "pretrain" / "demo.yaml")
    done = subprocess.run(
        [*command, "-m", "cliplift.launch.cli", "pretrain", recipe, *read_words],
        capture_output=True, text=True, timeout=280, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_ranks_of_zero_2_go_on_as_one_of_zero_1(read: Read, place: Path, repository: Path) -> None:
    """Losses and teacher of a run that changes ranks and stage half way, against one that does not."""
    more = [
        "schedule.steps=6",
        "checkpoint.every_steps=3",
        "checkpoint.keep_last=2",
        "latent.teacher_momentum=0.7",
    ]
    whole = run_stage(read("unbroken", *more), command=[]).folder
    launch(words(place, "broken", *more, "engine.zero_stage=2", "engine.micro_batch=1"), repository)
    broken = place / "latent/broken"
    assert logged(broken, "train/loss") == pytest.approx(logged(whole, "train/loss"), rel=1e-4)
    shutil.rmtree(broken / "checkpoints/step_00000006")
    for late in (broken / "result.json", broken / "weights"):
        shutil.rmtree(late) if late.is_dir() else late.unlink()
    half_way = broken / "checkpoints/step_00000003"
    before = half_way.stat().st_mtime_ns
    resumed = run_stage(read("broken", *more), command=[])
    assert resumed.finished
    assert half_way.stat().st_mtime_ns == before, "it went on from there and did not begin anew"
    assert logged(broken, "train/loss")[-3:] == pytest.approx(logged(whole, "train/loss")[-3:], rel=1e-4)
    ours, theirs = parts_at(broken, 6)["teacher"], parts_at(whole, 6)["teacher"]
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize(
    ("more", "two_ranks"),
    [
        pytest.param([], False, id="plain"),
        pytest.param(DENSE, False, marks=pytest.mark.slow, id="dense"),
        pytest.param([], True, marks=pytest.mark.slow, id="plain on two ranks"),
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
    if two_ranks:
        launch(words(place, "still-ranks", *STILL, *more, "engine.micro_batch=1"), repository)
        assert losses(place / "latent/still-ranks") == expected


def test_the_released_rule_depends_on_the_micro_batch(read: Read) -> None:
    """Which is why it is not the default."""
    found = []
    for batch in (4, 1):
        more = [*STILL, "latent.masks=shortest_of_batch", f"engine.micro_batch={batch}"]
        found.append(logged(run_stage(read(f"released-{batch}", *more), command=[]).folder, "train/loss"))
    assert found[0] != found[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [pytest.param([], id="plain"), pytest.param(DENSE, marks=pytest.mark.slow, id="dense")]
)
def test_recomputation_and_zero_3_change_nothing(model: list[str], read: Read) -> None:
    metrics = []
    for at, more in enumerate(([], ["engine.checkpoint_blocks_share=1"], ["engine.zero_stage=3"])):
        run = read(f"same{len(model)}-{at}", *model, "schedule.steps=3", *more)
        metrics.append(dict(run_stage(run, command=[]).metrics))
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5)
    assert metrics[2] == pytest.approx(metrics[0], rel=1e-4)


def masks(rule: str, grid: TokenGrid) -> LatentMasks:
    return LatentMasks(config=LatentConfig.model_validate({"masks": rule}), grid=grid, seed=3, crop_pixels=0)


def test_masks_of_ten_thousand_clips_prefer_no_end_of_the_clip() -> None:
    """By the default rule; by the released one the end is lost."""
    grid, clips = TokenGrid(8, 8, 8), 10_000
    ours, released = masks("per_clip", grid), masks("shortest_of_batch", grid)
    positions, totals = (
        torch.arange(clips),
        {f"{part}{i}": 0.0 for part in ("context", "hidden") for i in (0, 1)},
    )
    cut = dict(totals)
    for some in positions.split(2_500):
        for rule, sums, batch in ((ours, totals, some), (released, cut, some[:24])):
            drawn = rule.numbers(epochs=torch.zeros_like(batch), positions=batch, step=5)
            for name, numbers in drawn.items():
                in_frame = torch.bincount((numbers // 64).flatten(), minlength=8).double()
                sums[name] = sums[name] + in_frame / len(batch)
    for i, (context, hidden) in enumerate(ours.sizes):
        for name, size in ((f"context{i}", context), (f"hidden{i}", hidden)):
            off = totals[name] / 4 - size / 8
            assert off.abs().max() < 5 * np.sqrt(size / 8 / clips), name
            assert cut[name][-1] < 0.7 * cut[name][0], name


@pytest.mark.parametrize("rule", ["per_clip", "shortest_of_batch"])
def test_lists_are_disjoint_and_blocks_of_the_released_rule_follow_the_step(rule: str) -> None:
    grid = TokenGrid(8, 16, 16)
    drawn = masks(rule, grid).numbers(
        epochs=torch.zeros(12, dtype=torch.int64), positions=torch.arange(12), step=4
    )
    for i, (context, hidden) in enumerate(masks(rule, grid).sizes):
        both = torch.cat([drawn[f"context{i}"], drawn[f"hidden{i}"]], dim=1)
        assert all(len(set(row)) == len(row) for row in both.tolist())
        if rule == "per_clip":
            assert drawn[f"context{i}"].shape == (12, context)
            assert drawn[f"hidden{i}"].shape == (12, hidden)
    again = masks(rule, grid).numbers(
        epochs=torch.zeros(12, dtype=torch.int64), positions=torch.arange(12), step=9
    )
    same = all(torch.equal(value, again[name]) for name, value in drawn.items())
    assert same == (rule == "per_clip")


@pytest.mark.parametrize(
    ("model", "more", "encoder", "predictor"),
    [
        ("vjepa2_large_16", [], 303_885_312, 22_086_016),
        ("vjepa2_giant_16", [], 1_012_173_952, 22_381_312),
        ("vjepa21_giant_16", ["latent.dense=true", "latent.predictor_depth=24"], 1_013_267_968, 55_400_704),
        (
            "vjepa21_gigantic_16",
            ["latent.dense=true", "latent.predictor_depth=24"],
            1_845_216_768,
            59_433_472,
        ),
    ],
)
def test_published_sizes(model: str, more: list[str], encoder: int, predictor: int, read: Read) -> None:
    size = ["data.sampling.frames=16", "data.crop_pixels=256", "data.resize_short_side_pixels=256"]
    published = ["latent.predictor_width=384", "latent.predictor_depth=12", "latent.predictor_heads=12"]
    stage = stage_of(read, f"model={{name: {model}}}", *size, *published, *more)
    with torch.device("meta"):
        built = stage.build_module(weights=False)
    net = built.module.prediction
    assert isinstance(net, LatentPrediction)
    counts = [sum(p.numel() for p in part.parameters()) for part in (net.encoder, net.predictor, net.teacher)]
    assert counts == [encoder, predictor, encoder]
    assert {name: tuple(x.shape) for name, x in stage.example_inputs(built, micro_batch=2, world_size=1).items()} == {
        "clips": (2, 3, 16, 256, 256), "context0": (2, 512), "hidden0": (2, 952), "context1": (2, 131),
        "hidden1": (2, 1439),
    } | ({"context_weight": ()} if more else {})  # fmt: skip


def test_operations_are_three_times_the_students_and_once_the_teachers(read: Read) -> None:
    """Products of the Linears, written out; attention's own are a few per cent of them at this size."""
    stage = stage_of(
        read, "data.sampling.frames=16", "data.crop_pixels=64", "data.resize_short_side_pixels=64"
    )
    tokens, blocks = 512, 2
    cubes = tokens * 2 * 8 * 8 * 3 * 48
    linears = lambda n, width, hidden: n * width * (4 * width + 2 * hidden)  # noqa: E731
    attention = lambda n, width: 2 * n * n * width  # noqa: E731

    def encoder(n: int) -> int:
        return cubes + blocks * (linears(n, 48, 96) + attention(n, 48))

    def predictor(n: int, m: int) -> int:
        return n * 48 * 36 + linears(n + m, 36, 144) + attention(n + m, 36) + m * 36 * 48

    student = sum(encoder(n) + predictor(n, m) for n, m in ((128, 238), (32, 359)))
    assert stage.flops_per_clip == pytest.approx(2 * (3 * student + encoder(tokens)), rel=1e-6)


@pytest.mark.parametrize(
    "more", [pytest.param([], id="plain"), pytest.param(DENSE, marks=pytest.mark.slow, id="dense")]
)
def test_the_memory_plan_has_the_teacher_as_a_weight_without_an_optimizer(
    more: list[str], read: Read
) -> None:
    run = read("planned", *more, "engine.zero_stage=1")
    plan, sizes = plan_memory(run, classes=0, world_size=1, on_gpu=False)
    net = stage_of(read, *more).module.prediction
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    teacher = sum(p.numel() for p in net.teacher.parameters())
    assert sizes.trained == trained
    assert plan.weights >= 4 * (trained + teacher)
    assert plan.optimizer == 2 * 4 * trained
    everything, _ = plan_memory(
        run.model_copy(update={"engine": run.engine.model_copy(update={"checkpoint_blocks_share": 1.0})}),
        classes=0, world_size=1, on_gpu=False,
    )  # fmt: skip
    assert everything.saved_activations < 0.6 * plan.saved_activations


def test_the_contexts_weight_rises_between_two_steps() -> None:
    config = LatentConfig.model_validate({"dense": True, "context_ramp_steps": [15_000, 30_000]})
    assert [context_weight(config, step) for step in (0, 15_000, 21_000, 30_000, 90_000)] == [
        0,
        0,
        0.2,
        0.5,
        0.5,
    ]
    assert context_weight(LatentConfig(context_weight=0.3), 0) == 0.3


@pytest.mark.parametrize("more", [[], DENSE], ids=["plain", "dense"])
def test_evaluation_is_the_mean_over_clips(more: list[str], read: Read) -> None:
    stage = stage_of(read, *more)
    stage.module.eval()
    losses: list[float] = []
    for batch in EvalLoader(stage.run.data, split="val", batch=3, rank=0, world_size=1):
        with torch.no_grad():
            losses += stage.module(stage.inputs(batch, training=False, step=0))["loss_of_clip"].tolist()
    metrics = stage.evaluate(topology=ONE_RANK)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert metrics["samples"] == len(losses) > 1
    columns, rows = stage.clip_table(2)  # type: ignore[misc]
    assert columns == ("key", "loss")
    assert [row[1] for row in rows] == pytest.approx(sorted(losses, reverse=True)[:2], rel=1e-6)


@pytest.mark.slow
def test_a_probe_of_the_teacher_chooses_the_weights(read: Read, place: Path) -> None:
    """An attentive one, trained at each evaluation on a schedule; what is pretrained does not notice."""
    attentive = {"lrs": [3e-3, 1e-4], "weight_decays": [0.1], "epochs": 1, "batch": 6, "depth": 2, "heads": 2}
    settings = {"shards": f"{place}/shards/actions", "neighbours": 1, "linear_steps": 5}
    more = ["evaluation.every_steps=2", "schedule.steps=4", "optim.lr=0.003"]
    losses = []
    for name, probed in (("plain", settings), ("attentive", settings | {"attentive": attentive})):
        folder = run_stage(read(f"probed-{name}", f"probe={json.dumps(probed)}", *more), command=[]).folder
        losses.append(logged(folder, "train/loss"))
    assert losses[0] == losses[1]
    result = json.loads((folder / "result.json").read_text())["metrics"]
    found = logged(folder, "eval/probe_attentive_accuracy")
    assert len(found) == 2
    assert result["probe_attentive_accuracy"] == max(found)
    assert 0 <= result["probe_attentive_median_accuracy"] <= result["probe_attentive_accuracy"] <= 1
    assert result["probe_attentive_lr"] in attentive["lrs"]
    assert result["probe_attentive_weight_decay"] == 0.1
    assert {"probe_knn_accuracy", "probe_linear_accuracy"} <= result.keys()


@pytest.mark.parametrize(
    ("settings", "key", "said"),
    [
        ({"heads": 5}, "probe.attentive.heads", "multiple of heads"),
        ({"batch": 400}, "probe.attentive.batch", "more than"),
    ],
)
def test_a_probe_that_does_not_fit_is_refused(
    settings: dict[str, int], key: str, said: str, read: Read, place: Path
) -> None:
    probed = {"shards": f"{place}/shards/actions", "linear_steps": 0, "attentive": {"heads": 2} | settings}
    stage = stage_of(read, f"probe={json.dumps(probed)}", "evaluation.max_samples=2")
    stage.module.eval()
    with pytest.raises(ConfigError, match=said) as caught:
        stage.evaluate(topology=ONE_RANK)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("more", "key", "said"),
    [
        (["data.augment.mixup_alpha=0.2"], "data.augment.mixup_alpha", "latent prediction has none"),
        (["data.modality=flow", "data.augment={}"], "data.modality", "not what its encoders take"),
        (["engine.precision=bf16"], "engine.precision", "small steps of the teacher"),
        (["optim.average_decay=0.999"], "optim.average_decay", "an average already"),
        (["latent.masks=shortest"], "latent.masks", "shortest_of_batch"),
        (["latent.context_ramp_steps=[9, 3]"], "latent.context_ramp_steps", "must ascend"),
    ],
)
def test_an_impossible_config_names_its_key(more: list[str], key: str, said: str, read: Read) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read("refused", *more)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("more", "key", "said"),
    [
        (["model={name: t3d_tiny}"], "model.name", "cannot be pretrained by latent prediction"),
        (["model={name: hiera_base}"], "model.name", "objective latent takes"),
        (["model.options.crop=64"], "model.options.crop", "is not data.crop_pixels=32"),
        (["latent.dense=true"], "latent.dense", "predicts four levels"),
        (["latent.predictor_heads=5"], "latent.predictor_width", "no such predictor"),
        (["data.crop_pixels=8", "data.sampling.frames=2"], "data.crop_pixels", "too few for the blocks"),
        (["data.sampling.frames=7"], "model", "whole tubelets"),
    ],
)
def test_what_cannot_be_predicted_is_refused_in_one_sentence(
    more: list[str], key: str, said: str, read: Read
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        run_stage(read("refused", *more), command=[])
    assert caught.value.key == key
