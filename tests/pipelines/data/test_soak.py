"""Ten thousand samples through the loader: memory and open files of its processes do not grow.

The clips are small: what leaks, leaks once an open, whatever the size.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from cliplift.configs.data import DataConfig
from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.pipelines.cost.loading_speed import open_files, resident_mib
from cliplift.pipelines.data.loader import ClipLoader
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.demo.synthetic import write_demo_videos

BATCH, SAMPLES, WARM_UP = 8, 12_000, 3_000


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> str:
    folder = tmp_path_factory.mktemp("soak")
    write_demo_videos(
        folder / "v", seed=8, train_per_class=6, val_per_class=1, test_per_class=1, unlabelled=1,
        size_pixels=64, workers=2,
    )  # fmt: skip
    words = [
        f"source.root={folder}/v/labelled",
        f"output={folder}/s",
        "workers=2",
        "shards.videos_per_shard=4",
    ]
    run_shard(load_run(repository / "configs" / "shard" / "demo_actions.yaml", RUNS, words).run)
    return str(folder / "s")


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_neither_memory_nor_open_files_grow(
    shards: str, decoder: str, record_property: pytest.RecordProperty
) -> None:
    """Resident memory of the workers grows less than 5 % after the warm-up, their files and ours not at all."""
    if decoder == "decord":
        pytest.importorskip("decord")
    data = DataConfig.model_validate(
        {"shards": shards, "sampling": {"frames": 4}, "crop_pixels": 32, "workers": 2, "decoder": decoder}
    )
    loader = ClipLoader(data, seed=0, global_batch=BATCH, micro_batch=BATCH, rank=0, world_size=1)
    before = set(multiprocessing.active_children())
    memory: dict[int, list[float]] = {}
    files: dict[int, list[int]] = {}
    for number, batch in enumerate(loader.micro_batches(start_step=0, stop_step=SAMPLES // BATCH), start=1):
        assert len(batch.labels) == BATCH
        if number * BATCH >= WARM_UP and number % 100 == 0 and number * BATCH < SAMPLES - 10 * BATCH:
            workers = [p.pid for p in multiprocessing.active_children() if p not in before and p.pid]
            assert len(workers) == 2
            for pid in (*workers, os.getpid()):
                memory.setdefault(pid, []).append(resident_mib(pid))
                files.setdefault(pid, []).append(open_files(pid))
    for pid, readings in memory.items():
        assert len(readings) >= 10
        growth = max(readings[-3:]) / max(readings[:3]) - 1
        record_property(f"growth_{pid}", growth)
        print(f"{decoder}, process {pid}: {readings[0]:.1f} MiB, then {readings[-1]:.1f} MiB ({growth:+.1%})")
        if pid != os.getpid():
            assert growth < 0.05
        # A few descriptors belong to the batches on their way, whose number varies.
        assert max(files[pid][-3:]) <= max(files[pid][:3]) + 4, files[pid]
