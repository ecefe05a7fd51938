"""Pretraining by forecasting, end to end on unlabelled shards, and its numbers against plain arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.configs.sections import ConfigError
from cliplift.models import create_model, from_pretrained
from cliplift.pipelines.data.eval_loader import EvalLoader
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.stages.forecast import ForecastStage, forecast_metrics
from cliplift.pipelines.stages.run import run_stage
from cliplift.pipelines.stages.starting_weights import initialise_from
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.demo.synthetic import write_demo_videos

ONE_RANK = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    folder = tmp_path_factory.mktemp("forecast")
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


def load(repository: Path, place: Path, output: str, *words: str) -> Any:
    small = [
        f"data.shards={place}/shards",
        f"output={place}/{output}",
        "track.wandb=disabled",
        "data.crop_pixels=32",
        "data.resize_short_side_pixels=36",
        "model.options.hidden=[8, 6]",
        "engine.global_batch=4",
        "evaluation.every_steps=null",
        "schedule.steps=3",
    ]
    return load_run(repository / "configs/pretrain/forecast_demo.yaml", RUNS, [*small, *words]).run


@pytest.fixture(scope="module")
def pretrained(place: Path, repository: Path) -> Path:
    run = load(repository, place, "pretrain", "schedule.steps=30", "optim.lr=0.02", "track.every_steps=1")
    result = run_stage(run, command=["cliplift", "pretrain", "pretrain/forecast_demo"])
    assert result.finished
    return result.folder


def test_it_trains_on_clips_without_labels_and_says_how_it_did(pretrained: Path) -> None:
    metrics = json.loads((pretrained / "result.json").read_text())["metrics"]
    assert metrics.keys() == {"loss", "mse", "mse_copy_last", "skill", "samples"}
    assert metrics["skill"] == pytest.approx(1 - metrics["mse"] / metrics["mse_copy_last"])
    rows = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert {"train/mse", "train/mse_copy_last"} <= rows[0].keys()
    assert losses[-1] < losses[0]
    errors = [row["train/mse"] for row in rows if "train/mse" in row]
    assert errors[-1] < 0.85 * errors[0], errors


def test_its_numbers_are_those_of_the_saved_network_on_the_split(
    pretrained: Path, place: Path, repository: Path
) -> None:
    """Recomputed clip by clip from the weights folder and the decoded frames, in numpy's terms."""
    network: Any = from_pretrained(pretrained / "weights")
    run = load(repository, place, "unused")
    squared, copied, crossed = [], [], []
    for batch in EvalLoader(run.data, split="val", batch=3, rank=0, world_size=1):
        for clip in batch.clips.double() / 255:  # (T, H, W, C)
            x = clip.permute(3, 0, 1, 2).float()[None]
            with torch.no_grad():
                p = network.forecast(x[:, :, :5], 5).double()
            future = x[:, :, 5:].double()
            squared.append((p - future).square().mean().item())
            copied.append((x[:, :, 4:5].double() - future).square().mean().item())
            crossed.append(-(future * p.log() + (1 - future) * (1 - p).log()).mean().item())
    metrics = json.loads((pretrained / "result.json").read_text())["metrics"]
    assert metrics["samples"] == len(squared) > 1
    for name, clips in (("mse", squared), ("mse_copy_last", copied), ("loss", crossed)):
        assert metrics[name] == pytest.approx(sum(clips) / len(clips), rel=1e-4), name


def test_the_weights_folder_says_what_it_is(pretrained: Path) -> None:
    card = json.loads((pretrained / "weights" / "config.json").read_text())
    assert card["options"]["forecaster"] is True
    assert card["in_frames"] == 5
    assert card["extra"]["forecast"] == {"input_frames": 5, "loss": "bce"}
    assert "classes" not in card["extra"]


def test_a_classifier_starts_from_the_runs_encoder(pretrained: Path) -> None:
    classifier = create_model("convlstm", num_classes=3, hidden=(8, 6), gray=False)
    initialise_from(classifier, str(pretrained))
    before, after = from_pretrained(pretrained / "weights").state_dict(), classifier.state_dict()
    body = [key for key in after if key.startswith("encoder.")]
    assert len(body) == len(after) - 2
    assert all(torch.equal(after[key], before[key]) for key in body)


@pytest.mark.parametrize("stage", [0, 3])
def test_it_trains_the_same_at_every_zero_stage(stage: int, place: Path, repository: Path) -> None:
    metrics = []
    for at in (1, stage):
        run = load(repository, place, f"zero{stage}-{at}", f"engine.zero_stage={at}", "forecast.loss=mse")
        metrics.append(dict(run_stage(run, command=[]).metrics))
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)


def test_evaluation_does_not_depend_on_the_batch(place: Path, repository: Path) -> None:
    found = []
    for batch in (1, 8):
        torch.manual_seed(0)
        run = load(repository, place, "unused", f"evaluation.batch={batch}")
        task = ForecastStage(run, classes=(), topology=ONE_RANK)
        found.append(task.evaluate(topology=ONE_RANK))
        assert task.flops_per_clip > 0
        columns, rows = task.clip_table(2)
        assert columns == ("key", "mse", "mse_copy_last")
        assert len(rows) == 2
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_still_clips_have_no_skill_to_show() -> None:
    still = {"loss": 0.5, "mse": 0.1, "mse_copy_last": 0.0}
    assert forecast_metrics([still]) == {**still, "samples": 1.0}
    moving = {"loss": 0.3, "mse": 0.3, "mse_copy_last": 0.8}
    assert forecast_metrics([still, moving])["skill"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("words", "key", "said"),
    [
        (["forecast.input_frames=10"], "forecast.input_frames", "leaves none to predict"),
        (["data.augment.mixup_alpha=0.2"], "data.augment.mixup_alpha", "forecasting has none"),
        (["label_smoothing=0.1"], "label_smoothing", "forecasting has none"),
        (["forecast.loss=l1"], "forecast.loss", "l1"),
        (["objective=forcast"], "objective", "forcast"),
    ],
)
def test_an_impossible_config_names_its_key(
    words: list[str], key: str, said: str, place: Path, repository: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load(repository, place, "refused", *words)
    assert caught.value.key == key


def test_a_model_that_cannot_forecast_is_refused_with_those_that_can(place: Path, repository: Path) -> None:
    run = load(repository, place, "refused", "model={name: t3d_tiny}")
    with pytest.raises(ConfigError, match="cannot predict frames") as caught:
        run_stage(run, command=[])
    assert caught.value.key == "model.name"
    assert "convlstm" in caught.value.hint


def test_every_batch_of_an_evaluation_tells_the_watchdog(
    place: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass longer than engine.hang_seconds is no hang: one beat for each batch."""
    beats: list[None] = []
    monkeypatch.setattr("cliplift.pipelines.evaluation.over_split.beat", lambda: beats.append(None))
    run = load(repository, place, "unused", "evaluation.batch=1")
    metrics = ForecastStage(run, classes=(), topology=ONE_RANK).evaluate(topology=ONE_RANK)
    assert len(beats) == metrics["samples"] > 1
