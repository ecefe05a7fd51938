"""Recipes of VideoMAE, VideoMAE v2, Hiera and V-JEPA against what their authors published, read from their files anew.

The tables are in the authors' units: videos a step, clips of each, learning rate for so many of them, epochs. Sources:
MCG-NJU/VideoMAE and OpenGVLab/VideoMAEv2, ``scripts``; arXiv 2306.00989, tables 11 and 12; facebookresearch/vjepa2,
``configs``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS, FinetuneRun, PretrainRun
from cliplift.models import create_model
from cliplift.pipelines.engine.optim import peak_lr
from cliplift.pipelines.stages.run import require_splits

CONFIGS = Path(__file__).parents[2] / "configs"
FAMILIES = ("videomae", "hiera", "vjepa")
RECIPES = {
    f"{stage}/{path.stem}"
    for stage in ("pretrain", "finetune")
    for path in (CONFIGS / stage).glob("*.yaml")
    if path.stem.startswith(FAMILIES)
}
SPLITS = {
    "kinetics400": ("train", "val"), "kinetics600": ("train", "val"), "kinetics710": ("train", "val"),
    "something-something": ("train", "val", "test"), "ucf101": ("train", "test"), "hmdb51": ("train", "test"),
    "diving48": ("train", "test"), "howto100m": ("train",), "unlabelled-hybrid": ("train",),
}  # fmt: skip
CLASSES = {"kinetics400": 400, "kinetics600": 600, "kinetics710": 710, "something-something": 174, "ucf101": 101,
           "hmdb51": 51, "diving48": 48}  # fmt: skip


@cache
def recipe(name: str) -> PretrainRun | FinetuneRun:
    run = load_run(CONFIGS / f"{name}.yaml", RUNS).run
    assert isinstance(run, (PretrainRun, FinetuneRun))
    return run


@dataclass(frozen=True)
class Published:
    """One line of a script or of a paper's table."""

    name: str
    model: str
    data: str
    videos: int  # a step
    clips: int  # of each video
    lr: float  # in effect, at this batch
    last_lr: float  # likewise
    epochs: float
    warmup: float  # epochs
    decay: float  # weight decay
    layers: float = 1.0  # layer decay
    drop_path: float | None = None
    dropout: float | None = None
    clip: float = 0.0  # gradient norm
    frames: int = 16
    stride: int = 4
    views: tuple[int, int] = (5, 3)


def per_256(lr: float, videos: int) -> float:
    return lr * videos / 256


def videomae(  # noqa: PLR0917 - a row of a table
    name: str, model: str, data: str, videos: int, lr: float, epochs: float, *, clips: int = 2, last: float = 1e-6,
    warmup: float = 5, decay: float = 0.05, layers: float = 0.75, drop_path: float = 0.1, dropout: float | None = None,
    clip: float = 0.0, stride: int = 4,
) -> Published:  # fmt: skip
    """A finetuning script; its defaults are those of run_class_finetuning.py."""
    return Published(
        f"finetune/{name}", f"video_vit_{model}", data, videos, clips, per_256(lr, videos), per_256(last, videos),
        epochs, warmup, decay, layers, drop_path, dropout, clip, stride=stride,
        views=(2, 3) if data == "something-something" else (5, 3),
    )  # fmt: skip


def masked(
    name: str, model: str, data: str, videos: int, epochs: float, *, lr: float = 1.5e-4, warmup: float = 40,
    clips: int = 1, clip: float = 0.0, stride: int = 4,
) -> Published:  # fmt: skip
    """A script of run_mae_pretraining.py."""
    return Published(
        f"pretrain/{name}", f"video_vit_{model}", data, videos, clips, per_256(lr, videos), per_256(1e-5, videos),
        epochs, warmup, 0.05, clip=clip, stride=stride,
    )  # fmt: skip


