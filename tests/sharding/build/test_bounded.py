"""Plans and datasets made in parts: the bytes of the same made at once, also after being killed anywhere."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cliplift.configs.sharding import ShardRun
from cliplift.sharding.build import plan as planning
from cliplift.sharding.build.finalize import add_catalog
from cliplift.sharding.build.plan import load_plan, plan_once, settings_of
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.manifest import DATASET_FILE, SourceVideo, rows_to_parquet
from cliplift.sharding.sources import dealing
from cliplift.sharding.sources.lists import SourceError
from cliplift.sharding.storage import RangeFile, open_store

LABELS = ("b", "10", "2", "a a", "Ω")
MakeRun = Callable[..., ShardRun]


def write_list(folder: Path, seed: int, rows: int) -> list[dict[str, Any]]:
    """A list of clips, several of one video, whose files exist but for a few."""
    draw = np.random.default_rng(seed)
    found: dict[tuple[str, float | None], dict[str, Any]] = {}
    for _ in range(rows):
        path, start = f"{draw.integers(0, rows)}.mp4", [None, 0.0, 2.5, 10.0][draw.integers(0, 4)]
        found[path, start] = {
            "path": path, "label": LABELS[draw.integers(0, len(LABELS))], "start": start,
            "split": ("train", "val", "test")[draw.integers(0, 1 + seed % 3)],
            "group": f"g{draw.integers(0, 9)}",
        }  # fmt: skip
    listed = list(found.values())
    for row in listed:
        if row["path"] != "1.mp4":
            (folder / row["path"]).touch()
    with (folder / "list.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, listed[0])
        writer.writeheader()
        writer.writerows(listed)
    return listed


def run_of(folder: Path, output: str, **changes: Any) -> ShardRun:
    source = {"kind": "csv", "file": str(folder / "list.csv"), "split_column": "split", "group_column": "group",
              "start_column": "start"}  # fmt: skip
    tree = {"name": "set", "output": output, "source": source, "shards": {"videos_per_shard": 7, "seed": 3},
            "limits": {"max_missing_share": 1.0}}  # fmt: skip
    return ShardRun.model_validate(tree | changes)


def planned_at_once(listed: list[dict[str, Any]], run: ShardRun) -> tuple[list[SourceVideo], list[str], str]:
    """Videos in order, tars, and the plan's identity, by the rule written out over a list in memory."""
    numbers = sorted({int(row["label"]) for row in listed if row["label"].isdigit()})
    names = sorted({row["label"] for row in listed if not row["label"].isdigit()})
    classes = [*map(str, numbers), *names]
    videos = [
        SourceVideo(video_id=row["path"].removesuffix(".mp4"), source=row["path"], split=row["split"],
                    label=classes.index(row["label"]), group=row["group"], start_seconds=row["start"])
        for row in listed
        if row["path"] != "1.mp4"
    ]  # fmt: skip
    seed = run.shards.seed
    videos.sort(
        key=lambda v: (v.split, hashlib.sha256(f"{seed}:{v.source}:{v.start_seconds}".encode()).hexdigest())
    )
    tars = []
    for split in sorted({video.split for video in videos}):
        count = sum(video.split == split for video in videos)
        tars += [f"{split}/set-{split}-{len(tars) + n:06d}.tar" for n in range(-(-count // 7))]

    def text(tree: object) -> bytes:
        return json.dumps(tree, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()

    rows = [[v.video_id, v.source, v.split, v.label, [], [], v.group, v.start_seconds, None] for v in videos]
    rows_sha256 = hashlib.sha256(text(rows)).hexdigest()
    identity = hashlib.sha256(text([settings_of(run), classes, 0, rows_sha256])).hexdigest()
    return videos, tars, identity


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(3, 120), buffered=st.sampled_from([1, 7, 50, 1000]))
def test_a_plan_made_in_parts_is_the_one_made_at_once(seed: int, rows: int, buffered: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        folder = Path(temporary)
        patch.setattr(dealing, "BUFFERED_VIDEOS", buffered)
        listed = write_list(folder, seed, rows)
        run = run_of(folder, str(folder / "out"))
        videos, tars, identity = planned_at_once(listed, run)
        store = open_store(run.output)
        if not videos:
            return
        plan = plan_once(run, store)
        assert list(plan.videos) == videos
        assert [shard.tar for shard in plan.shards] == tars
        assert [v for s in plan.shards for v in plan.videos[s.start : s.stop]] == videos
        assert plan.plan_id == identity
        assert store.read("plan/videos.parquet") == rows_to_parquet(videos, SourceVideo)
        gone = [json.loads(line) for line in store.read("missing.jsonl").splitlines()]
        assert [row["source"] for row in gone] == [r["path"] for r in listed if r["path"] == "1.mp4"]


def test_groups_of_rows_are_gone_over_and_back_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "ROWS_OF_A_GROUP", 20)
    monkeypatch.setattr(planning, "ROWS_OF_A_BATCH", 9)
    monkeypatch.setattr(planning, "VIDEOS_READ", 4)
    listed = write_list(tmp_path, 5, 90)
    run = run_of(tmp_path, str(tmp_path / "out"))
    videos, _, _ = planned_at_once(listed, run)
    plan = plan_once(run, open_store(run.output))
    draw = np.random.default_rng(0)
    for _ in range(60):
        start, stop = sorted(draw.integers(0, len(videos) + 1, 2).tolist())
        assert plan.videos[start:stop] == tuple(videos[start:stop])
    with pytest.raises(IndexError):
        plan.videos[len(videos)]


def test_a_plan_in_a_bucket_is_read_by_range(tmp_path: Path) -> None:
    import fsspec

    listed = write_list(tmp_path, 5, 30)
    run = run_of(tmp_path, "memory://bounded/plan")
    try:
        plan_once(run, open_store(run.output))
        plan = load_plan(open_store(run.output))
        assert plan is not None
        assert list(plan.videos) == planned_at_once(listed, run)[0]
        with pytest.raises(FileNotFoundError):
            RangeFile(open_store(run.output), "none")
    finally:
        fsspec.filesystem("memory").rm("/bounded", recursive=True)


@pytest.mark.parametrize("buffered", [1, 1000])
def test_a_clip_listed_twice_is_named_with_both_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffered: int
) -> None:
    """Also where it is listed in two splits; other starts of the same video are other clips."""
    monkeypatch.setattr(dealing, "BUFFERED_VIDEOS", buffered)
    (tmp_path / "a.mp4").touch()
    rows = ["a.mp4,x,0.0,train,g", "a.mp4,x,1.0,train,g", "a.mp4,x,2.0,val,h", "a.mp4,x,1.0,test,i"]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,start,split,group", *rows]) + "\n")
    run = run_of(tmp_path, str(tmp_path / "out"))
    with pytest.raises(SourceError, match=r"a.mp4 is listed twice, list.csv, line 3 and list.csv, line 5"):
        plan_once(run, open_store(run.output))
    (tmp_path / "list.csv").write_text("\n".join(["path,label,start,split,group", *rows[:3]]) + "\n")
    assert len(plan_once(run, open_store(run.output)).videos) == 3


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "build.json" and not p.name.endswith(".tmp")
    }


SCRIPT = """
import os, signal, sys
from pathlib import Path
from cliplift.configs.sharding import ShardRun
from cliplift.sharding.build import run
from cliplift.sharding.build.finalize import add_catalog
from cliplift.sharding.storage import LocalStore

left = int(sys.argv[1])

def counted(done, after):
    def call(*arguments):
        global left
        left -= 1
        if left < 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        done(*arguments)
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return call

for verb in ("write", "publish"):
    setattr(LocalStore, verb, counted(getattr(LocalStore, verb), sys.argv[2] == "after"))
if sys.argv[3] == "upgrade":
    add_catalog(sys.argv[4])
else:
    run.run_shard(ShardRun.model_validate_json(Path(sys.argv[4]).read_text()), phases=[sys.argv[3]])
"""


def kill_at_every_step(words: list[str], again: Callable[[], None]) -> int:
    """Run a phase, killed at its n-th write for every n, then once more; how many times it was killed."""
    for steps in range(20):
        for when in ("before", "after"):
            done = subprocess.run(
                [sys.executable, "-c", SCRIPT, str(steps), when, *words], check=False, timeout=120
            )
            if done.returncode == 0:
                return steps
            assert done.returncode == -signal.SIGKILL
            again()
    raise AssertionError("never done")


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["plan", "finalize", "upgrade"])
def test_killed_at_any_write_it_leaves_the_same_bytes(
    built: Path, make_run: MakeRun, tmp_path: Path, phase: str
) -> None:
    """Each time the phase is run again, and the whole is the one that was never killed."""
    folder = tmp_path / "killed"
    run = make_run(folder)
    config = tmp_path / "run.json"
    config.write_text(run.model_dump_json())
    expected = contents(built)

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if phase == "plan":
            folder.mkdir()
            return
        shutil.copytree(built, folder)
        if phase == "finalize":
            for name in ("dataset.json", "samples.parquet", "catalog.bin", "catalog.json", "refused.jsonl"):
                (folder / name).unlink()
            return
        facts = json.loads((folder / DATASET_FILE).read_text())
        facts["format"] = "cliplift-shards/1"
        del facts["catalog_sha256"]
        text = json.dumps(facts, indent=1, ensure_ascii=False, sort_keys=True)
        (folder / DATASET_FILE).write_text(text + "\n")
        for name in ("catalog.bin", "catalog.json"):
            (folder / name).unlink()

    def again() -> None:
        if phase == "upgrade":
            add_catalog(str(folder))
        else:
            run_shard(run, phases=[phase])  # type: ignore[list-item]
        found = contents(folder)
        if phase == "plan":
            assert found == {name: expected[name] for name in found}
            assert set(found) == {"plan/plan.json", "plan/videos.parquet", "missing.jsonl"}
        else:
            assert found == expected
        prepare()

    prepare()
    subject = str(folder) if phase == "upgrade" else str(config)
    assert kill_at_every_step([phase, subject], again) >= 3
