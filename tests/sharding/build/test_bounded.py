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
from cliplift.sharding.manifest import DATASET_FILE, SourceVideo
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
def test_a_plan_made_in_parts_is_the_one_made_at_once(
    rows_to_parquet: Callable[..., bytes], seed: int, rows: int, buffered: int
) -> None:
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


MEASURED = """
import sys
from functools import partial
from pathlib import Path
from cliplift.configs.sharding import ShardRun
from cliplift.sharding import tables
from cliplift.sharding.build import dedupe, finalize, plan
from cliplift.sharding.manifest import Sample, ShardIndex
from cliplift.sharding.read import columns
from cliplift.sharding.sources import dealing
from cliplift.sharding.storage import open_store
from cliplift.sharding.video import likeness

stage, rows, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
dealing.BUFFERED_VIDEOS = likeness.BUFFERED = columns.PART_ROWS = 2048
plan.ROWS_OF_A_GROUP = plan.ROWS_OF_A_BATCH = 4096
finalize.TableFile = partial(tables.TableFile, group_rows=4096)
columns.batches = partial(tables.batches, rows=4096)

def indexes():
    for shard in range(rows // 500):
        samples, looks = [], []
        for n in range(shard * 500, shard * 500 + 500):
            look = n * 0x9E3779B97F4A7C15 % 2**64  # spread over all buckets
            looks.append((look, look))
            samples.append(Sample(
                key=f"{n:08d}", mp4_offset=512, mp4_bytes=90, mp4_crc32=n, json_offset=0, json_bytes=2, json_crc32=7,
                video_id=f"video-{n}", source=f"{n}.mp4", split="train", label=n % 5, labels=(), folds=(), group=None,
                start_seconds=0.0, end_seconds=1.5, num_frames=10, fps=12.5, width=340, height=256, keyframes=(0, 8),
                source_sha256=f"{n:064d}"))
        yield ShardIndex(shard, "train", f"{shard}.tar", 10**6, "0", "p", tuple(samples), (), tuple(looks))

if stage == "plan":
    list_file = folder / "list.csv"
    with list_file.open("w") as file:
        file.write("path,label\\n")
        file.writelines(f"https://example.org/{n}.mp4,class {n % 7}\\n" for n in range(rows))
    source = {"kind": "csv", "file": str(list_file)}
    run = ShardRun.model_validate({"name": "n", "output": str(folder), "source": source})
    assert len(plan.plan_once(run, open_store(str(folder))).videos) == rows
elif stage == "finalize":
    table = folder / "samples.parquet"
    dataset = finalize.describe(indexes(), table=table, name="n", classes=tuple("abcde"), folds=0, missing=0,
                                plan_id="p", settings={})
    finalize.write_tables(dataset, table, open_store(str(folder / "out")))
else:
    survey = dedupe._Survey(folder)
    for index in indexes():
        survey.add(index)
    assert len(survey.possible()) < rows / 100
facts = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(facts["VmHWM"].split()[0]) / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["plan", "finalize", "duplicates"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, stage: str) -> None:
    """Ten times the rows, with small buffers: an object a row would be tens of megabytes more."""
    peaks_mib = []
    for rows in (10_000, 100_000):
        folder = tmp_path / f"{rows}"
        folder.mkdir()
        words = [sys.executable, "-c", MEASURED, stage, str(rows), str(folder)]
        done = subprocess.run(words, check=True, timeout=280, stdout=subprocess.PIPE, text=True)
        peaks_mib.append(float(done.stdout))
    assert peaks_mib[1] - peaks_mib[0] < 12, peaks_mib