K400, K600, K710 = "kinetics400", "kinetics600", "kinetics710"
SSV2, UCF, HMDB, HYBRID = "something-something", "ucf101", "hmdb51", "unlabelled-hybrid"
V1 = (  # GPUs x videos on each
    masked("videomae_small_k400", "small_16", K400, 32 * 32, 1600),
    masked("videomae_base_k400", "base_16", K400, 64 * 32, 1600),
    masked("videomae_large_k400", "large_16", K400, 64 * 8, 1600),
    masked("videomae_huge_k400", "huge_16", K400, 64 * 16, 1600),
    masked("videomae_base_ssv2", "base_16", SSV2, 64 * 32, 2400, stride=2),
    masked("videomae_small_ssv2", "small_16", SSV2, 64 * 32, 2400, stride=2),
    masked("videomae_base_ucf101", "base_16", UCF, 8 * 24, 3200, lr=3e-4),
    videomae("videomae_small_k400", "small_16", K400, 32 * 12, 5e-4, 150),
    videomae("videomae_base_k400", "base_16", K400, 64 * 6, 5e-4, 75),
    videomae("videomae_base_800_k400", "base_16", K400, 64 * 8, 1e-3, 100, clips=1),
    videomae("videomae_large_k400", "large_16", K400, 64 * 2, 2e-3, 35),
    videomae("videomae_huge_k400", "huge_16", K400, 64 * 8, 1e-3, 50, last=1e-5, drop_path=0.2, dropout=0.5),
    videomae("videomae_small_ssv2", "small_16", SSV2, 32 * 12, 1e-3, 40, layers=0.7),
    videomae("videomae_base_ssv2", "base_16", SSV2, 64 * 6, 5e-4, 30),
    videomae("videomae_base_800_ssv2", "base_16", SSV2, 64 * 8, 5e-4, 50, clips=1),
    videomae(
        "videomae_base_ucf101", "base_16", UCF, 8 * 16, 5e-4, 100, last=1e-5, layers=0.7, drop_path=0.2, dropout=0.5
    ),
)  # fmt: skip
V2 = (
    masked("videomae2_base", "base_16", HYBRID, 32 * 32, 200, lr=1e-3, warmup=20, clips=4),
    masked("videomae2_large", "large_16", HYBRID, 48 * 32, 300, lr=1e-3, warmup=30, clips=4),
    masked("videomae2_huge", "huge_16", HYBRID, 64 * 32, 300, lr=1e-3, warmup=30, clips=4),
    masked("videomae2_giant", "giant_14", HYBRID, 64 * 32, 300, lr=6e-4, warmup=30, clips=4, clip=0.02),
    videomae("videomae2_base_k400", "base_16", K400, 32 * 16, 7e-4, 90),
    videomae("videomae2_large_k400", "large_16", K400, 32 * 6, 2e-3, 35, drop_path=0.2),
    videomae("videomae2_huge_k400", "huge_16", K400, 32 * 4, 1e-3, 40, layers=0.8, drop_path=0.2, dropout=0.5),
    videomae("videomae2_giant_k400", "giant_14", K400, 64 * 3, 1e-3, 30, decay=0.1, layers=0.9, drop_path=0.2),
    videomae("videomae2_base_k710", "base_16", K710, 32 * 16, 7e-4, 90),
    videomae("videomae2_huge_k710", "huge_16", K710, 32 * 4, 1e-3, 40, layers=0.8, drop_path=0.2, dropout=0.5),
    videomae("videomae2_giant_k710", "giant_14", K710, 32 * 3, 1e-3, 35, decay=0.1, layers=0.9, drop_path=0.3, clip=5),
    *(
        videomae(
            f"videomae2_giant_k710_{short}", "giant_14", data, 32 * 3, 1e-5, 3, warmup=1, decay=0.1, layers=0.9,
            drop_path=0.25,
        )
        for short, data in (("k400", K400), ("k600", K600))
    ),
    videomae("videomae2_base_ssv2", "base_16", SSV2, 16 * 16, 2e-3, 25, layers=0.65),
    videomae("videomae2_large_ssv2", "large_16", SSV2, 32 * 6, 5e-4, 20, drop_path=0.2),
    videomae("videomae2_huge_ssv2", "huge_16", SSV2, 32 * 4, 5e-4, 20, layers=0.8, drop_path=0.2),
    videomae("videomae2_giant_ssv2", "giant_14", SSV2, 32 * 3, 3e-4, 20, layers=0.9, drop_path=0.25),
    videomae("videomae2_giant_ucf101", "giant_14", UCF, 8 * 3, 1e-3, 50, layers=0.9, drop_path=0.35, dropout=0.5),
    videomae(
        "videomae2_giant_hmdb51", "giant_14", HMDB, 8 * 3, 5e-4, 15, layers=0.9, drop_path=0.35, dropout=0.5, stride=2
    ),
)  # fmt: skip


