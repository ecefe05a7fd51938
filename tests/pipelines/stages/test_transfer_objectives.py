"""Transfer's objectives on real mp4 files: refused early, kept once, the same on two ranks and after a restart."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS, TransferRun
from cliplift.configs.sections import ConfigError
from cliplift.models import create_model
from cliplift.pipelines.data.eval_loader import EvalLoader
from cliplift.pipelines.runs.retrieval import read_retrieval
from cliplift.pipelines.stages import transfer
from cliplift.pipelines.stages.run import run_stage, stage_of
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.demo.synthetic import write_demo_videos
from cliplift.sharding.read.reader import ShardDataset

# A student without BatchNorm, whose clips do not depend on those they are batched with, and a teacher with weights: the
# features of a random one vanish in fp16, and every loss would be the same.
SMALL = (
    "model={name: video_vit_tiny_8}", "schedule.steps=4", "engine.global_batch=8", "engine.micro_batch=4",
    "teacher.resize_pixels=32", "evaluation={batch: 8}", "checkpoint.every_steps=2",
    "track={every_steps: 1, wandb: disabled}", "data.crop_pixels=32", "data.resize_short_side_pixels=36",
    "data.sampling={frames: 8, mode: segments}", "engine.channels_last=false",
)  # fmt: skip
BANK = ("teacher.cache_features=true", "correspondence={objective: bank, time_steps: 2, order_negatives: 1}")
REGRESSION = (
    "teacher.frames=4",
    "correspondence={objective: regression, time_steps: 4, regression_loss: smooth_l1}",
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    folder = tmp_path_factory.mktemp("objectives")
    write_demo_videos(
        folder / "videos", seed=1, train_per_class=0, val_per_class=0, test_per_class=0, unlabelled=12,
        size_pixels=64,
    )  # fmt: skip
    words = [f"source.root={folder}/videos/unlabelled", f"output={folder}/shards", "workers=2"]
    run_shard(load_run(repository / "configs" / "shard" / "demo_unlabelled.yaml", RUNS, words).run)
    return folder / "shards"


def load(repository: Path, shards: Path, output: Path, *words: str) -> TransferRun:
    more = [f"data.shards={shards}", f"output={output}", *words]
    run: TransferRun = load_run(repository / "configs/transfer/demo.yaml", RUNS, more).run
    return run


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.fixture(scope="module")
def bank_folder(shards: Path, repository: Path) -> Path:
    """An unbroken run of the bank on one process."""
    return run_stage(load(repository, shards, shards.parent / "bank", *SMALL, *BANK), command=[]).folder


RIDGE = "correspondence.predictor_start=ridge"
OTHERS = "teacher.others=[{name: efficientnet_lite1, resize_pixels: 32}]"
OPTIONS = {
    "bank": BANK,
    "regression": REGRESSION,
    "cosines": (*REGRESSION, "correspondence.time_basis=cosines"),
    "two teachers": (*BANK, OTHERS),
    "ridge, spread": (
        *REGRESSION,
        RIDGE,
        "correspondence.time_basis=spread",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", [pytest.param(name, marks=() if name == "bank" else pytest.mark.slow) for name in OPTIONS]
)
def test_a_restart_goes_on_to_the_last_bit(
    objective: str, shards: Path, repository: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The run as it was after step 2, started again: losses of steps 3 and 4 are those of the unbroken run."""
    if objective == "bank":
        shutil.copytree(request.getfixturevalue("bank_folder"), tmp_path, dirs_exist_ok=True)
    run = load(repository, shards, tmp_path, *SMALL, *OPTIONS[objective])
    result = run_stage(run, command=[])
    assert -1 <= result.metrics["feature_cosine"] <= 1
    assert result.metrics["matching_prior"] == 0.5
    kept = read_retrieval(tmp_path)
    assert kept is not None
    assert kept.held_out_clips == result.metrics["held_out_clips"]
    unbroken = losses(tmp_path)
    assert sorted(unbroken) == [1, 2, 3, 4]
    assert len(set(unbroken.values())) == 4
    shutil.rmtree(tmp_path / "checkpoints/step_00000004")
    (tmp_path / "result.json").unlink()
    (tmp_path / "metrics.jsonl").unlink()
    again = run_stage(run, command=[])
    assert losses(tmp_path) == {step: unbroken[step] for step in (3, 4)}
    assert again.metrics == result.metrics
    assert read_retrieval(tmp_path) == kept


