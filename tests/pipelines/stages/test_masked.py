"""Masked pretraining, end to end on unlabelled shards: its loss against transformers and plain arithmetic, its masks,
and that ranks and micro-batches change nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cliplift.configs.load import load_run
from cliplift.configs.objectives import MaskedConfig
from cliplift.configs.runs import RUNS
from cliplift.configs.sections import ConfigError
from cliplift.models import create_model, from_pretrained
from cliplift.models.video_vit.decoder import MaskedAutoencoder
from cliplift.models.video_vit.huggingface import save_huggingface
from cliplift.models.video_vit.positions import TokenGrid
from cliplift.pipelines.data.eval_loader import EvalLoader
from cliplift.pipelines.data.loader import ClipLoader
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.stages.masked import ClipMasks, MaskedStage, hidden_tokens, masked_metrics
from cliplift.pipelines.stages.run import run_stage
from cliplift.pipelines.stages.starting_weights import initialise_from
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.demo.synthetic import write_demo_videos

ONE_RANK = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
TINY = {"patch": 8, "width": 48, "depth": 2, "heads": 4, "hidden": 96}
SMALL_HIERA = {"width": 16, "heads": 1, "stages": [1, 1, 2, 1]}
DUAL = ["masked.decoder_mask=running_cell", "masked.decoder_ratio=0.5"]
HIERA = [f"model={json.dumps({'name': 'hiera_base', 'options': SMALL_HIERA})}", "masked.mask=random",
         "masked.ratio=0.6", "masked.decoder_width=32", "masked.decoder_depth=1", "masked.decoder_heads=2",
         "data.crop_pixels=64", "data.resize_short_side_pixels=64", "data.sampling.frames=4"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    folder = tmp_path_factory.mktemp("masked")
    write_demo_videos(
        folder / "videos",
        seed=1,
        train_per_class=0,
        val_per_class=0,
        test_per_class=0,
        unlabelled=10,
        size_pixels=48,
    )
    words = [f"source.root={folder}/videos/unlabelled", f"output={folder}/shards", "workers=2"]
    run_shard(load_run(repository / "configs" / "shard" / "demo_unlabelled.yaml", RUNS, words).run)
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    counts = {"train_per_class": 2, "val_per_class": 1, "test_per_class": 0, "unlabelled": 0}
    write_demo_videos(folder / "videos", seed=2, size_pixels=48, **counts)
    words = [f"source.root={folder}/videos/labelled", f"output={folder}/shards", "workers=2"]
    run_shard(load_run(repository / "configs" / "shard" / "demo_actions.yaml", RUNS, words).run)
    return folder / "shards"


def words(place: Path, output: str, *more: str) -> list[str]:
    model = {"name": "video_vit_tiny_8", "options": TINY}
    return [
        "objective=masked", "label_smoothing=0", f"data.shards={place}/shards", f"output={place}/{output}",
        "track.wandb=disabled", "data.sampling.frames=8", "data.sampling.stride=1", "data.crop_pixels=32",
        "data.resize_short_side_pixels=36", f"model={json.dumps(model)}", "masked.ratio=0.75",
        "engine.global_batch=4", "engine.channels_last=false", "optim.name=adamw", "optim.lr=0.001",
        "evaluation.every_steps=null", "schedule.steps=3", "track.every_steps=1", *more,
    ]  # fmt: skip


def load(repository: Path, place: Path, output: str, *more: str) -> Any:
    return load_run(repository / "configs/pretrain/demo.yaml", RUNS, words(place, output, *more)).run


def stage_of(repository: Path, place: Path, *more: str) -> MaskedStage:
    torch.manual_seed(0)
    return MaskedStage(load(repository, place, "unused", *more), classes=(), topology=ONE_RANK)


@pytest.fixture(scope="module")
def pretrained(place: Path, repository: Path) -> Path:
    more = ["schedule.steps=20", "optim.lr=0.003", "masked.normalise_targets=false", *DUAL]
    run = load(repository, place, "pretrain", *more)
    result = run_stage(run, command=["cliplift", "pretrain"])
    assert result.finished
    return result.folder


def test_it_trains_on_clips_without_labels_and_says_how_it_did(pretrained: Path) -> None:
    metrics = json.loads((pretrained / "result.json").read_text())["metrics"]
    assert metrics.keys() == {"loss", "target_variance", "skill", "samples"}
    assert metrics["skill"] == pytest.approx(1 - metrics["loss"] / metrics["target_variance"])
    rows = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 20
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def numpy_loss(stage: MaskedStage, pixels: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[float]:
    """Of each clip, from its frames as they are stored: predictions of the net, and all else in numpy.

    ``pixels``: (B, T, H, W, C) uint8, as the network sees them.
    """
    with torch.no_grad():
        found = stage.module.reconstruct(inputs)  # type: ignore[operator]
    losses = []
    for clip, predicted, decoded, visible in zip(
        pixels.numpy() / 255, found.prediction.double().numpy(), found.decoded.tolist(),
        inputs["visible"].tolist(), strict=True,
    ):  # fmt: skip
        errors = []
        for row, token in enumerate(decoded):
            t, h, w = np.unravel_index(token, (4, 4, 4))
            cube = clip[2 * t : 2 * t + 2, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8]
            mean, spread = cube.mean(axis=(0, 1, 2)), cube.std(axis=(0, 1, 2), ddof=1)
            target = ((cube - mean) / (spread + 1e-6)).reshape(-1)
            if token not in visible:
                errors.append(np.mean((predicted[row] - target) ** 2))
        losses.append(float(np.mean(errors)))
    return losses


@pytest.mark.parametrize("dual", [False, True])
def test_the_loss_by_plain_arithmetic(dual: bool, place: Path, repository: Path) -> None:
    more = ["data.augment={crop: centre, flip: false}", *(DUAL if dual else [])]
    stage = stage_of(repository, place, *more)
    stage.module.eval()
    losses = []
    for batch in EvalLoader(stage.run.data, split="val", batch=3, rank=0, world_size=1):
        inputs = stage.inputs(batch, training=False, step=0)
        expected = numpy_loss(stage, batch.clips, inputs)
        with torch.no_grad():
            outputs = stage.module(inputs)
        assert outputs["loss_of_clip"].tolist() == pytest.approx(expected, rel=1e-5)
        assert outputs["loss"].item() == pytest.approx(np.mean(expected), rel=1e-5)
        losses += expected
    metrics = stage.evaluate(topology=ONE_RANK)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["samples"] == len(losses) > 1
    columns, rows = stage.clip_table(2)  # type: ignore[misc]
    assert columns == ("key", "loss")
    assert [row[1] for row in rows] == pytest.approx(sorted(losses, reverse=True)[:2], rel=1e-5)


def test_the_loss_of_transformers(place: Path, repository: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    stage = stage_of(repository, place, "masked.decoder_heads=3")
    net = stage.module.eval().autoencoder
    assert isinstance(net, MaskedAutoencoder)
    save_huggingface(net, tmp_path)
    theirs = transformers.VideoMAEForPreTraining.from_pretrained(tmp_path).eval()
    theirs.decoder.norm.eps = 1e-6  # the released code's, which a config cannot change
    loader = ClipLoader(stage.run.data, seed=0, global_batch=4, micro_batch=4, rank=0, world_size=1)
    inputs = stage.inputs(next(loader.micro_batches(start_step=0, stop_step=1)), training=True, step=0)
    hidden = torch.ones(4, 64, dtype=torch.bool).scatter_(1, inputs["visible"], False)
    with torch.no_grad():
        ours = stage.module(inputs)["loss"]
        other = theirs(pixel_values=inputs["clips"].transpose(1, 2), bool_masked_pos=hidden).loss
    assert ours.item() == pytest.approx(other.item(), abs=1e-5)


BASE = TokenGrid(8, 14, 14)  # ViT-B/16 on 16 x 224 x 224


@pytest.mark.parametrize(
    ("config", "units", "grid", "visible", "decoded"),
    [
        ({}, False, BASE, 160, None),  # VideoMAE: 20 places of 196
        ({"ratio": 0.75}, False, BASE, 392, None),  # UCF101
        ({}, False, TokenGrid(8, 16, 16), 208, None),  # ViT-g/14
        ({"decoder_mask": "running_cell"}, False, BASE, 160, 784),  # VideoMAE v2
        ({"mask": "random"}, False, BASE, 1568 - 1411, None),
        ({"mask": "running_cell", "ratio": 0.75}, False, BASE, 392, None),
        ({"mask": "random"}, True, TokenGrid(8, 7, 7), 39, None),  # Hiera
        ({"decoder_mask": "random", "decoder_ratio": 0.3}, False, BASE, 160, 1568 - 470),
    ],
)
def test_masks_of_a_thousand_clips_have_the_planned_sizes(
    config: dict[str, Any], units: bool, grid: TokenGrid, visible: int, decoded: int | None
) -> None:
    masks = ClipMasks(config=MaskedConfig.model_validate(config), grid=grid, seed=3, units=units)
    assert (masks.visible, masks.decoded) == (visible, decoded)
    numbers = masks.numbers(epochs=torch.arange(1000) // 100, positions=torch.arange(1000) % 100)
    assert numbers["visible"].shape == (1000, visible)
    assert ("decoded" in numbers) == (decoded is not None)
    if decoded is not None:
        assert numbers["decoded"].shape == (1000, decoded)
    different = {tuple(row) for row in numbers["visible"].tolist()}
    assert len(different) == (4 if masks.config.mask == "running_cell" else 1000)


def test_a_running_cell_encoder_and_decoder_cover_every_token() -> None:
    """Two decoders two frames of tokens apart decode each place once; hidden counts by kind."""
    assert hidden_tokens("running_cell", BASE, 0.5) == 784
    config = MaskedConfig.model_validate({"decoder_mask": "running_cell"})
    decoded = ClipMasks(config=config, grid=BASE, seed=0).numbers(
        epochs=torch.zeros(1000, dtype=torch.int64), positions=torch.arange(1000)
    )["decoded"]
    seen = torch.zeros(1000, BASE.tokens, dtype=torch.int64).scatter_(1, decoded, 1).unflatten(1, (8, -1))
    assert (seen[:, :-2] + seen[:, 2:] == 1).all()


@pytest.mark.parametrize(
    ("more", "two_ranks"),
    [
        pytest.param(DUAL, False, id="dual"),
        pytest.param(DUAL, True, marks=pytest.mark.slow, id="dual on two ranks"),
        pytest.param(HIERA, True, marks=pytest.mark.slow, id="hiera on two ranks"),
    ],
)
def test_losses_are_equal_bit_for_bit_for_any_micro_batch_and_two_ranks(
    more: list[str], two_ranks: bool, place: Path, repository: Path
) -> None:
    """Real engines over 4 steps, past the end of an epoch, with weights that do not move: logged and evaluated."""
    still = ["optim.lr=1e-30", "optim.weight_decay=0", "schedule.steps=4", "track.every_steps=2", *more]

    def losses(folder: Path) -> list[float]:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found = [row[name] for row in rows for name in ("train/loss", "eval/loss") if name in row]
        assert len(found) == 3, "two lines of two steps each, and the evaluation"
        return found

    expected = None
    for batch in (4, 1):
        name = f"still{len(more)}-{two_ranks}-{batch}"
        run = load(
            repository, place, name, *still, f"engine.micro_batch={batch}", f"evaluation.batch={batch}"
        )
        found = losses(run_stage(run, command=[]).folder)
        expected = expected or found
        assert found == expected
    if not two_ranks:
        return
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    recipe = str(repository / "configs" / "pretrain" / "demo.yaml")
    name = f"still{len(more)}-ranks"
    done = subprocess.run(
        [*launch, "-m", "cliplift.launch.cli", "pretrain", recipe, *words(place, name, *still), "engine.micro_batch=1"],
        capture_output=True, text=True, timeout=280, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(place / name) == expected


@pytest.mark.parametrize("stage", [0, 3])
def test_it_trains_the_same_at_every_zero_stage(stage: int, place: Path, repository: Path) -> None:
    metrics = []
    for at in (1, stage):
        run = load(repository, place, f"zero{stage}-{at}", f"engine.zero_stage={at}", *DUAL)
        metrics.append(dict(run_stage(run, command=[]).metrics))
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)


def test_recomputation_reaches_the_decoder_and_changes_nothing(place: Path, repository: Path) -> None:
    metrics = []
    for share in (0, 1):
        run = load(repository, place, f"recomputed{share}", f"engine.checkpoint_blocks_share={share}")
        metrics.append(dict(run_stage(run, command=[]).metrics))
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)
    stage = stage_of(repository, place)
    names = stage.module.autoencoder.checkpoint_blocks()
    assert "decoder.blocks.0" in names
    assert "encoder.blocks.0" in names


def test_a_classifier_starts_from_the_runs_encoder(pretrained: Path) -> None:
    card = json.loads((pretrained / "weights" / "config.json").read_text())
    assert card["extra"]["masked"]["decoder_mask"] == "running_cell"
    assert "classes" not in card["extra"]
    classifier = create_model("video_vit_tiny_8", num_classes=3, in_frames=8, crop=32, **TINY)
    initialise_from(classifier, str(pretrained))
    before, after = from_pretrained(pretrained / "weights").state_dict(), classifier.state_dict()
    body = [key for key in after if key.startswith(("patch_embed.", "blocks."))]
    assert len(body) == len(after) - 4, "all but the fresh LN and the head"
    assert all(torch.equal(after[key], before[key]) for key in body)
    assert torch.equal(after["fc_norm.weight"], torch.ones(48))


def test_hiera_is_pretrained_and_finetuned(place: Path, repository: Path) -> None:
    folder = run_stage(load(repository, place, "hiera", *HIERA), command=[]).folder
    classifier = create_model("hiera_base", num_classes=3, in_frames=4, crop=64, **SMALL_HIERA)
    initialise_from(classifier, str(folder))
    before, after = from_pretrained(folder / "weights").state_dict(), classifier.state_dict()
    body = [key for key in after if key.startswith(("patch_embed.", "blocks.", "places."))]
    assert len(body) == len(after) - 4, "all but the fresh LN and the head"
    assert all(torch.equal(after[key], before[key]) for key in body)


@pytest.mark.parametrize(
    ("model", "more", "gmacs"),
    [
        ("video_vit_small_16", [], 11.5),
        ("video_vit_base_16", [], 35.4),
        ("video_vit_base_16", ["masked.decoder_mask=running_cell"], 25.8),
        ("video_vit_large_16", ["masked.decoder_depth=12"], 142.6),
        ("hiera_base", ["masked.mask=random"], 71.3),
    ],
)
def test_operations_are_those_of_the_released_code(
    model: str, more: list[str], gmacs: float, place: Path, repository: Path
) -> None:
    """Forward pass of one 16 x 224 clip at ratio 0.9, counted by instantiating the released nets."""
    stage = stage_of(
        repository, place, f"model={{name: {model}}}", "masked.ratio=0.9", "data.sampling.frames=16",
        "data.crop_pixels=224", "data.resize_short_side_pixels=224", *more,
    )  # fmt: skip
    flops = stage.flops_per_clip
    assert flops is not None
    assert flops / 3 / 2e9 == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize(
    ("more", "key", "said"),
    [
        (["data.augment.mixup_alpha=0.2"], "data.augment.mixup_alpha", "masked pretraining has none"),
        (["label_smoothing=0.1"], "label_smoothing", "masked pretraining has none"),
        (["data.modality=flow", "data.augment={}"], "data.modality", "no pixels to predict"),
        (["engine.precision=bf16"], "engine.precision", "rounds the pixels"),
        (["masked.mask=running_cell", "masked.ratio=0.2"], "masked.ratio", "is less than 1"),
        (["masked.decoder_mask=running_cell", "masked.decoder_ratio=0.1"], "masked.decoder_ratio", "less than 1"),
        (["masked.decoder_mask=tube"], "masked.decoder_mask", "tube"),
        (["objective=classification", "probe={shards: a}"], "probe", "without labels"),
    ],
)  # fmt: skip
def test_an_impossible_config_names_its_key(
    more: list[str], key: str, said: str, place: Path, repository: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load(repository, place, "refused", *more)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("more", "key", "said"),
    [
        (["model={name: t3d_tiny}"], "model.name", "cannot be pretrained by masking"),
        (["model={name: vjepa2_large_16}"], "model.name", "cannot be pretrained by masking"),
        (["model.options.crop=64"], "model.options.crop", "is not data.crop_pixels=32"),
        (["model.options.final_norm=pooled"], "model.options.final_norm", "needs 'tokens'"),
        (["masked.ratio=0.01"], "masked.ratio", "leaves 64 of 64 tokens visible"),
        (["masked.decoder_mask=running_cell", "data.crop_pixels=24"], "masked.decoder_mask", "has 3x3"),
        (["data.sampling.frames=7"], "model", "whole tubelets"),
        (["data.crop_pixels=33"], "model", "whole tubelets"),
        ([*HIERA, "masked.mask=tube"], "masked.mask", "Hiera hides random mask units"),
        ([*HIERA, "masked.decoder_mask=random"], "masked.decoder_mask", "Hiera hides random mask units"),
    ],
)
def test_what_cannot_be_masked_is_refused_in_one_sentence(
    more: list[str], key: str, said: str, place: Path, repository: Path
) -> None:
    run = load(repository, place, "refused", *more)
    with pytest.raises(ConfigError, match=said) as caught:
        run_stage(run, command=[])
    assert caught.value.key == key


@pytest.mark.parametrize("more", [(), tuple(HIERA)], ids=["video_vit", "hiera"])
def test_features_are_probed_with_labels(
    more: tuple[str, ...], labelled: Path, place: Path, repository: Path
) -> None:
    """k-NN of one neighbour, written out on the encoder's own features."""
    settings = {"shards": str(labelled), "neighbours": 1, "linear_steps": 5}
    stage = stage_of(repository, place, f"probe={json.dumps(settings)}", *more)
    stage.module.eval()
    metrics = stage.evaluate(topology=ONE_RANK)
    assert 0 <= metrics["probe_linear_accuracy"] <= 1
    encoder, found = stage.built.network, {}
    data = stage.run.data.model_copy(update={"shards": (str(labelled),)})
    for split in ("train", "val"):
        rows, labels = [], []
        for batch in EvalLoader(data, split=split, batch=4, rank=0, world_size=1):
            with torch.no_grad():
                rows.append(encoder(stage.views[False](batch)))
            labels += batch.labels.tolist()
        found[split] = torch.nn.functional.normalize(torch.cat(rows).double(), dim=1), np.array(labels)
    nearest = (found["val"][0] @ found["train"][0].T).argmax(dim=1).numpy()
    right = (found["train"][1][nearest] == found["val"][1]).mean()
    assert metrics["probe_knn_accuracy"] == pytest.approx(right)
    assert metrics["probe_chance"] == pytest.approx(1 / len(set(found["train"][1])))


def test_still_targets_have_no_skill_to_show() -> None:
    assert "skill" not in masked_metrics([(0.5, 0.0)])
    assert masked_metrics([(0.2, 0.5), (0.4, 1.5)])["skill"] == pytest.approx(0.7)