def hiera_masked(name: str, lr: float, drop_path: float) -> Published:
    """Table 11a at 3200 epochs of clips, which are 800 passes of 4 clips; 512 clips a step."""
    return Published(
        f"pretrain/hiera_{name}_k400", f"hiera_{name}", K400, 128, 4, lr, 0, 3200 / 4, 120 / 4, 0.05,
        drop_path=drop_path,
    )  # fmt: skip


def hiera(  # noqa: PLR0917 - a row of a table
    name: str, lr: float, epochs: int, layers: float, drop_path: float, dropout: float
) -> Published:
    """Table 11b after 3200 epochs; 256 clips a step."""
    return Published(
        f"finetune/hiera_{name}_k400", f"hiera_{name}", K400, 128, 2, lr, 0, epochs, 10, 0.05, layers, drop_path,
        dropout, 5.0,
    )  # fmt: skip


HIERA = (
    hiera_masked("base", 8e-4, 0.1), hiera_masked("base_plus", 8e-4, 0.2), hiera_masked("large", 8e-4, 0.2),
    hiera_masked("huge", 3.2e-4, 0.4),
    hiera("base", 8e-4, 150, 0.8, 0.2, 0.3), hiera("base_plus", 8e-4, 150, 0.8, 0.2, 0.3),
    hiera("large", 8e-4, 100, 0.875, 0.2, 0.5), hiera("huge", 4e-4, 100, 0.875, 0.3, 0.5),
    Published("pretrain/hiera_large_ssv2", "hiera_large", SSV2, 1024, 1, 8e-4, 0, 1600, 30, 0.05, drop_path=0.2,
              clip=0.02, stride=2),
    Published("finetune/hiera_large_ssv2", "hiera_large", SSV2, 256, 1, 0.16, 0, 40, 3, 1e-4, 0.875, 0.1, 0.5,
              views=(2, 3)),
    Published("finetune/hiera_large_32_ssv2", "hiera_large", SSV2, 128, 1, 0.08, 0, 40, 3, 1e-4, 0.875, 0.2, 0.5,
              frames=32, views=(1, 3)),
)  # fmt: skip
BY_EPOCHS = (*V1, *V2, *HIERA)


@pytest.mark.parametrize("published", BY_EPOCHS, ids=lambda published: published.name)
def test_batch_rates_and_length(published: Published) -> None:
    run = recipe(published.name)
    data, optim, schedule, batch = run.data, run.optim, run.schedule, run.engine.global_batch
    assert (data.urls, run.model.name) == ((f"shards/{published.data}",), published.model)
    assert (batch, data.clips_per_sample) == (published.videos * published.clips, published.clips)
    assert peak_lr(optim, global_batch=batch) == pytest.approx(published.lr)
    assert schedule.final_lr_share * published.lr == pytest.approx(published.last_lr, rel=1e-4)
    assert schedule.name == "cosine"
    assert schedule.epochs == published.epochs
    assert schedule.warmup_share * published.epochs == pytest.approx(published.warmup, rel=1e-5)
    assert (optim.weight_decay, optim.layer_decay, optim.clip_grad_norm) == (
        published.decay, published.layers, published.clip,
    )  # fmt: skip
    assert run.model.options.get("drop_path") == published.drop_path
    assert run.model.options.get("dropout") == published.dropout
    assert data.sampling.frames == published.frames
    if published.data == HYBRID:  # every second frame of 12 a second
        assert (data.sampling.stride, data.sampling.fps) == (1, 12 / 2)
    elif data.sampling.mode == "dense":
        assert (data.sampling.stride, data.sampling.fps) == (published.stride, None)
    assert data.crop_pixels == 224


