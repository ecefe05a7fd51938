"""Videos added to a finished dataset: a generation of further shards, whatever interrupts it; the old ones stay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import webdataset

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun
from cliplift.launch.commands.shard import summary
from cliplift.sharding.build.finalize import remove_videos
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.build.verify import verify
from cliplift.sharding.manifest import DATASET_FILE
from cliplift.sharding.read.reader import ShardDataset

StopAfter = Callable[[int], AbstractContextManager[None]]

MakeRun = Callable[..., ShardRun]


@pytest.fixture
def videos(demo_videos: Path, tmp_path: Path) -> Path:
    """Seven videos of two classes, of which four are there from the start."""
    folder = tmp_path / "videos"
    for label in ("recede", "approach"):
        found = sorted((demo_videos / "labelled").rglob(f"*/{label}/*.mp4"))[:4]
        (folder / "train" / label).mkdir(parents=True)
        for number, path in enumerate(found):
            shutil.copy(path, folder / "train" / label / f"{number}.mp4")
    return folder


def run_of(make_run: MakeRun, videos: Path, output: Path, **changes: Any) -> ShardRun:
    source = {"kind": "folder", "root": str(videos), "layout": "split/class"}
    return make_run(output, source=source, shards={"videos_per_shard": 3}, workers=1, **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "build.json"
    }


def sources(url: Path | str) -> list[str]:
    return sorted(ShardDataset(str(url)).column("source"))


def hide(videos: Path, *names: str) -> Callable[[], None]:
    """Take videos away; returns what brings them back."""
    for name in names:
        (videos / "train" / name).rename(videos.parent / name.replace("/", "-"))
    return lambda: (
        [(videos.parent / n.replace("/", "-")).rename(videos / "train" / n) for n in names] and None
    )


def test_new_videos_become_a_generation_and_old_shards_stay(
    make_run: MakeRun, videos: Path, tmp_path: Path, stop_after: StopAfter
) -> None:
    out = tmp_path / "out"
    bring_back = hide(videos, "recede/2.mp4", "recede/3.mp4", "approach/3.mp4")
    run = run_of(make_run, videos, out)
    with pytest.raises(ConfigError, match=r"holds no dataset.json"):
        run_shard(run, add=True)
    run_shard(run)
    first = contents(out)
    old = sources(out)
    nothing = run_shard(run, add=True)
    assert (nothing.shards_total, nothing.dataset) == (0, None)
    assert contents(out) == first
    remove_videos(str(out), ["train/recede/0", "train/approach/3"])
    bring_back()

    # One part alone makes no generation; then the writes of the last step are interrupted one after the other.
    report = run_shard(run, add=True, phases=("plan", "build"))
    assert (report.shards_total, report.shards_built) == (1, 1)
    before = contents(out)
    for files in range(9):
        with stop_after(files), pytest.raises(KeyboardInterrupt):
            run_shard(run, add=True, phases=("finalize",))
        assert contents(out)[DATASET_FILE] == before[DATASET_FILE]
    report = run_shard(run, add=True)
    assert report.dataset is not None
    assert report.verified is not None
    assert report.verified.ok, summary(report)
    assert report.dataset.generation == 3
    after = contents(out)
    assert {n: after[n] for n in first if n != DATASET_FILE} == {
        n: first[n] for n in first if n != DATASET_FILE
    }
    assert after["generations/000001/dataset.json"] == first[DATASET_FILE]

    # The removed video stays out, whether it was there or came only now.
    added = ["train/recede/2.mp4", "train/recede/3.mp4"]
    kept = [name for name in old if name != "train/recede/0.mp4"]
    assert sources(out) == sorted(kept + added)
    assert sources(f"{out}@2") == sources(f"{out}@1") == kept
    facts = ShardDataset(str(out)).facts(len(kept))
    assert (facts.source in added, facts.key[:6], ShardDataset(str(out)).classes[facts.label or 0]) == (
        True, "000002", "recede",
    )  # fmt: skip
    tar = json.loads(after[DATASET_FILE])["shards"][-1]["file"]
    assert [s["__key__"] for s in webdataset.WebDataset(str(out / tar), shardshuffle=False)] == [
        "000002-00000-00000", "000002-00001-00000",
    ]  # fmt: skip
    assert run_shard(run, add=True).shards_total == 0

    with pytest.raises(ConfigError, match="has 3 generations, whose shards stay as they are"):
        run_shard(run, retry_failed=True)
    assert run_shard(run, phases=("verify",)).verified is not None
    assert verify(f"{out}@1", decode="none").ok


def test_what_cannot_be_added_is_refused(make_run: MakeRun, videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bring_back = hide(videos, "recede/1.mp4", "recede/2.mp4", "recede/3.mp4", "approach/3.mp4")
    run = run_of(make_run, videos, out)
    run_shard(run)
    bring_back()
    with pytest.raises(ConfigError, match=r"30 here, but the shards in .* were planned with 23") as caught:
        run_shard(run_of(make_run, videos, out, transcode={"crf": 30}), add=True)
    assert caught.value.key == "transcode.crf"
    (videos / "train" / "a new class").mkdir()
    shutil.copy(videos / "train" / "recede" / "1.mp4", videos / "train" / "a new class")
    with pytest.raises(ConfigError, match="names the class 'a new class', which the dataset does not have"):
        run_shard(run, add=True)
    assert not (out / "generations").exists()
