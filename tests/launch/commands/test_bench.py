"""``cliplift bench data``: the numbers hang together, and mistakes are one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cliplift.configs.data import DataConfig
from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.launch.cli import main
from cliplift.pipelines.cost.loading_speed import measure_loading
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.demo.synthetic import write_demo_videos


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> str:
    folder = tmp_path_factory.mktemp("bench")
    write_demo_videos(
        folder / "v", seed=3, train_per_class=3, val_per_class=1, test_per_class=1, unlabelled=1,
        size_pixels=96, workers=2,
    )  # fmt: skip
    words = [f"source.root={folder}/v/labelled", f"output={folder}/s", "workers=2"]
    run_shard(load_run(repository / "configs" / "shard" / "demo_actions.yaml", RUNS, words).run)
    return str(folder / "s")


@pytest.mark.parametrize("workers", [0, 1])
def test_the_numbers_hang_together(shards: str, workers: int) -> None:
    data = DataConfig.model_validate(
        {"shards": shards, "sampling": {"frames": 8}, "crop_pixels": 48, "workers": workers}
    )
    speed = measure_loading(data, seed=0, micro_batch=6, batches=20, warm_up=4, device=torch.device("cpu"))
    assert (speed.clips, speed.frames, speed.failed) == (120, 960, 0)
    assert speed.clips_per_second == pytest.approx(120 / speed.seconds)
    assert speed.waits_ms[50] <= speed.waits_ms[90] <= speed.waits_ms[99] <= speed.waits_ms[100]
    assert 1000 * speed.seconds / 20 <= speed.waits_ms[100], "the waits make up the whole time"
    shares = speed.shares()
    assert sum(shares.values()) == pytest.approx(1.0, abs=0.02)
    assert shares["decode"] > shares["collate"]
    assert shares["decode"] > 0.1
    largest = max(len(one) for one in (Path(p).read_bytes() for p in Path(shards).rglob("*.tar")))
    assert 120 * 1000 < speed.costs.read_bytes < 120 * largest
    assert speed.augment_ms_per_clip > 0
    one = speed.cores_for(gpus=1, clips_per_second_per_gpu=1000 / speed.cpu_ms_per_clip)
    assert one == 2, "a GPU that takes what one core decodes, and a tenth to spare"
    assert speed.cores_for(gpus=8, clips_per_second_per_gpu=10_000 / speed.cpu_ms_per_clip) == 88
    assert json.loads(speed.json())["clips_per_second"] == pytest.approx(speed.clips_per_second)


def test_the_command(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"data.shards={shards}", "engine.global_batch=8", "data.workers=0"]
    options = ["--steps", "3", "--warm-up", "1", "--gpus", "2", "--appetite", "100"]
    output = tmp_path / "speed.json"
    assert main(["bench", "data", "finetune/demo", *words, *options, "--output", str(output)]) == 0
    said = capsys.readouterr().out
    for part in (
        "clips/s",
        "frames/s/core",
        "MB/s",
        "p99",
        "decode",
        "4 clips a batch",
        "2 GPUs that take 100 clips/s",
    ):
        assert part in said
    written = json.loads(output.read_text())
    assert written["clips"] == 12
    assert f"need {written['cores']} cores" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["date", "finetune/demo"], "'date' cannot be measured"),
        (["data"], "names no config"),
        (["data", "shard/demo_actions"], "not a stage that trains"),
        (["data", "finetune/demo", "data.shards=nowhere"], "nowhere"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