@pytest.mark.parametrize("published", BY_EPOCHS, ids=lambda published: published.name)
def test_augmentation_views_and_optimizer(published: Published) -> None:
    run = recipe(published.name)
    data, augment, ssv2 = run.data, run.data.augment, published.data == SSV2
    if isinstance(run, FinetuneRun):
        assert augment.flip is not ssv2
        assert (data.sampling.mode == "segments") is ssv2
        assert (data.views.clips, data.views.crops) == published.views
        if published.views == (2, 3):
            assert data.views.position == "from_start"
        assert (augment.rand_augment_ops, augment.rand_augment_magnitude, augment.rand_augment_magnitude_std) == (
            4, 7, 0.5,
        )  # fmt: skip
        mixed = (0, 0, 0) if "_32_" in published.name else (0.8, 1.0, 0.1)
        assert (augment.mixup_alpha, augment.cutmix_alpha, run.label_smoothing) == mixed
        sgd = published.name.startswith("finetune/hiera_large") and ssv2
        assert (run.optim.name, run.optim.betas) == ("sgd" if sgd else "adamw", (0.9, 0.999))
        return
    assert run.objective == "masked"
    assert (run.optim.name, run.optim.betas) == ("adamw", (0.9, 0.95))
    if "hiera" in published.name:
        assert (augment.crop, augment.scale, augment.flip) == ("random_resized", (0.5, 1.0), not ssv2)
        return
    assert (augment.crop, augment.corner_distortion, augment.corner_places, augment.flip) == (
        "multi_scale_corner", 1, 13, False,
    )  # fmt: skip


# (mask, ratio), decoder (width, blocks, heads), and the ratio of a decoder mask of running cells
MASKS = {
    "videomae_small": (("tube", 0.9), (192, 4, 3), None), "videomae_base": (("tube", 0.9), (384, 4, 6), None),
    "videomae_large": (("tube", 0.9), (512, 12, 8), None), "videomae_huge": (("tube", 0.9), (640, 12, 8), None),
    "videomae2_base": (("tube", 0.9), (384, 4, 6), 0.5), "videomae2_large": (("tube", 0.9), (512, 4, 8), 0.5),
    "videomae2_huge": (("tube", 0.9), (512, 4, 8), 0.5), "videomae2_giant": (("tube", 0.9), (512, 4, 8), 0.5),
    "hiera": (("random", 0.9), (512, 8, 8), None),
}  # fmt: skip
WIDTHS = {"small": 384, "base": 768, "large": 1024, "huge": 1280, "giant": 1408}