def on_two_ranks(repository: Path, shards: Path, output: Path, *words: str) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    more = [f"data.shards={shards}", f"output={output}", *SMALL, *words]
    done = subprocess.run(
        [*launch, "cliplift.launch.cli", "transfer", str(repository / "configs/transfer/demo.yaml"), *more],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_ranks_keep_the_same_features_and_find_the_same_losses(
    bank_folder: Path, shards: Path, repository: Path, tmp_path: Path
) -> None:
    """What is kept of the teacher is equal byte by byte, and the loss before an update to the last bit; after it, the
    gradients' sums over clips are rounded in another order."""
    on_two_ranks(repository, shards, tmp_path, *BANK)
    files = sorted(path.name for path in bank_folder.glob("teacher_*"))
    assert files == [
        "teacher_bank.safetensors",
        "teacher_features.safetensors",
        "teacher_statistics.safetensors",
    ]
    for name in files:
        assert (bank_folder / name).read_bytes() == (tmp_path / name).read_bytes(), name
    one, two = losses(bank_folder), losses(tmp_path)
    assert one.keys() == two.keys()
    assert len(set(one.values())) == 4
    assert one[1] == two[1]
    assert [two[step] for step in one] == pytest.approx(list(one.values()), rel=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OPTIONS)
def test_at_equal_weights_one_and_two_ranks_find_the_same_losses_to_the_last_bit(
    objective: str, shards: Path, repository: Path, tmp_path: Path
) -> None:
    """At a learning rate below rounding, so that the weights of all steps are those of the first."""
    words = (*OPTIONS[objective], "optim.lr=1e-30")
    run_stage(load(repository, shards, tmp_path / "one", *SMALL, *words), command=[])
    on_two_ranks(repository, shards, tmp_path / "two", *words)
    one = losses(tmp_path / "one")
    assert losses(tmp_path / "two") == one
    assert len(set(one.values())) == 4


def test_cached_features_are_those_of_sharp_frames(shards: Path, repository: Path, tmp_path: Path) -> None:
    """With cache_features the teacher's frames are cut from the stored picture, not scaled up from the student's."""
    words = ["teacher.cache_features=true", "teacher.resize_pixels=64",
             "correspondence={objective: bank}"]  # fmt: skip
    run = load(repository, shards, tmp_path / "small", *SMALL, *words)
    sharp = load(
        repository, shards, tmp_path / "sharp", *SMALL, *words, "data.crop_pixels=64",
        "data.resize_short_side_pixels=72",
    )  # fmt: skip
    tables = [stage_of(one)._table for one in (run, sharp)]  # type: ignore[attr-defined]
    assert torch.equal(*tables)
    assert len(tables[0]) == len(ShardDataset(str(shards), split="train"))
    assert len(tables[0].unique(dim=0)) == len(tables[0])


def test_statistics_of_a_teacher_that_is_asked_anew_come_from_some_clips(
    shards: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "STATISTICS_SAMPLES", 5)
    run = load(repository, shards, tmp_path, *SMALL, *REGRESSION)
    standard: Any = stage_of(run)._standard  # type: ignore[attr-defined]
    (sample,) = load_file(tmp_path / "teacher_sample.safetensors").values()
    assert sample.shape == (5, 4 * 1280)
    rows = sample.double().view(5 * 4, 1280)
    torch.testing.assert_close(standard.mean.double(), rows.mean(dim=0), rtol=1e-5, atol=1e-6)


def test_a_predictor_can_start_as_the_regression_on_the_students_features(
    shards: Path, repository: Path, tmp_path: Path
) -> None:
    """Its weights are those of numpy's least squares on what student and teacher say of the clips that are kept."""
    words = (*SMALL, "teacher.cache_features=true", *REGRESSION, RIDGE, "correspondence.ridge_penalty=0.1")
    stage: Any = stage_of(load(repository, shards, tmp_path, *words))
    layer = stage.module.predictor.output
    (seen,) = (t.double().numpy() for t in load_file(tmp_path / "student_start.safetensors").values())
    targets = stage._standard(stage._table, steps=4).flatten(1).double().numpy()
    assert seen.shape == (len(targets), layer.in_features)
    centred = seen - seen.mean(axis=0)
    rows = np.sqrt(0.1 * len(seen) * seen.var(axis=0).mean()) * np.eye(layer.in_features)
    wanted = np.concatenate([targets - targets.mean(axis=0), np.zeros((len(rows), targets.shape[1]))])
    expected = np.linalg.lstsq(np.concatenate([centred, rows]), wanted, rcond=None)[0].T
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    guesses = seen @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    np.testing.assert_allclose(guesses.mean(axis=0), targets.mean(axis=0), atol=1e-4)
    assert stage.module.training
    (batch,) = EvalLoader(stage.run.data, split="train", batch=64, rank=0, world_size=1)
    with torch.no_grad():
        now = stage.module.student.eval()(stage._clip_views[False](batch))
    np.testing.assert_allclose(now.numpy(), seen, rtol=1e-2, atol=1e-3)


def test_the_regression_asks_for_a_student_whose_features_stay(repository: Path, tmp_path: Path) -> None:
    run = load(repository, tmp_path, tmp_path, *REGRESSION, RIDGE, "teacher.pretrained=null")
    with pytest.raises(ConfigError, match="BatchNorm is held") as caught:
        stage_of(run).module  # noqa: B018
    assert caught.value.key == "correspondence.predictor_start"


REFUSED = {
    "correspondence.same_video_negatives": [
        ("correspondence.same_video_negatives=2", "data.clips_per_sample=2"),
        ("correspondence.same_video_negatives=1", "teacher.cache_features=true"),
        ("correspondence.same_video_negatives=1", "correspondence.objective=regression"),
    ],
    "correspondence.time_steps": [
        ("correspondence.time_steps=2",),
        ("correspondence.objective=regression", "correspondence.time_steps=3", "teacher.frames=8"),
        ("correspondence.objective=regression", "correspondence.time_steps=2", "teacher.cache_features=true"),
    ],
    "correspondence.objective": [
        ("correspondence.objective=bank",),
        ("correspondence.objective=nothing",),
        ("correspondence.objective=regression", "data.sequential={tars: x, samples_per_epoch: 9}"),
    ],
    "correspondence.order_negatives": [
        ("correspondence.order_negatives=1",),
        ("correspondence.objective=regression", "correspondence.order_negatives=1"),
        ("correspondence.objective=bank", "teacher.cache_features=true", "correspondence.order_negatives=1"),
        (
            "correspondence.objective=bank", "teacher.cache_features=true", "correspondence.time_steps=2",
            "data.sampling.mode=segments", "correspondence.order_negatives=2",
        ),
    ],
    "correspondence.predict_from": [("correspondence.predict_from=map",)],
    "correspondence.predictor_start": [
        (RIDGE,),
        (*REGRESSION, RIDGE, "correspondence.predict_from=map"),
        (*REGRESSION, RIDGE, "engine.zero_stage=3"),
    ],
    "correspondence.time_basis": [
        ("correspondence.time_basis=cosines",),
        ("correspondence={objective: regression, time_basis: cosines}", "teacher.frames=4"),
        ("correspondence={objective: regression, time_basis: spread}", "teacher.frames=4"),
        (
            "correspondence={objective: regression, time_basis: cosines, time_steps: 2, predict_from: map}",
            "teacher.frames=4",
        ),
        (
            "correspondence={objective: bank, time_basis: cosines, time_steps: 2}", "teacher.cache_features=true",
            "data.sampling.mode=segments",
        ),
    ],
    "teacher.others": [("teacher.others=[{name: efficientnet_lite1}]",)],
    "teacher.cache_features": [("teacher.cache_features=true", "data.sequential={tars: x, samples_per_epoch: 9}")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "words"), [(key, words) for key, cases in REFUSED.items() for words in cases]
)
def test_what_cannot_be_is_refused_when_the_config_is_read(
    key: str, words: tuple[str, ...], repository: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(repository, tmp_path / "none", tmp_path / "run", *words)
    assert caught.value.key.startswith(key), str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("student", "steps"), [("t3d_tiny", 2), ("video_vit_tiny_8", 8)])
def test_a_student_without_such_a_map_is_refused_before_the_teacher_is_asked(
    student: str, steps: int, shards: Path, repository: Path, tmp_path: Path
) -> None:
    """The last map of t3d_tiny has one time, the ViT's has four."""
    run = load(
        repository, shards, tmp_path, *SMALL, f"model.name={student}", "teacher.frames=8",
        "correspondence={objective: regression, predict_from: map}", f"correspondence.time_steps={steps}",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="times, which") as caught:
        run_stage(run, command=[])
    assert caught.value.key == "correspondence.predict_from"
    assert not list(tmp_path.glob("teacher_*"))


def test_a_student_whose_features_are_more_than_its_map_predicts_from_them_alone(
    repository: Path, tmp_path: Path
) -> None:
    """With mean and deviation over time the predictor of both has a weight for each; from the map there are none."""
    words = [
        "model={name: efficientnet_lite0_tam, options: {pooling: mean_deviation}}", "frozen_batchnorm=true",
        "teacher={pretrained: null, frames: 4}", "data.crop_pixels=32", "data.sampling.frames=4",
    ]  # fmt: skip
    spread = "correspondence={objective: regression, time_steps: 4, time_basis: spread}"
    built = stage_of(load(repository, tmp_path, tmp_path, *words, spread)).build_module(weights=False)
    assert built.network.feature_dim == 2560
    assert built.module.get_parameter("predictor.output.weight").shape == (2 * 1280, 2560)
    of_map = "correspondence={objective: regression, time_steps: 4, predict_from: map}"
    with pytest.raises(ConfigError, match="not the mean of its map") as caught:
        stage_of(load(repository, tmp_path, tmp_path, *words, of_map)).build_module(weights=False)
    assert caught.value.key == "correspondence.predict_from"


def test_a_student_that_starts_as_the_image_network_can_learn_time_alone(
    repository: Path, tmp_path: Path
) -> None:
    """Of the ImageNet weights nothing changes, statistics of BatchNorm included; the weights over time do."""
    held = "[stem.*, blocks.*.layers.*, head.*]"
    words = [
        f"model={{name: efficientnet_lite0_tam, pretrained: '2d:imagenet', frozen: {held}}}",
        "frozen_batchnorm=true", "teacher.pretrained=null", "teacher.frames=2",
        "correspondence={objective: regression, time_steps: 2}", "data.crop_pixels=32", "data.sampling.frames=4",
    ]  # fmt: skip
    stage = stage_of(load(repository, tmp_path, tmp_path, *words))
    module, network = stage.built.module.train(), stage.built.network
    trained = [p for p in module.parameters() if p.requires_grad]
    clips, targets = torch.randn(2, 3, 4, 32, 32), torch.randn(2, 2, 1280)
    module({"clips": clips, "targets": targets})["loss"].backward()
    torch.optim.SGD(trained, lr=1.0).step()
    learned = network.state_dict()
    image = create_model("efficientnet_lite0", num_classes=0, pretrained="imagenet").state_dict()
    assert all(torch.equal(learned[name], weight) for name, weight in image.items())
    over_time = {name for name in learned if name not in image}
    assert over_time == {f"blocks.{i}.temporal.weight" for i in range(16)}
    as_it_was = torch.tensor([0.0, 1.0, 0.0])[:, None]
    assert all((learned[name] - as_it_was).abs().max() > 0 for name in over_time)


def test_negatives_of_the_same_video_bring_their_clips(repository: Path, tmp_path: Path) -> None:
    """data.clips_per_sample is set where the run does not say it, and kept where it does."""
    hard = "correspondence.same_video_negatives=1"
    assert load(repository, tmp_path, tmp_path, hard).data.clips_per_sample == 2
    assert load(repository, tmp_path, tmp_path, hard, "data.clips_per_sample=4").data.clips_per_sample == 4
    assert load(repository, tmp_path, tmp_path).data.clips_per_sample == 1


def test_the_papers_objective_is_the_default_and_keeps_its_older_name(
    repository: Path, tmp_path: Path
) -> None:
    run = load_run(repository / "configs/transfer/t3d_121_youtube8m.yaml", RUNS).run
    assert run.correspondence.objective == "paper"
    older = load(repository, tmp_path, tmp_path, "correspondence.objective=binary")
    assert older.correspondence.objective == "paper"
