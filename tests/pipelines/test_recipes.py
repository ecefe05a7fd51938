"""Every packaged training recipe: it resolves, its model takes its clips, and (slow) it trains a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS, TransferRun
from cliplift.launch.cli import main
from cliplift.models import create_model
from cliplift.models.registry import model_entry
from cliplift.pipelines.stage import run_stage
from cliplift.sharding.build import run_shard
from cliplift.sharding.synthetic import write_demo_videos

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for stage in ("transfer", "pretrain", "finetune")
    for path in (CONFIGS / stage).glob("*.yaml")
)
# Recipes whose family has tests of its own at full size.
ELSEWHERE = (
    "timesformer", "lrcn", "single_frame", "snippets", "attention", "multi_lstm", "forecast", "demo", "late_temporal",
)  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_resolves(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    stage = name.partition("/")[0]
    assert main([stage, name, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"stage: {stage}" in said
    assert '"train_batch_size"' in said


@pytest.mark.parametrize("name", [r for r in RECIPES if not any(word in r for word in ELSEWHERE)])
def test_a_recipe_fits_its_model(name: str) -> None:
    """At the recipe's own clip size, on the meta device."""
    run: Any = load_run(CONFIGS / f"{name}.yaml", RUNS).run
    data = run.data
    classes = 0 if isinstance(run, TransferRun) else 51
    with torch.device("meta"), torch.no_grad():
        model = create_model(
            run.model.name, num_classes=classes, in_frames=data.sampling.frames, **run.model.options
        ).eval()
        channels = model.input_spec.channels  # type: ignore[union-attr]
        out = model(torch.empty(1, channels, data.sampling.frames, data.crop_pixels, data.crop_pixels))
        if isinstance(run, TransferRun):
            assert model_entry(run.teacher.name).dims == "2d"
    assert out.shape == (1, classes or model.feature_dim)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("recipes")
    write_demo_videos(
        place / "videos",
        seed=1,
        train_per_class=2,
        val_per_class=1,
        test_per_class=1,
        unlabelled=8,
        size_pixels=64,
    )
    words = [f"source.root={place}/videos/labelled", f"output={place}/shards", "workers=2"]
    run_shard(load_run(CONFIGS / "shard/demo_actions.yaml", RUNS, words).run)
    return place / "shards"


# Published sizes of these need more memory or hours on a CPU than a test may take; their model is the recipe's own.
SMALLER = {
    "timesformer": ["data.sampling.frames=4", "data.sampling.stride=1"],
    "late_temporal": ["data.sampling.frames=16"],
    "resnext3d_101_bert": ["data.sampling.frames=16"],
    "snippets_conv_120": ["data.sampling.frames=12"],
    "1fps": ["data.sampling.frames=8"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_a_step(name: str, shards: Path, tmp_path: Path) -> None:
    run: Any = load_run(CONFIGS / f"{name}.yaml", RUNS).run
    transfer = isinstance(run, TransferRun)
    batch = 4 if transfer or run.data.clips_per_sample > 1 else 2
    words = [
        f"data.shards={shards}",
        f"output={tmp_path}",
        "model.pretrained=null",
        "schedule.epochs=null",
        "schedule.steps=1",
        f"engine.global_batch={batch}",
        f"engine.micro_batch={batch}",
        "data.fold=null",
        "data.val_share=0",
        "data.val_split=val",
        "data.split=train",
        "data.workers=0",
        "evaluation.max_samples=2",
        "evaluation.batch=2",
        "track.wandb=disabled",
        "data.views={}",
        *(word for key, more in SMALLER.items() if key in name for word in more),
    ]
    if transfer:
        words += ["teacher.pretrained=null", "correspondence.negatives_per_clip=1"]
    else:
        words += ["initialise_from=null"]
    if run.stage == "finetune":
        words += ["folds=[]"]
    if not transfer and run.task == "multi_label":
        pytest.skip("needs shards with several labels a clip")
    one = load_run(CONFIGS / f"{name}.yaml", RUNS, words).run
    result = run_stage(one, command=["cliplift", run.stage, name])
    assert result.finished
    assert (tmp_path / "weights/model.safetensors").is_file()