@pytest.mark.parametrize(
    "name", [one.name for one in BY_EPOCHS if one.name.startswith("pretrain/")], ids=lambda name: name
)
def test_masks_and_decoders(name: str) -> None:
    run = recipe(name)
    assert isinstance(run, PretrainRun)
    stem = name.removeprefix("pretrain/")
    mask, decoder, cells = next(row for start, row in MASKS.items() if stem.startswith(start))
    config = run.masked
    ratio = 0.75 if stem == "videomae_base_ucf101" else mask[1]
    assert (config.mask, config.ratio, config.normalise_targets) == (mask[0], ratio, True)
    assert (config.decoder_mask, config.decoder_ratio) == ("running_cell" if cells else None, cells or 0.5)
    width = config.decoder_width or WIDTHS[run.model.name.split("_")[2]] // 2
    assert (width, config.decoder_depth or 4, config.decoder_heads or width // 64) == decoder


@dataclass(frozen=True)
class Latent:
    """A released config of V-JEPA 2 or 2.1, its clips."""

    name: str
    model: str
    clips: int  # on each GPU
    gpus: int
    lr: float
    epochs: int  # of 300 steps
    predictor: int  # blocks
    cooldown: bool = False
    crop: int = 256


LATENT = (
    Latent("vjepa2_large", "vjepa2_large_16", 24, 128, 5.25e-4, 800, 12),
    Latent("vjepa2_huge", "vjepa2_huge_16", 24, 128, 5.25e-4, 800, 12),
    Latent("vjepa2_giant", "vjepa2_giant_16", 24, 128, 5.25e-4, 800, 12),
    Latent("vjepa2_large_cooldown", "vjepa2_large_16", 12, 256, 5.25e-4, 40, 12, True),
    Latent("vjepa2_huge_cooldown", "vjepa2_huge_16", 12, 256, 5.25e-4, 40, 12, True),
    Latent("vjepa2_giant_cooldown", "vjepa2_giant_16", 6, 512, 5.25e-4, 40, 12, True),
    Latent("vjepa2_giant_384_cooldown", "vjepa2_giant_16", 6, 512, 5.25e-4, 40, 12, True, 384),
    Latent("vjepa21_base", "vjepa21_base_16", 48, 64, 6e-4, 1000, 12),
    Latent("vjepa21_large", "vjepa21_large_16", 24, 128, 6e-4, 1000, 24),
    Latent("vjepa21_giant", "vjepa21_giant_16", 24, 128, 6e-4, 1000, 24),
    Latent("vjepa21_gigantic", "vjepa21_gigantic_16", 12, 256, 6e-4, 1000, 24),
    Latent("vjepa21_base_cooldown", "vjepa21_base_16", 24, 128, 6e-4, 40, 12, True),
    Latent("vjepa21_large_cooldown", "vjepa21_large_16", 12, 256, 6e-4, 40, 24, True),
    Latent("vjepa21_giant_cooldown", "vjepa21_giant_16", 12, 256, 6e-4, 40, 24, True),
    Latent("vjepa21_gigantic_cooldown", "vjepa21_gigantic_16", 6, 512, 6e-4, 40, 24, True),
)


@pytest.mark.parametrize("published", LATENT, ids=lambda published: published.name)
def test_latent_prediction(published: Latent) -> None:
    run = recipe(f"pretrain/{published.name}")
    assert isinstance(run, PretrainRun)
    data, schedule, latent = run.data, run.schedule, run.latent
    assert (run.objective, run.model.name, data.crop_pixels) == ("latent", published.model, published.crop)
    assert (run.engine.global_batch, run.engine.micro_batch) == (
        published.clips * published.gpus,
        published.clips,
    )
    assert run.engine.global_batch == 3072
    steps = published.epochs * 300
    assert (run.optim.name, schedule.steps, run.optim.lr) == ("adamw", steps, published.lr)
    assert (run.optim.lr_reference_batch, run.optim.weight_decay, run.optim.clip_grad_norm) == (None, 0.04, 0)
    assert (latent.teacher_momentum, latent.final_teacher_momentum) == (0.99925, None)
    assert (latent.predictor_width, latent.predictor_depth, latent.predictor_heads) == (
        384,
        published.predictor,
        12,
    )
    assert (data.sampling.frames, data.sampling.stride, data.sampling.fps) == (
        64 if published.cooldown else 16,
        1,
        4,
    )
    assert (data.augment.scale, data.augment.ratio, data.augment.flip) == ((0.3, 1.0), (0.75, 1.35), True)
    assert data.weights == (0.335, 0.1, 0.565)
    dense = "vjepa21" in published.name
    ramp = (15000, 30000) if dense and not published.cooldown else None
    assert (latent.dense, latent.context_weight, latent.context_ramp_steps) == (dense, 0.5, ramp)
    if published.cooldown:
        assert latent.keep_predictor
        assert run.initialise_from == f"runs/{run.name.removesuffix('-cooldown').removesuffix('-384')}"
        # linear from the first step over 1.25 times the run, towards 1e-6
        assert (schedule.warmup_share, schedule.stretch) == (0, 1.25)
        assert schedule.cooldown_share * steps == pytest.approx(steps, abs=2)
        assert schedule.final_lr_share * published.lr == pytest.approx(1e-6, rel=1e-4)
        assert not dense or not latent.context_near_first
        return
    assert schedule.warmup_share * steps == pytest.approx(40 * 300)
    assert schedule.first_lr_share * published.lr == pytest.approx(1e-4, rel=1e-4)
    assert schedule.cooldown_share == 0
    assert not dense or latent.context_near_first


# videos a step, epochs, frames, stride, pixels, clips of a video, and a head of the grid: learning rates, weight decays
GRID = ((5e-3, 3e-3, 1e-3, 3e-4, 1e-4), (0.01, 0.1, 0.4, 0.8))
DIVING = ((1e-3, 3e-4, 1e-4), (0.8,))
PROBES = {
    "vjepa2_large_probe_ssv2": (8 * 8 * 4, 20, 16, 4, 256, 2, GRID),
    "vjepa2_large_probe_k400": (8 * 8 * 4, 20, 16, 4, 256, 8, GRID),
    "vjepa2_large_probe_diving48": (8 * 8 * 2, 100, 32, 2, 256, 4, DIVING),
    "vjepa2_giant_384_probe_ssv2": (16 * 8 * 2, 20, 64, 2, 384, 2, GRID),
    "vjepa2_giant_384_probe_k400": (32 * 8 * 1, 20, 16, 4, 384, 8, GRID),
    "vjepa2_giant_384_probe_diving48": (8 * 8 * 2, 100, 32, 2, 384, 4, DIVING),
    "vjepa21_large_384_probe_ssv2": (8 * 8 * 4, 20, 16, 4, 384, 2, GRID),
    "vjepa21_large_384_probe_k400": (8 * 8 * 4, 20, 16, 4, 384, 8, GRID),
    "vjepa21_large_384_probe_diving48": (8 * 8 * 2, 100, 32, 2, 384, 4, DIVING),
}


@pytest.mark.parametrize("name", PROBES)
def test_attentive_probes(name: str) -> None:
    batch, epochs, frames, stride, pixels, clips, (lrs, decays) = PROBES[name]
    run = recipe(f"finetune/{name}")
    assert isinstance(run, FinetuneRun)
    data, schedule, augment = run.data, run.schedule, run.data.augment
    assert run.train_part == "head"
    assert run.model.options["head"] == "attentive"
    assert (run.engine.global_batch, schedule.epochs) == (batch, epochs)
    assert (schedule.name, schedule.warmup_share, schedule.final_lr_share) == ("cosine", 0, 0)
    assert peak_lr(run.optim, global_batch=batch) in lrs
    assert run.optim.weight_decay in decays
    assert (data.sampling.frames, data.sampling.stride, data.sampling.mode) == (frames, stride, "dense")
    assert (data.crop_pixels, data.resize_short_side_pixels) == (pixels, pixels)
    assert (data.views.clips, data.views.crops) == (clips, 3)
    assert (augment.scale, augment.flip, augment.erase_probability, augment.mixup_alpha) == (
        (0.08, 1.0), False, 0.25, 0,
    )  # fmt: skip


def test_every_recipe_is_in_a_table() -> None:
    found = {one.name for one in BY_EPOCHS} | {f"pretrain/{one.name}" for one in LATENT}
    assert found | {f"finetune/{name}" for name in PROBES} == RECIPES


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_it_can_be_told_how_it_did_and_where_it_starts(name: str) -> None:
    """Its shards have the splits it evaluates, the test split is not what chooses, and a recipe makes its start."""
    run = recipe(name)
    for url in run.data.urls:
        require_splits(run, SPLITS[Path(url).name])
    if isinstance(run, FinetuneRun):
        assert run.data.val_split != run.test_split
        assert run.data.val_share > 0
    if run.initialise_from is None:
        return
    starts = {recipe(other).output: recipe(other).model.name for other in RECIPES}
    elsewhere = ("runs/videomae-base-800-k400", "runs/videomae-base-800-ssv2", "runs/hiera-large-32-ssv2")
    if run.initialise_from not in elsewhere:  # which are other recipes with keys that a comment says
        assert starts[run.initialise_from] == run.model.name


# Parameters of classifiers by the number of classes, as instantiated from the authors' code.
PARAMETERS = {
    ("video_vit_small_16", 400): 22_033_936, ("video_vit_base_16", 400): 86_534_800,
    ("video_vit_base_16", 710): 86_773_190, ("video_vit_large_16", 400): 304_270_736,
    ("video_vit_huge_16", 400): 632_119_440, ("video_vit_huge_16", 710): 632_516_550,
    ("video_vit_giant_14", 710): 1_012_611_142, ("hiera_base", 400): 51_092_560,
    ("hiera_base_plus", 400): 69_392_240, ("hiera_large", 400): 213_091_600, ("hiera_huge", 400): 671_627_664,
    # encoder and probe of 174 classes
    ("vjepa2_large_16", 174): 303_885_312 + 49_514_670, ("vjepa2_giant_16", 174): 1_012_173_952 + 93_494_190,
}  # fmt: skip


def test_classifiers_have_the_published_sizes_and_take_the_clips() -> None:
    seen: dict[tuple[str, int], int] = {}
    for name in sorted(RECIPES):
        run = recipe(name)
        classes = CLASSES.get(Path(run.data.urls[0]).name, 0)
        if not isinstance(run, FinetuneRun) or (run.model.name, classes) in seen:
            continue
        with torch.device("meta"):
            model = create_model(
                run.model.name, num_classes=classes, in_frames=run.data.sampling.frames, **run.model.options
            )
        seen[run.model.name, classes] = sum(parameter.numel() for parameter in model.parameters())
    assert PARAMETERS.keys() <= seen.keys()
    assert {key: seen[key] for key in PARAMETERS} == PARAMETERS
