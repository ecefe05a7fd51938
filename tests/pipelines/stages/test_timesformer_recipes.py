"""The TimeSformer recipes: they load, their models exist, and they say what the paper and the released code say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cliplift.configs.data import DataConfig
from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.configs.sections import ConfigError
from cliplift.launch.cli import main
from cliplift.models import create_model
from cliplift.pipelines.data.clip_plan import training_box, view_boxes, view_frames

SIZES = ("base", "hr", "large")
NAMES = [f"timesformer_{size}_k400{kind}" for size in SIZES for kind in ("", "_released")]
EPOCH = 240_000  # training clips of Kinetics-400


@pytest.fixture
def recipe(repository: Path) -> Any:
    return lambda name: load_run(repository / f"configs/pretrain/{name}.yaml", RUNS).run


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fits_its_model(recipe: Any, name: str) -> None:
    run = recipe(name)
    with torch.device("meta"):
        model = create_model(
            run.model.name, in_frames=run.data.sampling.frames, num_classes=400, **run.model.options
        )
    spec, data = model.input_spec, run.data
    assert (spec.frames, spec.frame_stride) == (data.sampling.frames, data.sampling.stride)
    assert spec.crop_height == spec.crop_width == data.crop_pixels
    assert (spec.test_clips, spec.test_crops) == (data.views.clips, data.views.crops)
    assert run.schedule.epochs == 15
    assert run.evaluation.every_steps == EPOCH // run.engine.global_batch
    drops = [round(share * 15, 3) for share in run.schedule.milestones]
    assert drops == [11, 14]
    assert (run.optim.name, run.optim.lr, run.optim.momentum, run.optim.weight_decay) == (
        "sgd",
        5e-3,
        0.9,
        1e-4,
    )


@pytest.mark.parametrize("size", SIZES)
def test_the_two_kinds_differ_where_the_sources_do(recipe: Any, size: str) -> None:
    """models_seq 1.8 and 1.9."""
    paper, released = recipe(f"timesformer_{size}_k400"), recipe(f"timesformer_{size}_k400_released")
    assert (paper.engine.global_batch, released.engine.global_batch) == (16, 64)
    assert (paper.optim.nesterov, released.optim.nesterov) == (False, True)
    assert (paper.data.views.position, released.data.views.position) == ("spread", "from_start")
    assert (paper.data.views.average, released.data.views.average) == ("probabilities", "logits")
    assert (paper.data.sampling.fps, released.data.sampling.fps) == (None, 30.0)
    assert released.model.options["position_resize"] == "flat_nearest"
    assert "position_resize" not in paper.model.options


@pytest.mark.parametrize(
    ("name", "first"), [("timesformer_base_k400", 38), ("timesformer_base_k400_released", 0)]
)
def test_the_test_views_of_a_ten_second_video(recipe: Any, name: str, first: int) -> None:
    data: DataConfig = recipe(name).data
    (frames,) = view_frames(
        data.sampling,
        num_frames=302,
        fps=30.0,
        clips=data.views.clips,
        from_start=data.views.position == "from_start",
    )
    assert frames.tolist() == [first + 32 * i for i in range(8)]  # a clip spans 225 frames, 77 starts remain
    boxes = view_boxes(data, height=256, width=455, crops=data.views.crops)
    assert [(b.top, b.left, b.height) for b in boxes] == [(0, 0, 256), (0, 99, 256), (0, 199, 256)]


def test_several_clips_from_the_start() -> None:
    sampling = DataConfig(shards="x", sampling={"frames": 2, "stride": 1}).sampling
    found = view_frames(sampling, num_frames=12, fps=30.0, clips=3, from_start=True)
    assert [clip.tolist() for clip in found] == [[0, 1], [3, 4], [6, 7]]  # 10 * i // 3


def test_the_training_crop_is_cut_from_a_jittered_short_side(recipe: Any) -> None:
    data: DataConfig = recipe("timesformer_base_k400").data
    rng = np.random.default_rng(0)
    boxes = [training_box(data.augment, data, height=256, width=455, rng=rng) for _ in range(2000)]
    sides = {box.height for box in boxes}
    possible = {round(256 * 224 / short) for short in range(256, 321)}
    assert sides == possible  # every short side of [256, 320] was drawn, and no other
    assert all(box.height == box.width for box in boxes)
    assert min(b.top for b in boxes) == 0
    assert max(b.left + b.width for b in boxes) == 455


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"crop": "random", "short_side_pixels": [100, 320]}, "100 is smaller than crop_pixels=224"),
        ({"crop": "random", "short_side_pixels": [320, 256]}, "the smaller first"),
    ],
)
def test_impossible_short_sides(augment: dict[str, object], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        DataConfig(shards="x", crop_pixels=224, resize_short_side_pixels=224, augment=augment)


def test_a_dry_run_shows_the_resolved_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It needs neither shards nor weights."""
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "pretrain/timesformer_hr_k400_released", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for part in (
        "name: timesformer_hr",
        "position: from_start",
        '"train_batch_size": 64',
        "crop_pixels: 448",
    ):
        assert part in said
