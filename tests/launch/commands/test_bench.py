"""``cliplift bench data``: the numbers hang together, and mistakes are one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cliplift.configs.data import DataConfig
from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.launch.cli import main
from cliplift.pipelines.cost import loading_speed
from cliplift.pipelines.cost.loading_speed import measure_loading
from cliplift.pipelines.data.batch import Costs
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
    shares, costs = speed.shares(), speed.costs
    spent = {"read": costs.read_seconds, "decode": costs.decode_seconds, "crop and resize": costs.cut_seconds,
             "collate": costs.collate_seconds}  # fmt: skip
    assert all(seconds > 0 for seconds in spent.values())
    assert {name: shares[name] for name in spent} == pytest.approx(
        {name: seconds / speed.seconds for name, seconds in spent.items()}
    )
    assert shares["other"] == pytest.approx(max(0.0, 1 - sum(spent.values()) / speed.seconds))
    largest = max(len(one) for one in (Path(p).read_bytes() for p in Path(shards).rglob("*.tar")))
    assert 120 * 1000 < speed.costs.read_bytes < 120 * largest
    assert speed.augment_ms_per_clip > 0
    one = speed.cores_for(gpus=1, clips_per_second_per_gpu=1000 / speed.cpu_ms_per_clip)
    assert one == 2, "a GPU that takes what one core decodes, and a tenth to spare"
    assert speed.cores_for(gpus=8, clips_per_second_per_gpu=10_000 / speed.cpu_ms_per_clip) == 88
    assert json.loads(speed.json())["clips_per_second"] == pytest.approx(speed.clips_per_second)


@pytest.mark.parametrize("workers", [0, 3])
def test_what_is_measured_is_what_passed(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Batches that take 1, 2 ... 20 ms of a clock that stands still otherwise, after a warm-up of a second each."""
    now = 0.0
    batch = SimpleNamespace(
        costs=Costs(read_bytes=500, read_seconds=0.001, decode_seconds=0.004),
        labels=[0, 1, 2],
        failed=["one"],
    )

    class Loader:
        def micro_batches(self, *, start_step: int, stop_step: int) -> Iterator[SimpleNamespace]:
            nonlocal now
            assert (start_step, stop_step) == (0, 2 + 20 + max(1, workers) * data.prefetch_batches)
            for milliseconds in (1000, 1000, *range(1, 21)):
                now += milliseconds / 1000
                yield batch

        def close(self) -> None:
            pass

    data = DataConfig.model_validate({"shards": "unused", "sampling": {"frames": 8}, "workers": workers})
    busy = iter((10.0, 10.3))
    monkeypatch.setattr(loading_speed, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(loading_speed, "training_loader", lambda *_, **__: Loader())
    monkeypatch.setattr(loading_speed, "_busy_seconds", lambda _: next(busy))
    monkeypatch.setattr(loading_speed, "_augment_ms", lambda *_: 0.25)
    speed = measure_loading(data, seed=0, micro_batch=3, batches=20, warm_up=2, device=torch.device("cpu"))
    assert (speed.clips, speed.frames, speed.failed) == (60, 480, 20)
    assert speed.seconds == pytest.approx(0.210)  # 1 + 2 + ... + 20 ms
    # Between ranks, percentiles are interpolated: at (n - 1) p of the sorted waits, counted from 0.
    expected = {50: 10.5, 90: 1 + 19 * 0.9, 99: 1 + 19 * 0.99, 100: 20.0}
    assert speed.waits_ms == pytest.approx(expected)
    assert speed.cpu_ms_per_clip == pytest.approx(300 / 60)
    assert speed.frames_per_second_per_core == pytest.approx(480 / 0.3)
    assert speed.mb_per_second == pytest.approx(20 * 500 / 0.210 / 1e6)
    time_of_workers = 0.210 * max(1, workers)
    shares = {
        "read": 0.020 / time_of_workers,
        "decode": 0.080 / time_of_workers,
        "crop and resize": 0,
        "collate": 0,
    }
    assert speed.shares() == pytest.approx(shares | {"other": 1 - sum(shares.values())})


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
        "4 clips per batch",
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
